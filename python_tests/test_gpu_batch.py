"""The batch of everything that needs a GPU: its steps, what it keeps however it ends, and the
folder that it runs in elsewhere."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
from _benchmarks import FOLDER, load

import snv2_kernels as snv2
from snv2_kernels.runners import Launch

SCRIPT = FOLDER / "gpu_batch.py"


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    return load("gpu_batch")


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    return load("gpu_measure")


def _index(out: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((out / "index.json").read_text())
    return index


def _shell(batch: ModuleType, name: str, command: str, limit_s: float = 60, **more: Any) -> Any:
    return batch.Step(name, ["sh", "-c", command], limit_s, **more)


def _packed(archive: Path) -> set[str]:
    with tarfile.open(archive) as file:
        return {Path(name).name for name in file.getnames()}


def _packages_that_a_gpu_machine_lacks() -> list[str]:
    """Names to import, of all that is installed here."""
    carried = load("gpu_folder").PACKAGES
    plugins = [  # which these two import, asked or not
        entry.dist.name
        for group in ("pytest11", "hypothesis")
        for entry in importlib.metadata.entry_points(group=group)
        if entry.dist
    ]
    found = {"snv2-kernels"}
    there = ["torch", "numpy", "triton", *carried, *plugins]
    while there:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", there.pop())[0]).lower()
        if name not in found:
            found.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                needed = importlib.metadata.requires(name) or []
                there += [package for package in needed if "extra ==" not in package]
    return [
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if module.isidentifier()
        and not {re.sub(r"[-_.]+", "-", package).lower() for package in packages} & found
    ]


@pytest.mark.slow
@pytest.mark.ci
def test_dry_run(tmp_path: Path) -> None:
    """Every step of the real run's kinds, with what it writes, where nothing is installed but what
    a GPU machine has and what the folder carries."""
    missing = _packages_that_a_gpu_machine_lacks()
    assert "pydantic" in missing
    absent = "raise ModuleNotFoundError(__name__, name=__name__)"
    for name in missing:
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text(absent)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--budget", "580", "--out", out],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "without")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    index = _index(out)
    assert done.returncode == 0, index
    assert index["dry_run"]
    steps = {step["name"]: step for step in index["steps"]}
    assert steps.pop("memcheck")["status"] == "left out"
    assert {step["status"] for step in steps.values()} == {"ok"}
    assert _packed(tmp_path / "out.tar.gz") == {"out", *(path.name for path in out.iterdir())}
    assert "cuda-emulated" in (out / steps["info"]["log"]).read_text()
    tests = json.loads((out / "smoke.json").read_text())
    assert tests["failed"] == []
    assert tests["passed"] + tests["skipped"] == 5
    tests = json.loads((out / "tests.json").read_text())
    assert tests["failed"] == []
    assert tests["passed"] + tests["skipped"] > 500
    peers = {row["peer"]: row for row in _rows(out, "networks-b1-fp16", "rows")}
    assert peers["fused"]["reason"] is None
    assert "need a GPU" in peers["cuda_graph"]["reason"]
    launches = json.loads((out / "launches-b1-fp16.json").read_text())
    assert launches["error"] <= launches["error_bound"]
    ops = _rows(out, "ops-b1-fp16", "ops")
    assert len(ops) == 6
    for row in ops:
        assert row["reason"] is None
        speed = row["least_bytes"] / row["median_ms"] * 1e3
        assert row["bytes_per_s"] == pytest.approx(speed, rel=1e-3)
    assert len(_rows(out, "table8", "table8")) == 8


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
    child = tmp_path / "child"
    hangs = f"sleep 300 & echo $! > {child}; trap 'echo stopped' INT; wait; wait"
    writes = f"trap 'echo half > {tmp_path}/writes.json; exit' INT; sleep 300 & wait"
    monkeypatch.setattr(batch, "GRACE_S", 2)
    steps = [
        _shell(batch, "hangs", hangs, 3, least_s=0),
        _shell(batch, "writes", writes, 3, least_s=0),
    ]
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
    """A step gets what is left, and is not begun where that is too little for it; others are."""
    steps = [
        _shell(batch, "cut", "exit 0", 1000),
        _shell(batch, "long", "exit 1", 200, least_s=100),
        _shell(batch, "short", "exit 0"),
    ]
    assert batch.Batch(tmp_path, 60, False).run(steps)
    cut, long, short = _index(tmp_path)["steps"]
    assert cut["limit_s"] <= 60
    assert [cut["status"], long["status"], short["status"]] == ["ok", "left out", "ok"]
    assert long["reason"] == "no time left: it takes 100 s or more"


def test_tool_that_is_not_permitted(batch: ModuleType, tmp_path: Path) -> None:
    """Is left out; the machine is no reason to call the run failed."""
    said = "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1"
    assert batch.Batch(tmp_path, 60, False).run([_shell(batch, "ncu", said)])
    (row,) = _index(tmp_path)["steps"]
    assert row["reason"] == "not permitted here: ERR_NVGPUCTRPERM"


def test_archive_has_what_ended(batch: ModuleType, tmp_path: Path) -> None:
    """Also while a later step runs, which may be the last that anyone hears of it."""
    out, archive = tmp_path / "out", tmp_path / "home" / "results.tar.gz"
    archive.parent.mkdir()
    seen = tmp_path / "seen.tar.gz"
    steps = [_shell(batch, "first", "echo done"), _shell(batch, "second", f"cp {archive} {seen}")]
    assert batch.Batch(out, 60, False, archive).run(steps)
    assert _packed(seen) == {"out", "index.json", "first.log"}
    assert _packed(archive) == {"out", "index.json", "first.log", "second.log"}
    assert list(archive.parent.iterdir()) == [archive]


def test_carried_packages_are_used_where_they_are_not_installed(
    batch: ModuleType, tmp_path: Path
) -> None:
    for name in ("pytest", "no-such-package"):
        (tmp_path / name).mkdir()
    assert batch.carried(tmp_path) == [str(tmp_path / "no-such-package")]


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
        f"sys.exit(batch.main(['--out', {str(tmp_path)!r}]))\n"
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
    archive = tmp_path.with_name(f"{tmp_path.name}.tar.gz")
    assert {"a.log", "b.log", "index.json"} < _packed(archive)
    archive.unlink()


ENDING = """
import os, pathlib, pytest, signal, time

@pytest.mark.parametrize("i", range(3))
def test_of(i):
    if i == 2:
        pytest.skip("not here")
    assert i != 1

@pytest.fixture
def broken():
    yield
    raise ValueError("at its end")

def test_that_ends_badly(broken):
    pass

def test_last():
    while len(pathlib.Path("RESULTS").read_text().splitlines()) < 5:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_results_of_tests_that_were_cut_off(
    batch: ModuleType, tmp_path: Path, workers: list[str]
) -> None:
    """Each is known that ended, with its failure."""
    if workers:
        pytest.importorskip("xdist")
    tests, results = tmp_path / "test_some.py", tmp_path / "out" / "tests.jsonl"
    tests.write_text(ENDING.replace("RESULTS", str(results)))
    options = ["--rootdir", str(tmp_path), "-c", os.devnull, str(tests)]
    step = batch._tests("tests", 60, 1, "", *workers, *options)
    assert not batch.Batch(results.parent, 60, False).run([step])
    assert _index(results.parent)["steps"][0]["returncode"] == -signal.SIGKILL
    written = json.loads(results.with_suffix(".json").read_text())
    assert (written["passed"], written["skipped"]) == (1, 1)
    bad = [test.rpartition("::")[2] for test in written["failed"]]
    assert sorted(bad) == ["test_of[1]", "test_that_ends_badly"]
    assert "assert 1 != 1" in results.read_text()


def test_real_steps(batch: ModuleType) -> None:
    """In order of value, each file named once; what is measured is what the commands take."""
    steps = batch._steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    first = ["networks-b1-fp16", "networks-b256-fp16", "autotune-b1-fp16", "autotune-b256-fp16"]
    assert names[:7] == ["build", "info", "smoke", *first]
    then = ["launches-b1-fp16", "ncu-b1-fp16", "tests", "triton", "memcheck", "ops-b256-fp16"]
    assert sorted(then, key=names.index) == then
    for step in steps:
        measured = [word for word in step.command if word.endswith(".json")]
        assert measured in ([], [f"{{out}}/{step.name}.json"])
        assert step.least_s < step.limit_s


# Launches -------------------------------------------------------------------------------------


def _launch(kernel: str, launches: int) -> Launch:
    return Launch(kernel, 0, 1, 32, 0, 8, True, launches, 60, 60, 60, 60)


def test_times_of_launches(measure: ModuleType) -> None:
    """Medians over calls, in order; a kernel may start before the one before it has ended."""
    sequence = measure.sequence_of([_launch("a", 2), _launch("b", 2), _launch("linear", 1)])
    assert [launch.kernel for launch in sequence] == ["a", "b", "a", "b", "linear"]
    ends = [0.0, 4.0, 5.0, 9.0, 10.0, 16.0]
    events = [
        (f"snv2 {launch.kernel}", call * 100 + ends[i] - (i > 0), call * 100 + ends[i + 1])
        for call in range(3)
        for i, launch in enumerate(sequence)
    ]
    rows = measure.launch_rows(sequence, events)
    assert [row["adds_us"] for row in rows] == [4.0, 1.0, 4.0, 1.0, 6.0]
    assert [row["us"] for row in rows] == [4.0, 2.0, 5.0, 2.0, 7.0]
    assert [row["read_bytes"] for row in rows] == [30, 30, 30, 30, 60]
    with pytest.raises(ValueError, match="14 kernels were seen, expected 5 in each call"):
        measure.launch_rows(sequence, events[:-1])


def test_launches_are_not_told_of_a_wrong_output(
    measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are in their right number, in the one call of profilers too."""
    path = tmp_path / "launches.json"
    arguments = ["launches", "--device", "cpu", "--width", "x0.5", "--size", "8", "--dtype", "fp32"]
    arguments += ["--json", str(path), "--once"]
    with snv2.use_backend("cuda-emulated"):
        measure.main(arguments, standalone_mode=False)
        assert json.loads(path.read_text())["reason"] == "launches are timed on a GPU"
        monkeypatch.setattr(measure, "float64_reference", lambda model: lambda x: x.sum() * 0 + 1)
        monkeypatch.setattr(measure, "max_error", lambda actual, exact: float("nan"))
        with pytest.raises(SystemExit):
            measure.main(arguments, standalone_mode=False)
    result = json.loads(path.read_text())
    assert result["reason"].startswith("wrong output: error nan")
    assert result["launches"] == []


# The folder -----------------------------------------------------------------------------------


def test_folder_names_what_an_installation_names(tmp_path: Path) -> None:
    """Its commit, and the entry points of the package, which torch looks up."""
    folder = load("gpu_folder")
    folder.copy_checkout(tmp_path)
    folder.write_entry_points(tmp_path)
    assert (tmp_path / "benchmarks" / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    assert len((tmp_path / "COMMIT").read_text().partition("-")[0].strip()) == 40
    (package,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert package.version == snv2.__version__
    assert "torch_dynamo_backends" in {entry.group for entry in package.entry_points}


# Triton on a GPU ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["gpu", "no-gpu"])
def test_triton_tests_are_gpu_tests_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Whether a parameter of theirs names the backend, or a fixture."""
    marks: dict[str, list[str]] = {"parameter": [], "fixture": [], "other": []}

    def item(name: str, params: dict[str, Any], fixtures: list[str]) -> SimpleNamespace:
        return SimpleNamespace(
            location=("file", 0, name), callspec=SimpleNamespace(params=params),
            fixturenames=fixtures, add_marker=marks[name].append,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    items = [
        item("parameter", {"backend": "triton"}, ["backend"]),
        item("fixture", {}, ["triton"]),
        item("other", {"backend": "cuda"}, ["backend"]),
    ]
    conftest._mark_triton(items)  # type: ignore[arg-type]
    expected = ["triton", "gpu"] if there else ["triton"]
    assert marks == {"parameter": expected, "fixture": expected, "other": []}
