"""Fused modules as PyTorch's compilers see them.

:mod:`~snv2_kernels.graph.recipe` is what a module computes as a text; :mod:`~snv2_kernels.graph.op`
is the operator that takes it, with the parameters as inputs.
"""
