"""Every kind of network, context and method that a step can be made of, small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import diffusionblocks as dblocks
from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.tasks import CausalLM, Classification, ImageGeneration, MaskedLM, RecurrentLM
from tests.conftest import CONVERSIONS, Counting, config, make_data, make_dit, make_gpt2, make_llama, make_vit


@dataclass
class Case:
    """build: a new model, always with the same weights."""

    build: Callable[[], BlockModel]
    task: Any
    data: Any
    train: dict[str, Any] = field(default_factory=dict)

    def trainer(self, **options: Any) -> dblocks.Trainer:
        torch.manual_seed(0)
        settings = config(**{"batch_size": 4, "steps": 2, **self.train, **options})
        return dblocks.Trainer(self.build(), self.task, self.data, None, settings)


def _small(make: Callable[..., Any], **changes: Any) -> Any:
    depth = {"num_layers": 3} if make is make_dit else {"n_layer": 3} if make is make_gpt2 else {"num_hidden_layers": 3}
    return make(**depth, **changes)


def _blocks(make: Callable[..., Any], **options: Any) -> Callable[[], BlockModel]:
    return lambda: dblocks.convert(_small(make), 3, **options)


def _whole(make: Callable[..., Any], target: str | None = None, **options: Any) -> Callable[[], BlockModel]:
    def build() -> BlockModel:
        parts = take_apart(_small(make), target) if target else take_apart(_small(make))
        return whole_network(parts, dblocks.BlocksConfig(num_blocks=1, target=parts.target, **options))

    return build


def _exact(make: Callable[..., Any], **changes: Any) -> Callable[[], BlockModel]:
    return lambda: BlockCoordinateModel(take_apart(_small(make, **changes)), [range(1), range(1, 2), range(2, 3)])


class Padded(Counting):
    """With padding at the end."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        return {**item, "attention_mask": (torch.arange(self.length) < self.length - index % 5).long()}


class Packed(Counting):
    """Two documents to a row."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "segments": (torch.arange(self.length) > 6).long()}


IMAGES: ImageData = make_data(12)
TEXTS, PADDED, PACKED = Counting(12, 10), Padded(12, 10), Packed(12, 10)
PAPER = {
    "target_entry": "replace",
    "readout": "linear",
    "target_table": "trained",
    "shared": "trained",
    "levels": "log-normal",
    "condition_width": 8,
}
FEATURES = {"context": "features", "shared": "trained"}
LOOP = {"target": "recurrent", "prelude": 1, "coda": 1}

CASES: dict[str, Case] = {
    **{f"labels {name}": Case(_blocks(make_vit, **how), Classification(), IMAGES) for name, how in CONVERSIONS.items()},
    "labels whole": Case(_whole(make_vit), Classification(), IMAGES),
    "labels exact": Case(_exact(make_vit), Classification(), IMAGES, {"order": "backward"}),
    "labels exact in turn": Case(_exact(make_vit), Classification(), IMAGES),
    "images": Case(_blocks(make_dit), ImageGeneration(), IMAGES, {"ema_decay": 0.9}),
    "images whole": Case(_whole(make_dit), ImageGeneration(), IMAGES),
    "masked": Case(_blocks(make_llama, target="masked"), MaskedLM(), PADDED),
    "masked independent": Case(_blocks(make_llama, target="masked"), MaskedLM(masking="independent"), TEXTS),
    "masked whole": Case(_whole(make_llama, "masked"), MaskedLM(), TEXTS),
    "tokens information": Case(_blocks(make_llama, target_entry="none"), CausalLM(), PADDED),
    "tokens paper": Case(_blocks(make_gpt2, **PAPER), CausalLM(), PACKED),
    "tokens features": Case(_blocks(make_llama, **FEATURES, target_entry="none"), CausalLM(), TEXTS),
    "tokens features with heads": Case(
        _blocks(make_llama, context="features", shared="frozen", target_entry="none", head_layers=1, distill=True),
        CausalLM(),
        PACKED,
        {"heads_first": 0.5, "trust": True},
    ),
    "tokens mixed": Case(
        _blocks(make_llama, context="features", shared="frozen", target_entry="none", ordinary=1.0), CausalLM(), TEXTS
    ),
    "tokens whole": Case(_whole(make_llama), CausalLM(), PADDED),
    "tokens exact": Case(_exact(make_llama, tie_word_embeddings=False), CausalLM(), PADDED, {"order": "backward"}),
    "tokens exact, graphs kept": Case(
        _exact(make_gpt2, tie_word_embeddings=False), CausalLM(), TEXTS, {"order": "backward", "keep_graphs": 2}
    ),
    "loop": Case(
        lambda: dblocks.convert(_small(make_llama), 1, condition_width=8, **LOOP), RecurrentLM(iterations=2), TEXTS
    ),
    "loop unrolled": Case(
        _whole(make_llama, "recurrent", prelude=1, coda=1),
        RecurrentLM(iterations=2, mean_iterations=3, truncation=2),
        TEXTS,
    ),
}
