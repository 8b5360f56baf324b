"""Laws that hold for every task and every way of training a network for it, over one table.

What is particular to one task is in the file of its name.
"""

import shutil

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.theory.partition import split_layers
from diffusionblocks.training import checkpoint
from tests.conftest import (
    Counting,
    config,
    make_bert,
    make_data,
    make_dit,
    make_gpt2,
    make_llama,
    make_vit,
    same,
    weights,
)

LOOPED = {"target": "recurrent", "prelude": 1, "coda": 1}
SEEN = {"readout": "linear", "target_entry": "replace", "target_table": "trained", "condition_width": 8}
FEATURES = {"context": "features"}
SEEN_BY_HEADS = {"head_layers": 1, "target_entry": "replace", "condition_width": 8}


def recurrent():
    return dblocks.RecurrentLM(iterations=4, mean_iterations=4, truncation=2, num_samples=0)


# name: task, network, data, blocks, options of `convert`
IN_BLOCKS = {
    "classification": (dblocks.Classification, make_vit, make_data, 3, {}),
    "classification, paper": (dblocks.Classification, make_vit, make_data, 3, {"shared": "trained", **SEEN}),
    "classification, features": (dblocks.Classification, make_vit, make_data, 3, {"context": "features"}),
    "images": (dblocks.ImageGeneration, make_dit, make_data, 3, {}),
    "images, shared": (dblocks.ImageGeneration, make_dit, make_data, 3, {"shared": "trained"}),
    "masked": (dblocks.MaskedLM, make_llama, Counting, 3, {"target": "masked"}),
    "masked, encoder": (dblocks.MaskedLM, make_bert, Counting, 3, {"shared": "trained", "condition_width": 8}),
    "next token": (dblocks.CausalLM, make_llama, Counting, 3, {}),
    "next token, paper": (dblocks.CausalLM, make_gpt2, Counting, 3, {"shared": "trained", **SEEN}),
    "next token, features": (dblocks.CausalLM, make_llama, Counting, 3, {**FEATURES, "shared": "trained"}),
    "next token, heads": (dblocks.CausalLM, make_llama, Counting, 3, {**FEATURES, "head_layers": 1}),
    "next token, heads that see z": (dblocks.CausalLM, make_llama, Counting, 3, {**FEATURES, **SEEN_BY_HEADS}),
    "looped": (recurrent, make_llama, Counting, 1, {**LOOPED, "condition_width": 8}),
}
WHOLE = {
    "classification, whole": (dblocks.Classification, make_vit, make_data, "label"),
    "images, whole": (dblocks.ImageGeneration, make_dit, make_data, "image"),
    "masked, whole": (dblocks.MaskedLM, make_llama, Counting, "masked"),
    "next token, whole": (dblocks.CausalLM, make_llama, Counting, "causal"),
    "looped, whole": (recurrent, make_llama, Counting, "recurrent"),
}
EXACT = {
    "classification, exact": (dblocks.Classification, make_vit, make_data, "label"),
    "next token, exact": (dblocks.CausalLM, make_gpt2, Counting, "causal"),
}
EVERY = [*IN_BLOCKS, *WHOLE, *EXACT]
SEVERAL = [name for name in [*IN_BLOCKS, *EXACT] if name != "looped"]


def model_of(name):
    torch.manual_seed(0)
    if name in IN_BLOCKS:
        _, network, _, count, options = IN_BLOCKS[name]
        return dblocks.convert(network(), count, **options)
    _, network, _, target = {**WHOLE, **EXACT}[name]
    parts = take_apart(network(), target)
    if name in EXACT:
        return dblocks.BlockCoordinateModel(parts, split_layers(len(parts.layers), 3))
    own = LOOPED if target == "recurrent" else {"target": target}
    return whole_network(parts, dblocks.BlocksConfig(num_blocks=1, **own))


def trainer_of(name, folder=None, **changes):
    task, _, data, *_ = {**IN_BLOCKS, **WHOLE, **EXACT}[name]
    settings = {"steps": 4, "order": "sweep", "branch_at": 0.0, "ema_decay": 0.9, **changes}
    return dblocks.Trainer(model_of(name), task(), data(), data(16), config(**settings), output_dir=folder)


def trained(name, folder=None, **changes):
    trainer = trainer_of(name, folder, **changes)
    trainer.fit()
    return trainer


def everything(trainer):
    """Weights, averages and optimizer state, of every block and of what they share."""
    states = {f"block {index}": state for index, state in enumerate(trainer.states)}
    states["shared"] = trainer.shared
    return {f"{owner}: {name}": tensor for owner, state in states.items() for name, tensor in state.tensors().items()}


@pytest.mark.parametrize("name", list(IN_BLOCKS))
def test_every_parameter_has_one_owner(name):
    model = model_of(name)
    owners = model.owners()
    assert set(owners) == {parameter for parameter, _ in model.named_parameters()}
    assert set(owners.values()) - {"shared"} == {f"block {index}" for index in range(model.num_blocks)}


@pytest.mark.parametrize("name", SEVERAL)
def test_training_one_block_leaves_everything_of_the_others_bit_identical(name):
    trainer = trainer_of(name, blocks=[1])
    before = {key: tensor.clone() for key, tensor in everything(trainer).items()}
    trainer.fit()
    after = everything(trainer)
    changed = [key for key in after if key not in before or not torch.equal(after[key], before[key])]
    assert {key.split(":")[0] for key in changed} == {"block 1"}


@pytest.mark.parametrize("name", [name for name in IN_BLOCKS if name != "looped"])
def test_blocks_trained_apart_are_those_of_a_run_that_trains_all(name):
    """Each alone, as on a machine of its own: where nothing is shared and no block reads another."""
    together = trained(name)
    if together.model.shared and any(p.requires_grad for p in together.model.shared.parameters()):
        pytest.skip("blocks share parameters that train")
    if together.model.config.context == "features":
        pytest.skip("blocks read the features of those before them, which train too")
    for index in range(3):
        alone = trained(name, blocks=[index])
        assert same(weights(alone.model.block(index)), weights(together.model.block(index)))


@pytest.mark.parametrize("name", SEVERAL)
def test_where_idle_blocks_are_kept_changes_nothing(name, tmp_path):
    plain, away = trained(name), trained(name, tmp_path, residency="disk")
    assert same(weights(plain.model), weights(away.model))


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name, tmp_path):
    settings = {"visit_steps": 2, "checkpoint_every": 2, "keep_checkpoints": 9}
    whole = trained(name, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    first, *later = checkpoint.existing(tmp_path / "stopped")
    assert later
    for folder in later:
        shutil.rmtree(folder)
    resumed = trained(name, tmp_path / "stopped", **settings)
    assert first.is_dir() and resumed.progress.finished
    assert same(everything(whole), everything(resumed))
    assert whole.progress.layer_evaluations == resumed.progress.layer_evaluations


@pytest.mark.parametrize("name", [*IN_BLOCKS, "looped, whole"])
def test_what_is_saved_is_loaded(name, tmp_path):
    trainer = trained(name)
    trainer.use_averages()
    trainer.model.save_pretrained(tmp_path)
    loaded = dblocks.load(tmp_path)
    assert type(loaded) is type(trainer.model)
    assert same(weights(loaded), weights(trainer.model))
    batch = torch.utils.data.default_collate([trainer.eval_data[index] for index in range(8)])
    found, expected = (trainer.task.evaluate(model.eval(), [batch]) for model in (loaded, trainer.model))
    assert found == expected and expected


@pytest.mark.parametrize("name", [*IN_BLOCKS, *EXACT])
def test_training_lowers_the_loss_on_what_it_learns(name):
    settings = {"steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    trainer = trainer_of(name, **settings)
    before = loss_of(trainer)
    trainer.fit()
    after = loss_of(trainer)
    assert after.value < before.value - 4 * after.stderr


def loss_of(trainer):
    metrics = trainer.evaluate(trainer.eval_data)
    return next(metrics[name] for name in ("validation_loss", "nats_per_token") if name in metrics)


@pytest.mark.parametrize("name", ["classification", "images", "masked", "looped", "next token, whole"])
def test_bf16_stays_near_fp32(name):
    full, half = trained(name, learning_rate=1e-3), trained(name, learning_rate=1e-3, precision="bf16")
    for metric, found in full.evaluate(full.eval_data).items():
        near = half.evaluate(half.eval_data)[metric].value
        assert near == pytest.approx(found.value, rel=0.1, abs=0.1), metric
