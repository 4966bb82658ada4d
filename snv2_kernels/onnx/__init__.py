"""ONNX files as ordinary modules."""

from snv2_kernels.onnx.loading import load_onnx

__all__ = ["load_onnx"]
