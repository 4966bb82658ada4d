"""A model of Triton's Python backend: an engine for each instance, batches as Triton makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as triton

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class TritonPythonModel:
    """The class that Triton looks for; it calls each instance from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {
            name: value["string_value"] for name, value in config.get("parameters", {}).items()
        }
        torch.set_num_threads(int(parameters["threads"]))
        height, width, channels = (int(extent) for extent in config["input"][0]["dims"])
        shape = int(config["max_batch_size"]), channels, height, width
        if parameters["weights"]:
            path = Path(args["model_repository"]) / parameters["weights"]
            model = snv2.models.load(path).eval()
        else:
            model = randomize_(snv2.models.shufflenet_v2_x1_0()).eval()
        gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        self.engine = snv2.Engine(model, shape, device, normalize=(MEAN, STD))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests of together at most max_batch_size pictures, which Triton sees to."""
        pictures = [
            torch.from_numpy(triton.get_input_tensor_by_name(request, "pixels").as_numpy())
            for request in requests
        ]
        # Straight to where the engine reads; how many there are may differ from call to call.
        counts = [len(pixels) for pixels in pictures]
        batch = self.engine.input[: sum(counts)]
        for part, pixels in zip(batch.split(counts), pictures, strict=True):
            part.copy_(pixels)
        # A copy, since the next call overwrites the engine's buffer.
        scores = self.engine(batch).float().cpu().clone().split(counts)
        return [
            triton.InferenceResponse([triton.Tensor("scores", part.numpy())]) for part in scores
        ]

    def finalize(self) -> None:
        del self.engine
