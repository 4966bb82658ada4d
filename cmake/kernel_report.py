"""Keeps what the compiler says about each kernel: registers, shared memory, spills.

    kernel_report.py compile REPORT SOURCE COMMAND...   runs nvcc and writes what it reported
    kernel_report.py merge TABLE TARGETS REPORT...      one table of all reports

A report is an output of the same build step as the object it is about, so the two are rebuilt, or
left alone, together.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# What ptxas -v prints. All else that the compiler says is the developer's to see.
ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\w+)'")
SPILLS = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.ASCII
)
USED = re.compile(r"ptxas info\s*: Used (\d+) registers(.*)")
SILENT = re.compile(r"ptxas info\s*: (Function properties for |Compile time = |\d+ bytes gmem)")


def demangle(symbols: list[str]) -> list[str]:
    """Readable names by the C++ library, which all that is built here needs anyway."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    names = []
    for symbol in symbols:
        name = library.__cxa_demangle(symbol.encode(), None, None, None)
        names.append(name.decode() if name else symbol)
    return names


def short_name(demangled: str) -> str:
    """Without return type, parameters and the namespaces that all kernels are in."""
    depth = 0
    for i in range(len(demangled) - 1, -1, -1):
        depth += (demangled[i] == ")") - (demangled[i] == "(")
        if demangled[i] == "(" and depth == 0:
            demangled = demangled[:i]
            break
    name = demangled.removeprefix("void ")
    for namespace in ("snv2::cuda::", "snv2::", "(anonymous namespace)::"):
        name = name.replace(namespace, "")
    return name


def parse_ptxas(text: str) -> tuple[list[Record], str]:
    """A record for each kernel and architecture, and the text that is no part of any."""
    records: list[Record] = []
    rest = []
    for line in text.splitlines():
        if entry := ENTRY.match(line):
            # Newer architectures report neither kernel parameters nor constants that are not there.
            records.append({
                "symbol": entry[1], "arch": entry[2], "registers": 0, "shared": 0, "stack": 0,
                "spill_stores": 0, "spill_loads": 0, "barriers": 0, "constant": 0,
            })  # fmt: skip
        elif records and (spills := SPILLS.search(line)):
            # Functions that were not inlined have a line of their own.
            records[-1]["stack"] = max(records[-1]["stack"], int(spills[1]))
            records[-1]["spill_stores"] += int(spills[2])
            records[-1]["spill_loads"] += int(spills[3])
        elif records and (used := USED.match(line)):
            records[-1]["registers"] = int(used[1])
            for pattern, key in (
                (r"used (\d+) barriers", "barriers"),
                (r"(\d+) bytes cumulative stack size", "stack"),
                (r"(\d+) bytes smem", "shared"),
            ):
                if found := re.search(pattern, used[2]):
                    records[-1][key] = int(found[1])
            records[-1]["constant"] = sum(map(int, re.findall(r"(\d+) bytes cmem", used[2])))
        elif not SILENT.match(line):
            rest.append(line)
    return records, "\n".join(rest)


def parse_bounds(ptx: str) -> dict[tuple[str, str], tuple[int | None, int | None]]:
    """Launch bounds, threads and CTAs, of each kernel: only PTX tells them."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "PTX has no .target"
    bounds = {}
    # The directives stand between a kernel's parameters and its body.
    for entry in re.finditer(r"\.entry (\w+)\(?[^{]*", ptx):
        threads = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+))?(?:, (\d+))?", entry[0])
        ctas = re.search(r"\.minnctapersm (\d+)", entry[0])
        product = None
        if threads:
            product = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        bounds[entry[1], target[1]] = (product, int(ctas[1]) if ctas else None)
    return bounds


def compile_(report: Path, source: str, command: list[str]) -> int:
    with tempfile.TemporaryDirectory() as keep:
        said = subprocess.run(
            [*command, "--keep", "--keep-dir", keep],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        records, rest = parse_ptxas(said.stdout)
        if rest:
            print(rest, file=sys.stderr)
        if said.returncode != 0:
            return said.returncode
        bounds = {}
        for ptx in Path(keep).glob("*.ptx"):
            bounds.update(parse_bounds(ptx.read_text()))
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", version)
    kernels = []
    names = demangle([record["symbol"] for record in records])
    for name, record in zip(names, records, strict=True):
        threads, ctas = bounds[record.pop("symbol"), record["arch"]]
        kernels.append({
            "kernel": short_name(name), "source": source, **record,
            "max_threads": threads, "min_ctas": ctas,
        })  # fmt: skip
    report.write_text(json.dumps({"nvcc": found[1] if found else version, "kernels": kernels}))
    return 0


def merge(table: Path, targets: list[str], reports: list[Path]) -> int:
    parts = [json.loads(report.read_text()) for report in reports]
    kernels = [kernel for part in parts for kernel in part["kernels"]]
    kernels.sort(key=lambda k: (k["source"], k["kernel"], len(k["arch"]), k["arch"]))
    merged = {
        "nvcc": ", ".join(sorted({part["nvcc"] for part in parts})),
        "targets": targets,
        "kernels": kernels,
    }
    table.write_text(json.dumps(merged, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        sys.exit(compile_(Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    sys.exit(merge(Path(sys.argv[2]), sys.argv[3].split(","), [Path(p) for p in sys.argv[4:]]))
