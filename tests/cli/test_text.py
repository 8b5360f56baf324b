"""The commands on text, as a user runs them."""

import json

import pytest
import torch
import yaml

from diffusionblocks.cli import main
from diffusionblocks.data.text.tokenizers import load_tokenizer
from diffusionblocks.experiments.run import load_run
from tests.conftest import make_bert, make_llama, make_roberta
from tests.unit.test_text import POEM, make_tokenizer

SETTINGS = [
    *("--steps", "6", "--batch-size", "8", "--model.hidden-size", "16", "--model.intermediate-size", "32"),
    *(
        "--data.length",
        "16",
        "--evaluation.levels-per-text",
        "2",
        "--evaluation.num-samples",
        "4",
        "--sampling.steps",
        "6",
    ),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(f"text {number} " + POEM * (3 + number % 3))
    return folder


@pytest.fixture(scope="module")
def settings(texts, tmp_path_factory):
    return [*SETTINGS, "--data.path", str(texts), "--data.cache-dir", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "mdlm-pydocs", *settings, "--output-dir", str(folder)]) == 0
    return folder


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_summarised_in_bits_and_shares(trained):
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    assert next(iter(metrics)) == "bits_per_character"
    shares = sum(metrics[f"share_block_{index}"]["value"] for index in range(3))
    assert shares == pytest.approx(metrics["nats_per_token"]["value"], rel=1e-6)
    assert metrics["bits_per_character"]["value"] == pytest.approx(
        metrics["nats_per_token"]["value"] / 0.693147, rel=1e-4
    )
    assert metrics["bits_per_character"]["stderr"] > 0
    assert {"entropy", "entropy_real", "distinct_2", "distinct_2_real"} <= set(metrics)


def test_evaluating_again_gives_the_same_and_takes_other_settings(trained, capsys):
    first = run_json(capsys, "evaluate", str(trained))["metrics"]
    assert first == json.loads((trained / "summary.json").read_text())["metrics"]
    finer = run_json(
        capsys, "evaluate", str(trained), "--evaluation.levels-per-text", "8", "--evaluation.num-samples", "0"
    )["metrics"]
    assert finer["nats_per_token"] != first["nats_per_token"] and "entropy" not in finer


def test_sampling_goes_on_from_a_prompt_and_fills_blanks(trained, capsys, tmp_path):
    found = run_json(capsys, "sample", str(trained), "--num", "3", "--prompt", "one two")
    assert len(found["texts"]) == 3 and all(text.startswith("one two") and len(text) == 16 for text in found["texts"])
    assert found["tokens_per_second"] > 0 and found["layer_evaluations_per_text"] <= 2 * 6
    blanks = run_json(capsys, "sample", str(trained), "--num", "2", "--prompt", "a {4} b", "--sampler", "confidence")
    assert all(text.startswith("a ") and text.endswith(" b") and len(text) == 8 for text in blanks["texts"])
    again = run_json(capsys, "sample", str(trained), "--num", "2", "--prompt", "a {4} b", "--sampler", "confidence")
    assert again["texts"] == blanks["texts"]
    path = tmp_path / "out.txt"
    assert (
        main(["sample", str(trained), "--num", "2", "--temperature", "0.5", "--top-p", "0.9", "--output", str(path)])
        == 0
    )
    assert len(path.read_text().splitlines()) == 2


def test_sampling_needs_no_data(trained, capsys, monkeypatch):
    monkeypatch.setattr("diffusionblocks.experiments.run.load_text", lambda *arguments: pytest.fail("read the data"))
    assert run_json(capsys, "sample", str(trained), "--num", "1")["num"] == 1


def test_the_report_shows_texts_and_who_wrote_them(trained, capsys, tmp_path):
    run_json(capsys, "report", str(trained), "--output", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "Generated texts" in page and "block&nbsp;0" in page and "block&nbsp;2" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_compare_gives_all_methods_the_same_layer_evaluations(settings, capsys, tmp_path):
    methods = "shallow,diffusionblocks-paper"
    results = run_json(
        capsys, "compare", "mdlm-pydocs", "--methods", methods, *settings, "--output-dir", str(tmp_path), "--jobs", "2"
    )["results"]
    assert len({result["layer_evaluations"] for result in results}) == 1
    paper = yaml.safe_load((tmp_path / "diffusionblocks-paper" / "seed-0" / "config.yaml").read_text())
    assert paper["method"] == "diffusionblocks-paper"


def test_a_teacher_judges_samples(settings, trained, capsys, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(tmp_path / "teacher")
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tokenizer)
    found = run_json(capsys, "evaluate", str(trained), "--evaluation.teacher", tokenizer)["metrics"]
    assert 1 < found["generative_perplexity"]["value"] < 100  # an untrained one of 20 words: about 20


def test_an_encoder_with_its_tokenizer_is_adapted(settings, texts, capsys, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "bert", mask=True)
    make_bert(vocab_size=40, mask_token_id=None).save_pretrained(tokenizer)
    adapting = ["--model.pretrained", tokenizer, "--data.tokenizer", tokenizer, "--data.length", "8"]
    summary = run_json(capsys, "train", "mdlm-pydocs", *settings, *adapting, "--output-dir", str(tmp_path / "run"))
    metrics = summary["metrics"]
    assert (
        summary["num_blocks"] == 3
        and metrics["bits_per_character"]["value"] < metrics["nats_per_token"]["value"] / 0.69
    )
    lora = run_json(
        capsys,
        *("train", "mdlm-pydocs", *settings, *adapting, "--method", "lora", "--output-dir", str(tmp_path / "lora")),
    )
    assert lora["method"] == "lora" and lora["num_blocks"] == 1
    found = run_json(capsys, "sample", str(tmp_path / "run"), "--num", "1", "--prompt", "two {2} Birds")
    assert found["texts"][0].startswith("two ") and found["texts"][0].endswith(" Birds")
    assert main(["export", str(tmp_path / "run"), "--block", "1"]) == 0  # tied embeddings


def test_a_tokenizer_without_a_mask_makes_the_pretrained_network_grow(settings, capsys, tmp_path):
    folder = make_tokenizer(tmp_path / "llama")
    size = load_tokenizer(folder).size
    make_llama(vocab_size=size - 1, mask_token_id=None).to(torch.bfloat16).save_pretrained(folder)
    adapting = ["--model.pretrained", folder, "--data.tokenizer", folder, "--data.length", "8"]
    for method in ("diffusionblocks", "full"):
        words = [*settings, *adapting, "--method", method, "--output-dir", str(tmp_path / method)]
        assert main(["train", "mdlm-pydocs", *words]) == 0
    run = load_run(tmp_path / "diffusionblocks", with_data=False)
    assert run.model.mask_id == size - 1 and run.model.block(0).stem.embedding.num_embeddings == size
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}  # though the checkpoint was in bf16


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_packed_and_padded_windows_train(settings, packing, capsys, tmp_path):
    words = ["--data.packing", packing, "--data.tokenizer", "bytes", "--output-dir", str(tmp_path / "run")]
    metrics = run_json(capsys, "train", "mdlm-pydocs", *settings, *words)["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(metrics["nats_per_token"]["value"] / 0.693147, rel=1e-5)
    assert 5 < metrics["bits_per_byte"]["value"] < 9  # hardly trained: log2 of 256


@pytest.mark.parametrize(
    "kind", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"]
)
def test_every_family_is_made_new_trained_and_loaded_again(settings, kind, capsys, tmp_path):
    words = ["--model.model-class", kind, "--model.num-attention-heads", "2", "--model.dropout", "0.1"]
    for method in ("diffusionblocks", "shallow"):
        folder = str(tmp_path / method)
        assert main(["train", "mdlm-pydocs", *settings, *words, "--method", method, "--output-dir", folder]) == 0
        first = json.loads((tmp_path / method / "summary.json").read_text())["metrics"]
        assert run_json(capsys, "evaluate", folder)["metrics"] == first


def test_tokens_of_another_kind_and_lost_conditioning_are_refused(settings, capsys, tmp_path):
    make_bert().save_pretrained(tmp_path / "bert")
    start = ["train", "mdlm-pydocs", *settings, "--output-dir", str(tmp_path / "run")]
    assert main([*start, "--model.pretrained", str(tmp_path / "bert")]) == 2
    assert "does not read characters" in capsys.readouterr().err
    whole = [*start[:-1], str(tmp_path / "whole"), "--method", "end-to-end", "--blocks.condition-width", "8"]
    assert main(whole) == 0
    capsys.readouterr()
    assert main([*start, "--model.pretrained", str(tmp_path / "whole" / "model")]) == 2
    assert "would lose that" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "whole"), "--data.tokenizer", "bytes"]) == 2
    assert "cannot be changed after training" in capsys.readouterr().err


def test_roberta_has_fewer_positions_than_its_config_says(settings, capsys, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "roberta", mask=True)
    make_roberta(vocab_size=40, max_position_embeddings=16, mask_token_id=None).save_pretrained(tokenizer)
    words = [
        *settings,
        "--model.pretrained",
        tokenizer,
        "--data.tokenizer",
        tokenizer,
        "--output-dir",
        str(tmp_path / "r"),
    ]
    assert main(["train", "mdlm-pydocs", *words, "--data.length", "15"]) == 2
    assert "exceeds the 14 positions" in capsys.readouterr().err
    assert main(["train", "mdlm-pydocs", *words, "--data.length", "14"]) == 0


def test_plan_shows_blocks_of_a_text_network(capsys):
    rows = run_json(capsys, "plan", "mdlm-pydocs", "--num-blocks", "3")["rows"]
    found = {row["method"]: row["predicted"]["total"] for row in rows}
    assert 0.3 < found["diffusionblocks"] / found["end-to-end"] < 0.42
    assert "exact" not in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.length", "100000"], "less than one window of 100000"),
        (["--data.tokenizer", "/no/such/one"], "cannot load the tokenizer '/no/such/one'"),
        (["--data.lenght", "8"], "data.length"),
        (["--data.image-size", "8"], "unknown key 'data.image_size'"),
        (["--objective.masking", "all"], "masking must be one of"),
        (["--model.model-class", "ViTForImageClassification"], "cannot train a ViTForImageClassification"),
        (["--model.hidden-size", "17"], "not divisible by model.num_attention_heads"),
        (["--model.hidden-size", "18"], "even number"),
        (["--data.max-documents", "-1"], "at least 0"),
        (["--method", "exact"], "masked diffusion has no exact mode"),
        (["--blocks.context", "features"], "blocks.context"),
        (["--evaluation.teacher", "/no/such/model"], "teacher"),
        (["--model.pretrained", "/no/such/model"], "cannot load the network"),
    ],
)
def test_mistakes_get_one_clear_line(settings, capsys, tmp_path, arguments, words):
    assert main(["train", "mdlm-pydocs", *settings, *arguments, "--output-dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1] and lines[-1].startswith("dblocks: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "one two three four five"], "exceeds the network's window of 16 tokens"),
        (["--class", "3"], "--class has no meaning here"),
        (["--num", "0"], "--num must be at least 1"),
        (["--length", "1"], "at least 2"),
        (["--steps", "0"], "at least 1"),
        (["--top-p", "2"], "--top-p must be above 0 and at most 1"),
        (["--temperature", "nan"], "temperature"),
        (["--sampler", "euler"], "sampler"),
    ],
)
def test_mistakes_in_sampling_get_one_clear_line(trained, capsys, arguments, words):
    assert main(["sample", str(trained), *arguments]) == 2
    assert words in capsys.readouterr().err
