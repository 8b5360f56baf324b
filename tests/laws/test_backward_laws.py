"""Order backward: exact training whose updates are those of ordinary training, one block after the other."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.blocks.exact import stored
from diffusionblocks.blocks.handed import WithoutWeights, tensors_of
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.planning.measure import measure_peak, profiled_peak
from diffusionblocks.theory.costs import in_one_pass, in_turn
from diffusionblocks.training.order import Plan
from diffusionblocks.training.visitors import Slots, Visitors, units
from tests.conftest import Counting, config, make_data, make_gpt2, make_llama, make_vit, same, weights
from tests.laws.test_residency_laws import Elsewhere

SPANS = {1: [range(0, 6)], 2: [range(0, 4), range(4, 6)], 3: [range(0, 2), range(2, 4), range(4, 6)]}


def images():
    return make_vit, dblocks.Classification(), make_data()


def texts():
    return make_llama, dblocks.CausalLM(), Counting()


def tied_texts():
    return partial(make_llama, tie_word_embeddings=True), dblocks.CausalLM(), Counting()


def settings(**changes):
    return config(**{"steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0, "branch_at": 0.0, **changes})


def in_blocks(make, task, data, num_blocks=3, **changes):
    model = dblocks.BlockCoordinateModel(take_apart(make()), SPANS[num_blocks])
    return dblocks.Trainer(model, task, data, None, settings(order="backward", **changes))


def whole(make, task, data, frozen=False, **changes):
    parts = take_apart(make())
    model = dblocks.EndToEndModel(parts)
    if frozen:
        parts.stem.requires_grad_(False)
        parts.readout.requires_grad_(False)
    return dblocks.Trainer(model, task, data, None, settings(**changes))


@pytest.mark.parametrize(
    ("num_blocks", "changes"),
    [
        (1, {}),
        (2, {"accumulation": 2}),
        (3, {}),
        (3, {"accumulation": 2, "residency": "host"}),
        (2, {"keep_graphs": 3}),
        (3, {"keep_graphs": 2, "residency": "disk"}),
        (3, {"keep_graphs": 3, "residency": "disk"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("kind", [images, texts, tied_texts])
def test_its_updates_are_those_of_ordinary_training(kind, num_blocks, changes):
    make, task, data = kind()
    tied = take_apart(make()).tied  # then nobody owns the embeddings, and they stay
    ordinary = whole(make, task, data, tied, accumulation=changes.get("accumulation", 1))
    blocks = in_blocks(make, task, data, num_blocks, **changes)
    ordinary.fit()
    blocks.fit()
    assert blocks.progress.samples_seen == ordinary.progress.samples_seen
    wanted = ordinary.model.network.state_dict()
    for name, tensor in blocks.model.network.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-5)
    untouched = make().state_dict()
    assert sum(not torch.equal(tensor, untouched[name]) for name, tensor in wanted.items()) > 20


def test_plain_gradient_descent_agrees_to_the_last_digits():
    make, task, data = texts()
    changes = {"optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0}
    ordinary = whole(make, task, data, **changes)
    blocks = in_blocks(make, task, data, **changes)
    ordinary.fit()
    blocks.fit()
    wanted = ordinary.model.network.state_dict()
    for name, tensor in blocks.model.network.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_graphs", [1, 2, 3])
def test_a_recomputed_layer_draws_the_dropout_that_it_drew(keep_graphs):
    """What a layer gives is the same on the way there and in its block's step; where dropout is on, not by itself."""
    parts = take_apart(make_gpt2(resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3))
    model = dblocks.BlockCoordinateModel(parts, SPANS[3])
    _, task, data = texts()
    trainer = dblocks.Trainer(
        model, task, data, None, settings(order="backward", learning_rate=1e-9, steps=1, keep_graphs=keep_graphs)
    )
    seen = {}
    for number, layer in enumerate(parts.layers):
        layer.register_forward_hook(
            lambda _, __, out, number=number: seen.setdefault(number, []).append(
                (out[0] if isinstance(out, tuple) else out).detach()
            )
        )
    trainer.fit()
    recomputed = 6 - 2 * keep_graphs
    assert [len(seen[number]) for number in range(6)] == [2] * recomputed + [1] * 2 * keep_graphs
    for number in range(recomputed):
        torch.testing.assert_close(*seen[number])
    model.train()
    torch.manual_seed(1)
    model.hidden(next(iter(trainer.stream.load([0]))), 2)
    assert not torch.allclose(seen[0][-1], seen[0][0])


def test_later_blocks_are_not_read_again():
    """Not even where they have become unreadable."""
    make, task, data = texts()
    kept, spoiled = in_blocks(make, task, data), in_blocks(make, task, data)
    batch = next(iter(kept.stream.load([0])))
    one, other = (), ()
    for index in (2, 1, 0):
        one = kept.block_step(index, batch, one).handed
        other = spoiled.block_step(index, batch, other).handed
        assert same(weights(kept.model.block(index)), weights(spoiled.model.block(index)))
        for parameter in spoiled.model.block(index).parameters():
            parameter.data.fill_(float("nan"))
    assert not tensors_of(one)


@pytest.mark.parametrize("keep_graphs", [1, 3])
@pytest.mark.parametrize("chosen", [[1], [0, 2], [0, 1]])
def test_chosen_blocks_move_as_in_ordinary_training_and_the_others_stay(chosen, keep_graphs):
    make, task, data = texts()
    trainer = in_blocks(make, task, data, blocks=chosen, steps=1, keep_graphs=keep_graphs)
    before = [weights(trainer.model.block(index)) for index in range(3)]
    all_blocks = in_blocks(make, task, data, steps=1)
    trainer.fit()
    all_blocks.fit()
    for index in range(3):
        now, wanted = weights(trainer.model.block(index)), weights(all_blocks.model.block(index))
        if index not in chosen:
            assert same(now, before[index])
            continue
        assert not same(now, before[index])
        for name, tensor in now.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    make, task, data = texts()
    straight = in_blocks(make, task, data)
    straight.fit()
    first = in_blocks(make, task, data, checkpoint_every=3)
    first.output_dir = tmp_path
    seen = []

    def stop(*arguments, **options):
        seen.append(1)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    step, first.block_step = first.block_step, stop
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = in_blocks(make, task, data)
    again.output_dir = tmp_path
    assert again.restore(tmp_path) and again.progress.block_steps == 6  # whole batches
    again.fit()
    assert same(weights(again.model), weights(straight.model))


def test_a_batch_visits_every_block_once_and_its_layers_are_counted():
    visits = list(Plan(settings(order="backward", steps=2), 3))
    assert [visit.block for visit in visits] == [2, 1, 0] * 2
    assert [visit.carried for visit in visits] == [False, True, True] * 2
    assert [visit.border for visit in visits] == [False, False, True] * 2
    make, task, data = texts()
    trainer = in_blocks(make, task, data, steps=2)
    trainer.fit()
    expected = sum(in_one_pass([2, 2, 2]))
    assert expected == pytest.approx(6 * (4 / 3 - 1 / 9))  # all recomputed but the last block
    assert trainer.progress.layer_evaluations == pytest.approx(expected * trainer.progress.samples_seen)
    trainer = in_blocks(make, task, data, steps=2, keep_graphs=2)
    trainer.fit()
    assert sum(in_one_pass([2, 2, 2], 2)) == pytest.approx(6 * (1 + 1 / 9))  # one block of three is recomputed
    assert trainer.progress.layer_evaluations == pytest.approx(6 * (1 + 1 / 9) * trainer.progress.samples_seen)
    assert sum(in_one_pass([2, 2, 2], 3)) == pytest.approx(6)
    assert sum(in_turn([2, 2, 2])) == pytest.approx(3 * 2 + 4 + 2 / 3 * 6)


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_vit])
def test_a_kept_graph_holds_no_weights(make):
    """They may be elsewhere between the two passes: what is where they were does not matter, what is there in the
    backward pass does."""
    parts = take_apart(make())
    model = dblocks.BlockCoordinateModel(parts, SPANS[3])
    block, width = model.block(1), parts.network.config.hidden_size
    hidden = torch.randn(2, 5, width, requires_grad=True)
    expected = torch.autograd.grad(model.through(1, hidden, {}, None).square().sum(), [hidden, *block.parameters()])
    away = {name: p.data.clone() for name, p in block.named_parameters()}
    kept = WithoutWeights(block.parameters())
    with kept:
        leaving = model.through(1, hidden, {}, None)
    weighty = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    assert kept.saved() and not [one for one in kept.saved() if one.untyped_storage().data_ptr() in weighty]
    for name, parameter in block.named_parameters():
        parameter.data.fill_(float("nan"))
        parameter.data = away[name]
    found = torch.autograd.grad(leaving.square().sum(), [hidden, *block.parameters()])
    assert same(dict(enumerate(found)), dict(enumerate(expected)))


def test_a_kept_graph_in_bf16_holds_no_copies_of_weights():
    """Of what autocast makes of weights it names the weight."""
    model = dblocks.BlockCoordinateModel(take_apart(make_llama()), SPANS[3])
    block, hidden = model.block(1), torch.randn(1, 2, 16, requires_grad=True)

    def through(keeping):
        with torch.autocast("cpu", torch.bfloat16), keeping:
            return model.through(1, hidden, {}, None)

    expected = torch.autograd.grad(through(nullcontext()).square().sum(), [hidden, *block.parameters()])
    kept = WithoutWeights(block.parameters())
    leaving = through(kept)
    assert 0 < stored(kept.saved()) < sum(parameter.nbytes for parameter in block.parameters()) / 2
    found = torch.autograd.grad(leaving.square().sum(), [hidden, *block.parameters()])
    assert same(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize("sizes", [[3, 2, 1], [1, 3, 2]])
def test_the_reported_peak_counts_the_graphs_that_wait(sizes):
    """Of blocks of different depth the last to step is not the first."""
    make, task, data = partial(make_llama, hidden_size=32, intermediate_size=64), dblocks.CausalLM(), Counting()
    spans = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(3)]

    def trainer():
        model = dblocks.BlockCoordinateModel(take_apart(make()), spans)
        return dblocks.Trainer(model, task, data, None, settings(order="backward", keep_graphs=3, residency="disk"))

    batch = next(iter(trainer().stream.load([0])))
    assert measure_peak(trainer()).total == pytest.approx(profiled_peak(trainer, batch), rel=0.02)


@pytest.mark.parametrize("keep_graphs", [1, 2, 3])
def test_weights_of_kept_graphs_visit_like_those_of_others(keep_graphs):
    """Idle blocks hold rubbish; what they hold in truth comes for the length of a layer's call, as to a GPU."""
    make, task, data = texts()
    near = in_blocks(make, task, data, keep_graphs=keep_graphs)
    far = in_blocks(make, task, data, keep_graphs=keep_graphs)
    batch = next(iter(near.stream.load([0])))
    truth, handed_near, handed_far = {}, (), ()
    for index in range(3):
        for parameter in far.model.block(index).parameters():
            truth[parameter] = parameter.data
            parameter.data = torch.full_like(parameter, float("nan"))
    for index in (2, 1, 0):
        for parameter in far.model.block(index).parameters():
            parameter.data = truth[parameter]
        absent = [unit for other in range(index) for unit in units(far.model.block(other))]
        by_place = {p.data.data_ptr(): truth[p] for unit in absent for p in unit.parameters()}
        with Visitors(absent, Slots(torch.device("cpu"), Elsewhere(by_place))):
            handed_far = far.block_step(index, batch, handed_far).handed
        handed_near = near.block_step(index, batch, handed_near).handed
        assert same(weights(near.model.block(index)), weights(far.model.block(index)))
        for other in range(index):
            assert all(p.isnan().all() for p in far.model.block(other).parameters())


def test_what_cannot_go_backward_is_refused():
    data = make_data()
    with pytest.raises(dblocks.UserError, match="method exact"):
        dblocks.Trainer(
            dblocks.convert(make_vit(), 3), dblocks.Classification(), data, None, settings(order="backward")
        )
    with pytest.raises(dblocks.UserError, match=r"visit_steps 1"):
        settings(order="backward", visit_steps=2).check()


def test_graphs_of_parts_of_a_batch_are_not_kept():
    make, task, data = texts()
    with pytest.raises(dblocks.UserError, match=r"keep_graphs 3 .* train.accumulation 2 cuts: set one of them to 1"):
        in_blocks(make, task, data, accumulation=2, keep_graphs=3)
