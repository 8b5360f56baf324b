"""`dblocks plan`: what every method would need, what fits, and which one to take.

Every figure is a prediction (planning/predict.py) of the run that the printed command makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.methods import METHODS, find_method
from diffusionblocks.planning.card import needed, target_device, usable, usable_of_free
from diffusionblocks.planning.predict import Prediction, Predictor, Traces
from diffusionblocks.planning.units import size
from diffusionblocks.planning.workload import Choice, Workload, from_recipe, predictor
from diffusionblocks.recipes import Recipe
from diffusionblocks.recipes.keys import today
from diffusionblocks.theory.costs import RECOMPUTED


def default_counts(num_layers: int) -> list[int]:
    """Numbers of blocks worth a row: the divisors of L between 2 and 12, at most four of them."""
    divisors = [n for n in range(2, min(num_layers, 12) + 1) if num_layers % n == 0]
    return divisors if len(divisors) <= 4 else [*divisors[:3], divisors[-1]]


def choices(work: Workload, counts: Sequence[int]) -> Iterator[Choice]:
    """The rows of the table: methods that train the whole network, then the others for every number of blocks. A looped
    network is not split: the same layers serve all iterations."""
    splits = work.recipe.task.splits
    rows = {method: method.rows(work.recipe) for method in METHODS.values() if splits or method.loops}
    for method, found in rows.items():
        if not (splits and method.splits):
            yield from (Choice(method=method.name, checkpointing=recomputed) for recomputed in found)
    for count in counts if splits else ():
        for method, found in rows.items():
            if method.splits:
                for recomputed in found:
                    yield Choice(method=method.name, num_blocks=count, checkpointing=recomputed)


def plan(
    work: Workload, counts: Sequence[int], memory: int | None, batch_size: int, free: int | None = None
) -> dict[str, Any]:
    """Rows and, given `memory` in bytes, what fits and a recommendation.

    Args:
        memory: of the device that is planned for; a training device of `auto` is a card then. free: what is free of it
            now, if it is this machine's card.

    Returns {"rows": [...], "recommendation": {...} or None, "memory", "free", "usable", "target", "traced_on",
    "workspaces", "batch_size"}; bytes throughout.
    """
    if not work.recipe.task.splits and set(counts) != {1}:
        raise UserError(f"a looped network is not split: --num-blocks must be 1, got {', '.join(map(str, counts))}")
    wanted = list(choices(work, counts))
    target = target_device(work.train(wanted[0].method).device, for_a_card=memory is not None)
    work = work.on(target)
    limit = None if memory is None else usable(memory, target)
    if free is not None:
        limit = usable_of_free(free)
    traces: Traces = {}
    made = {choice: predictor(work, choice, traces) for choice in wanted}
    rows = []
    for choice, predicting in made.items():
        found = predicting.at(batch_size, predicting.config.accumulation)
        rows.append(_row(work, choice, predicting, found, limit))
    best = None if limit is None else recommend(work, made, traces, limit, batch_size)
    return {
        "rows": rows,
        "recommendation": best,
        "memory": memory,
        "free": free,
        "usable": limit,
        "batch_size": batch_size,
        **_where(made[wanted[0]]),
    }


def _where(predicting: Predictor) -> dict[str, Any]:
    """For which device, from steps on the tensors of which device, and with what workspaces (part of `activations`)."""
    return {
        "target": predicting.target,
        "traced_on": predicting.traced_on,
        "workspaces": predicting.workspaces,
    }


def _row(work: Workload, choice: Choice, predicting: Predictor, found: Prediction, limit: int | None) -> dict[str, Any]:
    method, recipe, sizes = find_method(choice.method), work.settled(choice), work.split(choice)
    return {
        "method": choice.label,
        "num_blocks": choice.num_blocks,
        "predicted": found.within(limit).device.as_dict(),
        "blocks": [block.peak.as_dict() for block in found.blocks],
        "worst_block": found.worst_block,
        "host": found.host,
        "disk": found.disk,
        "transfer_per_step": found.transfer_per_step,
        "residency": predicting.config.residency,
        "layer_evaluations_per_sample": method.training(recipe, sizes, RECOMPUTED if choice.checkpointing else 1.0),
        "inference_layers": method.inference(recipe, sizes),
        "fits": None if limit is None else found.least <= limit,
        **_where(predicting),
        "command": _command(work, choice),
    }


def _command(work: Workload, choice: Choice) -> str | None:
    if not work.command:  # there is no recipe for it: from Python, with Trainer
        return None
    blocks = work.recipe.blocks
    uneven = blocks.layers_per_block and choice.num_blocks not in (1, blocks.num_blocks)
    return f"{work.command} {_flags(choice)}" + (" --blocks.layers-per-block '[]'" if uneven else "")


def _flags(choice: Choice) -> str:
    words = ["--method", choice.method]
    if choice.num_blocks > 1:
        words += ["--num-blocks", str(choice.num_blocks)]
    if choice.recomputed:
        words += ["--train.activation-checkpointing", "true"]
    if choice.accumulation > 1:
        words += ["--train.accumulation", str(choice.accumulation)]
    if choice.keep_graphs:
        words += ["--train.keep-graphs", str(choice.keep_graphs)]
    return " ".join(words)


def recommend(
    work: Workload, made: dict[Choice, Predictor], traces: Traces, limit: int, batch_size: int
) -> dict[str, Any]:
    """The first choice that fits, the least departure from ordinary training first."""
    tied = work.tied()
    for choice in sorted(made, key=partial(preference, work, tied)):
        in_passage = find_method(choice.method).one_pass and work.train(choice.method).order == "backward"
        if in_passage:  # what fits is asked of the least that it needs; then it keeps what graphs fit
            choice = dataclasses.replace(choice, keep_graphs=1)
        predicting = predictor(work, choice, traces)
        if not _could_fit(predicting, limit, batch_size):
            continue
        for parts in _accumulations(batch_size, predicting.config.accumulation):
            if predicting.at(batch_size, parts).least > limit:
                continue
            choice = dataclasses.replace(choice, accumulation=parts)
            if in_passage:
                choice = keeping_graphs(work, choice, traces, limit, batch_size)
                predicting = predictor(work, choice, traces)
            reason = find_method(choice.method).reason(work.settled(choice), tied)
            if parts > predicting.config.accumulation:
                reason += f"; the batch is cut into {parts} parts"
            command = _command(work, choice)
            command = f"{command} --batch-size {batch_size}" if command else None
            return {
                "method": choice.label,
                "num_blocks": choice.num_blocks,
                "accumulation": parts,
                "reason": reason,
                "predicted": predicting.at(batch_size, parts).within(limit).device.as_dict(),
                "largest_batch": predicting.largest_batch(limit, batch_size, parts),
                "command": command,
            }
    least = min(made, key=lambda choice: made[choice].at(1).least)
    need = needed(made[least].at(1).least, made[least].target)
    return {
        "method": None,
        "num_blocks": None,
        "reason": f"nothing fits, even one sample at a time; the least is {least.label} with "
        f"{least.num_blocks} blocks, which needs a card of {need / 2**30:.2f} GiB. "
        + ("More blocks, " if work.recipe.task.splits else "")
        + "bf16-true or adamw-8bit need less",
        "command": None,
    }


def keeping_graphs(work: Workload, choice: Choice, traces: Traces, limit: int, batch_size: int) -> Choice:
    """One backward pass with the graphs of as many blocks kept as fit: nothing else makes it compute less."""
    counts = range(choice.num_blocks, 1, -1) if choice.accumulation == 1 else ()
    for count in counts:
        more = dataclasses.replace(choice, keep_graphs=count)
        if predictor(work, more, traces).at(batch_size).least <= limit:
            return more
    default = work.train(choice.method).keep_graphs == 1
    return dataclasses.replace(choice, keep_graphs=0) if default else choice


def _could_fit(predicting: Predictor, limit: int, batch_size: int) -> bool:
    """Whether smaller parts of the batch can help: what is no activation does not shrink with them."""
    known = predicting.at(batch_size, predicting.config.accumulation)
    points = (point for block in known.blocks for point in block.phases.values())
    if max(point.total - point.activations for point in points) > limit:
        return False
    return predicting.at(batch_size, _accumulations(batch_size, 1)[-1]).least <= limit


def preference(work: Workload, tied: bool, choice: Choice) -> tuple[int, int, int]:
    """What choices are sorted by: the rank of their method, then fewer blocks, then no recomputation."""
    rank = find_method(choice.method).rank(work.as_run(choice.method), tied)
    return rank, choice.num_blocks, int(choice.checkpointing)


def _accumulations(batch_size: int, at_least: int) -> list[int]:
    """The given number of parts, then powers of two that divide the batch."""
    powers = (1 << exponent for exponent in range(1, batch_size.bit_length()))
    return [at_least, *(n for n in powers if n > at_least and batch_size % n == 0)]


def cheaper(recipe: Recipe, name: str, limit: float) -> tuple[Prediction, list[tuple[str, Prediction]]]:
    """The prediction of a recipe's own run, and the changes that fit `limit` bytes, cheapest first.

    One of each kind, three at most: fewer kept graphs (order backward), the batch in smaller parts (costs no
    computation), recomputed activations (a third more), more blocks (another method, or smaller blocks). For an
    unrolled loop a shorter truncation and one pass per step come before recomputation: they compute less than now.
    """
    work, parts = from_recipe(recipe, name), recipe.train.accumulation
    batch_size = recipe.train.batch_size
    declared = find_method(recipe.method)
    ours = Choice(
        method=recipe.method,
        num_blocks=recipe.blocks.num_blocks if declared.splits else 1,
        checkpointing=recipe.train.activation_checkpointing,
        accumulation=parts,
    )
    kept = min(work.train(ours.method).graphs, ours.num_blocks)
    fewer = [dataclasses.replace(ours, keep_graphs=count) for count in range(kept - 1, 0, -1)]
    ours_in_parts = fewer[-1] if fewer else ours  # for which graphs are not kept
    smaller = [
        ours,
        *(dataclasses.replace(ours_in_parts, accumulation=n) for n in _accumulations(batch_size, parts)[1:]),
    ]
    recomputed = [] if ours.checkpointing else [dataclasses.replace(choice, checkpointing=True) for choice in smaller]
    method = ours.method if declared.splits else Recipe.method
    looped = not recipe.task.splits
    unrolled = looped and not (declared.by_blocks or declared.once)
    counts = [n for n in default_counts(work.num_layers) if n > ours.num_blocks]
    split = [dataclasses.replace(ours, method=method, num_blocks=count) for count in counts]
    if recipe.train.order == "backward" and not find_method(method).one_pass:
        split = []
    if looped:  # one pass per step in place of many
        split = [dataclasses.replace(ours, method=Recipe.method, checkpointing=False)] if unrolled else []
    traces: Traces = {}
    now = predictor(work, ours, traces).at(batch_size, parts)

    def predict(choice: Choice) -> Prediction:
        return predictor(work, choice, traces).at(batch_size, choice.accumulation)

    def best_of(changes: list[Choice]) -> list[tuple[str, Prediction]]:  # what needs least comes last
        if not changes or predict(changes[-1]).least > limit:
            return []
        best = next(choice for choice in changes if predict(choice).least <= limit)
        return [(_flags(best), predict(best))]

    found = best_of(fewer) + best_of(smaller[1:])
    if unrolled:  # of a loop, all but recomputation costs less than now
        found += _truncated(work, ours, batch_size, limit) + best_of(split) + best_of(recomputed)
    else:
        found += best_of(recomputed) + best_of(split)
    return now, found[:3]


def _truncated(work: Workload, ours: Choice, batch_size: int, limit: float) -> list[tuple[str, Prediction]]:
    """The longest truncation of an unrolled network, by halves, that fits."""
    while shorter := work.settled(ours).task.lighter():
        work = work.with_task(**shorter)
        found = predictor(work, ours).at(batch_size, ours.accumulation)
        if found.least <= limit:
            ((option, value),) = shorter.items()
            return [(f"--{today(f'task.{option}').replace('_', '-')} {value}", found)]
    return []


def explain(recipe: Recipe, name: str, observed: float, limit: float) -> str:
    """What to print when a run of `recipe` did not fit the `limit` bytes of a device that were there for it."""
    usable = usable_of_free(int(limit))
    now, found = cheaper(recipe, name, usable)
    lines = [
        f"out of memory: predicted peak {size(now.within(usable).device.total)}, observed {size(observed)} of "
        f"{size(limit)} that the device had for it. "
        "The last checkpoint is kept; run the same command with one of these changes:"
    ]
    lines += [f"  {flags}  (predicted peak {size(p.within(usable).device.total)})" for flags, p in found]
    if not found:
        lines.append("  none of the usual changes would fit; dblocks plan shows all methods")
    return "\n".join(lines)
