"""Networks of x1.0's widths whose units stand among other layers, beside other ways to run them.

``python benchmarks/mixed.py --json FILE`` times one image of 224 x 224 in float32 and prints a
table; it takes some minutes. Each is written as the projects that have it do
(``python_tests/_mixed_networks.py``): attention behind the shuffle or in the branch, other stems
and heads, a feature pyramid. What they return is joined to one tensor, which is checked against
float64 in each call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.benchmarking import Comparison
from snv2_bench.cli.environment import commit, machine, versions
from snv2_kernels.testing import randomize_

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "python_tests"))

from _mixed_networks import PARTITIONED, WHOLE, X1_0  # noqa: E402

PEERS = ("eager", "channels_last", "compile", "fused")
BOUND = 1e-4  # attention divides by small sums
NETWORKS = ("reparametrised", "shuffled by select", *PARTITIONED)


class Joined(nn.Module):
    """A network whose results are one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in _tensors(self.network(x))])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value or ()
    return [tensor for part in values for tensor in _tensors(part)]


def measure(name: str, threads: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, by peer, and the ratios of medians to that of the fused network."""
    torch.set_num_threads(threads)
    make = WHOLE[name] if name in WHOLE else PARTITIONED[name][1]
    model = Joined(randomize_(make(size=X1_0))).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    turns = Comparison(model, x, PEERS, BOUND)
    for peer in PEERS:
        turns.prepare(peer)
    for _ in range(repeats):
        turns.time_round()
    rows = turns.rows
    return {
        "network": name,
        "threads": threads,
        "kind": snv2.explain(model).parts[0].kind,
        "median_ms": {peer: rows[peer].median for peer in PEERS},
        "errors": {peer: rows[peer].error for peer in PEERS},
        "reasons": {peer: rows[peer].reason for peer in PEERS if rows[peer].reason},
        "paired": {peer: rows["fused"].paired(rows[peer]) for peer in PEERS[:-1]},
    }


def line(row: dict[str, Any]) -> str:
    times = [row["median_ms"][peer] for peer in PEERS]
    told = [f"{time:8.2f}" if time is not None else f"{'-':>8}" for time in times]
    others = [time for time in times[:-1] if time is not None]
    ratio = f"{min(others) / times[-1]:.2f}x" if others and times[-1] else "-"
    return f"{row['network']:20} {row['threads']:2} {' '.join(told)}  {ratio:>6}  {row['kind']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", choices=NETWORKS, help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    print(f"{'network':20} th {' '.join(f'{peer[:8]:>8}' for peer in PEERS)}  vs best, ms")
    rows = []
    for name in given.network or NETWORKS:
        for threads in given.threads or [1]:
            rows.append(measure(name, threads, given.repeats))
            print(line(rows[-1]), flush=True)
            torch._dynamo.reset()
    if given.json is not None:
        told = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": commit(),
            "versions": versions(),
            "rows": rows,
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
