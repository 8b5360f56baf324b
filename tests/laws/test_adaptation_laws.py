"""Adapting pretrained language models: the function is kept, local and ordinary losses are what they say, contexts
score the same tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import diffusionblocks as dblocks
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextData, load_text
from diffusionblocks.methods.in_context import InContext, Passages
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes.schema import InContextConfig
from tests.conftest import Counting, config, make_gpt2, make_llama, make_neox, same, weights
from tests.language_models import make_pretrained, write_messages

ADAPTED = dict(context="features", shared="frozen", head_layers=1, head_start="last", distill=True, least_hidden=0.97)
TOKENS = torch.randint(0, 12, (4, 10), generator=torch.Generator().manual_seed(0))
MAKERS = [make_llama, make_gpt2, make_neox]


def blocks(network=None, **changes):
    return dblocks.convert(network or make_llama(tie_word_embeddings=True), 3, **{**ADAPTED, **changes})


def final_logits(model, batch):
    last = model.num_blocks - 1
    hidden, _ = model.denoiser(last).rows({**batch, "context": model.context(batch, last)}, None, None)
    return model.denoiser(last).head()(hidden)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_network_keeps_its_function(make, tied):
    network = make(tie_word_embeddings=tied).eval()
    model = blocks(network).eval()
    with torch.no_grad():
        expected = network(TOKENS).logits
        assert (final_logits(model, {"input_ids": TOKENS}) - expected[:, :-1]).abs().max() < 1e-5
        assert (model.network(TOKENS).logits - expected).abs().max() < 1e-5
    assert model.network.config.tie_word_embeddings == tied
    owners = set(model.owners().values())
    assert owners == {"shared", "block 0", "block 1", "block 2"}
    assert not any(p.requires_grad for p in model.shared.parameters())


def test_heads_are_copies_of_the_last_layers():
    model = blocks(head_layers=2)
    for index in (0, 1):
        for head, layer in zip(model.block(index).head, list(model.block(2).layers)[-2:], strict=True):
            assert same(weights(head), weights(layer)) and head is not layer
    assert not len(model.block(2).head)


def test_while_heads_settle_only_heads_move_and_learn_what_the_network_answers():
    network = make_llama(tie_word_embeddings=True).eval()
    model, task = blocks(network), dblocks.CausalLM()
    block = model.block(0)
    found = task.step(model, 0, {"input_ids": TOKENS}, settling=True)
    found.loss.backward()
    assert all(p.grad is None for p in block.layers.parameters())
    assert all(p.grad is not None for p in block.head.parameters())
    assert all(p.grad is None for index in (1, 2) for p in model.block(index).parameters())
    with torch.no_grad():
        hidden, _ = model.denoiser(0).rows({"input_ids": TOKENS}, None, None)
        ours = model.denoiser(0).head()(hidden).log_softmax(-1)
        right = network(TOKENS).logits[:, :-1].log_softmax(-1)
    expected = kl_div(ours, right, log_target=True, reduction="none").sum(-1).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.layers == pytest.approx(2 / 3 + 1 + 4 / 3)


def test_heads_settle_first_then_blocks_move():
    options = config(steps=8, heads_first=0.5, learning_rate=1e-2)
    model = blocks()
    trainer = dblocks.Trainer(model, dblocks.CausalLM(), Counting(), None, options)
    start, batch = weights(model.block(0)), {"input_ids": Counting().__getitem__(0)["input_ids"].expand(8, -1)}
    for step in range(5):
        trainer.block_step(0, batch)
        now = weights(model.block(0))
        moved = {name.split(".")[0] for name in now if not torch.equal(now[name], start[name])}
        assert moved == ({"head"} if step < 4 else {"head", "layers"})


def test_the_ordinary_loss_has_the_gradient_of_the_whole_network():
    """With its own loss switched off, a mixed block's gradient is that of the ordinary network."""
    network = make_llama(tie_word_embeddings=True)
    model, task = blocks(network, ordinary=1.0), dblocks.CausalLM()
    whole = dblocks.EndToEndModel(take_apart(network))
    task.step(whole, 0, {"input_ids": TOKENS}).loss.backward()
    model.learning(1)
    context = model.context({"input_ids": TOKENS}, 1)
    hidden = model.denoiser(1).trunk({"input_ids": TOKENS, "context": context})
    logits = model.denoiser(1).head()(model.answer(1, hidden, {"input_ids": TOKENS}))
    cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for ours, theirs in zip(model.block(1).layers, whole.block(0).layers[2:4], strict=True):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6), name
    assert all(p.grad is None for p in model.block(2).parameters())


def test_a_mixed_step_trusts_its_own_loss_as_far_as_its_head_finds_the_answers():
    model, alone, task = blocks(ordinary=2.0), blocks(), dblocks.CausalLM()
    torch.manual_seed(0)
    mixed = task.step(model, 0, {"input_ids": TOKENS}).loss.item()
    torch.manual_seed(0)
    own = task.step(alone, 0, {"input_ids": TOKENS}).loss.item()
    with torch.no_grad():
        end = cross_entropy(final_logits(model, {"input_ids": TOKENS}).flatten(0, 1), TOKENS[:, 1:].flatten()).item()
    assert mixed == pytest.approx(np.exp(min(0.0, end - own)) * own + 2 * end, rel=1e-4)


def test_trust_slows_the_layers_of_a_block_but_not_its_head():
    model = blocks()
    trainer = dblocks.Trainer(model, dblocks.CausalLM(), Counting(), None, config(trust=True, learning_rate=1e-2))
    loss = torch.tensor(3.0)
    state, local = trainer.states[0], trainer.local
    assert local.trust(0, state, loss) == 0.0  # nothing is known of the whole network yet
    assert local.trust(2, trainer.states[2], torch.tensor(2.0)) == 1.0
    assert float(local.trust(0, state, loss)) == pytest.approx(np.exp(-1))
    assert local.trust(0, state, torch.tensor(-90.0)) == 1.0
    for parameter in state.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    before = weights(model.block(0))
    state.step(0.0)
    after = weights(model.block(0))
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"head"}


@pytest.mark.parametrize("changes", [{}, {"ordinary": 1.0}], ids=["local", "mixed"])
@pytest.mark.parametrize("residency", ["device", "disk"])
def test_resumed_is_uninterrupted(tmp_path, changes, residency):
    def run(folder, stop=None):
        options = config(
            steps=6, order="cyclic", heads_first=0.5, trust=True, residency=residency, checkpoint_every=3, visit_steps=1
        )
        trainer = dblocks.Trainer(blocks(**changes), dblocks.CausalLM(), Counting(), None, options, output_dir=folder)
        if stop is not None:
            original, seen = trainer.visit, []

            def visit(*arguments):
                seen.append(1)
                if len(seen) == stop:
                    raise RuntimeError("killed")
                return original(*arguments)

            trainer.visit = visit
            with pytest.raises(RuntimeError, match="killed"):
                trainer.fit()
            return None
        trainer.fit()
        return weights(trainer.model)

    expected = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=11)
    assert same(run(tmp_path / "cut"), expected)


def test_after_training_everything_can_be_trained_again():
    model = blocks(ordinary=1.0)
    dblocks.Trainer(model, dblocks.CausalLM(), Counting(), None, config(heads_first=0.9)).fit()
    assert all(p.requires_grad for index in range(3) for p in model.block(index).parameters())
    assert not any(p.requires_grad for p in model.shared.parameters())


def test_blocks_that_are_not_named_stay_as_they_are():
    for order, changes in (("sweep", {}), ("cyclic", {"ordinary": 1.0})):
        model = blocks(**changes)
        before = weights(model)
        dblocks.Trainer(
            model, dblocks.CausalLM(), Counting(), None, config(blocks=[1], order=order, learning_rate=1e-2)
        ).fit()
        after = weights(model)
        moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"1"}


def test_blocks_take_turns_each_with_batches_of_its_own():
    from diffusionblocks.training.order import Plan

    visits = list(Plan(config(steps=5, order="cyclic", visit_steps=2), 3))
    assert [visit.block for visit in visits] == [0, 1, 2] * 3
    numbers = [number for visit in visits for number in visit.batches]
    assert numbers == list(range(15)) and not any(visit.carried for visit in visits)


@pytest.mark.parametrize(
    ("options", "train", "message"),
    [
        ({"ordinary": -1.0}, {}, "ordinary must be at least 0"),
        ({"ordinary": 1.0, "shared": "trained"}, {}, "need blocks.shared frozen"),
        ({"distill": True, "context": "input", "head_layers": 0}, {}, "need blocks.context features"),
        ({}, {"heads_first": 1.0}, "must be at least 0 and below 1"),
        ({}, {"trust": True, "order": "sequential"}, "set train.order to sweep, cyclic or random"),
    ],
)
def test_what_does_not_go_together_is_refused(options, train, message):
    with pytest.raises(dblocks.UserError, match=message):
        dblocks.Trainer(blocks(**options), dblocks.CausalLM(), Counting(), None, config(**train))


# ---------------------------------------------------------------- without training


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    make_pretrained(folder, layers=1)
    path = folder / "text.txt"
    path.write_text(" ".join(f"The answer to question {i} is the number {i * i}." for i in range(300)))
    own = dict(path=str(path), tokenizer=str(folder), length=48, split="contiguous")
    text = load_text(TextConfig(**own, cache_dir=str(folder / "cache")), mask=False)
    chats = write_messages(folder / "chat.jsonl", 80)
    own = dict(path=str(chats), tokenizer=str(folder), length=64, packing="auto", cache_dir=str(folder / "cache"))
    return {"text": text, "chat": load_text(TextConfig(**own), mask=False)}


SETTINGS = InContextConfig(tokens=80, passage=20, query=12, stride=16)


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("method", ["prompt", "retrieval"])
def test_contexts_change_what_stands_before_and_not_what_is_scored(splits, kind, method):
    data = splits[kind]
    passages = Passages(data.train, data.tokenizer, SETTINGS)
    scored = InContext(data.test, passages, search=method == "retrieval")
    batch = scored.__getitems__(list(range(len(scored))))
    ours = []
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        places = torch.nonzero(labels != -100).flatten()
        assert torch.equal(labels[places], ids[places]) and real[places].all()
        ours += labels[places].tolist()
    theirs = []
    for window in (data.test[index] for index in range(len(data.test))):
        labels = window.get("labels", window["input_ids"])[1:]
        real = window.get("attention_mask", torch.ones_like(window["input_ids"]))[1:]
        theirs += labels[(labels != -100) & (real == 1)].tolist()
    assert ours == theirs
    assert batch["input_ids"].shape[1] <= 80 + data.test.length


def test_retrieval_does_not_see_what_it_is_scored_on(splits):
    """Another ending of a window changes no context before it."""
    data = splits["text"]
    passages = Passages(data.train, data.tokenizer, SETTINGS)
    tokens = np.array(data.test.tokens)
    window = InContext(data.test, passages, search=True)
    start = int(data.test.spans[0, 0])
    tokens[start + 32 : start + 48] = tokens[start + 31]
    other = InContext(TextData(tokens, data.test.spans, 48), passages, search=True)
    for index, stretch in enumerate(window.stretches[:3]):
        ours, theirs = window[index], other[index]
        kept = len(ours["input_ids"]) - stretch.end + min(stretch.end, 32)
        assert torch.equal(ours["input_ids"][:kept], theirs["input_ids"][:kept])


def test_bm25_finds_the_passage_that_holds_the_words(splits):
    data = splits["text"]
    passages = Passages(data.train, data.tokenizer, SETTINGS)
    query = data.tokenizer.encode("question 17 is")
    assert "17" in data.tokenizer.decode(passages.best(query).tolist())
    assert len(passages.best(data.tokenizer.encode("--"))) == 0


def test_examples_are_the_same_for_every_text_and_from_training(splits):
    data = splits["chat"]
    passages = Passages(data.train, data.tokenizer, SETTINGS)
    scored = InContext(data.test, passages, search=False)
    first, second = scored[0]["input_ids"], scored[1]["input_ids"]
    size = len(passages.examples())
    assert 0 < size <= 80 and torch.equal(first[:size], second[:size])


def test_what_leaves_no_room_for_examples_is_refused(splits):
    data = splits["chat"]
    with pytest.raises(dblocks.UserError, match=r"at most in_context\.tokens 3"):
        Passages(data.train, data.tokenizer, dataclasses.replace(SETTINGS, tokens=3))
    with pytest.raises(dblocks.UserError, match=r"in_context\.stride must be at least 1"):
        dataclasses.replace(SETTINGS, stride=0).check()
