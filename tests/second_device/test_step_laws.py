"""What a step on a device moves, waits for and computes."""

from __future__ import annotations

import contextlib
import itertools
import shutil

import pytest
import torch

from diffusionblocks.training.task import on_device
from tests.conftest import DEVICE, weights
from tests.second_device.cases import CASES
from tests.second_device.device import watched

only_sim = pytest.mark.skipif(DEVICE != "sim", reason="a card does not count what crosses")
CONSTANT = 4  # elements of a tensor that may be made on the host in every step: a scalar, the two ends of a range


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    return CASES[request.param]


def a_round(trainer, number=0):
    """One step of every block on batch `number`, which is on the device already."""
    (batch,), handed = on_device(trainer.stream.load([number]), trainer.device), ()
    for block in trainer.round:
        with trainer.residency.active(block):
            handed = trainer.block_step(block, batch, handed).handed


def alike(one, other):
    """Bit for bit; on a card within what sums in any order do to Adam's signs of roundings."""
    pairs = [
        (a.cpu().float(), b.cpu().float()) for a, b in zip(*(weights(m).values() for m in (one, other)), strict=True)
    ]
    return all(torch.equal(a, b) if DEVICE == "sim" else torch.allclose(a, b, atol=1e-2) for a, b in pairs)


@only_sim
def test_a_block_step_moves_nothing_and_waits_for_nothing(case, device):
    trainer = case.trainer(device=str(device), heads_first=0.0)
    a_round(trainer)
    (batch,), handed = on_device(trainer.stream.load([1]), trainer.device), ()
    for block in trainer.round:
        with watched() as traffic:
            handed = trainer.block_step(block, batch, handed).handed
        assert (traffic.up, traffic.down, traffic.read) == ([], [], 0)
        assert traffic.made_on_host <= CONSTANT


def test_a_device_computes_what_the_cpu_computes(case, device):
    found = []
    for where in ("cpu", str(device)):
        trainer = case.trainer(device=where, optimizer="sgd", learning_rate=0.1)  # Adam makes signs of roundings
        trainer.fit()
        found.append({name: tensor.cpu() for name, tensor in weights(trainer.model).items()})
    if device.type == "sim":  # the same draws, too
        for name, tensor in found[0].items():
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in found[1].values() if tensor.is_floating_point())


@pytest.mark.parametrize("residency", ["host", "disk"])
def test_where_idle_blocks_are_changes_nothing(case, residency, device):
    if DEVICE == "sim" and case.train.get("keep_graphs") and residency != "device":
        pytest.skip("a parameter of this device cannot leave it while a graph holds it")
    plain = case.trainer(device=str(device), residency="device")
    plain.fit()
    moved = case.trainer(device=str(device), residency=residency)
    moved.fit()
    assert alike(plain.model, moved.model)
    assert {name: m.value for name, m in plain.evaluate(case.data).items()} == pytest.approx(
        {name: m.value for name, m in moved.evaluate(case.data).items()}, rel=1e-6 if DEVICE == "sim" else 0.1
    )


@only_sim
def test_a_run_moves_its_batches_and_reads_the_device_at_log_intervals_alone(device):
    case, moved, read = CASES["labels default"], {}, {}
    for steps, every in ((8, 3), (16, 3), (16, 6)):
        trainer = case.trainer(device=str(device), steps=steps, log_every=every, checkpoint_every=0)
        with watched() as traffic:
            trainer.fit()
        moved[steps], read[steps, every] = sum(traffic.up), len(traffic.down) + traffic.read
    batches = [tensor.nbytes for batch in trainer.stream.load(range(8)) for tensor in batch.values()]
    assert moved[16] - moved[8] == sum(batches)
    each = read[16, 3] - read[8, 3]  # of eight more rounds over three blocks, logged every three block steps
    assert 0 < each <= 8 * 4  # whether losses are finite, and a mean for each of three blocks
    assert read[16, 6] <= read[16, 3] * 0.7


@pytest.mark.parametrize("name", ["labels features", "tokens exact", "images", "masked"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, device, tmp_path):
    case, options = CASES[name], {"device": str(device), "residency": "host", "steps": 4}
    whole = case.trainer(**options)
    whole.fit()

    def stopped(**more):
        trainer = case.trainer(**options, **more)
        trainer.output_dir = tmp_path
        return trainer

    first = stopped(checkpoint_every=6)
    visits = first.visits
    first.visits = lambda: itertools.islice(visits(), 7)  # killed in the third of four rounds
    with contextlib.suppress(AssertionError):
        first.fit()
    shutil.rmtree(sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))[-1])  # of the end
    second = stopped()
    second.fit()
    assert second._first_step == 6
    assert alike(whole.model, second.model)


@pytest.mark.parametrize("residency", ["device", "host", "disk"])
@pytest.mark.parametrize("name", ["labels paper", "tokens paper", "tokens exact"])
def test_after_a_run_the_model_is_in_one_place(name, residency, device, tmp_path):
    trainer = CASES[name].trainer(device=str(device), residency=residency)
    trainer.output_dir = tmp_path
    home = device.type if residency == "device" else "cpu"
    trainer.fit()
    assert {tensor.device.type for tensor in trainer.model.state_dict().values()} == {home}
    trainer.evaluate(CASES[name].data)
    assert {tensor.device.type for tensor in trainer.model.state_dict().values()} == {home}
