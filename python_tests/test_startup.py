"""From nothing to a peer's first result, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from snv2_bench import peers, startup
from snv2_bench.startup import PHASES, first_results


def test_first_result_of_a_real_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_RUNS", 1)
    (run,) = first_results("eager", "x0.5", batch=1, size=32, dtype=torch.float32, threads=1)
    assert run.reason is None
    assert list(run.phases_ms) == [phase for phase in PHASES if phase != "import snv2_kernels"]
    assert all(ms > 0 for ms in run.phases_ms.values())
    assert run.total_ms == sum(run.phases_ms.values())
    assert run.memory_mb is not None
    before, first, calls = (run.memory_mb[k] for k in ("before", "to_first_result", "calls"))
    assert before is not None
    assert before > 50, "PyTorch alone is more"
    if sys.platform == "linux":
        assert first is not None
        assert calls is not None
        assert 0 <= first < 1000
        assert 0 <= calls < 1000


def test_no_first_result_is_told_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"peer": "eager", "width": "x0.5", "batch": 1, "size": 32, "threads": 1}
    monkeypatch.setattr(sys, "argv", ["", json.dumps(asked | {"dtype": "float32"})])
    monkeypatch.setitem(peers.PEERS, "eager", lambda model, x: lambda: model(x).flip(1))
    with warnings.catch_warnings():
        startup.first_result.main()
    assert json.loads(capsys.readouterr().out)["reason"].startswith("wrong output: error")


_ANSWER = '{"reason": null, "phases_ms": {"import torch": 2, "import snv2_kernels": 3}}'


@pytest.mark.parametrize(
    ("script", "peer", "count", "reason"),
    [(f"print('noise')\nprint('''{_ANSWER}''')", "eager", 3, None),
     ("""print('{"reason": "not installed"}')""", "ncnn", 1, "not installed"),
     ("raise KeyError('tensorrt')", "tensorrt", 1, "KeyError: 'tensorrt'"),
     ("import os; os._exit(3)", "eager", 1, "ended with status 3")],
    ids=["answer", "unavailable", "error", "crash"],
)  # fmt: skip
def test_what_a_process_may_end_with(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    script: str,
    peer: str,
    count: int,
    reason: str | None,
) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    monkeypatch.setattr(startup, "first_result", SimpleNamespace(__file__=str(path)))
    runs = first_results(peer, "x1.0", batch=1, size=32, dtype=torch.float32, threads=1)
    assert len(runs) == count
    assert runs[-1].reason == reason
    if reason is None:
        assert runs[0].phases_ms == {"import torch": 2}, "not ours: without our import"


def test_a_slow_peer_starts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_run", lambda asked: startup.FirstResult(None, {"build": 1.0}))
    monkeypatch.setattr(startup, "_ENOUGH_SECONDS", 0.0)
    runs = first_results("compile", "x1.0", batch=1, size=32, dtype=torch.float32, threads=1)
    assert len(runs) == 1


@pytest.mark.parametrize(
    "model",
    [
        "models.megvii_shufflenet_v2('0.5x')", "models.shufflenet_v2_plus('Small')",
        "models.shufflenet_v2_star('0.5x')", "models.shufflenet_v1(3, 0.5)",
        *(f"_backbones.{name}()" for name in
          ("Looked", "Indexed", "Named", "Getter", "Backwards", "Scored")),
    ],
)  # fmt: skip
def test_first_fuse_imports_no_compiler(model: str) -> None:
    """Which takes seconds; nor what it computes sizes with. Nothing keeps the models alive."""
    program = f"""
        import gc, sys, torch, weakref, snv2_kernels, _backbones
        from snv2_kernels import models
        gc.disable()
        plain = {model}.eval()
        fused = snv2_kernels.fuse(plain)
        assert any(isinstance(m, snv2_kernels.nn.fused.FusedModule) for m in fused.modules())
        alive = weakref.ref(plain), weakref.ref(fused)
        del plain, fused
        assert [ref() for ref in alive] == [None, None]
        heavy = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes")
        assert not [name for name in heavy if name in sys.modules]
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, env=environment, timeout=300)
