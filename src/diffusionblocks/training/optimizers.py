"""The optimizers a block can have, all taken from libraries.

What residency and checkpoints need of one is its state as tensors by name; `state_tensors` and `put_state` hide the two
places where libraries differ: a step count that is a plain number, and tables that all parameters share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from diffusionblocks.errors import UserError
from diffusionblocks.training.config import TrainingConfig

SHARED_TABLES = ("qmap1", "qmap2")  # bitsandbytes' quantisation tables: constants of the optimizer
ON_HOST = {"adafactor": ("step",), "adamw-8bit": ("step",)}  # numbers that the optimizer reads on the host


def new_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainingConfig, heads: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """The optimizer that `config.optimizer` names. Matrices decay; norms, biases and embeddings of one row do not.

    heads: those of `parameters` that make groups of their own, marked `head`.

    Raises UserError when its library is missing.
    """
    parameters, apart = list(parameters), {id(p) for p in heads}
    groups: list[dict[str, Any]] = []
    for head in (False, True):
        own = [p for p in parameters if (id(p) in apart) == head]
        groups.append({"params": [p for p in own if p.dim() > 1], "weight_decay": config.weight_decay, "head": head})
        groups.append({"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0, "head": head})
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = config.betas
    rate = config.learning_rate
    if config.optimizer == "sgd":
        return SGD(groups, lr=rate, momentum=beta1, fused=True)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=rate)
    if config.optimizer == "adamw-8bit":
        if not parameters[0].is_meta and not _is_fake(parameters[0]):
            return _bitsandbytes().AdamW8bit(groups, lr=rate, betas=(beta1, beta2))
        return _ShapesOfAdamW8bit(groups)
    return AdamW(groups, lr=rate, betas=(beta1, beta2), fused=True)


def state_tensors(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps for one parameter, by name."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if key not in SHARED_TABLES:
            yield key, value if isinstance(value, Tensor) else torch.tensor(float(value))


def put_state(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """The inverse of `state_tensors`, for one entry."""
    state = optimizer.state[parameter]
    tables = getattr(optimizer, "name2qmap", None)
    if tables is None:
        state[key] = value
        return
    state[key] = int(value) if key == "step" else value
    if key in ("state1", "state2") and value.dtype == torch.uint8:
        if not tables:
            optimizer.fill_qmap()  # type: ignore[attr-defined]
        name = "dynamic" if key == "state1" else "udynamic"
        if parameter.device.type != "cpu":  # a block that is away needs none
            tables[name] = tables[name].to(parameter.device)
        state["qmap" + key[-1]] = tables[name]


def state_shapes(
    parameters: Mapping[str, nn.Parameter], config: TrainingConfig
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """`<parameter>.<key>` -> dtype and shape of all that the optimizer will keep: what a step makes on tensors without
    data."""
    return _state_shapes(
        tuple((name, p.dtype, p.shape) for name, p in parameters.items()), config.optimizer, *config.betas
    )


@lru_cache(maxsize=64)
def _state_shapes(
    parameters: tuple[tuple[str, torch.dtype, torch.Size], ...], optimizer_name: str, *betas: float
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Once for blocks that are alike."""
    config = TrainingConfig(optimizer=optimizer_name, betas=list(betas))
    with FakeTensorMode(allow_non_fake_inputs=True), OneForNumbers():
        empty = {name: nn.Parameter(torch.empty(shape, dtype=dtype)) for name, dtype, shape in parameters}
        optimizer = new_optimizer(empty.values(), config)
        for p in empty.values():
            p.grad = torch.empty_like(p)
        optimizer.step()
        return {
            f"{name}.{key}": (value.dtype, value.shape)
            for name, p in empty.items()
            for key, value in state_tensors(optimizer, p)
        }


class OneForNumbers(TorchDispatchMode):
    """A number read off a tensor without data is 1. Adafactor reads some; no shape depends on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError("train.optimizer adamw-8bit needs bitsandbytes: pip install 'diffusionblocks[8bit]'") from None
    return optim


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


class _ShapesOfAdamW8bit(Optimizer):
    """The state bitsandbytes' AdamW8bit makes, on tensors without data, which its kernels cannot read.

    Tensors of at least 4,096 elements: two moments of one byte and a scale per 256 elements each; smaller ones in fp32.
    And the number of steps.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                small = p.numel() < 4096
                self.state[p]["step"] = torch.zeros(())
                for number in (1, 2):
                    self.state[p][f"state{number}"] = torch.empty_like(p, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[p][f"absmax{number}"] = torch.empty(-(-p.numel() // 256), device=p.device)
