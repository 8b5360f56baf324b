"""In which order blocks are visited, as a plan that can be entered at any point.

A visit trains one block for some consecutive batches. The plan is a pure function of the configuration, so resuming
means skipping the visits already made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

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
        samples: of each batch.
        ranges: the blocks whose noise ranges it trains on: the active block and those that are still one network with it (None = its
            own).
        copies: before this visit, blocks that part from a network: (block that holds it, block that gets a copy).
        border: nothing is carried out of this visit, so a checkpoint may follow it.
    """

    block: int
    batches: range
    samples: int = 0
    ranges: range | None = None
    copies: tuple[tuple[int, int], ...] = ()
    carried: bool = False
    handed: bool = False
    border: bool = True


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run between branchings.

    Args:
        networks: the blocks, in layer order, grouped: neighbours that are still one network. The first of them holds it.
        steps: optimizer steps of each network.
    """

    networks: tuple[range, ...]
    steps: int

    def holder(self, block: int) -> int:
        """The block that holds the weights of `block`."""
        return next(network[0] for network in self.networks if block in network)


def phases(config: TrainingConfig, num_blocks: int) -> list[Phase]:
    """A run, cut where blocks part."""
    opening = _opening(config, num_blocks)
    first = min(opening, default=0)

    def own(at: int) -> int:
        return round((at - first) * config.batch_size / (config.own_batch or config.batch_size))

    found = []
    for start, end in pairwise([0, *sorted({*opening, config.steps} - {0})]):
        parted = [index + 1 for index, at in enumerate(opening) if at <= start]
        networks = tuple(range(*ends) for ends in pairwise([0, *parted, num_blocks]))
        steps = end * num_blocks if start < first else own(end) - own(start)
        found.append(Phase(networks=networks, steps=steps))
    return found


def phase_at(config: TrainingConfig, num_blocks: int, block_steps: int) -> Phase:
    """The phase of a run that has made so many block steps; at a branching, the one before it: copies come with the next step."""
    found, made = phases(config, num_blocks), 0
    for phase in found:
        made += phase.steps * len(phase.networks)
        if block_steps <= made:
            return phase
    return found[-1]


def samples_per_step(config: TrainingConfig, network: range, num_blocks: int) -> int:
    """`batch_size`, and after branching `own_batch` for each block of a network: a noise range meets as many samples as before."""
    whole = len(network) == num_blocks or not config.own_batch
    return config.batch_size if whole else config.own_batch * len(network)


def plan(config: TrainingConfig, num_blocks: int) -> Iterator[Visit]:
    """All visits of a run, in order. Block steps add up to `total_steps`."""
    trained, start, before = trained_blocks(config, num_blocks), 0, None
    for phase in phases(config, num_blocks):
        networks = {network[0]: network for network in phase.networks if network[0] in trained}
        copies: list[tuple[int, int]] = []
        if before is not None:
            copies = [(before.holder(block), block) for block in networks if before.holder(block) != block]
        for visit in _ORDERS[config.order](start, phase.steps, list(networks), config):
            ranges = networks[visit.block]
            samples = samples_per_step(config, ranges, num_blocks)
            yield replace(visit, ranges=ranges, samples=samples, copies=tuple(copies))
            copies, before = [], phase
            start = max(start, visit.batches.stop)


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
    """Steps of the common block before the first branching: a multiple of num_blocks."""
    return min(_opening(config, num_blocks), default=0) * num_blocks


def _opening(config: TrainingConfig, num_blocks: int) -> list[int]:
    """For each border between blocks: of `steps`, how many are made when they part. At least one is left: copies are made before
    a block's own steps."""
    shares = config.branch_at or 0.0
    if not isinstance(shares, list):
        shares = [shares] * (num_blocks - 1)
    if len(shares) != num_blocks - 1:
        raise UserError(
            f"train.branch_at is one share (which does for any number of blocks), or one for each of the {num_blocks - 1} borders "
            f"between {num_blocks} blocks; got {len(shares)}: {shares}"
        )
    return [min(round(share * config.steps), config.steps - 1) for share in shares]


def steps_in_a_life(config: TrainingConfig, num_blocks: int) -> int:
    """The length of a block's schedule: its optimizer steps, common ones included. With own batches it is as many steps as the
    shallow network makes with the same layer evaluations, so that the common block is that network until the branch."""
    common = branch_steps(config, num_blocks)
    return config.steps * num_blocks if common and config.own_batch else common + own_steps(config, num_blocks)


def own_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Steps that each block makes after the first branching: what it leaves of `steps`, more of them where own batches are smaller."""
    common = branch_steps(config, num_blocks)
    return sum(phase.steps for phase in phases(config, num_blocks)[1 if common else 0 :])


def total_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Block steps of the whole run."""
    trained = trained_blocks(config, num_blocks)
    return sum(
        phase.steps * sum(network[0] in trained for network in phase.networks) for phase in phases(config, num_blocks)
    )


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
