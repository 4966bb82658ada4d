"""A container of which some modules are units in a row, also across containers inside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from snv2_kernels.graph.names import Names
from snv2_kernels.nn.clone import CACHES
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.nn.watch import has_own_hooks, note_mode
from snv2_kernels.packing import Builder
from snv2_kernels.packing.units import Unsupported

if TYPE_CHECKING:
    from snv2_kernels.quantization.numbers import Ranges

__all__ = ["Mixed", "Series", "has_series"]


class Series(PlannedModule, nn.Sequential):
    """Units and stages in a row, which another container holds, in one op call."""

    def _plain(self, x: Tensor) -> Tensor:
        out: Tensor = nn.Sequential.forward(self, x)
        return out

    _joined_ranges: tuple[list[Ranges], Ranges] | None = None  # of its modules, and of them all

    @property
    def _ranges(self) -> Ranges | None:  # type: ignore[override]
        """Of its modules, which are all quantized or none."""
        parts = [module._ranges for module in self._runs()]
        told = [ranges for ranges in parts if ranges is not None]
        if len(told) < len(parts):
            return None
        made = self._joined_ranges
        if made is None or any(a is not b for a, b in zip(made[0], told, strict=True)):
            from snv2_kernels.quantization.numbers import joined

            made = self._joined_ranges = told, joined(told)
        return made[1]

    def _runs(self) -> list[PlannedModule]:
        return [module for module in self if isinstance(module, PlannedModule)]

    def _outside(self) -> list[Names]:
        return [names for module in self._runs() for names in module._outside()]

    def _in_channels(self) -> int:
        return self._runs()[0]._in_channels()

    def _splits_input(self) -> bool:
        return self._runs()[0]._splits_input()

    def _add_to(self, builder: Builder) -> None:
        for module in self._runs():
            if module._in_channels() != builder.channels:
                raise Unsupported("its modules do not fit together")
            module._add_to(builder)


def has_series(module: nn.Sequential) -> bool:
    """Whether units follow each other in a container, and not all in the same one inside it."""
    pairs = itertools.pairwise(_flat(module))
    return any(
        _backend(a) == _backend(b) is not None and name.partition(".")[0] != other.partition(".")[0]
        for (name, a), (other, b) in pairs
    )


def _flat(container: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Its modules by name in the order in which they run. A module may stand in two places."""
    modules: Any = container._modules
    for name, module in modules.items():
        if _is_transparent(module):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _is_transparent(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Whether a module is a container whose forward runs its modules and nothing else."""
    if type(module) not in (nn.Sequential, Mixed):
        return False
    assert module is not None
    return "forward" not in vars(module) and not has_own_hooks(module)


def _joined(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    for kind, group in itertools.groupby(modules, lambda item: _kind(item[1])):
        found = list(group)
        if kind is None or len(found) == 1:
            yield from found
            continue
        series = Series(*(module for _, module in found))
        series.training, series._backend = False, kind[0]
        yield f"{found[0][0]}-{found[-1][0]}", series


def _kind(module: nn.Module) -> tuple[str, bool] | None:
    """What is alike in modules of a series; None for others."""
    backend = _backend(module)
    if backend is None:
        return None
    assert isinstance(module, PlannedModule)
    return backend, module._ranges is not None


def _backend(module: nn.Module) -> str | None:
    """Of a module that may be part of a series, None for others."""
    if not isinstance(module, PlannedModule) or not module._is_run():
        return None
    return module._backend


class Mixed(nn.Sequential):
    """``nn.Sequential`` in which units that follow each other run in one op call in ``eval()``
    mode."""

    _original = nn.Sequential
    _made: tuple[list[tuple[str, nn.Module]], dict[str, nn.Module]] | None = None
    _mode_set: object = None  # see FusedModule

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        if self.training or compiling or type(x) is not Tensor:
            out: Tensor = super().forward(x)
            return out
        for module in self.steps().values():
            x = module(x)
        return x

    def steps(self) -> dict[str, nn.Module]:
        """Its modules and those of containers inside, by name, units in a row as one
        :class:`Series`, such as ``"1-3"``."""
        modules = list(_flat(self))
        made = self._made
        if made is None or [id(m) for _, m in made[0]] != [id(m) for _, m in modules]:
            made = self._made = modules, dict(_joined(modules))
        return made[1]

    def train(self, mode: bool = True) -> Mixed:
        self._made = None  # as of all drop-ins, so that packed weights are dropped
        note_mode(self)
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in CACHES}
