"""Micro-benchmarks of the set-ups of the paper's Tables 1 to 4, and of units, at the smallest
scale:

    pytest benchmarks/test_guidelines.py --benchmark-group-by=group

Each group is a table; an output is checked against float64 before it is timed. `snv2 guidelines`
measures the same in turns, which a machine that is not quiet asks for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from snv2_bench.cli.rule import upper_bound
from snv2_bench.guidelines.cases import TABLES, Entry, guideline_groups
from snv2_bench.peers import Unavailable
from snv2_kernels.testing import max_error

BOUND = upper_bound("network", torch.float32)


def _entries() -> dict[str, tuple[str, Entry]]:
    groups = guideline_groups(TABLES, torch.device("cpu"), 1, ("eager", "fused"), quick=True)
    return {
        f"{group.title}, {entry.about['setting']}, {entry.about['peer']}": (group.title, entry)
        for group in groups
        for entry in group.entries
    }


ENTRIES = _entries()


@pytest.mark.parametrize("name", ENTRIES)
def test_guideline(benchmark: Any, name: str) -> None:
    benchmark.group, entry = ENTRIES[name]
    with torch.inference_mode():
        try:
            call = entry.build()
        except Unavailable as reason:
            pytest.skip(str(reason))
        assert max_error(call(), entry.exact()) < BOUND
        benchmark(call)
