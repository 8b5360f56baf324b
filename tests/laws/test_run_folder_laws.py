"""A run folder belongs to one process, loses nothing, and holds nothing that is not finite or not what was written."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.errors import Failed
from diffusionblocks.experiments.folder import read_recipe
from diffusionblocks.recipes import ModelConfig, Recipe
from diffusionblocks.system import files, plain_yaml, run_folder
from diffusionblocks.system.interruption import Stop, Stopped, Terminated, interruptible, stop_on_signal
from diffusionblocks.training import checkpoint
from diffusionblocks.training.progress import read_journal
from diffusionblocks.training.task import Metric, check_finite
from tests.conftest import config, make_data, make_vit, same, weights

FEATURES = {"context": "features", "target_entry": "none"}


def trainer(folder=None, data=None, **settings):
    model = dblocks.convert(make_vit(), 3, **FEATURES)
    return dblocks.Trainer(
        model, dblocks.Classification(), data or make_data(), make_data(8), config(**settings), output_dir=folder
    )


# ---------------------------------------------------------------- finite


class Poisoned(ImageData):
    """The 8 x 8 images of make_data; those of one number are not finite."""

    bad = 5

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        batch["pixel_values"][[index == self.bad for index in indices]] = float("nan")
        return batch


def test_a_batch_that_is_not_finite_is_named_and_the_rate_is_not_blamed(tmp_path):
    plain = make_data()
    with pytest.raises(dblocks.UserError, match=r"Sample 5 of the training data .* holds pixel_values") as error:
        trainer(tmp_path, Poisoned(plain.images, plain.labels), steps=12).fit()
    assert "learning-rate" not in str(error.value)


@pytest.mark.parametrize("settings", [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.0}, {"ema_decay": 0.9}])
def test_a_gradient_that_is_not_finite_in_the_last_step_ends_without_a_checkpoint_of_it(settings, tmp_path):
    found = trainer(tmp_path, steps=6, checkpoint_every=3, **settings)
    block, last = found.model.block(2), found.states[2]

    def poison(gradient):
        return gradient * float("inf") if last.steps == 5 else gradient

    next(p for p in block.parameters() if p.requires_grad).register_hook(poison)
    with pytest.raises(dblocks.UserError, match=r"not finite|became (nan|inf) at its step 6") as error:
        found.fit()
    kept = checkpoint.existing(tmp_path)[-1]
    assert str(kept) in str(error.value)
    assert "--resume never" in str(error.value)
    again = trainer(tmp_path, steps=6, **settings)
    assert again.restore(tmp_path)
    assert all(tensor.isfinite().all() for state in again.states for tensor in state.tensors().values())


def test_a_metric_that_is_not_finite_is_named():
    good = {"accuracy": Metric(1.0, None)}
    assert check_finite(good) is good
    for value, error in ((float("nan"), None), (1.0, float("inf"))):
        with pytest.raises(Failed, match="validation_loss"):
            check_finite({**good, "validation_loss": Metric(value, error)})


def test_json_is_valid_or_not_written(tmp_path):
    with pytest.raises(Failed, match=r"metrics\.loss\[1\] is not a finite number"):
        files.write_json(tmp_path / "a.json", {"metrics": {"loss": [1.0, float("nan")]}})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- one process


HOLD = "import sys, time; from pathlib import Path; from diffusionblocks.system.run_folder import held\n"
HOLD += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_process_and_free_when_that_is_dead(tmp_path):
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(dblocks.UserError, match=f"in use by process {process.pid} on {platform.node()} since"):
            trainer(tmp_path / "run").fit()
        with pytest.raises(dblocks.UserError, match="in use"), run_folder.held(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
    trainer(tmp_path / "run").fit()


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with run_folder.held(tmp_path / "a" / "b"), run_folder.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / run_folder.OWNER).is_file()
    assert not list(tmp_path.iterdir())


def test_residency_files_are_those_of_one_process(tmp_path):
    found = trainer(tmp_path, residency="disk")
    found.fit()
    assert {path.parent.name for path in tmp_path.rglob("resident-*")} == {str(os.getpid())}
    (tmp_path / "residency" / "0").mkdir()  # of another one, which was killed
    with run_folder.held(tmp_path), run_folder.tidied(tmp_path):
        assert {path.name for path in (tmp_path / "residency").iterdir()} == {str(os.getpid())}
    assert not (tmp_path / "residency").exists()


# ---------------------------------------------------------------- what was written


def test_the_run_before_is_kept_until_there_is_a_checkpoint(tmp_path):
    trainer(tmp_path).fit()
    (tmp_path / "config.yaml").write_text("x")
    (tmp_path / "mine.txt").write_text("stays")
    before = {path.name for path in tmp_path.iterdir()}
    run_folder.set_aside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {run_folder.PREVIOUS, "mine.txt", run_folder.LOCK}
    (tmp_path / "config.yaml").write_text("y")
    run_folder.set_aside(tmp_path)  # killed before it had a checkpoint, and begun again
    run_folder.put_back(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "config.yaml").read_text() == "x"
    run_folder.set_aside(tmp_path)
    trainer(tmp_path).fit()
    assert not (tmp_path / run_folder.PREVIOUS).exists()


def test_what_a_recipe_made_in_python_may_run_is_not_asked_again(tmp_path):
    recipe = Recipe(model=ModelConfig(trust_remote_code=True))
    files.write_text(tmp_path / "config.yaml", files.sealed(plain_yaml.dump(recipe.as_dict())))
    with pytest.raises(dblocks.UserError, match="--trust-remote-code"):
        read_recipe(tmp_path)
    assert read_recipe(tmp_path, consented=recipe).model.trust_remote_code


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(12))
def test_a_kill_while_a_run_is_moved_loses_nothing(moves, tmp_path, monkeypatch):
    """Aside and back again, ended after any of its moves; the next process mends it."""
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    replace, left = os.replace, [moves]

    def dying(source, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with contextlib.suppress(Killed):
        run_folder.set_aside(tmp_path)
        (tmp_path / "config.yaml").write_text("new")
        run_folder.put_back(tmp_path)
    monkeypatch.undo()
    with run_folder.held(tmp_path):
        if (tmp_path / run_folder.PREVIOUS).exists():  # a new run had begun
            assert not (tmp_path / "checkpoints").exists()
            run_folder.put_back(tmp_path)
        assert (tmp_path / "config.yaml").read_text() == "config.yaml"
        assert (tmp_path / "checkpoints" / "step-3").is_dir()
        assert not (tmp_path / run_folder.MOVING).exists()


def test_a_checkpoint_that_is_written_again_is_never_missing(tmp_path, monkeypatch):
    found = trainer(tmp_path, keep_checkpoints=1)
    found.fit()
    kept = checkpoint.existing(tmp_path)[-1]
    replace = os.replace

    def dying(source, target):
        if str(target) == str(kept):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    step = found.progress.block_steps
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, step, found.named_states(), {"progress": vars(found.progress)}, 1)
    monkeypatch.undo()
    with run_folder.held(tmp_path):
        assert checkpoint.existing(tmp_path) == [kept]
        assert checkpoint.damage(kept) is None
        assert {path.name for path in kept.parent.iterdir()} == {kept.name}


def test_what_is_no_file_is_written_to_and_links_stay_links(tmp_path):
    with files.replacing(Path("/dev/null")) as place:
        assert place == Path("/dev/null")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    files.write_text(tmp_path / "loop", "x")
    assert (tmp_path / "loop").read_text() == "x"


def test_infinite_buffers_are_not_weights(tmp_path):
    model = dblocks.convert(make_vit(), 3, **FEATURES)
    model.block(1).register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    found = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(), output_dir=tmp_path)
    found.fit()
    assert checkpoint.damage(checkpoint.existing(tmp_path)[-1]) is None


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "garbage"])
def test_a_damaged_journal_goes_on_after_its_good_lines(damage, tmp_path, caplog):
    settings = dict(steps=6, log_every=3, checkpoint_every=9, keep_checkpoints=9)
    whole = trainer(tmp_path, **settings)
    whole.fit()
    for later in checkpoint.existing(tmp_path)[1:]:
        checkpoint.shutil.rmtree(later)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    damaged = {"short": content[: first + 10], "changed": content.replace(b'"seconds": 0', b'"seconds": 9', 1)}
    damaged |= {"missing": b"", "garbage": content[:first] + b"\0" * 400}
    path.write_bytes(damaged[damage])
    trainer(tmp_path, **settings).fit()
    assert "metrics.jsonl is damaged" in caplog.text
    steps = [entry["block_steps"] for entry in read_journal(tmp_path)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 18


def test_a_report_reads_no_damaged_journal(tmp_path):
    trainer(tmp_path, log_every=3).fit()
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    for damaged in (content[:-5], content.replace(b"1", b"7", 1), b"[1]\n" + content, b'{"loss": 3}\n', b"\xff\n"):
        path.write_bytes(damaged)
        with pytest.raises(dblocks.UserError, match="damaged"):
            read_journal(tmp_path)


def test_stray_folders_are_no_checkpoints(tmp_path):
    whole = trainer(tmp_path)
    whole.fit()
    for name in ("step-30.bak", "step-", "step-x", "step-²"):
        (tmp_path / "checkpoints" / name).mkdir()
    again = trainer(tmp_path)
    assert again.restore(tmp_path)
    assert same(weights(again.model), weights(whole.model))


def test_a_sealed_file_tells_every_change(tmp_path):
    path = tmp_path / "a.json"
    content = {"text": "value", "number": 1.5, "list": [1, None, True]}
    files.write_json(path, content)
    assert files.read_json(path) == content
    whole = path.read_bytes()
    for place in range(len(whole) * 8):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = files.read_json(path, {"text": str, "number": float, "list": list})
        except dblocks.UserError:
            continue
        assert {key: found[key] for key in content} == content


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyboardInterrupt
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("stays")
    with pytest.raises(OSError, match="x"), files.replacing_folder(folder) as partial:  # noqa: PT012
        (partial / "weights").write_text("half")
        raise OSError("x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "folder", "mine"]
    with files.replacing_folder(folder) as partial:
        (partial / "weights").write_text("whole")
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "weights"]
    assert path.read_text() == "before"


# ---------------------------------------------------------------- signals


def test_a_signal_ends_what_can_be_given_up_and_is_then_over():
    with pytest.raises(Terminated), interruptible():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # nothing interrupts the cleaning up
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler repeats itself
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_sigterm_waits_for_a_visit_but_not_for_long(monkeypatch):
    monkeypatch.setattr("diffusionblocks.system.interruption.GRACE", 0.1)
    with pytest.raises(Terminated), stop_on_signal() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        time.sleep(5)
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.saving():
            time.sleep(0.3)
    with stop_on_signal() as stop, stop.saving():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)


class Slow(ImageData):
    """The first batch that is read of it brings SIGTERM."""

    read = 0

    def __getitems__(self, indices):
        self.read += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitems__(indices)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_evaluation_during_training_is_given_up_and_nothing_is_lost(precision, tmp_path):
    settings = dict(steps=6, evaluate_every=9, checkpoint_every=0, ema_decay=0.9, precision=precision)
    found, plain = trainer(tmp_path, **settings), make_data(400)
    found.eval_data = Slow(plain.images, plain.labels)
    with pytest.raises(dblocks.RunStopped) as stopped:
        found.fit()
    assert stopped.value.signal == signal.SIGTERM
    assert found.eval_data.read == 1
    finished = trainer(tmp_path, **settings)
    finished.fit()
    whole = trainer(**settings)
    whole.fit()
    assert same(weights(finished.model), weights(whole.model))


def test_a_stop_is_seen_before_the_next_batch():
    stop = Stop()
    batches = stop.between([1, 2])
    assert next(batches) == 1
    stop.handle(signal.SIGINT, None)
    with pytest.raises(Stopped):
        next(batches)


def test_signals_belong_to_the_main_thread():
    seen = []

    def run():
        with interruptible(), stop_on_signal() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
