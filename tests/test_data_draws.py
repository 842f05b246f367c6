"""Order and random numbers: against a generator written out in Python integers, and their distributions."""

from __future__ import annotations

import numpy as np
import pytest

from fasttricks.data.pipeline.draws import epoch_order, image_draws, random_bits, stream_key


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs of the published generator, one at a time: it adds to its state and hashes it."""
    outputs, mask = [], 2**64 - 1
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        outputs.append(z ^ z >> 31)
    return outputs


@pytest.mark.parametrize("seed", [0, 1234567, 2**64 - 1])
def test_random_bits_are_the_outputs_of_splitmix64(seed: int) -> None:
    got = random_bits(np.uint64(seed), np.arange(100, dtype=np.uint64))
    assert got.tolist() == splitmix64(seed, 100)


def test_the_generator_is_the_published_one() -> None:
    """The values for seed 1234567 that implementations are checked against (Rosetta Code, Pseudo-random numbers)."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5) == published


def ks_distance(values: np.ndarray) -> float:
    """Largest distance of the empirical distribution from U[0, 1]."""
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(values - steps[:-1]).max(), np.abs(values - steps[1:]).max()))


def test_draws_are_uniform_or_normal_and_independent() -> None:
    """Kolmogorov-Smirnov at p = 1e-4; moments and correlations within 4.5 deviations, from image to image too."""
    count = 20_000
    area, aspect, position, flip, factors, noise = image_draws(3, 7, np.arange(count))
    uniforms = np.column_stack([area, aspect, position, flip, factors])
    assert uniforms.shape == (count, 8)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    for column in uniforms.T:
        assert ks_distance(column) < 2.23 / np.sqrt(count)
    assert noise.shape == (count, 3)
    assert np.abs(noise.mean(0)).max() < 4.5 / np.sqrt(count)
    assert np.abs(noise.std(0) - 1).max() < 4.5 / np.sqrt(2 * count)
    assert abs((noise**4).mean() - 3) < 4.5 * np.sqrt(96 / (3 * count))  # the fourth moment of a normal variable is 3
    columns = np.column_stack([uniforms, noise])
    neighbours = np.column_stack([columns[:-1], columns[1:]])
    assert np.abs(np.corrcoef(neighbours.T) - np.eye(22)).max() < 4.5 / np.sqrt(count)


def test_draws_of_an_image_do_not_depend_on_its_company() -> None:
    together = image_draws(1, 2, np.arange(100))
    for indices in ([5], [99, 5, 0], list(range(50, 80))):
        for part, whole in zip(image_draws(1, 2, np.array(indices)), together, strict=True):
            assert (part == whole[indices]).all()


def test_no_two_streams_share_a_key() -> None:
    seeds = (*range(40), 2**32, 2**40, 2**64 - 1)
    keys = {int(stream_key(s, e, p)) for s in seeds for e in (*range(60), 2**31) for p in (0, 1, 2)}
    assert len(keys) == len(seeds) * 61 * 3


def test_orders_are_permutations_without_relation() -> None:
    """Of seeds and epochs, each pair: rank correlation under 0.1 (10 deviations for 10,000 images)."""
    orders = [epoch_order(seed, epoch, 10_000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32, 0), (1, 1))]
    orders.append(np.arange(10_000))
    for i, one in enumerate(orders):
        assert (np.sort(one) == np.arange(10_000)).all()
        for two in orders[:i]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
            assert abs(np.corrcoef(np.argsort(one), np.argsort(two))[0, 1]) < 0.1


def test_every_order_of_four_is_as_likely() -> None:
    """24 orders in 4800 epochs: chi-squared with 23 degrees of freedom, p = 1e-4."""
    counts = np.unique([epoch_order(0, epoch, 4) for epoch in range(4800)], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 57.1
