"""Evaluating nothing is an error that says so, for every task."""

import pytest

import diffusionblocks as dblocks
from tests.conftest import config, make_data, make_dit, make_llama, make_vit

CASES = {
    "classification": lambda: (dblocks.convert(make_vit(), 3), dblocks.Classification()),
    "image-generation": lambda: (dblocks.convert(make_dit(), 3), dblocks.ImageGeneration()),
    "masked-lm": lambda: (dblocks.convert(make_llama(), 3, target="masked"), dblocks.MaskedLM()),
    "causal-lm": lambda: (dblocks.convert(make_llama(), 3, target="causal", context="features"), dblocks.CausalLM()),
}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_to_evaluate_is_said(kind):
    if kind == "image-generation":
        pytest.importorskip("diffusers")
    model, task = CASES[kind]()
    with pytest.raises(dblocks.UserError, match="nothing to evaluate"):
        task.evaluate(model, [])


def test_a_trainer_says_it_before_it_trains():
    model, none = dblocks.convert(make_vit(), 3), make_data(0)
    with pytest.raises(dblocks.UserError, match=r"evaluate_every has nothing to evaluate"):
        dblocks.Trainer(model, dblocks.Classification(), make_data(), none, config(evaluate_every=2))
    trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), none, config())
    with pytest.raises(dblocks.UserError, match="nothing to evaluate"):
        trainer.evaluate(none)
