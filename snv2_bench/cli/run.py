"""``snv2 run``: the five likeliest classes of pictures, by a file of ``snv2 export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

import snv2_kernels
from snv2_bench.cli.classify import show_classes
from snv2_bench.cli.errors import InputError
from snv2_bench.cli.images import crop_pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from snv2_kernels import Program

__all__ = ["run"]

_MOST_RESIZE = 1 << 16


@click.command()
@click.argument("path", metavar="NET.snv2", type=click.Path(exists=True, dir_okay=False))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def run(path: str, images: tuple[str, ...]) -> None:
    """Show the five likeliest classes of each IMAGE by a network of `snv2 export`.

    Images are resized, cropped and normalised as the file says. The exit code is 1 if an image
    cannot be read or has no finite scores; the others are classified.
    """
    try:
        program = snv2_kernels.Program(path)
    except ValueError as error:
        raise InputError(str(error).removeprefix("path: ")) from None
    resize, crop = _sizes(program, path)
    classes = program.results[-1][0]
    names = program.classes or tuple(map(str, range(classes)))

    def scores(image: Image) -> Tensor:
        return cast("Tensor", program(crop_pixels(image, resize, crop)[None])[0])

    show_classes(images, scores, names)


def _sizes(program: Program, path: str) -> tuple[int, int]:
    """Pixels of the shorter side, and of the crop."""
    _, channels, height, width = program.input_shape
    if program.normalization is None or channels != 3:
        raise InputError(f"{path}: takes no pictures: it has no normalization of three channels")
    if not program.classifies or len(program.results) > 1:
        raise InputError(f"{path}: gives no scores alone")
    if height != width:
        raise InputError(f"{path}: takes {height} x {width} pixels, and pictures are cut square")
    resize = program.about.get("resize", round(height * 256 / 224))
    if not isinstance(resize, int) or not height <= resize <= _MOST_RESIZE:
        raise InputError(f"{path}: cannot resize to {resize!r} before cutting {height} pixels")
    return resize, height
