"""In which order blocks are visited, as a plan that can be entered at any point.

A visit trains one block for some consecutive batches. The plan is a pure function of the configuration, so resuming
means skipping the visits already made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusionblocks.errors import UserError
from diffusionblocks.seeds import derive
from diffusionblocks.training.config import TrainingConfig

DEFAULT_BRANCH = 0.5  # chosen on the validation splits of digits and mnist (docs/LOG.md)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One visit.

    Args:
        block: index of the active block.
        batches: numbers of the batches, one optimizer step each.
        carried: the batches are those of the visit before. handed: in features context, so are their clean streams: the
            visit before was to the block before.
        whole_range: train on the levels of all blocks (before branching).
        branch: before this visit, copy block 0 into all blocks.
        border: nothing is carried out of this visit, so a checkpoint may follow it.
    """

    block: int
    batches: range
    carried: bool = False
    handed: bool = False
    whole_range: bool = False
    branch: bool = False
    border: bool = True


def plan(config: TrainingConfig, num_blocks: int) -> Iterator[Visit]:
    """All visits of a run, in order. Block steps add up to `total_steps`."""
    shared_steps = branch_steps(config, num_blocks)
    start = 0
    for batches in _groups(0, shared_steps, config.visit_steps):
        yield Visit(block=0, batches=batches, whole_range=True)
        start = batches.stop
    own, blocks = own_steps(config, num_blocks), trained_blocks(config, num_blocks)
    for index, visit in enumerate(_ORDERS[config.order](start, own, blocks, config)):
        yield visit if index or not shared_steps else _branching(visit)


def trained_blocks(config: TrainingConfig, num_blocks: int) -> list[int]:
    """The blocks that train, in layer order. Raises UserError for one that does not exist."""
    for block in config.blocks:
        if not 0 <= block < num_blocks:
            raise UserError(f"train.blocks: block {block} does not exist; there are blocks 0 to {num_blocks - 1}")
    return sorted(config.blocks) or list(range(num_blocks))


def resolve_branch(config: TrainingConfig, may_branch: bool) -> TrainingConfig:
    """`config` with `branch_at` decided: what it says, or DEFAULT_BRANCH if blocks may start as copies, else 0."""
    if config.branch_at is not None:
        return config
    may_branch = may_branch and not config.blocks
    return replace(config, branch_at=DEFAULT_BRANCH if may_branch else 0.0)


def branch_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Steps of the common block before branching: a multiple of num_blocks, `branch_at` of all block steps, and at least
    one step short of the end: copies are made before a block's own steps."""
    common = min(round((config.branch_at or 0.0) * config.steps), config.steps - 1)
    return common * num_blocks if num_blocks > 1 else 0


def steps_in_a_life(config: TrainingConfig, num_blocks: int) -> int:
    """The length of a block's schedule: its optimizer steps, common ones included. With own batches it is as many steps as the
    shallow network makes with the same layer evaluations, so that the common block is that network until the branch."""
    common = branch_steps(config, num_blocks)
    return config.steps * num_blocks if common and config.own_batch else common + own_steps(config, num_blocks)


def own_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Steps that each block makes alone: what branching leaves of `steps`, more of them where own batches are smaller."""
    left = config.steps - branch_steps(config, num_blocks) // num_blocks
    return round(left * config.batch_size / (config.own_batch or config.batch_size))


def total_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Block steps of the whole run."""
    return branch_steps(config, num_blocks) + own_steps(config, num_blocks) * len(trained_blocks(config, num_blocks))


def _branching(visit: Visit) -> Visit:
    return Visit(**{**visit.__dict__, "branch": True})


def _groups(start: int, count: int, size: int) -> Iterator[range]:
    for first in range(start, start + count, size):
        yield range(first, min(first + size, start + count))


def _sweep(start: int, steps: int, blocks: list[int], config: TrainingConfig) -> Iterator[Visit]:
    for batches in _groups(start, steps, config.visit_steps):
        for block in blocks:
            follows = block != blocks[0]
            handed = follows and block - 1 in blocks
            yield Visit(block=block, batches=batches, carried=follows, handed=handed, border=block == blocks[-1])


def _sequential(start: int, steps: int, blocks: list[int], config: TrainingConfig) -> Iterator[Visit]:
    for block in blocks:
        for batches in _groups(start, steps, config.visit_steps):
            yield Visit(block=block, batches=batches)


def _random(start: int, steps: int, blocks: list[int], config: TrainingConfig) -> Iterator[Visit]:
    generator = random.Random(derive(config.seed, "order"))
    for batches in _groups(start, steps * len(blocks), config.visit_steps):
        yield Visit(block=generator.choice(blocks), batches=batches)


def _cyclic(start: int, steps: int, blocks: list[int], config: TrainingConfig) -> Iterator[Visit]:
    for group in _groups(0, steps, config.visit_steps):
        for block in blocks:
            yield Visit(block=block, batches=range(start, start + len(group)))
            start += len(group)


def _backward(start: int, steps: int, blocks: list[int], config: TrainingConfig) -> Iterator[Visit]:
    for batches in _groups(start, steps, 1):
        for block in reversed(blocks):
            yield Visit(block=block, batches=batches, carried=block != blocks[-1], border=block == blocks[0])


_ORDERS = {"sweep": _sweep, "cyclic": _cyclic, "sequential": _sequential, "random": _random, "backward": _backward}
