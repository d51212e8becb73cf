"""Evaluate a class token: the same unseen seeds with and without it, scored by the guide and by a judge that never guided.

Also draws images for any prompt with a finished token.
"""

from dataclasses import asdict

import torch
from tqdm import tqdm

from class_token import TEMPLATES, ClassToken, fill
from classifiers import Classifier, finite
from config import RunConfig, evaluation_seeds
from outputs import RunFolder, clear, grid, to_pil, write_image, write_json
from sampler import draw
from trainer import sampler_settings

SHOWN = 8  # pairs in the picture that sets with and without the token one above the other


def draw_all(config: RunConfig, token: ClassToken, prompt: str, seeds: list[int]) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of one prompt, a seed each; a changed batch size changes no noise."""
    size, images = config.eval_batch_size, []
    for i in tqdm(range(0, len(seeds), size), desc=prompt, unit="batch", leave=False):
        chunk = seeds[i : i + size]
        images.append(draw(token, [prompt] * len(chunk), chunk, sampler_settings(config)).float().cpu())
    return torch.cat(images)


@torch.no_grad()
def verdicts(classifier: Classifier, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The most probable class (N,), counted from 0, of images (N, 3, H, W) in [0, 1].

    Raises:
        WorkError: a logit is not finite.
    """
    device = next(classifier.model.parameters()).device
    return torch.cat([finite(classifier.logits(part.to(device))).argmax(1).cpu() for part in images.split(batch_size)])


def target_of(judge: Classifier | None, guide: Classifier, target: int) -> int | None:
    """The judge's index, from 0, of the guide's class ``target``; None without a judge that knows the label for sure.

    A label may stand twice in a list (ImageNet has two cranes), so equal lists are matched by index and others by name.
    """
    if judge is None or judge.labels == guide.labels:
        return None if judge is None else target
    name = guide.labels[target]
    return judge.labels.index(name) if judge.labels.count(name) == 1 else None


def score(classifier: Classifier | None, target: int | None, images: torch.Tensor, batch_size: int) -> torch.Tensor | None:
    """Right or wrong (N,) of each image as class ``target``, from 0; None where that is None."""
    return None if target is None else verdicts(classifier, images, batch_size) == target


def share(right: torch.Tensor | None) -> float | None:
    """Share of true entries, None for None."""
    return None if right is None else right.float().mean().item()


def evaluate(
    config: RunConfig, token: ClassToken, classifier: Classifier, judge: Classifier | None, class_name: str, folder: RunFolder
) -> dict:
    """Draw ``config.test_size`` pairs, score them, write the images and ``evaluation.json``.

    Args:
        class_name: the name of the class in the prompts.

    Returns:
        what the file holds; accuracies are shares in [0, 1], null where no judge knows the class.
    """
    seeds, target = evaluation_seeds(config), config.class_index - 1
    prompts = {
        "token": fill(TEMPLATES[0], token.placeholder, class_name),
        "baseline": fill(TEMPLATES[0], config.initializer_token, class_name),
    }
    images = {arm: draw_all(config, token, prompt, seeds) for arm, prompt in prompts.items()}  # (N, 3, H, W) each
    targets = ((classifier, target), (judge, target_of(judge, classifier, target)))
    right, judged = ({arm: score(c, t, images[arm], config.eval_batch_size) for arm in images} for c, t in targets)
    height, width = token.models.image_size(config.height, config.width)
    result = {
        "class_index": config.class_index,
        "class_name": classifier.labels[target],
        "classifier": classifier.name,
        "model": config.model,
        "test_size": config.test_size,
        "seeds": seeds,
        "prompt_token": prompts["token"],
        "prompt_baseline": prompts["baseline"],
        "accuracy_token": share(right["token"]),
        "accuracy_baseline": share(right["baseline"]),
        "judge": judge.name if judged["token"] is not None else None,
        "judge_accuracy_token": share(judged["token"]),
        "judge_accuracy_baseline": share(judged["baseline"]),
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
