"""The unit, a stage and the whole classifier as drop-in modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from snv2_kernels import models
from snv2_kernels.nn.derived import recognized_class
from snv2_kernels.nn.known import KnownModule
from snv2_kernels.nn.recognition import NotRecognized
from snv2_kernels.packing import Builder
from snv2_kernels.packing.units import IDENTITY, RELU, Activation, Layer, Unit, Unsupported

__all__ = [
    "InvertedResidual",
    "KnownNetwork",
    "KnownUnit",
    "ShuffleNetV2",
    "Stage",
    "drop_in_class",
]


_WINDOW = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


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
    padding, groups = kernel // 2, conv.in_channels if depthwise else 1
    expected = (kernel, kernel), (stride, stride), (padding, padding), (1, 1), groups, "zeros"
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    if (*found, conv.padding_mode) != expected:
        for attribute, value in zip(_WINDOW, expected, strict=True):
            if getattr(conv, attribute) != value:
                what = f"{attribute}={getattr(conv, attribute)!r}"
                raise Unsupported(f"{name}: {what}, not {value!r}")
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


class KnownUnit(KnownModule):
    """Drop-in for the unit, torchvision's or this package's."""

    class_kind = "unit"
    stride: int
    branch1: nn.Sequential
    branch2: nn.Sequential

    def _class_channels(self) -> int:
        first = self.branch2[0] if len(self.branch2) else None
        if not isinstance(first, nn.Conv2d):
            raise Unsupported(f"branch2.0: {type(first).__name__} is not a plain Conv2d")
        return first.in_channels * (2 if self.stride == 1 else 1)

    def _class_splits(self) -> bool:
        return self.stride == 1

    def _add_class(self, builder: Builder) -> None:
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


class InvertedResidual(KnownUnit, models.InvertedResidual):
    """The unit of :class:`snv2_kernels.models.InvertedResidual`, fused in ``eval()`` mode.

    The same constructor ``(inp, oup, stride)``, formula, submodules and state_dict keys; one op
    call, in logical channel order.
    """

    _original = models.InvertedResidual


class Stage(KnownModule, nn.Sequential):
    """A run of units, ``nn.Sequential(*units)``, in one op call: between its units the channel
    shuffle is a table, not a copy.

    Args:
        units: :class:`InvertedResidual` modules.

    Raises:
        TypeError: for anything else.
    """

    class_kind = "stage"
    _original = nn.Sequential

    def __init__(self, *units: InvertedResidual) -> None:
        for i, unit in enumerate(units):
            if not isinstance(unit, KnownUnit):
                raise TypeError(
                    f"units[{i}]: expected snv2_kernels.nn.InvertedResidual,"
                    f" got {type(unit).__name__}"
                )
        super().__init__(*units)

    def _units(self) -> list[KnownUnit]:
        units = [unit for unit in self if isinstance(unit, KnownUnit)]
        if len(units) != len(self) or not units:
            raise Unsupported("not all its modules are units")
        return units

    def _class_channels(self) -> int:
        return self._units()[0]._class_channels()

    def _class_splits(self) -> bool:
        return self._units()[0]._class_splits()

    def _add_class(self, builder: Builder) -> None:
        for i, unit in enumerate(self._units()):
            if unit._class_channels() != builder.channels:
                raise Unsupported(
                    f"unit {i} takes {unit._class_channels()} channels, not {builder.channels}"
                )
            try:
                unit._check_class()
                unit._add_class(builder)
            except Unsupported as error:
                raise Unsupported(f"unit {i}: {error}") from None


_STAGES = ("stage2", "stage3", "stage4")  # of the classifier


class KnownNetwork(KnownModule):
    """Drop-in for the classifier, torchvision's or this package's."""

    class_kind = "network"
    conv1: nn.Sequential
    maxpool: nn.MaxPool2d
    conv5: nn.Sequential
    fc: nn.Linear

    def _tap_names(self) -> tuple[str, ...]:
        return _STAGES if self.fits_class() else ()

    def _tell_class(self, builder: Builder, taps: Collection[str] = ()) -> None:
        self._check_class(calls_base=True)
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
        fc: Any = self.fc
        if type(fc) is nn.Identity:
            fc = None
        if fc is not None and (type(fc) is not nn.Linear or fc.in_features != features.channels):
            raise Unsupported(f"fc: {type(fc).__name__} is not the Linear of conv5's features")

        builder.add_stem(stem)
        channels = stem.channels
        for name in _STAGES:
            stage: nn.Module = getattr(self, name)
            if not isinstance(stage, Stage):
                raise Unsupported(f"{name}: not all its modules are units")
            if stage._class_channels() != channels:
                raise Unsupported(
                    f"{name}: takes {stage._class_channels()} channels, not {channels}"
                )
            try:
                stage._check_class()
                stage._add_class(builder)
            except Unsupported as error:
                raise Unsupported(f"{name}: {error}") from None
            channels = builder.channels
            if name in taps:
                builder.add_result()
        if features.conv.in_channels != channels:
            raise Unsupported(f"conv5: takes {features.conv.in_channels} channels, not {channels}")
        builder.add_head(features, fc)


class ShuffleNetV2(KnownNetwork, models.ShuffleNetV2):
    """The classifier of :class:`snv2_kernels.models.ShuffleNetV2`, from pixels to scores in one
    op call in ``eval()`` mode. The same constructor, submodules and state_dict keys."""

    _original = models.ShuffleNetV2

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        inverted_residual: Callable[..., nn.Module] = InvertedResidual,
    ) -> None:
        super().__init__(stages_repeats, stages_out_channels, num_classes, inverted_residual)
        for name in _STAGES:
            units: Any = list(getattr(self, name))
            if all(isinstance(unit, InvertedResidual) for unit in units):
                setattr(self, name, Stage(*units))


# Known classes --------------------------------------------------------------------------------

_BASES: dict[str, tuple[type[KnownModule], type[nn.Module]]] = {
    "InvertedResidual": (KnownUnit, InvertedResidual),
    "ShuffleNetV2": (KnownNetwork, ShuffleNetV2),
}


def drop_in_class(module: nn.Module) -> type[nn.Module]:
    """The class of the drop-in for a module whose class is known, the module's own for any other.

    A subclass is not known: its methods would be lost. torchvision is never imported: if it is not
    loaded, nothing is of its classes.
    """
    original = type(module)
    if original is nn.Sequential:
        units = [issubclass(drop_in_class(unit), KnownUnit) for unit in module.children()]
        return Stage if units and all(units) else original
    for name, (base, own) in _BASES.items():
        if original is getattr(models, name):
            return own
        if original is getattr(sys.modules.get("torchvision.models.shufflenetv2"), name, None):
            try:
                return recognized_class(original, (*vars(module), *module._modules), base)
            except NotRecognized:
                break
    return original
