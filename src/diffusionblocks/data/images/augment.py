"""Training-time augmentation of image batches with kornia (torchvision is not needed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusionblocks.errors import UserError, nearest

KINDS = ("shift", "flip", "randaugment")


class Augmentation:
    """Random changes of images [N, channels, size, size] in [-1, 1], decided by a seed per batch.

    Args:
        kinds: `shift` (crop after padding by an eighth), `flip` (left-right), `randaugment` (2 operations of
            magnitude 9, Cubuk et al. 2019: the setting of the released ViT code).
    """

    def __init__(self, kinds: Sequence[str], size: int) -> None:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(f"unknown augmentation {unknown[0]!r}{nearest(unknown[0], KINDS)}")
        try:
            import kornia.augmentation as ka
            from kornia.augmentation.auto import RandAugment
        except ImportError:
            raise UserError("augmentation needs the package kornia: pip install 'diffusionblocks[images]'") from None
        operations: list[nn.Module] = []
        if "shift" in kinds:
            operations.append(ka.RandomCrop((size, size), padding=max(1, size // 8)))
        if "flip" in kinds:
            operations.append(ka.RandomHorizontalFlip())
        if "randaugment" in kinds:
            operations.append(RandAugment(n=2, m=9))
        self.operations = nn.Sequential(*operations)

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            unit = self.operations((pixels + 1) / 2)  # kornia works in [0, 1]
        return unit.clamp(0, 1) * 2 - 1
