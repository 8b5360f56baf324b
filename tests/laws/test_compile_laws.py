"""Compiled layers: one graph for all blocks, none made after the first round, and the numbers of the layers as they
were.

Graphs are counted by a backend that compiles nothing, so these laws need no compiler.
"""

import copy
import gc
import random
import weakref

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import diffusionblocks as dblocks
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.labels import TargetEntry
from diffusionblocks.blocks.model import EndToEndModel
from diffusionblocks.methods.lora import lora_model
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.theory.partition import split_layers
from diffusionblocks.training import compiling, trainer
from diffusionblocks.training.lanes import AtOnce
from diffusionblocks.training.visitors import Slots, Visitors
from tests.cli.test_cli import SMALL, fails
from tests.conftest import (
    CONVERSIONS,
    TOKENS,
    Counting,
    config,
    make_bert,
    make_data,
    make_deit,
    make_dit,
    make_gpt2,
    make_llama,
    make_neox,
    make_roberta,
    make_vit,
    same,
    weights,
)


class Packed(Counting):
    """Two documents in every row."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "segments": (torch.arange(self.length) >= 5 + index % 4).long()}


class Padded(Counting):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "attention_mask": (torch.arange(self.length) < 12 + index % 4).long()}


class Graphs:
    """A backend of torch.compile that keeps graphs as they are, counts them and their runs."""

    def __init__(self):
        self.made = self.runs = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*arguments):
            self.runs += 1
            return graph(*arguments)

        return run


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    found = Graphs()
    monkeypatch.setattr(compiling, "BACKEND", found)
    monkeypatch.setattr(trainer, "check_compiler", lambda device: None)
    return found


def calls_of(model):
    """Counts the calls of what is compiled, by hooks as residency has them."""
    calls = []
    for block in model.blocks:
        for part in compiling.compiled_parts(block):
            if isinstance(part, TargetEntry) and part.kind == "none":  # computes nothing
                continue
            part.register_forward_hook(lambda part, arguments, output: calls.append(part), always_call=True)
    return calls


def made(model, task, data, **options):
    return dblocks.Trainer(model, task, data, None, config(**{"compile": True, "batch_size": 4, **options}))


def round_of_steps(own, order, batch, carried=False):
    """A step of each block. carried: on the features that the step before handed on, not on features made for it."""
    handed = ()
    for index in order:
        anew = () if carried else own.entering(index, batch)
        handed = own.block_step(index, batch, anew or handed).handed


def count(graphs, own):
    """Graphs that training a model makes. Fails where one is made after the first round, or a layer is not wholly in
    one."""
    calls, up = calls_of(own.model), range(own.model.num_blocks)
    down, mixed = up[::-1], random.Random(0).choices(up, k=6)
    backward = own.config.order == "backward"
    batches = iter(own.stream.load(range(9)))
    round_of_steps(own, down if backward else up, next(batches), carried=True)
    round_of_steps(own, down if backward else [*up, up[-1]], next(batches))  # one block twice in a row
    after_one_round = graphs.made
    for order in [down] * 3 if backward else [up, down, mixed]:
        round_of_steps(own, order, next(batches))
    round_of_steps(own, down if backward else up, next(batches), carried=True)
    assert graphs.made == after_one_round
    assert graphs.runs == len(calls) > 0
    assert not counters["graph_break"]
    return after_one_round


def mistral(**changes):
    torch.manual_seed(0)
    sizes = {**TOKENS, "num_key_value_heads": 1, "pad_token_id": None, "sliding_window": 6}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**sizes, **changes}))


CAUSAL = {
    "default": {},
    "features": {"context": "features", "target_entry": "none"},
    "features-head": {"context": "features", "target_entry": "none", "head_layers": 1},
    "paper": {"context": "input", "target_entry": "replace", "condition_width": 8},
    "features-paper": {"context": "features", "target_entry": "replace", "head_layers": 1, "condition_width": 8},
    "ordinary": {"context": "features", "target_entry": "none", "head_layers": 1, "shared": "frozen", "ordinary": 0.5},
}


def blocks_of(make, target, **options):
    return lambda num_blocks, **sizes: dblocks.convert(make(**sizes), num_blocks, target=target, **options)


def exact(make, target="auto"):
    return lambda num_blocks, **sizes: BlockCoordinateModel(
        take_apart(make(**sizes), target), split_layers(6, num_blocks)
    )


IMAGES, TEXTS = (dblocks.Classification(), make_data()), (dblocks.CausalLM(), Counting())
MASKED = (dblocks.MaskedLM(), Counting())
# name -> model of so many blocks, task, data, training options.
BLOCKS = {
    **{f"vit {name}": (blocks_of(make_vit, "auto", **options), *IMAGES, {}) for name, options in CONVERSIONS.items()},
    "deit features-head": (blocks_of(make_deit, "auto", **CONVERSIONS["features-head"]), *IMAGES, {}),
    "deit paper": (blocks_of(make_deit, "auto", **CONVERSIONS["paper"]), *IMAGES, {}),
    "dit": (blocks_of(make_dit, "image"), dblocks.ImageGeneration(), make_data(), {}),
    "dit shared": (blocks_of(make_dit, "image", shared="trained"), dblocks.ImageGeneration(), make_data(), {}),
    **{f"llama {name}": (blocks_of(make_llama, "causal", **options), *TEXTS, {}) for name, options in CAUSAL.items()},
    "gpt2 features-head": (blocks_of(make_gpt2, "causal", **CAUSAL["features-head"]), *TEXTS, {}),
    "gpt2 paper": (blocks_of(make_gpt2, "causal", **CAUSAL["paper"]), *TEXTS, {}),
    "neox features-head": (blocks_of(make_neox, "causal", **CAUSAL["features-head"]), *TEXTS, {}),
    "neox paper": (blocks_of(make_neox, "causal", **CAUSAL["paper"]), *TEXTS, {}),
    "mistral, windows": (blocks_of(mistral, "causal", **CAUSAL["features"]), *TEXTS, {}),
    "packed": (blocks_of(make_llama, "causal", **CAUSAL["paper"]), dblocks.CausalLM(), Packed(), {}),
    "padded": (blocks_of(make_bert, "masked"), dblocks.MaskedLM(), Padded(), {}),
    "bert": (blocks_of(make_bert, "masked", condition_width=8), *MASKED, {}),
    "roberta": (blocks_of(make_roberta, "masked", condition_width=8), *MASKED, {}),
    "llama masked": (blocks_of(make_llama, "masked", condition_width=8), *MASKED, {}),
    "checkpointing": (
        blocks_of(make_llama, "causal", **CAUSAL["features"]),
        *TEXTS,
        {"activation_checkpointing": True, "precision": "bf16"},
    ),
    "exact in turn": (exact(make_llama, "causal"), *TEXTS, {}),
    "exact backward": (exact(make_llama, "causal"), *TEXTS, {"order": "backward"}),
    "exact backward, graphs kept": (exact(make_gpt2, "causal"), *TEXTS, {"order": "backward", "keep_graphs": 6}),
    "exact images": (exact(make_vit), *IMAGES, {"order": "backward"}),
}
MOST = 6


@pytest.mark.parametrize("name", BLOCKS)
def test_graphs_do_not_grow_with_blocks_or_rounds(name, graphs):
    make, task, data, options = BLOCKS[name]
    found = []
    for num_blocks in (3, 6) if options.get("order") == "backward" else (2, 3):  # two blocks have none between them
        graphs.made = graphs.runs = 0
        found.append(count(graphs, made(make(num_blocks), task, data, **options)))
    assert found[0] == found[1] <= MOST


def whole(make, target, **options):
    return lambda **sizes: whole_network(
        take_apart(make(**sizes), target), BlocksConfig(num_blocks=1, target=target, **options)
    )


LOOP = {"prelude": 1, "coda": 1}
ITERATIONS = dblocks.RecurrentLM(mean_iterations=4, draw="constant", truncation=2)  # all cases in every step
NETWORKS = {
    "end-to-end": (whole(make_llama, "causal"), *TEXTS),
    "last-block": (lambda **sizes: EndToEndModel(take_apart(make_llama(**sizes), "causal"), trained_layers=2), *TEXTS),
    "lora": (
        lambda **sizes: lora_model(
            make_vit(**sizes), 2, 4, train_readout=False, blocks=BlocksConfig(num_blocks=1, target="label")
        ),
        *IMAGES,
    ),
    "masked": (whole(make_bert, "masked", condition_width=8), *MASKED),
    "loop": (blocks_of(make_llama, "recurrent", condition_width=8, **LOOP), dblocks.RecurrentLM(), Counting()),
    "loop, unrolled": (whole(make_llama, "recurrent", **LOOP), ITERATIONS, Counting()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_do_not_grow_with_depth(name, graphs):
    make, task, data = NETWORKS[name]
    found = []
    for depth in (4, 6):
        graphs.made = graphs.runs = 0
        model = make(num_blocks=1, num_hidden_layers=depth) if name == "loop" else make(num_hidden_layers=depth)
        found.append(count(graphs, made(model, task, data)))
    assert found[0] == found[1] <= MOST


@pytest.mark.parametrize("kind", ["features", "exact"])
def test_a_run_makes_no_graph_but_those_of_the_first_round(kind, graphs):
    make = blocks_of(make_llama, "causal", **CAUSAL["features"]) if kind == "features" else exact(make_llama, "causal")
    most = count(graphs, made(make(3), *TEXTS))
    for order in ("random", "sweep", "cyclic", "sequential"):
        graphs.made = graphs.runs = 0
        moved = {"residency": "disk", "visit_steps": 2, "ema_decay": 0.9, "accumulation": 2, "steps": 4}
        own = made(make(3), *TEXTS, order=order, **moved)
        calls = calls_of(own.model)
        own.fit()
        assert 0 < graphs.made <= most
        assert graphs.runs == len(calls)


def test_weights_that_visit_make_no_graphs_after_the_first_round(graphs):
    own = made(exact(make_llama, "causal")(3), *TEXTS)
    calls, batch = calls_of(own.model), next(iter(own.stream.load(range(1))))
    slots = Slots(torch.device("cpu"), AtOnce())

    def visited():
        before = graphs.made
        for index in range(3):
            away = [layer for other in range(3) if other != index for layer in own.model.block(other).layers]
            with Visitors(away, slots):
                own.block_step(index, batch)
        return graphs.made - before

    assert visited() > 0
    assert visited() == 0
    assert graphs.runs == len(calls)  # and they are used
    assert not counters["graph_break"]


def test_evaluation_runs_layers_as_they_are(graphs):
    own = made(dblocks.convert(make_llama(), 3, **CAUSAL["features-paper"]), *TEXTS)
    eager = made(dblocks.convert(make_llama(), 3, **CAUSAL["features-paper"]), *TEXTS, compile=False)
    torch.manual_seed(0)
    before = eager.evaluate(Counting(13))
    round_of_steps(own, range(3), next(iter(own.stream.load(range(1)))))
    own.model.load_state_dict(eager.model.state_dict())
    used = graphs.made, graphs.runs
    torch.manual_seed(0)
    assert own.evaluate(Counting(13)) == before
    assert (graphs.made, graphs.runs) == used
    round_of_steps(own, range(3), next(iter(own.stream.load(range(1)))))
    assert graphs.made == used[0]
    assert graphs.runs > used[1]


def test_another_size_of_batch_costs_one_more_graph_each_and_a_third_none(graphs):
    found = []
    own = made(dblocks.convert(make_llama(), 3, **CAUSAL["paper"]), *TEXTS)
    for samples in (4, 6, 8, 5):
        batch = {"input_ids": torch.stack([Counting()[index]["input_ids"] for index in range(samples)])}
        round_of_steps(own, range(3), batch)
        found.append(graphs.made)
    assert found[0] < found[1] <= 2 * found[0]
    assert found[1:] == [found[1]] * 3


UPDATES = {
    "features": (blocks_of(make_llama, "causal", **CAUSAL["features-paper"]), {}),
    "exact in turn": (exact(make_llama, "causal"), {}),
    "exact, graphs kept without weights": (exact(make_gpt2, "causal"), {"order": "backward", "keep_graphs": 3}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_compiled_layers_make_the_same_updates(name, monkeypatch, graphs):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # with compiled backward passes
    make, options = UPDATES[name]
    sizes = {"attn_pdrop": 0.1, "resid_pdrop": 0.1} if "kept" in name else {}
    after = []
    for compiled in (False, True):
        own = made(make(3, **sizes), *TEXTS, compile=compiled, steps=2, residency="disk", optimizer="sgd", **options)
        own.fit()
        after.append(weights(own.model))
    for key, tensor in after[0].items():
        torch.testing.assert_close(tensor, after[1][key], atol=1e-6, rtol=1e-4)


def test_a_compiled_model_is_saved_copied_converted_and_freed(graphs, tmp_path):
    options = CAUSAL["paper"]
    own = made(dblocks.convert(make_llama(), 3, target="causal", **options), *TEXTS)
    model, batch = own.model, next(iter(own.stream.load(range(1))))
    round_of_steps(own, range(3), batch)
    model.save_pretrained(tmp_path / "blocks")
    loaded = dblocks.load(tmp_path / "blocks")
    assert same(weights(loaded), weights(model))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    layer = copied.block(0).layers[0].train()
    assert layer(torch.ones(1, 3, 16), torch.ones(1, 8)).eq(1).all()  # runs on its own weights
    assert same(weights(loaded), weights(model))
    round_of_steps(made(model, *TEXTS), range(3), batch)  # of another trainer
    gone = weakref.ref(model), weakref.ref(copied)
    del own, model, copied, layer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_compiled_network_is_still_one_of_transformers(graphs, tmp_path):
    own = made(whole(make_vit, "label")(), *IMAGES)
    batch = next(iter(own.stream.load(range(1))))
    own.block_step(0, batch)
    network = own.model.network
    for training in (True, False):
        network.train(training)
        torch.testing.assert_close(network(batch["pixel_values"]).logits, own.model(batch))
    own.model.save_pretrained(tmp_path / "network")
    assert same(weights(type(network).from_pretrained(tmp_path / "network")), weights(network))
    converted = dblocks.convert(network, 3, **CONVERSIONS["paper"])
    round_of_steps(dblocks.Trainer(converted, *IMAGES, None, config()), range(3), batch)
    assert not any(name.endswith("forward") for name in converted.state_dict())


def test_without_a_compiler_one_line_says_what_is_missing(capsys, tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        line = fails(capsys, "train", "digits", *SMALL, "--train.compile", "true", "--output-dir", tmp_path / "run")
    assert "C++ compiler" in line
    assert "--train.compile false" in line
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_without_triton_one_line_says_so(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("Cannot find a working triton installation.\nMore about it")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        dblocks.UserError, match=r"working triton installation.*install triton.*--train.compile false"
    ) as error:
        compiling.check_compiler(torch.device("cuda"))
    assert "\n" not in str(error.value)
