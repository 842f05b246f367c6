"""Batch norm with the addition and the activation behind it: Triton kernels on CUDA, C on the CPU, and operators over both."""
