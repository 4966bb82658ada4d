"""Classify a folder of pictures with Ray Data: an engine for each worker, on one machine or many.

    RAY_USAGE_STATS_ENABLED=0 python examples/ray_data.py PICTURES RESULTS --workers 2

What it shows:

- `--workers` actors decode and classify pictures. Each makes its engine once, when it starts; the
  last batch is smaller, and the engine takes it as it is. (Ray joins the two steps; beside a GPU,
  `num_cpus` of the first makes tasks of it, which decode on all cores.)
- A damaged picture becomes a row with the error's text, and costs no other row.
- On a cluster the same program runs unchanged, from a machine of it, with RAY_ADDRESS=auto: then
  pictures and results must be where all machines reach them, and `--gpus` gives each actor one.

RESULTS becomes a folder of Parquet files with the columns path, class, score and error.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import ray
import torch
from pictures import MEAN, SIZE, STD, DamagedPictureError, decode, load_network

import snv2_kernels as snv2

Rows = dict[str, np.ndarray]


def decoded(rows: Rows) -> Rows:
    """Pixels in place of a file's bytes, or black ones and what is wrong with the bytes."""
    pixels = np.zeros((len(rows["bytes"]), SIZE, SIZE, 3), np.uint8)
    errors = [""] * len(pixels)
    for i, data in enumerate(rows["bytes"]):
        try:
            pixels[i] = decode(data)
        except DamagedPictureError as error:
            errors[i] = str(error)
    return {"path": rows["path"], "pixels": pixels, "error": np.array(errors, dtype=object)}


class Classifier:
    """An actor's engine."""

    def __init__(self, weights: str | None, batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        shape = batch, 3, SIZE, SIZE
        self.engine = snv2.Engine(load_network(weights), shape, device, normalize=(MEAN, STD))

    def __call__(self, rows: Rows) -> Rows:
        pixels = np.ascontiguousarray(rows["pixels"])
        with torch.inference_mode():
            x = torch.from_numpy(pixels).to(self.engine.input.device)
            score, found = self.engine(x).float().softmax(1).cpu().max(1)
        bad = rows["error"] != ""
        return {
            "path": rows["path"],
            "class": np.where(bad, -1, found.numpy()),
            "score": np.where(bad, np.float32(np.nan), score.numpy()),
            "error": rows["error"],
        }


def classify(
    folder: Path, weights: str | None, *, workers: int, batch: int, threads: int, gpus: bool
) -> ray.data.Dataset:
    """A row for each file of a folder, not computed before it is read or written."""
    files = ray.data.read_binary_files(str(folder), include_paths=True)
    return files.map_batches(decoded, batch_size=batch).map_batches(
        Classifier,
        fn_constructor_args=(weights, batch, threads),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
        num_gpus=1 if gpus else 0,
    )


def connect(cpus: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine."""
    if "RAY_ADDRESS" in os.environ:
        # What the workers import besides installed packages goes with the job.
        ray.init(runtime_env={"working_dir": str(Path(__file__).parent)})
    else:
        ray.init(num_cpus=cpus, object_store_memory=256 << 20, include_dashboard=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classify a folder of pictures with Ray Data.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--weights", help="that snv2.models.load takes; by default random")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--gpus", action="store_true", help="give each worker a GPU")
    options = parser.parse_args(arguments)

    # Two more than the workers', for tasks that read and write, which else would wait for ever.
    connect(options.workers * options.threads + 2)
    try:
        rows = classify(
            options.pictures.resolve(), options.weights, workers=options.workers,
            batch=options.batch, threads=options.threads, gpus=options.gpus,
        )  # fmt: skip
        rows.write_parquet(str(options.results.resolve()))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
