"""What --train.compile gains: rounds of steps of end-to-end and of features blocks, eager and compiled, alternating,
one thread.

    python benchmarks/compile.py

Writes benchmarks/results/compile.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as dblocks
from diffusionblocks.blocks.model import EndToEndModel
from diffusionblocks.networks.registry import take_apart
from environment import describe
from timing import alternating, ratio

RESULT = Path(__file__).parent / "results" / "compile.json"
TOKENS, SAMPLES, LAYERS, WIDTH, VOCABULARY, BLOCKS = 256, 4, 6, 256, 256, 3
TURNS = 24


class RandomTexts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(index))}


def new_model(method: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=TOKENS, **sizes))
    if method == "end-to-end":
        return EndToEndModel(take_apart(network, "causal"))
    return dblocks.convert(network, BLOCKS, target="causal", context="features", target_entry="none")


def steps(method: str, compiled: bool) -> Any:
    """A call that makes one step of every block, each on the features of the one before."""
    config = dblocks.TrainingConfig(device="cpu", compile=compiled, batch_size=SAMPLES, branch_at=0.0)
    trainer = dblocks.Trainer(new_model(method), dblocks.CausalLM(), RandomTexts(), None, config)
    batch = next(iter(trainer.stream.load([0])))

    def round_of_steps() -> None:
        handed: Any = ()
        for block in range(trainer.model.num_blocks):
            handed = trainer.block_step(block, batch, handed).handed

    return round_of_steps


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for method in ("end-to-end", "features"):
        calls = {"eager": steps(method, False), "compiled": steps(method, True)}
        began = time.perf_counter()
        calls["compiled"]()  # makes the graphs
        first = time.perf_counter() - began
        seconds = alternating(calls, TURNS)
        faster = ratio(seconds["eager"], seconds["compiled"])
        found[method] = {"compiled_over_eager": faster, "first_round_seconds": first, "seconds": seconds}
        print(method, faster)
    shape = {"layers": LAYERS, "width": WIDTH, "tokens": TOKENS, "samples": SAMPLES, "blocks": BLOCKS}
    RESULT.write_text(json.dumps({"environment": describe(), "network": shape, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
