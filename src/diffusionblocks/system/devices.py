"""The device that work runs on: which one is meant, whether it is there, and what it can compute in."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.errors import UserError

log = logging.getLogger("diffusionblocks")


def find_device(name: str, option: str = "train.device") -> torch.device:
    """The device that `name` means: `auto` (the accelerator that torch finds here, else the CPU), `cpu`, `cuda`,
    `cuda:1`, `mps` ...

    Args:
        option: what the user set, for messages.

    Raises UserError for a device that does not exist, or that this machine or this build of torch cannot use.
    """
    device = parse_device(name, option)
    if device is None:
        return _best()
    if device.type == "cpu":
        return torch.device("cpu")
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        reason = _why_no_cuda() if device.type == "cuda" else None
        raise UserError(
            f"{option} {name}: no {device.type.upper()} device can be used here{f' ({reason})' if reason else ''}; "
            "use --device cpu or auto"
        )
    count = module.device_count()
    if device.index is not None and device.index >= count:
        known = ", ".join(f"{device.type}:{index}" for index in range(count))
        raise UserError(f"{option} {name}: there is no such device here; this machine has {known}")
    return torch.device(device.type, _current(module) if device.index is None else device.index)


def parse_device(name: str, option: str = "train.device") -> torch.device | None:
    """`name` as torch reads it; None for `auto`. Raises UserError for a word that is no device."""
    if name == "auto":
        return None
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"{option} must be auto, cpu, cuda, cuda:N or mps; got {name!r}") from None


def _best() -> torch.device:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        there = torch.accelerator.is_available()
    if there:
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, _current(getattr(torch, kind.type)))
    for warning in found:  # a driver that is too old for this torch, say
        log.warning("a graphics card cannot be used, so the CPU is: %s", _first_line(warning.message))
    return torch.device("cpu")


def _current(module: Any) -> int:
    """Index of the current device; torch.mps knows but one and has no word for it."""
    return int(module.current_device()) if hasattr(module, "current_device") else 0


def _why_no_cuda() -> str | None:
    """What torch says when it cannot start CUDA: no card, a driver too old, a build without CUDA."""
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return None


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0]


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError where a CUDA device has no bf16."""
    if precision == "fp32" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"train.precision {precision}: this GPU has no bf16; use --train.precision fp32")


def imitates_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run on a processor that has none, as far as it can be told."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Products in bf16 for the precision `bf16`; nothing otherwise."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def widest(device: torch.device | str) -> torch.dtype:
    """Double precision where the device has it (MPS has not)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """In the widest precision of its device."""
    return tensor.to(widest(tensor.device))


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that tensors occupy on an accelerator; None where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return torch.mps.current_allocated_memory() if device.type == "mps" else None
