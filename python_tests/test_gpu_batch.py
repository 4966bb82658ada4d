"""The batch of everything that needs a GPU: its steps, and what it keeps however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_batch.py"


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_batch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_batch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _index(out: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((out / "index.json").read_text())
    return index


def _shell(batch: ModuleType, name: str, command: str, limit_s: float = 60, **more: Any) -> Any:
    return batch.Step(name, ["sh", "-c", command], limit_s, **more)


def test_dry_run(tmp_path: Path) -> None:
    """Every step of the real run's kinds, with what it writes."""
    command = [sys.executable, SCRIPT, "--dry-run", "--budget", "580", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    index = _index(tmp_path)
    assert done.returncode == 0, index
    assert index["dry_run"]
    steps = {step["name"]: step for step in index["steps"]}
    assert steps.pop("memcheck")["status"] == "left out"
    assert {step["status"] for step in steps.values()} == {"ok"}
    assert "cuda-emulated" in (tmp_path / steps["info"]["log"]).read_text()
    tests = json.loads((tmp_path / "tests.json").read_text())
    assert tests["failed"] == []
    assert tests["passed"] + tests["skipped"] == 5
    peers = {row["peer"]: row for row in _rows(tmp_path, "networks-b1-fp16", "rows")}
    assert peers["fused"]["reason"] is None
    assert "need a GPU" in peers["cuda_graph"]["reason"]
    ops = _rows(tmp_path, "ops-b1", "ops")
    assert len(ops) == 6
    for row in ops:
        assert row["reason"] is None
        assert row["bytes_per_s"] == pytest.approx(row["least_bytes"] / row["median_ms"] * 1e3)
    assert {row["table"] for row in _rows(tmp_path, "guidelines", "guidelines")} == {"G1"}
    assert len(_rows(tmp_path, "table8", "table8")) == 8


def _rows(out: Path, name: str, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / f"{name}.json").read_text())[key]
    return rows


def test_steps_are_on_their_own(batch: ModuleType, tmp_path: Path) -> None:
    """One that fails, or cannot start or run, does not stop the others."""
    steps = [
        _shell(batch, "bad", "echo oh dear; exit 3"),
        batch.Step("absent", ["no-such-program"], 60),
        _shell(batch, "needy", "exit 1", needs=lambda: "no such thing here"),
        _shell(batch, "good", 'echo "{}" > "$WHERE/good.json"; pwd', environment={
            "WHERE": str(tmp_path)}),
    ]  # fmt: skip
    (tmp_path / "bad.json").write_text("of an earlier run")
    assert not batch.Batch(tmp_path, 60, False).run(steps)
    bad, absent, needy, good = _index(tmp_path)["steps"]
    assert (bad["status"], bad["returncode"], bad["result"]) == ("failed", 3, None)
    assert bad["log_tail"] == "oh dear\n"
    assert absent["status"] == "failed"
    assert "no-such-program" in absent["log_tail"]
    assert (needy["status"], needy["reason"]) == ("left out", "no such thing here")
    assert (good["status"], good["result"]) == ("ok", "good.json")
    assert good["log_tail"].strip() == str(SCRIPT.parents[1])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As the command is: where tests are a shell's job in the background, SIGINT is ignored, and
    would be by all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_time_limit_ends_the_whole_group(
    batch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives it a chance to write what it has."""
    monkeypatch.setattr(batch, "LEAST_S", 0)
    child = tmp_path / "child"
    hangs = f"sleep 300 & echo $! > {child}; trap 'echo stopped' INT; wait; wait"
    writes = f"trap 'echo half > {tmp_path}/writes.json; exit' INT; sleep 300 & wait"
    monkeypatch.setattr(batch, "GRACE_S", 2)
    steps = [_shell(batch, "hangs", hangs, 3), _shell(batch, "writes", writes, 3)]
    start = time.monotonic()
    assert not batch.Batch(tmp_path, 60, False).run(steps)
    assert time.monotonic() - start < 30
    first, second = _index(tmp_path)["steps"]
    assert first["status"] == second["status"] == "timed out"
    assert first["log_tail"] == "stopped\n"
    assert second["result"] == "writes.json"
    with pytest.raises(ProcessLookupError):
        _wait_until_gone(int(child.read_text()))


def _wait_until_gone(process: int) -> None:
    for _ in range(100):
        os.kill(process, 0)
        # It stays as a zombie where nobody reaps orphans.
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


def test_budget(batch: ModuleType, tmp_path: Path) -> None:
    """A step gets what is left, and none is begun that has no time."""
    steps = [_shell(batch, "first", "exit 0", 1000), _shell(batch, "second", "exit 0")]
    runner = batch.Batch(tmp_path, 60, False)
    runner.run(steps[:1])
    assert _index(tmp_path)["steps"][0]["limit_s"] <= 60
    runner._end = time.monotonic() + 1
    assert runner.run(steps)
    assert [s["status"] for s in _index(tmp_path)["steps"]] == ["left out", "left out"]
    assert _index(tmp_path)["steps"][1]["reason"] == "no time left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_stopped_keeps_the_index(tmp_path: Path, number: int) -> None:
    code = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('gpu_batch', {str(SCRIPT)!r})\n"
        "batch = sys.modules['gpu_batch'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(batch)\n"
        "steps = [batch.Step('a', ['true'], 60), batch.Step('b', ['sleep', '300'], 400),\n"
        "         batch.Step('c', ['true'], 60)]\n"
        "batch._steps = lambda: steps\n"
        f"batch.main(['--out', {str(tmp_path)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(600):
            index = tmp_path / "index.json"
            if index.exists() and _index(tmp_path)["steps"][1]["status"] == "running":
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == 130
    finally:
        process.kill()
    first, second, third = _index(tmp_path)["steps"]
    assert [s["status"] for s in (first, second, third)] == ["ok", "interrupted", "not reached"]


def test_results_of_tests(batch: ModuleType, tmp_path: Path) -> None:
    report = (
        '<testsuites><testsuite><testcase classname="t" name="good"/><testcase classname="t"'
        ' name="bad"><failure/></testcase><testcase classname="t" name="not"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    steps = [batch.Step("tests", ["sh", "-c", f"echo '{report}' > {{out}}/tests.xml; exit 1"], 60)]
    assert not batch.Batch(tmp_path, 60, False).run(steps)
    written = json.loads((tmp_path / "tests.json").read_text())
    assert written == {"passed": 1, "skipped": 1, "failed": ["t::bad"]}


def test_real_steps(batch: ModuleType, tmp_path: Path) -> None:
    """In order of value, each file named once; what is measured is what the commands take."""
    names = [step.name for step in batch._steps()]
    assert len(set(names)) == len(names)
    assert names[:5] == ["build", "info", "tests", "memcheck", "racecheck"]
    assert names.index("networks-b1-fp16") < names.index("ops-b512") < names.index("table8")
    assert {f"networks-b{b}-{t}" for b in (1, 8, 64, 512) for t in ("fp16", "fp32")} < set(names)
    assert {f"autotune-b{b}-{t}" for b in (1, 8, 64, 512) for t in ("fp16", "fp32")} < set(names)
    for step in batch._steps():
        measured = [word for word in step.command if word.endswith(".json")]
        assert measured in ([], [f"{{out}}/{step.name}.json"])
