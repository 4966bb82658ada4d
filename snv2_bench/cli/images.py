"""Pictures as the input of a network: torchvision's preprocessing, on pillow alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from snv2_bench.benchmarking import one_line
from snv2_bench.cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

__all__ = [
    "MEAN", "STD", "ImageError", "authors_pixels", "crop_pixels", "preprocess", "read_image",
    "sample_path", "unit_pixels",
]  # fmt: skip

# ImageNet's.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_MOST_PIXELS = 1 << 26  # of a resized picture that is made as a whole


class ImageError(InputError):
    """A picture cannot be read."""


def read_image(path: str | Path) -> Image:
    """Read a picture, of an animation the first one, as RGB; alpha is dropped and EXIF rotation not
    applied, as in torchvision.

    Raises:
        ImageError: if pillow is missing, or cannot read the file.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImageError('images need pillow: pip install "snv2_kernels[cli]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures, and alpha in palettes
            with Image.open(path) as image:
                return _rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image in a format that pillow reads") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise ImageError(f"{path}: not a readable image ({one_line(error)})") from error


def _rgb(image: Any) -> Image:
    from PIL import Image

    if 0 in image.size:
        raise ValueError("it has no pixels")
    # Pillow would cut 16 bits off at 255, and does not know the range of 32.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, expected 8 or 16")
    return image.convert("RGB")  # type: ignore[no-any-return]


def preprocess(image: Image, resize: int, crop: int) -> Tensor:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalise as for ImageNet.

    Args:
        image: an RGB picture.
        resize: pixels of the shorter side before the crop, at least ``crop``.
        crop: pixels of each side of the result.

    Returns:
        float32 [3, crop, crop].
    """
    x = unit_pixels(image, resize, crop)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def unit_pixels(image: Image, resize: int, crop: int) -> Tensor:
    """:func:`preprocess` for a network that normalises its input itself: from 0 to 1."""
    return _planes(image, resize, crop) / 255


def authors_pixels(image: Image, resize: int, crop: int) -> Tensor:
    """:func:`preprocess` as the authors' published weights want it: blue first, 0 to 255."""
    return _planes(image, resize, crop).flip(0)


def _planes(image: Image, resize: int, crop: int) -> Tensor:
    return crop_pixels(image, resize, crop).permute(2, 0, 1).contiguous().float()


def crop_pixels(image: Image, resize: int, crop: int) -> Tensor:
    """Resize the shorter side and crop the centre, as :func:`preprocess`: uint8 [crop, crop, 3]."""
    from PIL.Image import Resampling

    width, height = image.size
    short = min(width, height)
    # The longer side is rounded down and the crop's corner to even, as torchvision does.
    across, down = int(resize * width / short), int(resize * height / short)
    left, top = round((across - crop) / 2), round((down - crop) / 2)
    if across * down <= _MOST_PIXELS:
        resized = image.resize((across, down), Resampling.BILINEAR)
        cut = resized.crop((left, top, left + crop, top + crop))
    else:  # of a picture a pixel wide, too: the crop alone, with corners in single precision
        edges = (left * width / across, top * height / down,
                 min((left + crop) * width / across, width),
                 min((top + crop) * height / down, height))  # fmt: skip
        cut = image.resize((crop, crop), Resampling.BILINEAR, box=edges)
    return torch.from_numpy(np.array(cut))


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
