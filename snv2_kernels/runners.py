"""How an engine runs its plan on each backend: the memory, and one call.

A runner has ``input``, a buffer for what the engine is given, ``results``, which a call fills:
feature maps that were asked for, and the output last; and ``workspace``, all other memory. A call
may be of fewer images than these hold; it returns the results' first images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snv2_kernels import _native, gpu
from snv2_kernels.memory import empty_floats
from snv2_kernels.ops import OPERATORS, operators

if TYPE_CHECKING:
    from snv2_kernels.packing import GpuPlan, Plan, TritonPlan

__all__ = [
    "CpuRunner", "GpuRunner", "Launch", "Pixels", "TritonRunner", "checked_normalize",
]  # fmt: skip

WORKSPACE_SLACK = 255  # bytes, for the ops to align the rest

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel of a call, as ``LaunchInfo`` in ``csrc/include/snv2/cuda.h``. Bytes of maps and
    weights are what all CTAs ask for, in caches or not."""

    kernel: str
    step: int  # of the plan
    ctas: int
    threads: int
    shared_bytes: int  # of a CTA
    columns: int  # of a tile
    resident: bool  # weights are read once by each CTA
    launches: int
    read_bytes: int  # of maps
    written_bytes: int
    weight_bytes: int
    multiply_adds: int
    cluster: int = 1  # CTAs that share what they load
    instructions: int = 0  # of warps, estimated; these two for units alone
    cycles: int = 0  # of the CTAs of an SM, estimated


@dataclass(frozen=True)
class Pixels:
    """Bytes [N, H, W, C] as the network's input: ``byte * scale[c] + shift[c]``."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


def checked_normalize(normalize: Any, channels: int) -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation of each channel.

    Raises:
        ValueError: unless these are finite numbers, one for each channel, and the latter positive.
    """
    expected = f"normalize: expected (mean, std) of {channels} finite numbers each, std > 0"
    try:
        mean, std = ([float(v) for v in values] for values in normalize)
    except (TypeError, ValueError):
        raise ValueError(f"{expected}, got {normalize!r}") from None
    finite = all(math.isfinite(v) for v in (*mean, *std))
    if len(mean) != channels or len(std) != channels or not finite or min(std) <= 0:
        raise ValueError(f"{expected}, got {normalize!r}")
    return mean, std


def _input_buffer(shape: Shape, dtype: torch.dtype, device: Any, pixels: Pixels | None) -> Tensor:
    if pixels is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    n, c, h, w = shape
    return torch.zeros((n, h, w, c), dtype=torch.uint8, device=device)


def _first(tensors: list[Tensor], images: int) -> list[Tensor]:
    """Views of the first images of each tensor; the tensors themselves where these are all."""
    return [t if t.shape[0] == images else t[:images] for t in tensors]


class _Conversion:
    """Pixels on the CPU, by torch, into memory of its own."""

    def __init__(self, pixels: Pixels, shape: Shape, dtype: torch.dtype) -> None:
        self._scale, self._shift = (
            torch.tensor(v, device="cpu")[:, None, None] for v in (pixels.scale, pixels.shift)
        )
        self._exact = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._rounded = self._exact.to(dtype)

    def __call__(self, image: Tensor) -> Tensor:
        """[N, C, H, W] from [N, H, W, C]."""
        exact, rounded = _first([self._exact, self._rounded], image.shape[0])
        exact.copy_(image.permute(0, 3, 1, 2)).mul_(self._scale).add_(self._shift)
        # Of the same dtype they are one tensor.
        return rounded.copy_(exact)


class CpuRunner:
    """One op call on the caller's tensor."""

    op_calls = 1

    def __init__(self, plan: Plan, shape: Shape, dtype: torch.dtype, pixels: Pixels | None) -> None:
        n, _, h, w = shape
        self.plan, self._shape = plan, shape
        with torch.inference_mode(False):  # buffers that may be written in and out of it
            self.input = _input_buffer(shape, dtype, "cpu", pixels)
            # A plan of integers takes the bytes themselves.
            converts = pixels is not None and plan.element != torch.uint8
            self._convert = _Conversion(pixels, shape, dtype) if pixels and converts else None
            self.results = [
                torch.empty(result, dtype=dtype, device="cpu")
                for result in plan.result_shapes(n, h, w)
            ]
        self._allocate_workspace()

    def _allocate_workspace(self) -> None:
        self.threads = torch.get_num_threads()
        n, _, h, w = self._shape
        size = _native.workspace_bytes(
            self.plan.words.numpy(), self.plan.weights.numel(), n, h, w, self.threads
        )
        with torch.inference_mode(False):
            self.workspace = [empty_floats(size // 4)]

    def __call__(self, x: Tensor) -> list[Tensor]:
        if torch.get_num_threads() != self.threads:
            self._allocate_workspace()
        if self._convert is not None:
            x = self._convert(x)
        elif not x.is_contiguous():
            x = self.input[: x.shape[0]].copy_(x)
        results = _first(self.results, x.shape[0])
        torch.ops.snv2.network_out(x, self.plan.weights, self.plan.words, *self.workspace, results)
        return results

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return (self.plan.weights,)

    def launches(self) -> tuple[Launch, ...]:
        return ()


class _GraphRunner:
    """On a GPU one graph, replayed on the current stream: it reads ``input``, where anything else
    is copied first, and computes all images of it. Elsewhere (on the emulator, in Triton's
    interpreter) one op call."""

    op_calls = 1

    def __init__(
        self, plan: GpuPlan | TritonPlan, shape: Shape, device: torch.device, pixels: Pixels | None
    ) -> None:
        n, _, h, w = shape
        with torch.inference_mode(False):
            self.input = _input_buffer(shape, plan.dtype, device, pixels)
            self.results = [
                torch.empty(result, dtype=plan.dtype, device=device)
                for result in plan.result_shapes(n, h, w)
            ]
            self.workspace = self._allocate_workspace()
        self.graph = self._capture() if device.type == "cuda" and n > 0 else None

    def _allocate_workspace(self) -> list[Tensor]:
        raise NotImplementedError

    def _launch(self, x: Tensor, results: list[Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.input.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Kernels are loaded now, which a capture does not allow.
                self._launch(self.input, self.results)
            torch.cuda.current_stream().wait_stream(side)
            # Other threads may go on using the GPU.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._launch(self.input, self.results)
        return graph

    def __call__(self, x: Tensor) -> list[Tensor]:
        results = _first(self.results, x.shape[0])
        (read,) = _first([self.input], x.shape[0])
        if self.graph is None:
            self._launch(x if x.is_contiguous() else read.copy_(x), results)
            return results
        if x.data_ptr() != read.data_ptr() or x.stride() != read.stride():
            read.copy_(x)
        self.graph.replay()
        return results


class GpuRunner(_GraphRunner):
    """The CUDA kernels, on a GPU or on the emulator."""

    def __init__(
        self,
        plan: GpuPlan,
        shape: Shape,
        device: torch.device,
        backend: str,
        pixels: Pixels | None,
    ) -> None:
        self.plan, self._shape, self._operators = plan, shape, OPERATORS[backend]
        self._scale = list(pixels.scale) if pixels else []
        self._shift = list(pixels.shift) if pixels else []
        self._device = gpu.current_device(device)
        self.launches()  # raises where the device cannot run this shape
        super().__init__(plan, shape, device, pixels)

    def _allocate_workspace(self) -> list[Tensor]:
        n, _, h, w = self._shape
        size = gpu.workspace_bytes(self.plan.words, n, h, w, self._device)
        device = self.plan.weights.device
        return [torch.empty(size + WORKSPACE_SLACK, dtype=torch.uint8, device=device)]

    def _launch(self, x: Tensor, results: list[Tensor]) -> None:
        self._operators.gpu_network_out(
            x, *self.plan.arrays, *self.workspace, results, self._scale, self._shift
        )

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return self.plan.arrays[:3]

    def launches(self) -> tuple[Launch, ...]:
        """What a call launches.

        Raises:
            ValueError: if it cannot run on this device.
        """
        n, _, h, w = self._shape
        described = gpu.launches(self.plan.words, n, h, w, self._device)
        return tuple(Launch(**launch) for launch in described)


class TritonRunner(_GraphRunner):
    """The Triton kernels, on a GPU or in their interpreter."""

    def __init__(
        self, plan: TritonPlan, shape: Shape, device: torch.device, pixels: Pixels | None
    ) -> None:
        self.plan, self._shape, self._operators = plan, shape, operators("triton")
        with torch.inference_mode(False):
            affine = (pixels.scale, pixels.shift) if pixels else ()
            self._affine = [torch.tensor(v, dtype=torch.float32, device=device) for v in affine]
        super().__init__(plan, shape, device, pixels)

    def _allocate_workspace(self) -> list[Tensor]:
        from snv2_kernels.triton.network import allocate

        n, _, h, w = self._shape
        return list(allocate(self.plan.weights, self.plan.steps, n, h, w).tensors)

    def _launch(self, x: Tensor, results: list[Tensor]) -> None:
        if self._affine:
            x = x.permute(0, 3, 1, 2)
        self._operators.network_out(
            x, *self.plan.arrays, self.plan.step_words, self.workspace, results, self._affine
        )

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        return self.plan.arrays

    def launches(self) -> tuple[Launch, ...]:
        """None that are described: Triton decides on them when it compiles."""
        return ()
