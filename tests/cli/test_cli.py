"""The command line as a stranger uses it: results, exit codes, one clear line for every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusionblocks.cli import main
from diffusionblocks.methods import METHODS
from diffusionblocks.methods.budget import steps_for_budget
from diffusionblocks.recipes import built_in, load_recipe
from diffusionblocks.recipes.keys import places, today
from diffusionblocks.tasks import TASKS
from diffusionblocks.training import checkpoint
from tests.conftest import make_vit
from tests.language_models import make_pretrained

SMALL = [
    "--model.hidden-size", "16", "--model.num-hidden-layers", "6", "--model.num-attention-heads", "2",
    "--model.intermediate-size", "32", "--steps", "6", "--batch-size", "16", "--train.checkpoint-every", "6",
]  # fmt: skip
SUMMARY_KEYS = {
    "method", "recipe", "seed", "num_blocks", "metrics", "layer_evaluations", "samples_seen", "wall_seconds",
    "peak_memory", "versions", "git_commit", "warnings",
}  # fmt: skip


FROM_SCRATCH = [name for name, method in METHODS.items() if not method.adapts]
OF_TEXT = ("diffusionblocks-information", "diffusionblocks-features")
COMPARED = [name for name in FROM_SCRATCH if name not in ("exact", *OF_TEXT)]


def run(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that an unusable command prints."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    lines = [line for line in err.strip().splitlines() if line.startswith("dblocks: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert main(["train", "digits", *SMALL, "--output-dir", str(folder), "--json"]) == 0
    return folder


@pytest.fixture
def images(tmp_path):
    """Three classes of bright squares, PNG and JPEG, grey and colour, of several sizes."""
    root = tmp_path / "shapes"
    generator = np.random.default_rng(0)
    for label, name in enumerate(("left", "middle", "right")):
        (root / name).mkdir(parents=True)
        for index in range(20):
            size = 12 + index % 5
            array = generator.integers(0, 60, (size, size, 3), dtype=np.uint8)
            array[:, label * size // 3 : (label + 1) * size // 3] += 180
            image = Image.fromarray(array)
            if index % 2:
                image.convert("L").save(root / name / f"{index}.png")
            else:
                image.save(root / name / f"{index}.jpg")
    return root


def test_recipes_lists_one_line_each(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert (
        {line.split()[0] for line in out.splitlines()} == set(built_in()) >= {"digits", "mnist", "cifar100", "images"}
    )


@pytest.mark.parametrize("name", sorted(built_in()))
@pytest.mark.parametrize("preset", ["", "paper"])
def test_every_recipe_loads_and_survives_yaml(name, preset, tmp_path):
    recipe = load_recipe(name, [("preset", preset)] if preset else [])
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict()))
    assert load_recipe(str(path)).as_dict() == recipe.as_dict()
    recipe.train.check()
    recipe.blocks.check(recipe.task.target)
    if recipe.model.pretrained:  # which may not be here: another of the same depth
        recipe.model.pretrained = str(tmp_path / "net")
        make_pretrained(tmp_path / "net", layers=30)
    known = {name for name in FROM_SCRATCH if recipe.task.splits or METHODS[name].loops}
    for method in known - set(() if recipe.task.kind == "causal-lm" else OF_TEXT):
        for budget in ("layer-evaluations", "samples"):
            assert steps_for_budget(recipe, method, budget) >= 1


def test_train_writes_the_run_folder_and_one_json_object(trained, capsys):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model"}
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert set(summary["metrics"]) == {"accuracy", "validation_loss"}
    peak = summary["peak_memory"]
    assert peak["total"] == sum(peak[part] for part in ("parameters", "gradients", "optimizer", "activations"))
    code, out, _ = run(capsys, "train", "digits", *SMALL, "--output-dir", trained, "--json")
    assert code == 0
    assert {**json.loads(out), "blake2b": summary["blake2b"]} == summary  # already finished: not trained again


def test_evaluate_finds_the_same_metrics_again(trained, capsys):
    code, out, _ = run(capsys, "evaluate", trained, "--json")
    assert code == 0
    summary = json.loads((trained / "summary.json").read_text())
    found = json.loads(out)["metrics"]
    assert {name: pytest.approx(metric) for name, metric in summary["metrics"].items()} == found


def test_sample_gives_predictions_and_the_chain_of_blocks(trained, capsys, tmp_path):
    code, out, _ = run(capsys, "sample", trained, "--num", 5, "--json", "--output", tmp_path / "p.json")
    assert code == 0
    rows = json.loads(out)["predictions"]
    assert json.loads((tmp_path / "p.json").read_text())["predictions"] == rows
    assert len(rows) == 5
    assert [step["block"] for step in rows[0]["chain"]] == [0, 1, 2]
    assert 0 < rows[0]["probability"] <= 1


def test_report_is_one_page_that_needs_no_network(trained, capsys, tmp_path):
    page = tmp_path / "report.html"
    assert run(capsys, "report", trained, "--output", page)[0] == 0
    text = page.read_text()
    assert text.count("<svg") >= 4
    assert not any(mark in text for mark in ('src="http', 'href="http', "<script", "@import", "url(http"))


def test_compare_prints_every_method_with_equal_layer_evaluations(capsys, tmp_path):
    arguments = (
        "compare",
        "digits",
        *SMALL,
        "--methods",
        ",".join(COMPARED),
        "--jobs",
        2,
        "--preset",
        "demo",
        "--output-dir",
        tmp_path,
    )
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    results = json.loads(out)["results"]
    assert [result["method"] for result in results] == COMPARED
    assert len({result["layer_evaluations"] for result in results}) == 1
    totals = {result["method"]: result["peak_memory"]["total"] for result in results}
    assert totals["shallow"] < totals["end-to-end"]
    assert totals["checkpointing"] < totals["end-to-end"]
    assert (tmp_path / "report.html").is_file()
    code, out, _ = run(capsys, *arguments)  # finished runs are reused; the table names all
    assert code == 0
    assert all(method in out for method in COMPARED)


def test_equal_samples_budget_and_pairs_of_the_same_seed(capsys, tmp_path):
    methods = "end-to-end,diffusionblocks-paper"
    arguments = (
        "compare", "digits", *SMALL, "--methods", methods, "--budget", "samples", "--output-dir", tmp_path, "--jobs", 2,
        "--seeds", 2,
    )  # fmt: skip
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert len({result["samples_seen"] for result in found["results"]}) == 1
    whole, blocks = (
        [json.loads((tmp_path / method / f"seed-{seed}" / "summary.json").read_text())["metrics"]["accuracy"]["value"]
         for seed in (0, 1)]
        for method in methods.split(",")
    )  # fmt: skip
    (pair,) = found["pairs"]
    assert (pair["method"], pair["against"]) == ("diffusionblocks-paper", "end-to-end")
    first, second = (b - w for b, w in zip(blocks, whole, strict=True))
    assert pair["each"] == [first, second]
    assert pair["value"] == pytest.approx((first + second) / 2)
    assert pair["stderr"] == pytest.approx(abs(first - second) / 2)
    _, out, _ = run(capsys, *arguments)
    line = "diffusionblocks-paper minus end-to-end, pairs of the same seed: accuracy"
    assert line in out
    assert line in (tmp_path / "report.html").read_text()


def test_a_pretrained_network_trains_and_another_family_is_refused(capsys, tmp_path):
    make_vit(num_labels=7).save_pretrained(tmp_path / "vit")
    arguments = [*SMALL, "--model.pretrained", tmp_path / "vit", "--blocks.context", "features"]
    code, out, err = run(capsys, "train", "digits", *arguments, "--output-dir", tmp_path / "r", "--json")
    assert code == 0, err
    assert json.loads(out)["layers"] == [[0, 1], [2, 3], [4, 5]]
    assert (
        steps_for_budget(
            load_recipe("digits", [("model.pretrained", str(tmp_path / "vit"))]), "shallow", "layer-evaluations"
        )
        == 4500
    )
    (tmp_path / "bert").mkdir()
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    line = fails(capsys, "train", "digits", "--model.pretrained", tmp_path / "bert", "--output-dir", tmp_path / "s")
    assert "supported: ViTForImageClassification" in line


def test_an_image_folder_trains(images, capsys, tmp_path):
    small = [*SMALL, "--model.patch-size", "4", "--data.image-size", "8", "--num-blocks", "2"]
    code, out, _ = run(
        capsys, "train", "images", *small, "--data.path", images, "--output-dir", tmp_path / "r", "--json"
    )
    assert code == 0
    assert json.loads(out)["num_blocks"] == 2


def test_a_parquet_dataset_trains(images, capsys, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"img": [], "fine_label": []}
    for label, name in enumerate(("left", "middle", "right")):
        for path in sorted((images / name).glob("*.png")):
            rows["img"].append(str(path))
            rows["fine_label"].append(label)
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    table.to_parquet(str(tmp_path / "hub" / "test-00000-of-00001.parquet"))
    arguments = [*SMALL, "--data.path", tmp_path / "hub", "--data.image-size", "8", "--data.augment", "[flip]"]
    arguments += ["--train.num-workers", "0", "--data.validation-share", "0.2", "--num-blocks", "3"]
    code, out, err = run(capsys, "train", "cifar100", *arguments, "--output-dir", tmp_path / "r", "--json")
    assert code == 0, err
    assert json.loads(out)["samples_seen"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digist"], "did you mean 'digits'"),
        (["tarin", "digits"], "did you mean 'train'"),
        (["train", "digits", "--train.step", "5"], "did you mean 'train.steps'"),
        (["train", "digits", "--blocs.num_blocks", "5"], "did you mean"),
        (["train", "digits", "--steps", "many"], "steps"),
        (["train", "digits", "--steps", "0"], "at least 1"),
        (["train", "digits", "--num-blocks", "5"], "1, 2, 3, 4, 6, 12"),
        (["train", "digits", "--num-blocks", "24"], "1, 2, 3, 4, 6, 12"),
        (["train", "digits", "--order", "zigzag"], "random, sweep, cyclic, sequential"),
        (["train", "digits", "--preset", "papr"], "did you mean 'paper'"),
        (["train", "digits", "--method", "shalow"], "did you mean 'shallow'"),
        (["train", "digits", "--device", "cuda"], "no CUDA device"),
        (["train", "digits", "--batch-size", "100000"], "exceeds"),
        (["train", "digits", "--model.patch-size", "3"], "not divisible"),
        (["train", "digits", "--model.pretrained", "/nowhere"], "cannot load"),
        (
            ["train", "digits", "--model.model-class", "BertForSequenceClassification"],
            "supported: ViTForImageClassification",
        ),
        (["train", "digits", "--data.source", "digit"], "did you mean 'digits'"),
        (["train", "nothing.yaml"], "does not exist"),
        (["compare", "digits", "--methods", "end-to-end,deep"], "unknown method 'deep'"),
        (["compare", "digits", "--budget", "time"], "layer-evaluations, samples"),
        (["evaluate", "/nowhere"], "not a run folder"),
        (["report", "/nowhere"], "no finished run"),
        (["train", "images", "--data.path", "/nowhere"], "not a folder"),
        (["train", "digits", "--steps", "012"], "012 begins with a zero: write 12"),
        (["train", "digits", "--steps", "null"], "train.steps must be a whole number"),
        (["train", "digits", "--train.betas", "0.9"], "train.betas must have 2 elements"),
        (["train", "digits", "--train.warmup", "nan"], "train.warmup must be a number"),
        (["train", "digits", "--train.warmup", ".nan"], "train.warmup must be a finite number"),
        (["train", "digits", "--train.compile", "yes"], "must be true or false, got 'yes'"),
        (["train", "digits", "--name", "../elsewhere"], "name must be a plain file name"),
        (["train", "digits", "--steps.x", "5"], "steps is a value, not a group of keys"),
        (["train", "."], "is no file: a recipe is a YAML file"),
        (["train", "/dev/null"], "is no file"),
        (["train", "a" * 5000], "unknown recipe"),
        (["train", "a\0b"], "unknown recipe"),
        (["compare", "digits", "--methods", "shallow,shallow"], "names 'shallow' twice"),
        (["compare", "digits", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "digits", "--seeds", "012"], "--seeds: it must be a whole number, got '012'"),
        (["compare", "digits", "--jobs", "-1"], "--jobs must be at least 1"),
        (["plan", "digits", "--num-blocks", "0"], "--num-blocks must be at least 1, got 0"),
        (["plan", "digits", "--num-blocks", "²"], "numbers separated by commas"),
        (["evaluate", "/nowhere", "--harness", "x", "--harness-limit", "-1"], "--harness-limit must be at least 1"),
        (["evaluate", "/nowhere", "--harness-limit", "5"], "name them with --harness"),
        (["export", "/nowhere", "--block", "-1"], "--block must be at least 0"),
        *(
            (["sample", "/nowhere", f"--{name}", value], f"--{name} must be at least")
            for name, value in (
                *(("num", "0"), ("num", "-1"), ("length", "-1"), ("length", "0"), ("top-k", "-1"), ("guidance", "-1")),
                *(("steps", "0"), ("iterations", "0"), ("early-exit", "-1"), ("temperature", "-0.1")),
            )
        ),
        (["sample", "/nowhere", "--guidance", "nan"], "--guidance: it must be a finite number, got 'nan'"),
        (["sample", "/nowhere", "--temperature", "inf"], "must be a finite number"),
        (["sample", "/nowhere", "--top-p", "0"], "--top-p must be above 0"),
        (["sample", "/nowhere", "--num", "²"], "must be a whole number"),
        (["sample", "/nowhere", "--stop", "\\"], r"write \\ for a backslash"),
        (["sample", "/nowhere", "--stop", ""], "--stop is empty"),
    ],
)
def test_mistakes_get_one_clear_line(capsys, tmp_path, arguments, words):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("this machine has the device")
    if arguments[0] in ("train", "compare"):
        arguments = [*arguments, "--output-dir", str(tmp_path / "run")]
    assert words in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "is not valid UTF-8 at byte 0: save it as UTF-8"),
        (b"methods: null", "methods must be a group of keys, got null"),
        (b"preset: 5", "preset must be text, got 5"),
        (b"name: ../../elsewhere", "name must be a plain file name"),
        (b"train: {steps: 1}\ntrain: {seed: 1}", "line 2: the key 'train' stands there twice"),
        (b"a: &x [1]\nb: *x", "anchors (&x) are not read"),
        (b"train: {steps: 012}", "begins with a zero"),
        (b"5: 6", "a key must be text"),
        (b"", "must hold keys and values"),
        (b"#" * 5_000_000, "is not read"),
    ],
)
def test_recipe_files_that_cannot_be_read(capsys, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    for command in ("train", "compare", "plan"):
        assert words in fails(capsys, command, "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_file_that_may_not_be_read_or_is_a_pipe(capsys, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is no file" in fails(capsys, "train", tmp_path / "pipe.yaml")
    path = tmp_path / "closed.yaml"
    path.write_text("name: x")
    real = Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot read the recipe file" in fails(capsys, "train", path)


def test_bad_image_folders(images, capsys, tmp_path):
    def train(*extra):
        return (
            "train",
            "images",
            *SMALL,
            "--data.path",
            images,
            "--data.image-size",
            8,
            "--output-dir",
            tmp_path / "r",
            *extra,
        )

    broken = images / "left" / "broken.png"
    broken.write_bytes((images / "left" / "1.png").read_bytes()[:60])
    assert str(broken) in fails(capsys, *train())
    code, _, err = run(capsys, *train("--data.skip-unreadable", "--resume", "never"))
    assert code == 0
    assert "skipped 1 unreadable" in err
    broken.unlink()
    (images / "empty").mkdir()
    assert "no readable" in fails(capsys, *train("--resume", "never"))
    (images / "empty").rmdir()
    for name in ("left", "middle"):
        (images / name).rename(tmp_path / name)
    assert "only 'right'" in fails(capsys, *train("--resume", "never"))
    (images / "right").rename(tmp_path / "right")
    assert "found none" in fails(capsys, *train("--resume", "never"))


def test_a_run_folder_of_another_recipe_is_refused(trained, capsys):
    before = (trained / "config.yaml").read_text()
    assert "another configuration" in fails(capsys, "train", "digits", *SMALL, "--seed", 7, "--output-dir", trained)
    assert (trained / "config.yaml").read_text() == before


def test_a_folder_that_holds_something_else_is_refused(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in fails(capsys, "train", "digits", *SMALL, "--output-dir", tmp_path)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_starting_over_removes_nothing_that_is_no_run(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    before = contents(tmp_path)
    for resume in ("never", "auto"):
        line = fails(capsys, "train", "digits", *SMALL, "--output-dir", tmp_path, "--resume", resume)
        assert "is no recipe of a run" in line
        assert contents(tmp_path) == before


def test_starting_over_that_fails_leaves_the_run_before(trained, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = contents(folder)
    line = fails(
        capsys, "train", "digits", *SMALL, "--model.start", "nowhere", "--output-dir", folder, "--resume=never"
    )
    assert "nowhere" in line
    assert contents(folder) == before
    rate = ("--train.learning-rate", "1e30", "--train.max-grad-norm", "0", "--train.warmup", "0", "--order", "sweep")
    line = fails(capsys, "train", "digits", *SMALL, *rate, "--output-dir", folder, "--resume", "never")
    assert "became nan" in line
    assert contents(folder) == before
    again = line.rpartition("Try ")[2].partition(", which")[0].split()  # what it says works
    assert run(capsys, "train", "digits", *SMALL, *rate[2:], *again, "--output-dir", folder)[0] == 0
    assert not (folder / ".previous").exists()


def test_an_earlier_checkpoint_is_evaluated_as_what_it_is(capsys, tmp_path):
    folder = tmp_path / "run"
    assert run(capsys, "train", "digits", *SMALL, "--output-dir", folder)[0] == 0
    *_, earlier, newest = checkpoint.existing(folder)
    (newest / "shared.safetensors").write_bytes(b"")
    code, out, err = run(capsys, "evaluate", folder, "--json")
    assert code == 0
    assert "evaluates an earlier checkpoint" in err
    assert f"step-{json.loads(out)['block_steps']}" == earlier.name


def test_a_damaged_summary_is_made_again_by_the_command_that_made_it(trained, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "summary.json").write_text("{")
    for command in (("report", folder), ("evaluate", folder)):
        assert "summary.json is damaged" in fails(capsys, *command)
    code, out, err = run(capsys, "train", "digits", *SMALL, "--output-dir", folder, "--json")
    assert code == 0
    assert "made again" in err
    assert json.loads(out)["metrics"] == json.loads((trained / "summary.json").read_text())["metrics"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_runs_of_a_comparison_end_with_it(tmp_path):
    arguments = [*SMALL, "--steps", "9999", "--methods", "shallow,end-to-end", "--jobs", "2"]
    command = [sys.executable, "-m", "diffusionblocks.cli", "compare", "digits", *arguments]
    process = subprocess.Popen([*command, "--output-dir", str(tmp_path)], stderr=subprocess.PIPE, text=True)

    def running():
        found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in found if str(tmp_path) in command_of(pid) and pid != process.pid]

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(tmp_path.rglob("metrics.jsonl"))) < 2:
        time.sleep(0.1)
    assert len(running()) == 2
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running()
    assert len({path.parents[2] for path in tmp_path.rglob("state.json")}) == 2  # both saved a checkpoint


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_ctrl_c_exits_130_and_the_same_command_finishes(tmp_path):
    arguments = [*SMALL, "--steps", "400", "--output-dir", str(tmp_path / "run"), "--train.log-every", "3"]
    command = [sys.executable, "-m", "diffusionblocks.cli", "train", "digits", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "checkpoint in" in err
    done = json.loads((sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.json").read_text())["step"]
    assert 0 < done < 1200


def test_a_loss_that_is_not_finite_stops_with_one_line(capsys, tmp_path):
    arguments = [
        "--train.learning-rate",
        "1e30",
        "--train.max-grad-norm",
        "0",
        "--train.warmup",
        "0",
        "--order",
        "sweep",
    ]
    line = fails(capsys, "train", "digits", *SMALL, *arguments, "--output-dir", tmp_path / "r")
    assert "block 0 became nan at its step" in line


def test_tensorboard_files_are_written(capsys, tmp_path):
    pytest.importorskip("tensorboard")
    assert (
        run(capsys, "train", "digits", *SMALL, "--train.tensorboard", "--output-dir", tmp_path / "r", "--json")[0] == 0
    )
    assert list((tmp_path / "r").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["sample"]])
def test_help_names_what_there_is(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "dblocks" in out
    if command and command[0] in ("train", "compare"):
        assert all(method in out for method in METHODS)


def settings_in(text):
    """Names of the settings that a help text lists, a line each."""
    listed = text.partition("\nsettings (")[2].partition("\nmethods:")[0]
    return re.findall(r"^  --([a-z.-]+) +[A-Za-z]", listed, re.MULTILINE)


@pytest.mark.parametrize("command", ["train", "adapt", "compare"])
def test_help_shows_what_people_set_and_help_all_every_option_once(capsys, command):
    _, short, _ = run(capsys, command, "--help")
    usual = settings_in(short)
    assert 18 <= len(usual) <= 24
    code, out, _ = run(capsys, command, "--help-all")
    listed = settings_in(out)
    every = {key for task in TASKS for key in places(task)} | {"method", "preset", "evaluate_on"}
    assert code == 0 and len(listed) == len(set(listed))
    assert set(listed) == {key.replace("_", "-") for key in every}  # each with what it means
    assert {today(name.replace("-", "_")).replace("_", "-") for name in usual} < set(listed)
    assert all(len(line) <= 170 for line in out.splitlines())


def test_preset_demo_exists_for_make():
    assert load_recipe("digits", [("preset", "demo")]).train.steps < load_recipe("digits").train.steps
