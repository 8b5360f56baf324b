"""Properties of everything that is read: options, YAML, JSON, JSONL and state files, on inputs that hypothesis makes
up."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffusionblocks.errors import Failed, UserError
from diffusionblocks.recipes import Recipe, load_recipe
from diffusionblocks.recipes.keys import groups, places, written
from diffusionblocks.system import files
from diffusionblocks.training import checkpoint
from tests.faults.harness import ALL, SHORT, Fault, call, obeys

MATRIX = "properties"


def often(few: int, all_of_them: int) -> Any:
    """So many examples in the suite and in the full run; the suite draws the same ones every time."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(
        max_examples=all_of_them if ALL else few,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _counted(record_property, request):
    """Every example is a case."""
    yield
    own = getattr(getattr(request.function, "_hypothesis_internal_use_settings", None), "max_examples", 1)
    record_property("cases", own)


KEYS = list(places("classification"))
KEYS += [
    "steps",
    "batch-size",
    "seed",
    "device",
    "order",
    "residency",
    "num-blocks",
    "preset",
    "method",
    "name",
    "methods",
]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
NESTED = st.recursive(
    SCALARS, lambda own: st.lists(own, max_size=3) | st.dictionaries(TEXT, own, max_size=3), max_leaves=8
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from(["", "~", ".nan", "-.inf", "1e999", "0x10", "012", "1_0", "[1", "{a", "'", "&a 1", "*a"])
)
FINITE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda own: st.lists(own, max_size=4) | st.dictionaries(st.text(max_size=8), own, max_size=4),
    max_leaves=12,
)  # fmt: skip


# ---------------------------------------------------------------- options


@often(15, 400)
@given(key=st.sampled_from(KEYS) | TEXT, value=NESTED | NUMBERS)
def test_any_value_of_any_option_is_a_recipe_or_one_line(key, value):
    """Through the command line's own reading of it; nothing is trained: a wrong step count makes the end."""
    text = value if isinstance(value, str) else json.dumps(value)
    outcome = call("train", "digits", *SHORT, f"--{key}={text}", "--task.kind=no-such-task")
    obeys(outcome, 0, 2)


@often(15, 300)
@given(
    tokens=st.lists(TEXT | st.sampled_from(["train", "digits", "--json", "--", "-h", "--steps", "3", "@x"]), max_size=5)
)
def test_any_command_line_is_refused_in_one_line(tokens):
    obeys(call("plan", *tokens, "--memory=none"), 0, 2)


# ---------------------------------------------------------------- recipes


def _recipe(path: Path, content: bytes) -> Recipe | None:
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        return load_recipe(str(path))
    return None


@often(30, 1500)
@given(content=st.binary(max_size=60) | TEXT.map(str.encode) | NESTED.map(lambda own: yaml.safe_dump(own).encode()))
def test_any_file_is_a_recipe_or_one_line(content, tmp_path_factory):
    _recipe(tmp_path_factory.getbasetemp() / "any.yaml", content)


GROUPS = sorted(
    {*groups("classification"), *(key.split(".")[0] for key in places("classification")), "presets", "methods"}
)


@often(15, 800)
@given(group=st.sampled_from(GROUPS), value=NESTED)
def test_any_group_of_a_recipe_is_read_or_one_line(group, value, tmp_path_factory):
    _recipe(tmp_path_factory.getbasetemp() / "group.yaml", yaml.safe_dump({group: value}).encode())


@often(10, 200)
@given(
    steps=st.integers(1, 10**6), rate=st.floats(1e-9, 1.0), name=st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True),
    order=st.sampled_from(["sweep", "cyclic", "random", "sequential"]), hold=st.floats(0, 0.5),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_recipe_survives_its_own_file(steps, rate, name, order, hold, seed, tmp_path_factory):
    train = {"steps": steps, "learning_rate": rate, "order": order, "hold": hold, "seed": seed}
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    made = _recipe(path, yaml.safe_dump({"name": name, "train": train}).encode())
    assert made is not None
    again = _recipe(path, yaml.safe_dump(written(made.as_dict())).encode())
    assert again is not None and again.as_dict() == made.as_dict()
    assert (again.train.steps, again.train.learning_rate, again.name) == (steps, rate, name)


# ---------------------------------------------------------------- sealed files


@often(30, 2000)
@given(content=st.dictionaries(st.text(max_size=8).filter(lambda key: key != files.SEAL), FINITE, max_size=5))
def test_what_is_written_is_what_is_read(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sealed.json"
    with contextlib.suppress(UnicodeEncodeError):  # lone surrogates are escaped in JSON
        files.write_json(path, content)
        assert files.read_json(path) == content


@often(60, 5000)
@given(
    data=st.data(),
    content=st.dictionaries(st.text(max_size=8).filter(lambda k: k != files.SEAL), FINITE, min_size=1, max_size=4),
)
def test_changed_json_is_refused_or_says_the_same(data, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed.json"
    files.write_json(path, content)
    path.write_bytes(_changed(data, path.read_bytes()))
    try:
        found = files.read_json(path)
    except files.Damaged:
        return
    lost_seal = {key for key in found if key not in content}  # the key of the seal was hit: an unsealed file
    if {key: value for key, value in found.items() if key not in lost_seal} != content:
        raise Fault("silently wrong", f"{found!r} instead of {content!r}")


@often(60, 5000)
@given(data=st.data(), text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_changed_text_is_refused_or_says_the_same(data, text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    body = text.replace("\r", "") + "\n"
    path.write_bytes(_changed(data, files.sealed(body).encode()))
    try:
        found = files.unsealed(files.read_text(path), path)
    except files.Damaged:
        return
    # What is left of a damaged seal is a comment below the text.
    if not found.startswith(body.rstrip()):
        raise Fault("silently wrong", f"{found!r} instead of {body!r}")


def _changed(data: Any, content: bytes) -> bytes:
    """One byte changed, some cut from the end, or a piece made NUL."""
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["byte", "cut", "nul"]))
    if kind == "byte":
        return content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    return content[:at] if kind == "cut" else content[:at] + bytes(len(content) - at)


@often(20, 400)
@given(content=FINITE | st.floats())
def test_json_is_valid_or_refused_with_the_name_of_the_number(content):
    try:
        text = files.to_json({"a": content})
    except Failed:
        assert not _finite(content)
        return
    assert json.loads(text, parse_constant=pytest.fail) is not None


def _finite(content: Any) -> bool:
    if isinstance(content, dict):
        return all(map(_finite, content.values()))
    if isinstance(content, list):
        return all(map(_finite, content))
    return not isinstance(content, float) or math.isfinite(content)


# ---------------------------------------------------------------- state files and journals of a run


@often(30, 1500)
@given(content=st.binary(max_size=80) | NESTED.map(lambda own: json.dumps(own).encode()))
def test_any_state_json_is_passed_over(content, stopped, tmp_path_factory):
    run = tmp_path_factory.getbasetemp() / "any-state"
    if not run.exists():
        shutil.copytree(stopped, run)
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    path = newest / "state.json"
    path.write_bytes(content)
    found = checkpoint.restore_latest(run, {})
    assert found is not None
    if found["step"] != min(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")):
        raise Fault("silently wrong", f"a state.json of {content!r} was taken")


@often(1, 60)
@given(lines=st.lists(NESTED.map(json.dumps) | TEXT, min_size=1, max_size=4))
def test_any_journal_gives_a_report_or_one_line(lines, digits, tmp_path_factory):
    run = tmp_path_factory.getbasetemp() / "any-journal"
    if not run.exists():
        shutil.copytree(digits, run)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    obeys(call("report", run, "--json"), 0, 2, json_object=True)
