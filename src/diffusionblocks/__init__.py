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
    "convert": "diffusionblocks.blocks.convert",
    "load": "diffusionblocks.blocks.convert",
    "BlocksConfig": "diffusionblocks.blocks.config",
    "DiffusionBlocksModel": "diffusionblocks.blocks.model",
    "EndToEndModel": "diffusionblocks.blocks.model",
    "Partition": "diffusionblocks.theory.partition",
    "LogNormal": "diffusionblocks.theory.noise",
    "Information": "diffusionblocks.theory.noise",
    "MaskingSchedule": "diffusionblocks.theory.noise",
    "BlockCoordinateModel": "diffusionblocks.blocks.exact",
    "CausalLM": "diffusionblocks.tasks",
    "Classification": "diffusionblocks.tasks",
    "ImageGeneration": "diffusionblocks.tasks",
    "MaskedLM": "diffusionblocks.tasks",
    "RecurrentLM": "diffusionblocks.tasks",
    "register_task": "diffusionblocks.tasks",
    "Method": "diffusionblocks.methods",
    "register_method": "diffusionblocks.methods",
    "LoopedNetwork": "diffusionblocks.blocks.looped",
    "register_network": "diffusionblocks.networks.registry",
    "Trainer": "diffusionblocks.training",
    "TrainingConfig": "diffusionblocks.training",
    "DataConfig": "diffusionblocks.data.images.config",
    "load_images": "diffusionblocks.data.images.splits",
    "TextConfig": "diffusionblocks.data.text.corpora",
    "load_text": "diffusionblocks.data.text.splits",
    "trusting": "diffusionblocks.system.trust",
    "UserError": "diffusionblocks.errors",
    "RunStopped": "diffusionblocks.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
