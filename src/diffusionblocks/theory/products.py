"""Matrix products of narrow numbers with results in fp32.

NVIDIA cards add up such a product in fp32 anyway. To round the sum to bf16 and widen it again costs two more passes
over the result, and adding it to a sum in fp32 another: at a readout of 32,000 tokens these took longer than the
products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NARROW = (torch.bfloat16, torch.float16)


def multiplies_halves(device: torch.device) -> bool:
    """Whether bf16 products with fp32 results exist there, and are faster than fp32: NVIDIA cards since Ampere."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place. total [N, M] in fp32, left [N, K] and right [K, M] of one type.

    Tensors without data take the ordinary way: torch 2.11 cannot trace the other.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.dtype in NARROW and multiplies_halves(total.device) and not isinstance(total, FakeTensor):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
