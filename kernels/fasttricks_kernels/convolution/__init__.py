"""Convolutions of float32 on the CPU, where they are faster than torch's."""
