"""What `plan` and equal budgets say a method costs is what its training counts: one formula, in theory/costs.py."""

import dataclasses

import pytest

from diffusionblocks.experiments.run import prepare
from diffusionblocks.methods import METHODS, find_method, for_method
from diffusionblocks.methods.budget import steps_for_budget
from diffusionblocks.planning.plan import choices
from diffusionblocks.planning.workload import Choice, from_recipe
from diffusionblocks.recipes import load_recipe
from diffusionblocks.theory import costs
from tests.language_models import make_pretrained, write_texts

STEPS, SAMPLES, LAYERS = 4, 8, 6
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
TEXT = {"data.length": 16}
CONSTANT = {"task.draw": "constant", "task.mean_iterations": 5, "task.truncation": 2}
# name -> recipe, its settings, number of blocks
FAMILIES = {
    "classification": ("digits", {}, 3),
    "uneven blocks": ("digits", {"blocks.layers_per_block": [1, 3, 2], "train.order": "cyclic"}, 3),
    "on features, each order alone": ("digits", {"blocks.context": "features", "train.order": "cyclic"}, 3),
    "exact in turn": ("digits", {"train.order": "cyclic"}, 2),
    "images": ("dit-digits", {}, 3),
    "masked text": ("mdlm-pydocs", TEXT, 3),
    "next token": ("lm-pydocs", TEXT, 3),
    "a noisy sequence": ("lm-pydocs", {**TEXT, "preset": "paper"}, 2),
    "heads": ("lm-pydocs", {**TEXT, "blocks.head_layers": 1, "train.heads_first": 0.25}, 3),
    "looped": ("looped-pydocs", {**TEXT, **CONSTANT}, 1),
    "adapted": ("adapt", {**TEXT, "train.heads_first": 0.25, "train.keep_graphs": 2}, 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    make_pretrained(folder / "net", layers=LAYERS)
    write_texts(folder / "texts")
    return folder


def recipe_of(family, folder):
    name, settings, num_blocks = FAMILIES[family]
    sizes = {f"model.{key}": value for key, value in SMALL.items()}
    run = {"steps": STEPS, "batch_size": SAMPLES, "num_blocks": num_blocks, "device": "cpu", "train.branch_at": 0.0}
    if name.startswith(("mdlm", "lm", "looped", "adapt")):
        run |= {"data.source": "folder", "data.path": str(folder / "texts"), "data.cache_dir": str(folder / "cache")}
    if name == "adapt":
        sizes = {"model.pretrained": str(folder / "net"), "data.general": "", "train.residency": "device"}
    else:
        run |= {"data.cache_dir": str(folder / "cache")}
    return load_recipe(name, {**sizes, **run, **settings}.items())


def counted(recipe, method):
    """Layer evaluations of one sample in a step of every block."""
    trainer = prepare(dataclasses.replace(recipe, method=method)).trainer
    trainer.fit()
    return trainer.progress.layer_evaluations / STEPS / SAMPLES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_plan_says_what_training_counts(family, folder):
    """Of every method in the table. Recomputation is more: the trainer does not count it."""
    recipe = recipe_of(family, folder)
    work, found = from_recipe(recipe, "this"), set()
    for choice in choices(work, [recipe.blocks.num_blocks]):
        method = find_method(choice.method)
        if method in found:
            continue
        found.add(method)
        said = method.training(work.settled(choice), work.split(choice))
        assert said == pytest.approx(counted(recipe, choice.method)), choice
        more = method.training(work.settled(choice), work.split(choice), costs.RECOMPUTED)
        assert said <= more <= costs.RECOMPUTED * said * (1 + 1e-9)
    assert len(found) >= 4


@pytest.mark.parametrize("family", ["next token", "images", "looped", "adapted"])
def test_equal_budgets_are_equal(family, folder):
    """Steps times what a step costs, for every method of a comparison, to half a step."""
    recipe = dataclasses.replace(
        recipe := recipe_of(family, folder), train=dataclasses.replace(recipe.train, steps=997)
    )
    whole, spent = METHODS["end-to-end"].training(for_method(recipe, "end-to-end"), [LAYERS]) * 997, {}
    for name, method in METHODS.items():
        try:
            prepared = for_method(recipe, name)
        except ValueError:  # not for this family
            continue
        if method.trains:
            work = from_recipe(recipe, "this")
            count = recipe.blocks.num_blocks if method.splits else 1
            each = method.training(prepared, work.split(Choice(method=name, num_blocks=count)))
            spent[name] = steps_for_budget(recipe, name, "layer-evaluations") * each
            assert spent[name] == pytest.approx(whole, abs=each / 2 + 1e-6), name
    assert len(spent) >= 4


def test_formulas_agree_where_they_meet():
    """One block is the whole network; one iteration is an ordinary one; keeping all graphs recomputes nothing."""
    assert costs.in_turn([7]) == costs.in_one_pass([7]) == [pytest.approx(7)]
    assert costs.partly_frozen(7, 7) == pytest.approx(7)
    assert costs.unrolled(2, 5, 1, 1) == costs.unrolled_inference(2, 5, 1) == costs.walked_inference(1, 5, 1, 1) == 7
    assert sum(costs.in_one_pass([2, 2, 2], 3)) == pytest.approx(6)
    assert sum(costs.in_one_pass([2, 2, 2], 1)) < sum(costs.in_turn([2, 2, 2]))
    assert costs.features_made_anew([2, 3, 4]) == pytest.approx((2 + 5) / 3)
    assert costs.denoiser(2, 1, 2, 3, features=True) == 7 and costs.denoiser(2, 1, 2, 3, features=False) == 7
