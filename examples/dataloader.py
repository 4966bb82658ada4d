"""Feed an engine with bytes from a DataLoader's workers, beside the usual loop of float tensors.

    python examples/dataloader.py                     # 256 pictures that are drawn first
    python examples/dataloader.py --folder PICTURES --weights x1_0.pth

What it shows:

- Workers decode pictures to uint8 [H, W, C], and the engine normalises them in its first kernel
  (`normalize=(mean, std)`): a quarter of the bytes go from process to process, and no worker spends
  time on floats.
- The last batch is smaller, and the engine takes it as it is.
- A call's result lies in a buffer that the next call overwrites, so what is kept is copied.

The usual loop, ToTensor and Normalize in the workers and the eager model, gets the same pictures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pictures import MEAN, SIZE, STD, decode, draw_pictures, load_network
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import snv2_kernels as snv2
from snv2_kernels.testing import max_error


class Pictures(Dataset[Tensor]):
    """Pictures of files, as bytes [H, W, C] or as normalised floats [C, H, W]."""

    def __init__(self, paths: Sequence[Path], *, floats: bool) -> None:
        self.paths, self.floats = paths, floats

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(decode(self.paths[index].read_bytes()))
        if not self.floats:
            return pixels
        x = pixels.permute(2, 0, 1).float() / 255
        return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def run(
    network: Callable[[Tensor], Tensor], pictures: Pictures, batch: int, workers: int
) -> tuple[Tensor, float]:
    """All scores, and pictures a second from the second batch on: before it the workers start."""
    loader = DataLoader(pictures, batch, num_workers=workers)
    scores, start = [], 0.0
    with torch.inference_mode():
        for x in loader:
            scores.append(network(x).clone())
            start = start or time.perf_counter()
    elapsed = time.perf_counter() - start
    later = len(pictures) - len(scores[0])
    return torch.cat(scores), later / elapsed if later else float("nan")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Bytes from workers to an engine.")
    parser.add_argument("--folder", type=Path, help="of pictures; by default some are drawn")
    parser.add_argument("--count", type=int, default=256, help="of pictures that are drawn")
    parser.add_argument("--weights", help="that snv2.models.load takes; by default random")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            paths = draw_pictures(Path(folder), options.count)
        else:
            paths = sorted(path for path in options.folder.iterdir() if path.is_file())
        model = load_network(options.weights)
        shape = options.batch, 3, SIZE, SIZE
        engine = snv2.Engine(model, shape, normalize=(MEAN, STD))
        ways = {
            "eager, floats": (model, Pictures(paths, floats=True)),
            "engine, bytes": (engine, Pictures(paths, floats=False)),
        }
        results = {
            name: run(network, pictures, options.batch, options.workers)
            for name, (network, pictures) in ways.items()
        }
    (expected, before), (scores, after) = results.values()
    error = max_error(scores, expected)
    print(f"{len(paths)} pictures, batches of {options.batch}, workers: {options.workers}")
    for name, (_, rate) in results.items():
        print(f"{name}: {rate:.1f} pictures a second")
    print(f"the scores differ by {error:.1e} of the largest")
    return {"pictures": len(scores), "error": error, "eager": before, "engine": after}


if __name__ == "__main__":
    main()
