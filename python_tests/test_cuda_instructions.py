"""Counts PTX instructions of a lane for each element in the loops of the fused ops, and checks the
widths of their stores. Counts, not timings."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SOURCE = """
#include "cuda/columns.h"
#include "cuda/depthwise_backward.h"
#include "cuda/pixels.h"
#include "cuda/strided.h"
namespace snv2::cuda {
using Row14 = Columns<14, true, false, false>;
using Row7 = Columns<7, false, false, false>;
template __global__ void columns_kernel<half_t, false, Row14>(ColumnsParams<half_t>);
template __global__ void columns_kernel<bfloat16_t, false, Row7>(ColumnsParams<bfloat16_t>);
template __global__ void columns_kernel<float, false, Row7>(ColumnsParams<float>);
constexpr Main kStride1 = Main::kStride1, kStride2 = Main::kStride2;
template __global__ void images_kernel<half_t, true, kStride1, 2>(ImagesParams<half_t>);
template __global__ void images_kernel<bfloat16_t, false, kStride2, 2>(ImagesParams<bfloat16_t>);
template __global__ void images_kernel<float, false, kStride1, 1>(ImagesParams<float>);
template __global__ void strided_kernel<half_t>(StridedParams<half_t>);
template __global__ void strided_kernel<float>(StridedParams<float>);
template __global__ void backward_kernel<half_t, true, 1, true>(BackwardParams<half_t>);
template __global__ void backward_kernel<half_t, true, 1, false>(BackwardParams<half_t>);
template __global__ void spread_kernel<uint16_t, 1, kStage4Plane>(AlternateParams<uint16_t>);
template __global__ void spread_kernel<uint32_t, 2, 0>(AlternateParams<uint32_t>);
}
"""


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, without labels."""

    body: tuple[str, ...]

    def count(self, prefix: str) -> int:
        return sum(line.split("} ")[-1].startswith(prefix) for line in self.body)


def _innermost_loops(kernel: str) -> list[Loop]:
    labels: dict[str, int] = {}
    lines: list[str] = []
    spans: list[tuple[int, int]] = []
    for text in kernel.splitlines():
        line = text.strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(lines)
        elif line.endswith(";") and not line.startswith("."):
            lines.append(line)
            target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(lines)))
    return [
        Loop(tuple(lines[begin:end]))
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Loop]]:
    found = subprocess.run(
        [sys.executable, ROOT / "cmake/cuda_toolkit.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        pytest.skip("no nvcc: install the extra cuda-build")
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "k.cu").write_text(SOURCE)
    subprocess.run(
        [
            found.stdout.split("\n")[0], "-ptx", "-arch=compute_90", "-O3", "-std=c++17",
            "--expt-relaxed-constexpr", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include",
            folder / "k.cu", "-o", folder / "k.ptx",
        ],
        check=True,
    )  # fmt: skip
    kernels = re.split(r"(?m)^\.(?:visible |weak )*\.?entry ", (folder / "k.ptx").read_text())[1:]
    return {kernel.split("(")[0]: _innermost_loops(kernel) for kernel in kernels}


def _of(loops: dict[str, list[Loop]], *words: str) -> list[Loop]:
    (name,) = (name for name in loops if all(word in name for word in words))
    return loops[name]


@pytest.mark.parametrize(
    ("words", "elements", "most"),
    [
        pytest.param(("columns_kernel", "6half_t"), 14, 12.5, id="fp16-rows-of-14"),
        pytest.param(("columns_kernel", "bfloat16_t"), 7, 17.5, id="bf16-rows-of-7"),
        pytest.param(("columns_kernel", "If"), 7, 14.7, id="fp32-rows-of-7"),
    ],
)
def test_row_of_the_convolution(
    loops: dict[str, list[Loop]], words: tuple[str, ...], elements: int, most: float
) -> None:
    """Nine products, and few instructions more, for a pixel."""
    (row,) = (loop for loop in _of(loops, *words) if loop.count("fma.") > 0)
    assert 9 * elements <= row.count("fma.") <= 10 * elements  # nine taps and the scale
    assert len(row.body) <= most * elements, f"{len(row.body) / elements:.1f} for an element"


@pytest.mark.parametrize(
    ("words", "least", "most"),
    [
        pytest.param(("images_kernel", "6half_t"), 200, 2.1, id="channels-last-fp16"),
        pytest.param(("images_kernel", "bfloat16_t"), 200, 4.3, id="channels-last-stride-2-bf16"),
        pytest.param(("images_kernel", "If"), 100, 2.6, id="channels-last-fp32"),
        pytest.param(("strided_kernel", "6half_t"), 10, 3.9, id="stride-2-fp16"),
        pytest.param(("strided_kernel", "If"), 10, 4.2, id="stride-2-fp32"),
        pytest.param(("backward_kernel", "Lb1ELi1ELb1"), 9, 5.5, id="gradients-channels-last"),
        pytest.param(("backward_kernel", "Lb1ELi1ELb0"), 9, 6.8, id="gradients-contiguous"),
    ],
)
def test_march_down_columns(
    loops: dict[str, list[Loop]], words: tuple[str, ...], least: int, most: float
) -> None:
    """Few instructions for a product; rows that are whole and the ends of rows are one loop."""
    marches = [loop for loop in _of(loops, *words) if loop.count("fma.") >= least]
    assert marches
    for loop in marches:
        ratio = len(loop.body) / loop.count("fma.")
        assert ratio <= most, f"{ratio:.2f} for a product"


@pytest.mark.parametrize(
    ("words", "elements", "most"),
    [  # eight planes, by 32 lanes
        pytest.param(("spread_kernel", "It"), 8 * 49 / 32, 3.75, id="fp16-7x7"),
        pytest.param(("spread_kernel", "Ij"), 8 * 196 / 32, 1.35, id="fp16-14x14"),
    ],
)
def test_planes_in_turn(
    loops: dict[str, list[Loop]], words: tuple[str, ...], elements: float, most: float
) -> None:
    spread = max(
        (
            loop
            for loop in _of(loops, *words)
            if loop.count("ld.shared") > 0 and loop.count("st.global") == 0
        ),
        key=lambda loop: len(loop.body),
    )
    assert spread.count("ld.shared") == 16
    assert len(spread.body) <= most * elements, f"{len(spread.body) / elements:.2f} for an element"


def test_loops_store_vectors(loops: dict[str, list[Loop]]) -> None:
    for name, found in loops.items():
        if "backward_kernel" in name:  # neighbouring lanes store a channel each
            continue
        stores = [line for loop in found for line in loop.body if "st.global" in line]
        assert stores, name
        assert all("st.global.v4" in line for line in stores), name
