"""How much memory an update needs at Stable Diffusion 1.4's shapes, without a GPU: the figures of
``memory.SETTINGS``.

    python -m experiments.speed.footprint
    python -m experiments.speed.footprint --images_per_update 10

The models, one step with gradient, the decoder and the guide run on fake tensors, which have shapes but
no data; every tensor that is alive is counted. What a GPU adds (its context, the libraries' workspaces,
the allocator's gaps) is not in it: ``gpu.py`` measures that. How memory grows with the number of last
steps that the gradient goes through is counted on the miniature, whose tensors are real.
"""

import argparse
import weakref
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from classifiers import load_classifier
from config import RunConfig
from discriminative.diffusion.gradients import decode_and_score, gradient_of
from discriminative.diffusion.memory import SETTINGS, Setting
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import Walk, chunks, decode, predict_clean
from discriminative.guides.classifier import Guide
from discriminative.settings import GradientPath, SamplerSettings
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.speed import common
from experiments.speed.sd_shapes import build_guide, build_models, making


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, number: int) -> None:
        self.now -= number


def needs(
    setting: Setting, images: int, tiny_vae: bool = False, dtype: torch.dtype = torch.float16
) -> dict[str, float]:
    """Bytes of the weights, and of all at the peak of an update of ``images`` images and of drawing
    without gradient.

    An update is that of one early step: later ones hold no more, as the steps before them leave no graph.
    """
    nowhere = torch.device("meta")
    settings = replace(RunConfig().sampler, decode_batch_size=setting.decode_batch_size, tiny_vae=tiny_vae)
    models = build_models(1.0, nowhere, dtype, setting.checkpointed)
    guide = build_guide(1.0, nowhere, dtype)
    models.device = torch.device("cpu")
    if tiny_vae:
        with making(nowhere, dtype):
            models.tiny_vae = (
                AutoencoderTiny().requires_grad_(False).eval()
            )  # its default is TAESD's configuration
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        for module in (models.unet, models.vae, models.tiny_vae, models.text_encoder, guide.classifier.model):
            if module:
                put_on_cpu(module)
        weights = live.now
    walk = walk_of(models, images, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        # As gradients.jump does at its one place; a scheduler would ask fake tensors for their numbers.
        clean = predict_clean(
            walk.start, walk.guided(0, walk.start), torch.tensor(0.01), "epsilon"
        )  # (B, C, h, w)
        scored = decode_and_score(walk, clean, lambda images, chunk: class_loss(guide, images), 1.0)
        gradient_of(clean, walk.cond, scored.gradient)
        update = live.peak
        live.peak = live.now
    walk = walk_of(models, setting.eval_batch_size, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), live, torch.no_grad():
        latents = walk.guided(0, walk.start)  # (B, C, h, w)
        [
            decode(models, latents[chunk], settings)
            for chunk in chunks(len(latents), setting.decode_batch_size)
        ]
    return {"weights": weights, "update": update, "drawing": live.peak}


def put_on_cpu(module: torch.nn.Module) -> None:
    """Give every weight that is nowhere a fake tensor on the CPU; what autograd does there is what it
    does on a GPU."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(
                part, name, torch.nn.Parameter(torch.empty_like(weight, device="cpu"), requires_grad=False)
            )
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cpu"))


def class_loss(guide, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``Objective.class_loss`` does."""
    logits = guide.classifier.logits(images)  # (B, K)
    target = torch.full((len(logits),), guide.target)
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target


def walk_of(models, batch: int, settings: SamplerSettings) -> Walk:
    """A walk of real, small tensors; what the models make of them is fake."""
    cond = torch.zeros(batch, 77, 768, dtype=models.dtype, requires_grad=True)  # (B, L, D)
    return Walk(
        models, cond, torch.zeros(1, 77, 768, dtype=models.dtype), torch.zeros(batch, 4, 64, 64), settings
    )


def of_last_steps(images: int) -> dict[int, int]:
    """Bytes at the peak of an update of the miniature through the last 1, 2 and 5 of 30 steps, its
    weights not counted."""
    to = (torch.device("cpu"), torch.float32)
    peaks = {}
    guide = Guide(load_classifier("miniature", *to), 0)
    token = ClassToken(load_models("miniature", *to), "newclas", "a")
    prompts = [fill(TEMPLATES[0], "newclas", "bat")] * images
    seeds = list(range(images))
    for steps in (1, 2, 5):
        with LiveBytes() as live:
            token_gradient(
                token,
                prompts,
                seeds,
                RunConfig().sampler,
                GradientPath("last", steps),
                lambda x, _: class_loss(guide, x),
                1.0,
            )
        peaks[steps] = live.peak
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images_per_update", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    rows = {name: needs(s, args.images_per_update) for name, s in SETTINGS.items()}
    tiny = {name: needs(s, args.images_per_update, tiny_vae=True) for name, s in SETTINGS.items()}
    found = {"images_per_update": args.images_per_update, "bytes": rows, "bytes_with_tiny_vae": tiny}
    found["miniature_bytes_of_last_steps"] = of_last_steps(args.images_per_update)
    common.finish(common.environment(torch.device("cpu")) | found, args.out)


if __name__ == "__main__":
    main()
