"""Evaluate a class token: the same unseen seeds with and without it, scored by the guide and by a judge that never guided.

Also draws images for any prompt with a finished token.
"""

from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from class_token import TEMPLATES, ClassToken, fill
from classifiers import Classifier, Guide, finite
from config import RunConfig, evaluation_seeds
from memory import Batches
from outputs import RunFolder, clear, grid, to_pil, write_image, write_json
from sampler import draw
from trainer import sampler_settings

SHOWN = 8  # pairs in the picture that sets with and without the token one above the other


def draw_all(config: RunConfig, token: ClassToken, prompt: str, seeds: list[int]) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of one prompt, a seed each; a changed batch size changes no noise."""
    with tqdm(total=len(seeds), desc=prompt, unit="image", leave=False) as progress:

        def batch(chunk: slice) -> torch.Tensor:
            images = draw(token, [prompt] * len(seeds[chunk]), seeds[chunk], sampler_settings(config)).float().cpu()
            progress.update(len(images))
            return images

        return torch.cat(Batches(config.eval_batch_size).over(len(seeds), batch))


@torch.no_grad()
def verdicts(classifier: Classifier, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The most probable class (N,), counted from 0, of images (N, 3, H, W) in [0, 1].

    Raises:
        WorkError: a logit is not finite.
    """
    return torch.cat([finite(classifier.logits(part)).argmax(1).cpu() for part in images.split(batch_size)])


def score(classifier: Classifier, target: int, images: dict[str, torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
    """Right or wrong (N,) of each arm's images (N, 3, H, W) as class ``target``, from 0."""
    return {arm: verdicts(classifier, images[arm], batch_size) == target for arm in images}


def accuracies(right: dict[str, torch.Tensor] | None, prefix: str = "") -> dict[str, float | None]:
    """Share of right images by arm, null where nothing judged."""
    return {f"{prefix}accuracy_{arm}": right[arm].float().mean().item() if right else None for arm in ("token", "baseline")}


def evaluate(
    config: RunConfig, token: ClassToken, guides: list[Guide], judge: Guide | None, class_name: str, folder: RunFolder
) -> dict[str, Any]:
    """Draw ``config.test_size`` pairs, score them, write the images and ``evaluation.json``.

    Args:
        judge: the classifier that never guided; None where there is none, or where ``config.judge`` does not know the class.
        class_name: the name of the class in the prompts.

    Returns:
        what the file holds; accuracies are shares in [0, 1], null where nothing judged. An image is right where every guide
        says so; ``guides`` has each guide's own accuracies.
    """
    seeds, size = evaluation_seeds(config), config.eval_batch_size
    prompts = {
        "token": fill(TEMPLATES[0], token.placeholder, class_name),
        "baseline": fill(TEMPLATES[0], config.initializer_token, class_name),
    }
    images = {arm: draw_all(config, token, prompt, seeds) for arm, prompt in prompts.items()}  # (N, 3, H, W) each
    by_guide = {g.classifier.name: score(g.classifier, g.target, images, size) for g in guides}
    right = {arm: torch.stack([r[arm] for r in by_guide.values()]).all(0) for arm in images}  # (N,) each
    judged = score(judge.classifier, judge.target, images, size) if judge else None
    height, width = token.models.image_size(config.height, config.width)
    result = {
        "class_index": config.class_index,
        "class_name": guides[0].classifier.labels[guides[0].target],
        "classifier": ",".join(by_guide),
        "model": config.model,
        "token_path": config.token_path,
        "test_size": config.test_size,
        "seeds": seeds,
        "prompt_token": prompts["token"],
        "prompt_baseline": prompts["baseline"],
        **accuracies(right),
        "guides": {name: accuracies(r) for name, r in by_guide.items()},
        "judge": None if config.judge == "none" else config.judge,
        **accuracies(judged, "judge_"),
        "settings": asdict(sampler_settings(config))
        | {"height": height, "width": width, "scheduler": type(token.models.scheduler).__name__, "precision": str(token.models.dtype)},
    }
    for arm in images:
        clear(folder.eval_images, f"{arm}_*.png")
        for seed, image, ok in zip(seeds, images[arm], right[arm].tolist(), strict=True):
            write_image(folder.eval_images / f"{arm}_{seed:04d}_{'right' if ok else 'wrong'}.png", to_pil(image))
    # Above without, below with the token, the same seed in a column.
    pairs = torch.cat([images["baseline"][:SHOWN], images["token"][:SHOWN]])
    write_image(folder.eval_images / "without_and_with.png", grid(pairs, columns=min(SHOWN, len(seeds))))
    write_json(folder.result, result)
    return result


def generate(config: RunConfig, token: ClassToken, prompt: str, folder: RunFolder) -> None:
    """Draw ``config.num_images`` images of a prompt and write them, and a grid of them, to ``folder.prompt_images``."""
    seeds = list(range(config.seed, config.seed + config.num_images))
    images = draw_all(config, token, prompt, seeds)  # (N, 3, H, W)
    clear(folder.prompt_images, "*.png")
    for seed, image in zip(seeds, images, strict=True):
        write_image(folder.prompt_images / f"{seed:04d}.png", to_pil(image))
    write_image(folder.prompt_images / "grid.png", grid(images, columns=min(SHOWN, len(images))))
    write_json(folder.prompt_images / "prompt.json", {"prompt": prompt, "seeds": seeds})
