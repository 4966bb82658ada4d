"""Everything that needs a GPU, in one go of a few minutes:

    python benchmarks/gpu_batch.py --budget 420 --out out/gpu

Builds the CUDA kernels where they are not there, then tests and measures, the most telling first.
Each step has its own time limit and leaves ``NAME.log`` and mostly ``NAME.json``; ``index.json``
tells how each ended. After each step all of it is packed again into one archive, so that being cut
off loses only the rest. ``--dry-run`` runs the same steps without a GPU, small and on the emulator:
what it measures means nothing.

Where there is no network, run it in the folder that ``gpu_folder.py`` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMIT = ROOT / "COMMIT"  # of the folder that gpu_folder.py makes
GRACE_S = 5  # for a step to write what it has, after its limit
TAIL_CHARACTERS = 2000
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Said by tools that a machine does not let at its GPU.
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Device not supported")

PYTHON = sys.executable
SNV2 = [PYTHON, "-m", "snv2_bench"]
MEASURE = [PYTHON, str(ROOT / "benchmarks" / "gpu_measure.py")]
TESTS = ROOT / "python_tests"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its files.
        command: ``{out}`` stands for the folder of results.
        limit_s: after which it is stopped.
        least_s: not worth starting with less time left.
        environment: added to ours.
        needs: says why it cannot run, or None.
    """

    name: str
    command: list[str]
    limit_s: float
    least_s: float = 5
    environment: dict[str, str] = field(default_factory=dict)
    needs: Callable[[], str | None] = lambda: None


# What is there --------------------------------------------------------------------------------


def carried(folder: Path = ROOT / "site") -> list[str]:
    """Packages beside this checkout, each in a folder of its name, that are not installed here."""
    missing = []
    for package in sorted(folder.glob("*")):
        try:
            importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(package))
    return missing


def _environment() -> dict[str, str]:
    """Ours, with this checkout and what it carries on Python's path."""
    path = [
        str(ROOT),
        str(ROOT / "benchmarks"),
        *carried(),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _build_is_wanted() -> str | None:
    code = "import snv2_kernels; print(snv2_kernels.backends()['cuda'])"
    found = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, check=False, env=_environment()
    )
    return "not needed: the CUDA kernels are there" if found.stdout.startswith("ok") else None


def _in_path(program: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(program) else f"{program} is not in PATH"


def _capability() -> str:
    """The architecture of the GPU as CMake writes it, "90"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "80;90"
    return shown.splitlines()[0].strip().replace(".", "")


def _workers() -> list[str]:
    """Options of pytest for tests that share the GPU, each mostly busy on the CPU."""
    there = (ROOT / "site" / "pytest-xdist").is_dir() or importlib.util.find_spec("xdist")
    count = max(1, (os.cpu_count() or 1) - 2)
    return ["-n", str(count), "--dist", "worksteal"] if there else []


# Steps ----------------------------------------------------------------------------------------


def _tests(name: str, limit_s: float, least_s: float, marks: str, *arguments: str) -> Step:
    command = [PYTHON, "-m", "pytest", "-q", "-p", "gpu_results", "-m", marks]
    command += ["--results", f"{{out}}/{name}.jsonl"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    return Step(name, [*command, *arguments], limit_s, least_s, threads)


def _sanitizer(tool: str) -> Step:
    file = str(TESTS / "test_cuda.py")
    tests = _tests(tool, 60, 30, "gpu and sanitize", "-p", "no:xdist", "-o", "timeout=0", file)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests.command]
    # Caching would hide from the sanitizer where one tensor ends.
    uncached = tests.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, 60, 30, uncached, _in_path("compute-sanitizer"))


def _measured(
    kind: str, batch: int, dtype: str, limit_s: float, *options: str, least_s: float = 15
) -> Step:
    name = f"{kind}-b{batch}-{dtype}"
    command = [*MEASURE, options[0], "--batch", str(batch), "--dtype", dtype, *options[1:]]
    if batch > 8:
        command += ["--repeats", "10"]
    return Step(name, [*command, "--json", f"{{out}}/{name}.json"], limit_s, least_s)


def _peers(*names: str) -> list[str]:
    return [word for name in names for word in ("--peer", name)]


def _networks(batch: int, dtype: str) -> Step:
    peers = ["eager", "channels_last", "cuda_graph", "cuda_graph_channels_last", "fused", "engine"]
    return _measured("networks", batch, dtype, 40, "networks", *_peers(*peers))


def _autotune(batch: int, dtype: str) -> Step:
    """Autotuning takes a minute or more, so it is in a step of its own, beside the two it is
    measured by."""
    peers = _peers("eager", "engine", "max_autotune")
    return _measured("autotune", batch, dtype, 85, "networks", *peers, least_s=50)


def _launches(batch: int, dtype: str) -> Step:
    return _measured("launches", batch, dtype, 30, "launches")


def _stages(batch: int, width: str) -> list[Step]:
    """The same with all units in one launch, beside a launch for each."""
    apart, asked = ["--width", width, *_peers("engine")], ["--stages", "2"]
    kind = f"stages-{width}"
    return [
        _measured(f"{kind}-apart", batch, "fp16", 30, "networks", *apart),
        _measured(kind, batch, "fp16", 30, "networks", *apart, *asked),
        _measured(f"{kind}-launches", batch, "fp16", 30, "launches", "--width", width, *asked),
    ]


def _counters(batch: int, dtype: str) -> Step:
    """What the GPU counted in each launch, as a table and as a report for ncu-ui."""
    name = f"ncu-b{batch}-{dtype}"
    call = [*MEASURE, "launches", "--batch", str(batch), "--dtype", dtype, "--once"]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
                "InstructionStats", "LaunchStats", "Occupancy")  # fmt: skip
    profile = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--force-overwrite"]
    profile += [word for section in sections for word in ("--section", section)]
    profile += ["--export", f"{{out}}/{name}", *call]
    table = ["ncu", "--import", f"{{out}}/{name}.ncu-rep", "--page", "raw", "--csv"]
    line = f"{shlex.join(profile)} && {shlex.join(table)} > {{out}}/{name}.csv"
    return Step(name, ["sh", "-c", line], 60, 20, needs=_in_path("ncu"))


def _steps() -> list[Step]:
    """In order of value."""
    build = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    settings = {"SNV2_CUDA": "1", "SNV2_CUDA_ARCHITECTURES": _capability()}
    first = [(1, "fp16"), (256, "fp16")]
    rest = [(8, "fp16"), (64, "fp16"), (1, "fp32"), (256, "fp32"), (1, "bf16")]
    # Triton and torch.compile want a C compiler, others these tools: the log says what is there.
    tools = "for tool in cc nvcc ncu compute-sanitizer; do command -v $tool || echo no $tool; done"
    info = f"nvidia-smi; {tools}; {shlex.join([*SNV2, 'info'])}"
    few = ("test_modules", "test_auto_takes_cuda", "test_graph", "test_engine_replays_one_graph")
    on_gpu = ["--device", "cuda", "--json"]
    return [
        Step("build", build, 240, 60, settings, _build_is_wanted),
        Step("info", ["sh", "-c", info], 60),  # torch may come from a slow disk
        _tests("smoke", 60, 15, "gpu", *(f"{TESTS / 'test_cuda.py'}::{name}" for name in few)),
        *(_networks(*case) for case in first),
        *(_autotune(*case) for case in first),
        *(_launches(*case) for case in first),
        _tests("stages", 60, 15, "gpu", str(TESTS / "test_stages.py")),
        *(step for case in ((1, "x1.0"), (1, "x0.5"), (8, "x1.0")) for step in _stages(*case)),
        _counters(1, "fp16"),
        _tests("tests", 120, 40, "gpu and not triton", *_workers(), str(TESTS)),
        _tests("triton", 90, 30, "gpu and triton and not slow", *_workers(), str(TESTS)),
        *map(_sanitizer, SANITIZERS[:2]),
        *(_measured("ops", batch, "fp16", 40, "ops") for batch in (256, 8)),
        _counters(256, "fp16"),
        *map(_sanitizer, SANITIZERS[2:]),
        *(_networks(*case) for case in rest),
        Step("table8", [*SNV2, "table8", *on_gpu, "{out}/table8.json"], 60, 30),
        Step("guidelines", [*SNV2, "guidelines", *on_gpu, "{out}/guidelines.json"], 60, 30),
        *(_launches(*case) for case in rest),
        _tests("triton-slow", 240, 60, "gpu and triton and slow", *_workers(), str(TESTS)),
        *(_autotune(*case) for case in rest),
    ]


def _dry_steps() -> list[Step]:
    """The same commands, small, on the emulator."""
    emulated = {"SNV2_BACKEND": "cuda-emulated", "OMP_NUM_THREADS": "1"}
    small = ["--device", "cpu", "--repeats", "1"]
    tiny = ["--width", "x0.5", "--size", "8"]
    quick = [*small, "--quick", "--size", "8", "--json"]
    peers = _peers("eager", "cuda_graph", "fused")
    measured = [
        _measured("networks", 1, "fp16", 120, "networks", *small, *tiny, *peers),
        _measured("launches", 1, "fp16", 120, "launches", *small, *tiny),
        _measured("stages", 1, "fp16", 120, "launches", *small, *tiny, "--stages", "2"),
        _measured("ops", 1, "fp16", 120, "ops", *small, "--quick"),
        Step("table8", [*SNV2, "table8", "--peer", "eager", *quick, "{out}/table8.json"], 120),
    ]  # fmt: skip
    absent = "left out of dry runs"
    return [
        Step("info", [*SNV2, "info"], 60),
        _tests("smoke", 120, 5, "gpu and sanitize", "-n", "0", str(TESTS / "test_cuda.py")),
        *(Step(s.name, s.command, s.limit_s, s.least_s, emulated) for s in measured),
        _tests("tests", 240, 5, "gpu and not triton", *_workers(), str(TESTS)),  # all skipped
        Step("memcheck", [], 60, needs=lambda: absent),
    ]


# Running them ---------------------------------------------------------------------------------


class Batch:
    """Runs steps, and keeps ``index.json`` and the archive.

    Args:
        out: folder of the results.
        budget_s: for all steps together.
        dry_run: noted in the index.
        archive: of ``out``; by default ``OUT.tar.gz``.
    """

    def __init__(
        self, out: Path, budget_s: float, dry_run: bool, archive: Path | None = None
    ) -> None:
        self._out, self._end = out, time.monotonic() + budget_s
        self._archive = archive or out.with_name(f"{out.name}.tar.gz")
        self.index: dict[str, Any] = {
            "schema": 1,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "budget_s": budget_s,
            "dry_run": dry_run,
            "commit": COMMIT.read_text().strip() if COMMIT.is_file() else None,
            "steps": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def run(self, steps: list[Step]) -> bool:
        """Runs all that there is time for; whether none failed. All steps stand in the index from
        the start."""
        rows = [{"name": step.name, "status": "not reached", "seconds": 0.0} for step in steps]
        self.index["steps"] = rows
        self._write()
        for step, row in zip(steps, rows, strict=True):
            try:
                self._run_step(step, row)
            finally:
                self._pack()
            print(f"{step.name}: {row['status']}, {row['seconds']:.1f} s", flush=True)
        return not any(row["status"] in ("failed", "timed out") for row in rows)

    def _run_step(self, step: Step, row: dict[str, Any]) -> None:
        left_s = self._end - time.monotonic()
        limit_s = min(step.limit_s, left_s)
        if limit_s < step.least_s:
            reason = f"no time left: it takes {step.least_s:.0f} s or more"
        else:
            reason = step.needs()
        if reason is not None:
            row |= {"status": "left out", "reason": reason}
            self._write()
            return
        for old in self._out.glob(f"{step.name}.*"):
            old.unlink()
        command = [word.replace("{out}", str(self._out)) for word in step.command]
        start = time.monotonic()
        log = self._out / f"{step.name}.log"
        log.touch()
        try:
            row |= {"status": "running", "command": command, "limit_s": limit_s}
            self._write()
            row |= self._run_command(command, log, limit_s, step.environment)
        finally:
            if row["status"] == "running":  # we are being stopped
                row["status"] = "interrupted"
            row["seconds"] = round(time.monotonic() - start, 2)
            row["log"] = log.name
            text = log.read_text(errors="replace")
            row["log_tail"] = text[-TAIL_CHARACTERS:]
            refused = [word for word in REFUSED if word in text]
            if row["status"] == "failed" and refused:
                row |= {"status": "left out", "reason": f"not permitted here: {refused[0]}"}
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
                    cwd=ROOT, env=_environment() | environment, start_new_session=True,
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

    def _write_test_result(self, step: Step) -> None:
        """``NAME.json`` from ``NAME.jsonl`` of gpu_results.py, whose last line may be cut."""
        report = self._out / f"{step.name}.jsonl"
        if not report.exists():
            return
        outcomes: dict[str, str] = {}
        for line in report.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                if outcomes.get(row["test"]) != "failed":  # a test may also fail when it ends
                    outcomes[row["test"]] = row["outcome"]
        tests = {
            outcome: [test for test, o in outcomes.items() if o == outcome]
            for outcome in ("passed", "skipped", "failed")
        }
        summary = {
            "passed": len(tests["passed"]),
            "skipped": len(tests["skipped"]),
            "failed": tests["failed"],
        }
        report.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")

    def _write(self) -> None:
        """Whole or not at all, however this process ends."""
        path = self._out / "index.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.index, indent=2) + "\n")
        unfinished.replace(path)

    def _pack(self) -> None:
        """Likewise."""
        unfinished = self._archive.with_name(f"{self._archive.name}.tmp")
        with tarfile.open(unfinished, "w:gz", compresslevel=5) as archive:
            archive.add(self._out, self._out.name)
        unfinished.replace(self._archive)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Build, test and measure on one GPU.

    Returns:
        1 if a step failed or timed out.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/gpu", type=Path, help="folder of the results")
    parser.add_argument("--archive", type=Path, help="of that folder; by default OUT.tar.gz")
    parser.add_argument("--budget", default=420.0, type=float, help="seconds for everything")
    parser.add_argument(
        "--only", action="append", help="only steps whose name begins so; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and their limits")
    parser.add_argument("--dry-run", action="store_true", help="small, without a GPU")
    asked = parser.parse_args(arguments)
    steps = _dry_steps() if asked.dry_run else _steps()
    if asked.only:
        steps = [step for step in steps if step.name.startswith(tuple(asked.only))]
        if not steps:
            parser.error(f"--only: no step begins with {' or '.join(asked.only)}")
    if asked.list:
        for step in steps:
            print(f"{step.name:20} {step.limit_s:4.0f} s, worth starting for {step.least_s:.0f} s")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    # A shell's background jobs ignore it, and what they start would too.
    signal.signal(signal.SIGINT, _stop)
    archive = asked.archive and asked.archive.resolve()
    try:
        batch = Batch(asked.out.resolve(), asked.budget, asked.dry_run, archive)
        return 0 if batch.run(steps) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
