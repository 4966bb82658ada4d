"""Processes that keep the machine busy beside a measurement."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["busy_processes"]

# It ends when the measuring process does, however that ends: its input is then closed. Ctrl-C is
# for the measurement, which ends it when it is done.
_PROGRAM = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print("busy", flush=True)
while True:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Keep ``count`` processes of one busy thread each running; their ids.

    They run before the body starts, and are gone when it has ended, failed or been interrupted.

    Raises:
        RuntimeError: if one cannot be started, or ended by itself while the body ran.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_busy_process()) for _ in range(count)]
        yield [process.pid for process in processes]
        ended = [process.pid for process in processes if process.poll() is not None]
        if ended:
            raise RuntimeError(f"busy processes ended during the measurement: {ended}")


@contextlib.contextmanager
def _busy_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "busy":
            raise RuntimeError(f"a busy process ended at its start, with status {process.wait()}")
        yield process
    finally:
        process.kill()
        process.communicate()
