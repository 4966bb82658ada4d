"""The report of what a call of an engine does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snv2_kernels.runners import Launch

__all__ = ["EngineReport"]


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
    threads: int  # of the CPU backend; 1 elsewhere
    element: torch.dtype  # of the maps on the way
    graph: bool  # whether a call replays a CUDA graph
    kernels: tuple[Launch, ...]  # of CUDA, in order; empty on the CPU and for Triton

    @property
    def launches(self) -> int:
        """Kernels that a call launches, some repeatedly where a batch is taken in chunks."""
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def read_bytes(self) -> int:
        """Of feature maps, by all kernels."""
        return sum(kernel.read_bytes for kernel in self.kernels)

    @property
    def written_bytes(self) -> int:
        """Of feature maps, by all kernels."""
        return sum(kernel.written_bytes for kernel in self.kernels)

    @property
    def weight_read_bytes(self) -> int:
        """Of weights and parameters, each time that a CTA reads them."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    def __str__(self) -> str:
        where = f", {self.threads} threads" if self.backend == "cpu" else ""
        lines = [
            f"backend     {self.backend}{where}, {_name(self.dtype)}"
            + (f", maps of {_name(self.element)}" if self.element != self.dtype else ""),
            f"input       {_text(self.input_shape)}, {_kib(self.input_bytes)}",
            f"output      {_text(self.output_shape)}, {_kib(self.output_bytes)}",
            f"op calls    {self.op_calls} ({self.units} units)",
            f"arithmetic  {self.multiply_adds / 1e6:,.1f} M multiply-adds",
            f"weights     {_kib(self.weight_bytes)}",
            f"workspace   {_kib(self.workspace_bytes)}",
        ]
        if not self.kernels:
            return "\n".join(lines)
        replayed = ", one CUDA graph" if self.graph else ""
        lines += [
            f"launches    {self.launches}{replayed}",
            f"maps        {_kib(self.read_bytes)} read, {_kib(self.written_bytes)} written",
            f"            {_kib(self.weight_read_bytes)} of weights read by all CTAs",
            "",
            "kernel              step  launches   CTAs  cluster  threads  shared KiB  tile"
            "  weights",
        ]
        lines += [
            f"{k.kernel:18}  {k.step:4}  {k.launches:8}  {k.ctas:5}  {k.cluster:7}  {k.threads:7}"
            f"  {k.shared_bytes / 1024:10.1f}  {k.columns:4}"
            f"  {'kept' if k.resident else 'streamed'}"
            for k in self.kernels
        ]
        return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kib(count: int) -> str:
    return f"{count / 1024:,.0f} KiB"


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
