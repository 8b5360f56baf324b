"""Run folders to attack, made once per process, and the record of every case in the full run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import KINDS, PLACES, RECORDS, SHORT, TINY, Fault, Processes, adapting, call, fresh
from tests.language_models import make_pretrained, write_texts


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Writes one line per case: matrix, name, kind of fault, message, and its row of docs/errors.md."""
    outcome = yield
    report = outcome.get_result()
    matrix = getattr(item.module, "MATRIX", None)
    if not RECORDS or matrix is None or (call.when != "call" and report.passed):
        return
    own = dict(report.user_properties)
    line = {"matrix": matrix, "case": item.nodeid, "cases": own.get("cases", 1), "row": own.get("row")}
    error = call.excinfo.value if call.excinfo else None
    line |= {"skipped": str(error) if report.skipped else None, "faults": own.get("faults", {})}
    if report.failed and not line["faults"]:
        line["faults"] = {error.kind if isinstance(error, Fault) and error.kind in KINDS else "broken test": 1}
    text = str(error)
    line |= {
        "message": (text if len(text) < 900 else f"{text[:150]} … {text[-700:]}") if report.failed else None,
        "seconds": round(report.duration, 2),
    }
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with (Path(RECORDS) / f"{worker}-{os.getpid()}.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Commands without --output-dir write below the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A finished run of a classifier."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert call("train", "digits", *SHORT, "--output-dir", folder).code == 0
    return folder


@pytest.fixture(scope="session")
def stopped(digits, tmp_path_factory):
    """The same run as a kill left it: two checkpoints, no model, no summary."""
    folder = fresh(digits, tmp_path_factory.mktemp("runs") / "stopped")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    shutil.rmtree(newest)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A pretrained language model and texts to adapt it to."""
    folder = tmp_path_factory.mktemp("pretrained")
    make_pretrained(folder / "network", layers=2)
    write_texts(folder / "texts", count=10)
    PLACES["pretrained"] = folder
    return folder


@pytest.fixture(scope="session")
def adapted(pretrained, tmp_path_factory):
    """A finished run that adapted a language model: it has before.json, samples.json and a model for transformers."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    done = call(*adapting(), "--output-dir", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def unmeasured(adapted, tmp_path_factory):
    """The same run as a kill left it before it was measured."""
    folder = fresh(adapted, tmp_path_factory.mktemp("runs") / "unmeasured")
    (folder / "summary.json").unlink()
    (folder / "samples.json").unlink()
    return folder


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison of one method."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    done = call("compare", "digits", *TINY, "--steps=4", "--methods=shallow", "--output-dir", folder)
    assert done.code == 0, done.err
    return folder
