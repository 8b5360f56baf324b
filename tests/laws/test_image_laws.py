"""Laws of image denoisers: function, borders, levels, labels, likelihood."""

import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusionblocks as dblocks
from diffusionblocks.blocks.images import timestep
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.theory import grids
from diffusionblocks.theory.likelihood import image_bound
from diffusionblocks.theory.noise import LogNormal
from diffusionblocks.theory.ode import SAMPLERS
from diffusionblocks.theory.partition import Partition
from diffusionblocks.theory.precondition import coefficients
from diffusionblocks.theory.sampler import DenoiserOutput
from tests.conftest import config, make_data, make_dit, make_vit, same, weights

BATCH = make_data(6).__getitems__(list(range(6)))
LEVELS = torch.tensor([0.01, 0.1, 0.3, 1.0, 5.0, 60.0])


def whole(**changes):
    return whole_network(take_apart(make_dit(**changes)), dblocks.BlocksConfig())


def randomised(model):
    """No weight is zero, so that every path shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


# ---------------------------------------------------------------- conversion


def test_conversion_keeps_the_network_s_function():
    network = randomised(make_dit()).eval()
    before = copy.deepcopy(network.state_dict())
    z = torch.randn(6, 1, 8, 8)
    scaled = coefficients(LEVELS).input[:, None, None, None] * z
    expected = network(scaled, timestep(LEVELS), BATCH["labels"]).sample
    inputs = {"noisy_target": z, "labels": BATCH["labels"]}
    for model in (dblocks.convert(network, 1), whole_network(take_apart(network), dblocks.BlocksConfig())):
        torch.testing.assert_close(model.eval().denoiser(0)(inputs, LEVELS).raw, expected)
    assert same(before, network.state_dict())


def test_a_block_is_the_ordinary_network_of_its_layers():
    network = randomised(make_dit())
    blocks = dblocks.convert(network, 3)
    shallow = copy.deepcopy(network)
    del shallow.transformer_blocks[:2], shallow.transformer_blocks[2:]
    z, labels = torch.randn(6, 1, 8, 8), BATCH["labels"]
    scaled = coefficients(LEVELS).input[:, None, None, None] * z
    expected = shallow.eval()(scaled, timestep(LEVELS), labels).sample
    found = blocks.eval().denoiser(1)({"noisy_target": z, "labels": labels}, LEVELS).raw
    torch.testing.assert_close(found, expected)
    assert sum(p.numel() for p in blocks.block(1).parameters()) == sum(p.numel() for p in shallow.parameters())


@pytest.mark.parametrize("shared", ["copies", "trained", "frozen"])
def test_every_parameter_has_one_owner_and_no_gradient_crosses_a_border(shared):
    blocks = dblocks.convert(randomised(make_dit()), 3, shared=shared)
    owners = blocks.owners()
    assert set(owners) == {name for name, _ in blocks.named_parameters()}
    blocks.denoiser(1)(BATCH, LEVELS).loss.backward()
    touched = {owners[name] for name, p in blocks.named_parameters() if p.grad is not None}
    assert touched == ({"block 1", "shared"} if shared == "trained" else {"block 1"})
    own = [p for name, p in blocks.named_parameters() if owners[name] == "block 1"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own if p.numel() > 100)


def test_a_perfect_network_has_no_loss_and_one_that_knows_the_variance_has_loss_one():
    blocks = dblocks.convert(make_dit(), 2)
    with torch.no_grad():
        for name, p in blocks.named_parameters():
            if "readout.projection" in name:
                p.zero_()  # F = 0: D = c_skip z
    clean = torch.randn(4000, 1, 8, 8) * 0.5
    level = LogNormal().level(torch.rand(4000))
    output = blocks.denoiser(0)({"pixel_values": clean, "labels": torch.zeros(4000, dtype=torch.long)}, level)
    assert output.loss.item() == pytest.approx(1.0, abs=0.02)


def test_saved_blocks_and_saved_whole_networks_are_read_back(tmp_path):
    blocks = dblocks.convert(randomised(make_dit()), 3)
    blocks.save_pretrained(tmp_path / "blocks")
    loaded = dblocks.load(tmp_path / "blocks")
    assert same(weights(blocks), weights(loaded))
    model = whole_network(take_apart(randomised(make_dit())), dblocks.BlocksConfig(), 2)
    model.save_pretrained(tmp_path / "whole")
    network = DiTTransformer2DModel.from_pretrained(tmp_path / "whole").eval()  # without this package
    assert len(network.transformer_blocks) == 2
    z = torch.randn(6, 1, 8, 8)
    c = coefficients(LEVELS[:, None, None, None])
    raw = network(c.input * z, timestep(LEVELS), BATCH["labels"]).sample
    inputs = {"noisy_target": z, "labels": BATCH["labels"]}
    torch.testing.assert_close(model.eval().denoiser(0)(inputs, LEVELS).estimate, c.skip * z + c.out * raw)


def test_label_options_and_exact_are_refused_for_images():
    with pytest.raises(dblocks.UserError, match=r"blocks\.readout is for networks that denoise labels"):
        dblocks.convert(make_dit(), 3, readout="linear", condition_width=8)
    with pytest.raises(dblocks.UserError, match="information needs a discrete target"):
        dblocks.convert(make_dit(), 3, levels="information")
    with pytest.raises(dblocks.UserError, match="exact cannot train a DiT"):
        dblocks.BlockCoordinateModel(take_apart(make_dit()), [range(0, 3), range(3, 6)])


def test_uniform_borders_are_even_in_log_sigma():
    ends = Partition(LogNormal(), 4, borders="uniform").boundaries.log()
    torch.testing.assert_close(ends.diff(), torch.full((4,), math.log(40_000) / 4, dtype=torch.float64))


# ---------------------------------------------------------------- labels


def test_labels_are_dropped_once_for_all_layers():
    model = randomised(dblocks.convert(make_dit(), 2)).train()
    inputs = {"noisy_target": torch.randn(6, 1, 8, 8), "labels": BATCH["labels"]}
    outputs = [model.denoiser(0)(inputs, LEVELS).raw for _ in range(8)]
    assert all(torch.equal(outputs[0], other) for other in outputs)  # no layer drops on its own
    null = {**inputs, "labels": torch.full((6,), 4)}
    assert not torch.allclose(model.denoiser(0)(null, LEVELS).raw, outputs[0])
    torch.manual_seed(0)
    dropped = dblocks.ImageGeneration(label_dropout=1.0).step(model, 0, BATCH).loss
    torch.manual_seed(0)
    nulls = {**BATCH, "labels": torch.full((6,), 4)}
    assert dropped == dblocks.ImageGeneration(label_dropout=0.0).step(model, 0, nulls).loss


def test_guidance_moves_away_from_the_unconditional_estimate():
    model = randomised(dblocks.convert(make_dit(), 2)).eval()
    labels = torch.tensor([1, 2, 3])
    null = torch.full((3,), 4)

    def first(guidance, labels):
        seen = []
        task = dblocks.ImageGeneration(sampling_steps=2, guidance=guidance)
        task.sample(model, labels, watch=lambda block, level, z, estimate: seen.append(estimate))
        return seen[0]

    free, conditional = first(1.0, null), first(1.0, labels)
    torch.testing.assert_close(first(3.0, labels), free + 3 * (conditional - free))


# ---------------------------------------------------------------- sampling


class Mixture:
    """Exact denoiser of a mixture of two Gaussians in two dimensions."""

    means = torch.tensor([[0.6, 0.2], [-0.5, -0.3]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    std = 0.1

    def __call__(self, z, level):
        total = self.std**2 + level**2
        logits = self.weights.log() - ((z[:, None] - self.means) ** 2).sum(-1) / (2 * total)
        share = logits.softmax(-1)
        posterior = (self.std**2 * z[:, None] + level**2 * self.means) / total
        return DenoiserOutput((share[..., None] * posterior).sum(1), z)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm-solver++", 2)])
def test_samplers_converge_with_their_order_to_the_exact_flow(name, order):
    levels = LogNormal(sigma_min=0.05, sigma_max=10.0)
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    end = SAMPLERS["heun"](Mixture(), z, grids.rho(levels, 3000))
    steps = [40, 80, 160]
    errors = [(SAMPLERS[name](Mixture(), z, grids.rho(levels, n + 1)) - end).norm(dim=1).median().log2() for n in steps]
    slopes = [(a - b).item() for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_draw_from_the_distribution(name):
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 80
    grid = [*grids.rho(LogNormal(), 60), 0.0]
    found = SAMPLERS[name](Mixture(), z, grid, generator=torch.Generator().manual_seed(1))
    first = (found - Mixture.means[0]).norm(dim=1) < (found - Mixture.means[1]).norm(dim=1)
    assert first.double().mean().item() == pytest.approx(0.3, abs=0.025)
    spread = (found[first] - Mixture.means[0]).std().item()
    assert spread == pytest.approx(Mixture.std, abs=0.02)


def test_rho_grid_has_the_published_levels():
    # Karras et al. 2022, eq. 5 with 18 steps, the setting of their CIFAR-10 results.
    grid = grids.rho(LogNormal(), 18)
    assert grid[:3] == pytest.approx([80.0, 57.58598, 40.78557], rel=1e-5)
    assert grid[-2:] == pytest.approx([0.0075280, 0.002], rel=1e-3)
    assert len(grid) == 18


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_one_block_runs_per_call_chosen_by_the_partition(sampler):
    model, calls = dblocks.convert(make_dit(), 3).eval(), []
    ran = []
    for index in range(3):
        model.block(index).register_forward_hook(lambda *_, index=index: ran.append(index))
    task = dblocks.ImageGeneration(sampler=sampler, sampling_steps=12)
    task.sample(model, torch.tensor([0, 1]), watch=lambda block, level, z, estimate: calls.append((block, level)))
    assert ran == [block for block, _ in calls]
    assert set(ran) == {0, 1, 2}
    assert all(int(model.partition.block_of(torch.tensor(level))) == block for block, level in calls)
    assert max(level for _, level in calls) == 80.0
    evaluations = {"euler": 12, "dpm-solver++": 12, "heun": 23, "churn": 23}
    assert len(ran) == evaluations[sampler]


def test_samples_depend_on_the_seed_alone():
    model = randomised(dblocks.convert(make_dit(), 2)).eval()
    task = dblocks.ImageGeneration(sampler="churn", sampling_steps=4)
    labels = torch.tensor([0, 1])
    torch.manual_seed(1)
    first = task.sample(model, labels, seed=5)
    torch.manual_seed(2)
    assert torch.equal(task.sample(model, labels, seed=5), first)
    assert not torch.allclose(task.sample(model, labels, seed=6), first)


# ---------------------------------------------------------------- evaluation


def test_validation_loss_is_the_mean_over_the_training_levels_and_blocks_share_it():
    data = make_data(48)
    task, batches = dblocks.ImageGeneration(levels_per_image=8), [data.__getitems__(list(range(48)))]
    model = randomised(dblocks.convert(make_dit(), 2)).eval()
    found = task.evaluate(model, batches)
    halves = [found["loss_block_0"].value, found["loss_block_1"].value]
    assert found["validation_loss"].value == pytest.approx(sum(halves) / 2, rel=0.02)
    trained = task.step(model, 0, batches[0])
    assert trained.loss.item() == pytest.approx(halves[0], rel=0.3)
    assert task.evaluate(model, batches) == found  # its noise is its own


@pytest.mark.parametrize("assumed", [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
def test_likelihood_bound_is_the_cross_entropy_of_an_exact_toy(assumed):
    """Images of one pixel with three values; the denoiser is the posterior mean under the assumed distribution."""
    values = torch.tensor([20, 128, 240], dtype=torch.float64) / 127.5 - 1
    true, prior = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor(assumed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean = values[torch.multinomial(true, 3000, replacement=True, generator=generator)].reshape(-1, 1, 1, 1)

    def estimate(block, rows, z, sigma):
        logits = prior.log() - (z.flatten()[:, None] - values) ** 2 / (2 * sigma[:, None].double() ** 2)
        return (logits.softmax(1) @ values).reshape(z.shape)

    partition = Partition(LogNormal(sigma_min=0.0005), 3)  # fine enough to read every pixel off z
    found = image_bound(estimate, clean, partition, levels_per_block=60, generator=generator)
    cross_entropy = -(true * prior.log()).sum().item()
    error = found.total.std().item() / math.sqrt(3000)
    assert found.total.mean().item() == pytest.approx(cross_entropy, abs=max(0.03, 3 * error))
    assert found.blocks.shape == (3000, 3)


def test_pixels_hidden_by_a_high_lowest_level_are_paid_for():
    partition = Partition(LogNormal(sigma_min=1.0), 1)
    clean = torch.zeros(50, 1, 2, 2) + 1 / 255
    found = image_bound(lambda block, rows, z, sigma: clean, clean, partition)
    assert found.pixels.mean().item() > 4 * math.log(256) * 0.8  # next to nothing is read off z


# ---------------------------------------------------------------- training


def test_until_the_branch_a_run_is_that_of_the_shallow_network():
    task, data = dblocks.ImageGeneration(), make_data(48)
    settings = {"batch_size": 16, "learning_rate": 3e-3, "hold": 0.2}
    blocks = dblocks.convert(make_dit(), 3)
    own = {"branch_at": 0.5, "own_batch": 5}  # no third of a batch: another number of steps
    branching = dblocks.Trainer(blocks, task, data, None, config(steps=6, **own, **settings))
    for _ in itertools.islice(branching.visits(), 9):
        pass
    shallow = whole_network(take_apart(make_dit()), dblocks.BlocksConfig(), 2)
    alone = dblocks.Trainer(shallow, task, data, None, config(steps=18, **settings))
    for _ in itertools.islice(alone.visits(), 9):
        pass
    inputs = {"noisy_target": torch.randn(6, 1, 8, 8), "labels": BATCH["labels"]}
    expected = shallow.eval().denoiser(0)(inputs, LEVELS).raw
    assert torch.equal(blocks.eval().denoiser(0)(inputs, LEVELS).raw, expected)
    rates = []
    for visit, _ in branching.visits():
        rates.append(branching.states[visit.block].learning_rate())
    assert rates[-1] == pytest.approx(0) and rates[-4] > 0  # own steps take the rest of the schedule, all of it


def test_before_branching_the_block_that_learns_answers_for_all():
    task, data = dblocks.ImageGeneration(), make_data(48)
    model = dblocks.convert(make_dit(), 3)
    options = config(steps=20, batch_size=16, learning_rate=3e-3, branch_at=0.5)
    trainer = dblocks.Trainer(model, task, data, data, options)
    for visit, _ in itertools.islice(trainer.visits(), 20):
        assert visit.ranges == range(3)
    found = trainer.evaluate(data)
    with trainer.averaged():
        assert all(model.denoiser(i) is model.denoiser(0) for i in range(3))
    assert model.denoiser(1) is not model.denoiser(0)
    own = task.evaluate(model.eval(), [data.__getitems__(list(range(48)))])  # blocks 1 and 2 have learned nothing
    assert found["loss_block_2"].value < 0.9 * own["loss_block_2"].value


def test_averages_of_bf16_weights_move():
    model = dblocks.convert(make_dit(), 1)
    options = config(precision="bf16-true", ema_decay=0.999, steps=400, learning_rate=1e-4)
    state = dblocks.Trainer(model, dblocks.ImageGeneration(), make_data(), None, options).states[0]
    name, weight = next(iter(state.parameters.items()))
    state.steps = 10_000
    state.update_average()
    with torch.no_grad():
        weight.add_(1.0)
    before = state.average[name].clone()
    for _ in range(3):
        state.update_average()
    torch.testing.assert_close(state.average[name] - before, torch.full_like(before, 1 - 0.999**3), rtol=0.2, atol=1e-4)
    own = weight.data
    state.swap_average()
    assert weight.dtype == torch.bfloat16 and weight.data is not own
    state.swap_average()
    assert weight.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("shared", ["copies", "trained"])
@pytest.mark.parametrize("order", ["sweep", "random", "sequential"])
def test_only_the_chosen_blocks_train(order, shared):
    model = randomised(dblocks.convert(make_dit(), 3, shared=shared))
    before = weights(model)
    options = config(steps=3, blocks=[0, 2], order=order, ema_decay=0.5)
    trainer = dblocks.Trainer(model, dblocks.ImageGeneration(), make_data(), None, options)
    progress = trainer.fit()
    assert progress.block_steps == 6
    changed = {name.split(".")[1] for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"0", "2"}


def test_wrong_choices_of_blocks_are_refused():
    model = dblocks.convert(make_dit(), 3)
    task, data = dblocks.ImageGeneration(), make_data()
    with pytest.raises(dblocks.UserError, match="block 3 does not exist; there are blocks 0 to 2"):
        dblocks.Trainer(model, task, data, None, config(blocks=[0, 3]))
    with pytest.raises(dblocks.UserError, match="names a block twice"):
        dblocks.Trainer(model, task, data, None, config(blocks=[1, 1]))
    with pytest.raises(dblocks.UserError, match=r"with train\.blocks set it to 0"):
        dblocks.Trainer(model, task, data, None, config(blocks=[1], branch_at=0.5))


def test_an_exported_block_fits_its_own_model_only(tmp_path):
    model, other = randomised(dblocks.convert(make_dit(), 3)), dblocks.convert(make_dit(), 3)
    path = tmp_path / "block.safetensors"
    model.save_block(1, path)
    kept = load_file(str(path))  # one name for what two parts share
    assert same(kept, {name: tensor for name, tensor in model.block(1).state_dict().items() if name in kept})
    with safe_open(str(path), "pt") as stream:
        twice = {**kept, "layers.0.layer.norm1.emb.class_embedder.embedding_table.weight": torch.zeros(5, 16)}
        facts = {name: fact for name, fact in stream.metadata().items() if name != "blake2b"}  # as older versions wrote
        save_file(twice, str(tmp_path / "twice.safetensors"), metadata=facts)
    with pytest.raises(dblocks.UserError, match="apart in the file, are one tensor now"):
        other.load_block(tmp_path / "twice.safetensors")
    before = weights(other)
    assert other.load_block(path) == 1
    changed = {name.split(".")[1] for name, tensor in weights(other).items() if not torch.equal(tensor, before[name])}
    assert changed == {"1"}
    with pytest.raises(dblocks.UserError, match="split in another way"):
        dblocks.convert(make_dit(), 2).load_block(path)
    code = (
        "import sys; import diffusionblocks as dblocks; from tests.conftest import make_dit; "
        "print(dblocks.convert(make_dit(), 3).load_block(sys.argv[1]))"
    )
    for seed in "12":  # what diffusers notes in a config depends on the process
        command = [sys.executable, "-c", code, str(path)]
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert found.stdout.strip() == "1", found.stderr
    vit = dblocks.convert(make_vit(), 3)
    vit.save_block(0, tmp_path / "vit.safetensors")
    assert vit.load_block(tmp_path / "vit.safetensors") == 0
    model.save_pretrained(tmp_path)
    with pytest.raises(dblocks.UserError, match="no exported block"):
        other.load_block(tmp_path / "model.safetensors")
    with pytest.raises(dblocks.UserError, match="cannot read the block"):
        other.load_block(tmp_path / "nothing.safetensors")


def test_whole_networks_train_and_lora_leaves_the_network_frozen():
    from diffusionblocks.methods.lora import lora_model

    model = lora_model(make_dit(), 2, 4, train_readout=False, blocks=dblocks.BlocksConfig())
    trainer = dblocks.Trainer(model, dblocks.ImageGeneration(), make_data(), None, config(steps=2))
    names = set(trainer.states[0].parameters)
    assert names and all("lora" in name for name in names)
    before = weights(model)
    trainer.fit()
    after = weights(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora" in name for name in changed)
