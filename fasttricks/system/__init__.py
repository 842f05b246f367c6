"""Ranks, signals, processes, GPU readings."""
