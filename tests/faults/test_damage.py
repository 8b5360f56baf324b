"""Damaged run folders: (command x file x damage). Each is refused in one line, or passed over with the result of the
whole one."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffusionblocks.system.files import fingerprint
from diffusionblocks.training import checkpoint
from tests.faults.harness import (
    ALL,
    SHORT,
    TINY,
    Fault,
    Outcome,
    adapting,
    call,
    documented,
    few,
    files,
    fresh,
    nothing_half_written,
    nothing_lost,
    obeys,
    same,
    tally,
    timeless,
)

MATRIX = "damaged files"
SAID = re.compile(r"damaged|not valid|missing|cannot|unreadable|not a run|holds no|left out|no usable|is not|rebuilt")

# ---------------------------------------------------------------- damages


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _at(share: float, bit: int) -> Callable[[bytes], bytes]:
    return lambda content: flipped(content, min(len(content) - 1, int(share * len(content))) * 8 + bit)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _full_folder(path: Path) -> None:
    _folder(path)
    (path / "own.txt").write_text("somebody's")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


ANY: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": _bytes(lambda content: b""),
    "cut in half": _bytes(lambda content: content[: len(content) // 2]),
    "cut by 3 bytes": _bytes(lambda content: content[:-3]),
    "first half gone": _bytes(lambda content: content[len(content) // 2 :]),
    "NUL bytes": _bytes(lambda content: bytes(len(content))),
    "NUL bytes at the end": _bytes(lambda content: content + bytes(512)),
    "NUL bytes in the second half": _bytes(lambda content: content[: len(content) // 2] + bytes(len(content) // 2)),
    "random bytes": _bytes(lambda content: random.Random(1).randbytes(len(content))),
    "twice": _bytes(lambda content: content + content),
    "flipped bit, 1 %": _bytes(_at(0.01, 1)),
    "flipped bit, 30 %": _bytes(_at(0.3, 0)),
    "flipped bit, 50 %": _bytes(_at(0.5, 4)),
    "flipped bit, 70 %": _bytes(_at(0.7, 2)),
    "flipped bit, 99 %": _bytes(_at(0.99, 6)),
    "an empty folder": _folder,
    "a folder with a file": _full_folder,
    "a link to nowhere": _dangling,
    "a link to itself": _loop,
    "UTF-16": _bytes(lambda content: content.decode("latin-1").encode("utf-16")),
}


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def _more(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text() + text) and None


_TEXTS = {"null": "null", "a list": "[]", "an empty object": "{}", "a text": '"text"', "a number": "42", "NaN": "NaN"}
VALID: dict[str, Callable[[Path], None]] = {name: _text(text) for name, text in _TEXTS.items()}
VALID["a list in 5,000 lists"] = lambda path: path.write_text("[" * 5000 + "]" * 5000)
VALID["a number of 5,000 digits"] = lambda path: path.write_text("9" * 5000)
VALID["a list of numbers"] = lambda path: path.write_text("[1, 2, 3]")
VALID["an object of nulls"] = lambda path: path.write_text('{"metrics": null, "progress": null, "files": null}')

_WRONG: dict[str, Any] = {"null": None, "a text": "text", "a list": [1], "an object": {"a": {}}, "-1": -1}


def _key(dotted: str, wrong: str) -> Callable[[Path], None]:
    """One value of a JSON or YAML file becomes another (or goes); without the seal, as an older version might have
    written it."""

    def damage(path: Path) -> None:
        as_json = path.suffix == ".json"
        content = json.loads(path.read_text()) if as_json else yaml.safe_load(path.read_text())
        if isinstance(content, dict):
            content.pop("blake2b", None)
        *groups, last = dotted.split(".")
        place = content
        for group in groups:
            place = place[int(group) if isinstance(place, list) else group]
        key: Any = int(last) if isinstance(place, list) else last
        assert key in place or isinstance(place, list)
        if wrong == "missing":
            del place[key]
        else:
            place[key] = _WRONG[wrong]
        path.write_text(json.dumps(content) if as_json else yaml.safe_dump(content))

    return damage


def _keys(*names: str, wrongs: tuple[str, ...] = ("missing", "null", "a text", "a list")) -> dict[str, Any]:
    return {f"{name}: {wrong}": _key(name, wrong) for name in names for wrong in wrongs}


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Other tensors in a file that is whole; a checkpoint's state.json says that they are right."""

    def damage(path: Path) -> None:
        save_file(change(load_file(str(path))), str(path))
        state = path.with_name("state.json")
        if state.is_file():
            content = json.loads(state.read_text())
            content.pop("blake2b", None)
            content["files"][path.name] = fingerprint(path)
            state.write_text(json.dumps(content))

    return damage


OTHER_TENSORS = {
    "tensors of another shape": _tensors(
        lambda found: {name: torch.cat([t.reshape(-1)] * 2) for name, t in found.items()}
    ),
    "tensors of another type": _tensors(lambda found: {name: t.to(torch.int16) for name, t in found.items()}),
    "a tensor less": _tensors(lambda found: dict(list(found.items())[1:])),
    "a tensor more": _tensors(lambda found: {**found, "surplus": torch.zeros(2)}),
    "no tensors": _tensors(lambda found: {}),
    "NaN": _tensors(lambda found: {name: torch.full_like(t, float("nan")) for name, t in found.items()}),
}  # fmt: skip
_LINES = {
    "a line of null": "null\n",
    "a line of a list": "[1, 2]\n",
    "a line without keys": "{}\n",
    "a line with texts": '{"block_steps": "x", "loss": "y", "seconds": []}\n',
    "a line with loss null": '{"block_steps": 1, "seconds": 1, "layer_evaluations": 1, '
    '"loss": null, "learning_rate": {}}\n',
    "a line cut": '{"block_steps": 3, "seco',
    "a line with NaN": '{"block_steps": 1, "seconds": 1, "layer_evaluations": 1, '
    '"loss": {"0": NaN}, "learning_rate": {"0": 1}}\n',
}
LINES = {name: _more(text) for name, text in _LINES.items()}

# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """What is run on a damaged folder, and what of its result must be as with the whole one."""

    base: str  # the fixture whose folder is damaged
    arguments: Callable[[Path, Path], list[object]]  # (run folder, folder for outputs)
    result: Callable[[Path, Path, Outcome], Any]
    trains: bool = False


def _tensors_in(folder: Path) -> dict[str, Any]:
    """Every tensor of every file below a folder; safetensors writes what else it holds in any order."""
    paths = folder.rglob("*.safetensors") if folder.is_dir() else [folder]
    return {
        f"{path.name}:{name}": tensor.tolist()
        for path in sorted(paths)
        for name, tensor in load_file(str(path)).items()
    }


def _weights(folder: Path, out: Path, outcome: Outcome) -> Any:
    return {**_tensors_in(folder / "model"), "metrics": outcome.json()["metrics"]}


def _page(folder: Path, out: Path, outcome: Outcome) -> Any:
    text = (out / "report.html").read_text().replace(str(folder), "RUN").replace(folder.name, "RUN")
    return re.sub(r"\b(p|m|image)[0-9a-f]{10}\b|<dc:date>.*?</dc:date>", "", text)  # ids that matplotlib draws


COMMANDS = {
    "train": Command(
        "digits",
        lambda run, out: ["train", "digits", *SHORT, "--output-dir", run, "--json"],
        lambda run, out, done: done.json()["metrics"],
    ),
    "resume": Command(
        "stopped", lambda run, out: ["train", "digits", *SHORT, "--output-dir", run, "--json"], _weights, trains=True
    ),
    "evaluate": Command(
        "digits", lambda run, out: ["evaluate", run, "--json"], lambda run, out, done: done.json()["metrics"]
    ),
    "sample": Command(
        "digits", lambda run, out: ["sample", run, "--num", 4, "--json"], lambda run, out, done: done.json()
    ),
    "report": Command("digits", lambda run, out: ["report", run, "--output", out / "report.html", "--json"], _page),
    "export": Command(
        "digits",
        lambda run, out: ["export", run, "--block", 1, "--output", out / "block.safetensors", "--json"],
        lambda run, out, done: _tensors_in(out / "block.safetensors"),
    ),
    "start": Command(
        "digits",
        lambda run, out: ["train", "digits", *SHORT, "--model.start", run, "--output-dir", out / "new", "--json"],
        lambda run, out, done: _tensors_in(out / "new" / "model"),
    ),
    "report of an adapted model": Command(
        "adapted", lambda run, out: ["report", run, "--output", out / "report.html", "--json"], _page
    ),
    "export of an adapted model": Command(
        "adapted",
        lambda run, out: ["export", run, "--output", out / "network", "--json"],
        lambda run, out, done: _tensors_in(out / "network"),
    ),
    "train of an adapted model": Command(
        "unmeasured",
        lambda run, out: [*adapting(), "--output-dir", run, "--json"],
        lambda run, out, done: [timeless(done.json()["metrics"]), json.loads((run / "samples.json").read_text())],
        trains=True,
    ),
    "report of a comparison": Command(
        "compared", lambda run, out: ["report", run, "--output", out / "report.html", "--json"], _page
    ),
    "compare": Command(
        "compared",
        lambda run, out: [
            "compare", "digits", *TINY, "--steps=4", "--methods=shallow", "--output-dir", run, "--json",
        ],
        lambda run, out, done: timeless(done.json()["results"][0]["metrics"]),
        trains=True,
    ),
}  # fmt: skip
READERS = ("evaluate", "sample", "report", "export")
NEWEST = "checkpoints/NEWEST"
SUMMARY_KEYS = (
    *(
        "metrics",
        "metrics.accuracy",
        "metrics.accuracy.value",
        "recipe",
        "seed",
        "num_blocks",
        "classes",
        "peak_memory",
    ),
    *("peak_memory.total", "layers", "layer_evaluations", "versions", "samples_seen", "method"),
)
CONFIG_KEYS = (
    "data",
    "model.num_hidden_layers",
    "train.steps",
    "task",
    "methods",
    "blocks.num_blocks",
    "train",
    "name",
)
STATE_KEYS = ("step", "steps", "steps.block-00", "progress", "progress.visits", "progress.block_steps", "files")

# (files, damages, commands)
TABLE: tuple[tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]], ...] = (
    (("config.yaml",), {**ANY, **VALID, **_keys(*CONFIG_KEYS)}, ("train", "resume", *READERS)),
    (("summary.json",), {**ANY, **VALID}, ("train", *READERS)),
    (("summary.json",), _keys(*SUMMARY_KEYS), ("report", "evaluate")),
    (("metrics.jsonl",), {**ANY, **LINES}, ("resume", "report")),
    ((f"{NEWEST}/state.json",), {**ANY, **VALID, **_keys(*STATE_KEYS)}, ("resume", "evaluate")),
    ((f"{NEWEST}/state.json",), {**ANY}, ("sample", "report", "export")),
    ((f"{NEWEST}/block-01.safetensors",), {**ANY, **OTHER_TENSORS}, ("resume", "evaluate", "export")),
    ((f"{NEWEST}/optimizer-block-01.safetensors",), {**ANY, **OTHER_TENSORS}, ("resume",)),
    ((f"{NEWEST}/shared.safetensors",), {**OTHER_TENSORS}, ("resume",)),
    (("model/diffusionblocks.json",), {**ANY, **VALID}, ("start",)),
    (("model/model.safetensors",), {**ANY, **OTHER_TENSORS}, ("start",)),
    (("samples.json",), {**ANY, **VALID}, ("report of an adapted model",)),
    (("before.json",), {**ANY, **VALID, **_keys("metrics", "written")}, ("train of an adapted model",)),
    (("compare.json",), {**ANY, **VALID}, ("report of a comparison",)),
    (("compare.json",), _keys("results.0.metrics", "results.0.seeds", "results.0.method"), ("report of a comparison",)),
    (("shallow/seed-0/summary.json", "compare.json"), {name: ANY[name] for name in list(ANY)[1:5]}, ("compare",)),
    (("shallow/seed-0/config.yaml", "shallow/seed-0.yaml"), {name: ANY[name] for name in list(ANY)[1:5]}, ("compare",)),
    (("report.html", "shallow/seed-0.log"), {name: ANY[name] for name in list(ANY)[1:3]}, ("compare",)),
)


@dataclass(frozen=True)
class Case:
    """One damaged file under one command."""

    command: str
    file: str
    damage: str
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.command}-{self.file}-{self.damage}"

    @property
    def by_hand(self) -> bool:
        """Whether the file is one that somebody could have written: then its content counts."""
        own = re.match(r"[\w.-]+: ", self.damage)
        return bool(own) or self.damage in (*OTHER_TENSORS, *VALID, *LINES, "missing")


def _damaged() -> list[Case]:
    found = []
    for names, damages, commands in TABLE:
        for name in names:
            for damage, apply in damages.items():
                found += [Case(command, name, damage, apply) for command in commands]
    return found


_REFERENCE: dict[str, Any] = {}


def _reference(name: str, request: Any, tmp_path: Path) -> Any:
    """The result of a command on a whole folder."""
    if name not in _REFERENCE:
        command = COMMANDS[name]
        run, out = fresh(request.getfixturevalue(command.base), tmp_path / "whole-run"), tmp_path / "whole-out"
        out.mkdir()
        done = obeys(call(*command.arguments(run, out)), 0, json_object=True)
        _REFERENCE[name] = command.result(run, out, done)
    return _REFERENCE[name]


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))


def _whole(path: Path) -> bool:
    return checkpoint.damage(path) is None


def _attack(case: Case, request: Any, tmp_path: Path) -> Outcome:
    """Damages a copy, runs the command and applies every law."""
    command = COMMANDS[case.command]
    expected = _reference(case.command, request, tmp_path)
    run, out = fresh(request.getfixturevalue(command.base), tmp_path / "damaged"), tmp_path / "out"
    out.mkdir()
    name = case.file.replace("NEWEST", _newest(run).name) if "NEWEST" in case.file else case.file
    case.apply(run / name)
    before = files(run)
    stray = {str(path) for path in run.rglob("*partial*")}
    outcome = obeys(call(*command.arguments(run, out)), 0, 1, 2, json_object=True)
    if not stray:
        nothing_half_written(tmp_path)
    if outcome.code == 0:
        try:
            found = command.result(run, out, outcome)
        except (LookupError, TypeError, AttributeError, OSError) as error:  # not even the shape of a result
            raise Fault("silently wrong", f"{type(error).__name__}: {error}") from None
        if not (found == expected or case.by_hand or (SAID.search(outcome.err) and not command.trains)):
            same(found, expected, f"{case.command} with {case.file}: {case.damage}")
        if case.by_hand and "NaN" in case.damage and "nan" in str(found).lower():
            raise Fault("silently wrong", f"NaN in the result of {case.command}")
    # What trains writes checkpoints and lets old ones go; the damaged file may be mended.
    may = ("checkpoints/", "metrics.jsonl")
    if outcome.code == 0:
        may += ("model/", "report.html", "compare.json", "shallow/")
    may += ("shallow/seed-0.log", "shallow/seed-0.yaml", "shallow/seed-0/checkpoints", "shallow/seed-0/metrics.jsonl")
    nothing_lost(before, run, (case.file, name, *(may if command.trains else ())))
    if command.trains and (run / "checkpoints").exists() and not any(map(_whole, (run / "checkpoints").glob("step-*"))):
        raise Fault("lost", "no whole checkpoint is left")
    return outcome


@pytest.mark.parametrize("case", few(_damaged(), 12), ids=str)
def test_a_damaged_file_is_refused_or_passed_over(case, request, tmp_path, record_property):
    outcome = _attack(case, request, tmp_path)
    if outcome.code and case.damage in ("cut in half", "a link to nowhere", "an empty folder"):
        what = f"{case.command} where {case.file.replace('NEWEST', 'step-N')} is {case.damage}"
        documented(record_property, "Damaged run folders", what, outcome, run=tmp_path / "damaged")


# ---------------------------------------------------------------- strays


def _copied_step(name: str) -> Callable[[Path], None]:
    return lambda run: shutil.copytree(_newest(run), run / "checkpoints" / name) and None


def _made(name: str, text: str | None = None) -> Callable[[Path], None]:
    """A stray folder, or file with some text."""

    def make(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).mkdir() if text is None else (run / name).write_text(text)

    return make


def _replaced(name: str, text: str = "a file") -> Callable[[Path], None]:
    """A file in the place of a folder."""

    def make(run: Path) -> None:
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).write_text(text)

    return make


def _fifo(run: Path) -> None:
    os.mkfifo(run / "checkpoints" / "step-70")


def _locks(run: Path) -> None:
    """Whatever the lock of a run is: with nonsense in it, and nobody holding it."""
    found = [path for path in run.rglob("*") if path.is_file() and "lock" in path.name.replace("block", "")]
    for path in found or [run / ".lock"]:
        path.write_bytes(b"\0\xff nonsense {")


STRAYS = {
    "checkpoints/step-30.bak": _copied_step("step-30.bak"),
    "checkpoints/step-30 copy": _copied_step("step-30 copy"),
    "checkpoints/step-": _copied_step("step-"),
    "checkpoints/step--5": _copied_step("step--5"),
    "checkpoints/step-1e3": _copied_step("step-1e3"),
    "checkpoints/step-٣٣ (Arabic digits)": _copied_step("step-٣٣"),
    "checkpoints/step-²": _copied_step("step-²"),
    "checkpoints/step-99 (a copy)": _copied_step("step-99"),
    "checkpoints/step-99 (empty)": _made("checkpoints/step-99"),
    "checkpoints/step-99 (state.json {})": _made("checkpoints/step-99/state.json", "{}"),
    "checkpoints/step-99 (no files)": _made("checkpoints/step-99/state.json", '{"files": {}, "step": 99}'),
    "checkpoints/step-50 (a file)": _made("checkpoints/step-50", "text"),
    "checkpoints/step-70 (a FIFO)": _fifo,
    "checkpoints/.partial-19": _made("checkpoints/.partial-19/block-00.safetensors", "half"),
    "checkpoints/.partial-18 (a file)": _made("checkpoints/.partial-18", "half"),
    "checkpoints/notes.txt": _made("checkpoints/notes.txt", "mine"),
    "checkpoints (a file)": _replaced("checkpoints"),
    "model (a file)": _replaced("model"),
    "huggingface (a file)": _replaced("huggingface"),
    "residency (a file)": _replaced("residency"),
    "residency (old files)": _made("residency/block-00.safetensors", "old"),
    "config.yaml.partial (a folder)": _made("config.yaml.partial"),
    "summary.json.partial (a folder)": _made("summary.json.partial"),
    "summary.json.partial": _made("summary.json.partial", "{"),
    "model.partial": _made("model.partial/model.safetensors", "half"),
    "report.html (a folder)": _made("report.html"),
    "previous (a file)": _made("previous", "mine"),
    "previous (a folder)": _made("previous/mine.txt", "mine"),
    "a lock with nonsense": _locks,
}
STRAY_CASES = [
    Case(command, "", name, apply)
    for name, apply in STRAYS.items()
    for command in ("train", "resume", "evaluate", "report", "export")
]


@pytest.mark.parametrize("case", few(STRAY_CASES, 3), ids=str)
def test_what_does_not_belong_in_a_run_folder_changes_nothing(case, request, tmp_path):
    case = replace(case, file="checkpoints/step-N") if "checkpoints/" in case.damage else case
    command = COMMANDS[case.command]
    expected = _reference(case.command, request, tmp_path)
    run, out = fresh(request.getfixturevalue(command.base), tmp_path / "damaged"), tmp_path / "out"
    out.mkdir()
    case.apply(run)
    before = files(run)
    outcome = obeys(call(*command.arguments(run, out)), 0, 1, 2, json_object=True)
    if outcome.code == 0 and "step-99" not in case.damage:
        same(command.result(run, out, outcome), expected, str(case))
    ours = ("checkpoints/", "metrics.jsonl", "model", "residency", "config.yaml.p", "summary.json.p")
    kept = {name: content for name, content in before.items() if "notes" in name or not name.startswith(ours)}
    nothing_lost(kept, run)


# ---------------------------------------------------------------- single bits of state.json


def test_every_flipped_bit_of_state_json_is_seen_or_harmless(stopped, tmp_path, record_property):
    run = fresh(stopped, tmp_path / "run")
    newest = _newest(run)
    path, log = newest / "state.json", logging.getLogger("diffusionblocks")
    whole, original = checkpoint.restore_latest(run, {}), path.read_bytes()
    path.write_bytes(b"{")
    log.setLevel(logging.CRITICAL)
    earlier = checkpoint.restore_latest(run, {})
    assert whole and earlier and whole != earlier
    bits = few(range(8 * len(original)), 250) if not ALL else range(8 * len(original))
    if ALL:
        assert len(bits) >= 10_000
    with tally(record_property, len(bits)) as faults:
        for bit in bits:
            path.write_bytes(flipped(original, bit))
            name = f"bit {bit % 8} of byte {bit // 8}"
            try:
                reason, found = checkpoint.damage(newest), checkpoint.restore_latest(run, {})
            except Exception as error:
                faults.setdefault("traceback", []).append(f"{name}: {type(error).__name__}")
                continue
            if found not in (whole, earlier) or (reason is None and found != whole):
                faults.setdefault("silently wrong", []).append(name)
    log.setLevel(logging.INFO)
