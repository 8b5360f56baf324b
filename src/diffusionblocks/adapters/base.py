"""An adapter declares where a Hugging Face network keeps its stem, layers, norms and readout.

The generic mechanism here copies the network, takes the declared parts, and checks that together they hold every
parameter exactly once. A new family is one `Adapter(...)` declaration in its own file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusionblocks.errors import UserError
from diffusionblocks.network import Parts


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Paths are module paths inside the model; `layer_norms` are paths inside one layer.

    Args:
        model_classes: names of the transformers classes that this declaration fits.
        stem: module(s) that turn a batch into the first hidden states; `make_stem` wraps it.
        layers: the ModuleList of residual layers.
        layer_norms: norms of a layer that see the noise level.
        readout: modules from the last hidden states to logits; `make_readout` wraps them.
        make_layer: (model, layer) -> the layer as blocks call it, forward(hidden) -> hidden.
        denoisers: whether `convert` can make denoisers of it; otherwise it trains whole (end-to-end, lora, exact, ...).
        tied: two names of what may be one parameter (a language model that reads out with its input embedding).
    """

    model_classes: tuple[str, ...]
    stem: str
    layers: str
    layer_norms: tuple[str, ...]
    readout: tuple[str, ...]
    make_stem: Callable[[nn.Module], nn.Module]
    make_readout: Callable[..., nn.Module]
    make_layer: Callable[[Any, nn.Module], nn.Module] = lambda model, layer: layer
    tied: tuple[str, str] | None = None
    denoisers: bool = True

    def take_apart(self, model: nn.Module, *, copied: bool = False) -> Parts:
        """Parts of a copy of `model`; the caller's model is not touched (unless it is a copy already)."""
        model = model if copied else copy.deepcopy(model)
        config: Any = model.config
        layers = list(model.get_submodule(self.layers).children())
        owned = [model.get_submodule(path) for path in (self.stem, self.layers, *self.readout)]
        tied = self.tied is not None and len({id(model.get_parameter(name)) for name in self.tied}) == 1
        check_ownership(model, owned, shared=model.get_parameter(self.tied[0]) if self.tied and tied else None)
        return Parts(
            stem=self.make_stem(owned[0]),
            layers=[self.make_layer(model, layer) for layer in layers],
            layer_norms=self.layer_norms,
            readout=self.make_readout(*owned[2:]),
            width=int(config.hidden_size),
            num_classes=int(getattr(config, "vocab_size", None) or config.num_labels),
            tied=tied,
            network=model,
            layers_path=self.layers,
        )


def check_ownership(model: nn.Module, parts: list[nn.Module], shared: nn.Parameter | None = None) -> None:
    """Raises UserError unless `parts` hold every parameter of `model` exactly once (`shared` may be held twice)."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    for part in parts:
        ids = {id(p) for p in part.parameters()}
        if twice := seen & ids - {id(shared)}:
            raise UserError(f"parameter {names[twice.pop()]} belongs to two parts of the adapter's declaration")
        seen |= ids
    if missing := names.keys() - seen:
        raise UserError(f"the adapter of {type(model).__name__} does not cover parameter {names[missing.pop()]}")
