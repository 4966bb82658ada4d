"""Networks, their launches and ops on a GPU; steps of ``gpu_batch.py``.

    python benchmarks/gpu_measure.py networks --batch 8 --dtype fp16 --json networks.json
    python benchmarks/gpu_measure.py launches --batch 1 --json launches.json
    python benchmarks/gpu_measure.py ops --json ops.json

With ``--device cpu`` and ``SNV2_BACKEND=cuda-emulated`` they run where there is no GPU, to be
tested: what they measure there means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import click
import torch
from torch import Tensor

import snv2_kernels as snv2
from snv2_bench.benchmarking import Turns
from snv2_bench.cli.common import DTYPES, FORMATS, WIDTHS, output
from snv2_bench.cli.files import write_result
from snv2_bench.cli.results import new_result, rows_of, table_of
from snv2_bench.cli.rule import upper_bound
from snv2_bench.cli.summary import label_of
from snv2_bench.floor import multiply_adds
from snv2_bench.guidelines.units import STAGES
from snv2_bench.peers import GPU_PEERS
from snv2_kernels.runners import Launch
from snv2_kernels.testing import float64_reference, max_error, randomize_

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Result


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 is multiplied as such, and cuDNN measures its kernels."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def _least_seconds(call: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """Of several calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    times = []
    for _ in range(tries):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _floor(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """What bounds the times: matrix products and copies by PyTorch."""
    side, size = (128, 1 << 16) if small else (8192, 1 << 30)
    a = torch.randn(side, side, device=device).to(dtype)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    out = torch.empty_like(a)
    product = _least_seconds(lambda: torch.mm(a, a, out=out), device)
    copy = _least_seconds(lambda: target.copy_(source), device)
    return {
        "threads": torch.get_num_threads(),
        "element": str(dtype).removeprefix("torch."),
        "multiply_adds_per_s": side**3 / product,
        "copy_bytes_per_s": 2 * size / copy,
    }


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter(f"{name}: there is no GPU", param_hint="--device")
    return device


def _result(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    result = new_result(settings)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated GPU"
    result["machine"]["device"] = name
    result["versions"] |= _gpu_versions()
    return result


def _gpu_versions() -> dict[str, str]:
    """Versions of CUDA, Triton and the driver, as far as they are there."""
    found = {"cuda": torch.version.cuda}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["driver"] = shown.partition("\n")[0].strip()
    return {name: version for name, version in found.items() if version}


def _measure(turns: Turns, repeats: int) -> bool:
    """Prepare and time all, until Ctrl-C; whether it came."""
    try:
        for name in turns.rows:
            turns.prepare(name)
        for _ in range(repeats):
            turns.time_round()
    except KeyboardInterrupt:
        return True
    return False


def _finish(result: dict[str, Any], path: str | None) -> None:
    if path is not None:
        write_result(cast("Result", result), path)
    if result["interrupted"]:
        sys.exit(130)


_OPTIONS = [
    click.option("--device", default="cuda", show_default=True),
    click.option("--dtype", default="fp16", show_default=True, type=click.Choice(list(DTYPES))),
    click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1)),
    click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=1)),
    click.option("--json", "path", type=click.Path(dir_okay=False, writable=True)),
]


def _options(*options: Any) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group()
def main() -> None:
    """Measure on a GPU."""


_MODEL_OPTIONS = [
    click.option("--width", default="x1.0", show_default=True, type=click.Choice(list(WIDTHS))),
    click.option("--size", default=224, show_default=True, type=click.IntRange(min=1)),
    click.option(
        "--stages",
        default=0,
        type=click.IntRange(0, 2),
        help="1 or 2: units in one launch, where that is expected to be faster, or where they fit.",
    ),
]


def _model(
    width: str, batch: int, size: int, device: torch.device, dtype: torch.dtype, stages: int
) -> tuple[torch.nn.Module, Tensor]:
    """A network with random weights and norms, and its input; its kernels are tuned as asked."""
    kernels = torch.ops.snv2 if device.type == "cuda" else torch.ops.snv2_emulated
    kernels.gpu_tune(stages=stages)
    model = randomize_(WIDTHS[width]().eval()).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(batch, 3, size, size, generator=generator).to(device, dtype)


@main.command()
@_options(*_OPTIONS, *_MODEL_OPTIONS)
@click.option(
    "--peer", "peers", multiple=True, default=list(GPU_PEERS), type=click.Choice(list(GPU_PEERS))
)
def networks(
    device: str,
    dtype: str,
    batch: int,
    repeats: int,
    path: str | None,
    width: str,
    size: int,
    stages: int,
    peers: tuple[str, ...],
) -> None:
    """A network in every way to run it on a GPU; rows as those of ``snv2 bench``."""
    where, element = _device(device), DTYPES[dtype]
    settings = {
        "widths": [width], "batches": [batch], "dtypes": [dtype], "peers": peers, "size": size,
        "threads": [torch.get_num_threads()], "repeats": repeats, "device": device,
        "stages": stages,
    }  # fmt: skip
    result = _result(where, settings)
    floor = _floor(where, element, small=where.type == "cpu")
    result["floor"] = [floor]
    model, x = _model(width, batch, size, where, element, stages)
    bound = upper_bound("network", element)
    exact = functools.cache(lambda: float64_reference(model)(x))
    turns = Turns(where)
    for peer in peers:
        turns.add(peer, functools.partial(GPU_PEERS[peer], model, x), exact, bound)
    with _exact_products():
        result["interrupted"] = _measure(turns, repeats)
    least_ms = multiply_adds(WIDTHS[width]().eval(), x) / floor["multiply_adds_per_s"] * 1e3
    case = (width, batch, dtype, torch.get_num_threads())
    result["rows"] = rows_of(turns.rows.values(), case, bound, least_ms)
    output().print(table_of(result["rows"], label_of(case)))
    _finish(result, path)


# Launches -------------------------------------------------------------------------------------


def sequence_of(kernels: Sequence[Launch]) -> list[Launch]:
    """Kernels of a call in the order in which they are launched: the steps of each chunk of the
    batch, then the linear layer, once."""
    *steps, linear = kernels
    return [*steps * max(kernel.launches for kernel in kernels), linear]


def launch_rows(
    sequence: Sequence[Launch], events: Sequence[tuple[str, float, float]]
) -> list[dict[str, Any]]:
    """A row for each launch of a call: medians over the calls.

    Kernels of a graph may start before the one before has ended, and wait inside; so ``adds_us``,
    from that one's end to this one's, says what a launch takes of a call's time.

    Args:
        sequence: of one call.
        events: name, start and end in microseconds of each kernel of several calls, in order.

    Raises:
        ValueError: if these are no whole calls.
    """
    if not events or len(events) % len(sequence):
        raise ValueError(f"{len(events)} kernels were seen, expected {len(sequence)} in each call")
    calls = [events[i : i + len(sequence)] for i in range(0, len(events), len(sequence))]
    rows = []
    for i, launch in enumerate(sequence):
        seen = [call[i] for call in calls]
        before = [call[i - 1][2] if i else call[0][1] for call in calls]
        share = {
            key: getattr(launch, key) // launch.launches
            for key in ("read_bytes", "written_bytes", "weight_bytes", "multiply_adds")
        }
        rows.append(
            {
                "step": launch.step, "kernel": launch.kernel, "symbol": seen[0][0],
                "us": statistics.median(end - start for _, start, end in seen),
                "adds_us": statistics.median(
                    end - last for (_, _, end), last in zip(seen, before, strict=True)
                ),
                "ctas": launch.ctas, "threads": launch.threads, "cluster": launch.cluster,
                "shared_bytes": launch.shared_bytes, **share,
            }
        )  # fmt: skip
    return rows


def _kernels_of(call: Callable[[], object], calls: int) -> list[tuple[str, float, float]]:
    """Name, start and end of each of our kernels in several calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()]
    return sorted((span for span in spans if "snv2" in span[0]), key=lambda span: span[1])


@main.command()
@_options(*_OPTIONS, *_MODEL_OPTIONS)
@click.option(
    "--once", is_flag=True, help="One call without a graph between cudaProfilerStart and Stop."
)
def launches(
    device: str,
    dtype: str,
    batch: int,
    repeats: int,
    path: str | None,
    width: str,
    size: int,
    stages: int,
    once: bool,
) -> None:
    """Each launch of an engine: its time, what it moves and multiplies."""
    where, element = _device(device), DTYPES[dtype]
    result = _result(
        where,
        {
            "width": width,
            "batch": batch,
            "dtype": dtype,
            "size": size,
            "repeats": repeats,
            "stages": stages,
        },
    )
    model, x = _model(width, batch, size, where, element, stages)
    engine = snv2.Engine(model, tuple(x.shape))
    call = functools.partial(snv2.fuse(model), x) if once else lambda: engine(engine.input)
    engine.input.copy_(x)
    with torch.inference_mode():
        error, bound = (
            max_error(call(), float64_reference(model)(x)),
            upper_bound("network", element),
        )
        result |= {"error": error, "error_bound": bound, "launches": []}
        if not error <= bound:
            result["reason"] = f"wrong output: error {error:.1e}, allowed {bound:.1e}"
        elif where.type != "cuda":
            result["reason"] = "launches are timed on a GPU"
            call()
        elif once:
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                call()
                torch.cuda.synchronize()
        else:
            _kernels_of(call, 3)
            sequence = sequence_of(engine.report().kernels)
            result["launches"] = launch_rows(sequence, _kernels_of(call, repeats))
    for row in result["launches"]:
        print(f"{row['step']:3} {row['kernel']:20} {row['us']:8.2f} us, adds {row['adds_us']:8.2f}")
    print(result.get("reason") or f"error {error:.1e}, allowed {bound:.1e}\n\n{engine.report()}")
    _finish(result, path)
    if not error <= bound:
        sys.exit(1)


# Ops ------------------------------------------------------------------------------------------


def _op_arguments(x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Of each op on a map."""
    channels = x.shape[1]

    def depthwise(count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(count)
        shapes = ((count, 1, 3, 3), (count,), (count,))
        return [torch.randn(s, generator=generator).to(x.device, x.dtype) / 3 for s in shapes]

    a, b = (half.clone() for half in x.chunk(2, 1))
    return {
        "cat_shuffle": (a, b),
        "split_dw_cat_shuffle": (x, *depthwise(channels // 2)),
        "dw_conv3x3": (x, *depthwise(channels)),
    }


@main.command()
@_options(*_OPTIONS)
@click.option("--quick", is_flag=True, help="Only stage 4, contiguous.")
def ops(device: str, dtype: str, batch: int, repeats: int, path: str | None, quick: bool) -> None:
    """The ops on maps of x1.0: bytes a second, and their share of a copy's.

    Each reads and writes its map once, so the least it moves is twice the map. Maps that fit in
    the L2 cache may beat a copy of 1 GiB.
    """
    where, element = _device(device), DTYPES[dtype]
    result = _result(where, {"batch": batch, "dtype": dtype, "repeats": repeats, "device": device})
    floor = _floor(where, element, small=where.type == "cpu")
    result["floor"], result["ops"] = [floor], []
    cases = itertools.product(
        list(STAGES)[-1 if quick else 0 :], list(FORMATS)[: 1 if quick else 2]
    )
    for stage, layout in cases:
        channels, extent = STAGES[stage]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, channels, extent, extent, generator=generator)
        x = x.to(where, element).contiguous(memory_format=FORMATS[layout])
        turns = Turns(where)
        for name, arguments in _op_arguments(x).items():
            op = functools.partial(getattr(snv2.ops, name), *arguments)
            exact = functools.partial(
                getattr(snv2.ops, name), *(t.double() for t in arguments), backend="reference"
            )
            # PyTorch rounds after each step, the kernels once.
            for peer, kind in (("eager", "unit"), ("fused", "op")):
                call = functools.partial(op, backend="reference" if peer == "eager" else None)
                build = functools.partial(lambda call: call, call)
                turns.add(f"{name}, {peer}", build, exact, upper_bound(kind, element))
        result["interrupted"] = _measure(turns, repeats)
        moved = 2 * x.numel() * x.element_size()
        for key, m in turns.rows.items():
            name, _, peer = key.partition(", ")
            per_s = moved / (m.median / 1e3) if m.median else None
            result["ops"].append(
                {
                    "op": name, "stage": stage, "batch": batch, "dtype": dtype, "format": layout,
                    "peer": peer, "error": m.error, "reason": m.reason, "samples": len(m.samples),
                    "median_ms": m.median, "percentiles_ms": m.percentiles(),
                    "least_bytes": moved, "bytes_per_s": per_s,
                    "copy_share": per_s / floor["copy_bytes_per_s"] if per_s else None,
                }
            )  # fmt: skip
        if result["interrupted"]:
            break
    for row in result["ops"]:
        speed = f"{row['bytes_per_s'] / 1e9:.0f} GB/s" if row["bytes_per_s"] else row["reason"]
        print(row["op"], row["stage"], row["format"], row["peer"], speed, sep=", ")
    _finish(result, path)


if __name__ == "__main__":
    main()
