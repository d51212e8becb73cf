"""Where guide and judge part: what a third classifier, of another family, says of the same images, and
how they look.

    python -m experiments.arbiter results/classes/pipeline_token/0020_*/*/learned_embeds.safetensors --out
    results/arbiter

The images are those of ``measure.py``. How many count is what a validation would make of them
(``validation_certainty``). A picture of those on which guide and judge differ is written for each token.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from classifiers import load_classifier
from discriminative.command_line import existing_file
from discriminative.guides.classifier import finite, verdicts
from discriminative.hub import quiet_libraries
from discriminative.records.files import write_image, write_lines
from discriminative.records.pictures import Shown, framed
from discriminative.tokens.files import read_origin
from discriminative.tokens.objective import counted
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.measure import Measured

WHO = ("guide", "judge", "judge2")
SHOWN = 8  # images in a row of a picture


@torch.no_grad()
def look(path: Path) -> tuple[dict, dict[str, list[Shown]]]:
    """How many of a token's images each classifier takes for its class, and with whom the third is where
    guide and judge part.

    Returns:
        the figures; and the first images on which they part, in a row for each classifier, with its verdict.
    """
    bench = Measured(int(read_origin(path)["class_index"]), path)
    images = bench.draw(fill(TEMPLATES[0], bench.word, bench.class_name))  # (N, 3, 64, 64)
    third = load_classifier("miniature-judge2", torch.device("cpu"), torch.float32)
    parts = [finite(bench.guide.logits(part), bench.guide.dtype) for part in images.split(50)]
    logits = torch.cat(parts)  # (N, K)
    said = {
        "guide": logits.argmax(1),
        "judge": verdicts(bench.judge, images, 50),
        "judge2": verdicts(third, images, 50),
    }  # (N,) each
    right = {who: labels == bench.target for who, labels in said.items()}
    losses = F.cross_entropy(logits, torch.full((len(images),), bench.target), reduction="none")  # (N,)
    counts = torch.tensor(
        counted(
            losses.tolist(), right["guide"].tolist(), bench.config.learning().validation.validation_certainty
        )
    )  # (N,)
    parted = right["guide"] != right["judge"]  # (N,)
    row = {"class_index": bench.target + 1, "token": str(path), "images": len(images)}
    row |= {who: int(of.sum()) for who, of in right.items()} | {"parted": int(parted.sum())}
    row |= {f"judge2_with_{who}": int((right["judge2"] == right[who])[parted].sum()) for who in WHO[:2]}
    for name, of in {
        "both": right["guide"] & right["judge"],
        "guide_alone": right["guide"] & ~right["judge"],
    }.items():
        row |= {name: int(of.sum()), f"{name}_count": int((of & counts).sum())}
    first = parted.nonzero()[:SHOWN, 0].tolist()
    names = bench.guide.labels
    shown = {
        f"what the {who} sees": [Shown(images[i], bool(right[who][i]), names[said[who][i]]) for i in first]
        for who in WHO
    }
    return row, shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=existing_file, nargs="+", help="files of the miniature's tokens")
    parser.add_argument(
        "--out", type=Path, default=Path("results/arbiter"), help="folder for rows and pictures"
    )
    args = parser.parse_args()
    quiet_libraries()
    rows = []
    print(
        "| class | token | guide | judge | second judge | guide and judge part on | second judge with the "
        "guide | with the judge "
        "| of both's count | of the guide's alone |"
    )
    print("|-" * 10 + "|")
    for path in args.tokens:
        row, shown = look(path)
        rows.append(row)
        write_lines(args.out / "rows.jsonl", rows)
        if row["parted"]:
            write_image(args.out / f"{path.parent.parent.name}-{path.parent.name}.png", framed(shown))
        shares = " | ".join(f"{row[who] / row['images']:.2f}" for who in WHO)
        told = f"{row['parted']} | {row['judge2_with_guide']} | {row['judge2_with_judge']}"
        told += "".join(f" | {row[f'{name}_count']} of {row[name]}" for name in ("both", "guide_alone"))
        print(f"| {row['class_index']} | {path.parent.name} | {shares} | {told} |", flush=True)


if __name__ == "__main__":
    main()
