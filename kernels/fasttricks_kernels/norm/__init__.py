"""Batch norm with the addition and the activation behind it: Triton kernels on CUDA, and operators and functions over them."""
