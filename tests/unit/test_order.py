"""The plan of visits: a function of the visit's number, with the visits of a generator that makes one after the
other."""

import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

import pytest

from diffusionblocks.seeds import derive
from diffusionblocks.training.order import Plan, Visit, phases, samples_per_step, total_steps, trained_blocks
from tests.conftest import config

# ---------------------------------------------------------------- the reference: all visits, one after the other


def reference(settings, num_blocks) -> Iterator[Visit]:
    trained, start, before = trained_blocks(settings, num_blocks), 0, None
    for phase in phases(settings, num_blocks):
        networks = {network[0]: network for network in phase.networks if network[0] in trained}
        copies = []
        if before is not None:
            copies = [(before.holder(block), block) for block in networks if before.holder(block) != block]
        for visit in ORDERS[settings.order](start, phase.steps, list(networks), settings):
            ranges = networks[visit.block]
            samples = samples_per_step(settings, ranges, num_blocks)
            yield replace(visit, ranges=ranges, samples=samples, copies=tuple(copies))
            copies, before = [], phase
            start = max(start, visit.batches.stop)


def groups(start, count, size):
    for first in range(start, start + count, size):
        yield range(first, min(first + size, start + count))


def sweep(start, steps, blocks, settings):
    for batches in groups(start, steps, settings.visit_steps):
        for block in blocks:
            follows = block != blocks[0]
            handed = follows and block - 1 in blocks
            yield Visit(block=block, batches=batches, carried=follows, handed=handed, border=block == blocks[-1])


def sequential(start, steps, blocks, settings):
    for block in blocks:
        for batches in groups(start, steps, settings.visit_steps):
            yield Visit(block=block, batches=batches)


def drawn(start, steps, blocks, settings):
    generator = random.Random(derive(settings.seed, "order"))
    for batches in groups(start, steps * len(blocks), settings.visit_steps):
        yield Visit(block=generator.choice(blocks), batches=batches)


def cyclic(start, steps, blocks, settings):
    for group in groups(0, steps, settings.visit_steps):
        for block in blocks:
            yield Visit(block=block, batches=range(start, start + len(group)))
            start += len(group)


def backward(start, steps, blocks, settings):
    for batches in groups(start, steps, 1):
        for block in reversed(blocks):
            follows = block != blocks[-1]
            yield Visit(block=block, batches=batches, carried=follows, handed=follows, border=block == blocks[0])


ORDERS = {"sweep": sweep, "cyclic": cyclic, "sequential": sequential, "random": drawn, "backward": backward}

# ---------------------------------------------------------------- laws

BRANCHES = [
    {},
    {"branch_at": 0.5},
    {"branch_at": 0.5, "own_batch": 4},
    {"branch_at": 0.99},
    {"branch_at": 0.3, "own_batch": 2},
    {"blocks": [1]},
    {"blocks": [2, 0]},
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("changes", BRANCHES, ids=str)
def test_a_plan_has_the_visits_of_the_reference(order, changes):
    for steps, visit_steps, seed in product((1, 2, 7, 12), (1, 3, 50), (0, 5)):
        settings = config(steps=steps, visit_steps=visit_steps, seed=seed, order=order, **changes)
        expected, plan = list(reference(settings, 3)), Plan(settings, 3)
        assert len(plan) == len(expected)
        assert list(plan) == expected
        assert [plan[number] for number in range(len(plan))] == expected
        assert [plan[number] for number in reversed(range(len(plan)))] == expected[::-1]
        for first in (0, 1, len(expected) // 2, len(expected) - 1, len(expected)):
            assert list(plan.since(first)) == expected[first:]
            for samples in {visit.samples for visit in expected}:
                loads = [visit for visit in expected[first:] if not visit.carried and visit.samples == samples]
                assert list(plan.batches(first, samples)) == [n for visit in loads for n in visit.batches]
        with pytest.raises(IndexError):
            plan[len(plan)]


def test_passes_of_one_plan_do_not_disturb_each_other():
    settings = config(steps=40, order="random")
    expected, plan = list(reference(settings, 3)), Plan(settings, 3)
    ahead, behind = plan.since(0), plan.since(0)
    list(islice(ahead, 30))
    assert list(islice(behind, 10)) == expected[:10]
    assert next(ahead) == expected[30]
    assert plan[3] == expected[3]
    assert next(ahead) == expected[31]


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_of_many_steps_takes_no_memory(order):
    settings = config(steps=4_000_000, order=order)
    tracemalloc.start()
    plan = Plan(settings, 3)
    middle = plan[6_000_000] if order != "random" else plan[60_000]
    some = list(islice(plan.batches(0, 8), 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == total_steps(settings, 3) == 12_000_000
    assert middle.block in range(3)
    assert len(some) == 1000
    assert peak < 1 << 20


def test_the_longest_run_has_a_plan():
    assert len(Plan(config(steps=10**15), 100)) == 10**17
