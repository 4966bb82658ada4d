"""What the tests of the command line share: running it, random weights and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

click_testing = pytest.importorskip("click.testing")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

from snv2_bench.cli.app import app  # noqa: E402
from snv2_bench.cli.common import WIDTHS  # noqa: E402
from snv2_kernels.testing import randomize_  # noqa: E402


def run(*arguments: object, columns: int = 200) -> Any:
    """The result of a command; only an exit may end it, never another exception.

    It runs in one thread, since tests that run at once share the cores.
    """
    runner = click_testing.CliRunner(env={"COLUMNS": str(columns)})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert torch.get_num_threads() == 1, "the command left another number of threads"
    finally:
        torch.set_num_threads(threads)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def noisy_image(mode: str, size: tuple[int, int]) -> Any:
    small = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(small.to(torch.uint8).numpy()).resize(size).convert(mode)


def save_picture(folder: Path) -> Path:
    path = folder / "noise [1].png"  # rich would read [1] as a style
    noisy_image("RGB", (300, 251)).save(path)
    return path


def save_weights(folder: Path) -> Path:
    """Random weights of width x0.5; the last layer is small, so that no class gets it all."""
    model = randomize_(WIDTHS["x0.5"]())
    with torch.no_grad():
        model.fc.weight *= 0.01
    path = folder / "x0_5.pth"
    torch.save(model.state_dict(), path)
    return path
