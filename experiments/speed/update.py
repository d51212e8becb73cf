"""Seconds of one update on the miniature: ours, the plain reference, and the model calls alone.

    python -m experiments.speed.update --rounds 5

Everything runs in this process, in turns. "ours, ..." is a whole update: images, scores, gradient,
optimiser, log and pictures. "bare, ..." are the calls of text encoder, UNet, VAE decoder and guide that
this update made, with their shapes and gradients, and nothing else. "float32, ..." is our update with
``--mixed_precision no``, "channels first, ..." that without ``precision.channels_last`` too.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from classifiers import load_classifier
from config import RunConfig, with_preset
from discriminative.diffusion.memory import peak_bytes
from discriminative.diffusion.models import load_models
from discriminative.guides.classifier import Guide
from discriminative.guides.labels import prompt_class_name
from discriminative.hub import quiet_libraries
from discriminative.precision import bf16_without_gradient, channels_last
from discriminative.records.layout import RunFolder
from discriminative.tokens.class_token import ClassToken
from experiments.speed import common
from experiments.speed.reference import Reference
from trainer import train

CLASS = 2


def stages_of(config: RunConfig) -> dict[str, RunConfig]:
    """One configuration for each stage, which is then its only one."""
    return {
        f"stage {i}": replace(config, jump_at=place)
        for i, place in enumerate(config.jump_at.split(";"), start=1)
    }


def cases_of_ours() -> dict[str, RunConfig]:
    """One update each of the paper's settings and of the stages of the default.

    Of the paper's two steps with gradient one: replayed calls do not know those that are computed again.
    """
    once = {
        "model": "miniature",
        "class_index": CLASS,
        "train": True,
        "choose_by": "loss",
        "max_epochs": 1,
        "device": "cpu",
    }
    return {"paper": with_preset("paper", once | {"gradient_mode": "last"})} | stages_of(
        with_preset("default", once)
    )


def second_update(learn: Callable[[Callable], object]) -> float:
    """Seconds from the end of a training's first update to the end of its second: all of an update, and
    nothing that is done once.

    Args:
        learn: takes what is to be told of each update.
    """
    ends = []
    learn(lambda *_: ends.append(time.perf_counter()))
    return ends[1] - ends[0]


def record_calls(parts: dict[str, torch.nn.Module], work: Callable[[], object]) -> list[tuple]:
    """(module, args, kwargs, with gradient, in bfloat16) of every call that ``work`` makes of the modules."""
    calls = []

    def note(module, args, kwargs):
        calls.append((module, args, kwargs, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts.values()]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def replay(calls: list[tuple], token: ClassToken) -> None:
    """Make the calls again, each by itself, with their backward pass where they had one."""

    def fresh(value):
        return (
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        )

    coarse = any(
        call[-1] for call in calls
    )  # as while they were recorded: it decides how the UNet lies in memory
    models = token.models
    with token.spliced(), bf16_without_gradient(models, coarse), channels_last(models):
        for module, args, kwargs, with_gradient, in_bf16 in calls:
            args = [fresh(a) for a in args]
            kwargs = {k: fresh(v) for k, v in kwargs.items()}
            with (
                torch.set_grad_enabled(with_gradient),
                torch.autocast("cpu", torch.bfloat16, enabled=in_bf16),
            ):
                out = module(*args, **kwargs)
            out = out if isinstance(out, torch.Tensor) else out[0]
            if with_gradient and out.requires_grad:
                inputs = [
                    v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad
                ]
                torch.autograd.grad(out, inputs or [token.vector], torch.ones_like(out))


def measure(rounds: int) -> dict:
    """Median seconds of every case, and the ratios."""
    device = torch.device("cpu")
    to = (torch.device("cpu"), torch.float32)
    guide = Guide(load_classifier("miniature", *to), CLASS - 1)
    models = load_models("miniature", *to)
    name = prompt_class_name(guide.classifier.labels[CLASS - 1])
    # The reference first: it copies text encoder and tokenizer, which must not know our token.
    reference = Reference(models, guide, name, with_preset("paper", {"model": "miniature"}))
    token = ClassToken(models, "newclas", "a")
    parts = {
        "text_encoder": models.text_encoder,
        "unet": models.unet,
        "decoder": models.vae.decoder,
        "guide": guide.classifier.model,
    }
    cases = {"reference": reference.update}
    with tempfile.TemporaryDirectory() as out:
        for case, config in cases_of_ours().items():

            def learn(config=config, on_update=None):
                train(config.learning(), token, [guide], name, RunFolder(out, "c", "e"), on_update)

            def ours(config=config, learn=learn):
                return second_update(lambda on_update: learn(replace(config, max_epochs=2), on_update))

            def float32(config=config, ours=ours):
                return ours(replace(config, mixed_precision="no"))

            def channels_first(float32=float32):
                with mock.patch("discriminative.precision.channels_last", nullcontext):
                    return float32()

            calls = record_calls(parts, learn)
            cases |= {
                f"ours, {case}": ours,
                f"bare, {case}": lambda calls=calls: replay(calls, token),
                f"float32, {case}": float32,
                f"channels first, {case}": channels_first,
            }
        found = common.alternating(cases, rounds, device)
    ours = [case for case in cases if case.startswith("ours")]

    def over(other: str) -> dict[str, float]:
        return {case: common.ratios(found, case, case.replace("ours", other)) for case in ours}

    return {
        "rounds": rounds,
        "seconds": common.medians(found),
        "reference_over": {case: common.ratios(found, "reference", case) for case in ours},
        "over_float32": over("float32"),
        "channels_last_over_first": {
            case: common.ratios(found, *(case.replace("ours", v) for v in ("float32", "channels first")))
            for case in ours
        },
        "bare_share": {case: common.ratios(found, case.replace("ours", "bare"), case) for case in ours},
        "peak_gb": peak_bytes(device) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    quiet_libraries()
    common.finish(common.environment(torch.device("cpu")) | measure(args.rounds), args.out)


if __name__ == "__main__":
    main()
