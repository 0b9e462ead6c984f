"""Kernels for CPU ranks, compiled at first use: what PyTorch has no single operation for.

Everything here has a counterpart in plain PyTorch operations, which is what other devices run.
"""
