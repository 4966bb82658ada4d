"""``snv2 bench``: the fused network beside other ways to run it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Any, cast

import click
import torch

from snv2_bench.benchmarking import Comparison, one_line, wrong_output
from snv2_bench.cli.common import (
    AMOUNT,
    DEVICE,
    DTYPES,
    INTERRUPTED,
    LOAD,
    THREADS,
    WIDTHS,
    checked_peers,
    exact_products,
    measure,
    output,
    output_file,
    progress,
)  # fmt: skip
from snv2_bench.cli.compare import show_comparison
from snv2_bench.cli.files import write_result
from snv2_bench.cli.images import ImageError, preprocess, read_image, sample_path
from snv2_bench.cli.plot import check_plot_path, plot
from snv2_bench.cli.results import (
    layers_of,
    layers_tables_of,
    new_result,
    rows_of,
    startup_of,
    startup_table_of,
    table_of,
)
from snv2_bench.cli.rule import INT8_BOUND, upper_bound
from snv2_bench.cli.summary import label_of, summary_of, summary_table, versus_line
from snv2_bench.cli.weights import WeightsError, load_model, width_of
from snv2_bench.floor import least_bytes, measure_floor, multiply_adds
from snv2_bench.layers import layer_times
from snv2_bench.load import busy_processes
from snv2_bench.peers import GPU_PEERS, INT8_PEERS, PEERS, peers_of
from snv2_bench.startup import first_results
from snv2_kernels.engine import Engine
from snv2_kernels.nn.planned import plan_element
from snv2_kernels.testing import max_error, randomize_

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor, nn

    from snv2_bench.cli.schema import Floor as FloorRow
    from snv2_bench.cli.schema import Result
    from snv2_bench.floor import Floor

__all__ = ["bench"]

_INT8 = "int8"  # a float32 network and input, quantized by each peer after the same batches
_CALIBRATION_IMAGES = 32


def _plot_file(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    if path is not None:
        try:
            check_plot_path(path)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return output_file(context, parameter, path)


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


def _batches(x: Tensor, image: str | None) -> list[Tensor]:
    """Batches like the input, to quantize networks after: the same ones in every run.

    Random ones for a random input; for a picture, that picture, each time moved elsewhere.
    """
    generator = torch.Generator().manual_seed(1)
    count = max(1, _CALIBRATION_IMAGES // len(x))
    if image is None:
        return [torch.randn(x.shape, generator=generator) for _ in range(count)]
    moves = torch.randint(0, x.shape[-1], (count, 2), generator=generator).tolist()
    return [x.roll(move, (2, 3)) for move in moves]


def _element(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == _INT8 else DTYPES[dtype]


def _peers_in(dtype: str, settings: dict[str, Any]) -> list[str]:
    """Returns the peers of a case: of all only those that run in its dtype, of named ones each."""
    peers: list[str] = settings["peers"]
    if dtype == _INT8 and peers == list(PEERS):
        return list(INT8_PEERS)
    return peers


def _models(widths: tuple[str, ...], weights: str | None) -> dict[str, nn.Module]:
    if weights is None:
        return {width: randomize_(WIDTHS[width]().eval()) for width in widths or ("x1.0",)}
    try:
        models = [load_model(weights, width) for width in widths or (None,)]
        return {width_of(model) or type(model).__name__: model for model in models}
    except WeightsError as error:
        raise click.BadParameter(str(error), param_hint="--weights") from None


def _several(name: str, choices: list[str], default: list[str], text: str) -> Any:
    """An option that may be given several times."""
    return click.option(
        f"--{name}", f"{name}s", multiple=True, default=default, show_default=True,
        type=click.Choice(choices), help=f"{text} May be repeated.",
    )  # fmt: skip


@click.command()
@_several("width", list(WIDTHS), [], "Width of the network; by default the weights', or x1.0.")
@click.option(
    "--batch", "batches", multiple=True, default=[1], show_default=True,
    type=AMOUNT, help="Images in a call. May be repeated.",
)  # fmt: skip
@_several(
    "dtype", [*DTYPES, _INT8], ["fp32"],
    "Type of weights and activations; int8 on the CPU alone, quantized from fp32.",
)  # fmt: skip
@_several("peer", list(PEERS | GPU_PEERS), [], "A way to run the network; by default all.")
@DEVICE
@click.option(
    "--size", default=224, show_default=True, type=AMOUNT,
    help="Height and width of the input.",
)  # fmt: skip
@click.option(
    "--threads", multiple=True, type=THREADS,
    help="Threads on the CPU; by default as many as PyTorch uses. May be repeated.",
)  # fmt: skip
@click.option(
    "--repeats", default=30, show_default=True, type=AMOUNT,
    help="Timed calls of each peer.",
)  # fmt: skip
@click.option(
    "--load", default=0, show_default=True, type=LOAD, metavar="N",
    help="Keep N other processes busy meanwhile, each with one thread.",
)  # fmt: skip
@click.option(
    "--image", metavar="PATH",
    help="Use this picture as the input, or with `sample` a photograph that comes with "
    "matplotlib; by default the input is random.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False),
    help="Weights that snv2.models.load takes, of ShuffleNet V2 or a relative, or an ONNX file; by "
    "default random.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Time each kernel of the engine on the CPU as well.")
@click.option(
    "--startup", is_flag=True,
    help="Start each peer in processes of its own as well: time to the first result, and memory. "
    "Of x1.0, or the first width, with the first batch and dtype and the last number of threads.",
)  # fmt: skip
@click.option(
    "--compare", nargs=2, type=click.Path(exists=True, dir_okay=False), metavar="A.json B.json",
    help="Measure nothing; say how two results differ, as `snv2 compare` does.",
)  # fmt: skip
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, writable=True), callback=output_file,
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
    device: torch.device,
    size: int,
    threads: tuple[int, ...],
    repeats: int,
    load: int,
    image: str | None,
    weights: str | None,
    layers: bool,
    startup: bool,
    compare: tuple[str, str] | None,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Time the fused network beside other ways to run it, taking turns.

    Every output is checked against float64. For int8 each peer quantizes the network after the same
    batches of images; its error is the rms of the difference over that of the scores. Each timed
    call follows one that is not timed, after the threads of the call before have stopped spinning.
    Peers are set for low latency; ncnn takes the images of a batch one by one. The floor is the
    longer of two times: that of the multiply-adds at what the kernels' instruction set multiplies
    and adds in registers, in as many threads and in float32, or for bf16 in that where it can; and
    that of input and weights at the rate of copies in caches. Both rates are measured in the same
    run, before busy processes start. Ctrl-C keeps what has been measured.

    On a GPU a time is the mean of calls that follow each other, and there is no floor.
    """
    if compare is not None:
        show_comparison(*compare)
        return
    gpu = device.type == "cuda"
    if gpu and (layers or startup):
        option = "--layers" if layers else "--startup"
        raise click.BadParameter(f"measures on the CPU alone, not on {device}", param_hint=option)
    if gpu and _INT8 in dtypes:
        raise click.BadParameter(
            f"int8: runs on the CPU alone, not on {device}", param_hint="--dtype"
        )
    if startup and dtypes[0] == _INT8:
        raise click.BadParameter(
            "measures no int8, and that is the first dtype", param_hint="--startup"
        )
    before = torch.get_num_threads()
    try:
        settings = {
            "widths": widths, "batches": batches, "dtypes": dtypes,
            "peers": checked_peers(peers, device, list(peers_of(device))), "device": device,
            "size": size, "threads": (not gpu and threads) or (before,), "repeats": repeats,
            "load": load,
            "image": image, "weights": weights, "layers": layers, "startup": startup,
        }  # fmt: skip
        result = _run(settings, json_path)
    finally:
        torch.set_num_threads(before)
    if plot_path is not None and result["rows"]:
        plot(result, plot_path)
    if result["interrupted"]:
        sys.exit(INTERRUPTED)


def _run(settings: dict[str, Any], json_path: str | None) -> Result:
    """Measure every combination and print each as it is done, until Ctrl-C.

    The file has each case as soon as it is there, so that a run that is killed leaves it too.
    """
    console = output()
    models = _models(settings["widths"], settings["weights"])
    device: torch.device = settings["device"]
    result = new_result(settings | {"widths": tuple(models), "device": str(device)})
    images = _images(settings["image"], settings["size"], max(settings["batches"]))
    found = (f"{name} {version}" for name, version in result["versions"].items())
    size = settings["size"]
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else result["machine"]["cpu"]
    result["machine"]["device"] = where
    console.print(f"{where}, {size} x {size}, {', '.join(found)}")
    # What each dtype is multiplied in.
    names = [] if gpu else [name for name in settings["dtypes"] if name != _INT8]
    elements = {name: plan_element(DTYPES[name]) for name in names}
    floors = {
        (threads, name): measure_floor(threads, element)
        for threads in settings["threads"]
        for name, element in elements.items()
    }
    result["floor"] = [
        cast("FloorRow", dataclasses.asdict(floor)) for floor in dict.fromkeys(floors.values())
    ]
    for floor in dict.fromkeys(floors.values()):
        console.print(str(floor))
    result |= {"rows": [], "layers": [], "startup": [], "summary": summary_of([])}
    result["interrupted"] = True  # until it is not

    def save() -> None:
        result["summary"] = summary_of(result["rows"])
        if json_path is not None:
            write_result(result, json_path)

    keys = ("batches", "dtypes", "threads")
    load = settings["load"]
    if load > 0:
        console.print(f"under load: {_busy(load)}, on {result['machine']['usable_cores']} cores")
    try:
        with busy_processes(load), progress() as bar, exact_products(device):
            for case in itertools.product(models, *(settings[key] for key in keys)):
                width, batch, dtype, threads = case
                torch.set_num_threads(threads)
                model, x = models[width], images[:batch].to(device, _element(dtype))
                least = floors.get((threads, dtype))
                _time_case(result, case, model, x, least, settings, bar)
                save()
            if settings["startup"]:
                _start_peers(result, settings, bar)
        result["interrupted"] = False
    except KeyboardInterrupt:
        console.print("interrupted; what was measured is above", style="yellow")
    finally:
        save()
    if len(result["summary"]["cases"]) > 1:
        console.print()
        console.print(summary_table(result["summary"]))
    return result


def _busy(load: int) -> str:
    return f"{load} busy process{'es' if load > 1 else ''}"


def _time_case(
    result: Result, case: tuple[str, int, str, int], model: nn.Module, x: Tensor,
    floor: Floor | None, settings: dict[str, Any], bar: Progress,
) -> None:  # fmt: skip
    """Add one case to the result and print it, as far as it gets."""
    _, _, dtype, _ = case
    console = output()
    model = copy.deepcopy(model).to(x.device, _element(dtype))
    int8 = dtype == _INT8
    bound = INT8_BOUND if int8 else upper_bound("network", DTYPES[dtype])
    batches = _batches(x, settings["image"]) if int8 else None
    comparison = Comparison(model, x, _peers_in(dtype, settings), bound, batches)
    try:
        measure(comparison, settings["repeats"], bar, label_of(case))
    finally:
        work = multiply_adds(model, x), least_bytes(model, x)
        floor_ms = None if floor is None else floor.least_ms(*work)
        rows = rows_of(comparison.rows.values(), case, bound, floor_ms)
        result["rows"] += rows
        console.print()
        load = settings["load"]
        beside = f", beside {_busy(load)}" if load > 0 else ""
        console.print(table_of(rows, label_of(case) + beside))
        console.print(versus_line(rows) or "")
    if settings["layers"] and floor is not None:
        try:
            _time_layers(
                result, case, model, x, floor, settings["repeats"], comparison.exact, bound
            )
        except (RuntimeError, TypeError, ValueError) as error:  # no engine, or not on the CPU
            console.print(f"no times of layers: {one_line(error)}", style="yellow")


def _time_layers(
    result: Result, case: tuple[str, int, str, int], model: nn.Module, x: Tensor, floor: Floor,
    repeats: int, exact: Tensor, bound: float,
) -> None:  # fmt: skip
    """Add the layers of one case to the result and print them."""
    n, c, h, w = x.shape
    engine = Engine(model, input_shape=(n, c, h, w))
    wrong = wrong_output(max_error(engine(x), exact), bound)
    if wrong is not None:
        raise RuntimeError(wrong)
    layers, whole_ms = layer_times(engine, x, repeats)
    result["layers"].append(layers_of(layers, whole_ms, case, floor))
    for table in layers_tables_of(result["layers"][-1], label_of(case)):
        output().print()
        output().print(table)


def _start_peers(result: Result, settings: dict[str, Any], bar: Progress) -> None:
    """Add fresh processes of each peer to the result and print them, as far as it gets."""
    widths, peers = settings["widths"], settings["peers"]
    width = "x1.0" if "x1.0" in widths else widths[0]
    batch, dtype, threads = settings["batches"][0], settings["dtypes"][0], settings["threads"][-1]
    case = (width, batch, dtype, threads)
    task = bar.add_task("", total=len(peers))
    try:
        for peer in peers:
            bar.update(task, description=f"{label_of(case)}: starting {peer}")
            runs = first_results(
                peer, width, batch=batch, size=settings["size"], dtype=DTYPES[dtype],
                threads=threads,
            )  # fmt: skip
            result["startup"].append(startup_of(runs, peer, case))
            bar.advance(task)
    finally:
        bar.remove_task(task)
        if result["startup"]:
            console = output()
            console.print()
            console.print(startup_table_of(result["startup"], label_of(case)))
