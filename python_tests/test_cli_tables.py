"""The command line: the paper's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _cli import Image, run

from snv2_bench import benchmarking
from snv2_bench.guidelines.units import SETTINGS

_TINY = ["--quick", "--size", 8, "--repeats", 1]
_KEYS = {
    "device", "batch", "threads", "peer", "error", "median_ms", "percentiles_ms", "per_s", "ratio",
    "paper_per_s", "paper_ratio", "reason", "multiply_adds", "speedup", "samples",
}  # fmt: skip

ROUNDED = 2e-4  # ratios of numbers that are written with five digits


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    written = json.loads(path.read_text())
    assert "rows" not in written
    assert written["machine"]["device"] == written["machine"]["cpu"]
    rows: list[dict[str, Any]] = written[key]
    return rows


def test_guidelines(tmp_path: Path) -> None:
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    tables = [word for name in ("G1", "G4", "unit") for word in ("--table", name)]
    result = run("guidelines", *tables, *_TINY, "--json", path, "--plot", plots)
    assert result.exit_code == 0, result.output
    rows = _rows(path, "guidelines")
    for row in rows:
        assert set(row) == _KEYS | {"table", "setting", "column", "channels", "extent"}
        assert (row["device"], row["batch"], row["threads"]) == ("cpu", 1, 1)
        if row["reason"] is None:
            assert row["error"] < 1e-5
            assert row["per_s"] == pytest.approx(1e3 / row["median_ms"], rel=ROUNDED)
    names = [(row["table"], row["setting"], row["peer"]) for row in rows]
    assert names[:5] == [
        ("G1", "1:1", "eager"), ("G1", "1:2", "eager"), ("G1", "1:6", "eager"),
        ("G1", "1:12", "eager"), ("G4", "ReLU, shortcut", "eager"),
    ]  # fmt: skip
    first, second = rows[:2]
    assert second["channels"] == [22, 44]
    assert first["ratio"] == first["paper_ratio"] == 1
    assert second["ratio"] == pytest.approx(first["median_ms"] / second["median_ms"], rel=ROUNDED)
    assert second["paper_ratio"] == pytest.approx(72.9 / 76.2, rel=ROUNDED)
    units = [row for row in rows if row["table"] == "unit"]
    assert [row["setting"] for row in units] == [s for s in SETTINGS for _ in range(2)]
    fused = {row["setting"]: row["reason"] for row in units if row["peer"] == "fused"}
    assert {s for s, reason in fused.items() if reason} == {"convolutions"}
    assert fused["convolutions"].startswith("no fused kernel: the result of"), fused
    assert "no fused kernel" in result.output
    assert "G1, channels x1, 1 thread" in result.output
    assert "72.9" in result.output
    for name in ("G1", "G4", "unit"):
        with Image.open(plots / f"{name}.png") as picture:
            assert picture.width > 100


def test_table8(tmp_path: Path) -> None:
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    tiny = ["--quick", "--size", 32, "--repeats", 1, "--batch", 2]
    result = run("table8", *tiny, "--json", path, "--plot", plots)
    assert result.exit_code == 0, result.output
    rows = _rows(path, "table8")
    for row in rows:
        assert set(row) == _KEYS | {"model", "size", "input"}
        assert (row["input"], row["batch"], row["reason"]) == (32, 2, None)
    assert len(rows) == 12
    by_name = {(row["model"], row["size"], row["peer"]): row for row in rows}
    mobile = by_name["MobileNet v1", "0.25", "eager"]
    base = by_name["ShuffleNet v2", "1.0x", "eager"]
    assert mobile["ratio"] == pytest.approx(mobile["per_s"] / base["per_s"], rel=ROUNDED)
    assert mobile["paper_ratio"] == pytest.approx(502 / 341, rel=ROUNDED)
    engine = by_name["ShuffleNet v2", "1.0x", "engine"]
    assert engine["ratio"] == 1
    assert engine["speedup"] == pytest.approx(base["median_ms"] / engine["median_ms"], rel=ROUNDED)
    with Image.open(plots / "table8.png") as picture:
        assert picture.width > 100


def test_interrupted_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole_round = benchmarking.Turns.time_round
    rounds = iter([whole_round] * 3)

    def time_round(self: benchmarking.Turns) -> None:
        try:
            next(rounds)(self)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(benchmarking.Turns, "time_round", time_round)
    path = tmp_path / "out.json"
    arguments = ["--table", "G2", "--table", "G4", "--quick", "--size", 4, "--repeats", 2]
    result = run("guidelines", *arguments, "--json", path)
    assert result.exit_code == 130
    assert "interrupted" in result.output
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert [(row["table"], row["samples"]) for row in written["guidelines"]] == [("G2", 2)] * 4 + [
        ("G4", 1)
    ] * 4


def test_goes_on_without_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wrong outputs are not timed, and what has no base no ratio."""
    monkeypatch.setattr(benchmarking, "max_error", lambda *_: 1.0)
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    result = run("guidelines", "--table", "G2", *_TINY, "--json", path, "--plot", plots)
    assert result.exit_code == 0, result.output
    assert "wrong output: error 1.0e+00" in result.output
    for row in _rows(path, "guidelines"):
        assert (row["samples"], row["ratio"], row["speedup"]) == (0, None, None)
        assert row["paper_ratio"] is not None
    assert (plots / "G2.png").stat().st_size > 0


@pytest.mark.parametrize("command", ["guidelines", "table8"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--device", "tpu", "expected cpu or cuda"), ("--device", "meta", "expected cpu or cuda"),
     ("--device", "cuda:99", "no such GPU; "), ("--peer", "cuda_graph", "on cpu"),
     ("--json", "nowhere/out.json", "no such directory"), ("--plot", "file/plots", "ot a dir"),
     ("--threads", 0, "0"), ("--repeats", 0, "0"), ("--size", 0, "0")],
)  # fmt: skip
def test_option_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, option: str, value: object,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = run(command, *_TINY, option, value)
    assert result.exit_code == 2
    assert option in result.output
    assert message in result.output


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("table8", *_TINY, "--plot", tmp_path)
    assert result.exit_code == 2
    assert 'pip install "snv2_kernels[bench]"' in result.output
