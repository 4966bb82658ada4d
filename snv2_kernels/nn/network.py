"""The unit, a stage and the whole classifier as drop-in modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from snv2_kernels import _native, models
from snv2_kernels.graph.recipe import RecipeBuilder
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
from snv2_kernels.packing.units import IDENTITY, RELU, Activation, Layer, Unit, Unsupported
from snv2_kernels.runners import device_fields

__all__ = ["STAGES", "InvertedResidual", "PlannedModule", "ShuffleNetV2", "Stage"]


def _conv_bn(
    name: str,
    conv: nn.Module,
    bn: nn.Module,
    kernel: int,
    stride: int = 1,
    depthwise: bool = False,
    activation: Activation = IDENTITY,
) -> Layer:
    """The pair, if it is the convolution the kernels compute."""
    if type(conv) is not nn.Conv2d:
        raise Unsupported(f"{name}: {type(conv).__name__} is not a plain Conv2d")
    if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise Unsupported(f"{name}: {type(bn).__name__} is not a plain BatchNorm2d")
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    if bn.running_mean is None or bn.running_var is None:
        raise Unsupported(f"{name}: the batch norm keeps no running statistics")
    padding = kernel // 2
    expected = {
        "kernel_size": (kernel, kernel),
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (1, 1),
        "groups": conv.in_channels if depthwise else 1,
        "padding_mode": "zeros",
    }
    for attribute, value in expected.items():
        if getattr(conv, attribute) != value:
            raise Unsupported(f"{name}: {attribute}={getattr(conv, attribute)!r}, not {value!r}")
    if depthwise and conv.out_channels != conv.in_channels:
        raise Unsupported(f"{name}: a depthwise multiplier")
    if bn.num_features != conv.out_channels:
        raise Unsupported(f"{name}: the batch norm has {bn.num_features} channels")
    return Layer(conv, bn, activation, kernel)  # type: ignore[arg-type]


def _sequence(name: str, module: nn.Module, length: int) -> list[nn.Module]:
    if type(module) is not nn.Sequential or len(module) != length:
        raise Unsupported(f"{name}: not a Sequential of {length} modules")
    return list(module)


def _check_relu(name: str, module: nn.Module) -> None:
    if type(module) is not nn.ReLU:
        raise Unsupported(f"{name}: {type(module).__name__} is not a ReLU")


P_co = TypeVar("P_co", covariant=True)
_gpu_fields = functools.cache(device_fields)


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

    def _add_to(self, builder: Builder) -> None:
        """Tell the units of this module, or raise :class:`Unsupported`."""
        raise NotImplementedError

    def _is_run(self) -> bool:
        """Whether :meth:`_add_to` tells all of it, so that units may follow."""
        return False

    def _fits(self, height: int, width: int) -> bool:
        """Whether the plan is right for inputs of this size."""
        return True

    def _why_not_at(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why the plan is wrong for inputs of a shape and dtype on a device, without gradients."""
        return None

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
        return ("cpu", plan_element(dtype)) if backend == "cpu" else (backend == "triton", dtype)

    def _pack(
        self, backend: str, dtype: torch.dtype, device: torch.device
    ) -> Plan | GpuPlan | TritonPlan:
        if backend == "cpu":
            return self._cpu_plan(dtype)
        return (self._triton_plan if backend == "triton" else self._gpu_plan)(dtype, device)

    def _cpu_plan(self, dtype: torch.dtype, taps: Collection[str] = ()) -> Plan:
        """Of the CPU's kernels, for an input of ``dtype``; see :meth:`_gpu_plan`."""
        builder = PlanBuilder()
        self._tell(builder, taps)
        return builder.build(plan_element(dtype))

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
        fields = _gpu_fields(x.device) if x.is_cuda else device_fields(x.device)
        return weights.covers(x.shape[0], x.shape[2], x.shape[3], fields)

    def _run(self, weights: Plan | GpuPlan | TritonPlan, x: Tensor, backend: str) -> Any:
        return run_plan(x, weights, backend)

    def _in_graph(self, x: Tensor) -> Tensor:
        recipe = RecipeBuilder()
        self._tell(recipe)
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
        same = all(w.dtype == parameters for w in weights)
        norms_fit = all(t.dtype in (parameters, torch.float32) for t in state)
        if not (same and norms_fit) or parameters not in KERNEL_DTYPES:
            raise Unsupported("dtypes")
        if x.dim() != 4 or x.shape[1] != in_channels:
            raise Unsupported("a shape that does not fit")
        return dtype, autocast

    def _autocast_dtype(self, x: torch.dtype, autocast: torch.dtype) -> torch.dtype:
        return torch.promote_types(x, autocast) if self._splits_input() else autocast


class InvertedResidual(PlannedModule, models.InvertedResidual):
    """The unit of :class:`snv2_kernels.models.InvertedResidual`, fused in ``eval()`` mode.

    The same constructor ``(inp, oup, stride)``, formula, submodules and state_dict keys; one op
    call, in logical channel order.
    """

    def _plain(self, x: Tensor) -> Tensor:
        return models.InvertedResidual.forward(self, x)

    def _in_channels(self) -> int:
        first, *_ = _sequence("branch2", self.branch2, 8)
        if not isinstance(first, nn.Conv2d):
            raise Unsupported(f"branch2.0: {type(first).__name__} is not a plain Conv2d")
        return first.in_channels * (2 if self.stride == 1 else 1)

    def _is_run(self) -> bool:
        return True

    def _splits_input(self) -> bool:
        return self.stride == 1

    def _add_to(self, builder: Builder) -> None:
        if self.stride not in (1, 2):
            raise Unsupported(f"stride {self.stride}")
        pw1, bn1, act1, dw, bn2, pw2, bn3, act2 = _sequence("branch2", self.branch2, 8)
        first = _conv_bn("branch2.0", pw1, bn1, 1, activation=RELU)
        depthwise = _conv_bn("branch2.3", dw, bn2, 3, self.stride, depthwise=True)
        last = _conv_bn("branch2.5", pw2, bn3, 1, activation=RELU)
        _check_relu("branch2.2", act1)
        _check_relu("branch2.7", act2)
        width = last.channels
        if not (
            first.channels == depthwise.conv.in_channels == last.conv.in_channels
            and (self.stride == 2 or first.conv.in_channels == width)
        ):
            raise Unsupported("branch2: the widths do not fit together")
        order = [j for i in range(width) for j in (i, width + i)]
        if self.stride == 1:
            main, passthrough = range(width, 2 * width), range(width)
            builder.add_unit(Unit(1, (first, depthwise, last), main, passthrough, order))
            return
        dw, bn1, pw, bn2, act = _sequence("branch1", self.branch1, 5)
        projection = (
            _conv_bn("branch1.0", dw, bn1, 3, 2, depthwise=True),
            _conv_bn("branch1.2", pw, bn2, 1, activation=RELU),
        )
        _check_relu("branch1.4", act)
        inp = first.conv.in_channels
        if any(layer.conv.in_channels != inp for layer in projection) or (
            projection[1].channels != width
        ):
            raise Unsupported("branch1: the widths do not fit together")
        unit = Unit(2, (first, depthwise, last), range(inp), [], order, projection)
        builder.add_unit(unit)


class Stage(PlannedModule, nn.Sequential):
    """A run of units, ``nn.Sequential(*units)``, in one op call: between its units the channel
    shuffle is a table, not a copy.

    Args:
        units: :class:`InvertedResidual` modules.

    Raises:
        TypeError: for anything else.
    """

    def __init__(self, *units: InvertedResidual) -> None:
        for i, unit in enumerate(units):
            if not isinstance(unit, InvertedResidual):
                raise TypeError(
                    f"units[{i}]: expected snv2_kernels.nn.InvertedResidual,"
                    f" got {type(unit).__name__}"
                )
        super().__init__(*units)

    def _plain(self, x: Tensor) -> Tensor:
        out: Tensor = nn.Sequential.forward(self, x)
        return out

    def _units(self) -> list[InvertedResidual]:
        units = [unit for unit in self if isinstance(unit, InvertedResidual)]
        if len(units) != len(self) or not units:
            raise Unsupported("not all its modules are units")
        return units

    def _in_channels(self) -> int:
        return self._units()[0]._in_channels()

    def _is_run(self) -> bool:
        return True

    def _splits_input(self) -> bool:
        return self._units()[0]._splits_input()

    def _add_to(self, builder: Builder) -> None:
        channels = None
        for i, unit in enumerate(self._units()):
            if channels not in (None, unit._in_channels()):
                raise Unsupported(f"unit {i} takes {unit._in_channels()} channels, not {channels}")
            try:
                unit._add_to(builder)
            except Unsupported as error:
                raise Unsupported(f"unit {i}: {error}") from None
            last = unit.branch2[5]
            assert isinstance(last, nn.Conv2d)
            channels = 2 * last.out_channels


STAGES = ("stage2", "stage3", "stage4")  # of the classifier


class ShuffleNetV2(PlannedModule, models.ShuffleNetV2):
    """The classifier of :class:`snv2_kernels.models.ShuffleNetV2`, from pixels to scores in one
    op call in ``eval()`` mode. The same constructor, submodules and state_dict keys."""

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        inverted_residual: Callable[..., nn.Module] = InvertedResidual,
    ) -> None:
        super().__init__(stages_repeats, stages_out_channels, num_classes, inverted_residual)
        for name in STAGES:
            units: Any = list(getattr(self, name))
            if all(isinstance(unit, InvertedResidual) for unit in units):
                setattr(self, name, Stage(*units))

    def _plain(self, x: Tensor) -> Tensor:
        return models.ShuffleNetV2.forward(self, x)

    def _in_channels(self) -> int:
        conv, *_ = _sequence("conv1", self.conv1, 3)
        if not isinstance(conv, nn.Conv2d):
            raise Unsupported(f"conv1.0: {type(conv).__name__} is not a plain Conv2d")
        return conv.in_channels

    def _tap_names(self) -> tuple[str, ...]:
        return STAGES

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        conv, bn, act = _sequence("conv1", self.conv1, 3)
        stem = _conv_bn("conv1", conv, bn, 3, 2, activation=RELU)
        _check_relu("conv1.2", act)
        pool: Any = self.maxpool
        window = [getattr(pool, name, None) for name in ("kernel_size", "stride", "padding")]
        if type(pool) is not nn.MaxPool2d or window != [3, 2, 1] or pool.dilation != 1:
            raise Unsupported("maxpool: not MaxPool2d(3, 2, 1)")
        if pool.ceil_mode or pool.return_indices:
            raise Unsupported("maxpool: ceil_mode or return_indices")
        conv, bn, act = _sequence("conv5", self.conv5, 3)
        features = _conv_bn("conv5", conv, bn, 1, activation=RELU)
        _check_relu("conv5.2", act)
        if type(self.fc) is not nn.Linear or self.fc.in_features != features.channels:
            raise Unsupported(f"fc: {type(self.fc).__name__} is not the Linear of conv5's features")

        builder.add_stem(stem)
        channels = stem.channels
        for name in STAGES:
            stage: nn.Module = getattr(self, name)
            if not isinstance(stage, Stage):
                raise Unsupported(f"{name}: not all its modules are units")
            if stage._in_channels() != channels:
                raise Unsupported(f"{name}: takes {stage._in_channels()} channels, not {channels}")
            try:
                stage._add_to(builder)
            except Unsupported as error:
                raise Unsupported(f"{name}: {error}") from None
            channels = builder.channels
            if name in taps:
                builder.add_result()
        if features.conv.in_channels != channels:
            raise Unsupported(f"conv5: takes {features.conv.in_channels} channels, not {channels}")
        builder.add_head(features, self.fc)
