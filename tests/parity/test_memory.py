"""Measured memory agrees with what is known of the model."""

import pytest

import diffusionblocks as dblocks
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.planning.measure import measure_peak
from tests.conftest import config, make_data, make_vit


def peak(build, **options):
    wide = make_vit(hidden_size=64, intermediate_size=256)
    return measure_peak(dblocks.Trainer(build(wide), dblocks.Classification(), make_data(), None, config(**options)))


def whole(network):
    return dblocks.EndToEndModel(take_apart(network))


def test_end_to_end_parameters_and_optimizer_state_are_what_adam_needs():
    measured = peak(whole)
    parameters = sum(p.nbytes for p in make_vit(hidden_size=64, intermediate_size=256).parameters())
    assert measured.parameters == pytest.approx(parameters, rel=0.01)
    assert measured.optimizer == pytest.approx(2 * parameters, rel=0.01)
    assert measured.total == measured.parameters + measured.gradients + measured.optimizer + measured.activations


@pytest.mark.parametrize("context", ["input", "features"])
def test_only_the_active_block_is_in_memory_after_every_block_has_stepped(context):
    def blocks(network):
        return dblocks.convert(network, 3, context=context)

    end_to_end, resident, parked = peak(whole), peak(blocks), peak(blocks, residency="disk")
    model = blocks(make_vit(hidden_size=64, intermediate_size=256))
    one = max(sum(p.nbytes for p in model.block(b).parameters()) for b in range(3))
    assert parked.parameters == pytest.approx(one, rel=0.05)
    assert parked.optimizer == pytest.approx(2 * one, rel=0.05)
    assert resident.optimizer > 2.5 * parked.optimizer  # idle states count while they stay on the device
    assert parked.total < 0.5 * end_to_end.total


def test_recomputing_activations_saves_memory():
    data_heavy = dict(batch_size=48)
    plain, recomputed = peak(whole, **data_heavy), peak(whole, activation_checkpointing=True, **data_heavy)
    assert recomputed.activations < 0.7 * plain.activations


def test_moving_averages_are_counted():
    plain, averaged = peak(whole), peak(whole, ema_decay=0.9)
    parameters = sum(p.nbytes for p in make_vit(hidden_size=64, intermediate_size=256).parameters())
    assert averaged.total - plain.total == pytest.approx(parameters, rel=0.05)


def test_a_block_needs_its_share_of_the_layers_and_nothing_of_the_others():
    """total <= 1.08 x [(4P + A) L/B + shared parts], after every block has stepped. What does not shrink with the
    layers of a block (stem, readout, input) is read off a network of half the depth."""

    def total(num_layers, num_blocks, **options):
        network = make_vit(hidden_size=64, intermediate_size=256, num_hidden_layers=num_layers)
        blocks = dblocks.convert(network, num_blocks)
        settings = config(residency="disk", batch_size=16, **options)
        return measure_peak(dblocks.Trainer(blocks, dblocks.Classification(), make_data(), None, settings)).total

    whole, half = total(12, 1), total(6, 1)
    per_layer = (whole - half) / 6
    shared = whole - 12 * per_layer
    for num_blocks in (2, 3, 4, 6):
        assert total(12, num_blocks) <= 1.08 * (per_layer * 12 / num_blocks + shared)
