"""The clean target y of a denoiser, and how the network's raw output becomes an estimate of it.

Shapes: N batch, V classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffusionblocks.seeds import normal_like
from diffusionblocks.theory.evidence import Evidence, weight_of
from diffusionblocks.theory.noise import unit_rows


def label_table(num_classes: int, width: int) -> Tensor:
    """Unit-norm label embeddings [V, D], seeded: orthonormal rows where they fit, else random directions."""
    if torch.get_default_device().type == "meta":  # only shapes are wanted
        return torch.empty(num_classes, width)
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(max(num_classes, width), width, generator=generator)
    if num_classes <= width:
        return torch.linalg.qr(gaussian.T @ gaussian).Q[:num_classes].contiguous()
    return unit_rows(gaussian[:num_classes])


class CategoricalTarget(nn.Module):
    """A discrete target: one of V rows of unit L2 norm, so y = table[label].

    The table is common to all blocks because the noisy target is what they pass on. Unit norm with
    sigma_data = 0.5 is the paper's scale; larger rows would make the label readable at every useful level.

    Args:
        table: embeddings [V, D], normalised at every use (training and sampling must use the same rows).
        trainable: learn the table along with the network ([DB] trains it) or keep it as a constant.
        bayes: add the exact evidence in z to the logits, z . e_v / sigma^2 (Bayes: p(v|x,z) is proportional to
            p(v|x) exp(z . e_v / sigma^2) for unit rows), so that the network only has to learn p(v|x).
    """

    table: Tensor

    def __init__(self, table: Tensor, *, trainable: bool, bayes: bool) -> None:
        super().__init__()
        if trainable:
            self.table = nn.Parameter(table.clone())
        else:
            self.register_buffer("table", unit_rows(table))
        self.bayes = bayes

    @property
    def rows(self) -> Tensor:
        """Unit-norm embeddings [V, D]."""
        return unit_rows(self.table) if isinstance(self.table, nn.Parameter) else self.table

    def clean(self, labels: Tensor) -> Tensor:
        """labels [...] -> y [..., D]."""
        return self.rows[labels]

    def logits(self, raw: Tensor, noisy_target: Tensor, sigma: Tensor) -> Tensor:
        """Network output [..., V], z [..., D], sigma [...] -> log p(v | x, z) up to a constant [..., V]."""
        evidence = self.evidence(noisy_target, sigma)
        return raw if evidence is None else raw.float() + weight_of(evidence)

    def evidence(self, noisy_target: Tensor, sigma: Tensor) -> Evidence | None:
        """What z [..., D] at levels sigma (of its first dimensions) tells; None where the network has to say it all."""
        if not self.bayes:
            return None
        level = sigma.float().reshape(*sigma.shape, *[1] * (noisy_target.dim() - sigma.dim()))
        return Evidence(noisy_target.float() / level**2, self.rows)

    def estimate(self, logits: Tensor) -> Tensor:
        """Posterior mean of y: softmax(logits) @ table, [..., V] -> [..., D]."""
        return logits.float().softmax(-1) @ self.rows.float()

    def losses(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy per sample [N]."""
        return cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def add_noise(clean: Tensor, sigma: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """z = y + sigma eps. clean [N, ...], sigma of its first dimensions; eps is drawn on the device of both."""
    noise = normal_like(clean, generator)
    return clean + sigma.to(clean.dtype).reshape(*sigma.shape, *[1] * (clean.dim() - sigma.dim())) * noise
