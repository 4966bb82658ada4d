"""Networks with weights from a file."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

import snv2_kernels
from snv2_bench.cli.errors import InputError
from snv2_kernels.models import InvertedResidual, MegviiUnit, load
from snv2_kernels.models.blocks import WIDTHS as CHANNELS
from snv2_kernels.models.loading import from_state

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PUBLISHED", "WeightsError", "load_model", "published_model", "width_of"]

# torchvision's ImageNet weights.
_SITE = "https://download.pytorch.org/models"
PUBLISHED = {
    "x0.5": f"{_SITE}/shufflenetv2_x0.5-f707e7126e.pth",
    "x1.0": f"{_SITE}/shufflenetv2_x1-5666bf0f80.pth",
    "x1.5": f"{_SITE}/shufflenetv2_x1_5-3c479a10.pth",
    "x2.0": f"{_SITE}/shufflenetv2_x2_0-8be3c8ee.pth",
}


class WeightsError(InputError):
    """Weights cannot be had or do not fit."""


def published_model(width: str) -> nn.Module:
    """A network with torchvision's weights for ImageNet, downloaded into torch.hub's cache on first
    use.

    Raises:
        WeightsError: if they are neither in the cache nor to be had.
    """
    url = PUBLISHED[width]
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:  # URLError and its kind
        reason = f"cannot download {url}: {getattr(error, 'reason', error)}"
        raise WeightsError(f"{reason}; give a file with --weights") from error
    except Exception as error:  # a wrong hash, or unpickling a damaged file
        cached = f"{torch.hub.get_dir()}/checkpoints/{url.rpartition('/')[2]}"
        raise WeightsError(f"{url}: damaged; delete {cached}, if there, and try again") from error
    return from_state(state, url)


def load_model(path: str, width: str | None = None) -> nn.Module:
    """The network of a file of weights, in ``eval()`` mode.

    Args:
        path: a file that :func:`snv2_kernels.models.load` takes, or for names that end with
            ``.onnx`` :func:`snv2_kernels.load_onnx`.
        width: the width that it should have, if one.

    Raises:
        WeightsError: if the file cannot be read, its keys or shapes do not fit, or it holds NaN or
            infinity.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are then refused
            model = snv2_kernels.load_onnx(path) if path.endswith(".onnx") else load(path)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    except (ValueError, ImportError) as error:
        raise WeightsError(str(error)) from error
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} holds NaN or infinity")
    found = width_of(model)
    if width not in (None, found):
        what = f"it fits --width {found}" if found else f"it fits a {type(model).__name__} alone"
        raise WeightsError(f"{path}: does not fit width {width}; {what}")
    return model


def width_of(model: nn.Module) -> str | None:
    """The key of :data:`PUBLISHED` for a network in torchvision's or the authors' form, None for
    other widths and relatives."""
    channels = getattr(model, "_stage_out_channels", None)
    units = sum(type(module) in (InvertedResidual, MegviiUnit) for module in model.modules())
    size = next((size for size, widths in CHANNELS.items() if widths == channels), None)
    return f"x{size[:-1]}" if size is not None and units == 16 else None
