"""The command line: start, info, verify and bench."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from _cli import Image, run, save_picture, save_weights

import snv2_kernels as snv2
from snv2_bench import benchmarking, cli, peers
from snv2_bench.cli import cases
from snv2_bench.cli.app import COMMANDS
from snv2_bench.cli.common import DTYPES
from snv2_bench.cli.images import preprocess, read_image
from snv2_bench.cli.rule import allowed_error, upper_bound
from snv2_bench.cli.summary import CASE, summary_of, versus_line
from snv2_bench.startup import FirstResult
from snv2_kernels import _native
from snv2_kernels.testing import randomize_

# Start ----------------------------------------------------------------------------------------


def test_main_without_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        'snv2: the command line needs click: pip install "snv2_kernels[cli]"'
    ]


def test_python_m(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["snv2", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("snv2_bench", run_name="__main__")
    assert exit_.value.code == 0
    assert snv2.__version__ in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    """Which takes seconds to import; its lines are those of the commands themselves."""
    program = (
        "import sys; from snv2_bench.cli.app import app; app(['--help'], standalone_mode=False);"
        " assert 'torch' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for name, line in COMMANDS.items():
        command = getattr(importlib.import_module(f"snv2_bench.cli.{name}"), name)
        assert " ".join(command.help.split()).startswith(line)
        assert f"  {name} " in out.stdout


# info -----------------------------------------------------------------------------------------


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    for name, status in snv2.backends().items():
        line = next(line for line in result.output.splitlines() if f" {name} " in line)
        assert status in line


def test_info_names_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SNV2_CPU_ISA" not in run("info").output
    monkeypatch.setenv("SNV2_CPU_ISA", "sse9")
    assert "SNV2_CPU_ISA=sse9 is not available here" in run("info").output


# verify ---------------------------------------------------------------------------------------


def test_verify_quick() -> None:
    result = run("verify", "--quick")
    assert result.exit_code == 0, result.output
    for name in ("split_dw_cat_shuffle", "cat_shuffle", "dw_conv3x3", "unit stride 1"):
        assert name in result.output
    for name in ("split_dw_cat_shuffle_backward", "cat_shuffle_backward", "dw_conv3x3_backward"):
        assert name in result.output
    for name in ("unit stride 2", "SplitDepthwiseShuffle", "network x0.5 224x224", "97x131"):
        assert name in result.output
    assert "1.5 x the error of eager PyTorch" in result.output


@pytest.mark.slow
def test_verify_of_the_emulator() -> None:
    """Of networks that it can take."""
    result = run("verify", "--quick", "--backend", "cuda-emulated")
    assert result.exit_code == 0, result.output
    for name in ("split_dw_cat_shuffle", "cat_shuffle", "dw_conv3x3", "SplitDepthwiseShuffle"):
        assert name in result.output
    for name in ("unit stride 1", "unit stride 2", "network x0.5 64x64", "engine x0.5 33x45"):
        assert name in result.output
    assert "224x224" not in result.output


def test_all_cases_of_the_emulator() -> None:
    names = [case.name for case in cases.all_cases("cuda-emulated", quick=False)]
    for width in ("x0.5", "x1.0", "x1.5", "x2.0"):
        assert f"network {width} 64x64" in names
        assert f"engine {width} 64x64" in names


def _swapped(a: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    return snv2.models.channel_shuffle(
        torch.cat([a, b] if backend == "reference" else [b, a], 1), 2
    )


def _nan(a: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    return _swapped(a, b, backend) * (1 if backend == "reference" else float("nan"))


def _float32(a: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    return _swapped(a.float(), b.float(), "reference")


def _raises(a: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    raise RuntimeError("no luck\nand more")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(_swapped, "FAIL"), (_nan, "FAIL"), (_float32, "FAIL: TypeError: the result is torch.float32"),
     (_raises, "FAIL: RuntimeError: no luck")],
)  # fmt: skip
def test_verify_fails(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., torch.Tensor], message: str
) -> None:
    ops = list(cases._op_cases("auto", quick=True))
    monkeypatch.setattr("snv2_bench.cli.verify.all_cases", lambda backend, quick: ops)
    monkeypatch.setattr(snv2.ops, "cat_shuffle", wrong)
    result = run("verify", "--quick")
    assert result.exit_code == 1
    failed = [line for line in result.output.splitlines() if "FAIL" in line]
    assert message in failed[0]
    assert all("cat_shuffle" in line for line in failed[:-1])
    assert "cases FAILED" in failed[-1]


def test_verify_backend_not_available() -> None:
    missing = next(name for name, status in snv2.backends().items() if not status.startswith("ok"))
    result = run("verify", "--backend", missing)
    assert result.exit_code == 2
    assert "--backend" in result.output
    assert snv2.backends()[missing] in result.output


def test_verify_says_that_a_variable_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNV2_BACKEND", "gpu")
    result = run("verify", "--quick")
    assert result.exit_code == 2
    assert "backend: expected one of" in result.output


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rule(dtype: torch.dtype) -> None:
    ulp = torch.finfo(dtype).eps
    assert allowed_error("op", dtype, 0.0) == ulp
    assert allowed_error("op", dtype, ulp) == 2.5 * ulp
    assert allowed_error("op", dtype, 1.0) == upper_bound("op", dtype) == 4 * ulp
    assert upper_bound("network", torch.float32) == 1e-5


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(OSError(errno.ENOSPC, "No space left on device", "out.json"), 1,
      "out.json: No space left on device"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), 1,
      "not enough memory (DefaultCPUAllocator: can't allocate memory: you tried)"),
     (MemoryError(), 1, "not enough memory"),
     (ValueError("backend: expected one of cpu, got 'x'"), 2,
      "backend: expected one of cpu, got 'x'")],
)  # fmt: skip
def test_known_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, line: str
) -> None:
    monkeypatch.setattr("snv2_bench.cli.info.machine", lambda: _raise(error))
    result = run("info")
    assert result.exit_code == code
    assert result.output == f"Error: {line}\n"


def test_other_errors_are_faults_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snv2_bench.cli.info.machine", lambda: _raise(ValueError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        run("info")


def _raise(error: Exception) -> NoReturn:
    raise error


# bench ----------------------------------------------------------------------------------------

_SMALL = ["bench", "--width", "x0.5", "--size", 32, "--repeats", 2]


def test_bench_writes_json_and_plot(tmp_path: Path) -> None:
    json_path, plot_path = tmp_path / "out.json", tmp_path / "out.png"
    names = ["eager", "channels_last", "jit", "fused", "engine"]
    result = run(
        *_SMALL, *(word for name in names for word in ("--peer", name)), "--batch", 1, "--batch", 3,
        "--dtype", "fp32", "--dtype", "bf16", "--json", json_path,
        "--plot", plot_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(json_path.read_text())
    assert written["schema"] == 3
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["isa"] in written["machine"]["available_isas"]
    assert not written["interrupted"]
    cases = list(itertools.product(["x0.5"], (1, 3), ("fp32", "bf16"), (1,)))
    keys = [tuple(row[key] for key in (*CASE, "peer")) for row in written["rows"]]
    assert keys == [(*case, name) for case in cases for name in names]
    for row in written["rows"]:
        assert row["reason"] is None
        assert row["samples"] == 2
        assert row["error"] <= row["error_bound"]
        p = row["percentiles_ms"]
        assert 0 < p["p0"] <= p["p10"] <= row["median_ms"] == p["p50"] <= p["p90"] <= p["p100"]
        assert (row["speedup"] == 1) or row["peer"] != "eager"
        assert row["floor_share"] > 0
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3, rel=1e-4)
        ours = row["peer"] in peers.OURS
        assert set(row["paired"]) == ({*names} - {row["peer"]} if ours else set())
    elements = ["float32", "bfloat16"] if _native.cpu_has_bfloat16() else ["float32"]
    assert [(floor["threads"], floor["element"]) for floor in written["floor"]] == [
        (1, element) for element in elements
    ]
    assert written["layers"] == []
    with Image.open(plot_path) as plot:
        assert plot.width > 100


def test_bench_threads(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    names = ["eager", "fused", "engine"]
    result = run(
        *_SMALL, *(word for name in names for word in ("--peer", name)), "--threads", 2,
        "--threads", 1, "--json", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["settings"]["threads"] == [2, 1]
    assert [floor["threads"] for floor in written["floor"]] == [2, 1]
    keys = [(row["threads"], row["peer"]) for row in written["rows"]]
    assert keys == [(threads, name) for threads in (2, 1) for name in names]
    cases = written["summary"]["cases"]
    assert [tuple(case[key] for key in CASE) for case in cases] == [
        ("x0.5", 1, "fp32", threads) for threads in (2, 1)
    ]
    printed = re.findall(r"vs fastest peer \(eager\): fused ([\d.]+)x", result.output)
    assert [case["fastest_peer"] for case in cases] == ["eager", "eager"]
    for case, ratio in zip(cases, printed, strict=True):  # of numbers that the file has rounded
        assert float(ratio) == pytest.approx(case["speedup"]["fused"], rel=1e-3, abs=0.006)


def _timed(width: str, threads: int, **medians: float | None) -> list[Any]:
    paired = {"ncnn": {"p10": 1.5, "p50": 2.0, "p90": 2.5}}
    return [
        {"width": width, "batch": 1, "dtype": "fp32", "threads": threads, "peer": peer,
         "median_ms": median, "paired": paired if peer == "fused" else {}}
        for peer, median in medians.items()
    ]  # fmt: skip


def test_summary() -> None:
    """Of everything that is not ours the fastest; what was not timed does not count."""
    rows = _timed("x0.5", 1, eager=8.0, ncnn=4.0, openvino=None, fused=2.0, engine=1.0)
    rows += _timed("x0.5", 2, eager=3.0, fused=1.5, engine=3.0)
    rows += _timed("x1.0", 1, eager=None, fused=1.0)
    rows += _timed("x1.0", 2, eager=1.0, fused=None, engine=None)
    summary = summary_of(rows)
    first, second = summary["cases"]
    assert [first[key] for key in CASE] == ["x0.5", 1, "fp32", 1]
    assert (first["fastest_peer"], first["fastest_ms"]) == ("ncnn", 4.0)
    assert first["speedup"] == {"fused": 2.0, "engine": 4.0}
    assert second["speedup"] == {"fused": 2.0, "engine": 1.0}
    assert summary["geometric_mean"] == pytest.approx({"fused": 2.0, "engine": 2.0})
    assert summary["minimum"] == {"fused": 2.0, "engine": 1.0}
    assert first["paired"] == {"fused": {"p10": 1.5, "p50": 2.0, "p90": 2.5}, "engine": {}}
    line = "vs fastest peer (ncnn): fused 2.00x (1.50 - 2.50), engine 4.00x"
    assert versus_line(rows[:5]) == line
    assert versus_line(rows[8:10]) is None


@pytest.mark.parametrize(
    ("peer", "package"),
    [("onnxruntime", "onnxruntime"), ("onnxruntime", "onnx"), ("openvino", "openvino"),
     ("ncnn", "ncnn"), ("ncnn", "pnnx"), ("mnn", "MNN")],
)  # fmt: skip
def test_bench_without_an_inference_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peer: str, package: str
) -> None:
    for module in ("onnxruntime", "onnx", "openvino", "ncnn", "pnnx", "MNN"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "out.json"
    result = run(*_SMALL, "--peer", peer, "--peer", "engine", "--json", path)
    assert result.exit_code == 0, result.output
    missing, engine = json.loads(path.read_text())["rows"]
    assert missing["reason"] == (f'not installed ({package}): pip install "snv2_kernels[peers]"')
    assert missing["reason"] in result.output
    assert engine["samples"] == 2
    assert "vs fastest peer" not in result.output


def test_bench_layers(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = run(*_SMALL, "--peer", "engine", "--layers", "--threads", 1, "--json", path)
    assert result.exit_code == 0, result.output
    assert "engine, x0.5, batch 1, fp32, 1 thread: by kernel" in result.output
    written = json.loads(path.read_text())
    (layers,), (floor,) = written["layers"], written["floor"]
    assert [layers[key] for key in CASE] == ["x0.5", 1, "fp32", 1]
    kernels = layers["kernels"]
    assert (kernels[0]["step"], kernels[-1]["step"]) == ("stem", "outside")
    rate = floor["cached_copy_bytes_per_s"]
    for kernel in kernels:
        least = (
            kernel["multiply_adds"] / floor["multiply_adds_per_s"],
            kernel["moved_bytes"] / rate,
        )
        assert kernel["floor_ms"] == pytest.approx(max(least) * 1e3, rel=1e-3)
    (engine,) = written["rows"]
    parameters = 1_366_792  # of x0.5
    least_ms = 1e3 * max(
        sum(kernel["multiply_adds"] for kernel in kernels) / floor["multiply_adds_per_s"],
        4 * (parameters + 3 * 32 * 32) / rate,
    )
    assert engine["floor_share"] == pytest.approx(least_ms / engine["median_ms"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("max_error", lambda *_: float("nan"), "RuntimeError: wrong output: error nan"),
     ("Engine", lambda *_, **__: int("x"), "ValueError: invalid literal")],
)  # fmt: skip
def test_no_layers_of_an_engine_that_is_wrong_or_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: object, message: str
) -> None:
    monkeypatch.setattr(f"snv2_bench.cli.bench.{name}", value)
    path = tmp_path / "out.json"
    result = run(*_SMALL, "--peer", "eager", "--layers", "--json", path)
    assert result.exit_code == 0
    assert f"no times of layers: {message}" in result.output
    assert json.loads(path.read_text())["layers"] == []


def test_bench_startup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of x1.0 if it is there; Ctrl-C keeps the peers before it."""
    asked: list[tuple[Any, ...]] = []

    def first(peer: str, width: str, **how: Any) -> list[FirstResult]:
        asked.append((peer, width, *how.values()))
        if peer == "engine":
            raise KeyboardInterrupt
        if peer == "jit":
            return [FirstResult("no luck")]
        memory = {"before": 300.0, "to_first_result": 20.0, "calls": None}
        return [FirstResult(None, {"import torch": ms, "first call": 1.0}, memory)
                for ms in (3000.0, 1000.0, 2000.0)]  # fmt: skip

    monkeypatch.setattr("snv2_bench.cli.bench.first_results", first)
    path = tmp_path / "out.json"
    names = ["--peer", "eager", "--peer", "jit", "--peer", "engine"]
    result = run(*_SMALL, "--width", "x1.0", *names, "--startup", "--threads", 1, "--json", path)
    assert result.exit_code == 130
    assert asked == [(peer, "x1.0", 1, 32, torch.float32, 1) for peer in ("eager", "jit", "engine")]
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert len(written["rows"]) == 6
    eager, jit = written["startup"]
    assert eager["median_ms"] == eager["percentiles_ms"]["p50"] == 2001
    assert eager["phases_ms"]["import torch"] == 2000
    assert eager["memory_mb"]["to_first_result"] == 20
    assert (jit["reason"], jit["median_ms"], jit["samples"]) == ("no luck", None, 0)
    assert "no luck" in result.output


def test_bench_leaves_finished_cases_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise SystemExit("the machine went away")

    monkeypatch.setattr("snv2_bench.cli.bench.layer_times", broken)
    path = tmp_path / "out.json"
    run(*_SMALL, "--peer", "engine", "--layers", "--json", path)
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert [row["samples"] for row in written["rows"]] == [2]


@pytest.mark.parametrize(("busy", "waits"), [(3, 4), (1000, 50)])
def test_wait_until_idle(monkeypatch: pytest.MonkeyPatch, busy: int, waits: int) -> None:
    """As long as threads spin, and not for ever."""
    slept: list[float] = []
    clock = SimpleNamespace(
        sleep=slept.append, process_time=lambda: sum(slept[:busy]) + 1e-5 * len(slept)
    )
    monkeypatch.setattr(benchmarking, "time", clock)
    benchmarking.wait_until_idle()
    assert len(slept) == waits


def test_no_bfloat16_in_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    result = run(*_SMALL, "--peer", "onnxruntime", "--dtype", "bf16")
    assert "ONNX Runtime has no bfloat16 convolutions on CPUs" in result.output


def test_bench_goes_on_without_a_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_compiler(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        raise RuntimeError("\nno C++ compiler found\nlong explanation")

    def wrong(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: model(x).flip(1)

    monkeypatch.setitem(peers.PEERS, "compile", no_compiler)
    monkeypatch.setitem(peers.PEERS, "jit", wrong)
    path, plot_path = tmp_path / "out.json", tmp_path / "out.svg"
    names = ["--peer", "compile", "--peer", "jit", "--peer", "fused"]
    result = run(*_SMALL, *names, "--json", path, "--plot", plot_path)
    assert result.exit_code == 0, result.output
    assert "RuntimeError: no C++ compiler found" in result.output
    compiled, jit, fused = json.loads(path.read_text())["rows"]
    assert compiled["reason"] == "RuntimeError: no C++ compiler found"
    assert compiled["error"] is None
    assert jit["reason"].startswith("wrong output: error")
    assert jit["samples"] == compiled["samples"] == 0
    assert jit["percentiles_ms"] == {}
    assert fused["samples"] == 2
    assert fused["speedup"] is None
    assert plot_path.stat().st_size > 0


def test_bench_interrupted_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole_round = benchmarking.Comparison.time_round
    rounds = iter([whole_round])

    def time_round(self: benchmarking.Comparison) -> None:
        try:
            next(rounds)(self)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(benchmarking.Comparison, "time_round", time_round)
    path = tmp_path / "out.json"
    result = run(*_SMALL, "--peer", "eager", "--batch", 1, "--batch", 2, "--json", path)
    assert result.exit_code == 130
    assert "interrupted" in result.output
    written = json.loads(path.read_text())
    assert written["interrupted"]
    assert [(row["batch"], row["samples"]) for row in written["rows"]] == [(1, 1)]


@pytest.mark.parametrize("image", ["picture", "sample"])
def test_bench_on_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: str) -> None:
    picture, state_file = save_picture(tmp_path), save_weights(tmp_path)
    seen: list[torch.Tensor] = []

    def spy(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        seen.append(x)
        return lambda: model(x)

    monkeypatch.setitem(peers.PEERS, "eager", spy)
    path = picture if image == "picture" else image
    arguments = ["--peer", "eager", "--batch", 2, "--image", path, "--weights", state_file]
    assert run(*_SMALL, *arguments).exit_code == 0
    assert seen[0].shape == (2, 3, 32, 32)
    assert torch.equal(seen[0][0].roll(1, 1), seen[0][1])
    assert not torch.equal(seen[0][0], seen[0][1])
    if image == "picture":
        assert torch.equal(seen[0][0], preprocess(read_image(picture), 37, 32))


@pytest.mark.parametrize(("stages", "name"), [([1, 1, 1], "ShuffleNetV2"), ([4, 8, 4], "x0.5")])
def test_bench_takes_the_network_of_the_weights(
    tmp_path: Path, stages: list[int], name: str
) -> None:
    model = snv2.models.ShuffleNetV2(stages, [24, 48, 96, 192, 1024], 10)
    torch.save({"state_dict": randomize_(model).state_dict()}, tmp_path / "weights.pth")
    options = ["--size", 32, "--repeats", 1, "--peer", "eager"]
    path = tmp_path / "out.json"
    result = run("bench", *options, "--weights", tmp_path / "weights.pth", "--json", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["settings"]["widths"] == [name]
    assert [row["width"] for row in written["rows"]] == [name]


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    peers = ["--peer", "eager", "--peer", "cuda_graph", "--peer", "fused", "--peer", "engine"]
    result = run(*_SMALL, "--device", "cuda", *peers, "--json", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["machine"]["device"] == torch.cuda.get_device_name()
    assert [row["floor_share"] for row in written["rows"]] == 4 * [None]
    assert run(*_SMALL, "--device", "cuda", "--layers").exit_code == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--image", "missing.png", "no such file"), ("--plot", "out.xyz", "expected an ending"),
     ("--json", "nowhere/out.json", "no such directory"), ("--width", "x9", "x0.5"),
     ("--weights", "missing.pth", "does not exist"), ("--weights", __file__, "not a state_dict"),
     ("--batch", 0, "0"), ("--batch", 10**20, "range"), ("--threads", 10**5, "range"),
     ("--dtype", "int4", "fp16"), ("--peer", "tensorrt", "onnxruntime"),
     ("--peer", "cuda_graph", "on cpu"), ("--device", "meta", "expected cpu or cuda"),
     ("--device", "cuda:99", "no such GPU")],
)  # fmt: skip
def test_bench_option_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, value: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*_SMALL, option, value)
    assert result.exit_code == 2
    assert option in result.output
    assert message in result.output
