"""Writes docs/arithmetic.md: how long networks and ops should take on GPUs, and why.

``make arithmetic`` counts what the page starts from (count.py), then writes it; after a change of
numbers in arithmetic.py alone, or of this text, ``python benchmarks/predict.py`` does. Nothing here
is measured.

``python benchmarks/predict.py --json FILE`` writes what units inside a stage move on the emulator
beside what they have to, for `snv2 report`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from arithmetic import (
    ALONE,
    BATCHES,
    CASES,
    GPUS,
    ISSUE,
    LATENCY,
    LAUNCH,
    OP_BATCH,
    OP_MAPS,
    SIZE,
    STAGES_BATCHES,
    WIDTHS,
    Gpu,
    Terms,
    data,
    estimate_over_count,
    launches_of,
    launches_with_terms,
    plan_of,
    predict,
    predict_case,
    predict_stages,
    unit_cost,
)

import snv2_kernels as snv2
from snv2_bench.cli.files import write_result
from snv2_bench.cli.results import new_result
from snv2_kernels import emulator
from snv2_kernels.testing import randomize_

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Counted

PAGE = Path(__file__).parents[1] / "docs" / "arithmetic.md"

INTRODUCTION = """# Arithmetic of the CUDA kernels

What the launches of whole networks and of the fused op execute, move and multiply, and how long
that should take. **Nothing on this page has been measured**: all times are predictions, and the
last column waits for a GPU. `make arithmetic` makes the page, with nvcc and without a GPU, from
the code that chooses tiles and launches kernels, from the instructions that nvcc's PTX executes
([ptx.md](ptx.md)) and from the loops that ptxas makes of it. A test says so when it is out of
date.

{summary}

## The model

Networks run in float16 at {size} x {size}, from one CUDA graph. Each launch takes {launch:.1f} us
from one kernel of the graph to the next, and then as long as the longest of five things:

- *memory*: the bytes of maps that it reads and writes, as if all came from and went to memory.
- *L2*: those and the weights that each CTA reads, through L2; a grid of few CTAs gets no more
  than its SMs can take, 64 bytes a cycle each.
- *tensor*: its multiply-adds, with all padding and halo rows, on the SMs that it uses. Depthwise
  convolutions run beside the tensor cores and are counted here as if they were products.
- *issue*: its executed instructions. An SM can issue 4 in a cycle; {issue:.1f} are assumed where
  it has warps enough, and where it has few, one in {alone:.0f} cycles for each warp.
- *latency*: the cycles from the first instruction of a CTA to its last if nothing else is in the
  way, times the CTAs that an SM takes one after another. Of units that is the estimate by which
  they are cut (`csrc/cuda/unit_cost.h`): phases between barriers, of which each takes as long as
  the longest job of a warp: in loops of products as the table of loops below has it, elsewhere
  {alone:.0f} cycles for each instruction; and {l2:.0f} for what waits for L2. Of other kernels it
  is two round trips to memory, {alone:.0f} cycles for each instruction of a warp, and for those of
  products what their loop takes.

Executed instructions are counted by the interpreter, one for each warp that an instruction is
issued to, in PTX for compute_90 of nvcc {nvcc}: all of them at batch 1 and 8; from batch 64 on
one CTA in eleven, of one chunk of the batch (for x0.5 at batch 64 that is 0.02 % off). For
comparison, the estimate by which units are cut has {estimates} of the instructions that units
execute.

**Not modelled**, and it can be most of an error: how warps of different phases share an SM, bank
conflicts, contention in L2 and beyond the stated rates, a last wave that does not fill the GPU
other than in the latency, what the overlap of two launches saves, clocks that fall under load,
the time from Python's call to the graph's first kernel, and copies to and from the host. What
machine code has less than PTX (addresses, moves) is not taken off. Terms that overlap badly add
up; here the longest wins.

Assumed of the GPUs:

| | SMs | clock | memory | L2 | L2 into one SM | 16-bit multiply-adds |
|---|---|---|---|---|---|---|
"""

AFTER_GPUS = """
Memory is what copies reach, of 4.8 and 2.04 TB/s; the products of `mma.sync` are taken
to reach 63 % of the H200's 495 T/s and 90 % of the A100's 156; clocks and L2 are assumed.
"""

NETWORKS = """
## Networks on the {name}

Columns of times are sums over launches of one term each, in us; *predicted* sums the longest of
each launch, and the launches.

| width | batch | launches | maps, MB | weights, MB | G multiply-adds | M instructions | launches \
| memory | L2 | tensor | issue | latency | predicted, us | images/s | measured, us |
"""

WHERE = """
### Where x1.0's time goes

On the H200, in us; of each part the longest term of its launches decides, which is in bold.

| batch | part | launches | M instructions | memory | L2 | tensor | issue | latency | predicted |
|---|---|---|---|---|---|---|---|---|---|
"""

STAGES = """
## Units in one launch

Where an image's maps fit into the shared memory of a cluster (x0.5 and x1.0 at {size} x {size}),
all units can be one launch of a cluster for each image, between the stem and the head
(`csrc/cuda/stages.h`). That is asked for, `torch.ops.snv2.gpu_tune(stages=1)` where it is
expected to be faster, and not the rule before a GPU has run it. On the H200; the cycles of a CTA
are those that `benchmarks/sass_path.py` walks through in its machine code, executed instructions
are counted on one image, and the clusters run all at once. Beside it stands a launch for each
unit, as above.

| width | batch | launches | maps, MB | weights, MB | M instructions | launches | memory | L2 \
| tensor | issue | latency | predicted, us | a launch for each unit, us | measured, us |
"""

OPS = """
## The op and a unit alone

`split_dw_cat_shuffle`, and a unit of stride 1 that reads and writes the caller's tensors, on
{batch} maps of a stage of x1.0, beside the eager modules that they replace. Bytes are those of
the input and the result, once. Eager PyTorch launches a kernel for each convolution, batch norm,
ReLU, `cat` and channel shuffle; what these read and write is divided by the memory's rate, as if
they reached it (a convolution of half of the channels may also copy them first). Instructions of
a thread for each element of the result are executed PTX. From a CUDA graph; called one by one
from Python, each launch takes some us of the host instead. The eager times are the least that
those sequences take, since nothing but bytes and launches is counted; those of units have all
terms. The op's grid is taken to fill the GPU, and a CTA's latency to be two round trips to memory,
so its times are near the least as well.

| | stage | dtype | layout | launches | MB | instructions, an element | H200, us | A100, us \
| eager launches | eager MB | eager H200, at least, us | eager A100, at least, us | measured, us |
"""

LOOPS = """
## Loops

A turn of the inner loops of the float16 kernels, in machine code for sm_90 (ptxas of nvcc
{nvcc}), and its cycles for one warp that has an SM to itself, by the stall counts and scoreboards
in its instructions (`benchmarks/sass.py`, with typical latencies). *for each*: instructions for
an HMMA of 16 x 8 x 16, or for a result of a lane. `Resident` units have their weights in shared
memory, `Clustered` ones in that of a cluster, `Direct` ones in L2; those with `true` read or
write the caller's tensors. Beside them stands what `unit_cost.h` reckons with for the same turn:
instructions in PTX, and cycles, which are {weights:.0f} for a step that waits for L2.
`python_tests/test_cuda_sass.py` bounds this table.

| kernel | loop | instructions | for each | cycles | `unit_cost.h`: instructions | cycles |
|---|---|---|---|---|---|---|
"""


def us(seconds: float, digits: int = 1) -> str:
    return f"{seconds * 1e6:.{digits}f}"


def rule(columns: int) -> str:
    return "|" + "---|" * columns


def gpu_lines() -> Iterable[str]:
    for gpu in GPUS:
        yield (
            f"| {gpu.name} | {gpu.device['sms']} | {gpu.clock / 1e9:.2f} GHz"
            f" | {gpu.memory / 1e12:.2f} TB/s | {gpu.l2 / 1e12:.1f} TB/s"
            f" | {gpu.l2_per_sm / 1e9:.0f} GB/s | {gpu.multiply_adds / 1e12:.0f} T/s |"
        )


def network_lines(gpu: Gpu) -> Iterable[str]:
    yield rule(16)
    for width in WIDTHS:
        for batch in BATCHES:
            p = predict(width, batch, gpu)
            terms = " | ".join(us(term) for term in p.terms.each)
            yield (
                f"| {width.replace('_', '.')} | {batch} | {p.launches} | {p.map_bytes / 1e6:.1f}"
                f" | {p.weight_bytes / 1e6:.1f} | {p.multiply_adds / 1e9:.2f}"
                f" | {p.instructions / 1e6:.1f} | {us(p.launches * LAUNCH, 0)} | {terms}"
                f" | {us(p.total, 0)} | {batch / p.total:,.0f} | |"
            )


def part_lines(width: str, gpu: Gpu) -> Iterable[str]:
    parts = {
        "stem": slice(0, 1), "stage 2": slice(1, 5), "stage 3": slice(5, 13),
        "stage 4": slice(13, 17), "features": slice(17, 18), "linear": slice(18, 19),
    }  # fmt: skip
    for batch in (BATCHES[0], BATCHES[1], BATCHES[-1]):
        rows = launches_with_terms(width, batch, gpu)
        for name, part in parts.items():
            found = rows[part]
            total = sum((terms for _, _, terms in found), Terms())
            launches = sum(launch["launches"] for launch, _, _ in found)
            seconds = sum(terms.longest for _, _, terms in found) + launches * LAUNCH
            cells = [f"**{us(t)}**" if t == total.longest else us(t) for t in total.each]
            instructions = sum(executed for _, executed, _ in found)
            yield (
                f"| {batch} | {name} | {launches} | {instructions / 1e6:.2f}"
                f" | {' | '.join(cells)} | {us(seconds)} |"
            )


def stage_lines() -> Iterable[str]:
    yield rule(15)
    for row in data()["stages"]:
        for batch in STAGES_BATCHES:
            p = predict_stages(row, batch)
            terms = " | ".join(us(term) for term in p.terms.each)
            apart = us(predict(row["width"], batch, GPUS[0]).total, 0)
            yield (
                f"| {row['width'].replace('_', '.')} | {batch} | {p.launches}"
                f" | {p.map_bytes / 1e6:.1f} | {p.weight_bytes / 1e6:.1f}"
                f" | {p.instructions / 1e6:.1f} | {us(p.launches * LAUNCH, 0)} | {terms}"
                f" | {us(p.total, 0)} | {apart} | |"
            )


def op_lines() -> Iterable[str]:
    yield rule(14)
    names = {"split_dw_cat_shuffle": "`split_dw_cat_shuffle`", "unit": "unit alone"}
    for case in CASES:
        p, on_a100 = (predict_case(case, gpu) for gpu in GPUS)
        channels, size = OP_MAPS[case.stage]
        each = 32 * p.instructions / (OP_BATCH * channels * size * size)
        layout = case.memory_format.removesuffix("_format").replace("_", "-")
        yield (
            f"| {names[case.what]} | {case.stage}: {channels} x {size} x {size} | {case.dtype}"
            f" | {layout} | {p.launches} | {p.map_bytes / 1e6:.1f} | {each:.1f} | {us(p.total)}"
            f" | {us(on_a100.total)} | {p.eager_launches} | {p.eager_bytes / 1e6:.1f}"
            f" | {us(p.eager_total)} | {us(on_a100.eager_total)} | |"
        )


# HMMA of a step of a unit's product, and steps that are loaded ahead of it.
STEPS = {
    "Resident": (8, None),
    "Clustered": (4, None),
    "Direct<half_t, 1>": (14, 1),
    "Direct<half_t, 2>": (8, 2),
}


def unit_cost_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """Returns instructions and cycles that unit_cost.h reckons with for a turn of a unit's loop."""
    for mode, (products, ahead) in STEPS.items():
        if f", {mode}, " not in row["kernel"]:
            continue
        if row["loop"] == "depthwise":
            strided = row["kernel"].startswith("unit_kernel<half_t, 2,")
            of_row = unit_cost("kRow") * (unit_cost("kOfTwoRows") if strided else 1)
            return of_row, ALONE * of_row
        steps = row["done"] / products
        instructions = steps * unit_cost("kTile") + row["done"] * unit_cost("kProduct")
        tile = unit_cost("kTileCycles" if mode == "Resident" else "kOneTileCycles")
        cycles = steps * tile + row["done"] * unit_cost("kProductCycles")
        return instructions, max(cycles, steps * unit_cost("kWeightsOfL2") / ahead if ahead else 0)
    return None


def loop_lines() -> Iterable[str]:
    for row in data()["loops"]:
        reckoned = unit_cost_of(row)
        cells = " | ".join(f"{number:.0f}" for number in reckoned) if reckoned else "|"
        yield (
            f"| `{row['kernel']}` | {row['loop']} | {row['instructions']}"
            f" | {row['instructions'] / row['done']:.1f} | {row['cycles']} | {cells} |"
        )


def summary() -> str:
    """Returns what the tables come to, for those who read no further."""
    gpu = GPUS[0]
    one, many = (predict("x1_0", batch, gpu) for batch in (BATCHES[0], BATCHES[-1]))
    cases = [predict_case(case, gpu) for case in CASES if case.what == "split_dw_cat_shuffle"]
    ratios = [case.eager_total / case.total for case in cases]
    by_memory = sum(case.terms.memory == case.terms.longest for case in cases)
    return (
        f"In short, on the {gpu.name}: x1.0 should take {us(one.total, 0)} us for one image, most"
        f" of it latency inside CTAs ({us(one.terms.latency, 0)} us), then launches"
        f" ({us(one.launches * LAUNCH, 0)} us). At batch {BATCHES[-1]} it should take"
        f" {many.total / BATCHES[-1] * 1e6:.1f} us an image"
        f" ({BATCHES[-1] / many.total:,.0f} images/s): of {us(many.total, 0)} us latency alone"
        f" would be {us(many.terms.latency, 0)}, issue {us(many.terms.issue, 0)} and memory"
        f" {us(many.terms.memory, 0)}. Of the fused op memory is the longest term in {by_memory} of"
        f" {len(cases)} cases below, and by bytes and launches alone eager PyTorch takes"
        f" {min(ratios):.1f} to {max(ratios):.1f} times as long as it."
    )


def filled(text: str) -> str:
    """Returns text whose paragraphs and points have lines of one length. Tables stay."""
    done = []
    for block in text.split("\n\n"):
        if block.strip("\n").startswith(("#", "|")):
            done.append(block.strip("\n"))
            continue
        points = re.split(r"\n(?=- )", block.strip("\n"))
        done.append("\n".join(
            textwrap.fill(
                " ".join(point.split()), 98, subsequent_indent="  " * point.startswith("- "),
                break_on_hyphens=False, break_long_words=False,
            )
            for point in points
        ))  # fmt: skip
    return "\n\n".join(done)


def page() -> str:
    estimates = " and ".join(
        f"{least:.0%} to {most:.0%} ({gpu.name})"
        for gpu in GPUS
        for least, most in [estimate_over_count(gpu)]
    )
    numbers = {
        "size": SIZE, "launch": LAUNCH * 1e6, "issue": ISSUE, "alone": ALONE, "l2": LATENCY,
        "weights": unit_cost("kWeightsOfL2"),
        "nvcc": data()["nvcc"], "estimates": estimates, "summary": summary(),
        "batch": OP_BATCH,
    }  # fmt: skip
    parts = [INTRODUCTION, *gpu_lines(), AFTER_GPUS]
    for gpu in GPUS:
        parts += [NETWORKS.format(name=gpu.name), *network_lines(gpu)]
        if gpu is GPUS[0]:
            parts += [WHERE, *part_lines("x1_0", gpu)]
    parts += [STAGES, *stage_lines(), OPS, *op_lines(), LOOPS, *loop_lines()]
    text = "\n".join(
        part.strip("\n") if part.startswith("|") else part.rstrip("\n") for part in parts
    )
    return filled(text.format(**numbers)) + "\n"


def _stage_counts(channels: int, units: int, size: int, dtype: torch.dtype) -> Counter[str]:
    stage = snv2.nn.Stage(*(snv2.nn.InvertedResidual(channels, channels, 1) for _ in range(units)))
    x = torch.randn(1, channels, size, size, dtype=dtype)
    randomize_(stage).eval().to(dtype)
    emulator.reset_counters()
    with torch.no_grad(), snv2.use_backend("cuda-emulated"):
        stage(x)
    return Counter(emulator.counters())


def moved(width: str, dtype: torch.dtype) -> list[Counted]:
    """What a unit inside each stage moves at batch 1: the emulator's count, what the launch is
    described as, and the least, its maps and weights."""
    plan = plan_of(width)
    rows: list[Counted] = []
    channels = getattr(snv2.models, f"shufflenet_v2_{width}")()._stage_out_channels[1:4]
    launches = launches_of(plan.words, 1, SIZE, SIZE)
    first = 1  # behind the stem
    for stage, (outputs, units) in enumerate(zip(channels, (4, 8, 4), strict=True)):
        size, half = SIZE >> 3 + stage, outputs // 2
        counts = _stage_counts(outputs, 3, size, dtype)
        counts.subtract(_stage_counts(outputs, 2, size, dtype))
        weights = 2 * half * half + 9 * half
        launch = launches[first + 1]
        first += units
        rows.append({
            "kernel": "unit", "shape": f"{width.replace('_', '.')}, stage {stage + 2}: "
            f"{outputs} x {size} x {size}",
            "dtype": str(dtype).removeprefix("torch."), "batch": 1,
            "least_bytes": (2 * half * size * size + weights) * dtype.itemsize,
            "described_bytes": launch["read_bytes"] + launch["written_bytes"]
            + launch["weight_bytes"],
            "counted_bytes": counts["global_load_bytes"] + counts["global_store_bytes"],
            "multiply_adds": weights * size * size,
        })  # fmt: skip
    return rows


def write_counts(path: str) -> None:
    result = new_result({"size": SIZE})
    result["gpu"] = [row for width in WIDTHS for row in moved(width, torch.float16)]
    write_result(result, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--json"]:
        write_counts(sys.argv[2])
    else:
        PAGE.write_text(page())
