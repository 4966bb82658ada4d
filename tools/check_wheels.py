"""Installs a wheel as a stranger would, and runs tests of it there.

``python tools/check_wheels.py DIST TORCH...`` makes an environment of its own with this Python,
installs PyTorch (``TORCH...`` are pip's arguments) and the wheel of ``DIST`` that fits, and runs
tests on what was installed: nothing is imported from the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "wheel-venv"
PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "expecttest")
# Of what the extension module does: it watches modules, and is watched by the garbage collector.
TESTS = ("test_conversions.py", "test_freed.py")


def run(program: str, *arguments: str | Path) -> None:
    """Runs a program of the environment, outside the checkout; exits as it did if it fails."""
    command = [PLACE / "bin" / program, *arguments]
    done = subprocess.run([*map(str, command)], check=False, cwd=PLACE)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    dist, torch = Path(sys.argv[1]).resolve(), sys.argv[2:]
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE, with_pip=True)
    # Python compiles of it what is imported.
    run("pip", "install", "-q", "--no-compile", *torch)
    run("pip", "install", "-q", "--no-deps", "--no-index", "--find-links", dist, "snv2_kernels")
    run("pip", "install", "-q", "snv2_kernels[cli]", *PACKAGES)
    run("snv2", "info")
    run("snv2", "verify", "--quick", "--backend", "cpu")
    # The program pytest, unlike the module, leaves the working directory out of sys.path.
    tests = [ROOT / "python_tests" / name for name in TESTS]
    run("pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *tests)


if __name__ == "__main__":
    main()
