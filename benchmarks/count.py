"""Counts what docs/arithmetic.md starts from, and writes benchmarks/arithmetic.json.

``make arithmetic`` builds what this takes and runs it: the interpreter of PTX (docs/ptx.md), which
counts the instructions that each launch executes, and the CUDA library for sm_90, whose loops
sass.py reads. It needs nvcc and cuobjdump, no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sass
import sass_path
import torch
from arithmetic import (
    BATCHES,
    CASES,
    CUT,
    DATA,
    GPUS,
    SIZE,
    WHERE_THEY_FIT,
    WIDTHS,
    Case,
    Gpu,
    chunk_of,
    launches_of,
    plan_of,
    stages_of,
)

from snv2_kernels.libraries import library
from snv2_kernels.ops import run_plan

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "python_tests"))
from _ptx import NAME, PTX, operators  # noqa: E402

Row = dict[str, Any]

# Batches from which on one CTA in eleven is run and the others are counted as that one. No grid of
# tiles has eleven as a factor.
MANY_IMAGES = 64
APART = 11


def counts_of(call: Callable[[], object], apart: int = 1) -> Row:
    """Returns kernels and executed instructions of the launches of a call; of CTAs that are
    ``apart`` from each other, as if all were like them."""
    operators().reset_counts()
    operators().sample(apart)
    try:
        call()
    finally:
        operators().sample(1)
    names, instructions = operators().launch_counts()
    symbols = [line.split(" ")[0] for line in names.splitlines()]
    return {"kernels": sass.short_names(symbols), "instructions": instructions}


def set_gpu(gpu: Gpu) -> None:
    device = gpu.device
    operators().set_device_size(
        device["sms"], device["shared_per_sm"], device["shared_per_cta"], device["cluster"] > 1
    )


def count_network(width: str, images: int, gpu: Gpu, apart: int = 1) -> Row:
    """Returns a row of what a network executes on images that are one chunk."""
    x = torch.zeros(images, 3, SIZE, SIZE, dtype=torch.float16)
    set_gpu(gpu)
    try:
        counts = counts_of(lambda: run_plan(x, plan_of(width), NAME), apart)
    finally:
        set_gpu(GPUS[0])
    return {"gpu": gpu.name, "width": width, "images": images, **counts}


def count_networks() -> list[Row]:
    rows = []
    for gpu in GPUS:
        for width in WIDTHS:
            for batch in BATCHES:
                launches = launches_of(plan_of(width).words, batch, SIZE, SIZE, gpu.device)
                apart = APART if batch >= MANY_IMAGES else 1
                row = count_network(width, chunk_of(launches, batch), gpu, apart)
                rows.append({**row, **{key: [i[key] for i in launches] for key in CUT}})
                print(gpu.name, width, batch, sum(rows[-1]["instructions"]), file=sys.stderr)
    return rows


def count_case(case: Case) -> Row:
    """Returns a row of what an op or a unit alone executes."""
    x, channels = case.input(), case.channels // 2
    if case.what == "unit":
        counts = counts_of(lambda: run_plan(x, case.unit_plan(), NAME), APART)
    else:
        shapes = (channels, 1, 3, 3), (channels,), (channels,)
        parameters = [torch.ones(shape) for shape in shapes]
        counts = counts_of(lambda: operators().split_dw_cat_shuffle(x, *parameters))
    return {"case": vars(case), **counts}


def count_stages() -> list[Row]:
    """Returns a row of each network whose units fit into one launch: what its launches execute on
    an image, and the cycles of the one of the units by sass_path.py."""
    rows = []
    for width in WIDTHS:
        kinds = [launch["kernel"] for launch in stages_of(width, 1, GPUS[0])]
        if "stages" not in kinds:
            continue
        operators().gpu_tune(stages=WHERE_THEY_FIT)
        try:
            row = count_network(width, 1, GPUS[0])
        finally:
            operators().gpu_tune()
        cycles = sum(phase.cycles for phase in sass_path.phases_of_stages(width))
        rows.append({**row, "launches": kinds, "cycles": cycles})
    return rows


def nvcc_version() -> str:
    """Returns the version of the nvcc that the build takes."""
    toolkit = [sys.executable, str(ROOT / "cmake/cuda_toolkit.py")]
    found = subprocess.run(toolkit, capture_output=True, text=True, check=True)
    command = [found.stdout.splitlines()[0], "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.split(" V")[1].split()[0]


def write() -> None:
    tables = {
        "loops": [vars(row) for row in sass.rows_of_library(library("cuda"))],
        "ops": [count_case(case) for case in CASES],
        "networks": count_networks(),
        "stages": count_stages(),
    }
    parts = [f'"nvcc": {json.dumps(nvcc_version())}']
    for name, rows in tables.items():
        parts.append(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]")
    DATA.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    if not PTX:
        sys.exit("there is no interpreter of PTX: make arithmetic builds it, and runs this")
    write()
