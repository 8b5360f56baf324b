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
from diffusionblocks.networks.parts import Parts


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """Of a new network that reads images: what its class is asked for, in the words of a recipe. outputs: classes."""

    width: int
    depth: int
    heads: int
    intermediate: int
    patch: int
    channels: int
    size: int
    outputs: int
    dropout: float


def image_config(sizes: ImageSizes) -> dict[str, Any]:
    """Entries of the config of a vision transformer in transformers."""
    return {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.intermediate,
        "patch_size": sizes.patch,
        "image_size": sizes.size,
        "num_channels": sizes.channels,
        "num_labels": sizes.outputs,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.dropout,
    }


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Paths are module paths inside the model; `layer_norms` are paths inside one layer.

    Args:
        model_classes: names of the classes of `library` (transformers or diffusers) that this declaration fits.
        targets: what the network can be made to estimate (see `Parts`), the usual one first.
        stem: modules that turn a batch into the first hidden states; `make_stem(*modules)` wraps them.
        layers: the ModuleList of residual layers.
        layer_norms: norms of a layer that see the noise level; empty where layers see it by themselves.
        readout: modules from the last hidden states to the output; `make_readout(model, *modules)` wraps them.
        make_layer: (model, layer) -> the layer as blocks call it.
        tied: two names of what may be one parameter (a language model that reads out with its input embedding).
        width, num_classes, sample_shape: D, V and the shape of a denoised image, from the network's config.
        depth_key: the config's entry that counts the layers. image_keys: those of the channels and the size of images.
        image_config: the config's entries of a new network that reads images. width_divisor: of its width.
        first_position: config -> positions of a text that the network does not use.
        only_pretrained: why new networks of these classes cannot be made; empty = they can.
    """

    model_classes: tuple[str, ...]
    stem: tuple[str, ...]
    layers: str
    layer_norms: tuple[str, ...]
    readout: tuple[str, ...]
    make_stem: Callable[..., nn.Module]
    make_readout: Callable[..., nn.Module]
    make_layer: Callable[[Any, nn.Module], nn.Module] = lambda model, layer: layer
    tied: tuple[str, str] | None = None
    targets: tuple[str, ...] = ("label",)
    library: str = "transformers"
    width: Callable[[Any], int] = lambda config: int(config.hidden_size)
    num_classes: Callable[[Any], int] = lambda config: int(getattr(config, "vocab_size", None) or config.num_labels)
    sample_shape: Callable[[Any], tuple[int, int, int]] = lambda config: (0, 0, 0)
    depth_key: str = "num_hidden_layers"
    image_keys: tuple[str, str] = ("num_channels", "image_size")
    image_config: Callable[[ImageSizes], dict[str, Any]] = image_config
    width_divisor: int = 1
    first_position: Callable[[Any], int] = lambda config: 0
    only_pretrained: str = ""

    def target(self, wanted: str = "auto") -> str:
        """What the network is to estimate. Raises UserError when it cannot."""
        if wanted not in ("auto", *self.targets):
            raise UserError(f"a {self.model_classes[0]} estimates {' or '.join(self.targets)}, not {wanted!r}")
        return self.targets[0] if wanted == "auto" else wanted

    def take_apart(self, model: Any, target: str = "auto", *, copied: bool = False) -> Parts:
        """Parts of a copy of `model`; the caller's model is not touched (unless it is a copy already).

        target: what it is to estimate. Raises UserError when it cannot.
        """
        model = model if copied else copy.deepcopy(model)
        layers = list(model.get_submodule(self.layers).children())
        stem, readout = ([model.get_submodule(path) for path in paths] for paths in (self.stem, self.readout))
        tied = self.tied is not None and len({id(model.get_parameter(name)) for name in self.tied}) == 1
        check_ownership(
            model,
            [*stem, model.get_submodule(self.layers), *readout],
            shared=model.get_parameter(self.tied[0]) if self.tied and tied else None,
        )
        return Parts(
            target=self.target(target),
            stem=self.make_stem(*stem),
            layers=[self.make_layer(model, layer) for layer in layers],
            layer_norms=self.layer_norms,
            readout=self.make_readout(model, *readout),
            width=self.width(model.config),
            num_classes=self.num_classes(model.config),
            sample_shape=self.sample_shape(model.config),
            tied=tied,
            network=model,
            layers_path=self.layers,
            depth_key=self.depth_key,
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
