"""Laws of conversion: ownership, isolation of blocks, preserved function."""

import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.networks.adapter import check_ownership
from diffusionblocks.networks.registry import take_apart
from tests.conftest import CONVERSIONS, config, make_data, make_deit, make_vit, same, weights

BATCH = make_data(8).__getitems__(list(range(8)))
LEVEL = torch.linspace(0.3, 2.0, 8)


@pytest.fixture(params=[make_vit, make_deit], ids=["vit", "deit"])
def network(request):
    return request.param().eval()


def context_of(model, block):
    context = model.context(BATCH, block)
    return {} if context is None else {"context": context}


def test_every_parameter_has_exactly_one_owner(network, conversion):
    model = dblocks.convert(network, 3, **conversion)
    owners = model.owners()
    assert set(owners) == {name for name, _ in model.named_parameters()}
    for block in range(3):
        ids = {id(p) for p in model.block(block).parameters()}
        others = [p for b in range(3) if b != block for p in model.block(b).parameters()]
        others += list(model.shared.parameters())
        assert not ids & {id(p) for p in others}
        assert sum(owner == f"block {block}" for owner in owners.values()) == len(ids)


def test_an_adapter_that_forgets_or_repeats_a_parameter_is_refused(network):
    body = next(network.children())
    with pytest.raises(dblocks.UserError, match="does not cover"):
        check_ownership(network, [body.embeddings, body.layers])
    with pytest.raises(dblocks.UserError, match="two parts"):
        check_ownership(network, [network, body.layers])


def test_the_callers_network_is_not_touched(network, conversion):
    before, modules = weights(network), [type(m) for m in network.modules()]
    model = dblocks.convert(network, 3, **conversion)
    dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config()).fit()
    assert same(before, weights(network))
    assert [type(m) for m in network.modules()] == modules


@pytest.mark.parametrize("name", ["features", "features-head", "input-add"])
def test_conversion_preserves_the_function(network, name):
    """One block over all layers returns the original logits; in features context so does the deepest of several."""
    conversion = dict(CONVERSIONS[name])
    with torch.no_grad():
        expected = network(BATCH["pixel_values"]).logits
        if name == "features-head":
            conversion["head_layers"] = 0
        blocks = 1 if conversion["context"] == "input" else 3
        model = dblocks.convert(network, blocks, **conversion).eval()
        batch = {**BATCH, **context_of(model, blocks - 1)}
        output = model.denoiser(blocks - 1)(batch, LEVEL)
    torch.testing.assert_close(output.raw, expected, atol=1e-5, rtol=0)


def test_end_to_end_is_the_network_itself_and_saves_as_one(network, tmp_path):
    model = dblocks.EndToEndModel(take_apart(network)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(BATCH), network(BATCH["pixel_values"]).logits)
    shallow = dblocks.EndToEndModel(take_apart(network), 2).eval()
    shallow.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCH["pixel_values"]).logits, shallow(BATCH))


def test_no_gradient_crosses_a_block_border(conversion):
    model = dblocks.convert(make_vit(), 3, **conversion)
    for block in range(3):
        model.zero_grad()
        model.denoiser(block)({**BATCH, **context_of(model, block)}, LEVEL).loss.backward()
        for other in range(3):
            touched = any(p.grad is not None for p in model.block(other).parameters())
            assert touched == (other == block)


def test_every_trainable_parameter_of_a_block_gets_a_gradient(conversion):
    model = dblocks.convert(make_vit(), 3, **conversion)
    for block in range(3):
        model.denoiser(block)({**BATCH, **context_of(model, block)}, LEVEL).loss.backward()
        missing = [name for name, p in model.block(block).named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
    assert [n for n, p in model.shared.named_parameters() if p.requires_grad and p.grad is None] == []


def test_idle_blocks_and_their_optimizer_states_are_bit_identical_after_a_step(conversion):
    model = dblocks.convert(make_vit(), 3, **conversion)
    trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, config(steps=2))
    trainer.fit()
    before = [{k: v.clone() for k, v in state.tensors().items()} for state in trainer.states]
    trainer.block_step(1, {**BATCH, **context_of(model, 1)})
    after = [state.tensors() for state in trainer.states]
    assert same(before[0], after[0])
    assert same(before[2], after[2])
    assert not same(before[1], after[1])
    assert any(name.startswith("optimizer.") for name in before[0])


def test_a_denoiser_is_an_ordinary_module_that_any_loop_can_train(conversion):
    model = dblocks.convert(make_vit(), 3, **conversion)
    denoiser = model.denoiser(1)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.05)
    batch, losses = {**BATCH, **context_of(model, 1)}, []
    for _ in range(20):
        torch.manual_seed(0)
        loss = denoiser(batch, LEVEL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_noise_level_matters_once_conditioning_has_moved():
    model = dblocks.convert(make_vit(), 3, **CONVERSIONS["paper"]).eval()
    for name, parameter in model.named_parameters():
        if "modulation.weight" in name:
            torch.nn.init.normal_(parameter)
    batch = {**BATCH, "noisy_target": torch.zeros(8, 16)}
    raw = [model.denoiser(0)(batch, torch.full((8,), sigma)).raw for sigma in (0.1, 10.0)]
    assert not torch.allclose(*raw)


def test_save_and_load_round_trip(conversion, tmp_path):
    model = dblocks.convert(make_vit(), 3, **conversion).eval()
    model.save_pretrained(tmp_path)
    loaded = dblocks.load(tmp_path)
    assert same(weights(model), weights(loaded))
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt")) + list(tmp_path.glob("*.pkl"))
    task = dblocks.Classification()
    torch.testing.assert_close(task.log_probabilities(loaded, BATCH), task.log_probabilities(model, BATCH))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_blocks": 4}, "1, 2, 3, 6"),
        ({"contxt": "input"}, "did you mean 'context'"),
        ({"context": "inputs"}, "must be one of input, features"),
        ({"head_layers": 1, "context": "input"}, "features"),
        ({"readout": "linear"}, "condition_width"),
        ({"target_table": "trained", "shared": "copies", "context": "input"}, "agree on the table"),
    ],
)
def test_wrong_options_say_what_is_needed(options, words):
    with pytest.raises(dblocks.UserError, match=words):
        dblocks.convert(make_vit(), **options)


def test_an_unsupported_network_lists_what_is_supported():
    with pytest.raises(dblocks.UserError, match="ViTForImageClassification"):
        dblocks.convert(torch.nn.Linear(2, 2), 1)


def test_summary_names_every_block_and_the_owner_of_shared_parts(conversion):
    text = dblocks.convert(make_vit(), 3, **conversion).summary()
    assert all(word in text for word in ("0-1", "2-3", "4-5", "80 to", "shared"))
