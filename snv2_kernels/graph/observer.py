"""Watches the Python code of a forward while it is recorded.

A forward may depend on more than the numbers of its input, and do more than compute. The recorder
sees the torch functions that it calls on tensors. The rest is seen here, by a profile function,
which Python tells of each call: questions put to torch, names that are looked up outside the
module, and effects that a fused module would not have.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, deque
from types import CodeType, FrameType, FunctionType
from typing import Any, cast

import torch

from snv2_kernels.graph.contents import Contents
from snv2_kernels.graph.names import Names, is_library

__all__ = ["DEPENDS_ON_SIZE", "Observer"]

DEPENDS_ON_SIZE = "its control flow depends on the size of its input"

# Functions of torch in C by what their answer depends on, a word of snv2_kernels.graph.conditions.
_QUESTIONS: dict[Any, str] = {
    torch._C.is_grad_enabled: "grad",
    torch._C.is_inference_mode_enabled: "inference",
    torch.get_default_dtype: "default dtype",
    **{
        getattr(torch._C, n): "autocast"
        for n in dir(torch._C)
        if "autocast" in n and "jit" not in n
    },
}
# What a partition has no place for.
_SETS_AUTOCAST = {
    getattr(torch._C, n) for n in dir(torch._C) if n.startswith(("set_autocast", "autocast_incr"))
}
_COMPILERS = (
    torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting,
    torch.onnx.is_in_onnx_export,
)  # fmt: skip
_ABOUT_COMPILERS = {function.__code__ for function in _COMPILERS}
_ABOUT_SIZES = {
    getattr(kind, name).__code__
    for kind in (torch.SymBool, torch.SymInt, torch.SymFloat)
    for name in ("__bool__", "__int__", "__index__", "__float__", "__hash__", "__repr__")
    if isinstance(getattr(kind, name, None), FunctionType)
}
# Modules of C functions that change nothing but what is passed to them, and need nothing else.
_HARMLESS = {
    "_abc", "_bisect", "_collections", "_collections_abc", "_contextvars", "_functools", "_heapq",
    "_operator", "_sre", "_stat", "_string", "_struct", "_thread", "_typing", "_warnings",
    "_weakref", "builtins", "cmath", "collections", "enum", "functools", "itertools", "math",
    "numpy", "operator", "sys", "torch", "types", "typing",
}  # fmt: skip
_HARMLESS_OWNERS = frozenset((dict, list, tuple, set, frozenset, str, bytes, OrderedDict, deque))
_EFFECTS = (print, input, exec, breakpoint)
# Python modules of functions with effects, or that ask the system; and names of torch's.
_OUTSIDE = {"logging", "os", "random", "socket", "subprocess", "queue", "multiprocessing"}
_SETTERS = ("set_", "manual_seed", "seed", "use_deterministic_algorithms")


class Observer:
    """Watches a forward in a ``with`` block; it may reach ``contents``, its module's."""

    def __init__(self, contents: Contents) -> None:
        self.asked: set[str] = set()  # what the forward may depend on, see conditions
        self.names = Names()
        self._effect: str | None = None
        self._inside = contents
        self._seen: set[CodeType] = set()
        self._modules = frozenset(sys.modules)  # what others hold is still being imported

    def __enter__(self) -> Observer:
        self._before = cast(Any, sys.getprofile())
        if self._before is not None and not callable(self._before):  # cProfile before Python 3.12
            self._before.disable()
        # A collection would run callbacks and finalizers as if the forward called them.
        self._collects = gc.isenabled()
        gc.disable()
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        if self._collects:
            gc.enable()
        if callable(self._before):
            sys.setprofile(self._before)
        elif self._before is not None:
            self._before.enable()

    def pause(self) -> None:
        """Look away, in torch's own functions."""
        sys.setprofile(None)

    def resume(self) -> None:
        sys.setprofile(self._event)

    def effect(self) -> str | None:
        """Returns what the forward did besides computing; undoes it where that can be."""
        change = self._inside.changed() or self.names.changed()
        if change is not None:
            self._inside.restore()
            self.names.restore()
        self._inside.clear_caches()
        self.names.settle(self._inside)
        return self._effect or (change and f"its forward {change}")

    def note(self, effect: str) -> None:
        """Remember the first of several effects."""
        self._effect = self._effect or effect

    def _event(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code in _ABOUT_SIZES:
                self.note(DEPENDS_ON_SIZE)
            elif code in _ABOUT_COMPILERS and not _is_quiet(frame.f_back):
                self.asked.add("compiler")
            elif code not in self._seen:
                self._seen.add(code)
                self._look_at_code(frame)
        elif event == "c_call":
            if type(getattr(function, "__self__", None)) in _HARMLESS_OWNERS or _is_own(frame):
                return
            if (question := _QUESTIONS.get(function)) is not None:
                self.asked.add(question)
                if function in _SETS_AUTOCAST:
                    self.asked.add("sets autocast")
            elif not (_is_harmless(function) or _is_quiet(frame)):
                self.note(f"its forward calls {function.__qualname__}")

    def _look_at_code(self, frame: FrameType) -> None:
        """Keep what code that runs for the first time looks up."""
        code, root = frame.f_code, _root(frame)
        if root in _OUTSIDE:
            if not _is_quiet(frame):
                self.note(f"its forward calls {_module(frame)}.{code.co_qualname}")
        elif code.co_name.startswith(_SETTERS) and root == "torch":
            self.note(f"its forward calls {code.co_qualname}")
        elif not is_library(_module(frame)) and (
            _module(frame) in self._modules or _module(frame) not in sys.modules
        ):
            self.names.add_code(code, frame.f_globals)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _root(frame: FrameType) -> str:
    return _module(frame).partition(".")[0]


def _is_own(frame: FrameType) -> bool:
    return _root(frame) == "snv2_kernels" and is_library(_module(frame))


def _is_quiet(frame: FrameType | None) -> bool:
    """Whether torch or this package called, perhaps by way of the standard library."""
    while frame is not None and _root(frame) in sys.stdlib_module_names:
        frame = frame.f_back
    return frame is None or is_library(_module(frame))


def _is_harmless(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    root = module.partition(".")[0]
    sets = root == "torch" and function.__name__.startswith(_SETTERS)
    return root in _HARMLESS and not sets and function not in _EFFECTS
