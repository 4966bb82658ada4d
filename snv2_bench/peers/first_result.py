"""A fresh process from ``import torch`` to a peer's first result.

Run by its path, as ``python -P first_result.py '{"peer": "eager", ...}'``, so that nothing is
imported before the clock starts. The last line on standard output is the answer as JSON.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

_CALLS = 5
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class _Laps:
    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.ms[name] = (now - self._last) / 1e6
        self._last = now


def _resident(field: str) -> float:
    """MB of ``VmRSS`` or of the peak, ``VmHWM``.

    Linux's ``ru_maxrss`` begins with what the parent had, so it serves elsewhere only.
    """
    if _STATUS.exists():
        found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _why_wrong(out: Any, model: Any, x: Any) -> str | None:
    """Check the first result, when times and memory are known."""
    from snv2_bench.benchmarking import wrong_output
    from snv2_bench.cli.rule import upper_bound
    from snv2_kernels.testing import float64_reference, max_error

    return wrong_output(
        max_error(out, float64_reference(model)(x)), upper_bound("network", x.dtype)
    )


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    laps = _Laps()
    import torch

    laps.lap("import torch")
    import snv2_kernels

    laps.lap("import snv2_kernels")
    import warnings

    from snv2_bench.peers import PEERS, Unavailable
    from snv2_kernels.testing import randomize_

    warnings.simplefilter("ignore")
    torch.set_num_threads(asked["threads"])
    dtype = getattr(torch, asked["dtype"])
    make = getattr(snv2_kernels.models, "shufflenet_v2_" + asked["width"].replace(".", "_"))
    model = randomize_(make()).eval().to(dtype)
    x = torch.randn(asked["batch"], 3, asked["size"], asked["size"]).to(dtype)
    before = _resident("VmRSS")
    laps.lap("model")
    try:
        with torch.inference_mode():
            call = PEERS[asked["peer"]](model, x)
            laps.lap("build")
            out = call()
            laps.lap("first call")
            first = _resident("VmHWM") - before
            forgotten = _forget_peak()
            for _ in range(_CALLS):
                call()
    except Unavailable as error:
        print(json.dumps({"reason": str(error)}))
        return
    del laps.ms["model"]  # everybody has one
    memory = {
        "before": before,
        "to_first_result": first,
        "calls": _resident("VmHWM") - before if forgotten else None,
    }
    reason = _why_wrong(out, model, x)
    print(json.dumps({"reason": reason, "phases_ms": laps.ms, "memory_mb": memory}))


if __name__ == "__main__":
    main()
