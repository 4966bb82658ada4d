"""A small result with every section, for tests of what reads results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snv2_bench.cli.summary import CASE, summary_of

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Result

PEERS = {"eager": 8.0, "ncnn": 4.0, "fused": 2.0, "engine": 1.0}


def case(threads: int = 1) -> dict[str, Any]:
    return dict(zip(CASE, ("x1.0", 1, "fp32", threads), strict=True))


def row(peer: str, ms: float | None, threads: int = 1) -> Any:
    """Percentiles a tenth around the median."""
    known = ms is not None
    others = {name: {"p10": 1.5, "p50": 2.0, "p90": 2.5} for name in PEERS if name != peer}
    return case(threads) | {
        "peer": peer,
        "error": 1e-7,
        "error_bound": 1e-5,
        "reason": None if known else "RuntimeError: <no> luck & more",
        "samples": 30 if known else 0,
        "median_ms": ms,
        "percentiles_ms": {
            f"p{p}": ms * factor
            for p, factor in ((0, 0.8), (10, 0.9), (50, 1), (90, 1.1), (99, 1.2), (100, 1.3))
        }
        if ms is not None
        else {},
        "images_per_s": 1e3 / ms if ms is not None else None,
        "floor_share": 0.5 / ms if ms is not None else None,
        "speedup": 8 / ms if ms is not None else None,
        "paired": others if peer in ("fused", "engine") else {},
    }


def a_result(scale: float = 1.0) -> Result:
    """Every time is ``scale`` as long."""
    rows = [
        row(peer, ms * scale / threads, threads) for threads in (1, 2) for peer, ms in PEERS.items()
    ]
    rows.append(row("openvino", None, 2))
    kernel = {"step": "stem", "kernel": "conv", "multiply_adds": 8_000_000, "moved_bytes": 900_000,
              "ms": 0.25 * scale, "floor_ms": 0.125}  # fmt: skip
    outside = {"step": "outside", "kernel": "no kernel", "multiply_adds": 0, "moved_bytes": 0,
               "ms": 0.05, "floor_ms": 0.0}  # fmt: skip
    start = case() | {
        "peer": "engine", "reason": None, "samples": 3, "median_ms": 3000.0 * scale,
        "percentiles_ms": {"p0": 2900.0, "p50": 3000.0, "p100": 3300.0},
        "phases_ms": {"import torch": 1500.0, "import snv2_kernels": 500.0, "build": 900.0,
                      "first call": 100.0},
        "memory_mb": {"before": 285.0, "to_first_result": 30.0, "calls": None},
    }  # fmt: skip
    guideline = {
        "table": "G1", "setting": "1:2", "channels": [22, 44], "device": "cpu", "batch": 1,
        "threads": 1, "peer": "eager", "error": 1e-7, "median_ms": 1.5 * scale,
        "percentiles_ms": {"p10": 1.4, "p90": 1.6}, "ratio": 0.93, "paper_per_s": 72.9,
        "paper_ratio": 0.957, "reason": None,
    }  # fmt: skip
    result: Any = {
        "schema": 3,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "snv2 bench --json out.json",
        "machine": {"cpu": "A <fast> CPU", "cores": 2, "usable_cores": 2, "clock_mhz": 2500.0,
                    "memory_gb": 16.0, "os": "Linux", "isa": "avx2", "available_isas": ["avx2"]},
        "versions": {"torch": "2.13.0+cpu", "snv2_kernels": "0.1.0"},
        "commit": "0123abc",
        "settings": {"size": 224, "repeats": 30},
        "interrupted": False,
        "floor": [
            {"threads": threads, "element": "float32", "multiply_adds_per_s": 5e10 * threads,
             "copy_bytes_per_s": 2e10, "cached_copy_bytes_per_s": 9e10 * threads}
            for threads in (1, 2)
        ],
        "rows": rows,
        "layers": [case() | {"kernels": [kernel, outside]}],
        "startup": [start],
        "summary": summary_of(rows),
        "guidelines": [guideline, guideline | {"setting": "1:1", "ratio": 1.0}],
        "table8": [
            {"model": "ShuffleNet v2", "size": "1.0x", "input": 224, "multiply_adds": 146e6,
             "peer": "eager", "median_ms": 8.0 * scale, "per_s": 125.0, "ratio": 1.0,
             "paper_per_s": 341.0, "paper_ratio": 1.0}
        ],
        "gpu": [
            {"kernel": "unit", "shape": "x1.0, stage 2", "dtype": "float16", "batch": 1,
             "least_bytes": 200_000, "described_bytes": 300_000, "counted_bytes": 310_000,
             "multiply_adds": 5_000_000}
        ],
    }  # fmt: skip
    return result  # type: ignore[no-any-return]
