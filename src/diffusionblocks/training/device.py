"""The device that training runs on, and what it can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusionblocks.errors import UserError
from diffusionblocks.training.config import TrainingConfig


def check_precision(config: TrainingConfig) -> None:
    """Raises UserError where a GPU has no bf16."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if config.precision != "fp32" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"train.precision {config.precision}: this GPU has no bf16; use --train.precision fp32")


def has_bf16() -> bool:
    """Whether the processor has bf16, as far as it can be told."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def accelerator(config: TrainingConfig, output_dir: Path | None) -> Any:
    """accelerate's `Accelerator` for a run. Raises UserError for a device or precision that is not there."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device cuda: no CUDA device is available here; use --device cpu or auto")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.device mps: no MPS device is available here; use --device cpu or auto")
    check_precision(config)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several models in turn
    folder = str(output_dir or ".")
    return Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=config.device == "cpu",
        log_with="tensorboard" if config.tensorboard else None,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=folder),
    )
