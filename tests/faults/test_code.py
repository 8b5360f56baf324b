"""Planted code: run folders, recipes, networks and data that would leave a file behind if any code in them ran. None
may.

A flag on the command line would allow it (--trust-remote-code, --trust-inception); none is given here.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.faults.harness import ALL, SHORT, Fault, call, few, files, fresh, obeys

MATRIX = "planted code"
MODULE = "open({trap!r}, 'w').write('ran')\n"


class Trap:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (eval, (f"open({str(self.path)!r}, 'w').write('ran')",))


def _pickle(trap: Path) -> bytes:
    return pickle.dumps(Trap(trap))


def _torch_pickle(trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Trap(trap)}, buffer)
    return buffer.getvalue()


def _torchscript(path: Path, trap: Path) -> None:
    """A module whose forward saves a tensor to the trap."""

    class Writer(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch.save(images, self.name)
            return images.flatten(1)[:, :8]

    torch.jit.script(Writer(str(trap))).save(str(path))


def _changed_config(run: Path, *changes: tuple[str, Any]) -> None:
    """Settings in config.yaml, with a seal that fits where there is one: an attacker can compute it too."""
    from diffusionblocks.system import files as own

    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for dotted, value in changes:
        group, _, name = dotted.partition(".")
        if name:
            content[group][name] = value
        else:
            content[group] = value
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(own.sealed(text) if own.has_seal(path) else text)


def _remote_network(folder: Path, trap: Path) -> Path:
    """A folder that names Python files of its own as its classes, as repositories on the hub do."""
    folder.mkdir(parents=True)
    names = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnModel",
        "AutoTokenizer": ["own.OwnTokenizer", None],
    }
    content = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "OwnTokenizer"}))
    (folder / "own.py").write_text(
        MODULE.format(trap=str(trap)) + "class OwnConfig: pass\nclass OwnModel: pass\nclass OwnTokenizer: pass\n"
    )
    return folder


def _remote_data(folder: Path, trap: Path) -> Path:
    """A data set with a loading script."""
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.py").write_text(MODULE.format(trap=str(trap)))
    return folder


@dataclass(frozen=True)
class Plant:
    """plant: writes into (run folder, folder beside it, file that must not appear)."""

    name: str
    base: str
    plant: Callable[[Path, Path, Path], Any]

    def __str__(self) -> str:
        return self.name


def _everywhere(content: Callable[[Path], bytes]) -> Callable[[Path, Path, Path], None]:
    """In the place of every tensor file."""

    def plant(run: Path, beside: Path, trap: Path) -> None:
        for path in run.rglob("*.safetensors"):
            path.write_bytes(content(trap))

    return plant


def _as(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path, Path], None]:
    """As a file that other libraries look for, and the one that they prefer gone."""

    def plant(run: Path, beside: Path, trap: Path) -> None:
        for folder in (run, run / "model", run / "huggingface", *(run / "checkpoints").iterdir()):
            if folder.is_dir():
                (folder / name).write_bytes(content(trap))
        for path in (*(run / "model").glob("*.safetensors"), *(run / "huggingface").glob("*.safetensors")):
            path.unlink()

    return plant


def _template(run: Path, beside: Path, trap: Path) -> None:
    code = "{{ cycler.__init__.__globals__.os.system('touch TRAP') }}{{ ''.__class__.__mro__ }}".replace(
        "TRAP", str(trap)
    )
    for path in run.rglob("*.jinja"):
        path.write_text(code)
    for name in ("summary.json", "samples.json"):
        path = run / name
        if path.is_file():
            path.write_text(path.read_text().replace("exact", code.replace('"', "'")))


def _yaml_object(run: Path, beside: Path, trap: Path) -> None:
    with (run / "config.yaml").open("a") as stream:
        stream.write(f"\ndescription: !!python/object/apply:os.system ['touch {trap}']\n")


def _trusting(make: Callable[[Path, Path], Path], *settings: str) -> Callable[[Path, Path, Path], None]:
    """config.yaml that points at somebody's folder and trusts it."""

    def plant(run: Path, beside: Path, trap: Path) -> None:
        path = str(make(beside / "theirs", trap))
        _changed_config(
            run,
            *(
                (name, path if value == "PATH" else value == "true" or value)
                for name, _, value in (s.partition("=") for s in settings)
            ),
        )

    return plant


PLANTS = (
    Plant("pickles for tensors", "digits", _everywhere(_pickle)),
    Plant("torch pickles for tensors", "digits", _everywhere(_torch_pickle)),
    Plant("pytorch_model.bin", "digits", _as("pytorch_model.bin", _torch_pickle)),
    Plant("pytorch_model.bin of an adapted network", "adapted", _as("pytorch_model.bin", _torch_pickle)),
    Plant("adapter_model.bin", "adapted", _as("adapter_model.bin", _torch_pickle)),
    Plant("training_args.bin", "adapted", _as("training_args.bin", _torch_pickle)),
    Plant("optimizer.pt", "digits", _as("optimizer.pt", _torch_pickle)),
    Plant("a YAML object", "digits", _yaml_object),
    Plant("a template", "adapted", _template),
    Plant("a tokenizer with code", "adapted", _trusting(
        _remote_network, "data.tokenizer=PATH", "data.trust_remote_code=true")),
    Plant("a network with code", "adapted", _trusting(
        _remote_network, "model.pretrained=PATH", "model.trust_remote_code=true")),
    Plant("both with code", "adapted", _trusting(
        _remote_network, "model.pretrained=PATH", "model.trust_remote_code=true", "data.tokenizer=PATH",
        "data.trust_remote_code=true")),
    Plant("a data set with code", "adapted", _trusting(
        _remote_data, "data.source=huggingface", "data.path=PATH", "data.trust_remote_code=true")),
    Plant("an image set with code", "digits", _trusting(_remote_data, "data.source=huggingface", "data.path=PATH")),
)  # fmt: skip
COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "train": lambda run, out: ("train", run / "config.yaml", "--output-dir", run),
    "train anew": lambda run, out: ("train", run / "config.yaml", "--output-dir", out / "new", "--steps=2"),
    "start": lambda run, out: ("train", "digits", *SHORT, "--model.start", run, "--output-dir", out / "new"),
    "evaluate": lambda run, out: ("evaluate", run),
    "sample": lambda run, out: ("sample", run, "--num=1"),
    "report": lambda run, out: ("report", run, "--output", out / "r.html"),
    "export": lambda run, out: ("export", run, "--output", out / "e"),
    "plan": lambda run, out: ("plan", run / "config.yaml", "--memory=1GiB", "--num-blocks=1"),
}
CASES = [(plant, command) for plant in PLANTS for command in COMMANDS]


def _runs_nothing(trap: Path, *arguments: object) -> None:
    outcome = call(*arguments)
    if trap.exists():
        raise Fault("code ran", f"{arguments[0]}: {outcome.line}")
    obeys(outcome, 0, 1, 2)


@pytest.mark.parametrize(("plant", "command"), few(CASES, 5), ids=str)
def test_no_code_of_a_run_folder_runs(plant, command, request, tmp_path):
    run, trap = fresh(request.getfixturevalue(plant.base), tmp_path / "run"), tmp_path / "trap"
    plant.plant(run, tmp_path, trap)
    _runs_nothing(trap, *COMMANDS[command](run, tmp_path))


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch TRAP']", "!!python/name:os.system", "{{7*7}}"]
)
def test_no_code_in_an_option_runs(text, tmp_path):
    trap = tmp_path / "trap"
    for option in ("--steps", "--name", "--data.path"):
        outcome = call(
            "train", "digits", *SHORT, f"{option}={text.replace('TRAP', str(trap))}", "--output-dir", tmp_path / "r"
        )
        assert not trap.exists()
        obeys(outcome, 0, 2)
        shutil.rmtree(tmp_path / "r", ignore_errors=True)


GENERATE = (
    *("train", "dit-digits", *SHORT, "--model.model-class=DiTTransformer2DModel", "--evaluation.num-samples=70"),
    *("--sampling.steps=1", "--steps=2"),
)


@pytest.mark.parametrize(
    "command", ("evaluate", "train", "report", "sample", "export", "plan") if ALL else ("evaluate",)
)
def test_no_torchscript_named_in_a_file_runs(command, tmp_path):
    pytest.importorskip("diffusers")
    trap, script, recipe = tmp_path / "trap", tmp_path / "inception.pt", tmp_path / "recipe.yaml"
    _torchscript(script, trap)
    torch.jit.load(str(script))(torch.zeros(2, 3, 8, 8))
    assert trap.exists(), "the trap works"
    trap.unlink()
    done = call(*GENERATE, "--output-dir", tmp_path / "run")
    assert done.code == 0, done.err
    _changed_config(tmp_path / "run", ("evaluation.inception", str(script)))
    shutil.copy(tmp_path / "run" / "config.yaml", recipe)
    _runs_nothing(trap, *COMMANDS["train anew" if command == "train" else command](tmp_path / "run", tmp_path))


def test_a_report_escapes_what_runs_are_called(digits, tmp_path):
    run = fresh(digits, tmp_path / "run")
    content = json.loads((run / "summary.json").read_text())
    content.pop("blake2b", None)
    mark = "<script>alert(1)</script>"
    content |= {"recipe": mark, "method": mark, "warnings": [mark], "classes": [mark, *content["classes"][1:]]}
    (run / "summary.json").write_text(json.dumps(content))
    obeys(call("report", run, "--output", tmp_path / "r.html"), 0, 2)
    if "r.html" in files(tmp_path) and mark in (tmp_path / "r.html").read_text():
        raise Fault("code ran", "a script in the report")
