"""Images of prompts with a token in them, in batches that fit in memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from config import RunConfig
from discriminative.diffusion.memory import Batches
from discriminative.diffusion.sampler import draw
from discriminative.records.files import clear, grid, to_pil, write_image, write_json
from discriminative.records.layout import RunFolder
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.objective import sampler_settings

COLUMNS = 8  # of a grid of images


def batches(
    config: RunConfig,
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    use: Callable[[torch.Tensor, list[int]], None],
) -> None:
    """Draw an image of each prompt from its seed, and give one batch after the other to ``use``.

    Args:
        use: takes images (B, 3, H, W) in [0, 1], float32 on the CPU, and their seeds.
    """
    with tqdm(total=len(seeds), desc=prompts[0], unit="image", leave=False) as progress:

        def work(chunk: slice) -> None:
            images = draw(token, prompts[chunk], seeds[chunk], sampler_settings(config)).float().cpu()
            use(images, seeds[chunk])
            progress.update(len(images))

        Batches(config.eval_batch_size).over(len(seeds), work)


def draw_all(config: RunConfig, token: ClassToken, prompt: str, seeds: list[int]) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of one prompt, a seed each; a changed batch size changes no noise."""
    images = []
    batches(config, token, [prompt] * len(seeds), seeds, lambda part, _: images.append(part))
    return torch.cat(images)


def generate(config: RunConfig, token: ClassToken, prompts: list[str], folder: RunFolder) -> list[Path]:
    """Draw ``config.num_images`` images of each prompt, singly and as a grid; returns the folders that they are in.

    Args:
        prompts: filled in; one has ``folder.prompt_images`` to itself, several are numbered below it.
    """
    seeds, folders = list(range(config.seed, config.seed + config.num_images)), []
    for pattern in ("**/*.png", "**/prompt.json"):
        clear(folder.prompt_images, pattern)
    for number, prompt in enumerate(prompts, start=1):
        out, drawn = folder.prompt_images if len(prompts) == 1 else folder.prompt_images / f"{number:02d}", []

        def use(images: torch.Tensor, chunk: list[int], out: Path = out, drawn: list = drawn) -> None:
            for seed, image in zip(chunk, images, strict=True):
                write_image(out / f"{seed:04d}.png", to_pil(image))
            drawn += images

        batches(config, token, [prompt] * len(seeds), seeds, use)
        write_image(out / "grid.png", grid(torch.stack(drawn), columns=min(COLUMNS, len(drawn))))
        write_json(out / "prompt.json", {"prompt": prompt, "seeds": seeds})
        folders.append(out)
    return folders
