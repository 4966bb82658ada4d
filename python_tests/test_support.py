"""docs/support.md is what tools/support.py makes of the tests of today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "support.py"


def test_page_is_up_to_date() -> None:
    # In a process of its own, since a collection imports all over again.
    out = subprocess.run(
        [sys.executable, SCRIPT, "--check"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
