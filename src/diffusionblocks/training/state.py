"""Everything one block carries while it trains: weights, moving average, optimizer state, own step count."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.optimizers import ON_HOST, new_optimizer, put_state, state_shapes, state_tensors


class BlockState:
    """One owner of parameters (a block, or the shared parts) with its optimizer.

    `tensors` and `replace` read and exchange the tensors by name, whatever holds them: residency and checkpoints are
    written against these two.

    Args:
        module: parameters and buffers of this owner.
        life: length of the whole schedule, in steps before branching. common: the steps before branching. own: the
            steps after it, which take the rest of the schedule; None = one each.
    """

    def __init__(
        self, module: nn.Module, config: TrainingConfig, life: int, common: int = 0, own: int | None = None
    ) -> None:
        self.module, self.config, self.life, self.common = module, config, life, common
        self.pace = (life - common) / own if own else 1.0
        self.steps = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.buffers = dict(module.named_buffers())
        self.frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.average: dict[str, Tensor] = {}
        self._set_aside: dict[str, Tensor] = {}  # weights, while the average is in their place
        heads = [p for name, p in self.parameters.items() if name.startswith("head.")]
        self.optimizer = new_optimizer(self.parameters.values(), config, heads) if self.parameters else None
        self.has_head = bool(heads)

    def learning_rate(self) -> float:
        """Of the next step: linear warmup, then the schedule, in this owner's own steps.

        With branching the rate stays at its peak until the copies part, so that each settles in a minimum of its own.
        With own batches it falls as without branching: the common block settles, and its copies go on from there.
        """
        warmup = max(1, round(self.config.warmup * self.life))
        step = self.steps if self.steps < self.common else self.common + (self.steps - self.common) * self.pace
        ramp = min(1.0, (step + 1) / warmup)
        peak = self.config.learning_rate * ramp
        if self.config.schedule == "constant":
            return peak
        parting = 0 if self.config.own_batch else self.common
        start = max(warmup, parting, round(self.config.hold * self.life))
        progress = max(0.0, (step + 1 - start) / max(1, self.life - start + 1))
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self, trust: float | Tensor = 1.0) -> Tensor | None:
        """Clips, updates, averages and frees the gradients. trust: factor on the rate of what is not the head, a number
        or a scalar on the device. Returns the norm of the gradients before clipping, a scalar on the device; None where
        nothing clips."""
        if self.optimizer is None:
            return None
        norm = None
        if self.config.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        rate = self.learning_rate()
        if self.config.optimizer in ON_HOST:  # these read it for every parameter
            trust = float(trust)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if group.get("head") else rate * trust
        self.optimizer.step()
        for parameter in self.parameters.values():  # zero_grad, without its bookkeeping
            parameter.grad = None
        self.steps += 1
        if self.config.ema_decay:
            self.update_average()
        return norm

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the averages towards the weights, as after a step."""
        if not self.average:
            # In fp32 whatever the weights are in: a small step of an average vanishes in bf16.
            self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        if self.steps == 1:  # where residency has made room for it, there is nothing in it yet
            for name, p in self.parameters.items():
                self.average[name].copy_(p)
        # The warm start of the decay keeps early averages from remembering the initial weights.
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach().float(), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `model.*`, `average.*` and `optimizer.<parameter>.<key>`."""
        return dict(self._slots())

    def shapes(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """dtype and shape of all tensors that there will be after the first step; the weights of a module follow each
        other."""
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors().items()}
        if self.config.ema_decay:
            found |= {f"average.{name}": (torch.float32, p.shape) for name, p in self.parameters.items()}
        if self.parameters:
            kept = state_shapes(self.parameters, self.config)
            found |= {f"optimizer.{name}": shape for name, shape in kept.items()}
        return found

    def make_room(self, device: torch.device) -> None:
        """Allocates what the first step would add.

        It stays for the whole run. Made in the middle of a step it takes parts of the stretches of memory in which
        activations were, which then no longer fit, and more is reserved of the card.
        """
        known = self.tensors()
        new = {name: shape for name, shape in self.shapes().items() if name not in known}
        for name, (dtype, shape) in new.items():
            where = torch.device("cpu") if self.stays_on_host(name) else device
            kind, _, parameter = name.partition(".")
            if kind == "average":
                self.replace({name: known[f"model.{parameter}"].float().clone()})
            else:
                self.replace({name: torch.zeros(shape, dtype=dtype, device=where)})

    def stays_on_host(self, name: str) -> bool:
        """Whether a tensor belongs on the host wherever the block is: a number that the optimizer reads there."""
        return name.startswith("optimizer.") and name.rpartition(".")[2] in ON_HOST.get(self.config.optimizer, ())

    def _slots(self) -> Iterator[tuple[str, Tensor]]:
        held = {**self.parameters, **self.frozen, **dict(self.module.named_buffers())}
        for prefix, module in self.module.named_modules():
            for name in (*module._parameters, *module._buffers):
                full = f"{prefix}.{name}" if prefix else name
                if full in held:
                    yield f"model.{full}", held[full].detach()
        for name, tensor in self.average.items():
            yield f"average.{name}", tensor
        if self.optimizer is not None:
            for name, p in self.parameters.items():
                for key, value in state_tensors(self.optimizer, p):
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
                put_state(self.optimizer, self.parameters[parameter], key, tensor)
            elif name in everything:
                everything[name].data = tensor
            else:
                owner, _, buffer = name.rpartition(".")
                setattr(self.module.get_submodule(owner), buffer, tensor)

    def swap_average(self) -> None:
        """Puts the moving average in the weights' place; called again, puts the weights back."""
        if self._set_aside:
            for name, tensor in self._set_aside.items():
                self.parameters[name].data = tensor
            self._set_aside = {}
            return
        for name, tensor in self.average.items():
            parameter = self.parameters[name]
            self._set_aside[name] = parameter.data
            parameter.data = tensor.to(parameter.dtype)
