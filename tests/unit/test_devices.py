"""Which device is meant, and one clear line where it cannot be used."""

import logging

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.cli import main
from diffusionblocks.system import devices
from diffusionblocks.system.devices import find_device
from diffusionblocks.training import residency
from tests.conftest import CONVERSIONS, config, make_data, make_vit


def test_the_cpu_is_the_cpu_and_auto_is_what_is_there(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device("auto") == torch.device("cuda", 1)


def test_a_card_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(dblocks.UserError, match=r"train.device cuda:9: .*this machine has cuda:0, cuda:1"):
        find_device("cuda:9")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--device", "cuda:9"],
            "train.device cuda:9: no CUDA device can be used here (this build of torch has no CUDA)",
        ),
        (["--device", "mps"], "no MPS device can be used here"),
        (["--device", "gpu"], "train.device must be auto, cpu, cuda, cuda:N or mps; got 'gpu'"),
    ],
)
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="messages of a build without CUDA")
def test_a_device_that_cannot_be_used_is_one_line(arguments, said, capsys, tmp_path):
    assert main(["train", "digits", *arguments, "--output-dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_a_driver_that_is_too_old_is_told(monkeypatch, caplog):
    old = "The NVIDIA driver on your system is too old (found version 11040)."

    def start():
        raise RuntimeError(f"{old} Please update it.\nmore")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", start)
    with pytest.raises(dblocks.UserError, match="driver on your system is too old"):
        find_device("cuda")

    def ask():  # as torch.cuda.is_available does
        import warnings

        warnings.warn(f"CUDA initialization: {old}", stacklevel=1)
        return False

    monkeypatch.setattr(torch.accelerator, "is_available", ask)
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        assert find_device("auto") == torch.device("cpu")
    assert "a graphics card cannot be used, so the CPU is: CUDA initialization" in caplog.text


def test_widest_precision_of_a_device():
    assert devices.widest("cpu") == torch.float64 and devices.widest("mps") == torch.float32
    assert devices.wide(torch.ones(2)).dtype == torch.float64


def test_too_little_host_memory_is_said_before_anything_moves(monkeypatch):
    trainer = dblocks.Trainer(
        dblocks.convert(make_vit(), 3, **CONVERSIONS["default"]), dblocks.Classification(), make_data(), None, config()
    )
    monkeypatch.setattr(residency, "_free_host_memory", lambda: -(1 << 40))
    before = {name: tensor.data_ptr() for name, tensor in trainer.states[0].tensors().items()}
    with pytest.raises(
        dblocks.UserError, match=r"keeps 0.0 GiB of idle blocks in host memory, of which -.* GiB are free"
    ):
        residency.Residency("host", trainer.states, torch.device("meta"))
    assert {name: tensor.data_ptr() for name, tensor in trainer.states[0].tensors().items()} == before


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch):
    def pinned(self, *, pinned):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(residency.Layout, "empty", pinned)
    layout = residency.Layout({"weight": (torch.float32, torch.Size([4]))})
    with pytest.raises(dblocks.UserError, match=r"cannot pin .* \(CUDA error: out of memory\); use --residency disk"):
        residency._empty(layout, pinned=True)


class Greedy(dblocks.Classification):
    """Evaluates at most `most` samples together."""

    most = 0

    def evaluate(self, model, batches):
        kept = []
        for batch in batches:
            if len(batch["labels"]) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            kept.append(batch)
        return super().evaluate(model, kept)


def test_evaluation_that_does_not_fit_goes_on_with_smaller_batches(caplog):
    trainer = dblocks.Trainer(dblocks.convert(make_vit(), 3), Greedy(), make_data(), None, config())
    Greedy.most = 10
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        found = trainer.evaluate(make_data(40))
    assert "going on with 8 samples at once" in caplog.text and found["accuracy"].value >= 0
    assert not trainer.place.averaged
    Greedy.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        trainer.evaluate(make_data(40))


def test_a_command_that_runs_out_of_memory_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB"
        )

    monkeypatch.setattr("diffusionblocks.experiments.run.load_run", full)
    assert main(["sample", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "dblocks: out of memory in sample: CUDA out of memory" in err and "Traceback" not in err
