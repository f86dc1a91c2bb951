"""A GPU that is not there: its tensors say that they lie on cuda:0, and hold their values in the memory of
the CPU.

On any machine it proves two things of the code that runs within it. Every tensor lies where it should: an
operation on tensors of both devices raises, as on a GPU. And the host waits for the device only where that is
allowed: reading a value back, a blocking copy, an index by a mask, and whatever else lets torch wait for the
work it has queued, raises `WaitedError`, which names the function that waits.

Numbers are those of the CPU, so what a function does differently on a GPU (packed weights, pinned memory,
blocks that come and go) is computed and can be compared. What it cannot prove: that CUDA has a kernel for an
operation, what it rounds, how long it takes, how much memory it needs. Autograd's engine asks for a driver,
so `backward` fills every gradient with ones.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[1]
FOLDERS = ("diffusion", "models", "samplers", "train", "eval", "tests")
STAGED = (
    2**16
    # bytes: a copy of so few from pageable memory is queued at once; before a larger one the driver waits for
    #     the stream
)

aten = torch.ops.aten
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}  # which argument is copied
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READS = {  # operations whose result, or its shape, the host has to know
    *(
        aten._local_scalar_dense,
        aten.is_nonzero,
        aten.equal,
        aten.nonzero,
        aten.masked_select,
        aten.bincount,
        aten.repeat_interleave,
    ),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten._linalg_check_errors, aten._linalg_eigh, aten._linalg_svd, aten.linalg_eig),
}


class WaitedError(AssertionError):
    """The host waits for the device where that is not allowed."""


class OnFakeGPU(Tensor):
    """A tensor that says it lies on the GPU; `value` holds its numbers, on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnFakeGPU:
        return Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            value.stride(),
            value.storage_offset(),
            dtype=value.dtype,
            layout=value.layout,
            device=CUDA,
        )

    def __init__(self, value: Tensor) -> None:
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return FakeGPU.here().compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnFakeGPU({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        FakeGPU.here().wait("tolist")
        return self.value.tolist()

    def backward(self, *_: Any, **__: Any) -> None:
        """Ones for the gradient of every parameter that this was computed from."""
        left, seen = [self.grad_fn], set[Any]()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [inner for inner, _ in node.next_functions]
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                leaf.grad = torch.ones_like(leaf) if leaf.grad is None else leaf.grad + 1

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        """Whatever device that lies on: a parameter that comes back to the CPU stays the same object, as on a
        GPU."""
        torch.utils.swap_tensors(self, nn.Parameter(new, self.requires_grad))

    # By these `nn.Module.to` knows that it cannot exchange the data of a parameter of one device for that of
    # another.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> OnFakeGPU:
        return OnFakeGPU(inner["value"])


class FakeGPU(TorchDispatchMode):
    """Within it cuda:0 is there. `allowed` are the functions that may wait for it, "models/networks/vae.py
    run_finite", each with a reason.

    waits  how often each of them has waited
    """

    current: FakeGPU | None = None

    def __init__(self, allowed: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not annotated
        self.allowed, self.waits = allowed, Counter[str]()
        self.streams, self.patch = Streams(self), pytest.MonkeyPatch()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes seconds

    @staticmethod
    def here() -> FakeGPU:
        assert FakeGPU.current is not None, "a tensor on a fake GPU is of no use outside of it"
        return FakeGPU.current

    def __enter__(self) -> Self:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=CUDA) makes it on the CPU, and copies
        torch._C._ensureCUDADeviceGuardSet()  # asks no driver for streams and devices, where there is none
        if not torch.cuda.is_available():
            self.patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        for name, value in {
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "is_bf16_supported": lambda: True,
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda *_: None,
            "synchronize": lambda *_: self.wait("synchronize"),
            "Stream": self.streams.make,
            "stream": self.streams.on,
            "current_stream": self.streams.current,
        }.items():
            self.patch.setattr(torch.cuda, name, value)
        self.patch.setattr(
            torch.accelerator, "is_available", lambda *_: True
        )  # for data loaders, which pin what they read
        self.patch.setattr(
            "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False
        )
        FakeGPU.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        FakeGPU.current = None
        self.patch.undo()
        torch._C._set_only_lift_cpu_tensors(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """Count a wait of the library. Raise `WaitedError` where it is not allowed; what a test does itself
        is its own affair."""
        where = _function()
        if where is None:
            return
        function, line = where
        if function not in self.allowed:
            raise WaitedError(f"{function}, line {line}, waits for the device: {what}")
        self.waits[function] += 1

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on tensors of which some lie on the GPU, or that makes one there."""
        if func is aten.is_pinned.default:
            return _is_pinned(args[0])
        if func is aten._pin_memory.default:
            return _pin(args[0].clone())
        tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        there, made = [value for value in tensors if isinstance(value, OnFakeGPU)], kwargs.get("device")
        if not there and (made is None or made.type == "cpu"):
            pinned = kwargs.pop("pin_memory", False)  # which needs a driver
            found = func(*args, **kwargs)
            return _pin(found) if pinned else found
        if func is aten._fused_sdp_choice.default:
            return 0  # attention by its formula, which has kernels on the CPU
        traits = _traits(func)
        if traits.composite:  # which comes apart by itself, but not for the tensors of inference
            with self._again():
                return func.decompose(*args, **kwargs)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        self._check(func, traits, tensors, there, args)
        if traits.reads:
            self.wait(str(func))
        return self._run(func, args, kwargs, made is None or made.type == "cuda")

    @contextmanager
    def _again(self) -> Iterator[None]:
        """What is done within an operation comes here too."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _check(
        self, func: Any, traits: _Traits, tensors: list[Tensor], there: list[OnFakeGPU], args: Any
    ) -> None:
        """RuntimeError for tensors of both devices, where a GPU refuses them: a CPU's single number may go
        along, and places to look at."""
        here = [value for value in tensors if not isinstance(value, OnFakeGPU)]
        if traits.indexes:
            places = [place for place in args[1] if place is not None]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places):
                self.wait(f"{func} by a mask, whose size it has to know")
            elif any(not isinstance(place, OnFakeGPU) for place in places):
                self.wait(f"{func} by places that lie on the CPU, and are copied")
            here = [value for value in here if not any(value is place for place in places)]
        if there and any(value.ndim or not (traits.pointwise or traits.indexes) for value in here):
            shapes = " and ".join(f"{tuple(value.shape)} on {value.device}" for value in (here[0], there[0]))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} was given {shapes}"
            )

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, target = args[COPIES[func]], kwargs.get("device") or args[0].device
        if source.device != target:
            bound = kwargs.get(
                "non_blocking", args[2] if func is aten.copy_.default and len(args) > 2 else False
            )
            staged = _is_pinned(source) or source.nbytes <= STAGED
            if not source.numel():  # nothing to copy, nothing to wait for
                pass
            elif target.type == "cpu":
                self.wait("a copy to the CPU")
            elif not (bound and staged):
                self.wait(
                    f"a copy from the CPU of {tuple(source.shape)}, "
                    f"{'of pageable memory' if bound else 'without non_blocking'}"
                )
        if func is aten.copy_.default and self.streams.defers(args, kwargs):
            return args[0]
        return self._run(func, args, kwargs, target.type == "cuda")

    def _run(self, func: Any, args: Any, kwargs: Any, on_gpu: bool) -> Any:
        """The operation on the values. What it changes in place stays the tensor that it is."""
        same: dict[int, OnFakeGPU] = {}
        computes = not _traits(func).view

        def inner(value: Any) -> Any:
            if isinstance(value, OnFakeGPU):
                if computes:
                    self.streams.used(value.value)
                same[id(value.value)] = value
                return value.value
            return CPU if isinstance(value, torch.device) else value

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) in same:
                return same.get(id(value), value)
            if computes:
                self.streams.used(value)
            if value.is_inference() == torch.is_inference_mode_enabled():
                return OnFakeGPU(value) if on_gpu else value
            with torch.inference_mode(value.is_inference()):  # a view of a weight, say, is none of inference
                return OnFakeGPU(value) if on_gpu else value

        named = {name: _each(inner, value) for name, value in kwargs.items() if name != "pin_memory"}
        return _each(outer, func(*_each(inner, args), **named))


class Stream:
    """A side stream. What is copied on it happens as late as it may: when somebody waits for the stream.

    knows  the number of the main stream's operations that it comes after
    reads  the memory that its copies may still read, for all that the host knows
    """

    def __init__(self, streams: Streams) -> None:
        self.streams, self.late, self.knows, self.reads = streams, list[Callable[[], Any]](), 0, set[int]()

    def finish(self) -> None:
        while self.late:
            self.late.pop(0)()

    def synchronize(self) -> None:
        self.streams.gpu.wait("the end of a stream")
        self.finish()
        self.reads.clear()

    def wait_stream(self, other: Stream) -> None:
        other.finish()
        if other is self.streams.main:
            self.knows = self.streams.done


class Streams:
    """The main stream, on which everything happens at once, and those beside it: of these only copies are
    known here.

    done  operations of the main stream so far; last: of each memory, the number of the operation that used it
          last
    """

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu, self.done, self.last = gpu, 0, dict[int, int]()
        self.main, self.chosen = Stream(self), threading.local()

    def make(self, device: Any = None, **_: Any) -> Stream:
        return Stream(self)

    def current(self, device: Any = None) -> Stream:
        return getattr(self.chosen, "stream", self.main)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.chosen.stream = stream
        try:
            yield
        finally:
            self.chosen.stream = self.main

    def used(self, value: Tensor) -> None:
        self.done += 1
        self.last[value.untyped_storage().data_ptr()] = self.done

    def defers(self, args: Any, kwargs: Any) -> bool:
        """Whether a copy is one of a side stream, which happens later. RuntimeError where what is queued may
        still use its memory."""
        stream = self.current()
        if stream is self.main:
            return False
        into, source = (value.value if isinstance(value, OnFakeGPU) else value for value in args[:2])
        if self.last.get(into.untyped_storage().data_ptr(), 0) > stream.knows:
            raise RuntimeError(
                "a copy on a side stream overwrites what the main stream may still use: let it wait for the "
                "main stream"
            )
        if (memory := source.untyped_storage().data_ptr()) in stream.reads:
            raise RuntimeError(
                "memory is filled again that an earlier copy may still read: wait for the end of its stream"
            )
        stream.reads.add(memory)
        stream.late.append(lambda: into.copy_(source))
        return True


@dataclass(frozen=True)
class _Traits:
    """Of an operation.

    composite  made of others on every device
    view       says anew how memory is read, for which a GPU does nothing
    """

    composite: bool
    view: bool
    reads: bool
    indexes: bool
    pointwise: bool


@cache
def _traits(func: Any) -> _Traits:
    aliases = [value.alias_info for value in func._schema.returns]
    return _Traits(
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        view=all(alias is not None and not alias.is_write for alias in aliases),
        reads=func.overloadpacket in READS,
        indexes=func in INDEXING,
        pointwise=torch.Tag.pointwise in func.tags,
    )


def _flat(values: Any) -> list[Any]:
    """The values, those of lists and tuples among them."""
    return [each for value in values for each in (value if type(value) in (list, tuple) else (value,))]


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of a value, or of each within lists and tuples: all that an operation takes and gives."""
    return (
        type(value)([_each(function, each) for each in value])
        if type(value) in (list, tuple)
        else function(value)
    )


def _function() -> tuple[str, int] | None:
    """The innermost named function of the library that is being called, and its line. None where a test is
    innermost."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _place(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or (place := _place(frame.f_code.co_filename)).startswith("tests/"):
        return None
    line = frame.f_lineno
    while frame is not None and (
        frame.f_code.co_name.startswith("<") or _place(frame.f_code.co_filename) != place
    ):
        frame = (
            frame.f_back
        )  # lambdas and comprehensions are part of the function of their file that is being called
    return f"{place} {frame.f_code.co_name if frame else '<module>'}", line


@cache
def _place(file: str) -> str:
    """A file of the project by its path within it, any other "", this one too."""
    path = Path(file)
    if not path.is_relative_to(ROOT) or path == Path(__file__):
        return ""
    place = path.relative_to(ROOT)
    return place.as_posix() if place.parts[0] in FOLDERS else ""


def _pin(value: Tensor) -> Tensor:
    value.pinned = True  # type: ignore[attr-defined]
    return value


def _is_pinned(value: Tensor) -> bool:
    return getattr(value, "pinned", False)
