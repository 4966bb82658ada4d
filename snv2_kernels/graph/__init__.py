"""Fused modules as PyTorch's compilers see them, and models that its compilers show.

:mod:`~snv2_kernels.graph.recipe` is what a module computes as a text, :mod:`~snv2_kernels.graph.op`
the operator that takes it, :mod:`~snv2_kernels.graph.export` what torch.export sees.
:mod:`~snv2_kernels.graph.recognize` finds units in a graph, with the help of
:mod:`~snv2_kernels.graph.channels`, for :mod:`~snv2_kernels.graph.backend`.
"""
