"""Moments without sampling: exact for one layer, close to a million samples for two, and quadrature for the ReLU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from benchmarks.moments import errors
from dropjax.mc import moments

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


def test_one_dense_layer_under_dropout_is_exact():
    """By enumeration of all 2^6 masks."""
    x, kernel, bias, rate = normal(6), normal(6, 3), normal(3), 0.3
    masks = (np.arange(64)[:, None] >> np.arange(6)) & 1
    weight = np.prod(np.where(masks, 1 - rate, rate), -1)
    y = (masks * np.asarray(x, float) / (1 - rate)) @ np.asarray(kernel, float) + np.asarray(bias, float)
    mean = weight @ y
    found = jax.jit(lambda x: moments.dense(*moments.dropout(x, 0 * x, rate), kernel, bias))(x)
    np.testing.assert_allclose(found[0], mean, rtol=1e-5)
    np.testing.assert_allclose(found[1], weight @ (y - mean) ** 2, rtol=1e-5)


def test_dropout_of_a_random_input():
    """E[y^2] = (Var[x] + E[x]^2) / q, by the law of total variance."""
    mean, var, rate = normal(5), normal(5) ** 2, jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])
    found = jax.jit(moments.dropout)(mean, var, rate)
    q, m, v = 1 - np.asarray(rate, float)[:4], np.asarray(mean, float)[:4], np.asarray(var, float)[:4]
    np.testing.assert_allclose(found[0], np.asarray(mean) * [1, 1, 1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1][:4], (v + m**2) / q - m**2, rtol=1e-4, atol=1e-6)
    assert found[1][4] == 0
    for value, gradient in zip(found, jax.jit(jax.jacobian(moments.dropout, 2))(mean, var, rate), strict=True):
        assert jnp.isfinite(value).all()
        assert jnp.isfinite(gradient).all()


def test_relu_against_quadrature_in_both_tails():
    mean = np.array([-30.0, -6.0, -2.0, -0.1, 0.0, 0.5, 3.0, 8.0, 1000.0, 2.0, -2.0, 0.0])
    std = np.array([1.0, 1.0, 1.5, 0.1, 2.0, 1.0, 1.0, 0.5, 3.0, 0.0, 0.0, 0.0])
    found = jax.jit(moments.relu)(mean, std**2)
    for m, s, first, var in zip(mean, std, *found, strict=True):
        if s == 0:
            assert (first, var) == (max(m, 0), 0)
            continue
        density = stats.norm(m, s).pdf
        span = max(m - 12 * s, 0), max(m + 12 * s, 1)
        one, two = (integrate.quad(lambda x: x**k * density(x), *span)[0] for k in (1, 2))  # noqa: B023
        centred = integrate.quad(lambda x: (x - one) ** 2 * density(x), *span)[0] + one**2 * stats.norm.cdf(-m / s)  # noqa: B023
        np.testing.assert_allclose(first, one, rtol=1e-5, atol=1e-6 * s)
        np.testing.assert_allclose(var, centred, rtol=1e-5, atol=1e-6 * s**2)
        np.testing.assert_allclose(var, two - one**2, rtol=1e-5, atol=1e-6 * max(m, s) ** 2)
    gradients = jax.jit(jax.vmap(jax.jacobian(moments.relu, (0, 1))))(jnp.float32(mean), jnp.float32(std**2))
    assert all(jnp.isfinite(of).all() for of in jax.tree.leaves(gradients))
    assert gradients[1][1][9] == 1  # of a known positive input, the variance passes


def test_a_hidden_layer_against_a_million_samples(key):
    """Close, but not exact: the hidden units share dropped inputs. The samples' own errors are below 0.005."""
    shift, ratio = jax.jit(lambda key: errors((8, 16, 4), 0.2, key, 1_000_000))(key)
    assert (shift < 0.05).all()
    assert (jnp.abs(ratio - 1) < 0.3).all()
    assert (jnp.abs(ratio - 1) > 0.01).any()  # correlations are not seen


def test_dtypes_bad_input_and_what_is_traced():
    def layer(x, kernel):
        return moments.dense(*moments.relu(*moments.dropout(x, x, 0.5)), kernel, kernel[0])

    for dtype, wide in [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float64, jnp.float64)]:
        with jax.enable_x64(wide == jnp.float64):
            y = jax.eval_shape(layer, jnp.ones((0, 3), dtype), jnp.ones((3, 2), dtype))
        assert all(of.dtype == wide and of.shape == (0, 2) for of in y)
    x, kernel = jnp.ones(3), jnp.ones((3, 2))
    assert jnp.isnan(jax.jit(moments.relu)(x, -x)[1]).all()
    assert jnp.isnan(jax.jit(moments.dense)(x, -x, kernel)[1]).all()
    assert jnp.isnan(jnp.stack(jax.jit(moments.dropout)(x, x, 1.5))).all()
    for call, kind, message in [
        (lambda: moments.relu(x, -x), ValueError, "relu: var must not be negative, got -1. It is the square of a dev"),
        (lambda: moments.relu(x, x[:2]), ValueError, "relu: mean and var must have one shape, got float32[3] and flo"),
        (lambda: moments.relu(x, 1), TypeError, "relu: mean and var must be floats, got float32[3] and int32[]."),
        (
            lambda: moments.dense(x, x, kernel.T),
            ValueError,
            "dense: kernel and bias must be of shapes [inputs, outputs",
        ),
        (
            lambda: moments.dense(x, x, kernel > 0),
            TypeError,
            "dense: kernel and bias must be floats, got bool[3,2] and N",
        ),
        (lambda: moments.dropout(x, x, 50), ValueError, "dropout: rate must be in [0, 1], got 50.0. For a percentage"),
    ]:
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value)
