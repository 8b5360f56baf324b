"""The task's metrics on a data set, in batches that fit the device."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import Dataset

from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.stream import in_order
from diffusionblocks.system.interruption import Stop
from diffusionblocks.training.task import Metric, Task, check_finite, on_device

log = logging.getLogger("diffusionblocks")
EVALUATED_TOKENS = 1 << 15  # tokens that are evaluated together


def validate(
    model: BlockModel, task: Task, data: Dataset, device: torch.device, batch_size: int, stop: Stop | None = None
) -> dict[str, Metric]:
    """Where a batch does not fit the device, again with half of it. batch_size: samples that do.

    Raises Failed for a metric that is not finite.
    """
    at_once = max(batch_size, 1, min(128, EVALUATED_TOKENS // getattr(data, "length", 1)))  # fewer of long texts
    while True:
        try:
            batches = on_device(in_order(data, at_once), device)
            batches = batches if stop is None else stop.between(batches)
            return check_finite(task.evaluate(model, batches))
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        at_once //= 2  # outside of the handler, which would keep what the failed batch held
        log.warning("out of memory in evaluation: going on with %d samples at once", at_once)
        if device.type == "cuda":
            torch.cuda.empty_cache()
