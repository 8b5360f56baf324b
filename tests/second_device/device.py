"""A second device made of CPU memory, as strict as a CUDA card about what lives where.

torch can register a device whose operations are written in Python (`torch.utils.backend_registration`). A tensor of the
device `sim` wraps a CPU tensor; every operation on it runs on the CPU, and refuses operands and generators that live
elsewhere. What crosses between host and device is counted (`watched`), so that tests can say what a step moves and
waits for.

What it cannot show: time, streams, pinned memory, kernels of a card and their numbers, the caching allocator.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.utils.backend_registration as registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
READING = {aten._local_scalar_dense.default}
SIM = torch.device("sim", 0) if torch._C._get_privateuse1_backend_name() == "sim" else None


@dataclass
class Traffic:
    """What crossed while it was watched. Bytes of each copy from host to device (up) and back (down); numbers that the
    host read off the device (each of which waits for it on a card); elements of the largest tensor that was made on the
    host."""

    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    read: int = 0
    made_on_host: int = 0


_watchers: list[Traffic] = []
_inside = threading.local()  # the CPU computes for the device


class SimTensor(torch.Tensor):
    """A tensor of the device `sim`. raw: where its values are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> SimTensor:
        layout = dict(strides=raw.stride(), dtype=raw.dtype, device=SIM, storage_offset=raw.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(cls, raw.size(), **layout)
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return run(operation, arguments, named or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"sim({self.raw!r})"

    def __format__(self, how: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), how)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor of the second device is not pickled")


class SimGenerator(torch.Generator):
    """A generator of the device `sim`: it draws what a CPU's draws. On its way through torch it loses its Python type,
    not its address."""

    addresses: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.addresses.add(self._cdata)
        weakref.finalize(self, self.addresses.discard, self._cdata)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        assert SIM is not None
        return SIM

    def manual_seed(self, seed: int) -> SimGenerator:
        super().manual_seed(seed)
        return self


def run(operation: Any, arguments: Any, named: Any) -> Any:
    """One operation: on the CPU's memory, after a look at where everything is."""
    flat, _ = tree_flatten((arguments, named))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    if operation not in CROSSING | READING:
        for tensor in tensors:
            if not isinstance(tensor, SimTensor) and tensor.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found sim:0 and {tensor.device} ({operation})"
                )
        for value in flat:
            if isinstance(value, torch.Generator) and value._cdata not in SimGenerator.addresses:
                raise RuntimeError(f"Expected a 'sim' device type for generator but found 'cpu' ({operation})")
    known = {id(tensor.raw): tensor for tensor in ours}
    target = named.get("device")
    to_cpu = target is not None and torch.device(target).type == "cpu"
    _count(operation, arguments, target, to_cpu)

    def bare(value: Any) -> Any:
        if isinstance(value, SimTensor):
            return value.raw
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "sim" else value

    before, _inside.here = getattr(_inside, "here", False), True
    try:
        found = operation(*tree_map(bare, arguments), **tree_map(bare, named))
    finally:
        _inside.here = before
    if operation is aten.copy_.default:
        return arguments[0]

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or to_cpu:
            return value
        return known[id(value)] if id(value) in known else SimTensor(value)

    return tree_map(wrapped, found)


def _count(operation: Any, arguments: Any, target: Any, to_cpu: bool) -> None:
    if not _watchers:
        return
    up = down = 0
    if operation is aten.copy_.default:
        into, source = arguments[:2]
        up = source.nbytes if not isinstance(source, SimTensor) else 0
        down = into.nbytes if not isinstance(into, SimTensor) else 0
    elif operation is aten._to_copy.default:
        up = arguments[0].nbytes if target is not None and not to_cpu and not isinstance(arguments[0], SimTensor) else 0
        down = arguments[0].nbytes if to_cpu else 0
    # What has as many elements as a mask is true is as long as the host has counted.
    shaped = torch.Tag.dynamic_output_shape in operation.tags
    if operation is aten.index.Tensor:
        shaped = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    for traffic in _watchers:
        traffic.up += [up] if up else []
        traffic.down += [down] if down else []
        traffic.read += operation in READING or shaped


class _OnHost(TorchDispatchMode):
    """Sees the tensors that operations make on the host for the host."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        found = operation(*arguments, **(named or {}))
        if not getattr(_inside, "here", False) and not operation.is_view:
            for value in tree_flatten(found)[0]:
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    self.traffic.made_on_host = max(self.traffic.made_on_host, value.numel())
        return found


@contextmanager
def watched() -> Iterator[Traffic]:
    """Counts what crosses between host and device."""
    traffic = Traffic()
    _watchers.append(traffic)
    try:
        with _OnHost(traffic):
            yield traffic
    finally:
        _watchers.remove(traffic)


def register() -> torch.device:
    """Makes the device `sim` known to torch; once per process, for good."""
    global SIM
    if SIM is not None:
        return SIM

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def _is_in_bad_fork(self) -> bool:
            return False

        def manual_seed_all(self, seed: int) -> None: ...

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.get_rng_state()  # it draws from the CPU's generator

        def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
            torch.set_rng_state(state)

        def synchronize(self, device: Any = None) -> None: ...

    registration._setup_privateuseone_for_python_backend("sim", backend_module=Module())
    SIM = torch.device("sim", 0)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operation, *arguments, **named: run(operation, arguments, named), "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # it changes no type
    register.library = library  # type: ignore[attr-defined]  (it ends with its object)
    _patch()
    return SIM


def _patch() -> None:
    """What torch does for devices of its own and not for one that is written in Python."""
    make_tensor, data, generator = torch.tensor, torch._C.TensorBase.data, torch.Generator
    # `with torch.device(...)` knows torch.tensor by identity: it keeps the one that is there now
    _device_constructors()

    def tensor(values: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **more: Any) -> Any:
        if device is not None and torch.device(device).type == "sim":
            return make_tensor(values, dtype=dtype, **more).to("sim").requires_grad_(requires_grad)
        return make_tensor(values, dtype=dtype, device=device, requires_grad=requires_grad, **more)

    def set_data(self: torch.Tensor, new: torch.Tensor) -> None:
        """`parameter.data = tensor`, also of the other device."""
        if isinstance(self, SimTensor) and isinstance(new, SimTensor):
            data.__set__(self, new)
            self.raw = new.raw
            return
        try:
            data.__set__(self, new)
        except RuntimeError as error:
            if "incompatible" not in str(error):
                raise
            other = (
                SimTensor(new.raw) if isinstance(new, SimTensor) else data.__get__(new)
            )  # a version count of its own
            if isinstance(self, torch.nn.Parameter):
                other = torch.nn.Parameter(other, requires_grad=self.requires_grad)
            torch.utils.swap_tensors(self, other)

    class Kind(type):
        def __call__(cls, device: Any = "cpu") -> Any:
            return SimGenerator() if torch.device(device).type == "sim" else generator(device)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, generator)

    torch.tensor = tensor
    torch.Tensor.data = property(lambda self: data.__get__(self), set_data)  # type: ignore[assignment,method-assign]
    torch.Generator = Kind("Generator", (), {})  # type: ignore[misc,assignment]
