"""``snv2 bench --dtype int8``, and engines in environments of their own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from _cli import run

from snv2_bench import peers
from snv2_bench.cli.files import read_result

bench = importlib.import_module("snv2_bench.cli.bench")

_SMALL = ["bench", "--width", "x0.5", "--size", 32, "--repeats", 2]


@pytest.mark.parametrize(
    ("peer", "module"),
    [("litert", "ai_edge_litert.interpreter"), ("executorch", "executorch.runtime")],
)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_bench_without_xnnpack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peer: str, module: str, dtype: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "out.json"
    result = run(*_SMALL, "--dtype", dtype, "--peer", peer, "--json", path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())["rows"]
    package = module.partition(".")[0]
    expected = f'not installed ({package}): pip install "snv2_kernels[peers-xnnpack]"'
    assert row["reason"] == expected


def test_bench_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors are relative to the scores, and a peer that has no int8 says so."""
    monkeypatch.setattr(bench, "_CALIBRATION_IMAGES", 4)
    path = tmp_path / "out.json"
    result = run(
        *_SMALL, "--dtype", "int8", "--peer", "onnxruntime", "--peer", "eager", "--json", path
    )
    assert result.exit_code == 0, result.output
    written = read_result(path)
    timed, eager = written["rows"]
    assert timed["dtype"] == "int8"
    assert timed["samples"] == 2
    assert timed["error"] is not None
    assert 1e-3 < timed["error"] < timed["error_bound"] == 0.5
    assert eager["reason"] == "has no int8 here"
    assert "rms error" in result.output
    assert written["floor"] == []


def test_bench_int8_of_all_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that have none are left out."""

    def missing(name: str, extra: str = "") -> NoReturn:
        raise peers.Unavailable(f"not installed ({name})")

    for module in (peers.quantized, peers.xnnpack):
        monkeypatch.setattr(module, "installed", missing)
    path = tmp_path / "out.json"
    assert run(*_SMALL, "--dtype", "int8", "--json", path).exit_code == 0
    assert [row["peer"] for row in read_result(path)["rows"]] == list(peers.INT8_PEERS)


def test_bench_starts_no_int8() -> None:
    result = run("bench", "--dtype", "int8", "--startup")
    assert result.exit_code == 2
    assert "--startup" in result.output


def test_int8_batches_are_the_same_in_every_run() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    for image in (None, "sample"):
        first, second = bench._batches(x, image), bench._batches(x, image)
        assert len(first) == 16
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))
        assert not first[0].equal(first[1])
        assert first[0].shape == x.shape
    assert first[0].sort().values.sum() == x.sum()  # a picture is moved
