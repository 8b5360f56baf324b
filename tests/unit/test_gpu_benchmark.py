"""benchmarks/gpu.py: a dry run writes every row that a card would, and the table judges figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_large  # noqa: E402
import gpu_results  # noqa: E402
import gpu_speed  # noqa: E402

RATIOS = ("of_plain", "of_end_to_end", "compiled_over_eager", "host_over_device")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What `gpu.py all --dry-run` printed and wrote, by part."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "all", "--dry-run", "--output-dir", str(folder)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout, {path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in folder.iterdir()}


def test_every_part_writes_its_rows(dry):
    printed, found = dry
    assert found.keys() == gpu.PARTS.keys()
    for part, content in found.items():
        assert content["finished"] and content["dry_run"] and not content["errors"], part
        assert content["rows"], part
        assert content["environment"]["versions"]["torch"]
        assert gpu_results.KEYS.keys() >= content.keys() | {key for row in content["rows"] for key in row}, part
    assert "not installed: " in printed
    assert "none of these figures means anything" in printed


def test_speed_compares_every_row_with_its_rivals(dry):
    rows = {row["row"]: row for row in dry[1]["speed"]["rows"]}
    wanted = [row for row in gpu_speed.speed_rows(gpu_speed.Sizes()) if row.name in rows or not row.needs]
    assert list(rows) == [row.name for row in wanted]
    for row in wanted:
        measured = rows[row.name]
        assert {key for key in RATIOS if key in measured} == row.against.keys()
        for value in (measured["per_second"], *(measured[ratio]["value"] for ratio in row.against)):
            assert math.isfinite(value) and value > 0
    assert all(name in rows or "dit" in name for name, _, _ in gpu_results.AT_LEAST)
    assert any("host_over_device" in row for row in rows.values())


def test_other_parts_measure(dry):
    large, suite = dry[1]["large"]["rows"], dry[1]["tests"]
    assert [row["row"].split(",")[0] for row in large] == ["full", "full", "exact", "exact"]
    assert all(row["planned"] > 0 and row["tokens_per_second"] > 0 for row in large)
    assert suite["passed"] > 0
    assert suite["failed"] == suite["not_reached"] == 0
    assert abs(dry[1]["memory"]["rows"][0]["error"]) < 0.01
    assert [row["exit"] for row in dry[1]["card"]["rows"]] == [0, 0]


def test_all_parts_take_8_minutes_at_most():
    assert sorted(name for stage in gpu.STAGES for name in stage) == sorted(gpu.PARTS)
    assert sum(max(gpu.PARTS[name].limit for name in stage) for stage in gpu.STAGES) <= 480
    assert all(part.expected < part.limit for part in gpu.PARTS.values())
    assert all(len(stage) == 1 for stage in gpu.STAGES if {"speed", "large"} & {*stage})  # timed: alone
    assert 28 <= sum(1 for _ in gpu.memory_rows(dry_run=False)) <= 45


def test_a_part_is_stopped_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "tests", gpu.Part(gpu.tests, 1, 1))
    assert gpu.run_stage(["tests"], tmp_path, dry_run=True) == {"tests": None}


def test_what_a_part_started_stops_with_it():
    starts_another = "import subprocess; subprocess.Popen(['sleep', '100']); print('started', flush=True)"
    command = [sys.executable, "-c", f"{starts_another}; import time; time.sleep(100)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"started\n"
    gpu.stop(process)
    assert process.stdout.read() == b""  # comes once nobody holds the pipe any more


def test_rows_of_the_same_machine_are_kept(tmp_path):
    first = gpu_results.Results(tmp_path, "speed", dry_run=True)
    first.add({"row": "a", "per_second": 1.0})
    first.fail("b", "an error")
    again = gpu_results.Results(tmp_path, "speed", dry_run=True)
    assert again.has("a") and not again.has("b")
    assert not again.content["errors"]
    content = json.loads(first.path.read_text())
    content["environment"]["device"] = "another card"
    first.path.write_text(json.dumps(content))
    assert not gpu_results.Results(tmp_path, "speed", dry_run=True).has("a")


def test_a_batch_too_large_is_a_result(tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_large, "rounds", too_large)
    results = gpu_results.Results(tmp_path, "large", dry_run=True)
    gpu_large.measure(results, gpu_large.DRY, "full", {"a": (1, 16), "b": (2, 16)})
    assert [(row["row"], row["fits"]) for row in results.rows] == [("a", False), ("b", False)]
    assert not results.content["errors"]


def test_the_table_judges(tmp_path):
    def write(part, rows, **more):
        (tmp_path / f"gpu-{part}.json").write_text(json.dumps({"rows": rows, "finished": True, **more}))

    def verdicts():
        return {claim: verdict for claim, _, verdict in gpu_results.must_hold(tmp_path)}

    assert {*verdicts().values()} == {"not measured"}
    name = "llama large vocabulary: features"
    row = {"row": name, "of_end_to_end": {"value": 0.8}, "reserved_over_allocated": 1.05}
    write("speed", [row, {"row": "exact, host", "host_over_device": {"value": 1.2}, "reserved_over_allocated": 1.2}])
    write("memory", [{"row": "a", "error": -0.2}, {"row": "b", "error": 0.05}])
    write("tests", [], passed=3, failed=0, skipped=1, not_reached=0)
    write("card", [{"exit": 1, "expected_exit": 1}, {"exit": 0, "expected_exit": 0}])
    found = verdicts()
    assert found[f"{name}: of end to end >= 0.75"] == "holds"
    assert found["exact, host: host over device <= 1.15"] == "falls short"
    assert found["speed: reserved over allocated <= 1.1, worst row"] == "falls short"
    assert found["memory: plan error <= 0.1, worst row"] == "falls short"
    assert found["large: plan error <= 0.1, worst row"] == "not measured"
    assert found["the suite passes"] == found["a network that fails end to end trains by blocks"] == "holds"
    write("tests", [], passed=3, failed=0, skipped=1, not_reached=2)
    assert verdicts()["the suite passes"] == "not measured"
