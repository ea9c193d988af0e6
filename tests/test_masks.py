"""Rates to thresholds to scales: one integer rule, whatever the kind of the rate."""

import fractions

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dropjax
from dropjax import masks
from dropjax._checks import Fixed
from tests import oracle

RATES = [0.0, 2.0**-40, 2.0**-33, 2.0**-32, 1e-9, 1e-3, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.999, 1 - 2.0**-24, 1.0]


@pytest.mark.parametrize("rate", RATES)
def test_one_threshold_for_every_kind_of_rate(rate):
    expected = oracle.threshold(rate)
    assert masks.threshold(Fixed(rate)) == expected
    traced = int(jax.jit(masks.threshold)(jnp.float32(rate)))
    assert traced == (0 if rate == 1 else expected)  # 2^32 is no word: a rate of 1 is decided apart
    with jax.enable_x64(True):
        x64 = dropjax.keep_mask(jax.random.key(1), (500,), jnp.asarray(rate, jnp.float64))
    np.testing.assert_array_equal(x64, dropjax.keep_mask(jax.random.key(1), (500,), rate))
    np.testing.assert_array_equal(x64, oracle.keep([0, 1], (500,), rate))


@pytest.mark.parametrize("rate", RATES)
def test_scale_is_the_inverse_of_the_realised_keep_rate(rate):
    expected = oracle.scale(rate) if rate < 1 else 1  # nothing is kept then, and an infinity times 0 would be NaN
    assert masks.scale(Fixed(rate)) == expected
    assert jax.jit(masks.scale)(jnp.float32(rate)) == expected
    if rate < 1:
        realised = fractions.Fraction(2**32 - oracle.threshold(rate), 2**32)
        assert abs(float(expected) * realised - 1) < fractions.Fraction(1, 2**23)  # two roundings to float32


def test_reciprocal_is_correctly_rounded():
    rng = np.random.default_rng(0)
    q = np.concatenate(
        [
            2.0 ** rng.uniform(-32, 0, 200_000),
            2.0 ** np.arange(-32, 1),
            np.nextafter(np.float32(2.0) ** np.arange(-31, 1, dtype=np.float32), np.float32(0)),
            np.nextafter(np.float32(2.0) ** np.arange(-32, 0, dtype=np.float32), np.float32(2)),
        ]
    ).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(masks.reciprocal)(q), np.float32(1) / q)


def test_reciprocal_mends_a_quotient_that_is_off_by_two(monkeypatch):
    """As accelerators divide: the rounding comes from the integer remainder."""
    q = (2.0 ** np.random.default_rng(1).uniform(-32, 0, 20_000)).astype(np.float32)

    original = jax.lax.div
    for ulp in [-2, -1, 1, 2]:

        def approximate(a, b, ulp=ulp):
            quotient = original(a, b)
            if quotient.dtype != jnp.float32:
                return quotient
            word = jax.lax.bitcast_convert_type(quotient, jnp.int32) + ulp
            return jax.lax.bitcast_convert_type(word, jnp.float32)

        with monkeypatch.context() as patch:
            patch.setattr(masks.lax, "div", approximate)
            np.testing.assert_array_equal(masks.reciprocal(jnp.asarray(q)), np.float32(1) / q)


def test_expectation_of_narrow_floats_is_unbiased():
    """Flax rounds 1 - 0.1 to bfloat16 first and scales by 1.1131, 0.18 % too much."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 2**20), jnp.bfloat16)
    y = dropjax.dropout(jax.random.key(0), x, 0.1)
    kept = np.asarray(y != 0)
    ratio = np.asarray(y, np.float64)[kept].sum() / np.asarray(x, np.float64)[kept].sum()
    assert abs(ratio - 1 / 0.9) < 1e-4  # rounding errors of 2^-9 a value, averaged over a million


def test_keep_share_is_binomial():
    n = 2**22
    for rate in [1e-4, 0.1, 0.5, 0.9]:
        kept = int(dropjax.keep_mask(jax.random.key(3), (2**11, 2**11), rate).sum())
        assert abs(kept - n * (1 - rate)) < 5 * np.sqrt(n * rate * (1 - rate))


def test_masks_of_a_higher_rate_lie_within_those_of_a_lower(key):
    masks_ = [dropjax.keep_mask(key, (50, 50), rate) for rate in [0.1, 0.3, 0.9]]
    assert not (masks_[1] & ~masks_[0]).any()
    assert not (masks_[2] & ~masks_[1]).any()


def test_apply_mask_is_dropout_with_that_mask(key):
    x = jax.random.normal(key, (7, 9))
    mask = dropjax.keep_mask(key, x.shape, 0.3)
    np.testing.assert_array_equal(dropjax.apply_mask(x, mask, 0.3), dropjax.dropout(key, x, 0.3))
    stored = np.asarray(mask[:1])
    y = dropjax.apply_mask(x, stored, jnp.float32(0.3))
    np.testing.assert_array_equal(y, np.where(stored, np.asarray(x) * oracle.scale(0.3), np.float32(0)))
    out_of_range = jax.jit(lambda rate: dropjax.apply_mask(x, mask, rate))(jnp.float32(1.5))
    assert jnp.isnan(out_of_range).all()


def test_apply_mask_gradient_is_the_mask_times_the_scale(key):
    mask = dropjax.keep_mask(key, (40,), 0.5)
    gradient = jax.grad(lambda x: dropjax.apply_mask(x, mask, 0.5).sum())(jnp.ones(40))
    np.testing.assert_array_equal(gradient, np.where(mask, 2, 0))


def test_what_is_dropped_is_zero_even_if_infinite(key):
    x = jnp.full((100,), jnp.inf)
    for y in [dropjax.dropout(key, x, 0.5), dropjax.dropout(key, x, 1.0), dropjax.dropout(key, x, jnp.float32(0.5))]:
        assert set(np.unique(y)) <= {0.0, np.inf}
        assert (y == 0).any()
    assert not dropjax.dropout(key, jnp.full((100,), jnp.nan), 1.0).any()


def test_overflow_is_that_of_the_dtype(key):
    y = np.asarray(dropjax.dropout(key, jnp.full((64,), 60000, jnp.float16), 0.5))
    assert set(np.unique(y)) == {0.0, np.inf}
    y = np.asarray(dropjax.dropout(key, jnp.full((64,), 400, jnp.float8_e4m3fn), 0.5), np.float32)
    expected = np.asarray(np.float32(800).astype(ml_dtypes.float8_e4m3fn), np.float32)
    assert np.isnan(expected)
    assert np.isnan(y).any()
    assert (y[~np.isnan(y)] == 0).all()
