"""torch's MemTracker, reduced to what block training asks of it: the peak of each phase of a step, by kind of bytes.

The phases are `forward`, `upper backward` (the deeper half of the layers), `lower backward` and `update` (clipping,
optimizer, averages). MemTracker itself keeps snapshots per module, which costs more than the steps it watches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Bytes:
    """Bytes on the device at one moment.

    activations: everything that is not a parameter, gradient or optimizer state: saved activations, gradients of
    activations, temporaries, buffers, inputs, moving averages.
    """

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Bytes:
        return Bytes(*(getattr(self, f.name) * factor for f in fields(self)))

    def as_dict(self) -> dict[str, int]:
        """Whole bytes by kind, and their sum as `total`."""
        kinds = {f.name: round(getattr(self, f.name)) for f in fields(self)}
        return kinds | {"total": sum(kinds.values())}


class PhaseTracker(MemTracker):
    """Use as a context around training steps, after `present` has named what is already on the device.

    Args:
        middle: the layer whose output separates the two halves of the backward pass; None = no separation.
    """

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.phase, self._middle = "forward", middle
        self.peaks: dict[str, Bytes] = {}
        self._elsewhere = 0
        self._hooks: list[RemovableHandle] = []

    def present(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer | None],
        tensors: Iterable[Tensor],
        elsewhere: Iterable[nn.Module] = (),
    ) -> None:
        """Counts modules, the state of optimizers and other tensors that exist before the steps.

        elsewhere: modules that the steps may read but whose weights are not on the device.
        """
        modules, elsewhere = list(modules), list(elsewhere)
        known = [optimizer for optimizer in optimizers if optimizer is not None]
        self.track_external(*modules, *known, *tensors)
        before = self._total()
        self.track_external(*elsewhere)
        self._elsewhere = self._total() - before
        for parameter in (p for module in (*modules, *elsewhere) for p in module.parameters() if p.requires_grad):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._is_gradient))

    def _total(self) -> int:
        return sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    @property
    def peak(self) -> Bytes:
        """The highest point of all phases."""
        return max(self.peaks.values(), key=lambda point: point.total)

    # MemTracker's callbacks. Without the ones per module it no longer keeps snapshots of each.

    def _update_peak_stats(self, peak_state: Any) -> None:
        backward = self._mod_tracker.is_bw
        if self._in_opt or (not backward and self.phase.endswith("backward")):
            self.phase = "update"
        elif backward and not self.phase.endswith("backward"):
            self.phase = "upper backward"
        for snapshot in self._curr_mem_snap.values():
            best = self.peaks.get(self.phase)
            if best is None or snapshot["Total"] - self._elsewhere > best.total:
                self.peaks[self.phase] = _bytes(snapshot) + Bytes(parameters=-self._elsewhere)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw:
            self.phase = "forward"
        elif self._ac_mod is None:  # activations recomputed in the backward pass
            self._ac_mod, self._in_ac = weakref.ref(module), True

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._mod_tracker.is_bw and self._ac_mod is not None and self._ac_mod() is module:
            self._ac_mod, self._in_ac = None, False
        if module is self._middle and isinstance(outputs, Tensor) and outputs.requires_grad:
            outputs.register_hook(self._enter_lower_half)

    def _enter_lower_half(self, gradient: Tensor) -> None:
        self.phase = "lower backward"

    def _pre_bw_hook(self, module: nn.Module, args: Any) -> None: ...

    def _post_bw_hook(self, module: nn.Module, args: Any) -> None: ...


def _bytes(snapshot: dict[Any, int]) -> Bytes:
    sizes = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}
    kept = sizes["Parameter"], sizes["Gradient"], sizes["Optstate"]
    return Bytes(*kept, sizes["Total"] - sum(kept))
