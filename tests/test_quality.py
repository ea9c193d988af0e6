"""Seconds of statistics over the words, with bad mixers that the same statistics must catch.

Every statistic is a z-score or a chi-square p-value with its exact distribution; keys are fixed. The bound
on p, 1e-6, leaves a chance of about 1 in 10^4 that a perfect generator would fail anywhere in this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

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


def rows_permuted(side=SIDE):
    """A bad mixer: one injection whose rows are the same words in another order."""
    words = np.asarray(bits.random_words(jax.random.key(1), (1, side)))[0]
    return np.stack([words[np.arange(side) ^ row] for row in range(side)])


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


def agreement_of_rows(words):
    """Masks at rate 0.1 of pairs of rows: the number of common drops is binomial with p = 0.01."""
    dropped = (words.reshape(len(words), -1) < np.uint32(0.1 * 2**32)).astype(np.int32)
    common = (dropped[:-1] * dropped[1:]).sum(1)
    z = (common.sum() - 0.01 * dropped[1:].size) / np.sqrt(dropped[1:].size * 0.01 * 0.99)
    return 2 * stats.norm.sf(abs(z))


def totals_of_rows_and_columns(words):
    """Drops at rate 0.1 in each row and column: their variance is binomial."""
    dropped = (words.reshape(len(words), -1) < np.uint32(0.1 * 2**32)).astype(np.int64)
    worst = 1.0
    for axis in (0, 1):
        totals, n = dropped.sum(axis), dropped.shape[axis]
        statistic = ((totals - 0.1 * n) ** 2 / (0.09 * n)).sum()
        worst = min(worst, 2 * min(stats.chi2.sf(statistic, len(totals)), stats.chi2.cdf(statistic, len(totals))))
    return worst


STATISTICS = [byte_values, neighbouring_pairs, lags]
GRID_STATISTICS = [*STATISTICS, agreement_of_rows, totals_of_rows_and_columns]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_words_in_every_order(order):
    words = np.asarray(order(jax.random.key(1234)))
    assert {f.__name__: p for f in STATISTICS if (p := f(words)) <= 1e-6} == {}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("statistic", [agreement_of_rows, totals_of_rows_and_columns], ids=lambda f: f.__name__)
def test_grids(seed, statistic):
    assert statistic(grid(jax.random.key(seed))) > 1e-6


@pytest.mark.parametrize("bad", [single_multiply, rows_permuted], ids=lambda f: f.__name__)
def test_bad_mixers_are_caught(bad):
    assert min(statistic(bad()) for statistic in GRID_STATISTICS) < 1e-12


def test_keys_rows_and_steps_agree_by_chance_only():
    """Masks at p = 1/2 of 256 keys at the same places: each pair agrees on a binomial number of places."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(256))
    signs = 1.0 - 2.0 * (np.asarray(jax.vmap(lambda k: bits.random_words(k, (4, 256)))(keys)) >> np.uint32(31))
    flat = signs.reshape(256, -1)
    correlation = (flat @ flat.T)[np.triu_indices(256, 1)] / np.sqrt(flat.shape[1])
    assert np.abs(correlation).max() < stats.norm.isf(1e-6 / correlation.size / 2)
    statistic = (correlation**2).sum()
    assert 2 * min(f(statistic, correlation.size) for f in (stats.chi2.sf, stats.chi2.cdf)) > 1e-6
