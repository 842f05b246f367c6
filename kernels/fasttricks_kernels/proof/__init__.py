"""Proofs about the kernels without a GPU: their machine code, and the bytes they request. The library imports none of it."""
