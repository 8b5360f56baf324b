"""Next-token denoisers: nothing leaks, bounds are likelihoods, caches change nothing, and what is ordinary is
ordinary."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import diffusionblocks as dblocks
from diffusionblocks.blocks.causal import CausalBlocks, following
from diffusionblocks.errors import UserError
from diffusionblocks.networks.attention import side_by_side
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.tasks.readers import BlocksReader
from diffusionblocks.theory.choice import TokenChoice, draw
from diffusionblocks.theory.likelihood import token_bound
from diffusionblocks.theory.noise import Information
from diffusionblocks.theory.partition import Partition
from diffusionblocks.theory.targets import CategoricalTarget, add_noise, label_table
from diffusionblocks.training.task import per_token
from tests.conftest import Counting, config, make_gpt2, make_llama, make_neox, same, weights

PAPER = {
    "target_entry": "replace",
    "readout": "linear",
    "target_table": "trained",
    "shared": "trained",
    "levels": "log-normal",
    "condition_width": 8,
}
PRESETS = {
    "paper": PAPER,
    "information": {},
    "information, read by layers": {"target_entry": "replace", "condition_width": 8},
    "features": {"context": "features", "head_layers": 1},
    "features, one readout": {"context": "features", "shared": "trained"},
    "features, read by the head": {
        "context": "features",
        "head_layers": 1,
        "target_entry": "replace",
        "condition_width": 8,
    },
}
FAMILIES = {"llama": make_llama, "gpt2": make_gpt2, "neox": make_neox}


def other(name, **changes):
    """A family that shares the adapter of Llama."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=1, head_dim=8, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.fixture(params=PRESETS, ids=list(PRESETS))
def preset(request):
    return PRESETS[request.param]


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def make(request):
    return FAMILIES[request.param]


def stirred(model):
    """Weights away from their start, where conditioning is zero and heads are small."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tokens_like(count=2, length=10, seed=0):
    return {"input_ids": torch.randint(0, 12, (count, length), generator=torch.Generator().manual_seed(seed))}


def all_logits(model, batch, noisy, level=0.5):
    """Of every block, with the noisy targets held fixed [B, N, R, V]."""
    sigma = torch.full((len(batch["input_ids"]),), level)
    found = []
    for index in range(model.num_blocks):
        context = model.context(batch, index)
        more = {} if context is None else {"context": context}
        found.append(model.denoiser(index)({**batch, **more, "noisy_target": noisy}, sigma).logits)
    return torch.stack(found)


def test_a_clean_token_changes_only_what_comes_after_it(make, preset):
    """Rows up to the one that predicts token i stay; the later ones move."""
    check_for_leaks(make(), preset)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_no_family_leaks(name, preset):
    check_for_leaks(other(name), preset)


def check_for_leaks(network, preset):
    model, batch = stirred(dblocks.convert(network, 3, **preset)), tokens_like()
    noisy = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = all_logits(model, batch, noisy)
        for place in (0, 4, 8):
            changed = {"input_ids": batch["input_ids"].clone()}
            changed["input_ids"][:, place] = (changed["input_ids"][:, place] + 1) % 12
            after = all_logits(model, changed, noisy)
            # Row r predicts token r + 1 and reads tokens 0 to r.
            torch.testing.assert_close(after[:, :, :place], before[:, :, :place], rtol=0, atol=0)
            assert (after[:, :, place] - before[:, :, place]).abs().amax(-1).min() > 1e-4


def test_a_noisy_target_changes_its_own_row_alone(make, preset):
    model, batch = stirred(dblocks.convert(make(), 3, **preset)), tokens_like()
    noisy = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    moved = noisy.clone()
    moved[:, 4] = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = all_logits(model, batch, noisy), all_logits(model, batch, moved)
    others = [row for row in range(9) if row != 4]
    torch.testing.assert_close(after[:, :, others], before[:, :, others], rtol=0, atol=1e-6)
    assert (after[:, :, 4] - before[:, :, 4]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", ["paper", "information", "features"])
def test_windows_of_attention_are_kept(name):
    """A layer that looks back 4 tokens, alone in its block, does so beside noisy targets as well."""
    model = stirred(dblocks.convert(other("Mistral", sliding_window=4), 3, **PRESETS[name]))
    batch, noisy = tokens_like(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    changed = {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 0] += 1
    with torch.no_grad():
        before, after = all_logits(model, batch, noisy), all_logits(model, changed, noisy)
    # A noisy row stands at the position that it predicts, one further on, and so sees one clean token less.
    reach = 3 if name == "paper" else 4
    reach += 3 if name == "features" else 0  # block 0 has a head layer behind its own: twice as far
    torch.testing.assert_close(after[0, :, reach:], before[0, :, reach:], rtol=0, atol=1e-6)
    assert (after[0, :, reach - 1] != before[0, :, reach - 1]).any()


def test_packed_documents_do_not_see_each_other(make, preset):
    """Their rows are those of each document alone; across the border nothing is predicted."""
    model, batch = stirred(dblocks.convert(make(), 3, **preset)), tokens_like()
    segments = torch.tensor([0] * 6 + [1] * 4).expand(2, -1)
    noisy = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = all_logits(model, {**batch, "segments": segments}, noisy)
        second = all_logits(model, {"input_ids": batch["input_ids"][:, 6:]}, noisy[:, 6:])
    torch.testing.assert_close(packed[:, :, 6:], second, rtol=1e-4, atol=1e-5)
    wanted = following({**batch, "segments": segments})
    assert (wanted[:, 5] == IGNORED).all() and (wanted[:, 6:] == batch["input_ids"][:, 7:]).all()


def test_the_whole_network_keeps_packed_documents_apart_too(make):
    model = dblocks.EndToEndModel(take_apart(make())).eval()
    batch, segments = tokens_like(), torch.tensor([0] * 6 + [1] * 4).expand(2, -1)
    packed = model({**batch, "segments": segments})[:, 6:]
    torch.testing.assert_close(packed, model({"input_ids": batch["input_ids"][:, 6:]}), rtol=1e-4, atol=1e-5)


def test_the_mask_without_a_table_is_the_dense_one():
    """FlexAttention's block mask against the additive one, and attention with each."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    hidden, segments = torch.zeros(2, 9, 8), torch.tensor([[0] * 6 + [1] * 4, [0] * 10])
    for batch in (tokens_like(), {**tokens_like(), "segments": segments}):
        dense, flex = side_by_side(batch, hidden), side_by_side(batch, hidden, flex=True)
        table = create_mask(flex.mask.mask_mod, len(dense.mask), None, 18, 18, device="cpu")
        assert torch.equal(table, dense.mask == 0) and torch.equal(dense.positions, flex.positions)
        q, k, v = torch.randn(3, 2, 2, 18, 8, generator=torch.Generator().manual_seed(0))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=dense.mask)
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex.mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_attention_gives_the_same_logits(make, attention, monkeypatch):
    from transformers.integrations import flex_attention as of_transformers

    plain = (
        torch.nn.attention.flex_attention.flex_attention
    )  # as it is, without the compiler that transformers runs it with
    monkeypatch.setattr(of_transformers, "WrappedFlexAttention", lambda training: lambda: plain)
    noisy, found = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)), []
    for kind in ("sdpa", attention):
        network = make()
        network.config._attn_implementation = kind
        with torch.no_grad():
            found.append(all_logits(stirred(dblocks.convert(network, 3, **PAPER)), tokens_like(), noisy))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_every_parameter_has_one_owner_and_blocks_train_alone(make, preset):
    model = dblocks.convert(make(), 3, **preset)
    assert set(model.owners()) == {name for name, _ in model.named_parameters()}
    task, batch = dblocks.CausalLM(), tokens_like()
    for index in range(3):
        context = model.context(batch, index)
        more = {} if context is None else {"context": context}
        model.zero_grad(set_to_none=True)
        loss, handed, _ = task.step(model, index, {**batch, **more})
        loss.backward()
        for other in range(3):
            has = [p.grad is not None for p in model.block(other).parameters()]
            assert all(has) if other == index else not any(has)
        assert handed is None or not handed.requires_grad
        assert (handed is None) == (model.config.context == "input")


@pytest.mark.parametrize("tied", [False, True])
def test_an_untouched_conversion_on_features_is_the_original(make, tied):
    """Its last block answers as the network did, whatever heads the others have."""
    network = make(tie_word_embeddings=tied).eval()
    model = dblocks.convert(network, 3, context="features", head_layers=1).eval()
    batch = tokens_like()
    with torch.no_grad():
        logits = model.denoiser(2)({**batch, "context": model.context(batch, 2)}, torch.full((2,), 80.0)).raw
        torch.testing.assert_close(logits, network(**batch).logits[:, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", ["copies", "trained"])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_on_features_are_saved_as_an_ordinary_model(make, tied, shared, tmp_path):
    """After training: plain transformers reads it, without this package, and gets the same logits."""
    model = dblocks.convert(make(tie_word_embeddings=tied), 3, context="features", head_layers=1, shared=shared)
    dblocks.Trainer(model, dblocks.CausalLM(), Counting(), None, config(order="sweep", branch_at=0.0)).fit()
    model.eval().save_network(tmp_path / "plain")
    plain, batch = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval(), tokens_like()
    with torch.no_grad():
        entering = {**batch, "context": model.context(batch, 2)}
        raw = model.denoiser(2)(entering, torch.full((2,), 80.0)).raw
        torch.testing.assert_close(plain(**batch).logits[:, :-1], raw, rtol=1e-5, atol=1e-5)
        expected = plain(**batch, labels=batch["input_ids"]).loss.item()
    found = dblocks.CausalLM().evaluate(model, [batch])
    assert found["nats_per_token"].value == pytest.approx(expected, rel=1e-5)
    assert found["nats_per_token"] == found["nats_block_2"] != found["nats_block_0"]
    model.save_pretrained(tmp_path / "blocks")
    assert same(weights(dblocks.load(tmp_path / "blocks")), weights(model))


def test_only_blocks_on_features_are_an_ordinary_model(tmp_path):
    for options in (PRESETS["information"], PRESETS["features, read by the head"]):
        with pytest.raises(UserError, match="no ordinary language model"):
            dblocks.convert(make_llama(), 3, **options).save_network(tmp_path)


# ---------------------------------------------------------------- likelihood


@pytest.mark.parametrize("right", [True, False])
def test_the_area_under_the_error_curve_is_the_cross_entropy_of_a_toy(right):
    """METHOD 6.1: a denoiser with prior q, on tokens from p: the bound is H(p, q), wherever the integral ends."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20, generator=generator)
    p = p / p.sum()
    q = p if right else torch.rand(20, generator=generator)
    q = q / q.sum()
    target = CategoricalTarget(label_table(20, 24), trainable=False, bayes=True)
    labels = torch.multinomial(p, 6000, replacement=True, generator=generator)
    partition = Partition(Information(target.rows), 3)

    def measure(block, sigma):
        z = add_noise(target.clean(labels), sigma, generator=generator)
        logits = target.logits(q.log().expand(len(z), -1), z, sigma)
        error = (target.estimate(logits) - target.clean(labels)).square().sum(1)
        return error, torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    own = -q.log()[labels].double()
    for lowest in (partition.levels.level(torch.tensor(1e-3)).item(), 0.3, 10.0):
        shares = token_bound(measure, (6000,), partition, lowest=lowest, generator=generator)
        difference = shares.total - own
        assert difference.mean().abs() < 4 * difference.std() / 6000**0.5 + 1e-3
        assert (shares.blocks.mean(0) > 0)[:2].all()


@pytest.mark.parametrize("name", ["information", "features, read by the head"])
def test_blocks_that_ignore_the_noise_have_the_bound_of_their_cross_entropy(name):
    """All blocks with one and the same predictor of the next token: the bound is its cross-entropy."""
    model = dblocks.convert(make_llama(), 3, **PRESETS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(13, generator=generator)
    for index in range(3):
        readout = model.denoiser(index).head()
        head = torch.nn.Linear(16, 13)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(bias)
        readout.head = head
    batch = tokens_like(64, 40)
    expected = torch.nn.functional.cross_entropy(bias.expand(64 * 39, -1), batch["input_ids"][:, 1:].flatten())
    found = dblocks.CausalLM().evaluate(model, [batch])
    shares = [found[f"share_block_{i}"].value for i in range(3)]
    assert sum(shares) == pytest.approx(found["nats_per_token"].value)
    assert found["nats_per_token"].value == pytest.approx(
        expected.item(), abs=4 * found["nats_per_token"].stderr + 1e-3
    )
    assert min(shares) > 0.1


def test_ignored_places_count_neither_tokens_nor_nats():
    model, task = dblocks.convert(make_llama(), 3).eval(), dblocks.CausalLM()
    batch = tokens_like(4, 12)
    real = torch.ones_like(batch["input_ids"])
    real[:, 8:] = 0
    shares = task.bound(model, {**batch, "attention_mask": real})
    assert shares.total.shape == (4 * 7,)
    found = task.evaluate(model, [{**batch, "attention_mask": real}])["nats_per_token"].value
    short = task.evaluate(model, [{"input_ids": batch["input_ids"][:, :8]}])["nats_per_token"].value
    assert found == pytest.approx(short, abs=0.3)  # other noise


def test_scrambling_the_target_tells_how_much_of_a_loss_comes_from_it():
    model = dblocks.convert(make_llama(), 3).eval()
    found = dblocks.CausalLM().scrambled(model, [tokens_like(16, 20)])
    gaps = [found[f"scrambled_block_{i}"].value - found[f"loss_block_{i}"].value for i in range(3)]
    assert 0 < gaps[0] < gaps[1] < gaps[2]  # the lower the level, the more z says
    assert dblocks.CausalLM().scrambled(dblocks.EndToEndModel(take_apart(make_llama())), []) == {}


# ---------------------------------------------------------------- writing


def test_a_reader_with_a_cache_says_what_blocks_without_one_say(make, preset):
    """Read in pieces or at once; against the logits of whole texts, for the same z."""
    model = stirred(dblocks.convert(make(), 3, **preset))
    if model.is_ordinary:
        pytest.skip("an ordinary network reads with the cache of transformers")
    batch = tokens_like(3, 9)
    reader = BlocksReader(model, TokenChoice())
    with torch.no_grad():
        reader.read(batch["input_ids"][:, :5])
        for place in range(5, 8):
            reader.read(batch["input_ids"][:, place : place + 1])
        noisy = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
        expected = all_logits(model, batch, noisy)[:, :, -1]
        for block in range(3):
            sigma = torch.full((3,), 0.5)
            raw = reader._raw[block] if reader._raw else reader._noisy(block, noisy[:, -1], 0.5)
            found = model.denoiser(block).target.logits(raw, noisy[:, -1], sigma)
            torch.testing.assert_close(found, expected[block], rtol=1e-4, atol=1e-4)


def test_drawing_along_the_levels_is_exact_for_an_exact_posterior():
    """Blocks that all know p(v | x) write with just these probabilities, at any number of levels, shaped or not."""
    model = dblocks.convert(make_llama(), 3).eval()
    bias = torch.randn(13, generator=torch.Generator().manual_seed(0))
    for index in range(3):
        head = torch.nn.Linear(16, 13)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(bias)
        model.denoiser(index).head().head = head
    count = 6000
    for choice, steps in ((TokenChoice(), 0), (TokenChoice(), 7), (TokenChoice(0.5, top_k=4), 5)):
        reader = BlocksReader(model, choice, steps=steps)
        with torch.no_grad():
            reader.read(torch.zeros(count, 1, dtype=torch.long))
            drawn = reader.next(torch.Generator().manual_seed(1))
        shares = drawn.bincount(minlength=13) / count
        expected = choice.shaped(bias[None])[0].softmax(-1)
        torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / count**0.5)


def test_the_shape_of_a_draw():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).log().expand(4000, -1)[:, :3]
    generator = torch.Generator().manual_seed(0)
    assert set(TokenChoice(0.0)(logits, generator).tolist()) == {0}
    assert set(TokenChoice(top_k=2)(logits, generator).tolist()) == {0, 1}
    assert set(TokenChoice(top_p=0.4)(logits, generator).tolist()) == {0}
    shares = draw(logits, generator).bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([3.0, 2.0, 1.0]) / 6, rtol=0, atol=0.03)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(UserError, match="must not be negative"):
            TokenChoice(**bad)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", list(PRESETS))
def test_blocks_learn_to_count(name):
    """Each text counts up modulo 12: a few steps tell them most of it."""
    model = dblocks.convert(make_llama(), 3, **PRESETS[name])
    task = dblocks.CausalLM()
    settings = config(steps=120, batch_size=16, learning_rate=1e-2, order="sweep", branch_at=0.0, visit_steps=4)
    trainer = dblocks.Trainer(model, task, Counting(), None, settings)
    before = trainer.evaluate(Counting())["nats_per_token"].value
    trainer.fit()
    after = trainer.evaluate(Counting())["nats_per_token"].value
    assert after < 1.2 < 2 < before
    start = Counting()[0]["input_ids"][None, :4].expand(256, -1)
    written = task.sample(model.eval(), start, 5, seed=0)[:, 4]
    assert written.mode().values == 4


def test_layer_evaluations_count_the_second_sequence_and_the_heads():
    counted = {
        name: [dblocks.convert(make_llama(), 3, **options).layer_evaluations(i) for i in range(3)]
        for name, options in PRESETS.items()
    }
    assert counted["paper"] == [4, 4, 4] and counted["information"] == [2, 2, 2]
    assert counted["features, one readout"] == [2, 2, 2]
    assert counted["features"] == [3, 3, 2] and counted["features, read by the head"] == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_entry": "add"}, "take replace or none"),
        ({"readout": "linear", "condition_width": 8}, "needs a noisy target that the network reads"),
        ({"condition_width": 8}, "blocks.target_entry replace"),
        ({"context": "features", "target_entry": "replace"}, "needs local.head_layers"),
        ({"schedule": "cosine"}, "noise.schedule is for masked tokens"),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        dblocks.convert(make_llama(), 3, **options)


def test_a_denoiser_says_what_it_needs():
    model = dblocks.convert(make_llama(), 3, context="features", head_layers=1)
    assert isinstance(model, CausalBlocks)
    with pytest.raises(UserError, match="reads the features of block 0"):
        model.denoiser(1)(tokens_like(), torch.ones(2))
    with pytest.raises(UserError, match="input_ids"):
        model.denoiser(0)({"tokens": torch.zeros(1)}, torch.ones(1))
    alone = model.denoiser(0)(tokens_like(), torch.ones(2))
    assert alone.logits.shape == (2, 9, 13) and alone.estimate.shape == (2, 9, 16) and alone.loss > 0
    assert per_token(torch.tensor([1.0]), torch.tensor([2.0])).value == 0.5 and math.isfinite(alone.loss.item())


def trained(name, folder=None, **changes):
    torch.manual_seed(0)
    model = dblocks.convert(make_llama(), 3, **PRESETS[name])
    settings = config(order="sweep", visit_steps=2, checkpoint_every=3, **changes)
    return dblocks.Trainer(model, dblocks.CausalLM(), Counting(), None, settings, output_dir=folder)


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_trains_in_half_precision(name, precision):
    full = trained(name)
    half = trained(name, precision=precision, activation_checkpointing=True)
    found = []
    for trainer in (full, half):
        trainer.fit()
        found.append(trainer.evaluate(Counting())["nats_per_token"].value)
    assert found[1] == pytest.approx(found[0], rel=0.02)
    with half.averaged():
        start = tokens_like()["input_ids"]
        written = half.task.sample(half.model, start, 12)
    assert torch.equal(written[:, :10], start) and 0 <= written.min() <= written.max() < 13


def test_hidden_rows_are_the_same_with_and_without_a_padded_end():
    model, batch = stirred(dblocks.convert(make_llama(), 3)), tokens_like()
    padded = {"input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 3, dtype=torch.long)], 1)}
    padded["attention_mask"] = (torch.arange(13) < 10).long().expand(2, -1)
    for index in range(3):
        found, _ = model.denoiser(index).rows(padded, None, None)
        torch.testing.assert_close(found[:, :9], model.denoiser(index).rows(batch, None, None)[0])
    assert (following(padded)[:, 9:] == IGNORED).all()
