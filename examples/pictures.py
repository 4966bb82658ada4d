"""Pictures for the examples, read as bytes or made, and the network that sees them.

`snv2_bench.cli.images` has torchvision's preprocessing to the pixel; this is the short form.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights
MOST_PIXELS = 1 << 26  # of one picture: a file of a few kilobytes may claim gigabytes of them


class DamagedPictureError(ValueError):
    """Bytes that are no picture, or not a whole one."""


def decode(data: bytes, size: int = SIZE) -> np.ndarray:
    """The middle of a picture as uint8 [size, size, 3], its shorter side first resized to size.

    Raises:
        DamagedPictureError: whatever is wrong with the bytes.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            warnings.simplefilter("ignore")
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            picture.draft("RGB", (size, size))  # JPEG decodes no more than is needed
            scale = size / min(picture.size)
            extent = tuple(max(size, round(scale * side)) for side in picture.size)
            resized = picture.convert("RGB").resize(extent, Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        text = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedPictureError(text or type(error).__name__) from None
    left, top = ((side - size) // 2 for side in extent)
    return np.array(resized.crop((left, top, left + size, top + size)))


def load_network(weights: str | None) -> torch.nn.Module:
    """The network of a file that snv2.models.load takes, or else x1.0 with random weights."""
    if weights is not None:
        return snv2.models.load(weights).eval()
    return randomize_(snv2.models.shufflenet_v2_x1_0()).eval()


def draw_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write pictures of coloured shapes, JPEG and PNG of several sizes, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        size = tuple(generator.integers(240, 480, 2).tolist())
        colours = generator.integers(0, 256, (5, 3)).tolist()
        picture = Image.new("RGB", size, tuple(colours[0]))
        pen = ImageDraw.Draw(picture)
        for colour in colours[1:]:
            x, y = (int(generator.integers(0, side - 60)) for side in size)
            across, down = generator.integers(30, 200, 2).tolist()
            shape = pen.ellipse if generator.random() < 0.5 else pen.rectangle
            shape((x, y, x + across, y + down), fill=tuple(colour))
        paths.append(folder / f"{number:04}.{'png' if number % 4 == 0 else 'jpg'}")
        picture.save(paths[-1])
    return paths
