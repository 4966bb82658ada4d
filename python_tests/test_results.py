"""Files of results: written, read, compared; and README's table, which is made of one."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _cli import run
from _results import a_result, row

from snv2_bench.benchmarking import Measurement
from snv2_bench.cli.compare import differences_of
from snv2_bench.cli.files import ResultError, read_result, write_result
from snv2_bench.cli.results import new_result, rows_of

ROOT = Path(__file__).parents[1]

# The file -------------------------------------------------------------------------------------


def test_a_file_is_what_was_written_to_five_digits(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    written = a_result()
    written["floor"][0]["multiply_adds_per_s"] = 57.102129003e9
    write_result(written, path)
    read = read_result(path)
    assert read["floor"][0]["multiply_adds_per_s"] == 57.102e9
    written["floor"][0]["multiply_adds_per_s"] = 57.102e9
    assert read == written
    assert list(tmp_path.iterdir()) == [path]
    # A line for each row keeps files small, and differences of them readable.
    (line,) = [line for line in path.read_text().splitlines() if '"peer": "openvino"' in line]
    assert json.loads(line.rstrip(",")) == row("openvino", None, 2)


def test_a_new_result_is_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(new_result({"size": 32}), path)
    read = read_result(path)
    assert not read["interrupted"]
    assert read["machine"]["clock_mhz"] is None or read["machine"]["clock_mhz"] > 1
    assert read["machine"]["memory_gb"] > 0.1
    assert read["command"].startswith("snv2")


def test_a_pipe_is_written_to_and_a_link_stays(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "file.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    link.symlink_to(file)
    for path in (pipe, link):
        write_result(a_result(), path)
    assert pipe.is_fifo()
    assert os.read(reader, 1 << 16) == file.read_bytes()
    assert link.is_symlink()
    os.close(reader)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [(("machine",), None, "machine: Field required"),
     (("machine", "cpu"), None, "machine: names no cpu"),
     (("rows", 1, "median_ms"), "2.0", "rows.1.median_ms: Input should be a valid number"),
     (("rows", 1, "median_ms"), 0.0, "rows.1.median_ms: Input should be greater than"),
     (("rows", 0, "paired"), {"eager": {"p50": math.inf}}, "rows.0.paired.eager.p50: Input should"),
     (("rows", 0, "batch"), 1.5, "rows.0.batch: Input should be a valid integer"),
     (("rows", 0, "peer"), "\x1b[2J", "rows.0.peer: has control characters"),
     (("rows", 0, "peer"), "\ud800", "rows.0.peer: 'utf-8' codec can't encode"),
     (("settings", "size"), [[]], "settings.size: expected text, a number, or a list of these"),
     (("layers", 0, "kernels"), [], "layers.0.kernels: expected kernels that take time"),
     (("summary", "geometric_mean"), None, "summary.geometric_mean: Field required"),
     (("schema",), 2, "written in schema 2; this version reads 3")],
)  # fmt: skip
def test_a_file_that_is_no_result(
    tmp_path: Path, where: tuple[str | int, ...], value: object, message: str
) -> None:
    result: Any = a_result()
    part = result
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    if value is None:
        del part[where[-1]]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    with pytest.raises(ResultError, match=f"result.json: {message}"):
        read_result(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2"),
     (b"[" * 100_000, "not JSON (maximum recursion depth"), (b"\xff\xfe\x00", "in position 0"),
     (b"1" * 10_000, "not JSON"), (b"", "line 1 column 1"), (b"[1]", "names no schema"),
     (b'{"a": 1}', "names no schema"), (b'{"schema": [[1]]}', "written in schema [[1]]")],
)  # fmt: skip
@pytest.mark.parametrize("command", [["bench", "--compare"], ["compare"], ["report"]], ids=" ".join)
def test_commands_say_that_a_file_is_no_result(
    tmp_path: Path, command: list[str], content: bytes, message: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    files = [path] if command == ["report"] else [path, path]
    result = run(*command, *files)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: {path}: ")
    assert message in line


# Ratios ---------------------------------------------------------------------------------------


def test_ratios_are_paired_by_round() -> None:
    """A slow round is slow for both; one that only one peer has counts for nothing."""
    eager = Measurement("eager", 0.0, samples=[2.0, 20.0, 3.0, 4.0])
    engine = Measurement("engine", 0.0, samples=[1.0, 10.0, 1.0])
    rows = rows_of([eager, engine], ("x1.0", 8, "fp32", 1), 1e-5, floor_ms=0.5)
    assert rows[0]["paired"] == {}
    assert rows[1]["paired"] == {"eager": pytest.approx({"p10": 2.0, "p50": 2.0, "p90": 2.8})}
    assert rows[1]["speedup"] == 3.5
    assert rows[1]["images_per_s"] == 8000
    assert rows[1]["floor_share"] == 0.5


# compare --------------------------------------------------------------------------------------


def _verdicts(scale: float) -> dict[tuple[str, str], str]:
    changes = differences_of(a_result(), a_result(scale)).changes
    return {(c.key[0], c.key[2]): c.verdict for c in changes if "2 threads" not in c.key[1]}


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(1.0, "within the spread"), (1.15, "within the spread"), (0.85, "within the spread"),
     (1.3, "slower"), (0.8, "faster")],
)  # fmt: skip
def test_a_difference_within_the_spread_is_no_change(scale: float, verdict: str) -> None:
    """p10 to p90 are 0.9 to 1.1 of the median."""
    verdicts = _verdicts(scale)
    assert verdicts["network", "engine"] == verdicts["network", "eager"] == verdict
    assert verdicts["first result", "engine"] == "3 samples: too few to say"
    assert verdicts["Table 8", "eager"] == "no spread to compare with"


def test_compare(tmp_path: Path) -> None:
    before, after = a_result(), a_result(0.5)
    after["machine"]["cpu"] = "Another CPU"
    after["machine"]["clock_mhz"] = 2510.0  # not worth a word
    after["versions"]["torch"] = "2.14.0"
    after["floor"][0]["multiply_adds_per_s"] = 7e10
    after["rows"] = [row for row in after["rows"] if row["peer"] != "ncnn"]
    before["rows"] = [row for row in before["rows"] if row["peer"] != "fused"]
    found = differences_of(before, after)
    assert {key[2] for key in found.only_before} == {"ncnn"}
    assert {key[2] for key in found.only_after} == {"fused"}
    assert [setup[0] for setup in found.setups] == [
        "machine: cpu", "versions: torch", "measured multiply_adds_per_s, float32, threads 1"
    ]  # fmt: skip
    assert found.geometric_means() == pytest.approx({"eager": 2.0, "engine": 2.0, "all": 2.0})
    files = tmp_path / "a.json", tmp_path / "b.json"
    for result, path in zip((before, after), files, strict=True):
        write_result(result, path)
    out = run("compare", *files)
    assert out.exit_code == 0, out.output
    assert out.output == run("bench", "--compare", *files).output
    assert "only in A:\n  network: x1.0, batch 1, fp32, 1 thread: ncnn" in out.output
    assert "Another CPU" in out.output
    assert "geometric mean, engine (ours): 2.000x" in out.output
    assert "8 compared: 4 faster, 0 slower" in out.output


def test_compare_of_nothing_in_common(tmp_path: Path) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    write_result(a_result(), files[0])
    write_result(new_result({"size": 224}), files[1])
    assert "nothing was measured in both" in run("compare", *files).output


# README ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools/readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_the_latest_result(tool: ModuleType) -> None:
    text = tool.README.read_text()
    path, result = tool.latest()
    assert tool.readme(text, tool.section(path, result)) == text, "run make report"
    assert f"<desc>{path.name}, {result['date']}</desc>" in tool.PICTURE.read_text()


def test_readme_table(tool: ModuleType) -> None:
    result = a_result()
    lines = tool.section(tool.RESULTS / "some.json", result).splitlines()
    assert lines[1].startswith(
        "x1.0, 224 x 224, float32, batch 1 on A <fast> CPU (avx2), PyTorch 2"
    )
    assert max(map(len, lines[1:3])) <= 100
    assert "| `snv2.Engine` | 1.0e-07 | 1.0 | 8.00x | 0.5 | 16.00x |" in lines
    assert "| OpenVINO | 1.0e-07 |  |  |  |  |" in lines
    assert tool.readme(f"a{tool.BEGIN}old{tool.END}b", "new") == "anewb"
    with pytest.raises(SystemExit, match="expected"):
        tool.readme("no comments", "new")


def test_every_committed_result_is_one() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        read_result(path)
        assert path.stat().st_size < 250_000
