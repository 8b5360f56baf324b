"""Image generation on the command line: train, sample, continue one block, export, latents, mistakes."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusionblocks.cli import main
from diffusionblocks.evaluation import features
from tests.cli.test_cli import SUMMARY_KEYS, fails, run
from tests.conftest import make_dit

SMALL = [
    "--model.hidden-size", "16", "--model.num-hidden-layers", "6", "--model.num-attention-heads", "2",
    "--steps", "6", "--batch-size", "16", "--train.checkpoint-every", "6", "--train.visit-steps", "2",
    "--sampling.steps", "3", "--evaluation.levels-per-image", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return [*SMALL, "--data.cache-dir", str(tmp_path_factory.mktemp("cache")), "--evaluation.num-samples", "70"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("run") / "dit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", 10)
        assert main(["train", "dit-digits", *settings, "--output-dir", str(folder), "--json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(features, "STEPS", 10)


def test_a_run_is_summarised_with_the_metrics_of_its_samples(trained, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    own = {f"{kind}_block_{block}" for kind in ("loss", "bits") for block in range(3)}
    distances = {f"{kind}_distance{of}" for kind in ("feature", "kernel") for of in ("", "_train")}
    of_samples = distances | {"class_accuracy", "class_accuracy_real"}
    assert set(summary["metrics"]) == {"validation_loss", "bits_per_dimension"} | own | of_samples
    assert "fid" not in summary["metrics"]
    code, out, _ = run(capsys, "evaluate", trained, "--json")
    assert code == 0
    again = json.loads(out)["metrics"]
    for name, metric in summary["metrics"].items():
        assert again[name]["value"] == pytest.approx(metric["value"], rel=1e-4), name


def test_a_finished_run_is_evaluated_with_other_samples(trained, capsys):
    once = json.loads((trained / "summary.json").read_text())["metrics"]["feature_distance"]["value"]
    code, out, _ = run(capsys, "evaluate", trained, "--evaluation.sample-sets", 3, "--json")
    assert json.loads(out)["metrics"]["feature_distance"]["value"] <= once * 1.0001
    words = ["--evaluation.num-samples", 90, "--sampling.guidance", 2, "--evaluate-on", "validation", "--device", "cpu"]
    code, out, err = run(capsys, "evaluate", trained, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["sampling"]["num_samples"], found["sampling"]["guidance"]) == (90, 2)
    assert found["evaluated_on"] == "validation"
    assert "train.steps cannot be changed after training" in fails(capsys, "evaluate", trained, "--steps", 5)


def test_sampling_and_exporting_need_no_data(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusionblocks.experiments.run.load_data", lambda *_: pytest.fail("data was read"))
    assert run(capsys, "sample", trained, "--num", 2, "--output", tmp_path / "x.png")[0] == 0
    assert run(capsys, "export", trained, "--block", 0, "--output", tmp_path / "x.safetensors")[0] == 0


def test_sample_writes_a_grid_and_says_what_it_did(trained, capsys, tmp_path):
    output = tmp_path / "grid.png"
    words = ["--num", 9, "--class", "3", "--guidance", 2.0, "--steps", 5, "--sampler", "euler", "--output", output]
    code, out, _ = run(capsys, "sample", trained, *words, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["classes"] == ["3"] * 9
    assert found["layer_evaluations_per_image"] == 5 * 2 * 2  # steps, layers of a block, with and without the class
    picture = np.asarray(Image.open(output))
    assert picture.ndim == 2 and min(picture.shape) >= 400
    code, out, _ = run(capsys, "sample", trained, "--num", 4)
    assert code == 0
    assert (trained / "samples.png").is_file()


def test_npz_has_the_layout_of_the_adm_evaluator(trained, capsys, tmp_path):
    output = tmp_path / "samples.npz"
    assert run(capsys, "sample", trained, "--num", 12, "--class", "1,7", "--output", output)[0] == 0
    found = np.load(output)
    assert found["arr_0"].shape == (12, 8, 8, 3)
    assert found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == [1, 7] * 6


def test_the_report_shows_images_and_their_way(trained, capsys, tmp_path):
    assert run(capsys, "report", trained, "--output", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Generated images" in page and "From noise to image" in page
    assert page.count("<svg") >= 7
    assert "<script" not in page and "<link" not in page


def test_compare_gives_all_methods_the_same_layer_evaluations(settings, capsys, tmp_path):
    words = ["--methods", "shallow,diffusionblocks-paper", "--evaluation.num-samples", 0, "--jobs", 2]
    code, out, _ = run(capsys, "compare", "dit-digits", *settings, *words, "--output-dir", tmp_path, "--json")
    assert code == 0
    results = json.loads(out)["results"]
    assert {round(result["layer_evaluations"]) for result in results} == {6 * 6 * 16}
    assert [result["num_blocks"] for result in results] == [1, 3]
    network = DiTTransformer2DModel.from_pretrained(tmp_path / "shallow" / "seed-0" / "model")
    assert len(network.transformer_blocks) == 2


def test_one_block_goes_on_with_new_data_and_the_others_stay_byte_identical(trained, settings, capsys, tmp_path):
    words = ["--model.start", trained, "--train.blocks", "[1]", "--seed", 5, "--evaluation.num-samples", 0]
    code, out, _ = run(capsys, "train", "dit-digits", *settings, *words, "--output-dir", tmp_path / "on", "--json")
    assert code == 0
    assert json.loads(out)["block_steps"] == 6
    before, after = (load_file(str(folder / "model" / "model.safetensors")) for folder in (trained, tmp_path / "on"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1"}
    assert run(capsys, "evaluate", tmp_path / "on")[0] == 0
    words = ["--model.start", trained, "--train.branch-at", 0.5, "--output-dir", tmp_path / "x"]
    assert "set it to 0" in fails(capsys, "train", "dit-digits", *settings, *words)
    line = fails(capsys, "train", "dit-digits", *settings, "--num-blocks", 2, "--model.start", trained,
                 "--output-dir", tmp_path / "x")  # fmt: skip
    assert "are of another network or conversion" in line
    assert not (tmp_path / "x").exists()


def test_all_blocks_go_on_from_what_they_were(trained, settings, capsys, tmp_path):
    words = ["--model.start", trained, "--train.learning-rate", 1e-12, "--evaluation.num-samples", 0]
    assert run(capsys, "train", "dit-digits", *settings, *words, "--output-dir", tmp_path / "on")[0] == 0
    before, after = (load_file(str(folder / "model" / "model.safetensors")) for folder in (trained, tmp_path / "on"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)  # no branching over them


def test_a_comma_separated_list_of_blocks_is_read(trained, settings, capsys, tmp_path):
    words = ["--train.blocks", "0,2", "--evaluation.num-samples", 0]
    code, out, _ = run(capsys, "train", "dit-digits", *settings, *words, "--output-dir", tmp_path / "on", "--json")
    assert code == 0
    assert json.loads(out)["block_steps"] == 12


def test_export_writes_one_block(trained, capsys, tmp_path):
    assert run(capsys, "export", trained, "--block", 1, "--output", tmp_path / "one.safetensors")[0] == 0
    block, whole = load_file(str(tmp_path / "one.safetensors")), load_file(str(trained / "model" / "model.safetensors"))
    named = {name.replace("readout.embedder", "layers.0.layer.norm1.emb"): tensor for name, tensor in block.items()}
    assert block and all(torch.equal(tensor, whole[f"blocks.1.{name}"]) for name, tensor in named.items())
    assert "block 3 does not exist" in fails(capsys, "export", trained, "--block", 3)


def test_latents_train_and_are_decoded(settings, capsys, tmp_path):
    torch.manual_seed(0)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(in_channels=1, out_channels=1, latent_channels=2, norm_num_groups=2, block_out_channels=(4, 4))
    AutoencoderKL(**sizes, **kinds, scaling_factor=1.0).save_pretrained(tmp_path / "vae")
    words = ["--data.vae", tmp_path / "vae", "--output-dir", tmp_path / "run"]
    line = fails(capsys, "train", "dit-digits", *settings, *words, "--data.image-size", 9)
    assert "must be divisible by 2" in line
    line = fails(capsys, "train", "dit-digits", *settings, *words, "--model.patch-size", 3)
    assert "the latent size 4 is not divisible by model.patch_size 3" in line
    line = fails(capsys, "train", "dit-digits", *settings, *words)
    scale = line.rsplit(" ", 1)[1]
    assert "set data.latent_scale to" in line
    code, out, _ = run(capsys, "train", "dit-digits", *settings, *words, "--data.latent-scale", scale, "--json")
    assert code == 0
    assert "bits_per_dimension" not in json.loads(out)["metrics"]
    assert run(capsys, "sample", tmp_path / "run", "--num", 3, "--output", tmp_path / "x.npz")[0] == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 3)


def test_a_pretrained_transformer_is_adapted(settings, capsys, tmp_path):
    make_dit(num_embeds_ada_norm=10).save_pretrained(tmp_path / "dit")
    words = ["--model.pretrained", tmp_path / "dit", "--evaluation.num-samples", 0, "--json", "--output-dir"]
    code, out, _ = run(capsys, "train", "dit-digits", *settings, *words, tmp_path / "lora", "--method", "lora")
    assert code == 0
    assert json.loads(out)["method"] == "lora"
    assert run(capsys, "train", "dit-digits", *settings, *words, tmp_path / "blocks")[0] == 0
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "dit").rename(tmp_path / "pipeline" / "transformer")  # as in the repository of a pipeline
    words = ["--model.pretrained", tmp_path / "pipeline", "--evaluation.num-samples", 0]
    code, _, err = run(capsys, "train", "dit-digits", *settings, *words, "--output-dir", tmp_path / "again")
    assert code == 0, err
    (tmp_path / "pipeline" / "transformer").rename(tmp_path / "dit")
    make_dit(in_channels=4).save_pretrained(tmp_path / "latent")
    words = ["--model.pretrained", tmp_path / "latent", "--output-dir", tmp_path / "no"]
    assert "reads latents: set data.vae" in fails(capsys, "train", "dit-digits", *settings, *words)
    line = fails(capsys, "train", "digits", "--model.pretrained", tmp_path / "dit", "--output-dir", tmp_path / "no")
    assert "the task classification cannot train a DiTTransformer2DModel" in line


def test_plan_shows_blocks_of_a_diffusion_transformer(settings, capsys, tmp_path):
    code, out, _ = run(capsys, "plan", "dit-digits", *SMALL, "--memory", "1GiB", "--num-blocks", 3, "--json")
    assert code == 0
    rows = {(row["method"], row["num_blocks"]): row for row in json.loads(out)["rows"]}
    assert "exact" not in {method for method, _ in rows}
    assert rows["diffusionblocks", 3]["inference_layers"] == 2
    assert rows["diffusionblocks", 3]["predicted"]["total"] < rows["end-to-end", 1]["predicted"]["total"]
    make_dit().save_pretrained(tmp_path / "dit")
    code, out, _ = run(
        capsys, "plan", "--model", tmp_path / "dit", "--data.source", "digits", "--num-blocks", 2, "--json"
    )
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.image-size", "9"], "data.image_size 9 is not divisible by model.patch_size 2"),
        (["--evaluation.num-samples", "60"], "needs at least 65 samples, got 60"),
        (["--sampling.sampler", "eular"], "sampling.sampler must be one of"),
        (["--task.guidence", "2"], "did you mean 'sampling.guidance'"),
        (["--task.kind", "image-gen"], "did you mean 'image-generation'"),
        (["--method", "exact"], "exact cannot train a DiT"),
        (["--blocks.readout", "linear"], "blocks.readout is for networks that denoise labels"),
        (["--model.model-class", "ViTForImageClassification"], "cannot train a ViTForImageClassification"),
        (["--model.start", "/nowhere"], "holds no saved DiffusionBlocks model"),
        (["--train.blocks", "3"], "block 3 does not exist"),
        (["--evaluation.inception", "/nowhere.pt"], "--trust-inception"),
        (["--evaluation.inception", "/nowhere.pt", "--trust-inception"], "cannot load /nowhere.pt"),
        (["--objective.label-dropout", "1.5"], "objective.label_dropout must be at least 0 and at most 1"),
        (["--objective.label-dropout", "0", "--sampling.guidance", "2"], "guidance needs a null class"),
        (["--sampling.steps", "0"], "at least 1"),
        (["--data.test-share", "0.03"], "needs at least 65 reference images, got 54"),
        (["--model.hidden-size", "18"], "must be divisible by 4"),
    ],
)
def test_mistakes_get_one_clear_line(settings, capsys, tmp_path, arguments, words):
    assert words in fails(capsys, "train", "dit-digits", *settings, *arguments, "--output-dir", tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "10"], "class 10 does not exist: classes are 0 to 9"),
        (["--class", "cat"], "unknown class 'cat'"),
        (["--num", "0"], "--num must be at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--sampler", "ddim"], "sampling.sampler must be one of"),
        (["--output", "x.jpg"], "must end in .png"),
    ],
)
def test_mistakes_in_sampling_get_one_clear_line(trained, capsys, arguments, words):
    assert words in fails(capsys, "sample", trained, *arguments)
