"""What ``python -m dpt`` does with its options: plan, load, carry out, and say so in lines."""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from discriminative import VERSION
from discriminative.command_line import is_first_process
from discriminative.diffusion.memory import told_out_of_memory
from discriminative.diffusion.models import DiffusionModels, load_models, load_tokenizer
from discriminative.diffusion.sources import load_part, model_id
from discriminative.errors import UsageError
from discriminative.progress import progress
from discriminative.records.environment import environment
from discriminative.records.files import clear, grid, to_pil, write_image, write_json
from discriminative.records.locks import alone_in
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from dpt.choose import Choice
from dpt.config import Options
from dpt.correct import Correction
from dpt.data.coco import NEGATIVES_FILE, Coco, mine_coco
from dpt.data.mine import Clip, PipelineText, write_negatives
from dpt.data.samples import Samples
from dpt.data.scenes import Miniature
from dpt.evaluate import Outcome, figures, outcomes
from dpt.files import LORA, RECORD, load_lora, new_reader, read_adapter, without_lora
from dpt.forward import Reader
from dpt.latents import Latents, Share, Stream
from dpt.pictures import Arm, draw_all, judge_pictures, picture_figures
from dpt.plan import Plan, describe, make_plan
from dpt.probe import probe
from dpt.report import block_table, write_blocks, write_evaluation
from dpt.settings import (
    EVALUATION_TIMESTEP,
    LOSSES,
    MINIATURE_EVALUATION_TIMESTEP,
    MINIATURE_SAMPLES,
    MINIATURE_WEIGHTS,
    MINIATURE_WORDING,
    LossWeights,
)
from dpt.training import Stage
from dpt.tune import prepare, tune

SAMPLES_TO_EVALUATE = 600
PROMPTS = 8  # of each kind, whose pictures are judged
COLUMNS = 8  # of a grid of images
PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
MEMORY_ADVICE = "try a smaller --batch_size with more --accumulation, or fewer --num_images"


def work(command: str, options: Options) -> int:
    """Plan, and do what the plan says; returns the exit code.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    plan = make_plan(command, options)
    if options.dry_run:
        print(describe(plan))
        return 0
    # Mining writes one file, beside the data.
    locks = command != "mine" and is_first_process()
    with alone_in(plan.folder) if locks else nullcontext(), told_out_of_memory(plan.device, MEMORY_ADVICE):
        COMMANDS[command](plan)
    return 0


# What a command needs.


def samples_of(options: Options, size: int, split: str) -> Samples:
    """The data set of a training, or of an evaluation.

    Args:
        size: of the model's pictures in pixels.
        split: "train", "validation" or "test".
    """
    if options.data_name == "miniature":
        number = options.samples or (MINIATURE_SAMPLES if split == "train" else SAMPLES_TO_EVALUATE)
        return Miniature(split, number, options.seed, wording=MINIATURE_WORDING)
    roots = (options.coco_root, options.refcoco_root)
    return Coco(*roots, size, split, options.seed, negatives=options.negatives)


def accelerator_of(plan: Plan) -> tuple[Accelerator, Plan]:
    """What trains, in one process or several; the plan on this process's device."""
    precision = PRECISIONS[plan.dtype]
    accelerator = Accelerator(cpu=plan.device.type == "cpu", mixed_precision=precision)
    several = accelerator.num_processes > 1
    return accelerator, replace(plan, device=accelerator.device) if several else plan


def load(plan: Plan, scheduler: str | None = None) -> DiffusionModels:
    """The model's parts, frozen."""
    return load_models(plan.options.model, plan.device, plan.dtype, scheduler_choice=scheduler)


def load_reader(plan: Plan, models: DiffusionModels) -> Reader:
    """The model with the adapter and the LoRA of ``--weights``."""
    reader = read_adapter(plan.weights, models)
    if plan.record["training"].get("lora"):
        load_lora(plan.weights / LORA, models)
    return reader


def stage_of(plan: Plan) -> Stage:
    """The training that is asked for."""
    options = plan.options
    chosen = options.losses.split(",")
    losses = tuple(name for name in LOSSES if name in chosen and (plan.command == "tune" or name != "mse"))
    settings = options.stage(plan.command)
    weights = MINIATURE_WEIGHTS if options.is_miniature else LossWeights()
    return Stage(settings, losses, options.seed, options.checkpoint_every, weights)


def evaluation_timestep(options: Options) -> int:
    """At which scores are taken."""
    return MINIATURE_EVALUATION_TIMESTEP if options.is_miniature else EVALUATION_TIMESTEP


def stream_of(plan: Plan, latents: Latents, data: Samples, accelerator: Accelerator) -> Stream:
    """The batches of this process."""
    settings = plan.options.stage(plan.command)
    processes = (accelerator.process_index, accelerator.num_processes)
    share = Share(settings.batch_size, settings.accumulation, *processes)
    # The miniature's scenes are costly to draw and kept.
    renews = plan.options.data_name != "miniature"
    return Stream(data, latents, share, plan.options.seed, renews)


# The commands.


def run_probe(plan: Plan) -> None:
    """Stage 1, of one probe point or of every block."""
    accelerator, plan = accelerator_of(plan)
    data = samples_of(plan.options, plan.size, "train")
    models = load(plan)
    latents = Latents(models.vae)
    if plan.options.probe == "all":
        compare_blocks(plan, models, latents, data, accelerator)
        return
    with stream_of(plan, latents, data, accelerator) as stream:
        probe_one(plan, models, stream, plan.probes[0], plan.folder, accelerator)


def probe_one(
    plan: Plan, models: DiffusionModels, stream: Stream, name: str, folder: Path, accelerator: Accelerator
) -> Reader:
    """Train an adapter at one probe point."""
    options = plan.options
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        reader = new_reader(models, name, plan.adapter, options.text_side)
    start = time.perf_counter()
    names = (options.text_side, model_id(options.model))
    rows = probe(reader, stage_of(plan), stream, folder, accelerator, *names)
    if accelerator.is_main_process:
        tell_training(folder, rows, time.perf_counter() - start)
    return reader


def compare_blocks(
    plan: Plan, models: DiffusionModels, latents: Latents, data: Samples, accelerator: Accelerator
) -> None:
    """An adapter at every block, each evaluated; a table and a figure (DPT, figure 3).

    Blocks that are done are not trained again.
    """
    held_out = samples_of(replace(plan.options, samples=None), plan.size, "validation")
    rows = rows_of(
        held_out, latents, SAMPLES_TO_EVALUATE, "encode held-out samples", accelerator.is_main_process
    )
    blocks = {}
    with stream_of(plan, latents, data, accelerator) as stream:
        for name in plan.probes:
            folder = plan.folder / name
            reader = finished_block(folder, plan, models)
            reader = reader or probe_one(plan, models, stream, name, folder, accelerator)
            timestep = evaluation_timestep(plan.options)
            found = list(outcomes(reader, rows, noises=1, seed=plan.options.seed, timestep=timestep))
            blocks[name] = figures(found)
    if accelerator.is_main_process:
        print(block_table(blocks))
        record = {"version": VERSION, "model": model_id(plan.options.model), "samples": len(rows)}
        print(f"figure: {write_blocks(plan.folder, record, blocks)}")


def finished_block(folder: Path, plan: Plan, models: DiffusionModels) -> Reader | None:
    """The adapter of a block that an earlier run with the same settings finished."""
    if not (folder / RECORD).is_file():
        return None
    reader = read_adapter(folder, models)
    facts = json.loads((folder / RECORD).read_text())["training"]
    wanted = plan.options.stage("probe").steps
    if facts["updates"] != wanted or reader.adapter.settings != plan.adapter:
        raise UsageError(
            f"--output_path: {folder} has an adapter of {facts['updates']} updates, not {wanted}; remove it, "
            "or give another folder"
        )
    return reader


def run_tune(plan: Plan) -> None:
    """Stage 2."""
    accelerator, plan = accelerator_of(plan)
    options = plan.options
    data = samples_of(options, plan.size, "train")
    models = load(plan)
    reader = read_adapter(plan.weights, models)
    trained = prepare(reader, options.seed, options.only_train_lora, options.tune_text_encoder)
    names = (plan.record["text_side"], model_id(options.model))
    start = time.perf_counter()
    with stream_of(plan, Latents(models.vae), data, accelerator) as stream:
        rows = tune(reader, trained, stage_of(plan), stream, plan.folder, accelerator, *names)
    if accelerator.is_main_process:
        tell_training(plan.folder, rows, time.perf_counter() - start)
        print(f"LoRA: {plan.folder / LORA}; in diffusers pipe.load_lora_weights({str(plan.folder)!r})")


def tell_training(folder: Path, rows: list[dict], seconds: float) -> None:
    """How a training ended, and where its results are."""
    last = ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k != "step" and v is not None)
    print(f"{len(rows)} updates in {seconds:.0f} s; the last: {last}\nadapter: {folder}", flush=True)


def rows_of(data: Samples, latents: Latents, most: int, told: str, shown: bool = True) -> list:
    """The first samples of a data set as rows."""
    indices = progress(range(min(most, len(data))), desc=told, unit="sample", leave=False, disable=not shown)
    return [latents.row(data[i]) for i in indices]


def run_evaluate(plan: Plan) -> None:
    """Matching and boxes on samples that training has not seen."""
    options = plan.options
    data = samples_of(options, plan.size, options.split)
    models = load(plan, options.scheduler)
    reader = load_reader(plan, models)
    number = options.samples or SAMPLES_TO_EVALUATE
    rows = rows_of(data, Latents(models.vae), number, "encode samples")
    timestep = evaluation_timestep(options)
    waiting = outcomes(reader, rows, options.noises, options.seed, timestep)
    found = list(progress(waiting, "read", len(rows), unit="sample", leave=False))
    record = {
        "version": VERSION,
        "model": model_id(options.model),
        "weights": str(plan.weights),
        "probe": plan.record["probe"],
        "data": options.data_name,
        "split": options.split,
        "samples": len(rows),
        "noises": options.noises,
        "timestep": timestep,
        "seed": options.seed,
        "environment": environment(plan.device),
        "figures": figures(found),
    }
    tell_evaluation(record["figures"], found)
    arms = judged_pictures(plan, reader)
    if arms:
        record["pictures"] = picture_figures(arms)
        tell_pictures(record["pictures"])
    path = write_evaluation(plan.folder, record, found, data, arms)
    print(f"report: {path}")


def judged_pictures(plan: Plan, reader: Reader) -> dict[str, Arm]:
    """Pictures of prompts by arm, judged; none where none are asked for or nobody can judge them."""
    options = plan.options
    number = PROMPTS if options.prompts is None else options.prompts
    if not number or options.data_name != "miniature":
        return {}
    from miniature.detector import load_detector

    correction, settings = how_to_draw(options)
    detector = load_detector(device=plan.device)
    has_lora = bool(plan.record["training"].get("lora"))
    return judge_pictures(reader, detector, number, options.seed, settings, correction, has_lora)


def tell_pictures(told: dict) -> None:
    """Of each kind of prompt the share of pictures that show all of it, by arm."""
    kinds = list(next(iter(told["arms"].values()))["by_kind"])
    print(f"{'pictures':>16}  {'all':<21}  {'  '.join(kinds)}")
    for name, figure in told["arms"].items():
        full = figure["all"]["full"]
        by_kind = [f"{figure['by_kind'][kind]['full']['share']:<{len(kind)}.2f}" for kind in kinds]
        cell = f"{full['share']:.3f} [{full['low']:.3f}, {full['high']:.3f}]"
        print(f"{name:>16}  {cell:<21}  {'  '.join(by_kind)}")
    for name, gain in told["gain"].items():
        print(f"{name:>16}  {gain['share']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] over plain")


def tell_evaluation(told: dict, found: list[Outcome]) -> None:
    """The figures in lines."""

    def line(name: str, *shares: dict) -> None:
        cells = [f"{s['share']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in shares]
        print(f"{name:>16}  {'  '.join(cells)}")

    print(f"{'ITM':>16}  {'right text':<21}  right picture   ({len(found)} samples)")
    line("all", told["itm"]["text"], told["itm"]["picture"])
    for kind, figure in told["itm_by_kind"].items():
        line(kind, figure["text"], figure["picture"])
    print(f"{'REC':>16}")
    for name, figure in told["rec"].items():
        line(name.replace("_", " "), figure)


def how_to_draw(options: Options) -> tuple[Correction, SamplerSettings]:
    """Self-correction and sampling as the options say."""
    first, stop = map(int, options.correction_steps.split(":")) if options.correction_steps else (0, None)
    correction = Correction(options.factor, options.correction, first, stop)
    return correction, SamplerSettings(options.num_inference_steps, options.guidance_scale)


def run_generate(plan: Plan) -> None:
    """Images of prompts, corrected on their way."""
    options = plan.options
    models = load(plan, options.scheduler)
    reader = load_reader(plan, models)
    token = None
    if plan.token:
        token = ClassToken(models, plan.token[0], "a", len(plan.token[1]))
        token.load(plan.token[1].to(plan.device))
    correction, settings = how_to_draw(options)
    for pattern in ("**/*.png", "**/prompt.json"):
        clear(plan.folder, pattern)
    for number, prompt in enumerate(plan.prompts, start=1):
        folder = plan.folder if len(plan.prompts) == 1 else plan.folder / f"{number:02d}"
        draw(reader, prompt, token, options, settings, correction, folder)
        print(f"images of {prompt!r}: {folder}", flush=True)


def draw(
    reader: Reader,
    prompt: str,
    token: ClassToken | None,
    options: Options,
    settings: SamplerSettings,
    correction: Correction,
    folder: Path,
) -> None:
    """The images of one prompt, singly and as a grid, with the scores at each corrected step.

    With ``--compare`` the first noises without LoRA, correction and choice are the grid's first row. With
    ``--best_of 3`` and four images the first is chosen from seeds 0, 4 and 8; its file has the seed's name.
    """
    seeds = list(range(options.seed, options.seed + options.num_images))
    texts = [prompt] * len(seeds)
    rows = []
    if options.compare:
        with without_lora(reader.models):
            plain = draw_all(reader, texts, seeds, settings, Correction(0.0), f"{prompt}, plain", token)
        write_images(folder / "plain", seeds, plain.images)
        rows.append(plain.images)
    choice = Choice(options.best_of, options.num_images, evaluation_timestep(options))
    drawn = draw_all(reader, texts, seeds, settings, correction, prompt, token, choice)
    seeds = [one.seed for one in drawn.kept]
    write_images(folder, seeds, drawn.images)
    columns = len(seeds) if options.compare else min(COLUMNS, len(seeds))
    write_image(folder / "grid.png", grid(torch.cat([*rows, drawn.images]), columns=columns))
    told = {"prompt": prompt, "seeds": seeds, "correction_factor": correction.factor}
    told |= {"correction": correction.mode, "scores": {one.seed: one.scores for one in drawn.kept}}
    told |= {"best_of": options.best_of, "candidates": {one.seed: one.candidates for one in drawn.kept}}
    told |= {"model": model_id(options.model), "guidance_scale": settings.guidance_scale}
    told |= {"num_inference_steps": settings.num_inference_steps}
    told["environment"] = environment(reader.models.device)
    write_json(folder / "prompt.json", told)


def write_images(folder: Path, seeds: list[int], images: torch.Tensor) -> None:
    """Each image (N, 3, H, W) by its seed."""
    for seed, image in zip(seeds, images, strict=True):
        write_image(folder / f"{seed:04d}.png", to_pil(image))


def run_mine(plan: Plan) -> None:
    """Hard negatives of COCO's captions."""
    options = plan.options
    if options.clip_model:
        clip = Clip(options.clip_model, plan.device)
        embed = (clip.text, clip.image)
    else:
        embed = (PipelineText(load_tokenizer(options.model), load_text_encoder(plan)), None)
    found = mine_coco(options.coco_root, options.refcoco_root, *embed)
    path = Path(options.negatives or Path(options.coco_root) / NEGATIVES_FILE)
    write_negatives(path, found, options.clip_model or model_id(options.model))
    print(f"negatives of {len(found)} captions: {path}")


def load_text_encoder(plan: Plan) -> torch.nn.Module:
    """The pipeline's text encoder alone, frozen."""
    from transformers import CLIPTextModel

    def read(source: str, **where):
        settings = where | {"dtype": torch.float32, "use_safetensors": True}
        return CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **settings)

    return load_part(plan.options.model, read).requires_grad_(False).eval().to(plan.device)


COMMANDS = {
    "probe": run_probe,
    "tune": run_tune,
    "generate": run_generate,
    "evaluate": run_evaluate,
    "mine": run_mine,
}
