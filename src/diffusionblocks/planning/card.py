"""What a CUDA card does differently from the CPU, as far as memory is concerned.

Plans for cards are made on laptops, so steps are often traced on the CPU. Two things differ on a card: matrix products
need workspaces, and attention may take another kernel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Bytes of a card that belong to no allocation of PyTorch's: the CUDA context. Reported: 426 MiB on an RTX 6000 Ada
# (torch 2.10, CUDA 13.0), "around 400MB" (pytorch issue 109888), 300 MiB (issue 107667). Kernels are loaded into it as
# they are first used, hence the margin. An assumption, not measured by this project.
CONTEXT = 512 << 20
# What the caching allocator reserves over what is allocated. Measured on an H100, 28 runs
# (benchmarks/results/memory-h100.json): median 1.09, 1.04 to 1.19; the large shares are those of networks below 250
# MiB, whose last 20 MiB segment is hardly used.
RESERVED = 1.1
# A cuBLAS workspace, which torch takes from its allocator for every handle and stream: 32 MiB from Hopper on,
# ":4096:2:16:8" before (aten/src/ATen/cuda/CublasHandlePool.cpp).
WORKSPACE, WORKSPACE_BEFORE_HOPPER = 32 << 20, 8320 << 10
HANDLES = 2  # of a training process: the main thread's, and the one of the thread that runs the backward pass


def target_device(device: str, *, for_a_card: bool = False) -> str:
    """The kind of device that training will run on: `cpu`, `cuda` or another of torch's.

    Args:
        device: `TrainingConfig.device`. for_a_card: `auto` means a card even if this machine has none.
    """
    kind = device.partition(":")[0]
    if kind != "auto":
        return kind
    return "cuda" if for_a_card or torch.cuda.is_available() else "cpu"


def traced_device(target: str) -> str:
    """The device whose fake tensors show the steps of `target`. Without a CUDA build of torch and a card, autograd on
    fake CUDA tensors ends the process."""
    return "cuda" if target == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_available() else "cpu"


def workspaces(
    target: str, capability: tuple[int, int] | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    """Bytes of the workspaces of matrix products, which stay allocated once they have been used.

    Args:
        capability: of the card; None = not known, which is taken for the larger workspaces of Hopper. environment:
            where CUBLAS_WORKSPACE_CONFIG (pairs of KiB and a count, ":4096:2:16:8") may set the size.
    """
    if target != "cuda":
        return 0
    pairs = re.findall(r":(\d+):(\d+)", environment.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return HANDLES * sum(int(kib) * int(count) for kib, count in pairs) << 10
    return HANDLES * (WORKSPACE if capability is None or capability >= (9, 0) else WORKSPACE_BEFORE_HOPPER)


def usable(memory: int, target: str) -> int:
    """Bytes that allocations may take of a device of `memory` bytes that nothing else uses."""
    return int(max(0, memory - (CONTEXT if target == "cuda" else 0)) / RESERVED)


def usable_of_free(free: int) -> int:
    """Bytes that allocations may take of `free` bytes of a card, as `torch.cuda.mem_get_info` reports them: the context
    exists already."""
    return int(free / RESERVED)


def needed(allocated: float, target: str) -> int:
    """The smallest memory of a device for so many allocated bytes: the inverse of `usable`."""
    return int(allocated * RESERVED) + 2 + (CONTEXT if target == "cuda" else 0)


def attention_kernel(dtype: torch.dtype, *, grouped: bool, masked: bool) -> str:
    """What torch's `scaled_dot_product_attention` runs on a CUDA card: `fused`, or `math`, which keeps the scores and
    its softmax.

    The flash kernel takes grouped keys (fewer heads of keys than of queries), but neither fp32 nor a mask; the
    memory-efficient kernel takes fp32 and masks, but no grouped keys
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). Both keep queries, keys, values, the result and one number
    per row, as the CPU's fused kernel does.

    Args:
        dtype: of the products (under autocast, its type). grouped: `enable_gqa`, and there are fewer heads of keys.
            masked: a mask is given as a tensor.
    """
    flash = dtype in (torch.float16, torch.bfloat16) and not masked
    return "fused" if flash or not grouped else "math"


@contextmanager
def kernels_of_a_card() -> Iterator[None]:
    """Within it, attention on CPU tensors keeps what it would keep on a CUDA card.

    A mode (`TorchFunctionMode`) would not do: it is off while `Tensor.backward` runs, which recomputes checkpointed
    activations.
    """
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = partial(_attention, plain)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _attention(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query [N, H, T, D], key and value [N, K, T, D] -> [N, H, T, D]."""
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    grouped = enable_gqa and key.shape[-3] != query.shape[-3]
    if attention_kernel(dtype, grouped=grouped, masked=attn_mask is not None) == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return plain(query, key, value, dropout_p=dropout_p, **options)
    # A card's fused kernels draw their dropout once more in the backward pass; the CPU's takes none.
    return plain(query, key, value, **options)
