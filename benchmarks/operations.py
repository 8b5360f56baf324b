"""Operations that a training step dispatches, views left out: about what a card would launch, which bounds small steps
there.

    python benchmarks/operations.py

A round (one step of every block on the same batch) against one end-to-end step of the same network, twelve layers, bf16
autocast. The count does not depend on widths or on the batch. Writes benchmarks/results/operations.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as dblocks
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.tasks import CausalLM, Classification, ImageGeneration, MaskedLM
from environment import describe

LAYERS, TOKENS, BATCH = 12, 256, 4


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=TOKENS)
    config = LlamaConfig(num_hidden_layers=LAYERS, tie_word_embeddings=False, mask_token_id=TOKENS - 1, **sizes)
    return LlamaForCausalLM(config)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, image_size=8, patch_size=2)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=LAYERS, num_channels=1, num_labels=10, **sizes))


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    sizes = dict(num_attention_heads=4, attention_head_dim=16, in_channels=1, sample_size=8, patch_size=2)
    return DiTTransformer2DModel(num_layers=LAYERS, num_embeds_ada_norm=10, **sizes)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if not operation.is_view and "detach" not in str(operation) and "profiler" not in str(operation):
            self.found[str(operation.overloadpacket)] += 1
        return operation(*arguments, **(named or {}))


def whole(network: Any, target: str) -> Any:
    return whole_network(take_apart(network, target), dblocks.BlocksConfig(num_blocks=1, target=target))


def cases() -> dict[str, tuple[Callable[[], Any], Any, Any, str]]:
    """What is counted: model, task, data, and the row that it is compared with."""
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(0, TOKENS - 1, (32,), generator=generator)} for _ in range(8)]
    images = ImageData(torch.randint(0, 256, (8, 1, 8, 8), generator=generator).to(torch.uint8), torch.arange(8))
    text, masked, label, image = CausalLM(), MaskedLM(), Classification(), ImageGeneration()
    features = {"context": "features", "shared": "trained", "target_entry": "none"}
    information = {"target_entry": "none"}
    return {
        "text": (lambda: whole(llama(), "causal"), text, texts, "text"),
        "text, features, B = 4": (lambda: dblocks.convert(llama(), 4, **features), text, texts, "text"),
        "text, information, B = 4": (lambda: dblocks.convert(llama(), 4, **information), text, texts, "text"),
        "masked text": (lambda: whole(llama(), "masked"), masked, texts, "masked text"),
        "masked text, B = 3": (lambda: dblocks.convert(llama(), 3, target="masked"), masked, texts, "masked text"),
        "ViT": (lambda: whole(vit(), "label"), label, images, "ViT"),
        "ViT, B = 3": (lambda: dblocks.convert(vit(), 3), label, images, "ViT"),
        "DiT": (lambda: whole(dit(), "image"), image, images, "DiT"),
        "DiT, B = 3": (lambda: dblocks.convert(dit(), 3), image, images, "DiT"),
    }


def count(build: Callable[[], Any], task: Any, data: Any) -> Counter[str]:
    """Of a round in which every block has stepped before."""
    settings = dblocks.TrainingConfig(batch_size=BATCH, device="cpu", branch_at=0.0, precision="bf16")
    trainer = dblocks.Trainer(build(), task, data, None, settings)
    found: Counter[str] = Counter()
    for number in (0, 1):
        (batch,), handed = trainer.stream.load([number]), ()
        for block in trainer.round:
            with trainer.residency.active(block), Count() as step:
                handed = trainer.block_step(block, batch, handed).handed
            if number:
                found += step.found
    return found


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name, (build, task, data, baseline) in cases().items():
        found = count(build, task, data)
        total = sum(found.values())
        share = rows[baseline]["operations"] / total if baseline in rows else 1.0
        rows[name] = {"operations": total, "end_to_end_over_round": round(share, 3), "most": dict(found.most_common(8))}
        print(f"{name:28s} {total:6d} operations in a round, end-to-end has {share:.2f} of them", flush=True)
    target = Path(__file__).parent / "results" / "operations.json"
    target.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
