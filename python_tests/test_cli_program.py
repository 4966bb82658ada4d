"""``snv2 export`` and ``snv2 run``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from _cases import small_network
from _cli import run, save_picture, save_weights
from test_cli_classify import top

import snv2_kernels as snv2
from snv2_kernels.models import MegviiShuffleNetV2
from snv2_kernels.testing import randomize_


def authors_weights(folder: Path) -> Path:
    model = randomize_(MegviiShuffleNetV2([1, 1, 1], [8, 12, 20, 32, 40], num_classes=20))
    with torch.no_grad():
        model.classifier[0].weight *= 1e-4
    torch.save(model.state_dict(), folder / "authors.pth")
    return folder / "authors.pth"


def shows_the_same(weights: Path, picture: Path, net: Path) -> None:
    made = run("export", "--weights", weights, "-o", net, "--dtype", "fp32", "--dtype", "bf16")
    assert made.exit_code == 0, made.output
    assert "cpu bfloat16" in made.output
    expected, result = run("classify", "--weights", weights, picture), run("run", net, picture)
    assert result.exit_code == 0, result.output
    for (name, share), (other, same) in zip(top(result), top(expected), strict=True):
        assert name == other
        assert abs(share - same) <= 2e-4


def test_run_shows_what_classify_does(tmp_path: Path) -> None:
    shows_the_same(save_weights(tmp_path), save_picture(tmp_path), tmp_path / "net.snv2")


def test_networks_of_the_authors(tmp_path: Path) -> None:
    """They take blue first, and pool 7 x 7: at another size their plan would be silently wrong."""
    weights, net = authors_weights(tmp_path), tmp_path / "net.snv2"
    shows_the_same(weights, save_picture(tmp_path), net)
    program = snv2.Program(net)
    assert program(torch.zeros(1, 3, 200, 224)).shape == (1, 20)
    with pytest.raises(ValueError, match=r"x: \(256, 224\) pixels; .* last map is \(7, 7\)"):
        program(torch.zeros(1, 3, 256, 224))
    large = run("export", "--weights", weights, "-o", net, "--size", 256)
    assert large.exit_code == 2
    assert "the model pools a part of its map" in large.output


def test_export_in_eight_bits(tmp_path: Path) -> None:
    weights, picture, net = save_weights(tmp_path), save_picture(tmp_path), tmp_path / "net.snv2"
    made = run("export", "--weights", weights, "-o", net, "--int8", tmp_path, "--int8", picture)
    assert made.exit_code == 0, made.output
    assert "plans       cpu uint8" in made.output
    expected, result = run("classify", "--weights", weights, picture), run("run", net, picture)
    assert result.exit_code == 0, result.output
    assert top(result)[0][0] == top(expected)[0][0]
    empty = tmp_path / "empty"
    empty.mkdir()
    none = run("export", "--weights", weights, "-o", net, "--int8", empty)
    assert none.exit_code == 2
    assert "--int8: no images in" in none.output
    on_gpus = run("export", "--weights", weights, "-o", net, "--int8", picture, "--target", "cuda")
    assert on_gpus.exit_code == 2
    assert "integers run on a CPU only" in on_gpus.output


def test_export_refuses(tmp_path: Path) -> None:
    weights, net, names = save_weights(tmp_path), tmp_path / "net.snv2", tmp_path / "names"
    names.write_text("one\ntwo\n")
    few = run("export", "--weights", weights, "-o", net, "--classes", names)
    assert few.exit_code == 2
    assert "classes: expected a name for each of 1000, got 2" in few.output
    other = run("export", "x1.0", "--weights", weights, "-o", net)
    assert other.exit_code == 2
    assert "does not fit width x1.0" in other.output
    assert not net.exists()


def test_run_refuses(tmp_path: Path) -> None:
    net, picture = tmp_path / "net.snv2", save_picture(tmp_path)
    snv2.save_program(small_network(), net)
    plain = run("run", net, picture)
    assert plain.exit_code == 2
    assert "it has no normalization" in plain.output
    os.truncate(net, 1000)
    cut = run("run", net, picture)
    assert cut.exit_code == 2
    assert cut.output.startswith(f"Error: {net}: program: truncated: 1000 bytes of ")
