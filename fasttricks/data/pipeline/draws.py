"""Order and random numbers as pure functions of (seed, epoch, image): nothing to store, nothing to restore.

Every number is an output of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014), whose
n-th output is a hash of key + n * constant: any of them costs the same, and whole arrays are made at once, where numpy's
generators must be asked image by image. The key of a stream is numpy's SeedSequence of (seed, epoch, purpose). So neither
rank, batch size, threads nor a resume changes the numbers of an image. No torch, no DALI.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ORDER, _IMAGES, _QUOTAS = 0, 1, 2  # purposes
_COLUMNS = 12
"""Numbers an image: area, aspect, y, x, flip, three colour factors, and four that make three normal ones."""


class Draws(NamedTuple):
    """The random numbers of N images in an epoch, not yet scaled to a config's ranges. float64, uniform in [0, 1) but `noise`."""

    area: Array
    """(N,)"""
    aspect: Array
    """(N,)"""
    position: Array
    """(N, 2), y and x."""
    flip: Array
    """(N,)"""
    factors: Array
    """(N, 3): one for each of the three colour steps."""
    noise: Array
    """(N, 3): standard normal, one a principal axis."""


def image_draws(seed: int, epoch: int, indices: NDArray[np.int64]) -> Draws:
    """The random numbers in `epoch` of the images at `indices`, 0 or more, of the data set. 0.4 us an image in batches of 256."""
    counters = (indices[:, None] * _COLUMNS + np.arange(_COLUMNS)).astype(np.uint64)
    bits = random_bits(stream_key(seed, epoch, _IMAGES), counters)
    uniform: Array = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[:, 8:10]))  # Box and Muller, 1958
    angle = 2 * np.pi * uniform[:, 10:12]
    noise = np.column_stack([radius * np.cos(angle), radius[:, 0] * np.sin(angle[:, 0])])
    return Draws(uniform[:, 0], uniform[:, 1], uniform[:, 2:4], uniform[:, 4], uniform[:, 5:8], noise)


def alternating_flip(seed: int, epoch: int, indices: NDArray[np.int64]) -> Array:
    """Draws.flip, (N,), of which each image's moves by a half from epoch to epoch: below 0.5 in every second one.

    Source: Jordan 2024 (arXiv:2404.00498), section 3.6.
    """
    return (image_draws(seed, 0, indices).flip + 0.5 * (epoch % 2)) % 1.0


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """A random permutation of the data set, the images by a random key each; 0.2 s for a million."""
    keys = random_bits(stream_key(seed, epoch, _ORDER), np.arange(num_images, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def balanced_order(seed: int, epoch: int, labels: NDArray[np.int64], balance: float) -> NDArray[np.int64]:
    """N turns of `epoch`, (N,) for N images with `labels`, in random order: a class of n images has a share as n^(1 - balance).

    A turn t shows image t % N, for the (t // N)-th time again, so each has random numbers of its own. A class's images come
    equally often, give or take one, which are drawn. The number of turns of a class is its exact share, rounded up or down
    at random, so that over epochs it is that share. balance: above 0, at most 1. 0.5 s for a million.
    """
    count = len(labels)
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = sizes.astype(np.float64) ** (1 - balance)
    ends = np.cumsum(shares) * (count / shares.sum())
    ends[-1] = count
    bits = random_bits(stream_key(seed, epoch, _QUOTAS), np.arange(count + 1, dtype=np.uint64))
    offset = float(bits[0] >> np.uint64(11)) * 2.0**-53
    quotas = np.diff(np.floor(ends + offset).astype(np.int64), prepend=0)
    ranks = _ranks_in_class(inverse, bits[1:], sizes)
    times = quotas[inverse] // sizes[inverse] + (ranks < quotas[inverse] % sizes[inverse])
    images = np.repeat(np.arange(count), times)
    again = np.arange(len(images)) - np.repeat(np.cumsum(times) - times, times)
    turns: NDArray[np.int64] = images + again * count
    return turns[epoch_order(seed, epoch, count)]


def _ranks_in_class(
    inverse: NDArray[np.int64], keys: NDArray[np.uint64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(N,): the place of each image among those of its class, 0 to its size - 1, by its key."""
    order = np.lexsort((keys, inverse))
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def stream_key(seed: int, epoch: int = 0, purpose: int = 0) -> np.uint64:
    """64 bits, well mixed: neighbours give unrelated streams. seed below 2^64, epoch and purpose below 2^32."""
    # one integer: numpy cuts a tuple into 32-bit words of no fixed width, so that (2^32, 1) meets (0, 1, 1)
    entropy = seed | epoch << 64 | purpose << 96
    return np.uint64(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def random_bits(key: np.uint64, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The outputs number `counters` (from 0) of a SplitMix64 generator that was seeded with `key`."""
    z = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
