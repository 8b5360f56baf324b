"""In which order blocks are visited, as a plan that can be entered at any point.

A visit trains one block for some consecutive batches. The plan is a pure function of the configuration and of the
visit's number, so resuming means going on with the number that comes next.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from diffusionblocks.errors import UserError
from diffusionblocks.seeds import derive
from diffusionblocks.training.config import TrainingConfig

DEFAULT_BRANCH = 0.5  # chosen on the validation splits of digits and mnist (docs/LOG.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """One visit.

    Args:
        block: index of the active block.
        batches: numbers of the batches, one optimizer step each.
        carried: the batches are those of the visit before. handed: it goes on from what the visit before hands on:
            features, from the block before, or, in the order backward, a gradient.
        samples: of each batch.
        ranges: the blocks whose noise ranges it trains on: the active block and those that are still one network with
            it (None = its own).
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
        networks: the blocks, in layer order, grouped: those that are still one network, which the first of them holds.
        steps: optimizer steps of each network.
    """

    networks: tuple[range, ...]
    steps: int

    def holder(self, block: int) -> int:
        """The block that holds the weights of `block`."""
        return next(network[0] for network in self.networks if block in network)


def phases(config: TrainingConfig, num_blocks: int) -> list[Phase]:
    """A run, cut where blocks part."""
    common = branch_steps(config, num_blocks)
    left = config.steps - common // num_blocks
    own = round(left * config.batch_size / (config.own_batch or config.batch_size))
    apart = Phase(networks=tuple(range(block, block + 1) for block in range(num_blocks)), steps=own)
    return [Phase(networks=(range(num_blocks),), steps=common), apart] if common else [apart]


def phase_at(config: TrainingConfig, num_blocks: int, block_steps: int) -> Phase:
    """The phase of a run that has made so many block steps; at a branching, the one before it: copies come with the
    next step."""
    found, made = phases(config, num_blocks), 0
    for phase in found:
        made += phase.steps * len(phase.networks)
        if block_steps <= made:
            return phase
    return found[-1]


def samples_per_step(config: TrainingConfig, network: range, num_blocks: int) -> int:
    """`batch_size`, and after branching `own_batch`: a noise range meets as many samples as before."""
    whole = len(network) == num_blocks or not config.own_batch
    return config.batch_size if whole else config.own_batch


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """The visits of a phase.

    Args:
        first: number of its first visit. count: of its visits. start: its first batch. blocks: that train, in layer
            order. networks: of each, and samples: of its batches.
    """

    first: int
    count: int
    start: int
    steps: int
    blocks: list[int]
    networks: dict[int, range]
    samples: dict[int, int]
    copies: tuple[tuple[int, int], ...]


class Plan:
    """All visits of a run, in order: `plan[number]` is one, of `len(plan)`. Block steps add up to `total_steps`.

    A visit is worked out when it is asked for, from its number alone (in the order `random` from the numbers drawn
    before it, too), so a plan takes no memory, however long the run is.
    """

    def __init__(self, config: TrainingConfig, num_blocks: int) -> None:
        self.config = config
        self._order = _ORDERS[config.order]
        self._stages: list[_Stage] = []
        self._draws: dict[int, _Draws] = {}  # by stage: how far random order has been asked for
        trained, start, before, first = trained_blocks(config, num_blocks), 0, None, 0
        for phase in phases(config, num_blocks):
            networks = {network[0]: network for network in phase.networks if network[0] in trained}
            count = self._order.count(phase.steps, len(networks), config.visit_steps)
            if not count:
                continue
            copies: list[tuple[int, int]] = []
            if before is not None:
                copies = [(before.holder(block), block) for block in networks if before.holder(block) != block]
            samples = {block: samples_per_step(config, network, num_blocks) for block, network in networks.items()}
            stage = _Stage(
                first=first,
                count=count,
                start=start,
                steps=phase.steps,
                blocks=list(networks),
                networks=networks,
                samples=samples,
                copies=tuple(copies),
            )
            self._stages.append(stage)
            first, before = first + count, phase
            start += phase.steps * (len(networks) if self._order.own_batches else 1)
        self._length = first

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Visit:
        if not 0 <= number < self._length:
            raise IndexError(f"visit {number} of {self._length}")
        stage = next(stage for stage in reversed(self._stages) if stage.first <= number)
        return self._visit(stage, number - stage.first, self._drawn(stage, number - stage.first))

    def __iter__(self) -> Iterator[Visit]:
        return self.since(0)

    def since(self, first: int, samples: int | None = None) -> Iterator[Visit]:
        """The visits from number `first` on. samples: only of phases that have batches of so many."""
        for stage in self._stages:
            begin = max(0, first - stage.first)
            if begin >= stage.count or (samples is not None and samples not in stage.samples.values()):
                continue
            draws = self._drawn(stage, begin)
            for number in range(begin, stage.count):
                yield self._visit(stage, number, draws)

    def batches(self, first: int, samples: int) -> Iterator[int]:
        """Numbers of the batches, of so many samples, that visits from number `first` on load: those that are not
        carried."""
        for visit in self.since(first, samples):
            if not visit.carried and visit.samples == samples:
                yield from visit.batches

    def _drawn(self, stage: _Stage, number: int) -> _Draws | None:
        """The draws of a random order, for whoever goes on from visit `number` of a stage."""
        if self._order.visit is not None:
            return None
        kept = self._draws.get(stage.first)
        if kept is None or kept.made > number:
            kept = self._draws[stage.first] = _Draws(self.config.seed, stage.blocks)
        kept.skip(number)
        return kept.copy()

    def _visit(self, stage: _Stage, number: int, draws: _Draws | None) -> Visit:
        size = self.config.visit_steps
        if draws is not None:
            block, carried, handed, border = draws.next(), False, False, True
            batches = _group(number, stage.start, stage.steps * len(stage.blocks), size)
        else:
            assert self._order.visit is not None
            place = self._order.visit(number, stage.start, stage.steps, stage.blocks, size)
            block, batches, carried, handed, border = place
        return Visit(
            block=block,
            batches=batches,
            samples=stage.samples[block],
            ranges=stage.networks[block],
            copies=() if number else stage.copies,
            carried=carried,
            handed=handed,
            border=border,
        )


class _Draws:
    """Blocks drawn one after the other, from a stream that every phase begins anew."""

    def __init__(self, seed: int, blocks: list[int]) -> None:
        self.blocks, self.made = blocks, 0
        self._generator = random.Random(derive(seed, "order"))

    def next(self) -> int:
        self.made += 1
        return self._generator.choice(self.blocks)

    def skip(self, number: int) -> None:
        choice, blocks = self._generator.choice, self.blocks
        for _ in range(number - self.made):
            choice(blocks)
        self.made = max(self.made, number)

    def copy(self) -> _Draws:
        """Draws that go on from here by themselves."""
        return copy.deepcopy(self)


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
    """Steps of the common block before it is copied: a multiple of num_blocks. At least one of `steps` is left: copies
    are made before a block's own steps."""
    if num_blocks == 1:
        return 0
    return min(round((config.branch_at or 0.0) * config.steps), config.steps - 1) * num_blocks


def steps_in_a_life(config: TrainingConfig, num_blocks: int) -> int:
    """The length of a block's schedule: its optimizer steps, common ones included. With own batches it is as many steps
    as the shallow network makes with the same layer evaluations, so that the common block is that network until the
    branch."""
    common = branch_steps(config, num_blocks)
    return config.steps * num_blocks if common and config.own_batch else common + own_steps(config, num_blocks)


def own_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Steps that each block makes after branching: what it leaves of `steps`, more of them where own batches are
    smaller."""
    return phases(config, num_blocks)[-1].steps


def total_steps(config: TrainingConfig, num_blocks: int) -> int:
    """Block steps of the whole run."""
    trained = trained_blocks(config, num_blocks)
    return sum(
        phase.steps * sum(network[0] in trained for network in phase.networks) for phase in phases(config, num_blocks)
    )


def one_round(order: str, blocks: list[int], batches: range, samples: int) -> list[Visit]:
    """A visit to each of the blocks (in layer order) for the same batches, of so many samples, as they follow each
    other in the order backward or, in any other, in a sweep."""
    visit, found = _backward if order == "backward" else _sweep, []
    for number in range(len(blocks)):
        block, group, carried, handed, border = visit(number, batches.start, len(batches), blocks, len(batches))
        made = Visit(block=block, batches=group, samples=samples, carried=carried, handed=handed, border=border)
        found.append(made)
    return found


def _group(number: int, start: int, count: int, size: int) -> range:
    """Group `number` of `count` batches from `start` on, in groups of `size`."""
    first = start + number * size
    return range(first, min(first + size, start + count))


_Place = tuple[int, range, bool, bool, bool]  # block, batches, carried, handed, border


def _sweep(number: int, start: int, steps: int, blocks: list[int], size: int) -> _Place:
    round_, place = divmod(number, len(blocks))
    block, follows = blocks[place], place > 0
    handed = follows and blocks[place - 1] == block - 1
    return block, _group(round_, start, steps, size), follows, handed, place == len(blocks) - 1


def _sequential(number: int, start: int, steps: int, blocks: list[int], size: int) -> _Place:
    place, group = divmod(number, -(-steps // size))
    return blocks[place], _group(group, start, steps, size), False, False, True


def _cyclic(number: int, start: int, steps: int, blocks: list[int], size: int) -> _Place:
    round_, place = divmod(number, len(blocks))
    length = len(_group(round_, 0, steps, size))
    first = start + round_ * size * len(blocks) + place * length
    return blocks[place], range(first, first + length), False, False, True


def _backward(number: int, start: int, steps: int, blocks: list[int], size: int) -> _Place:
    round_, place = divmod(number, len(blocks))
    return blocks[-1 - place], _group(round_, start, steps, 1), place > 0, place > 0, place == len(blocks) - 1


@dataclass(frozen=True)
class _Order:
    """count: (steps, number of blocks, steps of a visit) -> visits of a phase. visit: (number, first batch, steps,
    blocks, steps of a visit) -> the visit; None where blocks are drawn. own_batches: every block has batches of its
    own."""

    count: Callable[[int, int, int], int]
    visit: Callable[[int, int, int, list[int], int], _Place] | None
    own_batches: bool = False


def _each_group(steps: int, blocks: int, size: int) -> int:
    return -(-steps // size) * blocks


_ORDERS = {
    "sweep": _Order(_each_group, _sweep),
    "cyclic": _Order(_each_group, _cyclic, own_batches=True),
    "sequential": _Order(_each_group, _sequential),
    "random": _Order(lambda steps, blocks, size: -(-steps * blocks // size), None, own_batches=True),
    "backward": _Order(lambda steps, blocks, size: steps * blocks, _backward),
}
