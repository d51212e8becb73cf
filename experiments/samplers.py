"""Whether a cheaper sampler gives the evaluation's verdicts: the same noises, drawn by both, and what the
guide says of them.

    python -m experiments.samplers results/classes/pipeline_token/*/default_seed35/learned_embeds.safetensors

Each token is tried whole and part of the way from where it started, where verdicts are mixed. Prompts and
seeds are validation's.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean

import torch

from classifiers import load_classifier
from config import with_preset
from discriminative.command_line import existing_file
from discriminative.diffusion.models import load_models
from discriminative.guides.classifier import Guide
from discriminative.guides.labels import prompt_class_name
from discriminative.hub import quiet_libraries
from discriminative.precision import bf16_without_gradient, channels_last, has_bf16_units
from discriminative.records.files import write_lines
from discriminative.seeds import validation_seeds
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_origin, read_token
from discriminative.tokens.objective import Objective

WAYS = (0.6, 1.0)  # of the way from the start to the token
# Scheduler, steps and precision.
EVALUATION = (None, 30, "float32")
CHEAPER = [(None, 15), ("ddim", 12), *(("dpmsolver++", n) for n in (15, 12, 10, 8, 6, 5))]
SAMPLERS = [EVALUATION, *((*sampler, "float32") for sampler in CHEAPER), ("dpmsolver++", 12, "bf16")]


def verdicts_of(path: Path, samplers: list[tuple]) -> list[dict]:
    """Rows of one token: by way and sampler the guide's verdicts, one for each seed, and seconds an image."""
    to = torch.device("cpu"), torch.float32
    number = int(read_origin(path)["class_index"])
    config = with_preset("default", {"model": "miniature", "eval_batch_size": 12})
    guide = load_classifier("miniature", *to)
    name = prompt_class_name(guide.labels[number - 1])
    token = ClassToken(load_models("miniature", *to), config.placeholder_token, config.initializer_token)
    learning = config.learning()
    vectors = read_token(path)[1]
    start = token.start_vector(learning.starts[0], name)
    rows = []
    for way in WAYS:
        token.load(start + way * (vectors - start))
        for sampler in samplers:
            scheduler, steps, precision = sampler
            drawn = replace(config.sampler, scheduler=scheduler, num_inference_steps=steps)
            objective = Objective(replace(learning, sampler=drawn), token, [Guide(guide, number - 1)], name)
            began = time.perf_counter()
            layout = nullcontext() if sampler == EVALUATION else channels_last(token.models)
            with bf16_without_gradient(token.models, precision == "bf16"), layout, torch.no_grad():
                found = objective.score_seeds(validation_seeds(learning.validation.validation_size))
            seconds = (time.perf_counter() - began) / len(found)
            right = [ok for _, _, ok in found]
            named = {"class_index": number, "way": way, "sampler": list(sampler)}
            rows.append(named | {"right": right, "seconds": seconds})
    return rows


def sampler_of(row: dict) -> tuple:
    """A row's sampler; those of version 0.2.0 also have the place on the trajectory where guidance ended."""
    scheduler, steps, *rest = row["sampler"]
    end = next((part for part in rest if isinstance(part, float)), 1.0)
    precision = next((part for part in rest if isinstance(part, str)), "float32")
    return scheduler, steps, precision + (f", guidance to {end:g}" if end < 1 else "")


def print_table(rows: list[dict]) -> None:
    """A line for each sampler: how often it gives the evaluation's verdict."""
    by_sampler = {}
    for row in rows:
        by_sampler.setdefault(sampler_of(row), {})[row["class_index"], row["way"]] = row
    base = by_sampler[EVALUATION]
    mixed = {key for key, r in base.items() if 0 < sum(r["right"]) < len(r["right"])}
    head = ("scheduler", "steps", "precision", "same verdict", "... of half-learned tokens")
    head += ("accuracy, difference", "seconds, ratio")
    print(f"| {' | '.join(head)} |\n|" + "-|" * len(head))
    for sampler, mine in by_sampler.items():
        same = {
            key: mean(a == b for a, b in zip(r["right"], base[key]["right"], strict=True))
            for key, r in mine.items()
        }
        difference = mean(mean(r["right"]) - mean(base[key]["right"]) for key, r in mine.items())
        cost = mean(r["seconds"] for r in mine.values()) / mean(r["seconds"] for r in base.values())
        hard = mean(same[key] for key in mixed) if mixed else float("nan")
        named = " | ".join(map(str, (sampler[0] or "own (PNDM)", *sampler[1:])))
        print(f"| {named} | {mean(same.values()):.3f} | {hard:.3f} | {difference:+.3f} | {cost:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tokens",
        type=existing_file,
        nargs="+",
        help="files of the miniature's tokens, or one .jsonl to print the table of",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        help="only DPM-Solver++ of these numbers of steps, beside the evaluation's sampler",
    )
    parser.add_argument("--out", type=Path, default=Path("results/samplers.jsonl"))
    args = parser.parse_args()
    quiet_libraries()
    rows = []
    samplers = SAMPLERS
    if args.steps:
        samplers = [EVALUATION, *(s for s in SAMPLERS if s[0] == "dpmsolver++" and s[1] in args.steps)]
    if args.tokens[0].suffix == ".jsonl":
        rows = [json.loads(line) for path in args.tokens for line in path.read_text().splitlines()]
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        samplers = [s for s in samplers if s[-1] != "bf16" or has_bf16_units()]
        for path in args.tokens:
            rows += verdicts_of(path, samplers)
            write_lines(args.out, rows)
    print_table(rows)


if __name__ == "__main__":
    main()
