"""Images of prompts with a token in them, in batches that fit in memory."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from discriminative.diffusion.memory import Batches
from discriminative.guides.classifier import are_finite
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken


def in_batches(
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerSettings,
    batch_size: int | None,
    use: Callable[[torch.Tensor, list[int]], None],
) -> None:
    """Sample an image of each prompt from its seed, and give one batch after the other to ``use``.

    Args:
        batch_size: images at once; None is all. Halved where memory runs out.
        use: takes images (B, 3, H, W) in [0, 1], float32 on the CPU, and their seeds.
    """
    with tqdm(total=len(seeds), desc=prompts[0], unit="image", leave=False) as progress:

        def work(chunk: slice) -> None:
            images = token.sample(prompts[chunk], seeds[chunk], settings).float().cpu()
            broken = len(images) - int(are_finite(images).sum())
            if broken:
                half = token.models.dtype == torch.float16
                advice = "; --mixed_precision no or bf16 helps" if half else ""
                tqdm.write(
                    f"note: {broken} of {len(images)} images are not finite, so wrong and black{advice}"
                )
            use(images, seeds[chunk])
            progress.update(len(images))

        Batches(batch_size, token.models.fits, "sample").over(len(seeds), work)


def draw_all(
    token: ClassToken, prompt: str, seeds: list[int], settings: SamplerSettings, batch_size: int | None = None
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of one prompt, a seed each.

    A changed batch size changes no noise.
    """
    images = []
    in_batches(token, [prompt] * len(seeds), seeds, settings, batch_size, lambda part, _: images.append(part))
    return torch.cat(images)
