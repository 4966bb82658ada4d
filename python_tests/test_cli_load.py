"""``snv2 bench --load``: busy processes beside the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from _cli import run

psutil = pytest.importorskip("psutil")

from snv2_bench import benchmarking  # noqa: E402
from snv2_bench.load import busy_processes  # noqa: E402

_BENCH = ["bench", "--width", "x0.5", "--size", 32, "--repeats", 2, "--peer", "engine"]


def _busy() -> list[int]:
    """Ids of this process's busy children."""
    return [
        child.pid
        for child in psutil.Process().children()
        if child.is_running() and any("1_000_000" in word for word in child.cmdline())
    ]


def _watch(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[list[int]]:
    """Busy processes in each round; the second one raises ``error``."""
    seen: list[list[int]] = []
    whole_round = benchmarking.Comparison.time_round

    def time_round(self: benchmarking.Comparison) -> None:
        seen.append(_busy())
        if error is not None and len(seen) == 2:
            raise error
        whole_round(self)

    monkeypatch.setattr(benchmarking.Comparison, "time_round", time_round)
    return seen


@pytest.mark.parametrize(("count", "words"), [(1, "1 busy process"), (2, "2 busy processes")])
def test_they_run_while_it_measures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, words: str
) -> None:
    seen = _watch(monkeypatch)
    path = tmp_path / "out.json"
    result = run(*_BENCH, "--load", count, "--json", path)
    assert result.exit_code == 0, result.output
    assert f"x0.5, batch 1, fp32, 1 thread, beside {words} " in result.output
    assert f"under load: {words}, on " in result.output
    written = json.loads(path.read_text())
    assert written["settings"]["load"] == count
    assert {"p50", "p90"} <= written["rows"][0]["percentiles_ms"].keys()
    assert [len(ids) for ids in seen] == [count, count]
    assert seen[0] == seen[1]
    assert _busy() == []


def test_no_load_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _watch(monkeypatch)
    assert "busy process" not in run(*_BENCH).output
    assert seen == [[], []]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit("the machine went away"), 1)]
)
def test_they_are_gone_when_it_ends_early(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    seen = _watch(monkeypatch, error)
    assert run(*_BENCH, "--load", 2).exit_code == code
    assert [len(ids) for ids in seen] == [2, 2]
    assert _busy() == []


def test_they_outlive_no_process_that_is_killed() -> None:
    program = (
        "import time; from snv2_bench.load import busy_processes\n"
        "with busy_processes(2) as ids: print(*ids, flush=True); time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    busy = [psutil.Process(int(word)) for word in killed.stdout.readline().split()]
    killed.kill()
    killed.communicate()
    assert len(busy) == 2
    gone, alive = psutil.wait_procs(busy, timeout=30)
    assert len(gone) == 2, alive


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_one_that_ends_by_itself_is_told() -> None:
    """It is not missed in a result; Ctrl-C, which all are sent, ends none."""
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context(busy_processes(2))
        psutil.Process(ids[1]).send_signal(signal.SIGINT)
        killed = psutil.Process(ids[0])
        killed.kill()
        killed.wait(timeout=30)
        with pytest.raises(RuntimeError, match=rf"ended during the measurement: \[{ids[0]}\]"):
            stack.close()
    assert _busy() == []


@pytest.mark.parametrize("count", [-1, 10**4, "two"])
def test_a_number_that_is_none_is_refused(count: object) -> None:
    result = run(*_BENCH, "--load", count)
    assert result.exit_code == 2
    assert "--load" in result.output
