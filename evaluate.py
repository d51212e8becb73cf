"""Evaluate a class token: the same unseen seeds with and without it, scored by the guides and by a judge
that never guided."""

import hashlib
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from PIL import Image

from config import RunConfig
from discriminative.diffusion.kept import KeptLatents
from discriminative.diffusion.memory import peak_bytes
from discriminative.guides.classifier import Classifier, Guide, are_finite, check_most
from discriminative.guides.similarity import TextSimilarity
from discriminative.precision import coarse_without_gradient, evaluation_dtype
from discriminative.progress import progress
from discriminative.records.environment import environment
from discriminative.records.evaluation import EvaluationRecord, PromptRecord
from discriminative.records.files import (
    image_files,
    read_image,
    to_pil,
    write_image,
    write_json,
    write_table,
)
from discriminative.records.layout import RunFolder
from discriminative.records.pictures import Shown, framed
from discriminative.records.scores import (
    distances,
    interval,
    paired,
    paired_log_probabilities,
    ranks,
    spread,
)
from discriminative.seeds import evaluation_seeds
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import in_batches, sampling_record
from discriminative.tokens.files import fingerprint
from discriminative.tokens.objective import OVERFLOWN
from discriminative.tokens.prompts import TEMPLATES, fill, read_prompts

SHOWN = 8  # pairs in the picture that sets with and without the token one above the other
COMPARED = 8  # seeds of each arm sampled in the models' own precision, too, where --eval_precision is another
SURE = 0.05  # p-value of the verdicts up to which they say enough
VERDICTS = {True: "right", False: "wrong"}
TOP = 5  # labels in "top 5", and of those most often predicted


@dataclass
class Seen:
    """What a classifier makes of the images of one arm, batch after batch.

    Args:
        guide: the classifier, and the class in its labels.
    """

    guide: Guide
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    features: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of images that are finite
    finite: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # (N,)

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the classifier makes of images (B, 3, H, W), logits (B, K) and features (B, D); nothing is
        kept yet.
        """
        return tuple(x.cpu() for x in self.guide.classifier.look(images))

    def keep(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Add what was seen; returns which images are right, (B,). One that is not finite is wrong."""
        finite = are_finite(logits) & are_finite(features)  # (B,)
        wrong = torch.zeros_like(logits)  # (B, K)
        wrong[:, self.guide.target] = -OVERFLOWN
        logits = torch.where(finite.unsqueeze(1), logits, wrong)  # (B, K)
        features = features[finite]
        self.finite = torch.cat([self.finite, finite])  # (N,)
        self.logits = torch.cat([self.logits, logits]) if len(self.logits) else logits  # (N, K)
        self.features = torch.cat([self.features, features]) if len(self.features) else features  # (N, D)
        return logits.argmax(1) == self.guide.target

    @property
    def right(self) -> torch.Tensor:
        """Which images are of the class, (N,)."""
        return self.logits.argmax(1) == self.guide.target

    def labels(self) -> list[str]:
        """The label of each image, N."""
        told = zip(self.logits.argmax(1).tolist(), self.finite.tolist(), strict=True)
        return [self.guide.classifier.labels[i] if finite else "not finite" for i, finite in told]

    @property
    def log_probabilities(self) -> torch.Tensor:
        """Of the class, (N,)."""
        return self.logits.double().log_softmax(1)[:, self.guide.target]

    def row(self, i: int) -> dict[str, Any]:
        """The label that image ``i`` was given, and the class's probability in it."""
        label = self.guide.classifier.labels[int(self.logits[i].argmax())]
        return {"label": label, "probability": self.log_probabilities[i].exp().item()}

    def figures(self) -> dict[str, Any]:
        """Top-1 and top-5 accuracy with intervals, the class's mean probability and log-probability and
        median rank, and the labels most often predicted."""
        target = self.guide.target
        number = len(self.logits)
        labels = self.guide.classifier.labels
        among = (self.logits.topk(min(TOP, len(labels)), dim=1).indices == target).any(1)  # (N,)
        predicted = Counter(self.logits[self.finite].argmax(1).tolist()).most_common(TOP)
        return (
            shares(self.right, "accuracy")
            | shares(among, "top5")
            | {
                "probability": self.logits.softmax(1)[:, target].mean().item(),
                "log_probability": self.log_probabilities.mean().item(),
                "rank": median(ranks(self.logits, target).tolist()),
                "predicted": [[labels[i], count / number] for i, count in predicted],
            }
        )


def shares(right: torch.Tensor, name: str) -> dict[str, Any]:
    """A share and its interval, of a row of verdicts (N,)."""
    number = int(right.sum())
    return {name: number / len(right), f"{name}_interval": interval(number, len(right))}


class Arm:
    """One prompt, drawn on all seeds: what every classifier makes of it.

    Args:
        guides: an image is right where every guide says so. judge: which never guided; None where there
            is none for this class.
        likeness: of images (B, 3, H, W) to what they are to show, (B,); None where no CLIP model is named.
    """

    def __init__(
        self, prompt: str, guides: list[Guide], judge: Guide | None, likeness: Callable | None = None
    ):
        self.prompt = prompt
        self.by_guide = [Seen(g) for g in guides]
        self.by_judge = Seen(judge) if judge else None
        self.eyes = [*self.by_guide, *([self.by_judge] if self.by_judge else [])]
        self.likeness = likeness
        self.likenesses = []
        self.shown: list[Shown] = []  # the first images

    def unseen(self) -> "Arm":
        """The same prompt under the same eyes, of which nothing is seen yet."""
        judge = self.by_judge.guide if self.by_judge else None
        return Arm(self.prompt, [seen.guide for seen in self.by_guide], judge)

    def look(self, images: torch.Tensor) -> torch.Tensor:
        """Add images (B, 3, H, W); returns which are right by the guides, (B,)."""
        # Keep nothing yet: a batch that does not fit comes again.
        seen = [(eye, eye.look(images)) for eye in self.eyes]
        likenesses = self.likeness(images).tolist() if self.likeness else []
        verdicts = [eye.keep(*found) for eye, found in seen]  # (B,) each
        right = torch.stack(verdicts[: len(self.by_guide)]).all(0)  # (B,)
        self.likenesses += likenesses
        first = self.by_guide[0]
        labels = first.labels()[-len(images) :]
        new = [Shown(*shown) for shown in zip(images, right.tolist(), labels, strict=True)]
        self.shown += new[: SHOWN - len(self.shown)]
        return right

    @property
    def right(self) -> torch.Tensor:
        """Which images every guide takes for the class, (N,)."""
        return torch.stack([seen.right for seen in self.by_guide]).all(0)

    @property
    def log_probabilities(self) -> torch.Tensor:
        """Of the class, the mean over the guides, (N,): what training raises."""
        return torch.stack([seen.log_probabilities for seen in self.by_guide]).mean(0)

    @property
    def features(self) -> torch.Tensor:
        """Features (N, D) of the judge, or of the first guide where there is none."""
        return (self.by_judge or self.by_guide[0]).features

    def rows(self, name: str, seeds: list[int], folder: str) -> list[dict[str, Any]]:
        """A row an image, for ``images.csv``.

        Args:
            name: of the arm.
            folder: of its images, below the evaluation's.
        """
        eyes = {f"guide{i}" if i > 1 else "guide": seen for i, seen in enumerate(self.by_guide, start=1)}
        eyes |= {"judge": self.by_judge} if self.by_judge else {}
        rows = []
        for i, (seed, right) in enumerate(zip(seeds, self.right.tolist(), strict=True)):
            row = {"file": folder + picture_name(name, seed, right), "prompt": self.prompt, "arm": name}
            row |= {"seed": seed, "verdict": VERDICTS[right]}
            for who, seen in eyes.items():
                row |= {f"{who}_{key}": value for key, value in seen.row(i).items()}
            rows.append(row)
        return rows

    def figures(self, reference: torch.Tensor | None) -> dict[str, Any]:
        """All that is told of the arm; ``reference`` are features (M, D) of reference images.

        Of several guides "guide" has accuracy and log-probability of all together and the first one's other
        figures; "guides" has each one's own.
        """
        of_all = {"log_probability": self.log_probabilities.mean().item()}
        guide = self.by_guide[0].figures() | shares(self.right, "accuracy") | of_all
        told = {
            "prompt": self.prompt,
            "guide": guide,
            "judge": self.by_judge.figures() if self.by_judge else None,
        }
        if len(self.by_guide) > 1:
            told["guides"] = {seen.guide.classifier.name: seen.figures() for seen in self.by_guide}
        told["diversity"] = spread(self.features)
        if self.likeness:
            told["text_similarity"] = fmean(x for x in self.likenesses if math.isfinite(x))
        return told | (distances(self.features, reference) if reference is not None else {})


def arm_prompts(config: RunConfig, template: str, class_name: str) -> dict[str, str]:
    """The prompts that are compared: with the token, with the initializer in its place, and the plain one
    where that is another.

    Args:
        template: holds {token} and {class}. A word in front of {token} that another would only repeat ("a
            {token} cat") stands once.
    """
    words = {"token": config.placeholder_token, "baseline": config.initializer_token, "plain": "a"}
    prompts = {}
    for arm, word in words.items():
        repeated = rf"\b({re.escape(word)}) {{token}}"
        of_arm = template if arm == "token" else re.sub(repeated, r"\1", template, flags=re.IGNORECASE)
        prompts[arm] = fill(of_arm, word, class_name)
    return {arm: prompt for arm, prompt in prompts.items() if arm != "plain" or prompt != prompts["baseline"]}


def verdict(result: dict[str, Any]) -> str:
    """The evaluation in one line."""
    parts = []
    first = EvaluationRecord(result).first
    for who in ("guide", "judge"):
        before = first.share("baseline", who)
        after = first.share("token", who)
        if after:
            told = f"{who} {before.accuracy:.2f} -> {after.accuracy:.2f}"
            parts.append(f"{told} [{after.low:.2f}, {after.high:.2f}]")
    parts.append(f"p={first.p_value:.1g}")
    if first.p_value > SURE and first.share("token", "guide").accuracy < 1:
        parts.append(told_by_log_probability(first))
    if first.diversity_ratio is not None:
        parts.append(f"diversity {first.diversity_ratio:.2f}x")
    warning = "; the token fools the guide: the judge does not see the class" if first.fools_the_guide else ""
    return f"{result['class_name']}: {', '.join(parts)}{warning}"


def paired_figures(with_token: Arm | Seen, without: Arm | Seen) -> dict[str, float]:
    """What differs with the token on the same seeds: verdicts and log-probabilities."""
    verdicts = paired(with_token.right, without.right)
    return verdicts | paired_log_probabilities(with_token.log_probabilities, without.log_probabilities)


def told_by_log_probability(first: PromptRecord) -> str:
    """What the guide's log-probability and rank of the class say, where its verdicts say nothing."""
    logs = [first.log_probability(arm) for arm in ("baseline", "token")]
    ranked = [first.rank(arm) for arm in ("baseline", "token")]
    moved = f"log-probability {logs[0]:.2f} -> {logs[1]:.2f} (p={first.log_probability_p_value:.1g})"
    return f"{moved}, rank {ranked[0]:g} -> {ranked[1]:g}"


def compare(arms: dict[str, Arm], reference: torch.Tensor | None) -> dict[str, Any]:
    """The figures of one prompt's arms, and of the pairs with and without the token."""
    with_token = arms["token"]
    without = arms["baseline"]
    pairs = {"guide": paired_figures(with_token, without), "judge": None}
    if with_token.by_judge:
        pairs["judge"] = paired_figures(with_token.by_judge, without.by_judge)
    told = {arm: seen.figures(reference) for arm, seen in arms.items()}
    with_spread = told["token"]["diversity"]
    without_spread = told["baseline"]["diversity"]
    ratio = with_spread / without_spread if with_spread is not None and without_spread else None
    return {"arms": told, "paired": pairs, "diversity_ratio": ratio}


def reference_features(folder: str, classifier: Classifier) -> torch.Tensor:
    """Features (M, D) of all images of a folder, of whatever size."""
    rows = []
    for path in progress(image_files(folder), desc="reference images", unit="image", leave=False):
        with torch.no_grad():
            rows.append(classifier.look(read_image(path)[None])[1].cpu())
    return torch.cat(rows)


def reference_record(folder: str) -> dict[str, Any]:
    """What reference images there were: their folder, their number, and a hash of their files."""
    paths = image_files(folder)
    found = hashlib.sha256()
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return {"folder": folder, "images": len(paths), "sha256": found.hexdigest()}


def picture_name(arm: str, seed: int, right: bool) -> str:
    """An image's file: its verdict is seen in a list of files."""
    return f"{arm}_{seed:04d}_{VERDICTS[right]}.png"


def keep(arm: Arm, folder: Path, name: str, images: torch.Tensor, seeds: list[int]) -> None:
    """Score a batch of an arm, and write its images (B, 3, H, W), each marked by the verdict."""
    for seed, image, right in zip(seeds, images, arm.look(images).tolist(), strict=True):
        write_image(folder / picture_name(name, seed, right), to_pil(image))


def templates_of(config: RunConfig) -> list[str]:
    """The evaluation's prompts with {token} and {class} in them: training's first, then the user's."""
    further = read_prompts(config.eval_prompts, "eval_prompts") if config.eval_prompts else []
    return [TEMPLATES[0], *further]


def evaluate(
    config: RunConfig,
    token: ClassToken,
    guides: list[Guide],
    judge: Guide | None,
    class_name: str,
    folder: RunFolder,
    clip: TextSimilarity | None = None,
    options: dict[str, Any] | None = None,
    kept: KeptLatents | None = None,
) -> dict[str, Any]:
    """Sample every arm of every prompt on ``config.test_size`` seeds, score them, write images and figures.

    Args:
        judge: the classifier that never guided; None where there is none, or where it does not know the
            class.
        class_name: the name of the class in the prompts.
        options: what the evaluation was asked for with, for the record.
        kept: latents of prompts without a token, shared with other classes and runs; None samples all.

    Returns:
        what ``evaluation.json`` holds; accuracies are shares in [0, 1]; "judge" is null where nothing
        judged. An image is right where every guide says so.

    Raises:
        WorkError: most images are not finite.
    """
    start = time.monotonic()
    models = token.models
    coarse = evaluation_dtype(config.eval_precision, models.device, models.dtype)
    eyes = (judge or guides[0]).classifier
    reference = reference_features(config.reference_images, eyes) if config.reference_images else None
    shutil.rmtree(folder.unfinished_eval_images, ignore_errors=True)  # of a run that broke off
    if models.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(models.device)
    draw = partial(draw_arms, config, token, guides=guides, judge=judge, clip=clip, kept=kept)
    with coarse_without_gradient(models, coarse):
        result = new_result(config, token, guides, eyes, options)
        arms = evaluate_prompts(config, class_name, draw, folder, reference, result)
    if coarse:
        result["precision"] = compare_precisions(config, token, arms, kept)
    result["seconds"] = time.monotonic() - start
    result["peak_memory_gb"] = peak_bytes(models.device) / 1e9
    result["verdict"] = verdict(result)
    write_json(folder.unfinished_result, result)
    folder.take_evaluation()
    return result


def evaluate_prompts(
    config: RunConfig,
    class_name: str,
    draw: Callable[..., dict[str, Arm]],
    folder: RunFolder,
    reference: torch.Tensor | None,
    result: dict[str, Any],
) -> dict[str, Arm]:
    """Draw and compare every prompt's arms, add the figures to ``result``, write images and their rows.

    Args:
        draw: :func:`draw_arms`, for prompts and a folder.
        reference: features (M, D) of reference images.

    Returns:
        the first prompt's arms.
    """
    rows = []
    first = {}
    for number, template in enumerate(templates_of(config), start=1):
        below = "" if number == 1 else f"prompt_{number:02d}/"
        images = folder.unfinished_eval_images / below
        arms = draw(prompts=arm_prompts(config, template, class_name), folder=images)
        first = first or arms
        result["prompts"].append({"template": template} | compare(arms, reference))
        write_image(images / "grid.png", side_by_side(arms))
        for name, arm in arms.items():
            rows += arm.rows(name, result["seeds"], below)
    write_table(folder.unfinished_image_rows, rows)
    return first


def compare_precisions(
    config: RunConfig, token: ClassToken, arms: dict[str, Arm], kept: KeptLatents | None
) -> dict[str, Any]:
    """What ``--eval_precision`` does: the first seeds again in the models' own, with and without the token.

    Args:
        arms: of one prompt, sampled in ``--eval_precision``.
    """
    seeds = evaluation_seeds(min(config.test_size, COMPARED))
    pairs = {"guide": [], "judge": []}
    for name in ("token", "baseline"):
        coarse = arms[name]
        exact = coarse.unseen()
        use = partial(see, exact)
        prompts = [coarse.prompt] * len(seeds)
        in_batches(token, prompts, seeds, config.sampler, config.eval_batch_size, use, kept)
        pairs["guide"].append((coarse, exact))
        pairs["judge"].append((coarse.by_judge, exact.by_judge))
    return {
        "sampled_in": config.eval_precision,
        "compared_with": str(token.models.dtype).removeprefix("torch."),
        "seeds": seeds,
        "images": 2 * len(seeds),
        "guide": changes(pairs["guide"]),
        "judge": changes(pairs["judge"]) if arms["token"].by_judge else None,
    }


def see(arm: Arm, images: torch.Tensor, seeds: list[int]) -> None:
    """Score a batch (B, 3, H, W) of an arm, and write nothing."""
    arm.look(images)


def changes(pairs: list[tuple[Arm | Seen, Arm | Seen]]) -> dict[str, Any]:
    """How many verdicts differ between images of the same seeds, and by how much log-probabilities do.

    Args:
        pairs: of both precisions; the first may have further seeds.
    """
    flips = 0
    moves = []
    for coarse, exact in pairs:
        number = len(exact.right)
        flips += int((coarse.right[:number] != exact.right).sum())
        moves.append((coarse.log_probabilities[:number] - exact.log_probabilities).abs())
    moved = torch.cat(moves)  # (N,)
    return {
        "verdicts_changed": flips,
        "log_probability_change": moved.mean().item(),
        "log_probability_largest_change": moved.max().item(),
    }


def new_result(
    config: RunConfig,
    token: ClassToken,
    guides: list[Guide],
    eyes: Classifier,
    options: dict[str, Any] | None,
) -> dict[str, Any]:
    """An evaluation's record before its figures: what is evaluated, and with which settings."""
    return {
        "class_index": config.class_index,
        "class_name": guides[0].classifier.labels[guides[0].target],
        "classifier": config.classifier,
        "judge": None if config.judge == "none" else config.judge,
        "model": config.model,
        "token_path": config.token_path,
        "token": fingerprint(token.vector),
        "test_size": config.test_size,
        "seeds": evaluation_seeds(config.test_size),
        "options": options,
        "features": eyes.name,
        "settings": sampling_record(token.models, config.sampler),
        "reference_images": reference_record(config.reference_images) if config.reference_images else None,
        "environment": environment(token.models.device),
        "prompts": [],
    }


def draw_arms(
    config: RunConfig,
    token: ClassToken,
    prompts: dict[str, str],
    guides: list[Guide],
    judge: Guide | None,
    clip: TextSimilarity | None,
    folder: Path,
    kept: KeptLatents | None,
) -> dict[str, Arm]:
    """Every arm of a prompt, sampled on all seeds, scored, its images written to ``folder``."""
    seeds = evaluation_seeds(config.test_size)
    plain = prompts.get("plain", prompts["baseline"])
    arms = {}
    for name, prompt in prompts.items():
        arms[name] = Arm(prompt, guides, judge, partial(clip.of, text=plain) if clip else None)
        use = partial(keep, arms[name], folder, name)
        in_batches(token, [prompt] * len(seeds), seeds, config.sampler, config.eval_batch_size, use, kept)
        for eye in arms[name].eyes:
            check_most(len(seeds), int(eye.finite.sum()), token.models.dtype)
    return arms


def side_by_side(arms: dict[str, Arm]) -> Image.Image:
    """Above without, below with the token, the same seed in a column."""
    titles = {"baseline": "without", "token": "with the token"}
    return framed({f"{title}: {arms[name].prompt}": arms[name].shown for name, title in titles.items()})
