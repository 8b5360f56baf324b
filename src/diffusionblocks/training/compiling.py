"""Layers compiled by torch.compile, where they train.

What is compiled is a layer's computation alone. Hooks on the layer, recomputing its activations, and the place where
its weights are kept stay outside, and weights are inputs of the graph: one graph serves all layers of equal kind and
shape, whatever block they belong to and in whatever order blocks are visited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.blocks.model import Block, BlockModel
from diffusionblocks.errors import UserError

BACKEND: Any = "inductor"  # of torch.compile
CASES = 32  # graphs of one kind of layer, at most


def compile_layers(model: BlockModel) -> None:
    """From now on everything in the blocks but stem and readout runs compiled while it trains, and as before while it
    is evaluated.

    Saving, copying and converting the model are not affected.
    """
    # A kind of layer has a graph for each combination of: gradients of the input or not, of the weights or not, at all
    # or not, and size of the batch (one for the first, one for all others). torch's limit of 8 is too low for `exact`
    # with two sizes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, CASES)
    # torch 2.11 skips looking at weights whose module has not changed, and takes a graph for frozen weights where they
    # train: they got no gradients (tests/laws/test_compile_laws.py). Off by default since.
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False
    compiled: dict[type, Callable[..., Tensor]] = {}
    for block in map(model.block, range(model.num_blocks)):
        for part in compiled_parts(block):
            kind = type(part)
            if kind not in compiled:
                compiled[kind] = torch.compile(_ordinary_of_its_own(kind), backend=BACKEND)
            part.forward = partial(_forward, compiled[kind], part)


def compiled_parts(block: Block) -> Iterator[nn.Module]:
    """The layers of a block, and the small modules between them: all but stem and readout."""
    for name, part in block.named_children():
        if name not in ("stem", "readout"):
            yield from part if isinstance(part, nn.ModuleList) else [part]


def check_compiler(device: torch.device) -> None:
    """Compiles something small. Raises UserError where that does not work."""
    try:
        if device.type == "cpu":  # what was compiled before is reused without a compiler; a new layer would need one
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        needed = {"cpu": "a C++ compiler (g++, or the one that CXX names)", "cuda": "triton and a C compiler (gcc)"}
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"train.compile: torch cannot compile here ({said}); install {needed.get(device.type, 'what it names')}, "
            "or leave --train.compile false"
        ) from None


def _forward(compiled: Callable[..., Tensor], layer: nn.Module, *arguments: Any, **named: Any) -> Tensor:
    # In evaluation sizes vary (a last, smaller batch; texts that grow token by token), and each would be compiled anew.
    return (compiled if layer.training else _ordinary)(layer, *arguments, **named)


def _ordinary(layer: nn.Module, *arguments: Any, **named: Any) -> Tensor:
    return type(layer).forward(layer, *arguments, **named)


def _ordinary_of_its_own(kind: type) -> Callable[..., Tensor]:
    """`_ordinary` with a code object of its own: by that torch keeps graphs, counts them, and remembers which sizes
    vary."""
    return FunctionType(_ordinary.__code__.replace(co_name=kind.__name__), globals())
