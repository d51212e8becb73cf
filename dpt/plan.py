"""What a command will do, told from its options and small files before any weight is loaded."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from discriminative import VERSION
from discriminative.diffusion.inspect import check_parts, check_sampling, read_configs, walked
from discriminative.diffusion.models import own_latent_size, vae_scale_factor
from discriminative.diffusion.sources import check_source, is_local
from discriminative.errors import UsageError
from discriminative.hub import quiet_libraries
from discriminative.precision import resolve_device, resolve_dtype
from discriminative.tokens.files import read_token
from discriminative.tokens.prompts import check_apart, check_fields, check_words, fill, read_prompts
from dpt.config import Options
from dpt.data.coco import NEGATIVES_FILE
from dpt.features import ProbePoint, block_shapes
from dpt.files import RECORD, check_record, read_record
from dpt.settings import MINIATURE_ADAPTER, MINIATURE_PROBE, PROBE, AdapterSettings

STAGES = ("probe", "tune")  # also the names of their folders
BLOCKS = "blocks"  # the folder of --probe all


@dataclass(frozen=True)
class Plan:
    """What a command's options come to.

    Args:
        folder: of what it writes.
        size: of the model's pictures in pixels; None where its files are not at hand.
        probes: the points to be probed, one after the other.
        adapter: sizes of a new adapter.
        weights: folder of the adapter that is there.
        record: its JSON.
        prompts: to draw, filled in.
        token: placeholder and vectors (N, width) of a class token.
    """

    command: str
    options: Options
    device: torch.device
    dtype: torch.dtype
    folder: Path
    size: int | None = None
    probes: tuple[str, ...] = ()
    adapter: AdapterSettings | None = None
    weights: Path | None = None
    record: dict | None = None
    prompts: tuple[str, ...] = ()
    token: tuple[str, torch.Tensor] | None = None


def make_plan(command: str, options: Options) -> Plan:
    """The plan of a command.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded.
    """
    quiet_libraries()
    check_source(options.model)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.mixed_precision, device)
    told = {"command": command, "options": options, "device": device, "dtype": dtype}
    told["folder"] = folder_of(command, options)
    if command in ("tune", "generate", "evaluate"):
        told["weights"] = weights_of(command, options)
        told["record"] = read_record(told["weights"])
    if command == "generate":
        told |= what_to_draw(options)
    known = is_local(options.model) or not options.dry_run
    return Plan(**told) if command == "mine" or not known else check_against_model(told)


def folder_of(command: str, options: Options) -> Path:
    """Where a command writes."""
    root = Path(options.output_path)
    if command == "mine":
        return Path(options.negatives or Path(options.coco_root) / NEGATIVES_FILE).parent
    name = {"generate": "images", "evaluate": "evaluation"}.get(command, command)
    return root / (BLOCKS if options.probe == "all" else name)


def weights_of(command: str, options: Options) -> Path:
    """The folder of the adapter that a command takes up."""
    if options.weights:
        return Path(options.weights)
    folders = [Path(options.output_path) / stage for stage in STAGES]
    return folders[1] if command != "tune" and (folders[1] / RECORD).is_file() else folders[0]


def what_to_draw(options: Options) -> dict:
    """Prompts, filled in, and the class token in them.

    Raises:
        UsageError: a file is damaged, a prompt holds other braces than {token}, or the token's word is part
            of another.
    """
    is_file = options.prompt.startswith("@")
    prompts = read_prompts(options.prompt[1:], "prompt") if is_file else [options.prompt]
    for prompt in prompts:
        check_fields(prompt, "prompt", ("{token}",))
    token = read_token(Path(options.token_path)) if options.token_path else None
    if token is None:
        if any("{token}" in prompt for prompt in prompts):
            raise UsageError("--token_path: nothing was given; needed is the file of {token} in the prompts")
        return {"prompts": tuple(prompts)}
    prompts = [fill(prompt, token[0], "") for prompt in prompts]
    check_apart(token[0], prompts)
    return {"prompts": tuple(prompts), "token": token}


def check_against_model(told: dict) -> Plan:
    """The plan, checked against the model's configuration files.

    Raises:
        UsageError: something does not fit.
    """
    from diffusers import UNet2DConditionModel

    options = told["options"]
    configs = read_configs(options.model, options.scheduler)
    check_parts(configs)
    sides = own_latent_size(configs.unet)
    if sides is None or sides[0] != sides[1]:
        raise UsageError(
            f"--model: the UNet of {options.model!r} has sample_size {configs.unet['sample_size']}; "
            "allowed is a model of square images"
        )
    size = told["size"] = sides[0] * vae_scale_factor(configs.vae)
    if told["command"] != "generate" and options.data_name == "miniature" and size != 64:
        raise UsageError(
            f"--data: 'miniature' was given, whose pictures have 64 pixels; {options.model!r} takes {size}; "
            "allowed is coco"
        )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs.unet)
    if told["command"] == "probe":
        name = options.probe or (MINIATURE_PROBE if options.is_miniature else PROBE)
        told["probes"] = tuple(block_shapes(unet)) if name == "all" else (ProbePoint(unet, name).name,)
        told["adapter"] = MINIATURE_ADAPTER if options.is_miniature else AdapterSettings()
    if told.get("record"):
        point = ProbePoint(unet, told["record"]["probe"])
        check_record(told["weights"], told["record"], point, configs.width)
    if told["command"] in ("generate", "evaluate"):
        check_sampling(configs, None, None, [("num_inference_steps", options.num_inference_steps)])
        walked(configs, options.num_inference_steps)
    if told.get("token"):
        check_token(options, *told["token"], configs)
    return Plan(**told)


def check_token(options: Options, placeholder: str, vectors: torch.Tensor, configs) -> None:
    """Raises UsageError where a class token is not of this model's width, or is a word already."""
    check_words(configs.tokenizer, placeholder, "a", len(vectors))
    if vectors.shape[1] != configs.width:
        raise UsageError(
            f"--token_path: the token in {options.token_path} is {vectors.shape[1]} wide; "
            f"the text encoder of {options.model!r} takes {configs.width}"
        )


def describe(plan: Plan) -> str:
    """The plan and the resolved options as JSON."""
    told = {
        "command": plan.command,
        "folder": str(plan.folder),
        "device": str(plan.device),
        "precision": str(plan.dtype).removeprefix("torch."),
        "data": None if plan.command in ("generate", "mine") else plan.options.data_name,
        "weights": None if plan.weights is None else str(plan.weights),
        "probe": list(plan.probes) or (plan.record["probe"] if plan.record else None),
        "prompts": list(plan.prompts),
    }
    told = {key: value for key, value in told.items() if value not in (None, [])}
    if plan.command in commands_of("correction_factor"):
        told["correction_factor"] = plan.options.factor
    if plan.command in STAGES:
        told["stage"] = asdict(plan.options.stage(plan.command))
    if plan.adapter:
        told["adapter"] = asdict(plan.adapter)
    kept = {f: v for f, v in asdict(plan.options).items() if plan.command in commands_of(f)}
    return json.dumps({"plan": told, "version": VERSION, "options": kept}, indent=2)


def commands_of(name: str) -> list[str]:
    """The commands that take an option."""
    return Options.__dataclass_fields__[name].metadata["commands"]
