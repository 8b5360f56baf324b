"""Moving blocks in and out: nothing grows, the next block arrives meanwhile, and streamed weights give exact
gradients."""

import gc
import os
import threading
import time

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.training import lanes
from diffusionblocks.training.visitors import Slots, Visitors, units
from tests.conftest import config, make_data, make_llama, make_vit, same, weights


def trainer(num_blocks=3, **options):
    return dblocks.Trainer(
        dblocks.convert(make_vit(), num_blocks), dblocks.Classification(), make_data(), None, config(**options)
    )


def mapped_files():
    with open("/proc/self/maps") as lines:
        return sum("resident-" in line for line in lines)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_nothing_grows_over_a_thousand_switches(kind, tmp_path):
    made = trainer(residency=kind, order="random", steps=1)
    made.fit()
    home = made.residency

    def switch(times):
        for number in range(times):
            with home.active(number % 3):
                pass
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        files = len(os.listdir("/proc/self/fd"))
        return tensors, files, mapped_files(), len(os.listdir(home.folder)) if home.folder else 0

    before = switch(100)
    after = switch(1000)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_the_average_of_a_block_that_has_not_stepped_is_its_weights(precision):
    """Before the first step, and of blocks that do not train at all."""
    made = trainer(residency="disk", ema_decay=0.9, blocks=[1], steps=2, precision=precision)
    before = weights(made.model)
    with made.averaged():
        assert same(weights(made.model), before)
    made.fit()
    with made.averaged():
        own = weights(made.model)
        changed = {name for name in before if not torch.equal(own[name], before[name])}
    assert changed and all(name.startswith("blocks.1.") for name in changed)


@pytest.mark.parametrize("order", ["sweep", "sequential", "random"])
def test_prefetching_changes_nothing(order):
    plain = trainer(residency="disk", order=order, branch_at=0.25)
    plain.fit()
    ahead = trainer(residency="disk", order=order, branch_at=0.25)
    ahead.place.prefetch = True
    ahead.fit()
    assert same(weights(plain.model), weights(ahead.model))


def test_the_next_block_arrives_while_this_one_computes(monkeypatch):
    copy, step = lanes._copy, dblocks.Trainer.block_step
    threads = set()

    def slow_copy(pairs):
        threads.add(threading.current_thread().name)
        time.sleep(0.05)
        return copy(pairs)

    def slow_step(self, *arguments, **options):
        time.sleep(0.05)
        return step(self, *arguments, **options)

    seconds = {}
    for prefetch in (False, True):
        made = trainer(residency="disk", order="sweep", steps=6)
        made.place.prefetch = prefetch
        _ = made.residency
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "_copy", slow_copy)
            patch.setattr(dblocks.Trainer, "block_step", slow_step)
            started = time.perf_counter()
            made.fit()
            seconds[prefetch] = time.perf_counter() - started
    assert threads == {"reader_0"}
    assert seconds[False] - seconds[True] > 0.5 * 17 * 0.05  # at least half of the 17 loads are hidden


def test_the_room_for_blocks_is_made_once_and_is_that_of_the_largest():
    made = trainer(residency="disk", order="sweep", steps=2)
    made.fit()
    home = made.residency
    arena, views = home._arena, {}
    for index in (0, 1, 2, 1, 0):
        with home.active(index) as state:
            own = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        assert views.setdefault(index, own) == own  # at the same addresses whenever it comes
    assert home._arena is arena
    assert arena.nbytes == max(layout.nbytes for layout in home._layouts)
    both = trainer(residency="disk", order="sweep", steps=2)
    both.place.prefetch = True
    both.fit()
    sizes = sorted(layout.nbytes for layout in both.residency._layouts)
    assert both.residency._arena.nbytes == sizes[-1] + sizes[-2]


def exact(num_blocks, network, **options):
    parts = take_apart(network)
    size = len(parts.layers) // num_blocks
    model = BlockCoordinateModel(parts, [range(i * size, (i + 1) * size) for i in range(num_blocks)])
    return dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(**options))


def gradients_of_the_whole(network, task, batch):
    model = dblocks.EndToEndModel(take_apart(network))
    model.train()
    task.step(model, 0, batch).loss.backward()
    return {name: p.grad for name, p in model._network[0].named_parameters()}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_exact_mode_has_the_gradients_of_ordinary_training(kind, streamed):
    """streamed: the weights of idle blocks are unreadable except while their layer is called, as on a GPU."""
    if kind == "classifier":
        network, task, batch = make_vit(), dblocks.Classification(), make_data().__getitems__(list(range(8)))
    else:
        network, task = make_llama(), dblocks.CausalLM()
        batch = {"input_ids": torch.randint(0, 12, (3, 10), generator=torch.Generator().manual_seed(0))}
    wanted = gradients_of_the_whole(network, task, batch)
    parts = take_apart(network)
    model = BlockCoordinateModel(parts, [range(0, 2), range(2, 4), range(4, 6)])
    model.train()
    for active in range(3):
        home, away = [], []
        if streamed:
            away = [unit for index in range(3) if index != active for unit in units(model.block(index))]
            for tensor in (tensor for unit in away for tensor in unit.parameters()):
                home.append((tensor, tensor.data))
                tensor.data = torch.full_like(tensor.data, float("nan"))
        real = {tensor.data_ptr(): data for tensor, data in home}
        with Visitors(away, Slots(torch.device("cpu"), Elsewhere(real))):
            task.step(model, active, batch).loss.backward()
        for tensor, data in home:
            tensor.data = data
        trained = {name: p.grad for name, p in parts.network.named_parameters() if p.grad is not None}
        assert trained
        for name, gradient in trained.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
        model.zero_grad()


class Elsewhere(lanes.AtOnce):
    """Copies what `real` holds in place of what is asked for. asked: (module is being called, elements) of each
    copy."""

    def __init__(self, real):
        super().__init__()
        self.real, self.calling, self.asked = real, False, []

    def copy(self, lane, pairs, after, *, slow=False):
        self.asked.append((self.calling, sum(len(into) for into, _ in pairs)))
        found = [(into, self.real.get(source.data_ptr(), source).reshape(-1)) for into, source in pairs]
        return super().copy(lane, found, after, slow=slow)


def test_visiting_layers_are_asked_for_ahead_on_the_way_there_and_back():
    """All but the first are on their way while the one before computes, each in one copy, and none comes twice in a
    row."""
    made = exact(3, make_vit())
    model, batch = made.model, next(iter(made.stream.load([0])))
    model.train()
    away = [unit for index in (1, 2) for unit in units(model.block(index))]
    for unit in away:  # as residency lays them
        flat = torch.cat([p.detach().reshape(-1) for p in unit.parameters()])
        for p, piece in zip(unit.parameters(), flat.split([p.numel() for p in unit.parameters()]), strict=True):
            p.data = piece.view_as(p)
    seen, running = Elsewhere({}), []

    class Recording(Visitors):
        def _load(self, number, keep=None):
            running.append((number, self._last))
            super()._load(number, keep)

    slots = Slots(torch.device("cpu"), seen)
    with Recording(away, slots):
        made.task.step(model, 0, batch).loss.backward()
    layers = list(range(len(away)))
    assert [number for number, _ in running] == [
        *layers,
        *layers[-3::-1],
    ]  # the last two are still there on the way back
    assert all(abs(number - before) == 1 for number, before in running[1:])
    assert [size for _, size in seen.asked[:5]] == [sum(p.numel() for p in unit.parameters()) for unit in away]


def test_a_graph_that_outlives_its_slot_is_refused_not_wrong():
    first, second, third = (torch.nn.Linear(3, 3) for _ in range(3))
    for module in (first, second, third):
        module.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    with Visitors([first, second, third], Slots(torch.device("cpu"), lanes.AtOnce())):
        loss = third(second(first(x).tanh()).tanh()).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_exact_mode_trains_only_the_chosen_block_and_saves_an_ordinary_network(tmp_path):
    made = exact(3, make_vit(), residency="disk", order="sequential", steps=2)
    before = weights(made.model)
    batch = made.stream.load([0])
    with made.residency.active(1):
        made.block_step(1, next(iter(batch)))
    after = weights(made.model)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1"}
    made.fit()
    made.model.save_pretrained(tmp_path)
    from transformers import ViTForImageClassification

    loaded, images = ViTForImageClassification.from_pretrained(tmp_path), make_data().__getitems__([0, 1])
    made.model.eval()
    torch.testing.assert_close(loaded(images["pixel_values"]).logits, made.model(images))


class Stopped(torch.nn.Linear):
    """Ctrl-C in its forward pass."""

    def forward(self, hidden):
        raise KeyboardInterrupt


def test_an_interrupt_while_a_module_visits_leaves_it_as_it_was():
    modules = [torch.nn.Linear(3, 3), Stopped(3, 3)]
    before = {id(p) for module in modules for p in module.parameters()}
    with (
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        Visitors(modules, Slots(torch.device("cpu"), lanes.AtOnce())),
    ):
        modules[1](modules[0](torch.ones(1, 3)))
    assert {id(p) for module in modules for p in module.parameters()} == before


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_room_made_before_the_first_step_changes_nothing(optimizer):
    """As on a card, where it keeps what stays apart from what comes and goes."""
    plain, roomy = (trainer(optimizer=optimizer, ema_decay=0.9) for _ in range(2))
    for state in (roomy.shared, *roomy.states):
        state.make_room(torch.device("cpu"))
        assert {name: (t.dtype, t.shape) for name, t in state.tensors().items()} == state.shapes()
    plain.fit()
    roomy.fit()
    for one, other in zip((plain.shared, *plain.states), (roomy.shared, *roomy.states), strict=True):
        assert same(one.tensors(), other.tensors())
