"""``snv2 export``: a network as one file, for C++ and ``snv2 run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from torch import Tensor, nn

import snv2_kernels
from snv2_bench.cli.classify import (
    class_names,
    resize_of,
    scores_layer,
    takes_authors_pixels,
)
from snv2_bench.cli.common import AMOUNT, DTYPES, WIDTHS, output, output_file
from snv2_bench.cli.errors import InputError
from snv2_bench.cli.images import MEAN, STD, crop_pixels, read_image
from snv2_bench.cli.weights import load_model, published_model, width_of
from snv2_kernels.program import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["export"]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@click.command()
@click.argument("model", required=False, metavar="[MODEL]", type=click.Choice(list(WIDTHS)))
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False),
    help="Weights that snv2.models.load takes, or an ONNX file; by default torchvision's for "
    "ImageNet, which are downloaded on first use.",
)  # fmt: skip
@click.option(
    "-o", "--output", "path", required=True, type=click.Path(dir_okay=False),
    callback=output_file, help="The file to write.",
)  # fmt: skip
@click.option("--size", type=AMOUNT, default=224, show_default=True, help="Pixels of an image.")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(TARGETS),
    help="What to make plans for; the CPU's is always there.",
)  # fmt: skip
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)),
    help="Of maps that plans multiply; by default fp32.",
)  # fmt: skip
@click.option(
    "--int8", "samples", multiple=True, type=click.Path(exists=True),
    help="Write a plan in eight bits, for a CPU, calibrated on this image or the images of this "
    "folder.",
)  # fmt: skip
@click.option(
    "--classes", type=click.Path(exists=True, dir_okay=False),
    help="Names of the classes, one a line; by default ImageNet's where there are 1000.",
)  # fmt: skip
def export(
    model: str | None,
    weights: str | None,
    path: str,
    size: int,
    targets: Sequence[str],
    dtypes: Sequence[str],
    samples: Sequence[str],
    classes: str | None,
) -> None:
    """Write a network as one file, which C++ programs and `snv2 run` take.

    MODEL is a width; by default that of the weights, or x1.0. Images are normalised as for
    torchvision's weights; those for weights in the authors' layout are red first here, too.
    """
    network = load_model(weights, model) if weights else published_model(model or "x1.0")
    authors = takes_authors_pixels(network)
    if authors:
        _take_red_first(network)
    classes_of = scores_layer(network, weights).out_features
    resize = round((256 if authors else resize_of(width_of(network))) * size / 224)
    normalize = ((0, 0, 0), (1 / 255, 1 / 255, 1 / 255)) if authors else (MEAN, STD)
    try:
        if samples:
            batches = _batches(samples, resize, size, normalize)
            network = snv2_kernels.quantize(network, batches, normalize=normalize)
        snv2_kernels.save_program(
            network,
            path,
            (1, 3, size, size),
            targets=targets,
            dtypes=[DTYPES[dtype] for dtype in dtypes or ("fp32",)],
            normalize=normalize,
            classes=_read_names(classes) if classes else class_names(classes_of),
            about={"resize": resize},
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    console = output()
    console.print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    console.print(str(snv2_kernels.Program(path)))


def _batches(
    samples: Sequence[str], resize: int, size: int, normalize: tuple[Sequence[float], ...]
) -> Iterator[Tensor]:
    """Returns images for a calibration, as the network takes them."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in normalize)
    count = 0
    for path in _image_files(samples):
        pixels = crop_pixels(read_image(path), resize, size).permute(2, 0, 1).float()
        yield ((pixels / 255 - mean) / std)[None]
        count += 1
    if not count:
        raise InputError(f"--int8: no images in {', '.join(samples)}")


def _image_files(samples: Sequence[str]) -> Iterator[Path]:
    """Returns the files that are given, and those in folders whose names end as images' do."""
    for sample in map(Path, samples):
        if not sample.is_dir():
            yield sample
            continue
        yield from sorted(p for p in sample.rglob("*") if p.suffix.lower() in _SUFFIXES)


def _take_red_first(network: nn.Module) -> None:
    """Turn round the stem of a network that takes blue first."""
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    stem.weight.data = stem.weight.data.flip(1)


def _read_names(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not text in UTF-8") from None
