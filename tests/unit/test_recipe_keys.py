"""Keys of a recipe: one for every option, groups on the face and fields behind it, and what earlier versions wrote."""

import dataclasses
import logging

import pytest

import diffusionblocks as dblocks
from diffusionblocks.experiments.run import read_recipe
from diffusionblocks.recipes import build, built_in, changed, load_recipe
from diffusionblocks.recipes.keys import GONE, groups, of_run, owners, places, read, today, written
from diffusionblocks.system import files, plain_yaml
from diffusionblocks.tasks import TASKS

IN_CODE = {"blocks.target"}  # fields that no recipe sets

# Two recipes as the version before had them.
EARLIER = {
    "looped-pydocs": """
name: looped-pydocs
description: >-
  looped next-token language model on CPython's documentation (embedded), bytes, 1+2+1 layers, minutes on a CPU
task: {kind: recurrent-lm, iterations: 16, mean_iterations: 16, truncation: 8, curve: [1, 2, 4, 8, 16, 32]}
data: {source: pydocs, tokenizer: bytes, length: 128}
model:
  {model_class: LlamaForCausalLM, hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 192}
blocks: {num_blocks: 1, prelude: 1, coda: 1, least_hidden: 0.9, condition_width: 64}
train: {steps: 400, batch_size: 16, learning_rate: 4.0e-3, weight_decay: 0.03, hold: 0.5, evaluate_every: 100}
methods:
  shallow: {train: {learning_rate: 6.0e-3, evaluate_every: 600}}
  diffusionblocks: {train: {learning_rate: 6.0e-3, evaluate_every: 600}}
  diffusionblocks-paper: {train: {evaluate_every: 600}}
""",
    "dit-cifar10": """
name: dit-cifar10
description: CIFAR-10, the paper's DiT-S/2 and settings (needs the dataset and a GPU)
task: {kind: image-generation, sampler: euler, sampling_steps: 50, guidance: 2.0, num_samples: 50000, evaluations: 3}
data:
  {source: huggingface, path: uoft-cs/cifar10, image_size: 32, channels: 3, image_key: img, validation_share: 0.02,
  augment: [flip]}
model:
  {model_class: DiTTransformer2DModel, hidden_size: 384, num_hidden_layers: 12, num_attention_heads: 6, patch_size: 2}
blocks: {num_blocks: 3}
train: {steps: 150000, batch_size: 512, learning_rate: 1.0e-4, schedule: constant}
""",
}


@pytest.mark.parametrize("task", TASKS)
def test_every_option_has_one_key_and_every_key_one_option(task):
    fields = {f"{name}.{field.name}" for name, kind in groups(task).items() for field in dataclasses.fields(kind)}
    assert sorted(places(task).values()) == sorted(fields - IN_CODE)
    assert all(key.count(".") == 1 for key in places(task))


@pytest.mark.parametrize("task", TASKS)
def test_a_key_and_its_earlier_name_mean_the_same_for_every_task(task):
    for key, place in places(task).items():
        assert today(key) == today(place) == key
        group, field = place.split(".")
        assert (groups(task)[group], field) in owners(key)


def test_every_option_of_a_task_is_of_its_objective_its_sampling_or_its_evaluation():
    for task in TASKS:
        own = {key.split(".")[0] for key, place in places(task).items() if place.startswith("task.")}
        assert {"task"} < own <= {"task", "objective", "sampling", "evaluation"}
        assert [key for key in places(task) if key.startswith("task.")] == ["task.kind"]


@pytest.mark.parametrize("name", built_in())
def test_what_is_written_is_read_as_it_was(name):
    recipe = load_recipe(name)
    text = plain_yaml.dump(written(recipe.as_dict()))
    assert build(plain_yaml.parse(text, name)) == build(recipe.as_dict()) == recipe
    assert read(written(recipe.as_dict())) == recipe.as_dict()


@pytest.mark.parametrize("name", built_in())
def test_built_in_recipes_are_written_with_the_names_of_today(name, caplog):
    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        load_recipe(name)
    assert not caplog.messages


@pytest.mark.parametrize("name", EARLIER)
def test_recipes_of_earlier_versions_mean_what_they_meant(name, tmp_path, caplog):
    path = tmp_path / "earlier.yaml"
    path.write_text(EARLIER[name])
    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        found = load_recipe(str(path), [("task.sampler", "euler"), ("train.heads_first", 0.1)])
    expected = load_recipe(name, [("sampling.sampler", "euler"), ("local.heads_first", 0.1)])
    if name == "dit-cifar10":  # its other settings are not what is tested
        assert (found.task, found.blocks, found.data) == (expected.task, expected.blocks, expected.data)
        assert found.train.schedule == expected.train.schedule == "constant"
    else:
        assert found == dataclasses.replace(expected, description=found.description)
    assert len(caplog.messages) == 1  # however many, what was typed first
    assert "task.sampler is now sampling.sampler" in caplog.text
    assert "more (the old names are still read" in caplog.text


def test_presets_and_methods_have_the_same_keys(tmp_path):
    path = tmp_path / "r.yaml"
    text = """
presets:
  mine:
    {noise}: {{sigma_min: 0.01}}
    {sampling}: {{sampler: euler}}
    methods: {{exact: {{{local}: {{trust: true}}}}}}
methods: {{shallow: {{{noise}: {{overlap: 0.2}}}}}}
"""
    found = []
    for names in (
        {"noise": "noise", "sampling": "sampling", "local": "local"},
        {"noise": "blocks", "sampling": "task", "local": "train"},
    ):
        path.write_text(text.format(**names))
        found.append(load_recipe(str(path), [("preset", "mine")]))
    assert found[0] == found[1]
    assert found[0].blocks.sigma_min == 0.01 and found[0].task.sampler == "euler"
    assert found[0].methods == {"exact": {"train": {"trust": True}}, "shallow": {"blocks": {"overlap": 0.2}}}
    path.write_text(plain_yaml.dump(written(found[0].as_dict())))
    assert build(plain_yaml.parse(path.read_text(), "r")) == found[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"noise": {"sigma_mim": 1}}, r"unknown key 'noise.sigma_mim'; did you mean 'noise.sigma_min'\?"),
        ({"train": {"sigma_min": 1}}, r"unknown key 'train.sigma_min'; did you mean 'noise.sigma_min'\?"),
        ({"train": {"learning_rat": 1}}, r"did you mean 'train.learning_rate'\?"),
        ({"sampling": {"guidance": 2}}, "'sampling.guidance' for the task classification: other tasks have it"),
        ({"task": {"curve": [2]}}, "'task.curve' for the task classification: other tasks have it"),
        ({"task": {"sampling_step": 2}}, r"unknown key 'task.sampling_step'; did you mean 'sampling.steps'\?"),
        ({"evaluation": {"num_sampels": 2}}, r"unknown key 'evaluation.num_sampels'"),
        ({"lora": {"q" * 20: 2}}, "'; known: lora.alpha, lora.rank"),
        ({"trian": {}}, r"unknown key 'trian'; did you mean 'train'\?"),
        ({"noise": None}, "noise must be a group of keys, got null"),
        (
            {"noise": {"overlap": 0.1}, "blocks": {"overlap": 0.2}},
            "noise.overlap is given twice, once as blocks.overlap, its earlier name",
        ),
        ({"methods": {"exact": {"noise": {"overlab": 0.1}}}}, r"did you mean 'noise.overlap'\?"),
    ],
)
def test_keys_that_there_are_not_are_said_with_the_nearest(content, message):
    with pytest.raises(dblocks.UserError, match=message):
        build(content)


@pytest.mark.parametrize("key", GONE)
def test_settings_that_are_gone_say_what_decides_now(key, tmp_path):
    with pytest.raises(dblocks.UserError, match=f"^{key} is no setting any more: "):
        load_recipe("digits", [(key, 1)])


@pytest.mark.parametrize(("key", "value"), [("train.own_rate", "0.5"), ("train.decay_from", "hold")])
def test_a_gone_setting_that_made_a_difference_is_refused_wherever_it_stands(key, value, tmp_path):
    group, name = key.split(".")
    for text in (f"{group}: {{{name}: {value}}}", f"methods: {{exact: {{{group}: {{{name}: {value}}}}}}}"):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(dblocks.UserError, match=f"^{key} is no setting any more: "):
            load_recipe(str(tmp_path / "r.yaml"))


def earlier(recipe, **train):
    """config.yaml as the version before wrote it: flat, with all its options."""
    content = dataclasses.asdict(recipe)
    old = {"own_rate": 1.0, "decay_from": "branch", "prefetch": None}
    content["train"] |= {**old, **train}
    return content


def test_runs_of_earlier_versions_are_read_without_a_word(tmp_path, caplog):
    recipe = load_recipe("mdlm-pydocs")
    content = earlier(recipe)
    content["methods"]["diffusionblocks"]["train"]["decay_from"] = "hold"  # what the recipe had with own batches
    (tmp_path / "config.yaml").write_text(files.sealed(plain_yaml.dump(content)))
    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        assert read_recipe(tmp_path) == recipe
    assert not caplog.messages


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"own_rate": 0.5}, r"train.own_rate 0.5, which is no setting any more"),
        ({"decay_from": "hold"}, r"train.decay_from 'hold', which is no setting any more"),
        ({"own_batch": 4}, r"train.decay_from 'branch', which is no setting any more"),
        ({"own_batch": 4, "decay_from": "hold", "prefetch": True}, ""),
    ],
)
def test_what_a_run_had_and_nothing_can_do_any_more_is_refused(train, message):
    content = earlier(load_recipe("digits"), **train)
    if message:
        with pytest.raises(dblocks.UserError, match=message):
            of_run(content)
    else:
        assert build(of_run(content)).train.own_batch == 4


def test_later_changes_take_both_names(caplog):
    recipe = load_recipe("dit-digits")
    allowed = ("sampling.", "train.device")
    found = changed(recipe, [("sampling.steps", 3)], allowed)
    assert found.task.sampling_steps == 3
    assert changed(recipe, [("task.sampling_steps", 3)], allowed) == found
    assert "task.sampling_steps is now sampling.steps" in caplog.text
    for key in ("train.steps", "task.kind", "objective.label_dropout"):
        with pytest.raises(dblocks.UserError, match=f"{key} cannot be changed after training"):
            changed(recipe, [(key, 3)], allowed)
    with pytest.raises(dblocks.UserError, match=r"did you mean 'sampling.guidance'\?"):
        changed(recipe, [("sampling.guidanc", 3)], allowed)


def test_what_is_gone_is_dropped_where_it_says_what_holds_anyway(tmp_path, caplog):
    path = tmp_path / "earlier.yaml"
    path.write_text(
        "task: {kind: masked-lm}\ndata: {source: pydocs}\nblocks: {target: masked}\n"
        "train: {own_batch: 8, decay_from: hold, prefetch: null, own_rate: 1.0}\n"
        "methods: {shallow: {train: {own_rate: 1.0}}}\n"
    )
    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        assert load_recipe(str(path)).train.own_batch == 8
    (line,) = caplog.messages
    for key in ("train.own_rate", "train.decay_from", "train.prefetch", "blocks.target"):
        assert key in line
    path.write_text("train: {own_rate: 0.5}\n")
    with pytest.raises(dblocks.UserError, match=r"train\.own_rate is no setting any more"):
        load_recipe(str(path))
