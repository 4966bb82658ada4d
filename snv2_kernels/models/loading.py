"""Published weights into networks: which layout the keys have, and which widths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels.models.blocks import WIDTHS
from snv2_kernels.models.large import ShuffleNetV2Large
from snv2_kernels.models.megvii import MegviiShuffleNetV2
from snv2_kernels.models.plus import KERNELS, XCEPTION, ShuffleNetV2Plus
from snv2_kernels.models.shufflenetv2 import InvertedResidual, ShuffleNetV2
from snv2_kernels.models.star import StarUnit

__all__ = ["from_state", "load", "read_state"]


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """The network that weights belong to, with these weights, in ``eval()`` mode.

    The layout is told by the keys, the widths, units and classes by the shapes:

    - torchvision's (``stage2.0.branch1.0.weight``) and OpenMMLab's, of mmpretrain, mmcls and
      detectors' backbones with a classifier (``backbone.layers.0.0.branch1.0.conv.weight``, with or
      without ``backbone.``): :class:`ShuffleNetV2`; the two compute the same.
    - the authors' (``features.0.branch_main.0.weight``): :class:`MegviiShuffleNetV2`, and with
      squeeze-and-excite :class:`ShuffleNetV2Plus`.
    - this package's: :func:`shufflenet_v2_star`, :func:`shufflenet_v2_50` and
      :func:`se_shufflenet_v2_164`.

    Keys may begin with ``module.``, as ``DataParallel`` has them. A checkpoint may hold the weights
    under ``"state_dict"`` or ``"model"``. ``num_batches_tracked`` may be missing.

    Args:
        source: a state_dict or checkpoint, or the path of one that ``torch.save`` wrote, which is
            read as ``torch.load(path, weights_only=True)``, or of a ``.safetensors`` file.

    Returns:
        A module on the CPU in torch's default dtype, with parameters of its own.

    Raises:
        TypeError: if ``source`` is neither a mapping nor a path.
        OSError: if the file cannot be opened.
        ImportError: for a ``.safetensors`` file, if the package ``safetensors`` is missing.
        ValueError: if the file is none of these, if it or ``source`` is no state_dict, if
            the layout is unknown, or a key is missing, unexpected or of another shape than the
            widths ask for. The message names the key, what came and what was expected.
    """
    if isinstance(source, Mapping):
        return from_state(source, "source")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a mapping or a path, got {type(source).__name__}")
    return from_state(read_state(source), os.fspath(source))


def read_state(path: str | os.PathLike[str]) -> Any:
    """What is in a file that ``torch.save`` or safetensors wrote; tensors and plain data only, no
    code is run.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged, of another kind, or holds other objects.
        ImportError: if it takes the package ``safetensors``, which is missing.
    """
    with open(path, "rb") as file:
        if os.fspath(path).endswith(".safetensors"):
            return _safetensors(os.fspath(path))
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises anything, OSError too
            other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
            what = ""
            if other:  # such as a whole model
                saved = "torch.save(model.state_dict(), path)"
                what = f" (has {other[1]}, expected tensors and plain data; save them as {saved})"
            message = f"{os.fspath(path)}: not a state_dict saved by torch.save{what}"
            raise ValueError(message) from error


def _safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        how = 'pip install "snv2_kernels[safetensors]"'
        raise ImportError(f"{path}: needs the package safetensors: {how}") from error
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:  # a KeyError is of an unknown dtype
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def from_state(checkpoint: Any, source: str) -> nn.Module:
    """:func:`load` of what was read; ``source`` says where it came from, for messages."""
    try:
        state = _weights(checkpoint)
        layout = _layout(state)
        with torch.device("meta"):
            model = layout.build(_Shapes(state, layout.spell))
        weights = _checked(model, state, layout)
        model.to_empty(device="cpu").load_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (RuntimeError, OverflowError) as error:  # from torch, about sizes
        first, *_ = str(error).splitlines()
        raise ValueError(f"{source}: a network of such sizes cannot be made ({first})") from None
    return model.eval()


def _weights(checkpoint: Any) -> dict[str, Tensor]:
    """Names and tensors, out of what they are wrapped in."""
    if isinstance(checkpoint, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(checkpoint.get(key), Mapping):
                checkpoint = checkpoint[key]
                break
    if not (
        isinstance(checkpoint, Mapping)
        and checkpoint
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in checkpoint.items())
    ):
        raise ValueError("not a state_dict (names and tensors)")
    for name, tensor in checkpoint.items():
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else tensor.layout
        if kind is not torch.strided:
            raise ValueError(f"{name} is a {kind} tensor, expected a dense one with values")
    prefix = "module." if all(name.startswith("module.") for name in checkpoint) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()}


class _Shapes:
    """Sizes of tensors under the names that this package has for them."""

    def __init__(self, state: dict[str, Tensor], spell: Callable[[str], str]) -> None:
        self._state = state
        self._spell = spell

    def __contains__(self, name: str) -> bool:
        return self._spell(name) in self._state

    def size(self, name: str, dim: int = 0, dims: int = 4) -> int:
        key = self._spell(name)
        if key not in self._state:
            raise ValueError(f"{key} is missing")
        shape = tuple(self._state[key].shape)
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"{key} has shape {shape}, expected {dims} positive sizes")
        return shape[dim]

    def numbers(self, prefix: str) -> set[int]:
        """The numbers that follow ``prefix`` in names."""
        prefix = self._spell(prefix)
        words = {n[len(prefix) :].split(".")[0] for n in self._state if n.startswith(prefix)}
        return {int(word) for word in words if word.isdecimal()}

    def units(self, prefix: str) -> int:
        """How many units there are under ``prefix``, which are numbered from 0."""
        found = self.numbers(prefix)
        gap = next((i for i in range(len(found)) if i not in found), None)
        if gap is not None:
            raise ValueError(f"{self._spell(prefix)}{gap} is missing")
        return len(found)


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class _Layout:
    pattern: str  # what only its keys match
    build: Callable[[_Shapes], nn.Module]
    spell: Callable[[str], str] = field(default=_same)  # our name as this layout has it


def _layout(state: dict[str, Tensor]) -> _Layout:
    for layout in _LAYOUTS:
        if any(re.match(layout.pattern, name) for name in state):
            return layout
    raise ValueError(
        f"no known layout of ShuffleNet V2: has {next(iter(state))}, expected names like"
        " stage2.0.branch1.0.weight, features.0.branch_main.0.weight or"
        " backbone.layers.0.0.branch1.0.conv.weight"
    )


def _checked(model: nn.Module, state: dict[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    """The state under the model's own names."""
    rest = dict(state)
    weights = {}
    for name, expected in model.state_dict().items():
        key = layout.spell(name)
        if key in rest:
            weights[name] = rest.pop(key)
            shape = tuple(weights[name].shape)
            if shape != expected.shape:
                raise ValueError(f"{key} has shape {shape}, expected {tuple(expected.shape)}")
            dtype = weights[name].dtype
            if expected.is_floating_point() and not dtype.is_floating_point:
                raise ValueError(f"{key} has dtype {dtype}, expected floating point")
        elif name.endswith("num_batches_tracked"):
            # Counters play no part in inference, and older files lack them.
            weights[name] = torch.zeros_like(expected, device="cpu")
        else:
            raise ValueError(f"{key} is missing")
    if rest:
        raise ValueError(f"{next(iter(rest))} is not a name of this network")
    return weights


def _torchvision(
    shapes: _Shapes, last_pw: int = 5, unit: Callable[..., nn.Module] = InvertedResidual
) -> ShuffleNetV2:
    stages = ("stage2", "stage3", "stage4")
    widths = [2 * shapes.size(f"{s}.0.branch2.{last_pw}.weight") for s in stages]
    return ShuffleNetV2(
        [shapes.units(f"{s}.") for s in stages],
        [shapes.size("conv1.0.weight"), *widths, shapes.size("conv5.0.weight")],
        shapes.size("fc.weight", dims=2),
        unit,
    )


def _star(shapes: _Shapes) -> ShuffleNetV2:
    return _torchvision(shapes, 7, StarUnit)


def _large(shapes: _Shapes) -> ShuffleNetV2Large:
    stages = ("stage2", "stage3", "stage4", "stage5")
    widths = [2 * shapes.size(f"{s}.0.branch2.5.weight") for s in stages]
    convs = len(shapes.numbers("conv1.")) // 2  # each with its batch norm
    squeeze = "stage2.0.se.fc1.weight" in shapes
    return ShuffleNetV2Large(
        [shapes.size(f"conv1.{3 * i}.weight") for i in range(convs)],
        [shapes.units(f"{s}.") for s in stages],
        [*widths, shapes.size("conv6.0.weight")],
        shapes.size("fc.weight", dims=2),
        squeeze,
        residual=squeeze,
    )


def _authors_stages(
    shapes: _Shapes, stages: int, last_pw: Callable[[int], int]
) -> tuple[list[int], list[int], int]:
    """Repeats, channels and classes; each unit with a projection begins a stage."""
    repeats: list[int] = []
    channels = [shapes.size("first_conv.0.weight")]
    for i in range(shapes.units("features.")):
        if i == 0 or shapes.numbers(f"features.{i}.branch_proj."):
            projected = shapes.size(f"features.{i}.branch_proj.2.weight")
            main = shapes.size(f"features.{i}.branch_main.{last_pw(i)}.weight")
            repeats.append(0)
            channels.append(projected + main)
        repeats[-1] += 1
    if len(repeats) != stages:
        raise ValueError(f"branch_proj is in {len(repeats)} units of features, expected {stages}")
    channels.append(shapes.size("conv_last.0.weight"))
    return repeats, channels, shapes.size("classifier.0.weight", dims=2)


def _megvii(shapes: _Shapes) -> MegviiShuffleNetV2:
    repeats, channels, classes = _authors_stages(shapes, 3, lambda i: 5)
    dropout = 0.2 if channels == WIDTHS["2.0x"] else 0.0
    return MegviiShuffleNetV2(repeats, channels, classes, dropout)


def _plus(shapes: _Shapes) -> ShuffleNetV2Plus:
    def kind(i: int) -> int:
        first = f"features.{i}.branch_main.0.weight"
        if shapes.size(first, 1) == 1 and shapes.size(first, 2) == 3:
            return XCEPTION
        rows = shapes.size(f"features.{i}.branch_main.3.weight", 2)
        if rows not in KERNELS:
            key = f"features.{i}.branch_main.3.weight"
            raise ValueError(f"{key} has {rows} rows, expected one of {KERNELS}")
        return KERNELS.index(rows)

    architecture = [kind(i) for i in range(shapes.units("features."))]
    repeats, channels, classes = _authors_stages(
        shapes, 4, lambda i: 12 if architecture[i] == XCEPTION else 5
    )
    return ShuffleNetV2Plus(repeats, channels, architecture, classes)


# Layers of a branch: torchvision has one sequence of all, OpenMMLab a module of each convolution.
_BRANCHES = {
    "branch1": ("0.conv", "0.bn", "1.conv", "1.bn"),
    "branch2": ("0.conv", "0.bn", "", "1.conv", "1.bn", "2.conv", "2.bn"),
}
_ENDS = {
    "conv1.0.": "conv1.conv.",
    "conv1.1.": "conv1.bn.",
    "conv5.0.": "layers.3.conv.",
    "conv5.1.": "layers.3.bn.",
}


def _openmmlab_name(name: str, prefix: str = "") -> str:
    if name.startswith("fc."):
        return f"head.{name}"
    end = next((end for end in _ENDS if name.startswith(end)), None)
    if end is not None:
        return prefix + _ENDS[end] + name.removeprefix(end)
    parts = name.split(".")  # stage2, unit, branch, layer, tensor
    parts[0] = f"layers.{int(parts[0].removeprefix('stage')) - 2}"
    if len(parts) > 3:
        parts[3] = _BRANCHES[parts[2]][int(parts[3])]
    return prefix + ".".join(parts)


# The first whose pattern a key matches.
_LAYOUTS = (
    _Layout(r"LastSE\.|features\.\d+\.branch_main\.\d+\.SE_opr\.", _plus),
    _Layout(r"(first_conv|conv_last)\.|features\.\d+\.branch_", _megvii),
    _Layout(
        r"backbone\.(conv1\.(conv|bn)|layers\.\d+\.)",
        _torchvision,
        lambda name: _openmmlab_name(name, "backbone."),
    ),
    _Layout(r"conv1\.(conv|bn)\.|layers\.\d+\.\d+\.branch", _torchvision, _openmmlab_name),
    _Layout(r"stage5\.|conv6\.", _large),
    _Layout(r"stage\d\.\d+\.branch2\.8\.", _star),
    _Layout(r"stage\d\.\d+\.branch|conv5\.\d\.|conv1\.\d\.", _torchvision),
)
