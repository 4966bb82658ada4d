"""Everything that needs a GPU, in one go of at most ten minutes:

    python benchmarks/gpu_batch.py --out out/gpu

Builds the CUDA kernels where they are not there, runs the tests that need hardware and the
sanitizer, then measures, the most telling first. Each step has its own time limit and leaves
``NAME.log`` and mostly ``NAME.json``; ``index.json`` tells how each ended, and is written at once,
so that being cut off loses only the rest. ``--dry-run`` runs the same steps without a GPU, small
and on the emulator: what it measures means nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 5  # for a step to write what it has, after its limit
LEAST_S = 5  # that a step is worth starting for
TAIL_CHARACTERS = 2000
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

PYTHON = sys.executable
SNV2 = [PYTHON, "-m", "snv2_kernels"]
MEASURE = [PYTHON, str(ROOT / "benchmarks" / "gpu_measure.py")]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its files.
        command: ``{out}`` stands for the folder of results.
        limit_s: after which it is stopped.
        environment: added to ours.
        needs: says why it cannot run, or None.
    """

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: Callable[[], str | None] = lambda: None


def _kernels_missing() -> bool:
    code = "import snv2_kernels; print(snv2_kernels.backends()['cuda'])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return not found.stdout.startswith("ok")


def _build_is_wanted() -> str | None:
    return None if _kernels_missing() else "not needed: the CUDA kernels are there"


def _no_sanitizer() -> str | None:
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not in PATH"


def _capability() -> str:
    """The architecture of the GPU as CMake writes it, "90"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "80;90"
    return shown.splitlines()[0].strip().replace(".", "")


def _tests(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", f"--junitxml={{out}}/{name}.xml", *arguments]


def _sanitizer(tool: str, limit_s: float) -> Step:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += _tests(tool, "-m", "gpu and sanitize", "-p", "no:xdist", "-o", "timeout=0")
    # Caching would hide from the sanitizer where one tensor ends.
    return Step(tool, command, limit_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, _no_sanitizer)


def _networks(batch: int, dtype: str, limit_s: float, *, compiled: bool = False) -> Step:
    """Autotuning takes minutes, so it is in steps of its own, beside the two it is measured by."""
    peers = ["eager", "channels_last", "cuda_graph", "cuda_graph_channels_last", "fused", "engine"]
    if compiled:
        peers = ["eager", "engine", "max_autotune"]
    name = f"{'autotune' if compiled else 'networks'}-b{batch}-{dtype}"
    command = [*MEASURE, "networks", "--batch", str(batch), "--dtype", dtype]
    command += [word for peer in peers for word in ("--peer", peer)]
    return Step(name, [*command, "--json", f"{{out}}/{name}.json"], limit_s)


def _steps() -> list[Step]:
    """In order of value."""
    build = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    settings = {"SNV2_CUDA": "1", "SNV2_CUDA_ARCHITECTURES": _capability()}
    cases = [(batch, dtype) for batch in (1, 8, 64, 512) for dtype in ("fp16", "fp32")]
    on_gpu = ["--device", "cuda", "--plot", "{out}", "--json"]
    return [
        Step("build", build, 240, settings, _build_is_wanted),
        Step("info", [*SNV2, "info"], 30),
        Step("tests", _tests("tests", "-m", "gpu"), 150),
        _sanitizer("memcheck", 60),
        _sanitizer("racecheck", 60),
        *(_networks(batch, dtype, 40) for batch, dtype in cases),
        _networks(1, "fp16", 90, compiled=True),
        *(
            Step(
                f"ops-b{batch}",
                [*MEASURE, "ops", "--batch", str(batch), "--json", f"{{out}}/ops-b{batch}.json"],
                40,
            )
            for batch in (512, 8)
        ),
        Step("table8", [*SNV2, "table8", *on_gpu, "{out}/table8.json"], 60),
        Step("guidelines", [*SNV2, "guidelines", *on_gpu, "{out}/guidelines.json"], 60),
        *(_networks(*case, 90, compiled=True) for case in cases if case != (1, "fp16")),
        _sanitizer("initcheck", 60),
        _sanitizer("synccheck", 60),
    ]


def _dry_steps() -> list[Step]:
    """The same commands, small, on the emulator."""
    emulated = {"SNV2_BACKEND": "cuda-emulated", "OMP_NUM_THREADS": "1"}
    small = ["--device", "cpu", "--repeats", "1"]
    names = ["eager", "cuda_graph", "fused"]
    peers = [word for name in names for word in ("--peer", name)]
    quick = [*small, "--quick", "--size", "8", "--json"]
    test_file = str(ROOT / "python_tests" / "test_cuda.py")
    network = [*MEASURE, "networks", *small, "--width", "x0.5", "--size", "8", *peers]
    return [
        Step("info", [*SNV2, "info"], 60),
        Step("tests", _tests("tests", "-m", "gpu and sanitize", "-n", "0", test_file), 120),
        Step("memcheck", [], 60, {}, lambda: "left out of dry runs"),
        Step(
            "networks-b1-fp16",
            [*network, "--json", "{out}/networks-b1-fp16.json"],
            120,
            emulated,
        ),
        Step("ops-b1", [*MEASURE, "ops", *small, "--quick", "--json", "{out}/ops-b1.json"], 120,
             emulated),
        Step("table8", [*SNV2, "table8", "--peer", "eager", *quick, "{out}/table8.json"], 120,
             emulated),
        Step("guidelines", [*SNV2, "guidelines", "--table", "G1", *quick,
                            "{out}/guidelines.json"], 120, emulated),
    ]  # fmt: skip


class Batch:
    """Runs steps and keeps ``index.json``.

    Args:
        out: folder of the results.
        budget_s: for all steps together.
        dry_run: noted in the index.
    """

    def __init__(self, out: Path, budget_s: float, dry_run: bool) -> None:
        self._out, self._end = out, time.monotonic() + budget_s
        self.index: dict[str, Any] = {
            "schema": 1,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "budget_s": budget_s,
            "dry_run": dry_run,
            "steps": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def run(self, steps: list[Step]) -> bool:
        """Whether none failed. All steps stand in the index from the start."""
        rows = [{"name": step.name, "status": "not reached", "seconds": 0.0} for step in steps]
        self.index["steps"] = rows
        self._write()
        for step, row in zip(steps, rows, strict=True):
            self._run_step(step, row)
            print(f"{step.name}: {row['status']}, {row['seconds']:.1f} s", flush=True)
        return not any(row["status"] in ("failed", "timed out") for row in rows)

    def _run_step(self, step: Step, row: dict[str, Any]) -> None:
        limit_s = min(step.limit_s, self._end - time.monotonic())
        reason = "no time left" if limit_s < LEAST_S else step.needs()
        if reason is not None:
            row |= {"status": "left out", "reason": reason}
            self._write()
            return
        for old in self._files(step):
            old.unlink(missing_ok=True)
        command = [word.replace("{out}", str(self._out)) for word in step.command]
        row |= {"status": "running", "command": command, "limit_s": limit_s}
        self._write()
        start = time.monotonic()
        log = self._out / f"{step.name}.log"
        try:
            row |= self._run_command(command, log, limit_s, step.environment)
        finally:
            if row["status"] == "running":  # we are being stopped
                row["status"] = "interrupted"
            row["seconds"] = round(time.monotonic() - start, 2)
            row["log"] = log.name
            row["log_tail"] = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
            self._write_test_result(step)
            result = self._out / f"{step.name}.json"
            row["result"] = result.name if result.exists() else None
            self._write()

    def _run_command(
        self, command: list[str], log: Path, limit_s: float, environment: dict[str, str]
    ) -> dict[str, Any]:
        """In a group of its own, which is gone afterwards."""
        with log.open("wb") as file:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    cwd=ROOT, env=os.environ | environment, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                file.write(f"{error}\n".encode())
                return {"status": "failed", "returncode": None}
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGINT)  # commands write what they have
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                return {"status": "timed out", "returncode": None}
            finally:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        return {"status": "failed" if code else "ok", "returncode": code}

    def _files(self, step: Step) -> list[Path]:
        return [self._out / f"{step.name}.{ending}" for ending in ("log", "json", "xml")]

    def _write_test_result(self, step: Step) -> None:
        """``NAME.json`` from pytest's XML."""
        _, result, report = self._files(step)
        if not report.exists():
            return
        outcomes: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                outcomes["failed"].append(f"{case.get('classname')}::{case.get('name')}")
            else:
                outcomes["skipped" if "skipped" in kinds else "passed"] += 1
        result.write_text(json.dumps(outcomes, indent=2) + "\n")

    def _write(self) -> None:
        """Whole or not at all, however this process ends."""
        path = self._out / "index.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.index, indent=2) + "\n")
        unfinished.replace(path)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.command()
@click.option(
    "--out", default="out/gpu", show_default=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results.",
)  # fmt: skip
@click.option(
    "--budget", default=590.0, show_default=True, type=click.FloatRange(min=0),
    help="Seconds for everything.",
)  # fmt: skip
@click.option("--only", multiple=True, help="Only steps whose name begins so. May be repeated.")
@click.option("--list", "list_steps", is_flag=True, help="Print the steps and their limits.")
@click.option("--dry-run", is_flag=True, help="Small, without a GPU.")
def main(out: Path, budget: float, only: tuple[str, ...], list_steps: bool, dry_run: bool) -> None:
    """Build, test and measure on one GPU. The exit code is 1 if a step failed or timed out."""
    steps = _dry_steps() if dry_run else _steps()
    if only:
        steps = [step for step in steps if step.name.startswith(only)]
        if not steps:
            raise click.BadParameter("no such step", param_hint="--only")
    if list_steps:
        for step in steps:
            print(f"{step.name:20} {step.limit_s:4.0f} s")
        return
    signal.signal(signal.SIGTERM, _stop)
    # A shell's background jobs ignore it, and what they start would too.
    signal.signal(signal.SIGINT, _stop)
    try:
        sys.exit(0 if Batch(out.resolve(), budget, dry_run).run(steps) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
