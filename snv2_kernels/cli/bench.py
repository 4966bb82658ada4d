"""``snv2 bench``: the fused network beside other ways to run it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from snv2_kernels.benchmarking import Comparison, Turns
from snv2_kernels.cli.common import DTYPES, WIDTHS, output, progress
from snv2_kernels.cli.images import ImageError, preprocess, read_image, sample_path
from snv2_kernels.cli.plot import check_plot_path, plot
from snv2_kernels.cli.results import (
    layer_rows_of,
    layer_tables_of,
    new_result,
    rows_of,
    table_of,
)
from snv2_kernels.cli.rule import upper_bound
from snv2_kernels.cli.summary import label_of, summary_of, summary_table, versus_line
from snv2_kernels.cli.weights import WeightsError, load_model, read_state
from snv2_kernels.engine import Engine
from snv2_kernels.floor import measure_floor, multiply_adds
from snv2_kernels.layers import layer_times
from snv2_kernels.nn.network import plan_element
from snv2_kernels.peers import PEERS
from snv2_kernels.testing import randomize_

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from snv2_kernels.models import ShuffleNetV2

__all__ = ["bench"]

_INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def _output_file(
    context: click.Context, parameter: click.Parameter, path: str | None
) -> str | None:
    """A path that can be written, so that no run is lost for a mistyped one."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise click.BadParameter(f"{path}: no such directory")
    return path


def _plot_file(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    if path is not None:
        try:
            check_plot_path(path)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return _output_file(context, parameter, path)


def _images(image: str | None, size: int, batch: int) -> Tensor:
    """The input [batch, 3, size, size]: random, or a picture, each time a row further down."""
    if image is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, size, size, generator=generator)
    try:
        path = sample_path() if image == "sample" else image
        # The published preprocessing resizes to 256 for a crop of 224.
        picture = preprocess(read_image(path), resize=round(size * 256 / 224), crop=size)
    except ImageError as error:
        raise click.BadParameter(str(error), param_hint="--image") from None
    return torch.stack([picture.roll(rows, 1) for rows in range(batch)])


def _models(widths: tuple[str, ...], weights: str | None) -> dict[str, ShuffleNetV2]:
    if weights is None:
        return {width: randomize_(WIDTHS[width]().eval()) for width in widths}
    try:
        state = read_state(weights)
        return {width: load_model(width, state, weights) for width in widths}
    except WeightsError as error:
        raise click.BadParameter(str(error), param_hint="--weights") from None


def _measure(comparison: Turns, repeats: int, bar: Progress, label: str) -> None:
    """Prepare and time all peers."""
    task = bar.add_task(label, total=len(comparison.rows) + repeats)
    try:
        for peer in comparison.rows:
            bar.update(task, description=f"{label}: preparing {peer}")
            comparison.prepare(peer)
            bar.advance(task)
        bar.update(task, description=f"{label}: timing")
        for _ in range(repeats):
            comparison.time_round()
            bar.advance(task)
    finally:
        bar.remove_task(task)


def _several(name: str, choices: list[str], default: list[str], text: str) -> Any:
    """An option that may be given several times."""
    return click.option(
        f"--{name}", f"{name}s", multiple=True, default=default, show_default=True,
        type=click.Choice(choices), help=f"{text} May be repeated.",
    )  # fmt: skip


@click.command()
@_several("width", list(WIDTHS), ["x1.0"], "Width of the network.")
@click.option(
    "--batch", "batches", multiple=True, default=[1], show_default=True,
    type=click.IntRange(min=1), help="Images in a call. May be repeated.",
)  # fmt: skip
@_several("dtype", list(DTYPES), ["fp32"], "Type of weights and activations.")
@_several("peer", list(PEERS), list(PEERS), "A way to run the network.")
@click.option(
    "--size", default=224, show_default=True, type=click.IntRange(min=1),
    help="Height and width of the input.",
)  # fmt: skip
@click.option(
    "--threads", multiple=True, type=click.IntRange(min=1),
    help="Threads; by default as many as PyTorch uses. May be repeated.",
)  # fmt: skip
@click.option(
    "--repeats", default=30, show_default=True, type=click.IntRange(min=1),
    help="Timed calls of each peer.",
)  # fmt: skip
@click.option(
    "--image", metavar="PATH",
    help="Use this picture as the input, or with `sample` a photograph that comes with "
    "matplotlib; by default the input is random.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False),
    help="A state_dict saved by torch.save; by default weights are random.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Time each kernel of the engine on the CPU as well.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, writable=True), callback=_output_file,
    help="Write the results to this file.",
)  # fmt: skip
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, writable=True), callback=_plot_file,
    help="Draw the results into this file.",
)  # fmt: skip
def bench(
    widths: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    peers: tuple[str, ...],
    size: int,
    threads: tuple[int, ...],
    repeats: int,
    image: str | None,
    weights: str | None,
    layers: bool,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Time the fused network beside other ways to run it, taking turns.

    Every output is checked against float64 first. Each timed call follows one that is not timed,
    after the threads of the call before have stopped spinning. Peers are set for low latency; ncnn
    takes the images of a batch one by one. The peak is what the kernels' instruction set multiplies
    and adds in registers, in as many threads and in float32, or for bf16 in that where it can.
    Ctrl-C keeps what has been measured.
    """
    before = torch.get_num_threads()
    try:
        settings = {
            "widths": widths, "batches": batches, "dtypes": dtypes, "peers": peers, "size": size,
            "threads": threads or (before,), "repeats": repeats, "image": image,
            "weights": weights, "layers": layers,
        }  # fmt: skip
        result = _run(settings)
    finally:
        torch.set_num_threads(before)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    if plot_path is not None and result["rows"]:
        plot(result, plot_path)
    if result["interrupted"]:
        sys.exit(_INTERRUPTED)


def _run(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure every combination and print each as it is done, until Ctrl-C."""
    console = output()
    result = new_result(settings)
    size = settings["size"]
    images = _images(settings["image"], size, max(settings["batches"]))
    models = _models(settings["widths"], settings["weights"])
    names = (f"{name} {version}" for name, version in result["versions"].items())
    console.print(f"{result['machine']['cpu']}, {size} x {size}, {', '.join(names)}")
    # What each dtype is multiplied in.
    elements = {name: plan_element(DTYPES[name]) for name in settings["dtypes"]}
    floors = {
        (threads, element): measure_floor(threads, element)
        for threads in settings["threads"]
        for element in elements.values()
    }
    result["floor"] = [dataclasses.asdict(floor) for floor in floors.values()]
    for floor in floors.values():
        console.print(str(floor))
    keys = ("batches", "dtypes", "threads")
    try:
        with progress() as bar:
            for case in itertools.product(models, *(settings[key] for key in keys)):
                width, batch, dtype, threads = case
                torch.set_num_threads(threads)
                model = copy.deepcopy(models[width]).to(DTYPES[dtype])
                x = images[:batch].to(DTYPES[dtype])
                bound = upper_bound("network", DTYPES[dtype])
                comparison = Comparison(model, x, settings["peers"], bound)
                try:
                    _measure(comparison, settings["repeats"], bar, label_of(case))
                finally:
                    peak = floors[threads, elements[dtype]].multiply_adds_per_s
                    least_ms = multiply_adds(models[width], x) / peak * 1e3
                    rows = rows_of(comparison.rows.values(), case, bound, least_ms)
                    result["rows"] += rows
                    console.print()
                    console.print(table_of(rows, label_of(case)))
                    console.print(versus_line(rows) or "")
                if settings["layers"]:
                    engine = Engine(model, input_shape=(batch, 3, size, size))
                    layers, whole_ms = layer_times(engine, x, settings["repeats"])
                    rows = layer_rows_of(layers, whole_ms, case, peak)
                    result["layers"] += rows
                    for table in layer_tables_of(rows, label_of(case)):
                        console.print()
                        console.print(table)
    except KeyboardInterrupt:
        result["interrupted"] = True
        console.print("interrupted; what was measured is above", style="yellow")
    result["summary"] = summary_of(result["rows"])
    if len(result["summary"]["cases"]) > 1:
        console.print()
        console.print(summary_table(result["summary"]))
    return result
