"""The command line on ONNX files, and the other files of weights that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import snv2_kernels
from snv2_kernels import models
from snv2_kernels.testing import randomize_

pytest.importorskip("onnx")

from _cli import run, save_picture
from _onnx_files import V2, network, save

from snv2_bench.cli.images import preprocess, read_image


@pytest.mark.parametrize("ends", [False, True], ids=["network", "normalized-softmax"])
def test_classify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """The image is normalized once, and so are the scores."""
    monkeypatch.setattr(snv2_kernels, "fuse", lambda model: model)  # which takes its time
    file = V2(17, folded=True).write(network(), normalized=ends, softmax=ends)
    path, picture = save(file, tmp_path / "net.onnx"), save_picture(tmp_path)
    result = run("classify", "--weights", path, picture)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        scores = network()(preprocess(read_image(picture), 256, 224)[None])
    expected = scores.softmax(1)[0].topk(5)
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == [str(i) for i in expected.indices.tolist()]
    probabilities = torch.tensor([float(row[2].strip().rstrip("%")) / 100 for row in rows])
    assert probabilities.allclose(expected.values, rtol=0, atol=1e-4)


def test_bench(tmp_path: Path) -> None:
    path = save(V2(12).write(network()), tmp_path / "net.onnx")
    peers = [part for peer in ("eager", "onnxruntime", "engine") for part in ("--peer", peer)]
    result = run("bench", "--weights", path, "--repeats", 1, "--size", 64, *peers)
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["eager", "onnxruntime", "engine"]
    assert all(float(row[2]) < 1e-5 for row in rows)  # the errors


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_text("no file")
    for arguments in (("bench",), ("classify", save_picture(tmp_path))):
        result = run(*arguments, "--weights", path)
        assert result.exit_code == 2
        assert f"{path}: not an ONNX file" in result.output
        assert "Traceback" not in result.output


# Other files ----------------------------------------------------------------------------------


def _network() -> Any:
    return randomize_(models.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 40], 10)).eval()


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, path = _network(), tmp_path / "net.safetensors"
    safetensors.save_file(model.state_dict(), path)
    loaded = models.load(path)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"net\.safetensors: not a safetensors file"):
        models.load(path)
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "missing.safetensors")


def test_a_whole_model_is_told_how_to_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(_network(), path)
    told = r"ShuffleNetV2, expected .*; save them as torch\.save\(model\.state_dict\(\), path\)\)$"
    with pytest.raises(ValueError, match=told):
        models.load(path)
