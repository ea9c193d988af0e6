"""Seconds of statistics over the words, with bad mixers that the same statistics must catch.

Every statistic is a z-score or a chi-square p-value with its exact distribution; keys are fixed. The bound
on p, 1e-6, leaves a chance of about 1 in 10^4 that a perfect generator would fail anywhere in this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.mask_quality import contingency, mixers
from dropjax import bits

SIDE = 1024


def grid(key):
    return np.asarray(bits.random_words(key, (SIDE, SIDE)))


def over_keys(of):
    """Two short rows for each of 2^16 keys that `of` makes from an index."""
    return lambda key: jax.vmap(lambda i: bits.random_words(of(key, i), (2, 4)))(jnp.arange(2**16))


ORDERS = {  # words as a user's arrays would meet them
    "row-major": grid,
    "column-major": lambda key: grid(key).T,
    "short rows": lambda key: bits.random_words(key, (2**18, 3)),
    "one column": lambda key: bits.random_words(key, (2**20, 1)),
    "strided": lambda key: bits.random_words(key, (SIDE, SIDE * 8))[:, ::8],
    "rank 4": lambda key: bits.random_words(key, (32, 32, 32, 32)),
    "fold_in": over_keys(jax.random.fold_in),
    "successive seeds": over_keys(lambda _, i: jax.random.key(i)),
}


def single_multiply(side=SIDE):
    """A bad mixer: one multiplication of the place."""
    place = np.arange(side * side, dtype=np.uint64).reshape(side, side)
    return (place * 0x9E3779B9 % 2**32).astype(np.uint32)


def chi_square(counts, expected):
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


def byte_values(words):
    """Each byte of the words against the uniform distribution."""
    parts = words.ravel()[:, None] >> np.array([0, 8, 16, 24], np.uint32) & np.uint32(255)
    return min(chi_square(np.bincount(b, minlength=256), len(b) / 256) for b in parts.T)


def neighbouring_pairs(words):
    """The top four bits of neighbours, along the order of the array, jointly."""
    high = (words.ravel() >> np.uint32(28)).astype(int)
    pairs = high[:-1:2] * 16 + high[1::2]
    return chi_square(np.bincount(pairs, minlength=256), len(pairs) / 256)


def lags(words):
    """Agreement of single bits at lags 1 to 64: binomial with p = 1/2."""
    worst = 1.0
    for bit in [0, 7, 15, 16, 24, 31]:
        line = (words.ravel() >> np.uint32(bit) & np.uint32(1)).astype(np.int8)
        for lag in [1, 2, 3, 4, 8, 16, 32, 64]:
            same = (line[lag:] == line[:-lag]).sum()
            n = len(line) - lag
            worst = min(worst, 2 * stats.norm.sf(abs(same - n / 2) / np.sqrt(n / 4)))
    return worst


STATISTICS = [byte_values, neighbouring_pairs, lags]


@pytest.fixture
def mixer():
    """Puts another mixer in the place of the contract's, for one test."""
    yield mixers.install
    mixers.install("contract")


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_words_in_every_order(order):
    words = np.asarray(order(jax.random.key(1234)))
    assert {f.__name__: p for f in STATISTICS if (p := f(words)) <= 1e-6} == {}


def test_a_single_multiplication_is_caught():
    assert min(statistic(single_multiply()) for statistic in STATISTICS) < 1e-12


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_masks_of_successive_keys(rate):
    dropped = contingency.over_keys(1234, rate, (64, 128, 256))
    assert {name: p for name, p in contingency.p_values(dropped, rate).items() if p <= 1e-6} == {}


def test_masks_of_a_training_run(standard_promotion):
    dropped = contingency.of_training(5, 0.1, steps=40)
    assert 0.09 < dropped.mean() < 0.11
    assert {name: p for name, p in contingency.p_values(dropped, 0.1).items() if p <= 1e-6} == {}


@pytest.mark.slow
def test_statistics_of_masks_catch_a_bad_mixer(mixer):
    mixer("single multiply")
    assert min(contingency.p_values(contingency.over_keys(1, 0.1, (64, 512, 512)), 0.1).values()) < 1e-12


@pytest.mark.parametrize(
    "biased",
    [
        lambda drops: drops[:, :, :128].repeat(2, 2),  # neighbours alike
        lambda drops: drops[:1].repeat(16, 0),  # the same mask under each key
        lambda drops: drops[:, :1].repeat(128, 1),  # and in each row
        lambda drops: np.sort(drops, axis=2),
        lambda drops: drops | (np.random.default_rng(0).random(drops.shape) < 0.01),
    ],
)
def test_statistics_of_masks_catch_bad_masks(biased):
    dropped = np.random.default_rng(1).random((16, 128, 256)) < 0.1
    assert min(contingency.p_values(dropped, 0.1).values()) > 1e-6
    assert min(contingency.p_values(biased(dropped), 0.1).values()) < 1e-12


def test_statistics_of_masks_have_the_distribution_that_they_claim():
    """The p-values of 200 stacks of NumPy's masks are uniform, where they are not least of several."""
    found = [contingency.p_values(np.random.default_rng(s).random((8, 32, 64)) < 0.1, 0.1) for s in range(200)]
    for name in ["total", "rows", "columns", "8 x 8 tiles", "pairs of rows, all", "pairs along columns"]:
        assert stats.kstest([p[name] for p in found], "uniform").pvalue > 1e-5, name


@pytest.mark.parametrize("lines", ["rows", "keys"])
def test_lines_share_words_by_chance_only(lines):
    if lines == "rows":
        words = bits.random_words(jax.random.key(3), (1024, 1024))
    else:
        keys = jax.random.split(jax.random.key(3), 1024)
        words = jax.vmap(lambda key: bits.random_words(key, (1024,)))(keys)
    assert contingency.shared_words(np.asarray(words)) > 1e-6


def test_one_injection_is_caught_across_rows(mixer):
    mixer("one injection")
    assert contingency.shared_words(np.asarray(bits.random_words(jax.random.key(3), (1024, 1024)))) < 1e-12


def test_keys_rows_and_steps_agree_by_chance_only():
    """Masks at p = 1/2 of 256 keys at the same places: each pair agrees on a binomial number of places."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(256))
    signs = 1.0 - 2.0 * (np.asarray(jax.vmap(lambda k: bits.random_words(k, (4, 256)))(keys)) >> np.uint32(31))
    flat = signs.reshape(256, -1)
    correlation = (flat @ flat.T)[np.triu_indices(256, 1)] / np.sqrt(flat.shape[1])
    assert np.abs(correlation).max() < stats.norm.isf(1e-6 / correlation.size / 2)
    statistic = (correlation**2).sum()
    assert 2 * min(f(statistic, correlation.size) for f in (stats.chi2.sf, stats.chi2.cdf)) > 1e-6
