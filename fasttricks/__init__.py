"""Bag-of-tricks training of image classifiers (He et al., 2018): the fastest correct way on one CPU, one GPU or many."""

__version__ = "0.1.0"
