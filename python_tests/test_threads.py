"""The threads of the CPU backend as Python sees them: results, forks, callers at once, the end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _cases import draw, threads

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_


def _pool_threads() -> int:
    """Threads of the CPU backend in this process."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name.strip() == "snv2" for name in names)


def _python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, which has some minutes to end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=os.environ | environment, timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


_CALL = """
    import os, sys, torch
    import snv2_kernels as snv2
    torch.manual_seed(0)
    model = snv2.models.shufflenet_v2_x0_5().eval()
    engine = snv2.Engine(model, (1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    torch.set_num_threads(2)
    y = engine(x).clone()
"""


def test_results_are_those_of_torchs_pool_bit_for_bit(tmp_path: Path) -> None:
    """With each number of threads, which says how work is cut and so how it is rounded."""
    program = (
        _CALL
        + """
    fused, results = snv2.fuse(model), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results += [engine(x).clone(), fused(x), fused(x.repeat(5, 1, 1, 1))]
    torch.save(results, os.environ["OUT"])
"""
    )
    for pool in ("own", "torch"):
        done = _python(program, SNV2_POOL=pool, OUT=str(tmp_path / pool))
        assert done.returncode == 0, done.stderr
    own, torchs = (torch.load(tmp_path / pool) for pool in ("own", "torch"))
    assert len(own) == 9
    assert all(map(torch.equal, own, torchs))


def test_a_pool_that_there_is_not_is_named() -> None:
    done = _python(_CALL, SNV2_POOL="opnemp")
    assert "SNV2_POOL: expected own or torch, got opnemp" in done.stderr


def test_several_callers_at_once_share_the_threads() -> None:
    """Each has as many as it asks for only while the others leave them."""
    model, x = randomize_(snv2.models.shufflenet_v2_x0_5().eval()), draw(1, 3, 64, 64)
    engines = [snv2.Engine(model, tuple(x.shape)) for _ in range(4)]
    with threads(3), ThreadPoolExecutor(len(engines)) as callers:
        expected = engines[0](x).clone()
        results = callers.map(lambda engine: [engine(x).clone() for _ in range(30)], engines)
        assert all(torch.equal(y, expected) for ys in results for y in ys)
    if sys.platform == "linux":
        assert _pool_threads() <= len(os.sched_getaffinity(0)) - 1


def test_a_call_in_a_parallel_region_of_openmp_runs_alone() -> None:
    """The region has a thread for each processor already."""
    done = _python(
        """
    import ctypes, os, pathlib, torch
    import snv2_kernels as snv2
    openmp = ctypes.CDLL(torch._C.__file__)
    if not hasattr(openmp, "GOMP_parallel") or not os.path.exists("/proc/self/task"):
        os._exit(77)
    torch.set_num_threads(2)
    engine = snv2.Engine(snv2.models.shufflenet_v2_x0_5().eval(), (1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    def workers():
        names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
        return names.count("snv2\\n")
    inside = []
    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        if openmp.omp_get_thread_num() == 0:
            inside.append((engine(x).clone(), workers()))
    openmp.GOMP_parallel(region, None, 2, 0)
    assert inside[0][1] == 0, inside[0][1]
    assert torch.equal(engine(x), inside[0][0])
    assert workers() == min(2, len(os.sched_getaffinity(0))) - 1
"""
    )
    if done.returncode == 77:
        pytest.skip("torch has another OpenMP, or the system no /proc")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_runs_in_threads_of_its_own() -> None:
    """As a worker of a DataLoader does, and as a child forked during a call."""
    done = _python(
        _CALL
        + """
    import multiprocessing, signal, threading

    def child():
        signal.alarm(60)
        os._exit(0 if all(torch.equal(engine(x), y) for _ in range(5)) else 1)

    def wait_for(pid):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    for _ in range(3):
        wait_for(os.fork() or child())
    def scores(i):
        return engine(x).tolist()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(each == y.tolist() for each in pool.map(scores, range(6)))

    other = snv2.Engine(snv2.models.shufflenet_v2_x0_5().eval(), (1, 3, 64, 64))
    stop = threading.Event()
    def call():
        while not stop.is_set():
            other(x)
    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(5):
        wait_for(os.fork() or child())
    stop.set()
    thread.join()
    assert torch.equal(engine(x), y)
"""
    )
    assert done.returncode == 0, done.stderr
