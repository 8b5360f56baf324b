"""Every command on every task and method, where the device is not the CPU."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from diffusionblocks.cli import main
from diffusionblocks.evaluation import features
from tests.conftest import DEVICE, make_autoencoder
from tests.language_models import make_pretrained, write_messages, write_texts
from tests.unit.test_text import POEM

NARROW = ["--model.hidden-size", "16", "--model.num-hidden-layers", "3", "--model.num-attention-heads", "2"]
QUICK = ["--steps", "2", "--batch-size", "4", "--num-blocks", "3", "--residency", "host"]
TEXT = ["--data.length", "10", "--evaluation.num-samples", "2", "--model.intermediate-size", "32", *NARROW]
RECIPES = {
    "labels": ["digits", *NARROW, "--model.intermediate-size", "32"],
    "images": ["dit-digits", *NARROW, "--evaluation.num-samples", "70", "--sampling.steps", "2"],
    "masked": ["mdlm-pydocs", *TEXT, "--evaluation.levels-per-text", "1", "--sampling.steps", "3"],
    "information": [
        "lm-pydocs",
        *TEXT,
        "--evaluation.levels-per-block",
        "1",
        "--method",
        "diffusionblocks-information",
    ],
    "features": ["lm-pydocs", *TEXT, "--method", "diffusionblocks-features"],
    "paper": ["lm-pydocs", *TEXT, "--evaluation.levels-per-block", "1", "--method", "diffusionblocks-paper"],
    "loop": ["looped-pydocs", *TEXT, "--sampling.iterations", "2", "--evaluation.curve", "1"],
    "loop unrolled": ["looped-pydocs", *TEXT, "--sampling.iterations", "2", "--method", "end-to-end"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number:02d}.txt").write_text(f"text {number} " + POEM)
    make_pretrained(folder / "net", layers=3)
    make_pretrained(folder / "untied", layers=3, tied=False)
    write_messages(folder / "chat.jsonl", 40)
    write_texts(folder / "general", 8)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(features, "STEPS", 2)


def dblocks(*words) -> None:
    assert main([str(word) for word in words]) == 0, words


@pytest.mark.parametrize("kind", RECIPES)
def test_commands_on_every_task(kind, folder, tmp_path, capsys):
    recipe, *settings = RECIPES[kind]
    settings += ["--data.cache-dir", folder / "cache", "--output-dir", tmp_path / "run", "--device", DEVICE]
    if kind not in ("labels", "images"):
        settings += ["--data.source", "folder", "--data.path", folder / "texts"]
    one = kind.startswith("loop") or "end-to-end" in settings
    words = [*QUICK[:4], *([] if one else QUICK[4:]), *settings]
    dblocks("train", recipe, *words, "--train.checkpoint-every", 3)
    capsys.readouterr()
    dblocks("evaluate", tmp_path / "run", "--json")
    again = json.loads(capsys.readouterr().out)["metrics"]
    for name, metric in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"].items():
        assert again[name]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-6), name
    dblocks("sample", tmp_path / "run", "--num", 2)
    if not one:
        dblocks("export", tmp_path / "run", "--block", 1, "--output", tmp_path / "block.safetensors")
    dblocks("report", tmp_path / "run")


ADAPTED = ("full", "lora", "last-block", "exact", "diffusionblocks", "mixed", "prompt", "retrieval", "original")


@pytest.mark.parametrize("method", ADAPTED)
@pytest.mark.parametrize("network", ["net", "untied"])
def test_a_pretrained_network_is_adapted_and_deployed(method, network, folder, tmp_path):
    if network == "untied" and method not in ("exact", "diffusionblocks"):
        pytest.skip("whose embeddings are tied changes nothing for this method")
    settings = [
        *("--data.path", folder / "chat.jsonl", "--data.general", folder / "general", "--data.length", 48),
        *(
            "--data.evaluated",
            2,
            "--steps",
            2,
            "--batch-size",
            2,
            "--evaluation.continuations",
            1,
            "--evaluation.continued",
            3,
        ),
        *("--data.cache-dir", folder / "cache", "--in-context.tokens", 60, "--device", DEVICE, "--num-blocks", 3),
    ]
    run = tmp_path / "run"
    dblocks("adapt", folder / network, *settings, "--residency", "host", "--method", method, "--output-dir", run)
    summary = json.loads((run / "summary.json").read_text())
    if method in ("prompt", "retrieval", "original"):
        return
    assert len(json.loads((run / "samples.json").read_text())["continuations"]) == 1
    dblocks("sample", run, "--num", 1, "--length", 12, "--prompt", "It is")
    dblocks("export", run, "--output", tmp_path / "plain")
    if summary["result"]["format"] == "transformers":
        AutoModelForCausalLM.from_pretrained(run / summary["result"]["folder"])


def test_methods_are_compared_and_a_plan_is_made(folder, tmp_path, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(here / "site"), str(here.parents[1])])
    )  # of the processes it starts
    recipe, *settings = RECIPES["labels"]
    words = [*QUICK, *settings, "--data.cache-dir", folder / "cache", "--device", DEVICE]
    dblocks("compare", recipe, *words, "--methods", "end-to-end,diffusionblocks", "--output-dir", tmp_path / "all")
    dblocks("plan", recipe, *settings, "--num-blocks", 3, "--memory", "16GiB", "--device", DEVICE)


def test_latents_are_made_and_decoded_on_the_device(folder, tmp_path):
    make_autoencoder(folder / "vae")
    settings = [*NARROW, "--data.vae", folder / "vae", "--data.cache-dir", folder / "cache", "--device", DEVICE]
    settings += ["--evaluation.num-samples", 70, "--sampling.steps", 2, "--output-dir", tmp_path / "run"]
    dblocks("train", "dit-digits", *QUICK, *settings)
    dblocks("sample", tmp_path / "run", "--num", 2)


def test_a_device_that_does_not_exist_is_one_line(tmp_path, capsys):
    assert main(["train", "digits", "--device", f"{DEVICE}:9", "--output-dir", str(tmp_path / "run")]) == 2
    assert (
        f"train.device {DEVICE}:9: there is no such device here; this machine has {DEVICE}:0" in capsys.readouterr().err
    )


def test_the_image_example_of_the_docs_runs(tmp_path, monkeypatch):
    """What a reader writes does not mix devices either: encoder, images and network are where they should be."""
    page = (Path(__file__).parents[2] / "docs" / "image-generation.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(re.sub(r"\bsteps=\d+", "steps=2", example).replace("num_layers=12", "num_layers=3"), namespace)
    assert namespace["images"].shape == (10, 1, 8, 8)
