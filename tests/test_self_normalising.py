"""Twenty layers of SELU keep mean 0 and variance 1: with alpha dropout they do, with plain dropout they don't."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax

DEPTH, WIDTH, RATE = 20, 256, 0.1
FUNCTIONS = {
    "dense": (dropjax.alpha_dropout, dropjax.dropout, (256, WIDTH)),
    "convolutional": (dropjax.feature_alpha_dropout, dropjax.spatial_dropout, (64, 4, WIDTH)),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def moments(function, shape, rate):
    """Mean and variance over all activations behind each layer, `[depth, 2]`.

    The weights are LeCun normal, N(0, 1 / width), drawn anew at each layer; a convolution is of places by
    themselves, the case in which places of a channel stay as alike as they can.
    """

    def layer(x, keys):
        weights = jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
        x = function(keys[1], jax.nn.selu(x @ weights), rate)
        return x, jnp.stack([x.mean(), x.var()])

    keys = jax.random.split(jax.random.key(0), (DEPTH, 2))
    return jax.lax.scan(layer, jax.random.normal(jax.random.key(1), shape), keys)[1]


def theory(rate, alpha):
    """The same for infinite width: each layer sees N(0, E[x^2]), whose integrals a sum over a fine grid gives."""
    z, dz = np.linspace(-12, 12, 100_001, retstep=True)
    scale, saturated, q, second, found = 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772, 1 - rate, 1.0, []
    for _ in range(DEPTH):
        density = np.exp(-(z**2) / (2 * second)) / np.sqrt(2 * np.pi * second) * dz
        selu = np.where(z > 0, scale * z, saturated * np.expm1(np.minimum(z, 0)))
        mean, square = (selu * density).sum(), (selu**2 * density).sum()
        if alpha:
            a = (q * (1 + rate * saturated**2)) ** -0.5
            b = a * saturated * rate
            mean, square = (
                q * (a * mean + b) + rate * (b - a * saturated),
                q * (a**2 * square + 2 * a * b * mean + b**2) + rate * (b - a * saturated) ** 2,
            )
        else:
            square /= q
        second = square
        found.append([mean, square - mean**2])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_twenty_layers_keep_mean_and_variance(kind):
    """Five standard deviations of the fluctuation that finite width W and n independent examples leave.

    Mean: masks add at most 1 / n to the square of the mean example at each layer, and SELU does not amplify it
    (E[selu'(z)] = 0.985), so that the mean over W units has at most the variance (layers + 1) / (n W).
    Variance: a layer adds 2 / W^2 by the norms of its weights and at most 3 / (n W) by its activations, whose
    kurtosis is 2.8 at most; layers damp it, by less than 0.8 each, so that it sums to at most 1 / (1 - 0.8^2) of that.
    """
    alpha, plain, shape = FUNCTIONS[kind]
    n = shape[0]
    bounds = 5 * np.sqrt([(DEPTH + 1) / (n * WIDTH), (2 / WIDTH**2 + 3 / (n * WIDTH)) / (1 - 0.8**2)])
    assert (bounds < 0.2).all()
    ours = np.asarray(moments(alpha, shape, jnp.float32(RATE)))
    np.testing.assert_allclose(theory(RATE, alpha=True), [[0, 1]] * DEPTH, atol=1e-6)
    assert (np.abs(ours - [0, 1]) <= bounds).all()
    control, expected = np.asarray(moments(plain, shape, jnp.float32(RATE))), theory(RATE, alpha=False)
    assert (np.abs(control - expected) <= bounds * expected[:, 1:]).all()
    assert (control[5:, 1] > 1 + 2 * bounds[1]).all()
    assert (control[10:, 1] > 1.5).all()
