"""Laws of masked diffusion: masks, the bound, attention, sampling."""

import copy
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import diffusionblocks as dblocks
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.masked import Answers, hide
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.tasks.masked_lm import most_masked
from diffusionblocks.theory import unmasking
from diffusionblocks.theory.choice import TokenChoice
from diffusionblocks.theory.noise import MaskingSchedule
from diffusionblocks.theory.partition import Partition
from tests.conftest import (
    Counting,
    config,
    make_bert,
    make_gpt2,
    make_llama,
    make_neox,
    make_roberta,
    make_vit,
    same,
    weights,
)

MASK = 12
NETWORKS = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "neox": make_neox,
    "bert": make_bert,
    "roberta": make_roberta,
}


def whole(network=None, num_layers=None, **options):
    parts = take_apart(network or make_llama(), "masked")
    return whole_network(parts, dblocks.BlocksConfig(**options), num_layers)


def blocks(network=None, num_blocks=3, **options):
    return dblocks.convert(network or make_llama(), num_blocks, target="masked", **options)


def texts(count=5, length=16):
    return torch.randint(0, 12, (count, length), generator=torch.Generator().manual_seed(2))


def batches(count=40, length=16):
    return [{"input_ids": texts(count, length)}]


# ---------------------------------------------------------------- masks


def test_exact_masks_hide_the_share_that_is_asked_for_and_never_padding():
    real = torch.ones(4, 20, dtype=torch.long)
    real[3, 10:] = 0
    found = hide(texts(4, 20), torch.tensor([0.0, 0.25, 1.0, 0.5]), MASK, real=real)
    assert (found.tokens == MASK).sum(1).tolist() == [1, 5, 20, 5]
    assert not (found.tokens == MASK)[3, 10:].any()
    assert ((found.labels != IGNORED) == (found.tokens == MASK)).all()


def test_exact_masks_are_uniform_over_places():
    found = hide(torch.zeros(20_000, 6, dtype=torch.long), torch.full((20_000,), 0.5), MASK)
    assert (found.tokens == MASK).float().mean(0) == pytest.approx([0.5] * 6, abs=0.02)
    pairs = {tuple(row) for row in (found.tokens == MASK).int().tolist()}
    assert len(pairs) == math.comb(6, 3)


def test_independent_masks_hide_every_token_with_the_same_probability():
    found = hide(torch.zeros(5000, 8, dtype=torch.long), torch.full((5000,), 0.3), MASK, exact=False)
    counts = (found.tokens == MASK).sum(1).float()
    assert counts.mean() == pytest.approx(2.4, abs=0.1)
    assert counts.var() == pytest.approx(8 * 0.3 * 0.7, abs=0.15)  # binomial


class Exact(Answers):
    """The exact posterior of texts of three tokens with the joint probabilities p [2, 2, 2]."""

    mask_id = 2

    def __init__(self, p):
        self.p = p

    def losses(self, labels, tokens):
        found = torch.zeros(tokens.shape, dtype=torch.float64)
        for row, text in enumerate(tokens.tolist()):
            fits = torch.tensor(
                [
                    all(a in (b, self.mask_id) for a, b in zip(text, full, strict=True))
                    for full in itertools.product((0, 1), repeat=3)
                ]
            ).reshape(2, 2, 2)
            posterior = self.p * fits
            for place in range(3):
                if labels[row, place] != IGNORED:
                    one = posterior.select(place, int(labels[row, place])).sum() / posterior.sum()
                    found[row, place] = -one.log()
        return found


@pytest.mark.parametrize("exact", [True, False])
def test_the_bound_of_the_exact_posterior_is_the_likelihood(exact):
    """-log p(y) itself, on an exact toy, for both ways to mask."""
    p = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    toy = Exact(p / p.sum())
    text, count = torch.tensor([[1, 0, 1]]), 12_000
    shares = (torch.arange(count) + 0.5) / count
    masked = hide(text.expand(count, 3), shares, 2, exact=exact, generator=torch.Generator().manual_seed(1))
    per_token = toy.losses(masked.labels, masked.tokens).sum(1) * masked.weights
    error = (per_token.std() / count**0.5).item()
    assert 3 * per_token.mean().item() == pytest.approx(-toy.p[1, 0, 1].log().item(), abs=3 * 4 * error)
    assert error < 0.02


# ---------------------------------------------------------------- the bound of a network


def same_in_every_block(model, network):
    """Block b becomes the whole of `network`, a network of as many layers as a block."""
    whole_block = network.block(0).state_dict()
    for index in range(model.num_blocks):
        model.block(index).load_state_dict(whole_block)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_shares_of_the_blocks_add_up_to_the_bound_of_the_one_network(schedule):
    one = whole(num_layers=2, schedule=schedule).eval()
    split = blocks(schedule=schedule).eval()
    same_in_every_block(split, one)
    task = dblocks.MaskedLM(levels_per_text=6)
    expected, found = task.evaluate(one, batches()), task.evaluate(split, batches())
    total = sum(found[f"share_block_{index}"].value for index in range(3))
    assert found["nats_per_token"].value == pytest.approx(expected["nats_per_token"].value, rel=1e-5)
    assert total == pytest.approx(expected["nats_per_token"].value, rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("masking", ["exact", "independent"])
def test_training_losses_of_the_blocks_add_up_to_the_bound(schedule, masking):
    """The mean loss of a block times the length of its range, within Monte-Carlo error, whichever way levels are
    drawn."""
    one = whole(num_layers=2).eval()
    split = blocks(schedule=schedule, overlap=0.0).eval()
    same_in_every_block(split, one)
    expected = dblocks.MaskedLM(levels_per_text=64).evaluate(one, batches())["nats_per_token"]
    task, batch = dblocks.MaskedLM(masking=masking), batches()[0]
    torch.manual_seed(0)
    shares, variance = 0.0, 0.0
    with torch.no_grad():
        for index in range(3):
            found = torch.stack([task.step(split, index, batch).loss for _ in range(60)]).double()
            span = split.partition.range(index)
            shares += found.mean().item() * (span.high_mass - span.low_mass)
            variance += found.var().item() / 60 / 9
    assert shares == pytest.approx(expected.value, abs=4 * variance**0.5 + 0.002)


@pytest.mark.parametrize("loss_weight", ["bound", "root", "equal"])
def test_the_weight_of_an_answer_grows_with_the_masks_as_said(loss_weight, monkeypatch):
    """With equal cross-entropies the gradient of an answer is its weight: of n masked tokens, n to the power - 1, - 1/2
    or 0."""
    model, tokens = blocks(), torch.randint(0, MASK, (8, 8))
    seen = {}

    def loss(batch, level, labels, weights, most):
        seen.update(counts=(labels != IGNORED).sum(1), weights=weights)
        return weights.sum()

    monkeypatch.setattr(model.denoiser(0), "loss", loss)
    torch.manual_seed(0)
    dblocks.MaskedLM(loss_weight=loss_weight).step(model, 0, {"input_ids": tokens}, ranges=range(3))
    counts, weights = seen["counts"], seen["weights"]
    power = {"bound": -1.0, "root": -0.5, "equal": 0.0}[loss_weight]
    assert len(counts.unique()) > 4
    torch.testing.assert_close(weights / weights[0], (counts / counts[0]) ** power)


@pytest.mark.parametrize("spare", [0, 7])
def test_the_training_loss_is_that_of_every_masked_token(spare):
    model, tokens = blocks().eval(), texts()
    denoiser, level, weights = model.denoiser(1), torch.full((5,), 0.5), torch.rand(5)
    masked = hide(tokens, torch.linspace(0.1, 0.9, 5), MASK)
    inputs, most = {"noisy_target": masked.tokens}, int((masked.labels != IGNORED).sum()) + spare
    losses = (
        denoiser.loss(inputs, level, masked.labels, weights, most),
        (denoiser.each_loss(inputs, level, masked.labels).sum(1) * weights).sum(),
    )
    torch.testing.assert_close(*losses)
    parameters = [p for p in model.block(1).parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_no_more_tokens_are_masked_than_are_read_out(schedule, exact):
    partition, schedule = Partition(MaskingSchedule(schedule), 3), MaskingSchedule(schedule)
    for own in (0, 1, 2, range(3), range(1, 3)):
        for shape in ((1, 5), (3, 16), (32, 64), (16, 512)):
            tokens = torch.zeros(shape, dtype=torch.long)
            most = most_masked(partition, own, tokens, exact=exact)
            for _ in range(30):
                level, _ = partition.spread(own, shape[0])
                masked = hide(tokens, schedule.mass(level), MASK, exact=exact).labels != IGNORED
                assert masked.sum() <= most
        likely = shape[0] * shape[1] * partition.mean_mass(own)
        assert most <= (1.15 if exact else 1.3) * likely  # few are read out for nothing


def test_levels_are_spread_evenly_and_weighted_to_equal_mass():
    partition = Partition(MaskingSchedule("cosine"), 3, 0.0)
    for block in (range(3), range(1, 3), 0, 1, 2):
        levels, weights_of = partition.spread(block, 1000)
        low, high, *_ = partition.range(block)
        assert low - 1e-6 <= levels.min() and levels.max() <= high + 1e-6
        steps = levels.sort().values.diff()
        assert steps.max() - steps.min() < 1e-5
        assert weights_of.mean().item() == pytest.approx(1.0, abs=2e-3)


def test_equal_work_means_equal_steps_of_the_masked_share():
    for kind in ("linear", "cosine"):
        partition = Partition(MaskingSchedule(kind), 4)
        masses = [partition.range(block).high_mass for block in range(4)]
        assert masses == pytest.approx([1.0, 0.75, 0.5, 0.25])
        schedule = MaskingSchedule(kind)
        t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        numeric = (schedule.mass(t + 1e-6) - schedule.mass(t - 1e-6)) / 2e-6
        torch.testing.assert_close(schedule.slope(t), numeric, rtol=1e-5, atol=1e-6)


def test_the_mask_is_no_possible_answer():
    output = blocks().eval().denoiser(1)({"noisy_target": torch.full((2, 8), MASK)}, torch.full((2,), 0.5))
    assert (output.logits[..., MASK] == -torch.inf).all()
    assert not (output.estimate == MASK).any()


def test_a_denoiser_s_own_loss_is_that_of_the_task():
    model, tokens = blocks().eval(), texts()
    level = torch.full((5,), 0.5)
    torch.manual_seed(4)
    own = model.denoiser(1)({"input_ids": tokens}, level).loss
    torch.manual_seed(4)
    masked = hide(tokens, torch.full((5,), 0.5), MASK)
    losses = model.denoiser(1).each_loss({"noisy_target": masked.tokens}, level, masked.labels)
    torch.testing.assert_close(own, (losses.sum(1) * masked.weights).mean())


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("name", NETWORKS)
def test_conversion_keeps_the_network_s_function(name):
    network = NETWORKS[name]().eval()
    before = copy.deepcopy(network.state_dict())
    tokens = texts().masked_fill(texts() == 1, 2)  # RoBERTa takes 1 for padding
    tokens[:, ::3] = MASK
    real = torch.ones_like(tokens)
    real[2:, 11:] = 0
    if name in (
        "llama",
        "gpt2",
        "neox",
    ):  # transformers would attend causally: its own layers, asked for both directions
        allowed = torch.where(real[:, None, None] == 1, 0.0, torch.finfo(torch.float32).min)
        expected = network(tokens, attention_mask=allowed.expand(-1, 1, 16, -1).contiguous()).logits
    else:
        expected = network(tokens, attention_mask=real).logits
    inputs, level = {"noisy_target": tokens, "attention_mask": real}, torch.full((5,), 0.4)
    for model in (
        blocks(network, 1),
        blocks(network, 1, condition_width=8),
        whole(network),
        whole(network, condition_width=8),
    ):
        raw = model.eval().denoiser(0)(inputs, level).raw
        torch.testing.assert_close(raw[real == 1], expected[real == 1], rtol=1e-4, atol=1e-5)
    assert same(before, network.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_changes_nothing(name):
    model, tokens = blocks(NETWORKS[name]()).eval(), texts()
    real = torch.ones_like(tokens)
    real[:, 10:] = 0
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 5) % 12
    level = torch.full((5,), 0.4)
    found = [model.denoiser(1)({"noisy_target": z, "attention_mask": real}, level).raw[:, :10] for z in (tokens, other)]
    torch.testing.assert_close(found[0], found[1])
    alone = model.denoiser(1)({"noisy_target": tokens[:, :10]}, level).raw
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_documents_do_not_see_each_other(name):
    model, level = blocks(NETWORKS[name]()).eval(), torch.full((5,), 0.4)
    tokens = texts()
    segments = torch.tensor([[0] * 7 + [1] * 9]).expand(5, 16)
    packed = model.denoiser(0)({"noisy_target": tokens, "segments": segments}, level).raw
    first = model.denoiser(0)({"noisy_target": tokens[:, :7]}, level).raw
    second = model.denoiser(0)({"noisy_target": tokens[:, 7:]}, level).raw
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_directions_are_read(name):
    model, tokens, level = blocks(NETWORKS[name]()).eval(), texts(), torch.full((5,), 0.4)
    for place in (0, 15):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 12
        change = (
            model.denoiser(0)({"noisy_target": tokens}, level).raw
            - model.denoiser(0)({"noisy_target": other}, level).raw
        )
        assert (change.abs().amax((0, 2)) > 1e-7).all()


def test_blocks_of_tied_embeddings_keep_their_own_tie():
    model = blocks(make_llama(tie_word_embeddings=True))
    own = [block.stem.embedding.weight for block in map(model.block, range(3))]
    assert all(model.block(i).readout.head.weight is own[i] for i in range(3))
    assert len({id(weight) for weight in own}) == 3


def test_the_level_matters_once_conditioning_has_moved():
    model, tokens = blocks(condition_width=8).eval(), texts()
    with torch.no_grad():
        for block in map(model.block, range(3)):
            for name, parameter in block.named_parameters():
                if "modulation" in name:
                    parameter.normal_(std=0.1)
    one, two = (model.denoiser(1)({"noisy_target": tokens}, torch.full((5,), t)).raw for t in (0.4, 0.6))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("width", [0, 8])
def test_a_whole_network_is_saved_as_an_ordinary_one(width, tmp_path):
    model = whole(num_layers=2, condition_width=width).eval()
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(plain.model.layers) == 2
    use = json.loads((tmp_path / "denoiser.json").read_text())
    assert use["mask_token_id"] == MASK and use["conditioned"] == bool(width)
    tokens, level = texts(), torch.full((5,), 0.4)
    again = whole(plain, condition_width=width).eval()
    if width:
        extra = load_file(tmp_path / "conditioning.safetensors")
        assert {
            name for name in again.block(0).state_dict() if "modulation" in name or name.startswith("level")
        } == set(extra)
        again.block(0).load_state_dict(extra, strict=False)
    torch.testing.assert_close(
        again.denoiser(0)({"noisy_target": tokens}, level).raw, model.denoiser(0)({"noisy_target": tokens}, level).raw
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: blocks(make_llama(mask_token_id=None)), "mask_token_id"),
        (lambda: blocks(make_llama(mask_token_id=99)), "not among the network's 13 tokens"),
        (lambda: blocks(context="features"), "blocks.context is for networks that denoise labels"),
        (lambda: blocks(levels="log-normal"), "noise.schedule"),
        (lambda: dblocks.convert(make_vit(), target="masked"), "label, not 'masked'"),
        (lambda: dblocks.convert(make_vit(), schedule="cosine"), "noise.schedule is for masked tokens"),
        (lambda: dblocks.MaskedLM(top_p=0.0), "top_p"),
        (lambda: dblocks.MaskedLM(sampler="confidense"), "confidence"),
        (lambda: dblocks.MaskedLM().step(dblocks.convert(make_vit()), 0, {"input_ids": texts()}), "masked diffusion"),
    ],
)
def test_mistakes_say_what_is_needed(make, words):
    with pytest.raises(dblocks.UserError, match=words):
        make()


# ---------------------------------------------------------------- training


def test_training_learns_and_samples_count_on():
    torch.manual_seed(0)
    model = blocks(make_llama(hidden_size=32, num_hidden_layers=3), 3)
    settings = config(steps=250, batch_size=16, learning_rate=1e-2, order="random", branch_at=0.7)
    task = dblocks.MaskedLM(sampler="confidence", sampling_steps=16, temperature=0.0)
    trainer = dblocks.Trainer(model, task, Counting(), Counting(12), settings)
    trainer.fit()
    assert trainer.evaluate(Counting(12))["nats_per_token"].value < 0.6 * math.log(12)
    start = torch.full((8, 16), MASK)
    start[:, :2] = torch.tensor([3, 4])
    found = task.sample(model.eval(), start)
    counted = (found[:, 1:] - found[:, :-1]) % 12 == 1
    assert counted.float().mean() > 0.8


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
def test_given_tokens_stay_and_no_mask_is_left(sampler):
    model, start = blocks().eval(), texts()
    hidden = torch.rand(start.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    masked = start.masked_fill(hidden, MASK)
    found = dblocks.MaskedLM(sampler=sampler, sampling_steps=5).sample(model, masked)
    assert torch.equal(found[~hidden], start[~hidden])
    assert not (found == MASK).any()
    again = dblocks.MaskedLM(sampler=sampler, sampling_steps=5).sample(model, masked)
    assert torch.equal(found, again)
    other = dblocks.MaskedLM(sampler=sampler, sampling_steps=5).sample(model, masked, seed=1)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
def test_one_block_runs_per_step_and_levels_fall(sampler):
    model, seen = blocks().eval(), []
    task = dblocks.MaskedLM(sampler=sampler, sampling_steps=12)
    task.sample(model, torch.full((64, 16), MASK), watch=lambda block, level, z: seen.append((block, level)))
    assert [block for block, _ in seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert [level for _, level in seen] == pytest.approx([1 - i / 12 for i in range(12)])


def test_infilling_starts_at_the_level_of_what_is_masked():
    model, seen, start = blocks().eval(), [], texts(8, 16)
    start[:, :4] = MASK  # a quarter: the last block's range
    dblocks.MaskedLM(sampling_steps=8).sample(model, start, watch=lambda block, level, z: seen.append((block, level)))
    assert {block for block, _ in seen} == {2}
    assert seen[0][1] == pytest.approx(0.25)


def test_ancestral_sampling_unmasks_as_much_as_the_schedule_says():
    for kind in ("linear", "cosine"):
        schedule, shares = MaskingSchedule(kind), []
        sampler = unmasking.ancestral(1, schedule, lambda logits, generator: torch.zeros(len(logits), dtype=torch.long))

        def denoise(z, level, where, shares=shares):
            shares.append((level, (z == 1).float().mean().item()))
            return torch.zeros(int(where.sum()), 2)

        sampler(denoise, torch.ones(200, 100, dtype=torch.long), unmasking.even(1.0, 6))
        for level, share in shares:
            assert share == pytest.approx(schedule.mass(torch.tensor(level)).item(), abs=0.02)


def test_ancestral_sampling_with_the_exact_posterior_gives_the_joint_distribution():
    """Two tokens that are always equal: one step cannot know that, many steps do."""
    schedule = MaskingSchedule()

    def denoise(z, level, where):
        logits = torch.zeros(*z.shape, 3)
        logits[..., 2] = -torch.inf
        known = torch.where(z[:, [1, 0]] < 2, z[:, [1, 0]], -1)
        for value in (0, 1):
            logits[known == value, 1 - value] = -torch.inf
        return logits[where]

    sampler = unmasking.ancestral(2, schedule, TokenChoice())
    start = torch.full((4000, 2), 2)
    equal = [
        (found := sampler(denoise, start, unmasking.even(1.0, steps), generator=torch.Generator().manual_seed(0)))[:, 0]
        .eq(found[:, 1])
        .float()
        .mean()
        for steps in (1, 4, 64)
    ]
    assert equal[0] == pytest.approx(0.5, abs=0.03)
    assert equal[1] == pytest.approx(1 - 0.5 / 4, abs=0.03)  # both in the same one of four steps: a guess
    assert equal[2] > 0.98


def test_confidence_takes_the_likeliest_tokens_first():
    def denoise(z, level, where):
        logits = torch.zeros(*z.shape, 9)
        logits[..., 0] = torch.arange(z.shape[1])  # the further right, the surer
        return logits[where]

    seen = []
    sampler = unmasking.by_confidence(8, MaskingSchedule(), TokenChoice(0.0))
    sampler(
        lambda z, level, where: seen.append(z) or denoise(z, level, where), torch.full((1, 8), 8), unmasking.even(1, 4)
    )
    assert [int((z == 8).sum()) for z in seen] == [8, 6, 4, 2]
    assert (seen[1][0, 6:] != 8).all() and (seen[1][0, :6] == 8).all()


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_confidence_keeps_the_pace_of_the_schedule(steps):
    """Also with more steps than tokens, and when only a part is to be filled in."""
    for hidden in (16, 8):
        start, seen = texts(1, 16).repeat(64, 1), []
        start[:, :hidden] = MASK
        dblocks.MaskedLM(sampler="confidence", sampling_steps=steps).sample(
            blocks().eval(),
            start,
            watch=lambda block, level, z, seen=seen: seen.append((level, (z == MASK).float().mean())),
        )
        for level, share in seen:
            assert share.item() == pytest.approx(level, abs=0.6 / 16 + hidden / 16 / steps)
        assert len(seen) == min(steps, hidden)


def test_padded_texts_count_by_their_tokens():
    """A text of half the length weighs half, in training and in evaluation."""
    model, tokens = blocks().eval(), texts(2)
    real = torch.ones_like(tokens)
    real[1, 8:] = 0
    task = dblocks.MaskedLM(levels_per_text=400)
    both = task.evaluate(model, [{"input_ids": tokens, "attention_mask": real}])["nats_per_token"].value
    alone = [
        task.evaluate(model, [{"input_ids": tokens[:1]}])["nats_per_token"].value,
        task.evaluate(model, [{"input_ids": tokens[1:, :8]}])["nats_per_token"].value,
    ]
    assert both == pytest.approx((16 * alone[0] + 8 * alone[1]) / 24, rel=2e-3)
    torch.manual_seed(0)
    one = whole(num_layers=2).eval()
    with torch.no_grad():
        batch = {"input_ids": tokens.repeat(50, 1), "attention_mask": real.repeat(50, 1)}
        losses = torch.stack([task.step(one, 0, batch).loss for _ in range(8)])
    wanted = task.evaluate(one, [{"input_ids": tokens, "attention_mask": real}])["nats_per_token"].value
    assert losses.mean().item() == pytest.approx(wanted, rel=5e-3)


def test_frozen_layers_stay_frozen_when_they_see_the_level():
    parts = take_apart(make_llama(), "masked")
    model = whole_network(parts, dblocks.BlocksConfig(condition_width=8), trained_layers=2)
    layers = list(model.block(0).layers)
    assert not any(p.requires_grad for layer in layers[:4] for p in layer.parameters())
    assert all(p.requires_grad for layer in layers[4:] for p in layer.parameters())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_block_with_tied_embeddings_travels(name, tmp_path):
    network = make_llama(tie_word_embeddings=True) if name == "llama" else make_bert()
    one, other = blocks(network), blocks(network)
    with torch.no_grad():
        for parameter in one.block(1).parameters():
            parameter.add_(1.0)
    one.save_block(1, tmp_path / "block.safetensors")
    assert other.load_block(tmp_path / "block.safetensors") == 1
    assert same(weights(one.block(1)), weights(other.block(1)))
    assert other.block(1).readout.head.weight.data_ptr() == next(other.block(1).stem.parameters()).data_ptr()


def test_temperature_and_top_p_act_when_a_token_is_chosen():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    assert (TokenChoice(0.0)(logits, generator) == 0).all()
    assert set(TokenChoice(1.0, 0.7)(logits, generator).tolist()) == {0, 1}
    assert set(TokenChoice(1.0, 0.5)(logits, generator).tolist()) == {0}
    plain = TokenChoice()(logits, generator).bincount(minlength=3) / 4000
    assert plain.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    sharp = TokenChoice(0.5)(logits, generator).bincount(minlength=3) / 4000
    assert sharp.tolist() == pytest.approx([0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46], abs=0.03)
