"""Laws of levels, partition, preconditioning and samplers."""

import math

import pytest
import torch

from diffusionblocks.errors import UserError
from diffusionblocks.theory import grids
from diffusionblocks.theory.categorical import ancestral
from diffusionblocks.theory.noise import Information, LogNormal, MaskingSchedule
from diffusionblocks.theory.ode import euler
from diffusionblocks.theory.partition import Partition, split_layers
from diffusionblocks.theory.precondition import LOSS_WEIGHTS, coefficients, edm_weight, euler_step
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import CategoricalTarget, add_noise, label_table

DISTRIBUTIONS = {
    "log-normal": LogNormal(),
    "linear": MaskingSchedule("linear"),
    "cosine": MaskingSchedule("cosine"),
    "information": Information(label_table(10, 32)),
}


@pytest.fixture(params=DISTRIBUTIONS, ids=list(DISTRIBUTIONS))
def levels(request):
    return DISTRIBUTIONS[request.param]


# [DB] section 3.3 with P_mean -1.2, P_std 1.2, sigma in [0.002, 80].
REFERENCE = {
    2: [0.002, 0.3012, 80],
    3: [0.002, 0.179632, 0.505041, 80],
    4: [0.002, 0.134076, 0.3012, 0.676649, 80],
    6: [0.002, 0.09434, 0.179632, 0.3012, 0.505041, 0.961665, 80],
}


@pytest.mark.parametrize("num_blocks", REFERENCE)
def test_boundaries_equal_the_reference_table(num_blocks):
    boundaries = Partition(LogNormal(), num_blocks).boundaries
    torch.testing.assert_close(boundaries, torch.tensor(REFERENCE[num_blocks], dtype=torch.float64), rtol=3e-5, atol=0)


def test_level_and_mass_are_inverse_and_increasing(levels):
    mass = torch.linspace(0, 1, 1001, dtype=torch.float64)
    level = levels.level(mass)
    torch.testing.assert_close(levels.mass(level), mass, atol=1e-6, rtol=0)
    assert bool((level.diff() > 0).all())
    assert level[0].item() == pytest.approx(levels.lowest, abs=1e-9)
    assert level[-1].item() == pytest.approx(levels.highest)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_every_block_owns_the_same_mass_and_block_zero_the_noisiest(levels, num_blocks):
    partition = Partition(levels, num_blocks)
    drawn = levels.level(torch.linspace(1e-4, 1 - 1e-4, 30_000, dtype=torch.float64))
    counts = torch.bincount(partition.block_of(drawn), minlength=num_blocks)
    assert counts.min() > 0.99 * 30_000 / num_blocks
    assert partition.block_of(torch.tensor([levels.highest, levels.lowest])).tolist() == [0, num_blocks - 1]
    highs = [partition.range(b).high for b in range(num_blocks)]
    assert highs == sorted(highs, reverse=True)


def test_block_of_a_sampled_level_is_its_block_or_a_neighbour_by_overlap(levels):
    for overlap in (0.0, 0.1):
        partition = Partition(levels, 4, overlap)
        for block in range(4):
            sampled = partition.sample(block, 4000, generator=torch.Generator().manual_seed(block))
            owners = partition.block_of(sampled)
            assert int((owners - block).abs().max()) <= (1 if overlap else 0)
            assert (owners == block).float().mean() > (0.6 if overlap else 0.999)
            span = partition.range(block, widened=True)
            assert sampled.min() >= span.low * (1 - 1e-5)
            assert sampled.max() <= span.high * (1 + 1e-5)


def test_boundary_levels_round_trip_in_single_precision(levels):
    partition = Partition(levels, 3)
    tops = torch.tensor(grids.equal_mass_tops(levels, 3))
    assert partition.block_of(tops).tolist() == [0, 1, 2]


def test_overlap_widens_by_gamma_in_log_sigma():
    plain, wide = Partition(LogNormal(), 3, 0.0).range(1), Partition(LogNormal(), 3, 0.1).range(1, widened=True)
    length = math.log(plain.high / plain.low)
    assert math.log(plain.low / wide.low) == pytest.approx(0.1 * length)
    assert math.log(wide.high / plain.high) == pytest.approx(0.1 * length)
    assert Partition(LogNormal(), 3, 0.1).range(0, widened=True).high == 80.0


def test_levels_outside_the_support_are_refused():
    with pytest.raises(UserError, match="outside"):
        Partition(LogNormal(), 3).block_of(torch.tensor([0.1, 100.0]))


def test_information_mass_is_the_share_of_entropy_that_noise_hides():
    levels = Information(label_table(10, 32))
    sigma = levels.level(torch.tensor(0.5)).item()
    generator = torch.Generator().manual_seed(3)
    table, labels = label_table(10, 32), torch.randint(10, (20_000,), generator=generator)
    z = add_noise(table[labels], torch.full((20_000,), sigma), generator=generator)
    hidden = torch.nn.functional.cross_entropy(z @ table.T / sigma**2, labels)
    assert hidden.item() / math.log(10) == pytest.approx(0.5, abs=0.02)


def test_information_of_a_sure_prior_reveals_earlier():
    table = label_table(4, 8)
    even, sure = Information(table), Information(table, torch.tensor([0.97, 0.01, 0.01, 0.01]))
    assert sure.level(torch.tensor(0.5)) < even.level(torch.tensor(0.5))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_coefficients_keep_unit_variance(sigma_data):
    sigma = torch.logspace(-2, 1, 20, dtype=torch.float64)
    c = coefficients(sigma, sigma_data)
    torch.testing.assert_close(c.input**2 * (sigma**2 + sigma_data**2), torch.ones_like(sigma))
    # The effective training target of net has unit variance ([EDM] eq. 116), so lambda c_out^2 = 1.
    torch.testing.assert_close(edm_weight(sigma, sigma_data) * c.out**2, torch.ones_like(sigma))
    torch.testing.assert_close((1 - c.skip) ** 2 * sigma_data**2 + c.skip**2 * sigma**2, c.out**2)


def test_loss_weights_differ_as_named():
    losses, sigma = torch.rand(5), torch.rand(5) + 0.1
    assert LOSS_WEIGHTS["none"](losses, sigma) == losses.mean()
    torch.testing.assert_close(LOSS_WEIGHTS["edm"](losses, sigma), (losses * edm_weight(sigma)).mean())


def test_a_perfect_denoiser_lands_exactly_on_the_target_plus_noise():
    y, eps = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    sigma, lower = torch.full((6,), 4.0, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(euler_step(y + 4.0 * eps, y, sigma, lower), y + 0.3 * eps)


def test_euler_with_a_perfect_denoiser_keeps_its_noise_over_the_whole_grid():
    y, eps = torch.randn(5, 4), torch.randn(5, 4)
    seen = {}

    def perfect(z, level):
        seen[level] = z
        return DenoiserOutput(y, y)

    levels = grids.equal_mass(LogNormal(), 7)
    euler(perfect, y + levels[0] * eps, levels)
    assert levels[0] == 80.0
    assert levels[-1] == pytest.approx(0.002)
    for level, z in seen.items():
        torch.testing.assert_close(z, y + level * eps, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 5])
def test_ancestral_sampling_is_exact_for_an_exact_posterior_at_any_number_of_steps(steps):
    table, prior = label_table(4, 8), torch.tensor([0.55, 0.25, 0.15, 0.05])
    target = CategoricalTarget(table, trainable=False, bayes=True)

    def exact(z, level):
        raw = prior.log().expand(len(z), 4)
        logits = target.logits(raw, z, torch.full((len(z),), level))
        return DenoiserOutput(target.estimate(logits), raw, logits)

    levels = grids.equal_mass(Information(table, prior), steps)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 8, generator=generator) * levels[0]
    final = ancestral(target)(exact, z, [*levels, 0.0], generator=generator)
    shares = torch.bincount((final @ table.T).argmax(-1), minlength=4) / 20_000
    torch.testing.assert_close(shares, prior, atol=0.015, rtol=0)


def test_bayes_readout_is_the_exact_posterior():
    table = label_table(5, 16)
    target = CategoricalTarget(table, trainable=False, bayes=True)
    z, sigma = torch.randn(7, 16), torch.rand(7) + 0.2
    prior = torch.randn(7, 5).log_softmax(-1)
    likelihood = -((z[:, None] - table) ** 2).sum(-1) / (2 * sigma[:, None] ** 2)
    torch.testing.assert_close(target.logits(prior, z, sigma).softmax(-1), (prior + likelihood).softmax(-1))


def test_label_tables_have_unit_rows_and_are_orthonormal_where_they_fit():
    for num_classes, width in ((10, 16), (40, 16)):
        table = label_table(num_classes, width)
        torch.testing.assert_close(table.norm(dim=1), torch.ones(num_classes))
    table = label_table(10, 16)
    torch.testing.assert_close(table @ table.T, torch.eye(10), atol=1e-5, rtol=0)


def test_layers_split_evenly_or_as_given():
    assert split_layers(12, 3) == [range(0, 4), range(4, 8), range(8, 12)]
    assert split_layers(12, 3, [3, 6, 3]) == [range(0, 3), range(3, 9), range(9, 12)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((12, 5), "1, 2, 3, 4, 6, 12"), ((12, 24), "1, 2, 3"), ((12, 3, [4, 4]), "sum"), ((12, 2, [12, 0]), "positive")],
)
def test_impossible_splits_say_what_would_work(arguments, words):
    with pytest.raises(UserError, match=words):
        split_layers(*arguments)
