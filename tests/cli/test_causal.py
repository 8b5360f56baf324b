"""Ordinary language models on the command line."""

import json
import math

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.cli import main
from diffusionblocks.experiments.run import load_run
from diffusionblocks.networks.registry import take_apart
from tests.cli.test_text import run_json
from tests.conftest import make_gpt2, make_llama, make_neox
from tests.unit.test_text import POEM, make_tokenizer

SETTINGS = [
    *("--steps", "4", "--batch-size", "8", "--model.hidden-size", "16", "--model.intermediate-size", "32"),
    *("--data.length", "16", "--evaluation.num-samples", "3", "--method", "end-to-end"),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(f"text {number} " + POEM * (3 + number % 3))
    return [*SETTINGS, "--data.path", str(folder), "--data.cache-dir", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "lm-pydocs", *settings, "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_neox])
def test_generation_with_a_cache_is_generation_without(make):
    model = dblocks.EndToEndModel(take_apart(make())).eval()
    start = torch.randint(0, 12, (3, 4), generator=torch.Generator().manual_seed(0))
    found = dblocks.CausalLM(temperature=0.0).sample(model, start, 12)
    for length in range(4, 12):
        following = model({"input_ids": found[:, :length]})[:, -1].argmax(-1)
        assert torch.equal(following, found[:, length])
    drawn = [dblocks.CausalLM().sample(model, start, 12, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_loss_is_that_of_transformers_and_padding_has_none():
    network = make_llama().eval()
    model, task = dblocks.EndToEndModel(take_apart(network)).eval(), dblocks.CausalLM()
    tokens = torch.randint(0, 12, (4, 10), generator=torch.Generator().manual_seed(0))
    expected = network(input_ids=tokens, labels=tokens).loss.item()
    assert task.evaluate(model, [{"input_ids": tokens}])["nats_per_token"].value == pytest.approx(expected, rel=1e-5)
    assert task.step(model, 0, {"input_ids": tokens}).loss.item() == pytest.approx(expected, rel=1e-5)
    real = torch.ones_like(tokens)
    real[:, 6:] = 0
    padded = task.step(model, 0, {"input_ids": tokens, "attention_mask": real}).loss.item()
    assert padded == pytest.approx(network(input_ids=tokens[:, :6], labels=tokens[:, :6]).loss.item(), rel=1e-5)


def test_a_run_is_summarised_in_bits(trained, capsys):
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(
        metrics["nats_per_token"]["value"] / math.log(2), rel=1e-6
    )
    assert {"entropy", "distinct_2"} <= set(metrics)
    assert run_json(capsys, "evaluate", str(trained))["metrics"] == metrics


def test_sampling_goes_on_from_a_prompt(trained, capsys, tmp_path):
    found = run_json(capsys, "sample", str(trained), "--num", "2", "--prompt", "One two", "--length", "12")
    assert all(text.startswith("One two") for text in found["texts"]) and found["length"] == 12
    new = run_json(capsys, "sample", str(trained), "--num", "2", "--seed", "1")
    assert new["length"] == 16 and len(set(new["texts"])) == 2
    run_json(capsys, "report", str(trained), "--output", str(tmp_path / "page.html"))
    assert "Generated texts" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("method", ["shallow", "exact", "checkpointing"])
def test_methods_that_train_whole_networks(settings, method, capsys, tmp_path):
    summary = run_json(
        capsys, "train", "lm-pydocs", *settings, "--method", method, "--output-dir", str(tmp_path / "run")
    )
    assert summary["metrics"]["nats_per_token"]["value"] < 7
    found = run_json(capsys, "sample", str(tmp_path / "run"), "--num", "1")
    assert len(found["texts"]) == 1


@pytest.mark.parametrize("method", ["exact", "lora", "full", "last-block"])
def test_a_pretrained_language_model_is_adapted(settings, method, capsys, tmp_path):
    """Before the first step it is the original; what is saved loads in plain transformers."""
    from transformers import AutoModelForCausalLM

    folder = make_tokenizer(tmp_path / "llama")
    make_llama(vocab_size=40, mask_token_id=None).save_pretrained(folder)
    words = [*settings, "--model.pretrained", folder, "--data.tokenizer", folder, "--num-blocks", "3"]
    words += ["--data.length", "8", "--method", method]
    summary = run_json(capsys, "train", "lm-folder", *words, "--output-dir", str(tmp_path / "run"))
    assert summary["metrics"]["bits_per_character"]["value"] > 0
    run = load_run(tmp_path / "run", [("train.device", "cpu")], with_data=False)
    assert run.model.network.config.vocab_size == 40  # no mask token was added
    if method != "lora":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
        tokens = torch.randint(0, 12, (2, 6))
        torch.testing.assert_close(saved(tokens).logits, run.model.eval()({"input_ids": tokens}))


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(settings, capsys, tmp_path):
    folder = make_tokenizer(tmp_path / "llama")
    make_llama(vocab_size=5, mask_token_id=None).save_pretrained(folder)
    words = [*settings, "--model.pretrained", folder, "--data.tokenizer", folder, "--data.length", "8"]
    assert main(["train", "lm-folder", *words, "--output-dir", str(tmp_path / "run")]) == 2
    assert "knows 5: set data.tokenizer to its own" in capsys.readouterr().err


def test_documents_with_nothing_in_them_are_refused(settings, capsys, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("")
    words = [*SETTINGS, "--data.path", str(folder), "--data.packing", "padded"]
    words += ["--data.cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run")]
    assert main(["train", "lm-pydocs", *words]) == 2
    assert "the text has 0 tokens" in capsys.readouterr().err


def test_the_command_that_plan_prints_for_a_language_model_runs(settings, capsys, tmp_path):
    folder = make_tokenizer(tmp_path / "llama")
    make_llama(vocab_size=40, mask_token_id=None, num_hidden_layers=3).save_pretrained(folder)
    found = run_json(
        capsys, "plan", "--model", folder, "--sequence-length", "8", "--memory", "1GiB", "--num-blocks", "3"
    )
    command = found["recommendation"]["command"]
    assert "--method full" in command and "--train.precision bf16-true" in command
    words = command.replace(" PATH ", " " + settings[settings.index("--data.path") + 1] + " ").split()[1:]
    more = [*settings[settings.index("--data.cache-dir") :], "--steps", "2", "--evaluation.num-samples", "0"]
    assert main([*words, *more, "--output-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a {3}"], "blanks such as {5} are for masked diffusion"),
        (["--prompt", "one two three four five"], "exceed the network's window of 16"),
        (["--length", "17"], "17 tokens exceed"),
        (["--steps", "3"], "--steps has no meaning here"),
    ],
)
def test_mistakes_in_sampling_get_one_clear_line(trained, capsys, arguments, words):
    assert main(["sample", str(trained), *arguments]) == 2
    assert words in capsys.readouterr().err


SETTINGS_OF_BLOCKS = ["--evaluation.levels-per-block", "2", "--num-blocks", "3"]


@pytest.mark.parametrize("preset", ["paper", "information", "features"])
def test_blocks_of_next_token_denoisers_on_the_command_line(settings, preset, capsys, tmp_path):
    """Trained, evaluated, sampled and exported, under the same names as every run."""
    folder = str(tmp_path / "run")
    words = ["--preset", preset, "--method", "diffusionblocks", *SETTINGS_OF_BLOCKS]
    summary = run_json(capsys, "train", "lm-pydocs", *settings, *words, "--output-dir", folder)
    metrics = summary["metrics"]
    assert summary["num_blocks"] == 3
    of_block = "nats_block_" if preset == "features" else "share_block_"
    names = {"nats_per_token", "perplexity", "bits_per_byte", "entropy", "repetition_4", "distinct_2_real"}
    assert names | {f"{of_block}{i}" for i in range(3)} | {f"scrambled_block_{i}" for i in range(3)} <= set(metrics)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(metrics["nats_per_token"]["value"]))
    again = run_json(capsys, "evaluate", folder)["metrics"]
    assert again == metrics
    found = run_json(capsys, "sample", folder, "--num", "2", "--prompt", "One two", "--length", "12", "--top-k", "5")
    assert all(text.startswith("One two") for text in found["texts"]) and found["tokens_per_second"] > 0
    noisy = 6 * 5 if preset == "paper" else 0  # for the tokens behind the prompt
    assert found["layer_evaluations_per_text"] == 6 * 12 + noisy
    walks = preset != "features"
    assert main(["sample", folder, "--num", "1", "--steps", "2", "--length", "4"]) == (0 if walks else 2)
    capsys.readouterr()
    code = main(["export", folder, "--output", str(tmp_path / "plain")])
    if preset == "features":
        from transformers import AutoModelForCausalLM

        assert code == 0
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        run = load_run(tmp_path / "run", [("train.device", "cpu")], with_data=False)
        tokens = torch.randint(0, 12, (2, 6))
        torch.testing.assert_close(plain(tokens).logits, run.model.eval().network(tokens).logits)
    else:
        assert code == 2
        assert "no ordinary language model" in capsys.readouterr().err


def test_stop_strings_and_streaming(trained, capsys):
    plain = run_json(capsys, "sample", str(trained), "--num", "3", "--prompt", "One", "--seed", "2")
    stop = plain["texts"][0][8]
    found = run_json(capsys, "sample", str(trained), "--num", "3", "--prompt", "One", "--seed", "2", "--stop", stop)
    for text, whole in zip(found["texts"], plain["texts"], strict=True):
        cut = whole.find(stop, 3)
        assert text == (whole if cut < 0 else whole[:cut])
    capsys.readouterr()
    words = ["sample", str(trained), "--num", "1", "--prompt", "One", "--seed", "2", "--stream"]
    assert main(words) == 0
    shown = capsys.readouterr()
    alone = run_json(capsys, *words[:-1])["texts"][0]
    assert shown.out == alone + "\n" and "tokens/s" in shown.err
    assert main(["sample", str(trained), "--num", "2", "--stream"]) == 2
    assert "--stream writes one text" in capsys.readouterr().err


def test_all_presets_in_one_table(settings, capsys, tmp_path):
    """At equal layer evaluations: the paper's second sequence and the heads of features cost steps."""
    names = ["end-to-end", "diffusionblocks-features", "diffusionblocks-information", "diffusionblocks-paper"]
    words = ["--methods", ",".join(names), *SETTINGS_OF_BLOCKS, "--steps", "12", "--evaluation.num-samples", "0"]
    words += ["--jobs", "2", "--output-dir", str(tmp_path / "compare")]
    found = run_json(capsys, "compare", "lm-pydocs", *settings, *words)["results"]
    assert [result["method"] for result in found] == names
    whole = found[0]["layer_evaluations"]
    assert all(abs(result["layer_evaluations"] / whole - 1) < 0.15 for result in found)
    assert found[3]["samples_seen"] < found[2]["samples_seen"]


def test_mauve_judges_samples_as_the_teacher_sees_them(settings, capsys, tmp_path):
    pytest.importorskip("mauve")
    teacher = make_tokenizer(tmp_path / "teacher")
    make_llama(vocab_size=40, mask_token_id=None).save_pretrained(teacher)
    words = ["--evaluation.teacher", teacher, "--evaluation.mauve", "true", "--evaluation.num-samples", "12"]
    summary = run_json(capsys, "train", "lm-pydocs", *settings, *words, "--output-dir", str(tmp_path / "run"))
    assert 0 < summary["metrics"]["mauve"]["value"] <= 1
    assert (
        main(["train", "lm-pydocs", *settings, "--evaluation.mauve", "true", "--output-dir", str(tmp_path / "no")]) == 2
    )
    assert "set evaluation.teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.attention", "flex_attention", "--device", "cpu"], "cannot train on a CPU"),
        (["--model.attention", "flash"], "model.attention must be one of sdpa, eager, flex_attention"),
        (["--blocks.target-entry", "add"], "take replace or none"),
        (["--sampling.top-k", "-1"], "sampling.top_k must be at least 0"),
        (["--train.branch-at", "0.5"], "train.branch_at needs blocks.context input"),
    ],
)
def test_mistakes_in_training_get_one_clear_line(settings, capsys, tmp_path, arguments, words):
    more = ["--method", "diffusionblocks", "--preset", "features", *arguments, "--output-dir", str(tmp_path / "run")]
    assert main(["train", "lm-pydocs", *settings, *more]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_other_tasks_have_no_presets_of_language_models(capsys, tmp_path):
    assert main(["train", "digits", "--method", "diffusionblocks-features", "--output-dir", str(tmp_path / "x")]) == 2
    assert "diffusionblocks-features is not for the task classification" in capsys.readouterr().err
