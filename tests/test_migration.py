"""generator="threefry": the masks and the values of Flax, bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.15, 0.3, 1 / 3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(), (7,), (33, 5), (2, 3, 4, 5), (0, 3)])
def test_masks_are_those_of_bernoulli(key, rate, shape):
    expected = jax.random.bernoulli(key, jnp.float32(1 - rate), shape)
    np.testing.assert_array_equal(dropjax.keep_mask(key, shape, rate, generator="threefry"), expected)
    if rate not in (0.0, 1.0):
        traced = jax.jit(lambda rate: dropjax.keep_mask(key, shape, rate, generator="threefry"))(jnp.float32(rate))
        expected = jax.random.bernoulli(key, 1 - jnp.float32(rate), shape)
        np.testing.assert_array_equal(traced, expected)


def test_rates_between_float32_numbers(key):
    """The rate is not rounded before 1 - rate is: the double rounding would move some thresholds."""
    for rate in np.random.default_rng(0).uniform(0.05, 0.95, 40).tolist():
        expected = jax.random.bernoulli(key, jnp.float32(1 - rate), (300,))
        np.testing.assert_array_equal(dropjax.keep_mask(key, (300,), rate, generator="threefry"), expected)


@pytest.mark.parametrize("broadcast_dims", [(), (0,), (-1,), (0, 2)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.77, 1.0])
def test_values_are_those_of_flax(key, rate, broadcast_dims):
    x = jax.random.normal(key, (4, 5, 6))
    theirs = nn.Dropout(rate, broadcast_dims, deterministic=False)
    ours = dropjax.linen.Dropout(rate, broadcast_dims, deterministic=False, generator="threefry")

    def run(layer, x):
        return layer.apply({}, x, rngs={"dropout": key})

    jitted = jax.jit(run, static_argnums=0)
    np.testing.assert_array_equal(jitted(ours, x), jitted(theirs, x))
    # XLA may turn the division by a constant into a product, which eager Flax does not have
    np.testing.assert_array_max_ulp(run(ours, x), run(theirs, x), maxulp=1)


class Network(nn.Module):
    """A network that is given its dropout layer."""

    dropout: type

    @nn.compact
    def __call__(self, x):
        for width in [64, 32]:
            x = nn.relu(nn.Dense(width)(x))
            x = self.dropout(0.3, deterministic=False)(x)
        return nn.Dense(4)(x)


def threefry_dropout(rate, **fields):
    return dropjax.linen.Dropout(rate, generator="threefry", **fields)


def losses_of_training(model, steps=50):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 4, 64)
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            logits = model.apply(params, x, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for i in range(steps):
        params, state, loss = step(params, state, jax.random.fold_in(jax.random.key(2), i))
        losses.append(float(loss))
    return losses


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_float32_flax_model_has_the_same_losses_for_50_steps():
    theirs = losses_of_training(Network(nn.Dropout))
    assert losses_of_training(Network(threefry_dropout)) == theirs
    assert losses_of_training(Network(dropjax.linen.Dropout)) != theirs
    assert theirs[-1] < theirs[0]


def test_an_nnx_model_draws_the_same_masks():
    ours = dropjax.nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=5), generator="threefry")
    theirs = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=5))
    x = jax.random.normal(jax.random.key(0), (9, 9))
    for _ in range(3):
        np.testing.assert_array_max_ulp(ours(x), theirs(x), maxulp=1)  # as above
