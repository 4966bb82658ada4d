"""Pictures as the input of a network: torchvision's preprocessing, on pillow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

__all__ = ["ImageError", "authors_pixels", "preprocess", "read_image", "sample_path"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ImageError(Exception):
    """A picture cannot be read; the message says which and why."""


def read_image(path: str | Path) -> Image:
    """Read a picture as RGB; EXIF rotation is not applied, as in torchvision.

    Raises:
        ImageError: if pillow is missing, or cannot read the file.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImageError('images need pillow: pip install "snv2_kernels[cli]"') from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise ImageError(f"{path}: not a readable image ({type(error).__name__})") from error


def preprocess(image: Image, resize: int, crop: int) -> Tensor:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalise as for ImageNet.

    Args:
        image: an RGB picture.
        resize: pixels of the shorter side before the crop, at least ``crop``.
        crop: pixels of each side of the result.

    Returns:
        float32 [3, crop, crop].
    """
    x = _pixels(image, resize, crop) / 255
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def authors_pixels(image: Image, resize: int, crop: int) -> Tensor:
    """:func:`preprocess` as the authors' published weights want it: blue first, 0 to 255."""
    return _pixels(image, resize, crop).flip(0)


def _pixels(image: Image, resize: int, crop: int) -> Tensor:
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    # The longer side is rounded down and the crop's corner to even, as torchvision does.
    width, height = int(resize * width / short), int(resize * height / short)
    resized = image.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    pixels = np.array(resized.crop((left, top, left + crop, top + crop)))  # [crop, crop, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()


def sample_path() -> str:
    """The photograph that comes with matplotlib.

    Raises:
        ImageError: if matplotlib is missing, or came without its sample data.
    """
    try:
        from matplotlib.cbook import get_sample_data

        return str(get_sample_data("grace_hopper.jpg", asfileobj=False))
    except ImportError:
        raise ImageError(
            'the sample photograph is matplotlib\'s: pip install "snv2_kernels[bench]"'
        ) from None
