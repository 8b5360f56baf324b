"""DiffusionBlocks: train a residual network block by block, each block alone as a denoiser for its noise range.

    import diffusionblocks as dblocks
    blocks = dblocks.convert(model, num_blocks=3)
    dblocks.Trainer(blocks, dblocks.Classification(), train_data, eval_data, dblocks.TrainingConfig()).fit()

Importing this package needs torch alone; everything else loads on use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "convert": "diffusionblocks.adapters",
    "load": "diffusionblocks.adapters",
    "BlocksConfig": "diffusionblocks.config",
    "DiffusionBlocksModel": "diffusionblocks.network",
    "EndToEndModel": "diffusionblocks.network",
    "Partition": "diffusionblocks.partition",
    "LogNormal": "diffusionblocks.noise",
    "Information": "diffusionblocks.noise",
    "MaskingSchedule": "diffusionblocks.noise",
    "BlockCoordinateModel": "diffusionblocks.coordinate",
    "CausalLM": "diffusionblocks.tasks",
    "Classification": "diffusionblocks.tasks",
    "ImageGeneration": "diffusionblocks.tasks",
    "MaskedLM": "diffusionblocks.tasks",
    "RecurrentLM": "diffusionblocks.tasks",
    "LoopedNetwork": "diffusionblocks.denoisers.looped",
    "Trainer": "diffusionblocks.training",
    "TrainingConfig": "diffusionblocks.training",
    "DataConfig": "diffusionblocks.data.images",
    "load_images": "diffusionblocks.data.images",
    "TextConfig": "diffusionblocks.data.corpora",
    "load_text": "diffusionblocks.data.text",
    "trusting": "diffusionblocks.trust",
    "UserError": "diffusionblocks.errors",
    "RunStopped": "diffusionblocks.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
