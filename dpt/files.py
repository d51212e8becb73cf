"""The files of a stage: ``adapter.safetensors`` with its JSON, and a LoRA that diffusers loads.

Weights are safetensors; whatever replaces a file is written beside it and then renamed.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from discriminative import VERSION
from discriminative.diffusion.models import DiffusionModels
from discriminative.errors import UsageError
from discriminative.hub import check_keys, one_line
from discriminative.records.files import (
    follow_umask,
    told_what_cannot_be_written,
    write_json,
    write_tensors,
)
from dpt.adapter import DiscriminativeAdapter
from dpt.features import ProbePoint
from dpt.forward import Reader
from dpt.settings import LORA_RANK, TEXT_TARGETS, UNET_TARGETS, AdapterSettings
from dpt.text import TARGETS, Condition, PipelineSide, RobertaSide, TextSide

ADAPTER = "adapter.safetensors"
RECORD = "adapter.json"
LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
LORA_NAME = "dpt"  # of the LoRA within a model


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UsageError: there is no such file, it is another kind of file, or holds values that are not finite.
    """
    if not path.is_file():
        raise UsageError(f"--weights: {path} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"--weights: {path} is not a readable safetensors file ({one_line(error)})"
        ) from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"--weights: {path} has values that are not finite in {broken[0]}")
    return tensors


def check_fit(path: Path, given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    """Raises UsageError where tensors have not the names and shapes of those that they are to replace."""
    shared = set(given) & set(wanted)
    other = [name for name in shared if given[name].shape != wanted[name].shape]
    try:
        check_keys(set(wanted) - shared, set(given) - shared, other)
    except ValueError as error:
        raise UsageError(f"--weights: {path} is of another {what}: {error}") from error


# The adapter.


def side_of(name: str, condition: Condition, device: torch.device) -> TextSide:
    """The text side of the alignment: "pipeline", or a RoBERTa by its hub id or folder."""
    return PipelineSide(condition) if name == "pipeline" else RobertaSide(name, device)


def new_reader(models: DiffusionModels, probe: str, settings: AdapterSettings, side: str) -> Reader:
    """A model with a fresh adapter at a probe point.

    Raises:
        UsageError: there is no such point, or no such text side.
    """
    condition = Condition(models.tokenizer, models.text_encoder)
    text_side = side_of(side, condition, models.device)
    point = ProbePoint(models.unet, probe)
    adapter = DiscriminativeAdapter(settings, point.channels, condition.width, text_side.width)
    return Reader(models, condition, text_side, point.to(models.device), adapter.to(models.device))


def tensors_of(reader: Reader) -> dict[str, torch.Tensor]:
    """Weights of adapter and probe point by their names in a file; they share memory."""
    found = {f"adapter.{name}": tensor for name, tensor in reader.adapter.state_dict().items()}
    return found | {f"point.{name}": tensor for name, tensor in reader.point.state_dict().items()}


def write_adapter(folder: Path, reader: Reader, side: str, model: str, facts: dict) -> None:
    """Write adapter and probe point with their JSON record.

    Args:
        side: name of the text side.
        model: that it reads, for the record.
        facts: of the training, for the record.
    """
    record = {
        "version": VERSION,
        "model": model,
        "probe": reader.point.name,
        "text_side": side,
        "matching_target": reader.condition.target,
        "channels": reader.point.channels,
        "text_width": reader.condition.width,
        "token_width": reader.side.width,
        "adapter": asdict(reader.adapter.settings),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors_of(reader).items()}
    write_json(folder / RECORD, record | {"training": facts})
    # One entry: the order of several is random, and equal weights are to be equal files.
    write_tensors(folder / ADAPTER, tensors, {"format": "pt"})


def read_record(folder: Path) -> dict:
    """The JSON record of an adapter.

    Raises:
        UsageError: there is none, or it holds something else.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UsageError(f"--weights: there is no adapter in {folder}; train one with python -m dpt probe")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sizes = record["adapter"]
        settings = AdapterSettings(**{f.name: sizes[f.name] for f in fields(AdapterSettings)})
        widths = {name: int(record[name]) for name in ("channels", "text_width", "token_width")}
        texts = {name: str(record[name]) for name in ("model", "probe", "text_side")}
        # Adapters of before aim at the end token.
        texts["matching_target"] = TARGETS[TARGETS.index(record.get("matching_target", TARGETS[0]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--weights: {path} is no record of an adapter ({one_line(error)})") from error
    return record | widths | texts | {"adapter": settings}


def check_record(folder: Path, record: dict, point: ProbePoint, width: int) -> None:
    """Check that an adapter fits a model.

    Args:
        point: the model's, of the record's name.
        width: of the model's text encoder.

    Raises:
        UsageError: its features or texts have another width.
    """
    wanted = (("channels", point.channels), ("text_width", width))
    for name, here in wanted:
        if record[name] != here:
            raise UsageError(
                f"--weights: the adapter in {folder} has {name} {record[name]}, this model {here} at "
                f"{point.name}; it is of {record['model']}"
            )


def read_adapter(folder: Path, models: DiffusionModels) -> Reader:
    """A model with the adapter that a folder holds, in evaluation mode.

    Raises:
        UsageError: it is missing, damaged, or of another model.
    """
    record = read_record(folder)
    check_record(
        folder, record, ProbePoint(models.unet, record["probe"]), models.text_encoder.config.hidden_size
    )
    reader = new_reader(models, record["probe"], record["adapter"], record["text_side"])
    given = read_tensors(folder / ADAPTER)
    check_fit(folder / ADAPTER, given, tensors_of(reader), "adapter than its record says")
    put_tensors(reader, given)
    reader.condition.target = record["matching_target"]
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    return reader


@torch.no_grad()
def put_tensors(reader: Reader, given: dict[str, torch.Tensor]) -> None:
    """Take over weights of adapter and probe point, by their names in a file."""
    for name, tensor in tensors_of(reader).items():
        tensor.copy_(given[name])


# The LoRA.


def add_lora(models: DiffusionModels, text_encoder: bool = False) -> dict[str, torch.nn.Parameter]:
    """Put a fresh LoRA on every attention of the UNet, and of the text encoder where that is wanted.

    Returns:
        its parameters, float32, by their names in a LoRA file.
    """
    from peft import LoraConfig

    parts = {"unet": (models.unet, UNET_TARGETS)}
    if text_encoder:
        parts["text_encoder"] = (models.text_encoder, TEXT_TARGETS)
    for model, targets in parts.values():
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(targets))
        model.add_adapter(config, adapter_name=LORA_NAME)
    found = lora_parameters(models)
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


def lora_parameters(models: DiffusionModels) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model's LoRA by their names in a LoRA file; none where it has none."""
    found = {}
    # transformers 4 has all of a text encoder in "text_model", 5 has not; diffusers reads this name in both.
    for part, start in (("unet", ""), ("text_encoder", "text_model.")):
        for name, parameter in getattr(models, part).named_parameters():
            if f".{LORA_NAME}." in name:
                plain = name.replace(f".{LORA_NAME}.", ".").removeprefix(start)
                found[f"{part}.{start}{plain}"] = parameter
    return found


def write_lora(folder: Path, models: DiffusionModels) -> Path:
    """Write the LoRA as diffusers does, for ``pipe.load_lora_weights(folder)``; returns the file's path."""
    from diffusers import StableDiffusionPipeline

    layers = {}
    metadata = {}
    for part in ("unet", "text_encoder"):
        model = getattr(models, part)
        start = f"{part}."
        found = lora_parameters(models).items()
        tensors = {
            k.removeprefix(start): v.detach().cpu().contiguous() for k, v in found if k.startswith(start)
        }
        if tensors:
            layers[f"{part}_lora_layers"] = tensors
            metadata[f"{part}_lora_adapter_metadata"] = lora_metadata(model)
    with told_what_cannot_be_written(folder / LORA):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lora.", dir=folder) as temporary:
            StableDiffusionPipeline.save_lora_weights(temporary, **layers, **metadata)
            follow_umask(Path(temporary, LORA))
            Path(temporary, LORA).replace(folder / LORA)
    return folder / LORA


def lora_metadata(model: torch.nn.Module) -> dict:
    """What peft has to know of a model's LoRA."""
    config = model.peft_config[LORA_NAME]
    targets = sorted(config.target_modules)
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": targets}


@torch.no_grad()
def load_lora(path: Path, models: DiffusionModels) -> None:
    """Put the LoRA of a file on a model, frozen, in the models' precision.

    Raises:
        UsageError: the file is damaged, or its LoRA is of another model.
    """
    given = read_tensors(path)
    wanted = add_lora(models, text_encoder=any(name.startswith("text_encoder.") for name in given))
    check_fit(path, given, wanted, "model")
    for name, parameter in wanted.items():
        parameter.copy_(given[name])
    for model in (models.unet, models.text_encoder):
        model.requires_grad_(False).eval()
    for name, parameter in wanted.items():
        parameter.data = parameter.data.to(models.dtype if name.startswith("unet.") else torch.float32)


@contextmanager
def without_lora(models: DiffusionModels) -> Iterator[None]:
    """Within the block the models are as they were before a LoRA was put on them."""
    with_one = [m for m in (models.unet, models.text_encoder) if getattr(m, "peft_config", None)]
    for model in with_one:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in with_one:
            model.enable_adapters()
