"""Laws of the training loop: orders, residency, branching, accumulation, resume."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.errors import DiskFull
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.training import checkpoint
from diffusionblocks.training.order import Plan, steps_in_a_life, total_steps
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.visitors import Slots, Visitors, units
from tests.conftest import CONVERSIONS, config, make_data, make_vit, same, weights
from tests.laws.test_residency_laws import Elsewhere


def train(conversion, output_dir=None, **changes):
    model = dblocks.convert(make_vit(), 3, **conversion)
    trainer = dblocks.Trainer(
        model, dblocks.Classification(), make_data(), make_data(16), config(**changes), output_dir=output_dir
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("order", ["random", "sweep", "sequential"])
@pytest.mark.parametrize("visit_steps", [1, 3])
@pytest.mark.parametrize("branch_at", [0.0, 0.5])
def test_every_order_spends_the_whole_budget(order, visit_steps, branch_at):
    settings = config(steps=8, order=order, visit_steps=visit_steps, branch_at=branch_at)
    visits = list(Plan(settings, 3))
    assert sum(len(visit.batches) for visit in visits) == 24
    counts = [sum(len(v.batches) for v in visits if v.block == b and len(v.ranges) == 1) for b in range(3)]
    if order != "random":
        assert len(set(counts)) == 1
    assert [v.copies for v in visits if v.copies] == ([((0, 1), (0, 2))] if branch_at else [])
    assert visits[-1].border
    assert all(visit.block == 0 for visit in visits if len(visit.ranges) > 1)


def test_sweep_shows_one_batch_to_all_blocks_and_sequential_finishes_one_first():
    sweep = [(v.block, list(v.batches)) for v in Plan(config(steps=2, order="sweep"), 2)]
    assert sweep == [(0, [0]), (1, [0]), (0, [1]), (1, [1])]
    sequential = [(v.block, list(v.batches)) for v in Plan(config(steps=2, order="sequential"), 2)]
    assert sequential == [(0, [0]), (0, [1]), (1, [0]), (1, [1])]


@pytest.mark.parametrize("name", ["input-add", "features", "features-head"])
def test_residency_does_not_change_the_result(name):
    reference = weights(train(CONVERSIONS[name], ema_decay=0.9).model)
    for residency in ("host", "disk"):
        for visit_steps in (1, 2):
            moved = train(CONVERSIONS[name], residency=residency, visit_steps=visit_steps, ema_decay=0.9)
            expected = (
                reference if visit_steps == 1 else weights(train(CONVERSIONS[name], visit_steps=2, ema_decay=0.9).model)
            )
            assert same(weights(moved.model), expected)


def test_blocks_that_share_nothing_do_not_depend_on_the_order():
    """Each block's randomness is its own, so sweep, sequential, and a block alone give the same weights."""
    sweep, sequential = (train(CONVERSIONS["input-add"], order=order).model for order in ("sweep", "sequential"))
    assert same(weights(sweep), weights(sequential))
    alone = dblocks.convert(make_vit(), 3, **CONVERSIONS["input-add"])
    trainer = dblocks.Trainer(alone, dblocks.Classification(), make_data(), None, config())
    for batch in trainer.stream.load(range(4)):
        trainer.block_step(2, batch)
    assert same(weights(alone.block(2)), weights(sweep.block(2)))


def test_features_handed_on_equal_features_computed_anew():
    """The clean stream of a sweep is the stream that `context` computes from the blocks as they were."""
    model = dblocks.convert(make_vit(), 3, context="features", target_entry="none")
    batch = make_data(8).__getitems__(list(range(8)))
    carried = model.denoiser(1)(
        {**batch, "context": model.denoiser(0)(batch, torch.ones(8)).context}, torch.ones(8)
    ).context
    torch.testing.assert_close(model.context(batch, 2), carried)


def test_disk_residency_leaves_only_the_active_block_in_memory_files(tmp_path):
    trainer = train(CONVERSIONS["input-add"], output_dir=tmp_path, residency="disk")
    assert trainer.residency.present() == [2]
    assert len(list((tmp_path / "residency").rglob("resident-*.safetensors"))) == 3


def test_absent_blocks_borrow_their_weights_for_one_call():
    """Weights far away (zeros here) are fetched wherever a block is called, and are far away again afterwards."""
    near, far = (dblocks.convert(make_vit(), 3, **CONVERSIONS["input-add"]).eval() for _ in range(2))
    home = dict(
        zip(map(id, far.block(1).state_dict(keep_vars=True).values()), near.block(1).state_dict().values(), strict=True)
    )
    assert {id(t) for unit in units(far.block(1)) for t in (*unit.parameters(), *unit.buffers())} >= home.keys()
    fetched = {}
    for tensor in far.block(1).parameters():
        tensor.data = torch.zeros_like(tensor)
        fetched[tensor.data_ptr()] = home[id(tensor)]
    visitors = Visitors(list(units(far.block(1))), Slots(torch.device("cpu"), Elsewhere(fetched)))
    batch = {**make_data(4).__getitems__([0, 1, 2, 3]), "noisy_target": torch.ones(4, 16)}
    with visitors:
        raw = [model.denoiser(1)(batch, torch.ones(4)).raw for model in (near, far)]
        torch.testing.assert_close(*raw)
        assert raw[0].abs().sum() > 0
        assert all(not p.any() for p in far.block(1).parameters())
    assert not torch.allclose(far.denoiser(1)(batch, torch.ones(4)).raw, raw[0])


def test_gradients_of_idle_blocks_never_exist():
    trainer = train(CONVERSIONS["paper"], order="random", steps=6)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_branching_copies_weights_and_optimizer_state():
    model = dblocks.convert(make_vit(), 3, **CONVERSIONS["input-add"])
    settings = config(steps=4, branch_at=0.5)
    trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, settings)
    visits = trainer.visits()
    for _ in range(6):  # the common steps
        next(visits)
    common = trainer.states[0]
    before = {name: tensor.clone() for name, tensor in common.tensors().items()}
    trainer.place.part([(0, 1), (0, 2)])
    for state in trainer.states:
        assert state.steps == 6
        assert same({k: v.clone() for k, v in state.tensors().items()}, before)
    assert steps_in_a_life(settings, 3) == 8
    addresses = {tensor.data_ptr() for state in trainer.states for tensor in state.tensors().values()}
    assert len(addresses) == 3 * len(before)


@pytest.mark.parametrize("name", ["input-add", "features"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(name):
    """Without noise in the loss (end to end) the pieces add up exactly; for blocks one block is held throughout."""
    batch = make_data(8).__getitems__(list(range(8)))
    results = []
    for parts in (1, 4):
        model = dblocks.EndToEndModel(take_apart(make_vit()))
        trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(accumulation=parts))
        trainer.block_step(0, batch)
        results.append(weights(model))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], atol=2e-5, rtol=1e-4)
    trainer = train(CONVERSIONS[name], accumulation=4)
    assert [state.steps for state in trainer.states] == [4, 4, 4]


def test_activation_checkpointing_changes_nothing_but_memory():
    for name in ("paper", "features-head"):
        plain, recomputed = (train(CONVERSIONS[name], activation_checkpointing=flag).model for flag in (False, True))
        for key, tensor in weights(plain).items():
            torch.testing.assert_close(tensor, weights(recomputed)[key], atol=1e-6, rtol=1e-5)


def test_moving_averages_are_used_for_evaluation_and_put_back():
    trainer = train(CONVERSIONS["input-add"], ema_decay=0.9, steps=10, learning_rate=0.01)
    before = weights(trainer.model)
    averaged = trainer.evaluate(make_data(16))["validation_loss"].value
    assert same(before, weights(trainer.model))
    trainer.use_averages()
    trainer.states[0].average.clear()
    assert not same(before, weights(trainer.model))
    direct = trainer.task.evaluate(trainer.model.eval(), [make_data(16).__getitems__(list(range(16)))])
    assert averaged == pytest.approx(direct["validation_loss"].value)


def test_bf16_stays_near_fp32():
    full, half = (train(CONVERSIONS["features"], precision=p).evaluate(make_data(16)) for p in ("fp32", "bf16"))
    assert half["validation_loss"].value == pytest.approx(full["validation_loss"].value, rel=0.05)
    assert half["validation_loss"].value != full["validation_loss"].value


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_compute_the_same():
    results = []
    for compiled in (False, True):
        model = dblocks.convert(make_vit(num_hidden_layers=1), 1, **CONVERSIONS["paper"])
        trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(compile=compiled, steps=2))
        trainer.fit()
        results.append(weights(model))
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["paper", "features", "input-add"])
@pytest.mark.parametrize("order", ["random", "sweep"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(name, order, tmp_path):
    settings = dict(order=order, ema_decay=0.9, visit_steps=2, checkpoint_every=6, keep_checkpoints=9, steps=6)
    if name == "input-add":
        settings["branch_at"] = 0.34
    whole = train(CONVERSIONS[name], output_dir=tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    saved = checkpoint.existing(tmp_path / "b")
    assert len(saved) >= 3
    for later in saved[1:]:
        shutil.rmtree(later)
    resumed = train(CONVERSIONS[name], output_dir=tmp_path / "b", **settings)
    assert same(weights(whole.model), weights(resumed.model))
    for a, b in zip((*whole.states, whole.shared), (*resumed.states, resumed.shared), strict=True):
        assert a.steps == b.steps
        assert same(a.tensors(), b.tensors())
    without_time = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / x / "metrics.jsonl").open()
        ]
        for x in "ab"
    ]
    assert without_time[0] == without_time[1]


def test_ctrl_c_saves_a_checkpoint_and_the_next_fit_finishes(tmp_path):
    def interrupt():
        while not journal.is_file() or not journal.stat().st_size:  # it trains
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    journal, settings = tmp_path / "metrics.jsonl", dict(steps=150, checkpoint_every=0, log_every=3)
    threading.Thread(target=interrupt).start()
    with pytest.raises(dblocks.RunStopped, match="checkpoint in"):
        train(CONVERSIONS["features"], output_dir=tmp_path, **settings)
    assert checkpoint.damage(checkpoint.existing(tmp_path)[-1]) is None
    finished = train(CONVERSIONS["features"], output_dir=tmp_path, **settings)
    whole = train(CONVERSIONS["features"], **settings)
    assert same(weights(finished.model), weights(whole.model))


@pytest.mark.parametrize("damage", ["truncate", "remove", "state"])
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, tmp_path, caplog):
    settings = dict(checkpoint_every=3, keep_checkpoints=9)
    whole = train(CONVERSIONS["features"], output_dir=tmp_path, **settings)
    newest = checkpoint.existing(tmp_path)[-1]
    path = newest / ("state.json" if damage == "state" else "block-01.safetensors")
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resumed = train(CONVERSIONS["features"], output_dir=tmp_path, **settings)
    assert "damaged" in caplog.text
    assert same(weights(whole.model), weights(resumed.model))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train(CONVERSIONS["features"], output_dir=tmp_path)
    model = dblocks.convert(make_vit(num_hidden_layers=3), 3, context="features", target_entry="none")
    other = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(), output_dir=tmp_path)
    with pytest.raises(dblocks.UserError, match=r"of another network or version: there is no layers\.1"):
        other.restore(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint_valid(tmp_path, monkeypatch):
    trainer = train(CONVERSIONS["features"], output_dir=tmp_path)
    good = checkpoint.existing(tmp_path)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskFull, match="disk is full"):
        checkpoint.save(tmp_path, 99, trainer.named_states(), {"progress": {}}, keep=2)
    assert checkpoint.existing(tmp_path) == good
    assert checkpoint.damage(good[-1]) is None


def test_a_loss_that_is_not_finite_stops_and_names_block_and_step(tmp_path):
    model = dblocks.convert(make_vit(), 3, context="features", target_entry="none")
    settings = config(steps=6, checkpoint_every=3)
    trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, settings, output_dir=tmp_path)
    original = trainer.block_step

    def poisoned(index, batch, *handed, **options):
        made = original(index, batch, *handed, **options)
        return made._replace(loss=made.loss * float("nan")) if index == 1 and trainer.states[1].steps == 4 else made

    trainer.block_step = poisoned
    with pytest.raises(dblocks.UserError, match="block 1 became nan at its step 4"):
        trainer.fit()
    assert checkpoint.damage(checkpoint.existing(tmp_path)[-1]) is None


def test_training_learns():
    model = dblocks.convert(make_vit(), 3, context="features", target_entry="none")
    trainer = dblocks.Trainer(
        model, dblocks.Classification(), make_data(), None, config(steps=200, batch_size=16, learning_rate=2e-3)
    )
    trainer.fit()  # long enough to end there from other first weights, too
    assert trainer.evaluate(make_data(16))["accuracy"].value == 100.0


def test_own_batches_divide_the_work_but_not_the_samples():
    model, data = dblocks.convert(make_vit(), 3), make_data(96)
    options = config(steps=8, batch_size=12, branch_at=0.5, own_batch=4, order="random")
    assert total_steps(options, 3) == 12 + 3 * 12  # four of eight steps are left, each cut into three
    assert steps_in_a_life(options, 3) == 24
    trainer = dblocks.Trainer(model, dblocks.Classification(), data, None, options)
    sizes = []
    step = trainer.block_step
    trainer.block_step = lambda *given, **more: sizes.append(len(given[1]["labels"])) or step(*given, **more)
    progress = trainer.fit()
    assert sizes == [12] * 12 + [4] * 36
    assert progress.samples_seen == 3 * 8 * 12
    assert progress.layer_evaluations == 8 * 12 * 6
    with pytest.raises(dblocks.UserError, match="is for runs that branch"):
        dblocks.Trainer(model, dblocks.Classification(), data, None, config(own_batch=4))


@pytest.mark.parametrize("own_batch", [0, 4])
def test_the_rate_of_shared_parts_falls_until_the_last_step(own_batch):
    options = config(steps=8, batch_size=12, branch_at=0.5, own_batch=own_batch, order="cyclic")
    model = dblocks.convert(make_vit(), 3, shared="trained")
    trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(96), None, options)
    rates, step = [], trainer.shared.step
    trainer.shared.step = lambda: rates.append(trainer.shared.learning_rate()) or step()
    trainer.fit()
    assert len(rates) == total_steps(trainer.config, 3)
    assert min(rates) == rates[-1] > 0


def test_a_late_branch_leaves_every_block_a_step_of_its_own():
    options = config(steps=4, branch_at=0.99, order="cyclic")
    trainer = dblocks.Trainer(dblocks.convert(make_vit(), 3), dblocks.Classification(), make_data(), None, options)
    trainer.fit()
    assert [state.steps for state in trainer.states] == [3 * 3 + 1] * 3
    first, last = (trainer.model.block(index).state_dict() for index in (0, 2))
    assert all(torch.allclose(first[name], last[name], atol=0.05) for name in first)  # copies, one step apart


def test_the_rate_falls_from_the_branch_or_with_own_batches_from_the_hold():
    life, common = 100, 60
    rates = {}
    for start in ("branch", "hold"):
        own_batch = 4 if start == "hold" else 0
        options = config(own_batch=own_batch, hold=0.2, warmup=0.0, learning_rate=1.0)
        state = BlockState(dblocks.convert(make_vit(), 3).block(0), options, life, common)
        rates[start] = []
        for state.steps in range(life):
            rates[start].append(state.learning_rate())
    assert rates["branch"][59] == 1.0 and rates["branch"][75] < 1.0
    assert rates["hold"][19] == 1.0 and rates["hold"][30] < 1.0
    assert max(rates["branch"][-1], rates["hold"][-1]) < 0.01


@pytest.mark.parametrize("order", ["cyclic", "random", "sweep"])
def test_a_step_that_failed_leaves_nothing_behind(order, monkeypatch):
    """Out of memory in a notebook, and the same trainer goes on: no gradient of the failed step is added."""
    whole = train(CONVERSIONS["default"], order=order, steps=4)
    trainer = dblocks.Trainer(
        dblocks.convert(make_vit(), 3, **CONVERSIONS["default"]),
        *(dblocks.Classification(), make_data(), None, config(order=order, steps=4)),
    )
    step, calls = BlockState.step, []

    def fails_once(self, *arguments):
        calls.append(self)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    monkeypatch.setattr(BlockState, "step", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    assert all(p.grad is None for p in trainer.model.parameters())
    if order == "sweep":
        with pytest.raises(dblocks.UserError, match="a batch was between blocks"):
            trainer.fit()
        return
    trainer.fit()
    assert same(weights(trainer.model), weights(whole.model))
