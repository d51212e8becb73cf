"""What a class token of the miniature is worth, beyond its accuracy: one JSON file for a token, one for a
class without it.

    python -m experiments.measure 2
    results/pipeline_token/0002_bat_cricket_bat/default/learned_embeds.safetensors
    python -m experiments.measure 2 --out results/without.json     # without a token: the plain prompt and
    the precise phrase

The seeds are those of ``run.py --evaluate True --test_size 100``, so the accuracies are the same;
sampling is the default's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from classifiers import load_classifier
from config import with_preset
from discriminative.command_line import existing_file
from discriminative.diffusion.models import load_models
from discriminative.guides.classifier import verdicts
from discriminative.guides.labels import prompt_class_name
from discriminative.hub import quiet_libraries
from discriminative.records.files import grid, write_image, write_json
from discriminative.records.scores import spread
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_all
from discriminative.tokens.files import read_token
from discriminative.tokens.prompts import TEMPLATES, fill
from miniature.scenes import CLASSES, HUES, with_article

SEEDS = range(100)
OTHER_TEMPLATES = (
    "a picture of {token} {class}",
    "a painting of {token} {class}",
    "{token} {class}",
)  # of the model's captions, none of which a token is trained on
COLOURS = ("red", "green", "blue", "purple")
SHOWN = 6


def background(image: np.ndarray) -> str:
    """The colour of a picture's background, (H, W, 3) uint8: the hue that most pixels of its border are
    nearest to, or gray."""
    hsv = np.asarray(Image.fromarray(image).convert("HSV"), dtype=np.float32)
    inside = np.zeros(hsv.shape[:2], bool)
    inside[3:-3, 3:-3] = True
    hue, saturation, _ = hsv[~inside].T  # (P,) each
    names = np.array([*HUES, "gray"])
    away = np.abs(hue[:, None] / 255 * 360 - np.array(list(HUES.values())))  # (P, hues), degrees
    nearest = np.minimum(away, 360 - away).argmin(1)  # (P,)
    found = np.where(saturation < 45, len(HUES), nearest)  # (P,); scenes' colours have at least 70
    return str(names[np.bincount(found, minlength=len(names)).argmax()])


class Measured:
    """The miniature with its guide and judge, for one class.

    Args:
        class_index: from 1. path: of a token's file, or None for the initializer in its place.
    """

    def __init__(self, class_index: int, path: Path | None):
        to = torch.device("cpu"), torch.float32
        self.target = class_index - 1
        self.config = with_preset("default", {"model": "miniature", "eval_batch_size": 50})
        self.guide = load_classifier("miniature", *to)
        self.judge = load_classifier("miniature-judge", *to)
        self.class_name = prompt_class_name(self.guide.labels[self.target])
        self.word = self.config.initializer_token
        name = self.config.placeholder_token
        vector = None
        if path:
            name, vector = read_token(path)
            self.word = name
        number = 1 if vector is None else len(vector)
        self.token = ClassToken(load_models("miniature", *to), name, self.config.initializer_token, number)
        if path:
            self.token.load(vector)

    def draw(self, prompt: str, number: int = len(SEEDS)) -> torch.Tensor:
        """Images (N, 3, 64, 64) of the first seeds."""
        return draw_all(self.token, prompt, list(SEEDS)[:number], self.config.sampler, 50)

    def right(self, images: torch.Tensor, classifier=None) -> torch.Tensor:
        """Which of the images (N, 3, 64, 64) are of the class, (N,), by the guide unless told otherwise."""
        return verdicts(classifier or self.guide, images, 50) == self.target

    @torch.no_grad()
    def diversity(self, images: torch.Tensor) -> float:
        """Spread of the right images in the judge's features."""
        right = images[self.right(images)]
        return (spread(self.judge.look(right)[1]) if len(right) else None) or 0.0

    def prompt_following(self) -> dict[str, float]:
        """Share of images on the background that was asked for, and, of them all, of the class."""
        on = []
        of_class = []
        for colour in COLOURS:
            images = self.draw(
                f"{fill(TEMPLATES[0], self.word, self.class_name)} on a {colour} background", 10
            )
            pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
            on += [background(p) == colour for p in pixels]
            of_class += self.right(images).tolist()
        return {"on_background": float(np.mean(on)), "right_on_background": float(np.mean(of_class))}


def measured(bench: Measured, prompt: str) -> tuple[dict, torch.Tensor]:
    """Right images by guide and judge, counted over the seeds, and their diversity; and the images (N, 3,
    64, 64)."""
    images = bench.draw(prompt)
    counts = {
        who: int(bench.right(images, c).sum()) for who, c in (("guide", bench.guide), ("judge", bench.judge))
    }
    return counts | {"images": len(images), "diversity": bench.diversity(images)}, images


def measure(class_index: int, path: Path | None, out: Path) -> None:
    """Write what is measured to ``out``, and the first images beside it."""
    bench = Measured(class_index, path)
    result, images = measured(bench, fill(TEMPLATES[0], bench.word, bench.class_name))
    result |= bench.prompt_following()
    if path:
        others = torch.cat(
            [bench.right(bench.draw(fill(t, bench.word, bench.class_name), 10)) for t in OTHER_TEMPLATES]
        )
        result |= {"other_templates": others.float().mean().item(), "token_norm": bench.token.norm()}
    else:
        result["phrase"], _ = measured(bench, f"A photo of {with_article(CLASSES[bench.target].name)}")
    write_image(out.with_suffix(".png"), grid(images[:SHOWN], columns=SHOWN))
    write_json(out, result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("class_index", type=int, help="from 1")
    parser.add_argument("token", type=existing_file, nargs="?", help="a token's file")
    parser.add_argument("--out", type=Path, help="default: measured.json beside the token")
    args = parser.parse_args()
    if not (args.token or args.out):
        parser.error("--out: is needed where no token is given")
    quiet_libraries()
    out = args.out or args.token.with_name("measured.json")
    measure(args.class_index, args.token, out)
    print(json.dumps(json.loads(out.read_text()), indent=2))


if __name__ == "__main__":
    main()
