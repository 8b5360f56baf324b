"""Options say their own ranges, and nothing outside of them runs."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusionblocks as dblocks
from diffusionblocks.methods import for_method
from diffusionblocks.options import LARGEST, Range, check_options, check_value, limits_of, option
from diffusionblocks.recipes import ModelConfig, build, load_recipe
from diffusionblocks.recipes.load import read_value
from diffusionblocks.recipes.schema import InContextConfig, LoraConfig
from diffusionblocks.tasks import TASKS

GROUPS = {
    "train": dblocks.TrainingConfig,
    "blocks": dblocks.BlocksConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "in_context": InContextConfig,
}


@dataclasses.dataclass(kw_only=True)
class Sample:
    count: int = option(3, least=1)
    share: float = option(0.5, least=0, below=1)
    pair: list[float] = option([0.1, 0.2], above=0, most=1, count=2)
    kind: str = option("a", choices=("a", "b"))
    switch: bool = False
    perhaps: float | list[float] | None = option(None, least=0)


def said(function) -> str:
    """What a UserError says; nothing where there is none."""
    try:
        function()
    except dblocks.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, r"g\.count must be at least 1, got 0"),
        ({"count": 1.5}, r"g\.count must be a whole number \(at least 1\), got 1\.5"),
        ({"count": True}, "must be a whole number"),
        ({"count": "3"}, "must be a whole number"),
        ({"count": None}, "got null"),
        ({"count": 10**30}, "a number of 31 digits"),
        ({"share": math.nan}, "must be a finite number, got nan"),
        ({"share": -math.inf}, "must be a finite number, got -inf"),
        ({"share": 1}, "at least 0 and below 1, got 1"),
        ({"pair": [0.1]}, "must have 2 elements, got 1"),
        ({"pair": 0.1}, "must be a list of 2 numbers"),
        ({"pair": [0.1, math.nan]}, "finite"),
        ({"pair": [0.1, 0]}, "above 0 and at most 1, got 0"),
        ({"kind": "c"}, "must be one of a, b; got 'c'"),
        ({"kind": 5}, "must be one of a, b, got 5"),
        ({"switch": 1}, "must be true or false, got 1"),
        ({"perhaps": [1, -1]}, "at least 0, got -1"),
        ({"perhaps": "x" * 1000}, r"\.\.\.$"),
    ],
)
def test_what_is_outside_is_said_with_what_would_be_right(changes, message):
    with pytest.raises(dblocks.UserError, match=message):
        check_options("g", Sample(**changes))


def test_what_is_inside_passes_and_lists_are_not_shared():
    check_options("g", Sample(count=np.int64(5), share=np.float32(0.5), pair=(0.5, 1), perhaps=[0, 1.5]))
    assert Sample.count == 3
    first, second = Sample(), Sample()
    first.pair.append(1.0)
    assert second.pair == [0.1, 0.2]


@settings(deadline=None)
@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.text(),
        st.integers(),
        st.floats(),
        st.lists(st.integers()),
        st.just({}),
        st.just(b"x"),
    )
)
def test_every_value_passes_or_is_one_line(value):
    for field in dataclasses.fields(Sample):
        line = said(lambda field=field: check_options("g", Sample(**{field.name: value})))
        assert line == "" or (line.startswith(f"g.{field.name} must ") and "\n" not in line and len(line) < 250)


@settings(deadline=None)
@given(st.integers() | st.floats(allow_nan=False), st.integers(-5, 5), st.integers(-5, 5))
def test_a_range_holds_what_its_words_say(value, low, high):
    limits = Range(least=low, below=high)
    inside = low <= value < high and abs(value) <= LARGEST
    if inside:
        check_value("x", value, float, limits)
    else:
        with pytest.raises(dblocks.UserError):
            check_value("x", value, float, limits)


OUTSIDE = [
    *((f"train.{name}", value) for name, value in {
        "steps": 0, "batch_size": 0, "accumulation": 0, "learning_rate": 0, "weight_decay": -1, "betas": [0.9, 1],
        "warmup": 5, "hold": -1, "max_grad_norm": -1, "blocks": [-1], "keep_graphs": 0, "visit_steps": 0,
        "branch_at": 1, "own_batch": -1, "ema_decay": 1, "num_workers": -1,
        "log_every": -1, "checkpoint_every": -1, "evaluate_every": -1, "keep_checkpoints": 0, "seed": 10**20,
        "order": "zigzag", "precision": "fp8", "learning_rate_schedule": "linear",
    }.items()),
    *((f"blocks.{name}", value) for name, value in {
        "num_blocks": 0, "layers_per_block": [0], "condition_width": -1,
    }.items()),
    *((f"noise.{name}", value) for name, value in {
        "p_std": 0, "sigma_min": 0, "sigma_max": -1, "least_hidden": 1, "overlap": -1, "p_mean": math.nan,
    }.items()),
    *((f"local.{name}", value) for name, value in {"head_layers": -1, "ordinary": -1, "heads_first": 1}.items()),
    ("looped.prelude", -1), ("looped.coda", -1),
    *((f"model.{name}", value) for name, value in {
        "hidden_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0, "intermediate_size": 0, "patch_size": 0,
        "dropout": 2,
    }.items()),
    *((f"data.{name}", value) for name, value in {
        "image_size": 0, "channels": 0, "validation_share": 0, "test_share": 1, "latent_scale": -1,
    }.items()),
    ("lora.rank", 0), ("lora.alpha", 0), ("in_context.tokens", 0), ("objective.label_smoothing", 5),
    ("objective.loss_weight", "legacy"), ("sampling.steps", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OUTSIDE, ids=[key for key, _ in OUTSIDE])
def test_ranges_hold_before_anything_runs(key, value):
    with pytest.raises(dblocks.UserError, match=rf"^{key.replace('.', '[.]')} must be "):
        load_recipe("digits", [(key, value)])


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        *(("dit-digits", name, value) for name, value in {
            "sampling.guidance": math.nan, "sampling.steps": 0, "objective.label_dropout": 2,
            "evaluation.num_samples": -1, "evaluation.sample_sets": 0, "evaluation.levels_per_image": 0,
        }.items()),
        *(("mdlm-pydocs", name, value) for name, value in {
            "sampling.temperature": -1, "sampling.top_p": 0, "sampling.top_k": -1, "sampling.steps": 0,
            "evaluation.levels_per_text": 0, "evaluation.num_samples": -1,
        }.items()),
        *(("lm-pydocs", name, value) for name, value in {
            "evaluation.continued": 0, "evaluation.continuations": -1, "evaluation.levels_per_block": 0,
            "sampling.top_p": 2, "sampling.temperature": math.inf,
        }.items()),
        *(("looped-pydocs", name, value) for name, value in {
            "sampling.iterations": 0, "objective.mean_iterations": 0, "objective.truncation": 0,
            "sampling.early_exit": -1, "evaluation.curve": [0],
        }.items()),
        *(("lm-pydocs", f"data.{name}", value) for name, value in {
            "length": 1, "validation_share": 0, "max_documents": -1, "evaluated": -1, "packing": "tight",
            "encoding_errors": "ignore",
        }.items()),
    ],
)  # fmt: skip
def test_ranges_of_every_task_hold(recipe, key, value):
    with pytest.raises(dblocks.UserError, match=rf"^{key.replace('.', '[.]')} must be "):
        load_recipe(recipe, [(key, value)])


@pytest.mark.parametrize(
    "kind", [*GROUPS.values(), *TASKS.values(), *dict.fromkeys(task.data for task in TASKS.values())]
)
def test_every_number_has_a_range(kind):
    """Defaults are inside, NaN and a far too large number are not; a number without bounds may be any finite one."""
    free = {"p_mean", "seed", "split_seed"}
    check_options("g", kind())
    for field in dataclasses.fields(kind):
        if str(field.type).split("[")[-1].rstrip("]").split(" |")[0] not in ("int", "float"):
            continue
        if field.name not in free:
            assert limits_of(field).words(), f"{kind.__name__}.{field.name} has no range"


def test_python_callers_are_checked_too():
    with pytest.raises(dblocks.UserError, match=r"train\.steps must be a whole number"):
        dblocks.TrainingConfig(steps="100").check()
    with pytest.raises(dblocks.UserError, match=r"objective\.label_smoothing"):
        dblocks.Classification(label_smoothing=5)
    recipe = load_recipe("digits")
    for name, changes in {"model": {"patch_size": 0}, "data": {"test_share": 2}, "lora": {"rank": 0}}.items():
        group = dataclasses.replace(getattr(recipe, name), **changes)
        with pytest.raises(dblocks.UserError, match=rf"^{name}\."):
            for_method(dataclasses.replace(recipe, **{name: group}), "shallow")
    with pytest.raises(dblocks.UserError, match=r"noise\.overlap"):
        dblocks.BlocksConfig(overlap=math.nan).check()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.betas", "0.9,0.99", [0.9, 0.99]),
        ("train.betas", "[0.9, 0.99]", [0.9, 0.99]),
        ("train.blocks", "0,2", [0, 2]),
        ("train.blocks", "1", [1]),
        ("train.blocks", "", []),
        ("train.branch_at", "0.5", 0.5),
        ("train.branch_at", "null", None),
        ("data.augment", "flip, shift", ["flip", "shift"]),
        ("data.augment", "[flip]", ["flip"]),
        ("data.suffixes", ".py,.txt", [".py", ".txt"]),
        ("evaluation.curve", "1,2", [1, 2]),
        ("task.curve", "1,2", [1, 2]),
        ("learning_rate", "1e-3", 1e-3),
        ("steps", "12", 12),
        ("train.compile", "true", True),
        ("data.path", "012", "012"),
        ("data.path", "true", "true"),
        ("model.pretrained", "2024", "2024"),
        ("train.device", "cuda:1", "cuda:1"),
    ],
)
def test_texts_of_the_command_line_are_read_by_the_option(key, text, value):
    found = read_value(key, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": None}, "methods must be a group of keys, got null"),
        ({"presets": None}, "presets must be a group of keys, got null"),
        ({"methods": {"exact": None}}, r"methods\.exact must be a group of keys"),
        ({"train": None}, "train must be a group of keys"),
        ({"train": {"steps": None}}, r"train\.steps must be a whole number .*got null"),
        ({"name": 5}, "name must be text, got 5"),
        ({"preset": 5}, "preset must be text, got 5"),
        ({"task": {"kind": ["x"]}}, r"unknown task\.kind"),
        *(({"name": name}, "plain file name") for name in ("", "..", ".x", "a/b", "a\\b", "a\nb", "a\0b", "x" * 101)),
    ],
)
def test_shapes_that_a_recipe_cannot_have(content, message):
    with pytest.raises(dblocks.UserError, match=message):
        build(content)


def test_a_name_of_a_preset_leads_nowhere_else(tmp_path):
    (tmp_path / "r.yaml").write_text("preset: ../../x\npresets: {../../x: {train: {steps: 1}}}\n")
    with pytest.raises(dblocks.UserError, match="preset must be a plain file name"):
        load_recipe(str(tmp_path / "r.yaml"))
