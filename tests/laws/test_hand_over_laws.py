"""A step is a function of its arguments: another process, which has nothing else, makes the same one."""

import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusionblocks as dblocks
from diffusionblocks.blocks.handed import Passage
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.theory.partition import split_layers
from tests.conftest import Counting, config, make_data, make_gpt2, make_llama, make_vit

SPANS = [range(0, 2), range(2, 4), range(4, 6)]
HEADS = dict(context="features", target_entry="none", shared="frozen", head_layers=1, head_start="last")


def labels(**blocks):
    return dblocks.convert(make_vit(hidden_dropout_prob=0.2), 3, **blocks), dblocks.Classification(), make_data()


def tokens(**blocks):
    return dblocks.convert(make_llama(), 3, target="causal", **blocks), dblocks.CausalLM(), Counting()


def exact(make, task, data):
    return dblocks.BlockCoordinateModel(take_apart(make()), SPANS), task, data


def exact_tokens():
    return exact(partial(make_gpt2, tie_word_embeddings=False, resid_pdrop=0.2), dblocks.CausalLM(), Counting())


def exact_labels():
    return exact(partial(make_vit, hidden_dropout_prob=0.2), dblocks.Classification(), make_data())


# How the model, its task and data are made; options of training.
CASES = {
    "input": (labels, {"order": "sweep"}),
    "input, shared parts": (partial(labels, shared="trained"), {"order": "sweep"}),
    "features": (partial(labels, context="features", target_entry="none"), {"order": "sweep"}),
    "features of tokens": (partial(tokens, context="features", target_entry="none"), {"order": "sweep"}),
    "heads that settle": (partial(tokens, **HEADS, distill=True), {"heads_first": 0.9, "trust": True}),
    "trust": (partial(tokens, **HEADS), {"trust": True, "ema_decay": 0.9}),
    "mixed": (partial(tokens, **HEADS, ordinary=1.0), {"order": "sweep"}),
    "exact backward": (exact_tokens, {"order": "backward"}),
    "exact backward, labels": (exact_labels, {"order": "backward"}),
    "exact sweep": (exact_tokens, {"order": "sweep"}),
}


def a_trainer(case, parts):
    make, options = CASES[case]
    return dblocks.Trainer(*make(), None, config(learning_rate=1e-2, accumulation=parts, **options))


def packed(handed):
    """What is handed on as tensors by name, and the rest of it as numbers."""
    tensors, numbers = {}, []
    for part, one in enumerate(handed):
        if not isinstance(one, Passage):
            tensors[f"{part}.features"] = one
            numbers.append(None)
            continue
        assert not one.leaving and not one.graphs, "kept graphs stay where they are"
        entering = {f"entering.{block}": tensor for block, tensor in one.entering.items()}
        named = {"gradient": one.gradient, "loss": one.loss, **entering}
        tensors |= {f"{part}.{name}": tensor.detach() for name, tensor in named.items() if tensor is not None}
        numbers.append({"trained": list(one.trained), "seed": one.seed, "reached": one.reached})
    return tensors, numbers


def unpacked(tensors, numbers):
    handed = []
    for part, found in enumerate(numbers):
        own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
        if found is None:
            handed.append(own["features"])
            continue
        lowest = min(found["trained"])
        entering = {
            int(name.rpartition(".")[2]): tensor.requires_grad_(int(name.rpartition(".")[2]) > lowest)
            for name, tensor in own.items()
            if name.startswith("entering.")
        }
        handed.append(Passage(**found, entering=entering, gradient=own.get("gradient"), loss=own.get("loss")))
    return handed


def everything(trainer, index):
    """All tensors of the model, and what the block and the shared parts have beside them."""
    states = {"block": trainer.states[index], "shared": trainer.shared}
    kept = {
        f"{owner}/{name}": tensor
        for owner, state in states.items()
        for name, tensor in state.tensors().items()
        if not name.startswith("model.")
    }
    model = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in {**model, **kept}.items()}


def take_over(trainer, index, tensors, steps):
    """The state that another process wrote down."""
    trainer.model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    for owner, state in (("block", trainer.states[index]), ("shared", trainer.shared)):
        own = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{owner}/")}
        state.replace(own)
        state.steps = steps[owner]


def make_step(folder, name):
    """In another process: one step, from files to files."""
    facts = json.loads((folder / f"{name}.json").read_text())
    trainer, index = a_trainer(facts["case"], facts["parts"]), facts["index"]
    take_over(trainer, index, load_file(folder / f"{name}-state.safetensors"), facts["steps"])
    trainer.local.recent = {int(block): torch.tensor(loss) for block, loss in facts["recent"].items()}
    handed = unpacked(load_file(folder / f"{name}-handed.safetensors"), facts["handed"])
    batch = load_file(folder / f"{name}-batch.safetensors")
    made = trainer.worker.step(index, (trainer.states[index], trainer.shared), batch, handed)
    save(folder, f"{name}-made", trainer, index, made)


def save(folder, name, trainer, index, made):
    tensors, numbers = packed(made.handed)
    found = {**everything(trainer, index), **{f"handed/{key}": tensor for key, tensor in tensors.items()}}
    save_file({**found, "loss": made.loss.clone()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"handed": numbers, "layers": made.layers}))


def a_round(trainer, batch, around):
    handed = ()
    for index in trainer.round:
        handed = handed or trainer.entering(index, batch)
        done = around(index, batch, handed)
        made = trainer.block_step(index, batch, handed)
        if done is not None:
            done(made)
        handed = made.handed


def write_down(folder, names, case, parts, trainer, index, batch, handed):
    """All that a step gets, before it is made; returns what writes down its result."""
    name, (tensors, numbers) = f"step-{len(names)}", packed(handed)
    steps = {"block": trainer.states[index].steps, "shared": trainer.shared.steps}
    recent = {block: loss.item() for block, loss in trainer.local.recent.items()}
    facts = {"case": case, "parts": parts, "index": index, "handed": numbers, "steps": steps, "recent": recent}
    (folder / f"{name}.json").write_text(json.dumps(facts))
    save_file(everything(trainer, index), folder / f"{name}-state.safetensors")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / f"{name}-handed.safetensors")
    save_file(dict(batch), folder / f"{name}-batch.safetensors")
    names.append(name)
    return partial(save, folder, f"{name}-here", trainer, index)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every step of the second round of every case as the trainer makes it; then, in another process, each of them
    again."""
    folder, names = tmp_path_factory.mktemp("steps"), []
    for case, parts in product(CASES, (1, 2)):
        trainer = a_trainer(case, parts)
        first, second = trainer.stream.load(range(2))
        a_round(trainer, first, lambda *made: None)  # optimizers have a state
        a_round(trainer, second, partial(write_down, folder, names, case, parts, trainer))
    code = (
        "import sys; from pathlib import Path; from tests.laws.test_hand_over_laws import make_step; "
        "[make_step(Path(sys.argv[1]), name) for name in sys.argv[2:]]"
    )
    # In another order than they were made in: none may rely on what an earlier one left behind.
    subprocess.run(
        [sys.executable, "-c", code, str(folder), *reversed(names)], check=True, cwd=Path(__file__).parents[2]
    )
    return folder, names


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_another_process_makes_the_same_step(written, case, parts):
    """From tensors, batch, coordinates of the draws and what is handed: loss, state and what is handed on, to the
    bit."""
    folder, names = written
    seen = 0
    for name in names:
        facts = json.loads((folder / f"{name}.json").read_text())
        if (facts["case"], facts["parts"]) != (case, parts):
            continue
        here, there = (load_file(folder / f"{name}-{where}.safetensors") for where in ("here", "made"))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
        numbers = [json.loads((folder / f"{name}-{where}.json").read_text()) for where in ("here", "made")]
        assert numbers[0] == numbers[1]
        before = load_file(folder / f"{name}-state.safetensors")
        moved = [key for key in before if key.startswith("model/blocks.") and not torch.equal(before[key], here[key])]
        assert {key.split(".")[1] for key in moved} == {str(facts["index"])}
        seen += 1
    assert seen == 3


def test_a_task_that_does_not_hand_the_gradient_on_is_refused():
    class Silent(dblocks.Classification):
        def step(self, *arguments, **options):
            return super().step(*arguments, **options)._replace(handed=None)

    model = dblocks.BlockCoordinateModel(take_apart(make_vit()), split_layers(6, 3))
    trainer = dblocks.Trainer(model, Silent(), make_data(), None, config(order="backward"))
    with pytest.raises(dblocks.UserError, match="a task that hands the gradient on, which Silent does not"):
        trainer.fit()
