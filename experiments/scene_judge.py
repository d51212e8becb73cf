"""How often the detector that judges generated scenes is right.

    python -m experiments.scene_judge

Expect all 600 pairs right on renders and .997 through the VAE, and 93 of 100 drawn pictures judged as by eye,
in three minutes on one CPU core. A pair of ``dpt.data.scenes`` counts as right where the detected scene
proves the picture's caption true and the counterfactual's false. Backgrounds are left out of both, as the
detector sees none. The drawn pictures are those of ``results/scene_judge_labels.jsonl``, one a prompt.
Whether each shows all that its prompt says was written down by one person, before the detector's verdicts
were seen.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from discriminative.diffusion.models import load_models
from discriminative.hub import MINIATURE, quiet_libraries
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from dpt.alignment import alignments
from dpt.data.facts import Fact, Scene, verdict
from dpt.data.scenes import KINDS, PROMPT_KINDS, Miniature, Pair, Prompt, prompts
from dpt.evaluate import share
from experiments.rows import read
from miniature.classifiers import load_vae, reconstructions
from miniature.detector import NAME, Detector, load_detector, nouns
from miniature.scenes import CLASSES, Thing
from miniature.training import to_tensor

LABELS = Path(__file__).parent / "results" / "scene_judge_labels.jsonl"
SAMPLER = SamplerSettings(50, 7.5)
DRAWN_AT_ONCE = 10
CPU = torch.device("cpu")
SHOWN = 8  # kinds of mistakes
LABELLED = 25  # prompts of each kind
LABEL_SEED = 2024  # of these prompts


@dataclass(frozen=True)
class Judged:
    """A pair, what the detector sees in its picture, and what that says of the two captions."""

    pair: Pair
    things: tuple[Thing, ...]

    @property
    def said(self) -> tuple[bool | None, bool | None]:
        """The verdicts on the picture's caption and on the counterfactual's."""
        facts = (self.pair.true.fact, self.pair.hard.fact)
        return tuple(verdict(grounded(fact), Scene(self.things)) for fact in facts)

    @property
    def exact(self) -> bool:
        """Whether classes, tints and numbers are those of the picture."""
        return nouns(self.things) == nouns(self.pair.true.scene.things)

    def overlaps(self) -> list[float]:
        """For each thing that is seen as what it is, the best intersection over union of its box."""
        found = []
        for thing in self.pair.true.scene.things:
            alike = [t.box for t in self.things if nouns([t]) == nouns([thing])]
            if alike:
                found.append(box_iou(torch.tensor([thing.box]), torch.tensor(alike)).max().item())
        return found


def grounded(fact: Fact) -> Fact:
    """The fact without its background."""
    return replace(fact, background=None)


def judge(detector: Detector, pairs: list[Pair], images: np.ndarray) -> list[Judged]:
    """What the detector makes of images (N, 64, 64, 3) uint8."""
    seen = detector.things(to_tensor(images, CPU) / 2 + 0.5)
    return [Judged(pair, things) for pair, things in zip(pairs, seen, strict=True)]


def table(found: dict[str, list[Judged]]) -> str:
    """Shares with intervals of 95 %, by pictures and kind of pair."""
    lines = [
        "| pictures | pairs | number | right | own caption true | other caption false | cannot be told "
        "| scene exact |",
        "|-" * 8 + "|",
    ]
    for pictures, every in found.items():
        for kind in ("all", *KINDS):
            some = [one for one in every if kind in ("all", one.pair.kind)]
            own = [one.said[0] is True for one in some]
            other = [one.said[1] is False for one in some]
            cells = [
                [a and b for a, b in zip(own, other, strict=True)],
                own,
                other,
                [None in one.said for one in some],
                [one.exact for one in some],
            ]
            told = " | ".join(written(share(cell)) for cell in cells)
            lines.append(f"| {pictures} | {kind} | {len(some)} | {told} |")
    return "\n".join(lines)


def written(figure: dict) -> str:
    """A share with its interval."""
    return f"{figure['share']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def mistakes(found: list[Judged]) -> list[tuple[str, int]]:
    """The commonest differences of scenes that are not exact: what was there, and what was seen."""

    def listed(counter: Counter) -> str:
        names = [f"{tint or ''} {CLASSES[index].name}".strip() for index, tint in counter.elements()]
        return ", ".join(sorted(names)) or "nothing"

    counts = Counter()
    for one in found:
        true = nouns(one.pair.true.scene.things)
        seen = nouns(one.things)
        if true != seen:
            counts[f"{listed(true - seen)} seen as {listed(seen - true)}"] += 1
    return counts.most_common(SHOWN)


# Drawn pictures.


def draw_labelled(rows: list[dict]) -> torch.Tensor:
    """The pictures (N, 3, 64, 64) of the labels' prompts and seeds."""
    token = ClassToken(load_models("miniature", CPU, torch.float32), "newclas", "a")
    parts = [rows[i : i + DRAWN_AT_ONCE] for i in range(0, len(rows), DRAWN_AT_ONCE)]
    images = [token.sample([r["prompt"] for r in part], [r["seed"] for r in part], SAMPLER) for part in parts]
    return torch.cat(images)


def facts_of(rows: list[dict]) -> list[Prompt]:
    """The labels' prompts with their facts.

    Raises:
        KeyError: the world's prompts have changed since the labels were made.
    """
    known = {(kind, p.text): p for kind in PROMPT_KINDS for p in prompts(kind, LABELLED, LABEL_SEED)}
    return [known[row["kind"], row["prompt"]] for row in rows]


def label_table(rows: list[dict], verdicts: list[bool]) -> str:
    """By kind of prompt: how many pictures show all by eye, and by the detector; where the two differ."""
    lines = ["| prompts | pictures | right by eye | by the detector | the same |", "|-" * 5 + "|"]
    for kind in ("all", *PROMPT_KINDS):
        some = [
            (r["shows_all"], v) for r, v in zip(rows, verdicts, strict=True) if kind in ("all", r["kind"])
        ]
        same = share([eye == said for eye, said in some])
        lines.append(
            f"| {kind} | {len(some)} | {sum(eye for eye, _ in some)} | {sum(said for _, said in some)} "
            f"| {written(same)} |"
        )
    for row, said in zip(rows, verdicts, strict=True):
        if row["shows_all"] != said:
            lines.append(f"  {row['prompt']!r}, seed {row['seed']}: {said} by the detector")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=600, help="number of test pairs, all kinds alike")
    parser.add_argument("--detector", type=Path, default=MINIATURE / NAME, help="folder of its weights")
    args = parser.parse_args()
    quiet_libraries()
    data = Miniature("test", args.pairs)
    pairs = [data.story(i)[0] for i in range(args.pairs)]
    images = np.stack([np.asarray(pair.true.image) for pair in pairs])  # (N, 64, 64, 3)
    vae, _ = load_vae(MINIATURE, CPU)
    kinds = {"renders": images, "reconstructions": reconstructions(vae, images, 0.0, CPU)}
    detector = load_detector(args.detector)
    found = {name: judge(detector, pairs, some) for name, some in kinds.items()}
    print(table(found))
    for name, every in found.items():
        overlaps = [overlap for one in every for overlap in one.overlaps()]
        print(f"\n{name}: mean intersection over union of the boxes {np.mean(overlaps):.3f}")
        for mistake, number in mistakes(every):
            print(f"  {number} x {mistake}")
    rows = read(LABELS)
    aligned = alignments(detector, facts_of(rows), draw_labelled(rows))
    print(f"\n{label_table(rows, [alignment.full == 1 for _, alignment in aligned])}")


if __name__ == "__main__":
    main()
