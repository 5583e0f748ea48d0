"""Kernels in Triton for CUDA devices. Its modules need ``triton``: import them where ``runtime`` says it is there."""
