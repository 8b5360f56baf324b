"""Laws of branching with own batches: which blocks are one network when, and what that must not change."""

import shutil

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.theory.noise import LogNormal
from diffusionblocks.theory.partition import Partition
from diffusionblocks.training import checkpoint
from diffusionblocks.training.order import Plan, own_steps, phase_at, total_steps
from tests.conftest import config, make_data, make_vit, same


def branching(branch_at=0.5, **changes):
    return config(
        **{"steps": 8, "batch_size": 12, "own_batch": 4, "order": "cyclic", "branch_at": branch_at, **changes}
    )


def trainer(options, output_dir=None, blocks=3):
    model = dblocks.convert(make_vit(), blocks)
    return dblocks.Trainer(
        model, dblocks.Classification(), make_data(96), make_data(16), options, output_dir=output_dir
    )


@pytest.mark.parametrize("order", ["cyclic", "sequential"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.31, 0.99])
def test_every_noise_range_meets_equally_many_samples(share, order):
    options = branching(share, order=order)
    visits = list(Plan(options, 3))
    met = [0.0] * 3
    for visit in visits:
        for block in visit.ranges:
            met[block] += len(visit.batches) * visit.samples / len(visit.ranges)
    assert sum(met) == 3 * 8 * 12
    assert met == [8 * 12] * 3
    assert sum(len(visit.batches) for visit in visits) == total_steps(options, 3)


def test_blocks_are_one_network_until_they_part():
    visits = list(Plan(branching(), 3))
    cut = []  # (networks in the order of their first visits, copies made before)
    for visit in visits:
        if visit.copies or not cut:
            cut.append((set(), visit.copies))
        cut[-1][0].add((visit.block, tuple(visit.ranges), visit.samples))
    assert cut == [
        ({(0, (0, 1, 2), 12)}, ()),
        ({(0, (0,), 4), (1, (1,), 4), (2, (2,), 4)}, ((0, 1), (0, 2))),
    ]


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(residency, tmp_path):
    options = branching(residency=residency, checkpoint_every=6, keep_checkpoints=9, visit_steps=2, ema_decay=0.9)
    whole = trainer(options, tmp_path / "a")
    whole.fit()
    saved = checkpoint.existing(tmp_path / "a")
    for index in range(len(saved) - 1):
        shutil.copytree(tmp_path / "a", tmp_path / str(index))
        for later in checkpoint.existing(tmp_path / str(index))[index + 1 :]:
            shutil.rmtree(later)
        resumed = trainer(options, tmp_path / str(index))
        resumed.fit()
        for a, b in zip(whole.states, resumed.states, strict=True):
            assert a.steps == b.steps
            assert same(a.tensors(), b.tensors())
    assert whole.progress.samples_seen == resumed.progress.samples_seen == 3 * 8 * 12
    assert whole.progress.layer_evaluations == 8 * 12 * 6


def test_the_block_that_holds_a_network_answers_for_it_until_copies_are_made():
    run = trainer(branching())
    for visit, _ in run.visits():
        parted = run.progress.block_steps > 12
        with run.averaged():
            assert run.model.holders == ((0, 1, 2) if parted else (0, 0, 0)), visit
        assert run.model.holders == (0, 1, 2)
    assert phase_at(run.config, 3, 10**6).holder(2) == 2


def test_copies_start_as_their_network_and_every_rate_falls_to_the_end():
    run = trainer(branching())
    seen = []
    for visit, _ in run.visits():
        if visit.copies:
            state = run.states
            for source, target in visit.copies:
                seen.append((source, target))
                made = len(visit.batches) if visit.block == source else 0
                assert state[target].steps == state[source].steps - made
            assert same(state[1].tensors(), state[2].tensors())
    assert seen == [(0, 1), (0, 2)]
    assert {state.steps for state in run.states} == {12 + own_steps(run.config, 3)}
    for state in run.states:
        state.steps -= 1
        assert 0 < state.learning_rate() < 0.01 * run.config.learning_rate


def test_levels_of_several_blocks_are_those_of_their_joint_range():
    partition = Partition(LogNormal(), 4, 0.0)
    joint, first, last = partition.range(range(1, 3)), partition.range(1), partition.range(2)
    assert (joint.low, joint.high) == (last.low, first.high)
    drawn = partition.sample(range(1, 3), 4000, generator=torch.Generator().manual_seed(0))
    owners = partition.block_of(drawn)
    assert set(owners.tolist()) == {1, 2}
    assert (owners == 1).double().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_at": [0.75, 0.5]}, r"train.branch_at must be a number or null .*got \[0.75, 0.5\]"),
        ({"branch_at": 1.0}, r"at least 0 and below 1"),
        ({"branch_at": 0.0}, "is for runs that branch"),
        ({"blocks": [0]}, "with train.blocks set it to 0"),
    ],
)
def test_what_cannot_branch_is_said(changes, message):
    with pytest.raises(dblocks.UserError, match=message):
        trainer(branching(**changes))
