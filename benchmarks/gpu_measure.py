"""Networks and ops on a GPU, beside other ways to run them on it; steps of ``gpu_batch.py``.

    python benchmarks/gpu_measure.py networks --batch 8 --dtype fp16 --json networks.json
    python benchmarks/gpu_measure.py ops --json ops.json

With ``--device cpu`` and ``SNV2_BACKEND=cuda-emulated`` they run where there is no GPU, to be
tested: what they measure there means nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels.benchmarking import Turns
from snv2_kernels.cli.common import DTYPES, FORMATS, WIDTHS, output
from snv2_kernels.cli.results import new_result, rows_of, table_of
from snv2_kernels.cli.rule import upper_bound
from snv2_kernels.cli.summary import label_of
from snv2_kernels.floor import multiply_adds
from snv2_kernels.guidelines.units import STAGES
from snv2_kernels.peers import GPU_PEERS
from snv2_kernels.testing import float64_reference, randomize_


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
    return result


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
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    if result["interrupted"]:
        sys.exit(130)


_OPTIONS = [
    click.option("--device", default="cuda", show_default=True),
    click.option("--dtype", default="fp16", show_default=True, type=click.Choice(list(DTYPES))),
    click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1)),
    click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=1)),
    click.option("--json", "path", type=click.Path(dir_okay=False, writable=True)),
]


def _options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """Measure on a GPU."""


@main.command()
@_options
@click.option("--width", default="x1.0", show_default=True, type=click.Choice(list(WIDTHS)))
@click.option("--size", default=224, show_default=True, type=click.IntRange(min=1))
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
    peers: tuple[str, ...],
) -> None:
    """A network in every way to run it on a GPU; rows as those of ``snv2 bench``."""
    where, element = _device(device), DTYPES[dtype]
    settings = {
        "widths": [width], "batches": [batch], "dtypes": [dtype], "peers": peers, "size": size,
        "threads": [torch.get_num_threads()], "repeats": repeats, "device": device,
    }  # fmt: skip
    result = _result(where, settings)
    floor = _floor(where, element, small=where.type == "cpu")
    result["floor"] = [floor]
    plain = randomize_(WIDTHS[width]().eval())
    model = copy.deepcopy(plain).to(where, element)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(where, element)
    bound = upper_bound("network", element)
    exact = functools.cache(lambda: float64_reference(model)(x))
    turns = Turns(where)
    for peer in peers:
        turns.add(peer, functools.partial(GPU_PEERS[peer], model, x), exact, bound)
    with _exact_products():
        result["interrupted"] = _measure(turns, repeats)
    least_ms = multiply_adds(plain, x) / floor["multiply_adds_per_s"] * 1e3
    case = (width, batch, dtype, torch.get_num_threads())
    result["rows"] = rows_of(turns.rows.values(), case, bound, least_ms)
    output().print(table_of(result["rows"], label_of(case)))
    _finish(result, path)


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
@_options
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
