"""``snv2 classify``: the five likeliest ImageNet classes of pictures."""

from __future__ import annotations

import sys
from importlib import resources
from typing import TYPE_CHECKING, cast

import click
import torch
from rich.text import Text
from torch import nn

import snv2_kernels
from snv2_bench.cli.common import DEVICE, WIDTHS, output
from snv2_bench.cli.fitted import FittedTable
from snv2_bench.cli.images import (
    ImageError,
    authors_pixels,
    preprocess,
    read_image,
    unit_pixels,
)
from snv2_bench.cli.weights import WeightsError, load_model, published_model, width_of
from snv2_kernels.models import MegviiShuffleNetV2, ShuffleNetV2Plus
from snv2_kernels.onnx.model import OnnxModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "class_names",
    "classify",
    "resize_of",
    "scores_layer",
    "show_classes",
    "takes_authors_pixels",
]

_TOP = 5
_CROP = 224


def class_names(classes: int) -> list[str]:
    """ImageNet's names for its 1000 classes, for other numbers the indices."""
    names = resources.files(__package__).joinpath("imagenet_classes.txt").read_text().splitlines()
    return names if classes == len(names) else [str(index) for index in range(classes)]


def resize_of(width: str | None) -> int:
    """Pixels of the shorter side before the crop, as the published weights of a width want."""
    return 232 if width in ("x1.5", "x2.0") else 256


def takes_authors_pixels(model: nn.Module) -> bool:
    """True for networks whose published weights want blue first, 0 to 255."""
    return isinstance(model, MegviiShuffleNetV2 | ShuffleNetV2Plus)


def scores_layer(model: nn.Module, weights: str | None) -> nn.Linear:
    """The layer that makes a network's scores.

    Raises:
        WeightsError: if the network of these weights has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise WeightsError(f"{weights}: it has no linear layer, so no scores of classes")
    return layers[-1]


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False),
    help="Weights that snv2.models.load takes, of ShuffleNet V2 or a relative, or an ONNX file; by "
    "default torchvision's for ImageNet, which are downloaded on first use.",
)  # fmt: skip
@click.option(
    "--width", type=click.Choice(list(WIDTHS)),
    help="Width of the network; by default that of the weights, or x1.0.",
)  # fmt: skip
@DEVICE
def classify(
    images: tuple[str, ...], weights: str | None, width: str | None, device: torch.device
) -> None:
    """Show the five likeliest classes of each IMAGE.

    Images are resized, cropped and normalised as for torchvision's weights, for weights in the
    authors' layout as for theirs, and not normalised for an ONNX file that does it. The exit code
    is 1 if an image cannot be read or has no finite scores; the others are classified.
    """
    model = load_model(weights, width) if weights else published_model(width or "x1.0")
    fused = snv2_kernels.fuse(model.to(device))
    names = class_names(scores_layer(model, weights).out_features)
    resize = 256 if takes_authors_pixels(model) else resize_of(width_of(model))
    pixels, has_softmax = _pixels_of(model), _ends_with_softmax(model)

    def scores(image: Image) -> Tensor:
        found = cast("Tensor", fused(pixels(image, resize, _CROP)[None].to(device))[0])
        return found.log() if has_softmax else found

    show_classes(images, scores, names)


def _pixels_of(model: nn.Module) -> Callable[[Image, int, int], Tensor]:
    """How the input of a network is made of an image."""
    if takes_authors_pixels(model):
        return authors_pixels
    normalizes = isinstance(model, OnnxModel) and model.ends()[0] is not None
    return unit_pixels if normalizes else preprocess


def _ends_with_softmax(model: nn.Module) -> bool:
    tail = model.ends()[2] if isinstance(model, OnnxModel) else None
    return tail is not None and any(isinstance(m, nn.Softmax) for m in tail.modules())


def show_classes(
    images: tuple[str, ...], scores: Callable[[Image], Tensor], names: Sequence[str]
) -> None:
    """Show the likeliest classes of each picture; exits with 1 if one has none."""
    console = output()
    failed = False
    for path in images:
        try:
            image = read_image(path)
        except ImageError as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
            continue
        with torch.inference_mode():
            probabilities = scores(image).softmax(0)
        if not probabilities.isfinite().all():
            click.echo(f"Error: {path}: its scores are beyond what float32 holds", err=True)
            failed = True
            continue
        console.print(click.format_filename(path), soft_wrap=True)
        console.print(_table(probabilities, names))
    if failed:
        sys.exit(1)


def _table(probabilities: Tensor, names: Sequence[str]) -> FittedTable:
    table = FittedTable()
    table.add_texts("class")
    table.add_numbers("probability")
    top = probabilities.topk(min(_TOP, len(names)))
    for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        table.add_row(Text(names[index]), f"{probability:.2%}")
    return table
