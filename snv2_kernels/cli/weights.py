"""Networks with weights from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snv2_kernels.cli.common import WIDTHS

if TYPE_CHECKING:
    from pathlib import Path

    from snv2_kernels.models import ShuffleNetV2

__all__ = ["PUBLISHED", "WeightsError", "load_model", "published_state", "read_state"]

# torchvision's ImageNet weights.
_SITE = "https://download.pytorch.org/models"
PUBLISHED = {
    "x0.5": f"{_SITE}/shufflenetv2_x0.5-f707e7126e.pth",
    "x1.0": f"{_SITE}/shufflenetv2_x1-5666bf0f80.pth",
    "x1.5": f"{_SITE}/shufflenetv2_x1_5-3c479a10.pth",
    "x2.0": f"{_SITE}/shufflenetv2_x2_0-8be3c8ee.pth",
}


class WeightsError(Exception):
    """Weights cannot be had or do not fit; the message says why, in one line."""


def read_state(path: str | Path) -> Any:
    """What is in a file that ``torch.save`` wrote; tensors only, no code is run.

    Raises:
        WeightsError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file raises anything, OSError too
                raise WeightsError(f"{path}: not a state_dict saved by torch.save") from error
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error


def published_state(width: str) -> Any:
    """torchvision's weights for ImageNet, downloaded into torch.hub's cache on first use.

    Raises:
        WeightsError: if they are neither in the cache nor to be had.
    """
    url = PUBLISHED[width]
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:  # URLError and its kind
        reason = f"cannot download {url}: {getattr(error, 'reason', error)}"
        raise WeightsError(f"{reason}; give a file with --weights") from error
    except Exception as error:  # a wrong hash, or unpickling a damaged file
        cached = f"{torch.hub.get_dir()}/checkpoints/{url.rpartition('/')[2]}"
        raise WeightsError(f"{url}: damaged; delete {cached}, if there, and try again") from error


def load_model(width: str, state: Any, source: str) -> ShuffleNetV2:
    """A network in ``eval()`` mode with weights, and as many classes as they have.

    Args:
        width: a key of :data:`~snv2_kernels.cli.common.WIDTHS`.
        state: the state_dict.
        source: where ``state`` came from, for messages.

    Raises:
        WeightsError: if keys or shapes do not fit.
    """
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"{source}: not a state_dict (names and tensors)")
    misfit = _misfit(width, state)
    if misfit is not None:
        others = [name for name in WIDTHS if _misfit(name, state) is None]
        hint = f"; it fits --width {others[0]}" if others else ""
        raise WeightsError(f"{source}: does not fit width {width}: {misfit}{hint}")
    model = WIDTHS[width](num_classes=state["fc.bias"].shape[0])
    model.load_state_dict(state, strict=False)
    return model.eval()


def _misfit(width: str, state: dict[str, Tensor]) -> str | None:
    """The first key or shape of a state_dict that does not fit, None if all do."""
    bias = state.get("fc.bias")
    classes = bias.shape[0] if bias is not None and bias.dim() == 1 else 1000
    with torch.device("meta"):
        expected = WIDTHS[width](num_classes=classes).state_dict()
    for name, tensor in expected.items():
        # Counters of batches play no part in inference, and older files lack them.
        if name not in state and not name.endswith("num_batches_tracked"):
            return f"{name} is missing"
        if name in state and state[name].shape != tensor.shape:
            return f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
    unexpected = next((name for name in state if name not in expected), None)
    return None if unexpected is None else f"{unexpected} is not a name of this network"
