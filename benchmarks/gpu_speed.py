"""Tokens or images per second: the part `speed` of benchmarks/gpu.py, which needs the card for itself.

A contender is a network with everything that trains it. A call of it makes one optimizer step of every weight: a step
end to end, or a round over all blocks, one step of each on the same batch. All clip gradients at norm 1, as
transformers' own Trainer does. Batches are on the device from the start: loading is not measured. Networks are made
once, on the processor, and copied: to split one with a vocabulary of 32,000 takes seconds.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

import diffusionblocks as dblocks
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.theory.partition import split_layers
from diffusionblocks.training.order import one_round
from diffusionblocks.training.task import Task
from timing import alternating, ratio

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the networks and batches.

    language_blocks: of next-token networks and `exact`. blocks: of others. dit_batch, vit_batch: about 16,000 patches.
    turns: timed calls of each contender.
    """

    device: str = "cuda"
    layers: int = 12
    language_blocks: int = 4
    blocks: int = 3
    width: int = 768
    heads: int = 12
    intermediate: int = 2048
    vocabularies: tuple[int, int] = (32_000, 256)
    length: int = 512
    batch: int = 16
    image_width: int = 384
    image_heads: int = 6
    image_size: int = 32
    dit_batch: int = 64
    vit_batch: int = 256
    turns: int = 3


DRY = Sizes(
    **dict(device="cpu", layers=2, language_blocks=2, blocks=2, width=32, heads=2, intermediate=64, batch=2),
    **dict(vocabularies=(64, 64), length=16, image_width=32, image_heads=2, image_size=8, dit_batch=2, vit_batch=2),
    turns=1,
)
NEXT_TOKEN = {
    "features": {"context": "features", "target_entry": "none", "shared": "trained", "least_hidden": 0.97},
    "information": {"context": "input", "target_entry": "none", "readout": "bayes", "shared": "copies"},
}


@dataclass
class Contender:
    """call: one step of every weight, times `steps`. samples: tokens or images that a call trains on."""

    call: Callable[[], object]
    samples: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """against: name of a ratio -> the row it is taken to. needs: a package that not every machine has."""

    name: str
    build: Callable[[], Contender]
    against: dict[str, str]
    unit: str = "tokens"
    needs: str = ""


# ---------------------------------------------------------------- networks


@cache
def llama(sizes: Sizes, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **dict(vocab_size=vocabulary, hidden_size=sizes.width, intermediate_size=sizes.intermediate),
        **dict(num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, max_position_embeddings=sizes.length),
        **dict(tie_word_embeddings=False, mask_token_id=vocabulary - 1),
    )
    return LlamaForCausalLM(config)


@cache
def vit(sizes: Sizes) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **dict(hidden_size=sizes.image_width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.image_heads),
        **dict(intermediate_size=4 * sizes.image_width, image_size=sizes.image_size, patch_size=4, num_labels=10),
    )
    return ViTForImageClassification(config)


@cache
def dit(sizes: Sizes) -> nn.Module:
    """The shape of DiT-S/2, on pixels."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        **dict(num_layers=sizes.layers, num_attention_heads=sizes.image_heads, in_channels=3, patch_size=2),
        **dict(attention_head_dim=sizes.image_width // sizes.image_heads, sample_size=sizes.image_size),
        num_embeds_ada_norm=10,
    )


def texts(device: str, vocabulary: int, samples: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    # Without the last token, which is the mask.
    return {"input_ids": torch.randint(0, vocabulary - 1, (samples, length), generator=generator).to(device)}


def images(sizes: Sizes, samples: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(samples, 3, sizes.image_size, sizes.image_size, generator=generator) * 2 - 1
    return {"pixel_values": pixels.to(sizes.device), "labels": torch.arange(samples, device=sizes.device) % 10}


# ---------------------------------------------------------------- contenders


def plain(sizes: Sizes, vocabulary: int) -> Contender:
    """What one writes with torch and transformers alone."""
    network = copy.deepcopy(llama(sizes, vocabulary)).to(sizes.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    tokens = texts(sizes.device, vocabulary, sizes.batch, sizes.length)["input_ids"]

    def step() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, tokens.numel())


def trainer(
    model: BlockModel, task: Task, samples: int, *, prefetch: bool | None = None, **options: Any
) -> dblocks.Trainer:
    """prefetch: whether the next block comes while one computes; None = as the room on the device allows."""
    defaults = dict(
        steps=1_000_000, learning_rate=1e-4, schedule="constant", warmup=0.0, precision="bf16", branch_at=0.0
    )
    settings = dblocks.TrainingConfig(**{**defaults, "batch_size": samples, **options})
    made = dblocks.Trainer(model, task, [{}] * samples, None, settings)  # type: ignore[arg-type]
    made.place.prefetch = prefetch
    return made


def rounds(trained: dblocks.Trainer, batches: Sequence[Batch], number: int) -> None:
    """A visit to each block, in order, for as many steps as there are batches, as Trainer.fit makes them."""
    order, handed = trained.round, list[Any]()
    numbers = range(number, number + len(batches))
    visits = one_round(trained.config.order, trained.trained, numbers, trained.config.batch_size)
    for visit, following in zip(visits, [*order[1:], order[0]], strict=True):
        handed = trained.visit(visit, batches, handed, following if len(order) > 1 else None).handed


def ours(
    build: Callable[[], BlockModel], task: Task, batch: Callable[[], Batch], unit: str, sizes: Sizes, **options: Any
) -> Contender:
    """By this library. options: of `trainer`."""
    given, steps, numbers = batch(), options.get("visit_steps", 1), count()
    first = next(iter(given.values()))
    trained = trainer(copy.deepcopy(build()), task, len(first), device=sizes.device, **options)
    samples = given["input_ids"].numel() if unit == "tokens" else len(first)
    return Contender(lambda: rounds(trained, [given] * steps, steps * next(numbers)), steps * samples)


def exact_model(network: nn.Module, num_blocks: int) -> BlockModel:
    parts = take_apart(network, "causal")
    return dblocks.BlockCoordinateModel(parts, split_layers(len(parts.layers), num_blocks))


def whole(network: nn.Module, target: str) -> BlockModel:
    return whole_network(take_apart(network, target), BlocksConfig(num_blocks=1, target=target))


def prefetching() -> list[tuple[str, dict[str, Any]]]:
    """Rows with and without prefetching."""
    return [("", {"prefetch": False}), (", prefetch", {"prefetch": True})]


# ---------------------------------------------------------------- rows of `speed`


def speed_rows(sizes: Sizes) -> list[Row]:
    """Compiled rows of the large vocabulary come last: compiling takes longest, and the part may be stopped."""
    large, small = sizes.vocabularies
    return [
        *language_rows(sizes, "large vocabulary", large),
        *residency_rows(sizes, "large vocabulary", large),
        *pair(sizes, "masked", partial(llama, sizes, large), dblocks.MaskedLM(), "masked", sizes.batch, "tokens"),
        *pair(sizes, "dit", partial(dit, sizes), dblocks.ImageGeneration(), "image", sizes.dit_batch, "images"),
        *pair(sizes, "vit", partial(vit, sizes), dblocks.Classification(), "label", sizes.vit_batch, "images"),
        *language_rows(sizes, "small vocabulary", small),
        *compiled_rows(sizes, "small vocabulary", small),
        *compiled_rows(sizes, "large vocabulary", large),
    ]


def _language(sizes: Sizes, vocabulary: int, kind: str, **options: Any) -> Callable[[], Contender]:
    """kind: `end-to-end`, or in blocks `exact` or one of NEXT_TOKEN."""
    batch = partial(texts, sizes.device, vocabulary, sizes.batch, sizes.length)
    build = partial(language_model, sizes, vocabulary, kind)
    return partial(ours, build, dblocks.CausalLM(), batch, "tokens", sizes, **options)


@cache
def language_model(sizes: Sizes, vocabulary: int, kind: str) -> BlockModel:
    network = llama(sizes, vocabulary)
    if kind == "end-to-end":
        return whole(network, "causal")
    if kind == "exact":
        return exact_model(network, sizes.language_blocks)
    return dblocks.convert(network, num_blocks=sizes.language_blocks, target="causal", **NEXT_TOKEN[kind])


def language_rows(sizes: Sizes, name: str, vocabulary: int) -> list[Row]:
    prefix, made = f"llama {name}: ", partial(_language, sizes, vocabulary)
    both = {"of_plain": prefix + "plain", "of_end_to_end": prefix + "end-to-end"}
    return [
        Row(name=prefix + "plain", build=partial(plain, sizes, vocabulary), against={}),
        Row(name=prefix + "end-to-end", build=made("end-to-end"), against={"of_plain": prefix + "plain"}),
        Row(name=prefix + "features", build=made("features"), against=both),
        Row(name=prefix + "information", build=made("information"), against=both),
        Row(name=prefix + "checkpointing", build=made("end-to-end", activation_checkpointing=True), against=both),
    ]


def residency_rows(sizes: Sizes, name: str, vocabulary: int) -> list[Row]:
    prefix, made = f"llama {name}: ", partial(_language, sizes, vocabulary)
    both = {"of_plain": prefix + "plain", "of_end_to_end": prefix + "end-to-end"}
    hosted = {"residency": "host"}
    found = []
    for visit_steps in (1, 4):
        for suffix, prefetch in prefetching():
            build = made("features", visit_steps=visit_steps, **hosted, **prefetch)
            label = f"features, host, visits of {visit_steps}{suffix}"
            found.append(
                Row(name=prefix + label, build=build, against={**both, "host_over_device": prefix + "features"})
            )
    found.append(Row(name=prefix + "exact", build=made("exact", order="backward"), against=both))
    for suffix, prefetch in prefetching():
        build = made("exact", order="backward", **hosted, **prefetch)
        against = {**both, "host_over_device": prefix + "exact"}
        found.append(Row(name=prefix + f"exact, host{suffix}", build=build, against=against))
    return found


def compiled_rows(sizes: Sizes, name: str, vocabulary: int) -> list[Row]:
    prefix = f"llama {name}: "
    found = []
    for kind in ("end-to-end", "features"):
        against = {"of_plain": prefix + "plain", "of_end_to_end": prefix + "end-to-end"}
        against["compiled_over_eager"] = prefix + kind
        build = _language(sizes, vocabulary, kind, compile=True)
        found.append(Row(name=f"{prefix}{kind}, compiled", build=build, against=against))
    return found


def pair(
    sizes: Sizes, name: str, network: Callable[[], nn.Module], task: Task, target: str, samples: int, unit: str
) -> list[Row]:
    """A network end to end and in blocks."""
    batch: Callable[[], Batch] = partial(images, sizes, samples)
    if unit == "tokens":
        batch = partial(texts, sizes.device, sizes.vocabularies[0], samples, sizes.length)
    build = {
        "end-to-end": lambda: whole(network(), target),
        "blocks": lambda: dblocks.convert(network(), num_blocks=sizes.blocks, target=target),
    }
    common: dict[str, Any] = {"unit": unit, "needs": "diffusers" if name == "dit" else ""}
    return [
        Row(
            name=f"{name}: {kind}",
            build=partial(ours, build[kind], task, batch, unit, sizes),
            against={} if kind == "end-to-end" else {"of_end_to_end": f"{name}: end-to-end"},
            **common,
        )
        for kind in build
    ]


# ---------------------------------------------------------------- measuring


def speed(results: Any, dry_run: bool) -> None:
    sizes = DRY if dry_run else Sizes()
    gc.freeze()  # packages: a collection passes all objects, and there is one for every row
    rows = speed_rows(sizes)
    by_name, alive = {row.name: row for row in rows}, dict[str, Contender]()
    for number, row in enumerate(rows):
        if results.has(row.name):
            continue
        if row.needs and importlib.util.find_spec(row.needs) is None:
            results.skip(row.name, row.needs)
            continue
        try:
            for name in row.against.values():
                if name not in alive:
                    alive[name] = by_name[name].build()
            results.add(measured(row, alive, sizes))
        except Exception:  # one row that cannot run must not keep the others from being measured
            results.fail(row.name, traceback.format_exc())
        left = [other for other in rows[number + 1 :] if not results.has(other.name)]
        wanted = {name for other in left for name in other.against.values()}
        alive = {name: contender for name, contender in alive.items() if name in wanted}
        tidy(sizes.device)


def measured(row: Row, alive: dict[str, Contender], sizes: Sizes) -> dict[str, Any]:
    """The row, whose contender joins those that are alive."""
    contender, memory = built(row, sizes)
    found = {"row": row.name, **timed(row, contender, alive, sizes), **memory}
    alive[row.name] = contender
    return found


def timed(row: Row, contender: Contender, alive: dict[str, Contender], sizes: Sizes) -> dict[str, Any]:
    """Speed, and its ratios to other contenders that take turns with this one."""
    others = {name: alive[name] for name in row.against.values()}
    contenders = {**others, row.name: contender}
    seconds = alternating(
        {name: partial(synchronized, one.call, sizes.device) for name, one in contenders.items()}, sizes.turns
    )
    each = {name: [second / contenders[name].samples for second in found] for name, found in seconds.items()}
    per_second = 1 / statistics.median(each[row.name])
    ratios = {}
    for name, other in row.against.items():
        over, under = (each[row.name], each[other]) if name == "host_over_device" else (each[other], each[row.name])
        one = {"value": over[0] / under[0], "stderr": None}  # of one turn
        ratios[name] = ratio(over, under) if sizes.turns > 1 else one
    return {"unit": row.unit, "per_second": per_second, "seconds": statistics.median(seconds[row.name]), **ratios}


def built(row: Row, sizes: Sizes) -> tuple[Contender, dict[str, Any]]:
    """The contender and the memory that it alone takes, in a call after the first."""
    tidy(sizes.device)
    before = torch.cuda.memory_allocated() if sizes.device == "cuda" else 0
    contender = row.build()
    synchronized(contender.call, sizes.device)
    tidy(sizes.device)  # what the allocator kept of building it
    reset_peaks(sizes.device)
    synchronized(contender.call, sizes.device)
    return contender, peaks(sizes.device, before)


def tidy(device: str) -> None:
    """Gives the memory of what is no longer used back to the card."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def synchronized(call: Callable[[], object], device: str) -> None:
    call()
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peaks(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str, before: int = 0) -> dict[str, Any]:
    """before: bytes of others. What the allocator holds for them beyond that is counted here, which errs upwards."""
    if device != "cuda":
        return {"peak_allocated": None, "peak_reserved": None, "reserved_over_allocated": None}
    allocated, reserved = (
        peak - before for peak in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    )
    return {"peak_allocated": allocated, "peak_reserved": reserved, "reserved_over_allocated": reserved / allocated}
