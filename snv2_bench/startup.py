"""How long a peer takes from nothing to its first result, and how much memory, in processes of
its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snv2_bench.peers import OURS, first_result

if TYPE_CHECKING:
    import torch

__all__ = ["PHASES", "FirstResult", "first_results"]

PHASES = ("import torch", "import snv2_kernels", "build", "first call")
_RUNS = 3
_ENOUGH_SECONDS = 30.0  # no further run after that; compilers take long
_TIMEOUT_SECONDS = 600


@dataclass
class FirstResult:
    """One fresh process."""

    reason: str | None = None  # why there is no result
    phases_ms: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float | None] | None = None

    @property
    def total_ms(self) -> float:
        return sum(self.phases_ms.values())


def first_results(
    peer: str, width: str, *, batch: int, size: int, dtype: torch.dtype, threads: int
) -> list[FirstResult]:
    """Up to three processes, fewest where the first takes long; one alone where it fails.

    :data:`PHASES` leave out the making of the model, and of peers that are not ours also
    ``import snv2_kernels``, where the model comes from. ``build`` has the export and conversion
    that a peer needs, and its own import. Caches of compilers are empty.
    """
    asked = {
        "peer": peer, "width": width, "batch": batch, "size": size,
        "dtype": str(dtype).removeprefix("torch."), "threads": threads,
    }  # fmt: skip
    results: list[FirstResult] = []
    start = time.monotonic()
    while len(results) < _RUNS and (not results or time.monotonic() - start < _ENOUGH_SECONDS):
        result = _run(asked)
        if peer not in OURS:
            result.phases_ms.pop("import snv2_kernels", None)
        results.append(result)
        if result.reason is not None:
            return [result]
    return results


def _run(asked: dict[str, Any]) -> FirstResult:
    assert first_result.__file__ is not None
    command = [sys.executable, "-P", first_result.__file__, json.dumps(asked)]
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(caches) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(caches) / "triton"),
        }
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False,
                timeout=_TIMEOUT_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return FirstResult(f"no result in {_TIMEOUT_SECONDS} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines()
        return FirstResult(errors[-1] if errors else f"ended with status {done.returncode}")
    return FirstResult(**json.loads(lines[-1]))
