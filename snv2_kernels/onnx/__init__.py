"""ONNX files as ordinary modules. Only reading a file needs the package ``onnx``."""

from typing import Any

__all__ = ["load_onnx"]


def __getattr__(name: str) -> Any:
    if name == "load_onnx":
        try:
            import onnx  # noqa: F401
        except ImportError as error:
            message = 'load_onnx needs the package onnx: pip install "snv2_kernels[onnx]"'
            raise ImportError(message) from error
        from snv2_kernels.onnx.loading import load_onnx

        return load_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
