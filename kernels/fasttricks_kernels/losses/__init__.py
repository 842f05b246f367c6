"""Cross-entropy and distillation: Triton kernels on CUDA, C on the CPU, and the operators and functions over both."""
