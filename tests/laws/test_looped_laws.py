"""Looped networks: nothing leaks, unrolling is truncated where it says, a walk's bound is a likelihood, and keeping
keys and values changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import diffusionblocks as dblocks
from diffusionblocks.blocks import looped
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.looped import LoopedNetwork
from diffusionblocks.errors import UserError
from diffusionblocks.methods import METHODS
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import Recipe
from diffusionblocks.tasks import RecurrentLM
from diffusionblocks.tasks import looped_readers as samplers
from diffusionblocks.tasks.looped_readers import LevelsReader, UnrolledReader
from diffusionblocks.theory.categorical import bridge
from diffusionblocks.theory.choice import TokenChoice
from diffusionblocks.theory.likelihood import token_bound, walk_bound
from diffusionblocks.theory.noise import Information
from diffusionblocks.theory.partition import Partition
from diffusionblocks.theory.targets import CategoricalTarget, add_noise, label_table
from tests.conftest import make_gpt2, make_llama, make_neox, same, weights
from tests.laws.test_causal_laws import other, stirred, tokens_like

FAMILIES = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "neox": make_neox,
    **{name: (lambda name=name: other(name)) for name in ("Mistral", "Qwen2", "Qwen3")},
}
LOOP = {"prelude": 1, "coda": 1}
TASK = RecurrentLM(iterations=4, mean_iterations=4, truncation=2)


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def make(request):
    return FAMILIES[request.param]


def unrolled(network=None, **options):
    parts = take_apart(network or make_llama(), "recurrent")
    return LoopedNetwork(parts, BlocksConfig(num_blocks=1, target="recurrent", **{**LOOP, **options}))


def denoiser(network=None, **options):
    options = {**LOOP, "condition_width": 8, **options}
    return dblocks.convert(network or make_llama(), 1, target="recurrent", **options)


# ---------------------------------------------------------------- the network


def test_a_network_that_is_looped_keeps_its_function(make):
    network, batch = make().eval(), tokens_like()
    with torch.no_grad():
        expected = network(input_ids=batch["input_ids"][:, :-1]).logits
        model = unrolled(network).eval()
        (hidden,) = model.hidden(batch, [1])
        torch.testing.assert_close(model.readout(hidden), expected)
        noisy = {**batch, "noisy_target": torch.randn(2, 9, 16)}
        for readout in ("bayes", "linear"):
            found = denoiser(network, readout=readout).eval().denoiser(0)(noisy, torch.tensor([0.5, 2.0]))
            torch.testing.assert_close(found.raw, expected)


def test_the_core_alone_is_applied_again(make):
    """K iterations pass prelude and coda once; written out with the network's own layers."""
    model, batch = stirred(unrolled(make())), tokens_like()
    torch.manual_seed(3)
    with torch.no_grad():
        found = model.hidden(batch, [1, 3])
        torch.manual_seed(3)
        block = model.block(0)
        first, *core, last = block.layers
        injected = first(block.stem({"input_ids": batch["input_ids"][:, :-1]}))
        state = torch.randn(injected.shape)
        for number in (1, 2, 3):
            state = block.injection(state, injected)
            for layer in core:
                state = layer(state)
            if number != 2:
                torch.testing.assert_close(found[number // 2], last(state))
    assert block.passed(3) == 2 + 3 * len(core)
    assert block.passed(4, trained=1) == 2 + 2 * len(core)


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_changes_only_what_comes_after_it(make, packed):
    batch = tokens_like()
    if packed:
        batch["segments"] = torch.tensor([[0] * 5 + [1] * 5, [0] * 7 + [1] * 3])
    noise = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    models = stirred(unrolled(make())), stirred(denoiser(make(), condition_width=8))

    def logits(batch):
        torch.manual_seed(2)  # the same first states
        (hidden,) = models[0].hidden(batch, [3])
        yield models[0].readout(hidden)
        yield models[1].denoiser(0)({**batch, "noisy_target": noise}, torch.tensor([0.5, 0.5])).logits

    with torch.no_grad():
        before = list(logits(batch))
        for place in (0, 4, 8):
            moved = {**batch, "input_ids": batch["input_ids"].clone()}
            moved["input_ids"][:, place] = (moved["input_ids"][:, place] + 1) % 12
            for old, new in zip(before, logits(moved), strict=True):
                torch.testing.assert_close(new[:, :place], old[:, :place], rtol=0, atol=0)
                assert (new[:, place] - old[:, place]).abs().amax(-1).min() > 1e-4
            if packed and place < 5:  # the other document does not see it either
                assert torch.equal(new[0, 5:], old[0, 5:])


def test_a_noisy_target_is_seen_by_its_own_row_and_those_after_it():
    model, batch = stirred(denoiser()), tokens_like()
    noise = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    moved = noise.clone()
    moved[:, 4] += 1
    sigma = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        old, new = (model.denoiser(0)({**batch, "noisy_target": z}, sigma).raw for z in (noise, moved))
    assert torch.equal(old[:, :4], new[:, :4])
    assert (old[:, 4:] - new[:, 4:]).abs().amax(-1).min() > 1e-5


def test_every_parameter_has_one_owner_and_levels_reach_core_and_coda_alone():
    model = denoiser()
    assert len(model.owners()) == len(list(model.parameters()))
    modulated = {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "modulation" in name}
    assert modulated == set("12345")
    assert "6 + 10 (K - 1) with K iterations" in model.summary()
    assert "2 + 4 K with K iterations" in unrolled().summary()


# ---------------------------------------------------------------- unrolling


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_flow_through_the_last_iterations_alone(precision):
    """The same as a loop whose state is detached at the border; under autocast too, where casts of weights are
    remembered."""
    model, batch = stirred(unrolled()).train(), tokens_like(4)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    torch.manual_seed(3)
    with autocast:
        (hidden,) = model.hidden(batch, [5], trained=2)
        found = gradients(model, model.readout(hidden).float().square().mean())
    torch.manual_seed(3)
    block = model.block(0)
    with autocast:
        injected = block("prelude", block.stem({"input_ids": batch["input_ids"][:, :-1]}), None)
        state = torch.randn(injected.shape)
        for number in range(5):
            state = block("core", state.detach() if number == 3 else state, injected, None, None)
        expected = gradients(model, model.readout(block("coda", state, None, None)).float().square().mean())
    torch.manual_seed(3)
    with autocast:
        (hidden,) = model.hidden(batch, [5], trained=5)
        whole = gradients(model, model.readout(hidden).float().square().mean())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(found[name], whole[name], rtol=1e-2) for name in whole)


def test_iterations_are_drawn_around_their_mean():
    task, drawn = RecurrentLM(mean_iterations=16, truncation=8), []
    for seed in range(1500):
        drawn.append(task.drawn(seed))
    assert [task.drawn(seed) for seed in range(20)] == drawn[:20] and len(set(drawn[:20])) > 5
    values = torch.tensor(drawn, dtype=torch.float)
    assert values.min() >= 1 and values.mean().item() == pytest.approx(16, abs=0.8)
    # 1 + Poisson with a log-normal mean of 15: variance 15 + 15^2 (e^(1/4) - 1).
    assert values.std().item() == pytest.approx(math.sqrt(15 + 225 * (math.exp(0.25) - 1)), rel=0.1)
    made, trained = task.expected()
    assert (made, trained) == (16, pytest.approx(values.clamp(max=8).mean().item(), rel=0.03))
    assert RecurrentLM(mean_iterations=1, truncation=1).drawn(0) == 1
    assert replace(task, draw="constant").drawn(0) == 16


def test_what_a_step_passed_is_counted():
    batches = [tokens_like(4, seed=seed) for seed in range(2)]
    data = [{"input_ids": row} for batch in batches for row in batch["input_ids"]]
    task = RecurrentLM(mean_iterations=6, truncation=2, iterations=2)
    config = dblocks.TrainingConfig(steps=24, batch_size=4, device="cpu")
    trainer = dblocks.Trainer(unrolled(), task, data, None, config)
    trainer.fit()
    expected = METHODS["end-to-end"].training(Recipe(task=task, blocks=trainer.model.config), [6])
    assert trainer.progress.layer_evaluations / 96 == pytest.approx(expected, rel=0.25)
    once = dblocks.Trainer(unrolled(), task.once(), data, None, config)
    blocks = dblocks.Trainer(denoiser(), task, data, None, config)
    once.fit(), blocks.fit()
    assert once.progress.layer_evaluations == blocks.progress.layer_evaluations == 6 * 96


# ---------------------------------------------------------------- likelihood


def test_a_bridge_lies_between():
    """z' = y + sigma' eps, whatever z it came from; and its share of the noise of z is the ratio of variances."""
    y = torch.tensor([0.6, -0.8]).expand(200_000, 2)
    generator = torch.Generator().manual_seed(0)
    z = add_noise(y, torch.full((len(y),), 2.0), generator=generator)
    between = bridge(z, y, 2.0, 0.5, generator=generator) - y
    assert between.mean(0).abs().max() < 0.01
    assert between.std().item() == pytest.approx(0.5, rel=0.01)
    assert ((between * (z - y)).mean() / 4).item() == pytest.approx(0.25**2, rel=0.05)


class Toy:
    """p(v) of a table of embeddings, and exact posteriors of another one, q, as a network would say them."""

    def __init__(self, prior):
        self.target = CategoricalTarget(label_table(12, 8), trainable=False, bayes=True)
        self.log_prior = prior.log()

    def told(self, labels):
        def inner(z, level, lower, its_level):
            sigma = torch.full((len(z),), level)
            logits = self.target.logits(self.log_prior.expand(len(z), -1), z, sigma)
            before = cross_entropy(logits, labels, reduction="none")
            if lower is None:
                return before
            logits = logits + (lower / its_level**2 - z / level**2) @ self.target.rows.T
            return before - cross_entropy(logits, labels, reduction="none")

        return inner

    def measure(self, labels):
        def inner(block, sigma):
            z = add_noise(self.target.clean(labels), sigma)
            logits = self.target.logits(self.log_prior.expand(len(z), -1), z, sigma)
            error = (self.target.estimate(logits) - self.target.clean(labels)).square().sum(-1)
            return error, cross_entropy(logits, labels, reduction="none")

        return inner


@pytest.mark.parametrize("levels", [1, 2, 5, 64])
def test_the_bound_of_a_walk_is_the_cross_entropy_of_what_it_knows_at_any_number_of_levels(levels):
    """Posteriors of one prior, right or wrong: the sum telescopes."""
    torch.manual_seed(0)
    truth, believed = (torch.randn(12) * 1.5).softmax(0), (torch.randn(12)).softmax(0)
    labels = torch.multinomial(truth, 20_000, replacement=True)
    grid = torch.logspace(math.log10(80), math.log10(0.2), levels).tolist()
    for prior in (truth, believed):
        toy = Toy(prior)
        found = walk_bound(toy.told(labels), toy.target.clean(labels), grid)
        expected = cross_entropy(toy.log_prior.expand(len(labels), -1), labels).item()
        assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / len(found) ** 0.5 + 1e-3)


def test_with_many_levels_it_is_the_area_under_the_error_curve():
    """Of a denoiser that is no posterior at all: its prior moves with the level."""
    torch.manual_seed(0)
    toy = Toy((torch.randn(12)).softmax(0))
    labels = torch.multinomial(torch.ones(12), 30_000, replacement=True)
    clean, tilt = toy.target.clean(labels), torch.randn(12)
    priors = toy.log_prior

    def prior(level):
        return priors + tilt * torch.as_tensor(level).log()[..., None] * 0.3

    def told(z, level, lower, its_level):
        toy.log_prior = prior(level)
        return toy.told(labels)(z, level, lower, its_level)

    def measure(block, sigma):
        z = add_noise(clean, sigma)
        logits = toy.target.logits(prior(sigma), z, sigma)
        error = (toy.target.estimate(logits) - clean).square().sum(-1)
        return error, cross_entropy(logits, labels, reduction="none")

    partition = Partition(Information(toy.target.rows), 1, 0.0)
    grid = partition.levels.level(torch.linspace(1, 0, 257, dtype=torch.float64))[:-1].tolist()
    few, many = walk_bound(told, clean, grid[::32]), walk_bound(told, clean, grid)
    area = token_bound(measure, (len(labels),), partition, levels_per_block=64, lowest=grid[-1]).total
    error = (area.std() / len(area) ** 0.5 + many.std() / len(many) ** 0.5).item()
    assert many.mean().item() == pytest.approx(area.mean().item(), abs=4 * error)
    assert abs(few.mean() - many.mean()) > 0.02  # the number of levels matters where posteriors disagree


def test_new_denoisers_have_the_cross_entropy_of_their_network_at_any_number_of_iterations():
    """They do not read their state yet, so all iterations say the same."""
    network, batch = make_llama().eval(), tokens_like(64, 20)
    model, plain = denoiser(network).eval(), unrolled(network).eval()
    whole = TASK.over_iterations(plain, [batch], [1, 2, 8])
    walks = TASK.over_iterations(model, [batch], [1, 2, 8])
    expected = network(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.item()
    for name in whole:
        assert whole[name].value == pytest.approx(expected, rel=1e-5)
        assert walks[name].value == pytest.approx(expected, abs=0.03)
    assert TASK.evaluate(model, [batch])["nats_per_token"].value == pytest.approx(expected, abs=0.03)


def test_where_there_is_nothing_to_predict_nothing_is_counted():
    batch = tokens_like(4)
    padded = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    padded["attention_mask"][:, 6:] = 0
    cut = {"input_ids": batch["input_ids"][:, :6]}
    for model in (unrolled().eval(), denoiser().eval()):
        assert TASK.step(model, 0, padded).loss.isfinite()
    # New networks do not read their states; the bound of the denoiser is an estimate.
    for make, error in ((unrolled, 1e-4), (denoiser, 0.1)):
        found, expected = (TASK.evaluate(make().eval(), [b])["nats_per_token"].value for b in (padded, cut))
        assert found == pytest.approx(expected, abs=error)
    nothing = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    for model in (unrolled().eval(), denoiser().eval()):
        both = TASK.over_iterations(model, [batch, nothing], [2])["nats_at_2"].value
        assert both == pytest.approx(TASK.over_iterations(model, [batch], [2])["nats_at_2"].value)


@torch.no_grad()
def test_documents_in_one_row_are_apart_in_a_walk_too():
    """Two documents packed into a row have the likelihood that they have alone."""
    batch, task = tokens_like(64, 20), replace(TASK, iterations=8)
    packed = {**batch, "segments": torch.tensor([0] * 10 + [1] * 10).expand(64, -1)}
    alone = {"input_ids": torch.cat([batch["input_ids"][:, :10], batch["input_ids"][:, 10:]])}
    model = stirred(denoiser())
    found, expected = (task.evaluate(model, [b])["nats_per_token"] for b in (packed, alone))
    assert found.value == pytest.approx(expected.value, abs=4 * found.stderr)


@torch.no_grad()
def test_the_residual_stream_is_not_rounded_under_autocast():
    batch = tokens_like()
    for model in (unrolled(), denoiser()):
        seen = []
        for layer in model.block(0).layers:
            layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = TASK.step(model, 0, batch).loss
        assert loss.isfinite() and set(seen) == {torch.float32}


def test_bf16_weights_train_and_write():
    for model in (unrolled().to(torch.bfloat16), denoiser().to(torch.bfloat16)):
        TASK.step(model, 0, tokens_like()).loss.backward()
        assert TASK.sample(model.eval(), tokens_like(2, 3)["input_ids"], 6).shape == (2, 6)
        assert TASK.evaluate(model, [tokens_like()])["nats_per_token"].value < 10


# ---------------------------------------------------------------- writing


class Recorded(UnrolledReader):
    """Keeps the first states that it drew, and its logits."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drawn, self.logits = [], []

    def _add(self, number, states):
        if number == 0:
            self.drawn.append(states)
        super()._add(number, states)

    def _read_out(self, number):
        self.logits.append(super()._read_out(number))
        return self.logits[-1]


def write(reader, start, length):
    generator, tokens = torch.Generator().manual_seed(0), start
    reader.read(start)
    while tokens.shape[1] < length:
        new = reader.next(generator)[:, None]
        tokens = torch.cat([tokens, new], 1)
        reader.read(new)
    return tokens


@torch.no_grad()
def test_unrolling_with_kept_keys_is_unrolling_without(make, monkeypatch):
    model = stirred(unrolled(make()))
    reader = Recorded(model, TokenChoice(), 3)
    tokens = write(reader, tokens_like(2, 4)["input_ids"], 9)
    noise = torch.cat(reader.drawn, 1)
    monkeypatch.setattr(looped, "normal_like", lambda tensor, generator=None: noise[:, : tensor.shape[1]])
    for number, logits in enumerate(reader.logits):
        length = 4 + number
        (hidden,) = model.hidden({"input_ids": torch.cat([tokens[:, :length], tokens[:, :1]], 1)}, [3])
        torch.testing.assert_close(logits, model.readout(hidden)[:, -1], rtol=1e-4, atol=1e-4)
    core = len(model.layers[0]) - 2
    assert reader.layer_evaluations == 2 * 9 + 2 * 8 * (3 * core + 1)  # the last token is read and not gone on from


@torch.no_grad()
def test_rows_that_stopped_early_are_taken_further_when_others_need_them():
    """Without a coda, which every row passes where it stopped, what comes after an early exit is as if there had been
    none."""
    start = tokens_like(2, 4)["input_ids"]
    model = stirred(unrolled(coda=0))
    early, whole = (Recorded(model, TokenChoice(temperature=0.0), 5) for _ in range(2))
    early.early_exit = 1e9  # at the second iteration
    for reader in (early, whole):
        reader.read(start)
        reader.next(torch.Generator().manual_seed(0))
        reader.read(start[:, :1])  # the same token, whatever they chose
        reader.early_exit = 0.0
        reader.next(torch.Generator().manual_seed(1))
    assert early.exits == [2, 5] and whole.exits == [5, 5]
    torch.testing.assert_close(early.logits[-1], whole.logits[-1])
    assert early.layer_evaluations == whole.layer_evaluations


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["categorical", "euler"])
def test_walking_levels_with_kept_keys_is_walking_without(make, monkeypatch, sampler):
    """Rows before the last hold noisy versions of their own tokens; here without the noise, so that they can be made
    again."""
    model, walked = stirred(denoiser(make())), []
    monkeypatch.setattr(samplers, "add_noise", lambda clean, sigma, generator=None: clean)

    class Watched(LevelsReader):
        def _denoise(self, number, z, generator):
            walked.append((number, z, super()._denoise(number, z, generator), self._tokens))
            return walked[-1][2]

    reader = Watched(model, TokenChoice(), 3, 0.0, sampler)
    write(reader, tokens_like(2, 4)["input_ids"], 8)
    assert [number for number, *_ in walked] == [0, 1, 2] * 4
    assert reader.layer_evaluations == 2 * 8 + 2 * (len(model.layers[0]) - 1) * (7 + 2 * (7 + 3))
    for number, z, raw, tokens in walked:
        clean = reader.denoiser.target.clean(tokens[:, 1:])
        if number == 0:  # where all is noise, the row of the walk is kept
            tops = [z for number, z, _, earlier in walked if number == 0 and earlier.shape[1] < tokens.shape[1]]
            clean = torch.cat([clean[:, :3], *(z[:, None] for z in tops)], 1)
        batch = {"input_ids": torch.cat([tokens, tokens[:, :1]], 1)}
        sigma = torch.full((2,), reader.levels[number])
        hidden, _ = reader.denoiser.rows(batch, torch.cat([clean, z[:, None]], 1), sigma)
        torch.testing.assert_close(raw, reader.denoiser.head()(hidden[:, -1]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_walk_draws_what_its_bound_is_of():
    """Of a new network the posterior is exact at any level: tokens have the distribution of its own logits."""
    network = make_llama().eval()
    start = tokens_like(1, 4)["input_ids"].expand(8_000, -1)
    expected = network(input_ids=start[:1]).logits[0, -1].softmax(-1)
    for iterations in (1, 3):
        reader = LevelsReader(denoiser(network).eval(), TokenChoice(), iterations)
        reader.read(start)
        found = torch.bincount(reader.next(torch.Generator().manual_seed(0)), minlength=len(expected)) / len(start)
        assert (found - expected).abs().max() < 4 * (0.25 / len(start)) ** 0.5


def test_samples_are_seeded_and_early_exit_saves_iterations():
    start = tokens_like(3, 4)["input_ids"]
    paper = {"readout": "linear", "target_table": "trained", "shared": "trained", "levels": "log-normal"}
    for model in (stirred(unrolled()), stirred(denoiser()), stirred(denoiser(**paper))):
        first, again, differs = (TASK.sample(model, start, 12, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, differs)
        few = replace(TASK, early_exit=0.5, iterations=16)
        reader = few.reader(model)
        few.sample(model, start, 12, seed=0, reader=reader)
        assert len(reader.exits) == 8 and sum(reader.exits) < 8 * 16


# ---------------------------------------------------------------- on disk, and what is refused


def test_both_kinds_survive_the_disk_and_do_not_take_each_other(tmp_path):
    for name, model in (("unrolled", stirred(unrolled())), ("blocks", stirred(denoiser(condition_width=0)))):
        model.save_pretrained(tmp_path / name)
        loaded = dblocks.load(tmp_path / name)
        assert type(loaded) is type(model) and same(weights(loaded), weights(model))
    with pytest.raises(UserError, match="trained by unrolling"):
        denoiser(condition_width=0).start_from(tmp_path / "unrolled")
    with pytest.raises(UserError, match="holds denoisers"):
        unrolled().start_from(tmp_path / "blocks")
    for model, name in ((unrolled(coda=2), "unrolled"), (denoiser(prelude=2, condition_width=0), "blocks")):
        with pytest.raises(UserError, match=r"looped.prelude and looped.coda 1 and 1"):
            model.start_from(tmp_path / name)
    (tmp_path / "blocks" / "diffusionblocks.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        dblocks.load(tmp_path / "blocks")
    model = unrolled()
    model.start_from(tmp_path / "unrolled")
    assert same(weights(model), weights(dblocks.load(tmp_path / "unrolled")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"curve": [4, 0]}, "at least 1"),
        ({"mean_iterations": 4, "truncation": 8}, "longer than objective.mean_iterations"),
        ({"early_exit": -1.0}, "must be at least 0"),
        ({"draw": "poisson"}, "draw"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RecurrentLM(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prelude": 4, "coda": 2}, "leave no layer"),
        ({"prelude": -1}, "must be at least 0"),
        ({"context": "features"}, "state of a looped network"),
        ({"readout": "linear", "condition_width": 0}, "needs the noise level"),
    ],
)
def test_loops_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        denoiser(**options)
    with pytest.raises(UserError, match="not split"):
        dblocks.convert(make_llama(), 3, target="recurrent")
    with pytest.raises(UserError, match="for looped networks"):
        dblocks.convert(make_llama(), 3, prelude=1)
    with pytest.raises(UserError, match="layers_per_block"):
        dblocks.convert(make_llama(), 1, target="recurrent", layers_per_block=[6])


def test_tasks_refuse_networks_that_are_not_theirs():
    ordinary = dblocks.EndToEndModel(take_apart(make_llama())), dblocks.convert(make_llama(), 3)
    for task, models in ((TASK, ordinary), (dblocks.CausalLM(), (unrolled(), denoiser()))):
        for model in models:
            for use in (
                lambda: task.step(model, 0, tokens_like()),  # noqa: B023
                lambda: task.evaluate(model, [tokens_like()]),  # noqa: B023
                lambda: task.sample(model, tokens_like()["input_ids"], 12),  # noqa: B023
            ):
                with pytest.raises(UserError, match="trains"):
                    use()
    for model in (unrolled(), denoiser()):
        with pytest.raises(UserError, match="at least"):
            TASK.over_iterations(model, [tokens_like()], [0, 2])
