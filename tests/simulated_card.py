"""A graphics card that is not there: tensors of the CPU that call themselves cuda:0.

The rules of devices hold: what lies on the card does not meet what lies on the CPU, but for numbers and
indices, and does not become an array. Arithmetic is the CPU's, half precision included.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

CARD = torch.device("cuda:0")
# What may take from one device to the other, and what only looks.
MOVES = {"to", "cpu", "cuda", "copy_", "type", "__set__", "__get__", "__getitem__", "__setitem__"}
MOVES |= {"is_floating_point", "_has_compatible_shallow_copy_type", "load_state_dict", "__repr__"}
TO_ARRAY = {"numpy", "__array__"}


class OnCard(torch.Tensor):
    """A tensor that lies on the simulated card."""

    @property
    def device(self) -> torch.device:
        return CARD

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # All is done in the mode below.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def tensors_of(value) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        yield from tensors_of(tuple(value.values()))


def on_card(value):
    """Nested results, their tensors put on the card."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, OnCard) else value.as_subclass(OnCard)
    if type(value) in (list, tuple):
        return type(value)(map(on_card, value))
    if isinstance(value, tuple):  # of torch.return_types, and named ones
        return (
            type(value)(map(on_card, value))
            if not hasattr(value, "_fields")
            else type(value)(*map(on_card, value))
        )
    return value


def is_card(device) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class Rules(TorchFunctionMode):
    """The rules of devices, for every function of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = list(tensors_of(args)) + list(tensors_of(kwargs))
        stays = any(isinstance(t, OnCard) for t in given)
        if stays and name in TO_ARRAY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name not in MOVES and stays and any(not isinstance(t, OnCard) and t.dim() for t in given):
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu, in {name}")
        args, moved = self.destination(name, args, kwargs)
        if moved is not None:
            stays = moved
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if name == "__set__":
            return result
        if stays:
            return on_card(result)
        if isinstance(result, OnCard):  # moved to the CPU
            return result.as_subclass(torch.Tensor)
        return result

    @staticmethod
    def destination(name: str, args: tuple, kwargs: dict) -> tuple[tuple, bool | None]:
        """The arguments without a device, and whether the result lies on the card, where they say so."""
        moved = None
        if name in ("cpu", "cuda"):
            return args[:1], name == "cuda"
        if kwargs.get("device") is not None and not isinstance(kwargs["device"], int):
            moved = is_card(kwargs["device"])
            if moved:
                generator = kwargs.get("generator")
                if generator is not None:
                    raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
                kwargs["device"] = torch.device("cpu")
        if name in ("to", "copy_") and len(args) > 1:
            if isinstance(args[1], str | torch.device):
                moved = is_card(args[1])
                args = (args[0], torch.device("cpu"), *args[2:])
            elif isinstance(args[1], torch.Tensor):
                moved = isinstance(args[1 if name == "to" else 0], OnCard)
        return args, moved


def with_rules(run_backward):
    """The engine with the rules again: what is computed twice is computed in it."""

    def run(*args, **kwargs):
        with torch._C._EnableTorchFunction(), Rules():
            return run_backward(*args, **kwargs)

    return run


# What torch.cuda says of the card.
SAID = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "a simulated card",
    "get_device_capability": (8, 0),
    "mem_get_info": (int(80e9), int(80e9)),
    "max_memory_allocated": 0,
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "synchronize": None,
}


@contextmanager
def overwritten_parameters() -> Iterator[None]:
    """Within the block ``Module.to`` makes new parameters, as a kind of tensor cannot be set in place."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@contextmanager
def simulated_card() -> Iterator[None]:
    """Within the block there is a card, cuda:0."""
    frame = "torch.utils.checkpoint._CheckpointFrame"
    shape = {"default": lambda tensor: (tensor.shape, tensor.dtype)}
    with pytest.MonkeyPatch.context() as patch, overwritten_parameters():
        for name, value in SAID.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        for place in ("torch.amp.grad_scaler", "torch.cuda.amp.common"):
            patch.setattr(f"{place}.amp_definitely_not_available", lambda: False, raising=False)
        patch.setattr("torch.autograd._engine_run_backward", with_rules(torch.autograd._engine_run_backward))
        # Kept as they are: what the engine saves forgets where it lies.
        patch.setattr(f"{frame}.save_inputs", lambda self, *args: setattr(self, "saved_args", args))
        patch.setattr(f"{frame}.get_inputs", lambda self: self.saved_args)
        patch.setattr("torch.utils.checkpoint._allowed_determinism_checks_to_fns", shape)
        with Rules():
            yield
