"""Counts what the kernels for 64-bit ARM execute and what their inner loops should take, without
such a machine: counts and models, not measurements.

``make neon-counts`` writes both tables of docs/arm.md. The first is of whole networks in QEMU with
the plugin ``neon/count.c``, the second of llvm-mca (LLVM 16 or newer) on the loops of compiled
kernels.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import snv2_kernels as snv2
from snv2_bench.floor import multiply_adds
from snv2_kernels.testing import randomize_

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent / "csrc" / "include"
SIZE = 224
# Name in the table: instruction set, file, snv2::DType of image and scores.
RUNS = {
    "float32": ("neon", "float", 0),
    "bfloat16, `bfdot`": ("neon_bf16", "float", 2),
    "int8": ("neon", "bytes", 0),
    "int8, `sdot`": ("neon_dot", "bytes", 0),
}
PRODUCTS = re.compile(r"(fmla|fmul|bfdot|sdot|smull2?)\s+v")
CORES = ("cortex-a55", "cortex-a510", "neoverse-n1", "neoverse-n2", "neoverse-v1")
# Instruction set, source, function, an instruction of which the loop has most, multiply-adds of
# one, and cores without it.
LOOPS = {
    "product, float32": ("neon", "pointwise", "::tiles<6, .*false>, 16, float, float", "fmla", 4),
    "product, bfloat16": ("neon_bf16", "pointwise", "::tiles<6, .*false>.*, float>", "bfdot", 8),
    "product, int8": ("neon", "int8/products", "::tiles<4, .*false>.*ToMap", "smull2?", 8),
    "product, int8, `sdot`": (
        "neon_dot",
        "int8/products",
        "::tiles<4, .*false>.*ToMap",
        "sdot",
        16,
    ),
    "depthwise row, float32": ("neon", "depthwise", "::dw_row<3, 1, float>", "fmla", 4),
    "depthwise row, bfloat16": ("neon_bf16", "depthwise", "::dw_row<3, 1, .*BFloat16>", "fmla", 4),
}
ITERATIONS = 200


def output_of(*command: object, given: str | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, input=given,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def write_programs(folder: Path, width: str) -> int:
    """Writes the network with maps of floats and of bytes; returns its multiply-adds."""
    torch.manual_seed(0)
    model = randomize_(getattr(snv2.models, f"shufflenet_v2_{width.replace('.', '_')}")()).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    size = 1, 3, SIZE, SIZE
    dtypes = torch.float32, torch.bfloat16
    snv2.save_program(model, folder / "float", size, dtypes=dtypes)
    snv2.save_program(snv2.quantize(model, [x]), folder / "bytes", size)
    return multiply_adds(model, x[:1])


def count_words(words: dict[str, int]) -> collections.Counter[str]:
    """Executions by kind of instruction."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(bytes.fromhex(word)[::-1] for word in words))
        file.flush()
        listing = output_of(
            "aarch64-linux-gnu-objdump", "-D", "-b", "binary", "-m", "aarch64", file.name
        )
    kinds: collections.Counter[str] = collections.Counter()
    for _, word, text in re.findall(r"^\s*(\w+):\t(\w{8})\s+(.*)$", listing, re.MULTILINE):
        kinds["all"] += words[word]
        if PRODUCTS.match(text):
            kinds["products"] += words[word]
        elif re.match(r"ld", text):
            kinds["loads"] += words[word]
        elif re.match(r"st", text):
            kinds["stores"] += words[word]
        elif re.search(r"\bv\d+\.", text):
            kinds["vectors"] += words[word]
    return kinds


def counts_of_networks(build: Path, widths: list[str]) -> None:
    print("| | multiply-adds | | instructions | products | other vector ones | loads | stores "
          "| instructions for a multiply-add |")  # fmt: skip
    print("|" + "---|" * 9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output_of("cc", "-O2", "-shared", "-fPIC", HERE / "neon/count.c", "-o", folder / "count.so")
        output_of("aarch64-linux-gnu-g++", "-std=c++17", "-O1", f"-I{INCLUDE}", f"-L{build}",
                  HERE / "neon/run.cpp", "-o", folder / "run", "-lsnv2_cpu")  # fmt: skip
        for width in widths:
            work = write_programs(folder, width)
            for title, (isa, file, dtype) in RUNS.items():
                listed = output_of(
                    "qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu",
                    "-E", f"LD_LIBRARY_PATH={build}", "-plugin", folder / "count.so",
                    folder / "run", folder / file, dtype, SNV2_CPU_ISA=isa,
                )  # fmt: skip
                words: collections.Counter[str] = collections.Counter()
                for word, count in re.findall(r"^(\w{8}) (\d+)$", listed, re.MULTILINE):
                    words[word] += int(count)
                kinds = count_words(words)
                cells = [
                    f"{kinds[kind] / 1e6:.1f} M"
                    for kind in ("all", "products", "vectors", "loads", "stores")
                ]
                print(f"| {width} | {work / 1e6:.1f} M | {title} |", " | ".join(cells),
                      f"| {kinds['all'] / work:.2f} |", flush=True)  # fmt: skip


def loop_of(build: Path, isa: str, source: str, function: str, product: str) -> list[str]:
    """The innermost loop that has most of an instruction, of the functions that match."""
    file = build / f"CMakeFiles/snv2_cpu_{isa}.dir/csrc/cpu/{source}.cpp.o"
    listing = output_of("aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", file)
    best: list[str] = []
    for name, body in re.findall(r"^\w+ <(.*)>:\n((?:.+\n)+)", listing, re.MULTILINE):
        if not re.search(function, name):
            continue
        lines = re.findall(r"^\s*(\w+):\t(.*?)\s*(?://.*)?$", body, re.MULTILINE)
        at = {address: i for i, (address, _) in enumerate(lines)}
        for i, (_, text) in enumerate(lines):
            jump = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\s(?:.*\s)?(\w+) <", text)
            if jump is None or at.get(jump[1], i) >= i:
                continue
            loop = [line for _, line in lines[at[jump[1]] : i + 1]]
            whole = not any(re.match(r"b\.|cb|tb|b\s|ret", line) for line in loop[:-1])
            if whole and products_in(loop, product) > products_in(best, product):
                best = loop
    if not best:
        raise SystemExit(f"{file}: no loop of {product} in {function}")
    return best


def products_in(loop: list[str], product: str) -> int:
    return sum(re.match(rf"{product}\s", line) is not None for line in loop)


def cycles_of(mca: str, loop: list[str], core: str) -> str:
    assembly = ".Lloop:\n" + "\n".join(re.sub(r"\w+ <.*>", ".Lloop", line) for line in loop)
    options = "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+bf16,+dotprod"
    told = output_of(mca, *options, f"-iterations={ITERATIONS}", given=assembly + "\n")
    cycles = re.search(r"Total Cycles:\s+(\d+)", told)
    assert cycles is not None
    return f"{int(cycles[1]) / ITERATIONS:.1f}"


def cycles_of_loops(build: Path, mca: str) -> None:
    print("| | multiply-adds | instructions | products | loads and stores of sums |",
          " | ".join(CORES), "|")  # fmt: skip
    print("|" + "---|" * (5 + len(CORES)))
    for title, (isa, source, function, product, lanes) in LOOPS.items():
        loop = loop_of(build, isa, source, function, product)
        count = products_in(loop, product)
        spilled = sum("[sp" in line for line in loop)
        cycles = [
            "" if core == "cortex-a55" and isa == "neon_bf16" else cycles_of(mca, loop, core)
            for core in CORES
        ]
        print(f"| {title} | {count * lanes} | {len(loop)} | {count} | {spilled} |",
              " | ".join(cycles), "|", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="where cmake/aarch64.cmake built the library")
    parser.add_argument("--width", action="append", help="x0.5 and x1.0 unless told")
    arguments = parser.parse_args()
    names = ["llvm-mca", *(f"llvm-mca-{version}" for version in range(16, 30))]
    found = [path for path in map(shutil.which, names) if path is not None]
    if not found:
        raise SystemExit("llvm-mca: not found (Debian's llvm-19)")
    build = arguments.build.resolve()
    cycles_of_loops(build, found[-1])
    print()
    counts_of_networks(build, arguments.width or ["x0.5", "x1.0"])


if __name__ == "__main__":
    main()
