"""What is known of the kernels without a GPU: their machine code, and the bytes they ask for. The library imports none of it."""
