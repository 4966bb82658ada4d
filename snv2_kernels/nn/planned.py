"""The base of drop-in modules that run as a plan."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from snv2_kernels import _native, gpu
from snv2_kernels.graph.recipe import Recipe, RecipeBuilder
from snv2_kernels.nn.fused import FusedModule
from snv2_kernels.ops import KERNEL_DTYPES, OPERATORS, run_plan
from snv2_kernels.packing import (
    Builder,
    GpuPlan,
    GpuPlanBuilder,
    Plan,
    PlanBuilder,
    TritonPlan,
    TritonPlanBuilder,
)
from snv2_kernels.packing.units import Unsupported

if TYPE_CHECKING:
    from snv2_kernels.quantization.numbers import Ranges
    from snv2_kernels.runners import Pixels

__all__ = ["PlannedModule", "RecipeModule", "plan_element"]

P_co = TypeVar("P_co", covariant=True)
_gpu_fields = functools.cache(gpu.current_device)


def plan_element(dtype: torch.dtype) -> torch.dtype:
    """Of the maps inside a plan of the CPU backend, for an input of ``dtype``."""
    narrow = dtype == torch.bfloat16 and _native.cpu_has_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


class _PlanBuilder(Protocol[P_co]):
    def build(self, dtype: torch.dtype, device: torch.device) -> P_co: ...


def _built(builder: _PlanBuilder[P_co], dtype: torch.dtype, device: torch.device) -> P_co:
    try:
        return builder.build(dtype, device)
    except OverflowError as error:
        raise Unsupported(str(error)) from None


class PlannedModule(FusedModule):
    """A drop-in module that runs as a plan: one op call, whatever its size."""

    kernel_backends: ClassVar[tuple[str, ...]] = tuple(OPERATORS)
    # Of the maps of a quantized module, which runs in integers on a CPU.
    _ranges: Ranges | None = None

    def _add_to(self, builder: Builder) -> None:
        """Tell the units of this module, or raise :class:`Unsupported`."""
        raise NotImplementedError

    def _is_run(self) -> bool:
        """Whether :meth:`_add_to` tells all of it, so that units may follow."""
        return False

    def _why_not_whole(self) -> str | None:
        """Why it is no single plan, None if it is."""
        return None

    def _fits(self, height: int, width: int) -> bool:
        """Whether the plan is right for inputs of this size."""
        return True

    def _why_not_at(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why the plan is wrong for inputs of a shape and dtype on a device, without gradients."""
        return None

    def _takes_images(self) -> bool:
        """Whether it is a network with a stem, which can convert images on the way in."""
        return False

    def _splits_input(self) -> bool:
        """Whether part of the input goes through untouched, so that its dtype does too."""
        return False

    def _tap_names(self) -> tuple[str, ...]:
        """Maps on the way that a plan can give as results too."""
        return ()

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        """Tell the whole module, or raise :class:`Unsupported`."""
        assert not taps
        builder.add_import(self._in_channels())
        self._add_to(builder)

    def _check_supported(self) -> None:
        self._tell(Builder())

    def _weights_kind(self, backend: str, dtype: torch.dtype) -> Any:
        if backend != "cpu":
            return backend == "triton", dtype
        return "cpu", plan_element(dtype) if self._ranges is None else torch.uint8

    def _pack(
        self, backend: str, dtype: torch.dtype, device: torch.device
    ) -> Plan | GpuPlan | TritonPlan:
        if backend == "cpu":
            return self._cpu_plan(dtype)
        if self._ranges is not None:
            raise Unsupported("it is quantized, and integers run on a CPU only")
        return (self._triton_plan if backend == "triton" else self._gpu_plan)(dtype, device)

    def _cpu_plan(
        self, dtype: torch.dtype, taps: Collection[str] = (), pixels: Pixels | None = None
    ) -> Plan:
        """Of the CPU's kernels, for an input of ``dtype``; see :meth:`_gpu_plan`. A quantized
        module's takes bytes where ``pixels`` says what they stand for."""
        builder = PlanBuilder()
        self._tell(builder, taps)
        if self._ranges is None:
            return builder.build(plan_element(dtype))
        from snv2_kernels.quantization.numbers import integer_layers

        return builder.build_integers(integer_layers(builder, self._ranges), pixels)

    def _triton_plan(
        self, dtype: torch.dtype, device: torch.device, taps: Collection[str] = ()
    ) -> TritonPlan:
        """See :meth:`_gpu_plan`."""
        builder = TritonPlanBuilder()
        self._tell(builder, taps)
        return _built(builder, dtype, device)

    def _gpu_plan(
        self, dtype: torch.dtype, device: torch.device, taps: Collection[str] = ()
    ) -> GpuPlan:
        """The plan of the CUDA kernels.

        Args:
            dtype: of the maps.
            device: of the plan's arrays.
            taps: some of :meth:`_tap_names`. Their maps are results before the last one, in the
                order of the network.

        Raises:
            Unsupported: if this module or these numbers cannot be packed.
        """
        builder = GpuPlanBuilder()
        self._tell(builder, taps)
        return _built(builder, dtype, device)

    def _covers(self, weights: Plan | GpuPlan | TritonPlan, x: Tensor) -> bool:
        if not isinstance(weights, GpuPlan):
            return True
        fields = _gpu_fields(x.device) if x.is_cuda else gpu.current_device(x.device)
        return weights.covers(x.shape[0], x.shape[2], x.shape[3], fields)

    def _run(self, weights: Plan | GpuPlan | TritonPlan, x: Tensor, backend: str) -> Any:
        return run_plan(x, weights, backend)

    def _in_graph(self, x: Tensor) -> Tensor:
        recipe = RecipeBuilder()
        self._tell(recipe)
        return self._told_in_graph(recipe, x)

    def _told_in_graph(self, recipe: RecipeBuilder, x: Tensor) -> Tensor:
        tensors = recipe.weights, recipe.state
        dtype, autocast = self._graph_dtypes(x, *tensors, recipe.in_channels)
        out: Tensor = torch.ops.snv2.fused(
            x, recipe.state, recipe.text, self._backend, dtype, autocast
        )
        return out

    def _graph_dtypes(
        self, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], in_channels: int
    ) -> tuple[torch.dtype, torch.dtype | None]:
        """See :meth:`_dtypes`; raises :class:`Unsupported` unless x fits."""
        dtype, autocast = self._dtypes(x)
        parameters = weights[0].dtype if autocast is not None else x.dtype
        fit = parameters in KERNEL_DTYPES
        for weight in weights:
            fit = fit and weight.dtype == parameters
        for tensor in state:  # norms may be of float32
            fit = fit and tensor.dtype in (parameters, torch.float32)
        if not fit:
            raise Unsupported("dtypes")
        if x.dim() != 4 or x.shape[1] != in_channels:
            raise Unsupported("a shape that does not fit")
        return dtype, autocast

    def _autocast_dtype(self, x: torch.dtype, autocast: torch.dtype) -> torch.dtype:
        return torch.promote_types(x, autocast) if self._splits_input() else autocast


class RecipeModule(PlannedModule):
    """A recipe with the tensors of its state, as a drop-in module without modules inside."""

    def __init__(self, recipe: Recipe, state: Sequence[Tensor]) -> None:
        super().__init__()
        self.recipe, self.state = recipe, state

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        self.recipe.tell(builder, self.state)
