"""What training and inference cost, in layer evaluations.

The unit is one layer's forward and backward pass for one sample. Its three products of matrices (the output, the
gradient of the input, the gradient of the weights) cost alike, so a forward pass counts 1/3, and a backward pass
through frozen weights 1/3 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 2 operations per weight and token
forward, 4 backward). The stem and the readout are not counted, nor how attention grows with the length of a text. A
second sequence of rows beside the first (the noisy targets of next-token denoisers) counts as much again.

At inference nothing is differentiated, and the unit is one layer's forward pass.

Functions take numbers of layers. Those with `recomputed` take the factor for activation checkpointing: 1, or
`RECOMPUTED`. It multiplies only what has gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

RECOMPUTED = 4 / 3  # activations recomputed in the backward pass: one more forward pass (Chen et al. 2016, 1604.06174)


def partly_frozen(layers: int, trained: int) -> float:
    """Training the last `trained` of `layers`, or any: the others run forward alone, if all before the trained ones are
    frozen."""
    return layers / 3 + trained * 2 / 3


def unrolled(once: float, core: float, made: float, trained: float, recomputed: float = 1.0) -> float:
    """Training a network whose `core` layers are applied `made` times and `once` others a single time. Gradients flow
    through the last `trained` applications (truncated backpropagation, [Huginn] arXiv 2502.05171). An ordinary network
    is the case made = trained = 1."""
    return (once + core * trained) * recomputed + core * (made - trained) / 3


def unrolled_inference(once: int, core: int, applied: int) -> int:
    """Layers per token that a looped network writes, its core applied so many times."""
    return once + core * applied


def walked_inference(prelude: int, core: int, coda: int, levels: int) -> int:
    """Layers per token that a looped denoiser writes by a walk along so many levels: below the highest level a row runs
    twice, on its walk and with the token that was chosen."""
    return prelude + (core + coda) * (2 * levels - 1)


def in_turn(sizes: Sequence[int]) -> list[float]:
    """The step of each block on the ordinary loss: forward through all layers, backward with weights in the block;
    layers after it are recomputed, and backward without weights."""
    after = [sum(sizes[index + 1 :]) for index in range(len(sizes))]
    return [sum(sizes) / 3 + own * 2 / 3 + rest * 2 / 3 for own, rest in zip(sizes, after, strict=True)]


def in_one_pass(sizes: Sequence[int], graphs: int = 1) -> list[float]:
    """The steps of all blocks in one backward pass. The last block's has the forward pass through all layers; the
    others are recomputed, but for the last `graphs` - 1 of them, whose graphs are kept."""
    recomputed = max(0, len(sizes) - graphs)
    down = [own if index < recomputed else own * 2 / 3 for index, own in enumerate(sizes[:-1])]
    return [*down, in_turn(sizes)[-1]]


def denoiser(layers: int, heads: int, sequences: int, behind: int, *, features: bool) -> int:
    """The step of one block that learns alone.

    Args:
        layers: of its trunk. heads: layers between trunk and readout. sequences: 2 where noisy rows stand beside the
            clean ones. behind: layers after it that the ordinary loss passes besides: forward, recomputed and backward
            without weights (0 = it has none).
        features: the trunk reads clean rows alone, and the noisy ones enter in the heads.
    """
    return (layers + heads * sequences if features else layers * sequences) + behind


def settling(layers: int, heads: int, behind: int) -> float:
    """The step of a block whose head alone learns. behind: layers after it that are run for what they answer (0 = they
    are not)."""
    return layers / 3 + heads + behind / 3


def forward(layers: int) -> float:
    """A forward pass alone."""
    return layers / 3


def passed_down(own: int, between: int, kept: bool) -> float:
    """The step of one block of a backward pass whose gradient comes down to it: `between`, frozen layers from it to the
    block that stepped before, are recomputed, and so is the block, unless its graph was kept."""
    return own * (2 / 3 if kept else 1) + between * 2 / 3


def features_made_anew(sizes: Sequence[int]) -> float:
    """Forward passes through all blocks before each block, where the order of blocks does not hand features on."""
    return sum(sum(sizes[:index]) for index in range(len(sizes))) / 3
