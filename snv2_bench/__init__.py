"""The command line ``snv2``, the engines that it compares with, and the paper's experiments.

Nothing in :mod:`snv2_kernels` imports it.
"""
