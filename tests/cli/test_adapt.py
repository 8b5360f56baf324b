"""Adapting a pretrained language model on the command line, and what it leaves behind."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffusionblocks.cli import main
from diffusionblocks.experiments.folder import read_summary
from tests.cli.test_text import run_json
from tests.language_models import make_pretrained, write_messages, write_texts

METHODS = ("full", "lora", "last-block", "exact", "diffusionblocks", "mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt")
    make_pretrained(folder / "net")
    write_messages(folder / "chat.jsonl", 60)
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return [
        *("--data.path", str(folder / "chat.jsonl"), "--data.general", str(folder / "texts"), "--data.length", "64"),
        *("--data.evaluated", "4", "--steps", "6", "--batch-size", "4", "--device", "cpu", "--train.warmup", "0"),
        *("--train.learning-rate", "5e-3", "--evaluation.continuations", "2", "--evaluation.continued", "8"),
        *("--data.cache-dir", str(folder / "cache"), "--in-context.tokens", "100"),
    ]


@pytest.fixture(scope="module")
def runs(folder, settings):
    """method -> folder of its finished run"""
    made = {}
    for method in METHODS:
        made[method] = folder / "runs" / method
        command = ["adapt", str(folder / "net"), *settings, "--method", method, "--output-dir", str(made[method])]
        assert main(command) == 0
    return made


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_before_and_after(runs, method):
    summary = json.loads((runs[method] / "summary.json").read_text())
    metrics = summary["metrics"]
    names = ("nats_per_token", "perplexity", "general_nats_per_token", "general_perplexity")
    assert {*names, *(f"{name}_before" for name in names)} <= set(metrics)
    assert metrics["nats_per_token"]["value"] < metrics["nats_per_token_before"]["value"]
    first = json.loads((runs["full"] / "summary.json").read_text())["metrics"]
    assert metrics["nats_per_token_before"]["value"] == pytest.approx(first["nats_per_token_before"]["value"], abs=1e-5)
    assert metrics["general_nats_per_token_before"] == pytest.approx(first["general_nats_per_token_before"], rel=1e-4)
    texts = json.loads((runs[method] / "samples.json").read_text())["continuations"]
    assert len(texts) == 2 and all(set(text) == {"prompt", "real", "written", "before"} for text in texts)
    assert texts[0]["prompt"].endswith("<|im_start|>assistant\n") and texts[0]["real"].startswith("It is")


@pytest.mark.parametrize("method", METHODS)
def test_results_deploy_in_plain_transformers(runs, folder, method):
    summary = json.loads((runs[method] / "summary.json").read_text())
    result = summary["result"]
    assert not result["needs_diffusionblocks"]
    place = runs[method] / result["folder"]
    if result["format"] == "peft adapter":
        from peft import PeftModel

        network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "net"), place)
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "net")
    else:
        network = AutoModelForCausalLM.from_pretrained(place)
        assert network.config.tie_word_embeddings and network.config.num_hidden_layers == 4
        names = {name for name, _ in network.named_parameters()}
        assert names == {name for name, _ in AutoModelForCausalLM.from_pretrained(folder / "net").named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(place)
    asked = [{"role": "user", "content": "What is 3 plus 3?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = network(ids).logits
        original = AutoModelForCausalLM.from_pretrained(folder / "net")(ids).logits
    assert not torch.allclose(ours, original, atol=1e-3)
    from diffusionblocks.experiments.run import load_run

    run = load_run(runs[method], [("train.device", "cpu")], with_data=False)
    with torch.no_grad():
        assert torch.allclose(run.model.network.eval()(ids).logits, ours, atol=1e-4)


def test_blocks_that_are_not_chosen_stay_byte_identical(folder, settings, capsys):
    place = folder / "runs" / "one"
    found = run_json(capsys, "adapt", str(folder / "net"), *settings, "--train.blocks", "1", "--output-dir", str(place))
    assert found["method"] == "exact"
    ours = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "net").state_dict()
    for name, tensor in theirs.items():
        trained = any(name.startswith(f"model.layers.{index}.") for index in (2, 3))
        assert torch.equal(ours[name], tensor) != trained or "norm" in name, name


def test_the_same_command_again_evaluates_what_is_there(runs, folder, settings, capsys):
    place = str(runs["exact"])
    command = ["adapt", str(folder / "net"), *settings, "--method", "exact", "--output-dir", place]
    again = run_json(capsys, *command)
    assert again == read_summary(runs["exact"])
    found = run_json(capsys, "evaluate", place)
    assert found["metrics"]["nats_per_token"]["value"] == pytest.approx(again["metrics"]["nats_per_token"]["value"])


def test_methods_side_by_side_with_those_that_train_nothing(folder, settings, capsys):
    place = folder / "compared"
    methods = "original,prompt,retrieval,lora"
    command = ["adapt", str(folder / "net"), *settings, "--methods", methods, "--jobs", "2", "--output-dir", str(place)]
    results = {row["method"]: row for row in run_json(capsys, *command)["results"]}
    assert list(results) == methods.split(",")
    for name, row in results.items():
        assert not any(metric.endswith("_before") for metric in row["metrics"])
        assert (row["peak_memory"]["total"] == 0) == (name != "lora")
        assert (row["samples_seen"] == 0) == (name != "lora")
    values = [results[name]["metrics"]["nats_per_token"]["value"] for name in ("original", "prompt", "retrieval")]
    assert len(set(values)) == 3
    page = (place / "report.html").read_text()
    assert "continuations of held-out texts" in page and "What is" in page


def test_a_run_answers_questions(runs, capsys):
    command = ["sample", str(runs["exact"]), "--num", "2", "--prompt", "What is 2 plus 2?", "--chat", "--length", "60"]
    found = run_json(capsys, *command)
    assert len(found["texts"]) == 2 and not any("What is" in text for text in found["texts"])
    assert main([*command[:2], "--chat", "--num", "1"]) == 2
    assert "--chat takes a question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data.tokenizer", "bytes"], "bytes"),
        (["--in-context.tokens", "250", "--method", "prompt"], "exceed the 256 positions"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--data.path", "nowhere.jsonl"], "there is no file or folder"),
        (["--data.length", "512"], "exceeds the 256 positions"),
        (["--device", "cuda"], "no CUDA device can be used here"),
        (["--evaluation.continuations", "-1"], "evaluation.continuations must be at least 0"),
        (["--method", "diffusionblocks", "--train.blocks", "0"], "train block 1 too, or set local.trust false"),
        (["--method", "retrieval", "--data.packing", "documents"], "set data.packing to stream or padded"),
    ],
)
def test_mistakes_are_one_line(folder, settings, tmp_path, capsys, changes, message):
    if torch.cuda.is_available() and "cuda" in changes:
        pytest.skip("this machine has the device")
    place = tmp_path / "run"
    assert main(["adapt", str(folder / "net"), *settings, *changes, "--output-dir", str(place)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dblocks: ") and message in error
    assert not place.exists() or not any(place.iterdir())


def test_a_missing_model_is_one_line(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["adapt", str(tmp_path / "none"), *settings, "--output-dir", str(tmp_path / "run")]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_adapt_needs_data_that_is_not_the_general_text(folder, settings, tmp_path, capsys):
    texts = str(folder / "texts")
    where = ["--data.path", texts, "--data.general", texts, "--output-dir", str(tmp_path / "run")]
    assert main(["adapt", str(folder / "net"), *settings[4:], *where]) == 2
    assert "is the training text itself" in capsys.readouterr().err
    assert main(["adapt", str(folder / "net")]) == 2
    assert "adapt needs your data" in capsys.readouterr().err


def test_averages_and_borrowed_weights_are_put_in_place_once(runs):
    from diffusionblocks.experiments.run import load_run

    run = load_run(runs["exact"], [("train.device", "cpu")], with_data=False)
    swaps = []
    run.trainer.place.swap_averages = lambda: swaps.append(1)
    with run.trainer.averaged(), run.trainer.averaged():
        assert len(swaps) == 1
    assert len(swaps) == 2


def test_a_report_of_a_run_that_trained_nothing(folder, settings, tmp_path, capsys):
    place = str(tmp_path / "run")
    assert main(["adapt", str(folder / "net"), *settings, "--method", "original", "--output-dir", place]) == 0
    assert main(["report", place]) == 0


def test_a_new_network_has_nothing_to_adapt(settings, capsys):
    assert main(["train", "adapt", *settings]) == 2
    assert "set model.pretrained" in capsys.readouterr().err


# ---------------------------------------------------------------- lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(folder):
    """A task of the harness on a local file: which of two answers is likelier."""
    place = folder / "tasks"
    place.mkdir()
    rows = [
        {"question": f"What is {n} plus {n}?", "choices": [f" It is {2 * n}.", " zzzzzzzzzzzzzzzz"], "answer": 0}
        for n in range(4)
    ]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "sums.yaml").write_text(
        f"task: local_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {place / 'sums.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    return place


def test_a_run_is_scored_by_the_harness(runs, tasks, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    command = ["evaluate", str(runs["exact"]), "--harness", "local_sums", "--harness-path", str(tasks)]
    found = run_json(capsys, *command, "--harness-limit", "3")["harness"]
    assert found["local_sums"]["acc"] == 1.0
    assert main([*command[:3], "local_sun", "--harness-path", str(tasks)]) == 2
    assert "unknown task of lm-evaluation-harness: 'local_sun'" in capsys.readouterr().err


def test_scores_are_the_log_probabilities_of_the_network(runs):
    from diffusionblocks.evaluation.harness import rolling, score, write
    from diffusionblocks.experiments.run import load_run

    run = load_run(runs["diffusionblocks"], [("train.device", "cpu")], with_data=False)
    model = run.recipe.task.language_model(run.trained)
    ids = [5, 9, 30, 31, 32, 40]
    with torch.no_grad():
        log_p = run.model.network.eval()(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = sum(log_p[place - 1, ids[place]].item() for place in (4, 5))
    found, greedy = score(model, ids[:4], ids[4:])
    assert found == pytest.approx(expected, abs=1e-4) and not greedy
    best = int(log_p[3].argmax())
    assert score(model, ids[:4], [best])[1]
    model = model._replace(window=64)
    text = [int(token) for token in range(3, 153)]  # more than two windows of 64
    parts = [([2], text[:63]), (text[:63][-1:], text[63:126])]
    expected = sum(score(model, *part)[0] for part in parts) + score(model, text[150 - 64 : 126], text[126:])[0]
    assert rolling(model, text) == pytest.approx(expected, abs=1e-3)
    written = write(model, "What is {2}?", {"until": ["."], "max_gen_toks": 5})
    ids = [int(token) for token in run.data.tokenizer.encode("What is {2}?")]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(run.model.network(torch.tensor([ids])).logits[0, -1].argmax()))
    assert run.data.tokenizer.decode(ids[-5:]).startswith(written)
