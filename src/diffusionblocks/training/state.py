"""Everything one block carries while it trains: weights, moving average, optimizer state, own step count."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from diffusionblocks.training.config import TrainingConfig


class BlockState:
    """One owner of parameters (a block, or the shared parts) with its optimizer.

    `tensors` and `replace` read and exchange the tensors by name, whatever holds them: residency and checkpoints are
    written against these two.

    Args:
        module: parameters and buffers of this owner.
        life: optimizer steps of the whole schedule. common: those before branching; the decay starts after them.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, life: int, common: int = 0) -> None:
        self.module, self.config, self.life, self.common = module, config, life, common
        self.steps = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.buffers = dict(module.named_buffers())
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.average: dict[str, Tensor] = {}
        self.optimizer = self._new_optimizer() if self.parameters else None

    def _new_optimizer(self) -> AdamW:
        # Matrices decay; norms, biases and embeddings of one row do not.
        decay = [p for p in self.parameters.values() if p.dim() > 1]
        rest = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        beta1, beta2 = self.config.betas
        return AdamW([g for g in groups if g["params"]], lr=self.config.learning_rate, betas=(beta1, beta2), fused=True)

    def learning_rate(self) -> float:
        """Of the next step: linear warmup, then the schedule, in this owner's own steps.

        With branching the rate stays at its peak until the copies part, so that each settles in a minimum of its own.
        """
        warmup = max(1, round(self.config.warmup * self.life))
        ramp = min(1.0, (self.steps + 1) / warmup)
        if self.config.schedule == "constant":
            return self.config.learning_rate * ramp
        start = max(warmup, self.common, round(self.config.hold * self.life))
        progress = max(0.0, (self.steps + 1 - start) / max(1, self.life - start + 1))
        return self.config.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self) -> None:
        """Clips, updates, averages and frees the gradients."""
        if self.optimizer is None:
            return
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.config.ema_decay:
            self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        # The warm start of the decay keeps early averages from remembering the initial weights.
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `model.*`, `average.*` and `optimizer.<parameter>.<key>`."""
        return dict(self._slots())

    def _slots(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in {**self.parameters, **self.frozen}.items():
            yield f"model.{name}", p.detach()
        for name, buffer in self.module.named_buffers():
            yield f"model.{name}", buffer
        for name, tensor in self.average.items():
            yield f"average.{name}", tensor
        if self.optimizer is not None:
            for name, p in self.parameters.items():
                for key, value in self.optimizer.state.get(p, {}).items():
                    yield f"optimizer.{name}.{key}", value

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Puts other tensors in place of those that `tensors()` names (same shapes; any device or storage)."""
        everything = {**self.parameters, **self.frozen}
        for full_name, tensor in tensors.items():
            kind, _, name = full_name.partition(".")
            if kind == "average":
                self.average[name] = tensor
            elif kind == "optimizer":
                assert self.optimizer is not None
                parameter, _, key = name.rpartition(".")
                self.optimizer.state[self.parameters[parameter]][key] = tensor
            elif name in everything:
                everything[name].data = tensor
            else:
                owner, _, buffer = name.rpartition(".")
                setattr(self.module.get_submodule(owner), buffer, tensor)

    def copy_from(self, other: BlockState) -> None:
        """Becomes a copy of `other`: weights, optimizer state, average and step count (branching)."""
        self.replace({name: tensor.detach().clone() for name, tensor in other.tensors().items()})
        self.steps = other.steps

    def swap_average(self) -> None:
        """Exchanges weights and their moving average; twice restores both."""
        for name, tensor in list(self.average.items()):
            parameter = self.parameters[name]
            self.average[name] = parameter.data
            parameter.data = tensor
