"""A network frozen at one input shape, with all memory planned."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.backends import resolve
from snv2_kernels.fuse import fuse
from snv2_kernels.nn.network import PlannedModule
from snv2_kernels.ops import KERNEL_DTYPES, check_feature_map

__all__ = ["Engine", "EngineReport"]


@dataclass(frozen=True)
class EngineReport:
    """What a call of an engine does. Sizes in bytes."""

    backend: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    op_calls: int
    units: int
    multiply_adds: int
    weight_bytes: int
    workspace_bytes: int
    input_bytes: int
    output_bytes: int
    threads: int

    def __str__(self) -> str:
        def kib(count: int) -> str:
            return f"{count / 1024:,.0f} KiB"

        def shape(s: tuple[int, ...]) -> str:
            return " x ".join(map(str, s))

        return "\n".join(
            [
                f"backend     {self.backend}, {self.threads} threads, "
                f"{str(self.dtype).removeprefix('torch.')}",
                f"input       {shape(self.input_shape)}, {kib(self.input_bytes)}",
                f"output      {shape(self.output_shape)}, {kib(self.output_bytes)}",
                f"op calls    {self.op_calls} ({self.units} units)",
                f"arithmetic  {self.multiply_adds / 1e6:,.1f} M multiply-adds",
                f"weights     {kib(self.weight_bytes)}",
                f"workspace   {kib(self.workspace_bytes)}",
            ]
        )


class Engine:
    """A network, stage or unit frozen for fast inference at a fixed input shape.

    Weights are packed and all memory is planned when the engine is made; a call allocates
    nothing. Later changes of ``model`` do not show. Numerically it is ``fuse(model)``.

    Args:
        model: in ``eval()`` mode; a model whose whole forward :func:`snv2_kernels.fuse`
            recognises.
        input_shape: [N, C, H, W].
        device: defaults to the parameters' device.
        dtype: of input and output, float32, float16 or bfloat16; defaults to the parameters'.
            Weights are packed from the parameters as they are, without rounding them first.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: if no kernel backend is there for ``device``.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int, int] = (1, 3, 224, 224),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fused = fuse(model)
        if not isinstance(fused, PlannedModule):
            raise TypeError(
                f"model: {type(model).__name__} is not a network, stage or unit as a whole;"
                " see snv2_kernels.explain(model)"
            )
        if model.training:
            raise ValueError("model: expected eval() mode; call model.eval() first")
        reason = fused.reason()
        if reason is not None:
            raise ValueError(f"model: cannot run fused: {reason}")
        packed = fused.packed()
        assert packed.device is not None
        assert packed.dtype is not None
        self._plan = packed.weights
        self._dtype = packed.dtype if dtype is None else dtype
        self._device = torch.device(packed.device if device is None else device)
        if self._dtype not in KERNEL_DTYPES:
            raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
        self._backend = resolve(self._device, "auto")
        if self._backend not in fused.kernel_backends:
            raise RuntimeError(f"device: no kernel backend is available for {self._device}")
        shape = tuple(input_shape)
        if len(shape) != 4 or not all(isinstance(extent, int) for extent in shape):
            raise ValueError(f"input_shape: expected [N, C, H, W], got {input_shape}")
        if shape[1] != self._plan.in_channels or min(shape[0], shape[2] - 1, shape[3] - 1) < 0:
            raise ValueError(
                f"input_shape: expected [N >= 0, {self._plan.in_channels}, H >= 1, W >= 1],"
                f" got {shape}"
            )
        self._shape = shape
        self._lock = threading.Lock()
        with torch.inference_mode(False):  # buffers that may be written in and out of it
            self._input = torch.zeros(shape, dtype=self._dtype)
            out_shape = self._plan.output_shape(shape[0], shape[2], shape[3])
            self._output = torch.empty(out_shape, dtype=self._dtype)
        self._allocate_workspace()

    def _allocate_workspace(self) -> None:
        self._threads = torch.get_num_threads()
        n, _, h, w = self._shape
        size = _native.workspace_bytes(
            self._plan.words.numpy(), self._plan.weights.numel(), n, h, w, self._threads
        )
        with torch.inference_mode(False):
            self._workspace = torch.empty(size // 4, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """The output for ``x``, in a buffer that the next call overwrites.

        Args:
            x: of the engine's shape and dtype; any strides (a copy is made unless contiguous).

        Raises:
            TypeError, ValueError: if ``x`` does not fit, or needs a gradient.
            RuntimeError: if another thread is inside this engine.
        """
        check_feature_map(x)
        if tuple(x.shape) != self._shape:
            raise ValueError(f"x: expected shape {self._shape}, got {tuple(x.shape)}")
        if x.dtype != self._dtype:
            raise TypeError(f"x: expected {self._dtype}, got {x.dtype}")
        if x.device != self._device:
            raise ValueError(f"x: expected device {self._device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x: requires a gradient, which an engine does not have")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this engine is in use; make one engine for each thread")
        try:
            if torch.get_num_threads() != self._threads:
                self._allocate_workspace()
            with torch.no_grad():
                if not x.is_contiguous():
                    x = self._input.copy_(x)
                torch.ops.snv2.network_out(
                    x, self._plan.weights, self._plan.words, self._workspace, self._output
                )
        finally:
            self._lock.release()
        return self._output

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def report(self) -> EngineReport:
        """What a call does, and the memory it uses."""

        def size(t: Tensor) -> int:
            return t.numel() * t.element_size()

        return EngineReport(
            backend=self._backend,
            input_shape=self._shape,
            output_shape=tuple(self._output.shape),
            dtype=self._dtype,
            op_calls=1,
            units=self._plan.units,
            multiply_adds=self._shape[0] * self._plan.multiply_adds(*self._shape[2:]),
            weight_bytes=size(self._plan.weights),
            workspace_bytes=size(self._workspace),
            input_bytes=size(self._input),
            output_bytes=size(self._output),
            threads=self._threads,
        )
