"""No command runs code that came with a recipe, a run folder or a model, unless that very command is told to."""

import dataclasses
import json
import os

import pytest
import torch
import yaml

import diffusionblocks as dblocks
from diffusionblocks.cli import main
from diffusionblocks.experiments.compare import consent_flags
from diffusionblocks.methods import for_method
from diffusionblocks.networks import pretrained
from diffusionblocks.recipes import ModelConfig, build, load_recipe
from tests.cli.test_cli import SMALL, run

MARK = "open({!r}, 'w').close()\n"


@pytest.fixture
def mark(tmp_path):
    """The file that planted code leaves."""
    return tmp_path / "it-ran"


@pytest.fixture
def planted(tmp_path, mark):
    """A model folder that brings code for its config and its tokenizer."""
    folder = tmp_path / "planted"
    folder.mkdir()
    own = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(own))
    tokenizer = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "mine.py").write_text(
        MARK.format(str(mark))
        + "from transformers import PretrainedConfig, PreTrainedTokenizer\n\n\n"
        + "class MineConfig(PretrainedConfig):\n    model_type = 'mine'\n\n\n"
        + "class MineTokenizer(PreTrainedTokenizer):\n    pass\n"
    )
    return folder


def recipe_of(folder, where, **changes):
    """A recipe of somebody else, who trusts himself."""
    model = {"pretrained": str(folder), "trust_remote_code": True}
    content = {"name": "theirs", "model": model, "train": {"steps": 1}, **changes}
    where.write_text(yaml.safe_dump(content))
    return where


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "digits"
    assert main(["train", "digits", *SMALL, "--output-dir", str(folder), "--json"]) == 0
    return (folder / "summary.json").read_text()


@pytest.fixture
def run_folder(planted, tmp_path, summary):
    folder = tmp_path / "theirs"
    folder.mkdir()
    recipe_of(planted, folder / "config.yaml")
    (folder / "summary.json").write_text(summary)
    return folder


def commands(recipe, run_folder, planted, output):
    """Every command that reads what somebody else wrote."""
    return {
        "train": ["train", recipe, "--output-dir", output],
        "compare": ["compare", recipe, "--methods", "end-to-end", "--output-dir", output],
        "plan": ["plan", recipe],
        "evaluate": ["evaluate", run_folder],
        "harness": ["evaluate", run_folder, "--harness", "x"],
        "sample": ["sample", run_folder, "--num", 1],
        "export": ["export", run_folder],
        "export a block": ["export", run_folder, "--block", 0],
        "report": ["report", run_folder],
    }


NAMES = ("train", "compare", "plan", "evaluate", "harness", "sample", "export", "export a block", "report")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_asks_for_remote_code_gets_it_only_with_the_flag(name, planted, run_folder, tmp_path, mark, capsys):
    recipe = recipe_of(planted, tmp_path / "theirs.yaml")
    command = commands(recipe, run_folder, planted, tmp_path / "out")[name]
    code, out, err = run(capsys, *command)
    assert (code, out, mark.exists()) == (2, "", False)
    assert "--trust-remote-code" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, _, err = run(capsys, *command, "--trust-inception")  # another consent
    assert (code, mark.exists()) == (2, False)
    code, _, err = run(capsys, *command, "--trust-remote-code")
    assert code == 2
    assert mark.exists(), err
    assert "class Mine are not supported" in err


@pytest.mark.parametrize("name", ["plan", "adapt"])
def test_a_model_is_not_run_because_its_name_was_given(name, planted, mark, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text " * 500)
    adapt = ["adapt", planted, "--data.path", tmp_path / "text.txt", "--output-dir", tmp_path / "out"]
    command = {"plan": ["plan", "--model", planted], "adapt": adapt}[name]
    for words in (command, [*adapt, "--model.trust-remote-code", "true"]):
        code, _, err = run(capsys, *words)
        assert (code, mark.exists()) == (2, False)
        assert "--trust-remote-code" in err
    code, _, err = run(capsys, *command, "--trust-remote-code")
    assert code == 2
    assert mark.exists(), err


def test_a_tokenizer_is_trusted_by_the_flag_alone(planted, mark, tmp_path, capsys):
    content = {"task": {"kind": "causal-lm"}, "data": {"tokenizer": str(planted), "trust_remote_code": True}}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**content, "model": {"model_class": "LlamaForCausalLM"}}))
    code, _, err = run(capsys, "train", path, "--output-dir", tmp_path / "out")
    assert (code, mark.exists()) == (2, False)
    assert "data.trust_remote_code" in err
    run(capsys, "train", path, "--output-dir", tmp_path / "out", "--trust-remote-code")
    assert mark.exists()


@pytest.mark.parametrize("where", ["task", "methods", "presets"])
@pytest.mark.parametrize("name", ["train", "compare", "plan", "evaluate", "sample", "export", "report"])
def test_torchscript_runs_only_with_the_flag(where, name, tmp_path, mark, summary, monkeypatch, capsys):
    def load(*args, **options):
        mark.touch()
        raise RuntimeError("planted")

    monkeypatch.setattr(torch.jit, "load", load)
    script = {"inception": "theirs.pt", "num_samples": 5000}
    content = {
        "task": {"kind": "image-generation", "num_samples": 0},
        "data": {"source": "digits", "image_size": 8},
        "model": {"model_class": "DiTTransformer2DModel", "hidden_size": 16, "num_hidden_layers": 6, "patch_size": 2},
        "train": {"steps": 1},
    }
    if where == "task":
        content["task"] |= script
    elif where == "methods":
        content["methods"] = {"diffusionblocks": {"task": script}}
    else:
        content |= {"presets": {"theirs": {"task": script}}, "preset": "theirs"}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(summary)
    if where == "presets":  # a run folder holds them laid over
        content["task"] |= script if name in ("evaluate", "sample", "export", "report") else {}
    for path in (folder / "config.yaml", tmp_path / "r.yaml"):
        path.write_text(yaml.safe_dump(content))
    words = {
        "train": ["train", tmp_path / "r.yaml", "--output-dir", tmp_path / "out"],
        "compare": ["compare", tmp_path / "r.yaml", "--methods", "diffusionblocks", "--output-dir", tmp_path / "out"],
        "plan": ["plan", tmp_path / "r.yaml"],
    }
    command = words.get(name, [name, folder])
    code, _, err = run(capsys, *command)
    assert (code, mark.exists()) == (2, False)
    assert "--trust-inception" in err
    if name not in ("plan", "compare"):  # they load none themselves
        code, _, err = run(capsys, *command, "--trust-inception")
        assert code == 2
        assert mark.exists(), err


def test_a_package_is_named_by_one_word_and_never_imported(tmp_path, mark, monkeypatch):
    (tmp_path / "theirs" / "inner").mkdir(parents=True)
    (tmp_path / "theirs" / "__init__.py").write_text(MARK.format(str(mark)))
    (tmp_path / "theirs" / "inner" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("theirs.inner", "theirs.", ".theirs", "theirs/inner", "", "the irs", "thé"):
        with pytest.raises(dblocks.UserError, match="one installed package"):
            pretrained.local(f"package:{name}")
    with pytest.raises(dblocks.UserError, match=r"must hold one \.gguf file"):
        pretrained.local("package:theirs")
    assert not mark.exists()


def test_runs_of_a_comparison_do_not_import_what_lies_around(tmp_path, mark, monkeypatch, capsys):
    for module in ("yaml", "safetensors", "rich"):
        (tmp_path / f"{module}.py").write_text(MARK.format(str(mark)) + "raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    arguments = ("compare", "digits", *SMALL, "--methods", "shallow", "--output-dir", tmp_path / "out", "--json")
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path.split(os.pathsep))))  # an empty part means here
    code, _, err = run(capsys, *arguments)
    assert (code, mark.exists()) == (0, False), err


def test_consent_reaches_the_runs_of_a_comparison():
    plain = load_recipe("lm-pydocs")
    assert consent_flags(plain) == ()
    own = dataclasses.replace(plain, model=ModelConfig(pretrained="x", trust_remote_code=True))
    flags = ("--trust-remote-code", "--model.trust-remote-code=true", "--data.trust-remote-code=false")
    assert consent_flags(own) == flags
    with dblocks.trusting(inception=True):
        assert consent_flags(plain) == ("--trust-inception",)


def test_python_callers_say_it_once(tmp_path):
    theirs = {"model": {"trust_remote_code": True, "pretrained": "x"}}
    with pytest.raises(dblocks.UserError, match="--trust-remote-code"):
        build(theirs)
    with dblocks.trusting(remote_code=True):
        recipe = build(theirs)
        with dblocks.trusting(), pytest.raises(dblocks.UserError, match="--trust-remote-code"):
            build(theirs)
    assert for_method(recipe, "exact").model.trust_remote_code  # not asked again
    recipe.methods["exact"] = {"model": {"pretrained": "another"}}
    with pytest.raises(dblocks.UserError, match="--trust-remote-code"):
        for_method(recipe, "exact")
    plain = load_recipe("dit-digits")
    plain.methods["diffusionblocks"] = {"task": {"inception": "theirs.pt"}}
    with pytest.raises(dblocks.UserError, match="--trust-inception"):
        for_method(plain, "diffusionblocks")
