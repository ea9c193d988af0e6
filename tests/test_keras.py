"""Keras's layers as oracles: they and ours on the same masks and noise.

Keras on JAX draws by public functions of `jax.random`; here these give the words of our contract.
"""

import os
import tempfile
import warnings

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp())  # a setting of the user's must not change a default

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import dropjax
from tests import oracle

with warnings.catch_warnings(action="ignore"):  # Keras imports matplotlib, old versions of which warn
    import keras

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
RATE = 0.3


@pytest.fixture
def same_noise(key, monkeypatch):
    """What Keras draws, from our key; a length of 1 in its noise shape is a shared dimension."""
    words, drawn = jax.random.key_data(key), []

    def bernoulli(_, p, shape):
        drawn.append("bernoulli")
        return jnp.asarray(oracle.keep(words, tuple(shape), 1 - p))

    def uniform(_, shape, dtype, minval=0.0, maxval=1.0):
        drawn.append("uniform")
        return jnp.asarray(oracle.words(words, tuple(shape)) / 2**32, dtype)

    def normal(_, shape, dtype):
        drawn.append("normal")
        midpoint = ((oracle.words(words, tuple(shape)) >> 8).astype(np.float64) + 0.5) / 2**24
        return jnp.asarray(special.ndtri(midpoint), dtype)

    for function in [bernoulli, uniform, normal]:
        monkeypatch.setattr(jax.random, function.__name__, function)
    return drawn


LAYERS = [
    ("Dropout", (5, 6), dropjax.dropout, "bernoulli"),
    ("AlphaDropout", (5, 6), dropjax.alpha_dropout, "uniform"),
    ("GaussianDropout", (5, 6), dropjax.gaussian_dropout, "normal"),
    ("GaussianNoise", (5, 6), dropjax.gaussian_noise, "normal"),
    ("SpatialDropout1D", (5, 4, 6), dropjax.spatial_dropout, "bernoulli"),
    ("SpatialDropout2D", (5, 4, 3, 6), dropjax.spatial_dropout, "bernoulli"),
    ("SpatialDropout3D", (4, 2, 3, 2, 6), dropjax.spatial_dropout, "bernoulli"),
]


@pytest.mark.parametrize(("name", "shape", "ours", "draws"), LAYERS, ids=[row[0] for row in LAYERS])
def test_values_are_those_of_keras(name, shape, ours, draws, key, same_noise):
    """Within the float32 rounding of a handful of operations on values below 10."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    layer = getattr(keras.layers, name)
    theirs = layer(RATE)(x, training=True)
    assert same_noise == [draws]
    y = ours(key, x, RATE)
    assert (y != x).any()
    np.testing.assert_allclose(y, theirs, rtol=3e-6, atol=3e-6)
    np.testing.assert_array_equal(layer(RATE)(x, training=False), x)


@pytest.mark.parametrize("n", [2, 3])
def test_channels_first(n, key, same_noise):
    x = jnp.ones((4, 6, *[2] * n))
    theirs = getattr(keras.layers, f"SpatialDropout{n}D")(RATE, data_format="channels_first")(x, training=True)
    assert same_noise == ["bernoulli"]
    np.testing.assert_allclose(dropjax.spatial_dropout(key, x, RATE, channel_axis=1), theirs, rtol=1e-6)


def test_a_noise_shape_is_broadcast_dims(key, same_noise):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 6)), jnp.float32)
    for layer, ours in [(keras.layers.Dropout, dropjax.dropout), (keras.layers.AlphaDropout, dropjax.alpha_dropout)]:
        theirs = layer(RATE, noise_shape=(None, 1, 6))(x, training=True)
        np.testing.assert_allclose(ours(key, x, RATE, broadcast_dims=(1,)), theirs, rtol=3e-6, atol=3e-6)
    assert same_noise == ["bernoulli", "uniform"]
