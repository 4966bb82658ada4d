"""The networks of the paper's Table 8, as plain PyTorch where torchvision lacks them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_bench.peers import Unavailable
from snv2_kernels import models

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MobileNetV1", "make_network", "torchvision_models"]

_GROUPS = 3  # of ShuffleNet v1, as the paper mainly used


def _conv_bn(inp: int, oup: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inp, oup, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(oup)]


class MobileNetV1(nn.Module):
    """Howard et al., *MobileNets*, 2017 (arXiv:1704.04861), Table 1.

    Args:
        width: multiplier of all channels.
        num_classes: outputs of the linear layer.

    Shapes: [N, 3, H, W] -> [N, num_classes].
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * width)
        layers = [*_conv_bn(3, channels, 3, 2), nn.ReLU(inplace=True)]
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
        plan += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        for full, stride in plan:
            out = int(full * width)
            layers += [*_conv_bn(channels, channels, 3, stride, channels), nn.ReLU(inplace=True)]
            layers += [*_conv_bn(channels, out, 1), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).mean([2, 3]))
        return out


_torchvision_ops: list[torch.library.Library] = []  # one that is collected takes its ops along


def torchvision_models() -> Any:
    """``torchvision.models``.

    A CPU build of torch beside PyPI's torchvision lacks the operators that torchvision's binary
    would define, and its import fails for their absence. The models need none of them.

    Raises:
        Unavailable: if torchvision is not there.
    """
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise Unavailable(f"torchvision cannot be imported: {error}") from None
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.append(library)
    return importlib.import_module("torchvision.models")


def _mobilenet_v2(width: float) -> nn.Module:
    network: nn.Module = torchvision_models().mobilenet_v2(width_mult=width)
    return network


_SHUFFLENET_V2 = {
    0.5: models.shufflenet_v2_x0_5,
    1.0: models.shufflenet_v2_x1_0,
    1.5: models.shufflenet_v2_x1_5,
    2.0: models.shufflenet_v2_x2_0,
}
_MAKERS: dict[str, Callable[[float], nn.Module]] = {
    "ShuffleNet v2": lambda width: _SHUFFLENET_V2[width](),
    "MobileNet v1": MobileNetV1,
    "MobileNet v2": _mobilenet_v2,
    "ShuffleNet v1": lambda width: models.shufflenet_v1(_GROUPS, width),
}


def make_network(model: str, size: str) -> nn.Module:
    """A network of Table 8 by its names in :data:`~snv2_bench.guidelines.paper.TABLE8`.

    Raises:
        Unavailable: if it needs torchvision, which is not there.
    """
    return _MAKERS[model](float(size.removesuffix("x")))
