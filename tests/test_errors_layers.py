"""Bad input to layers, to Monte Carlo and to calibration."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import mc
from tests.test_errors import KEY, X, raises
from tests.variants import VARIANTS


def test_linen_errors_are_those_of_flax():
    for ours, theirs in [(dropjax.linen.Dropout, nn.Dropout)]:
        for fields, call in [({}, {}), ({"deterministic": True}, {"deterministic": True})]:
            message = []
            for layer in [ours, theirs]:
                with pytest.raises(ValueError, match="deterministic") as caught:
                    layer(0.5, **fields).apply({}, X, **call)
                message.append((type(caught.value), str(caught.value)))
            assert message[0] == message[1]
        message = []
        for layer in [ours, theirs]:
            with pytest.raises(flax.errors.InvalidRngError) as caught:
                layer(0.5).apply({}, X, deterministic=False)
            message.append(str(caught.value))
        assert message[0] == message[1]


@pytest.mark.parametrize("name", sorted({row.layer for row in VARIANTS.values() if "range" not in row.not_for}))
def test_layers_raise_the_errors_of_their_function(name):
    for call in [
        lambda rate: getattr(dropjax.linen, name)(rate).apply({}, X, False, rng=KEY),
        lambda rate: getattr(dropjax.nnx, name)(rate)(X, rngs=KEY),
    ]:
        with pytest.raises(ValueError, match=r"must be in \[0, 1.*got 1.5"):
            call(1.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(0.5)(X),
        lambda layer: layer(0.5, deterministic=None)(X),
        lambda layer: layer(0.5, rngs=3),
        lambda layer: layer(0.5, rngs={"dropout": KEY}),
        lambda layer: layer(0.5)(X, rngs="key"),
        lambda layer: layer(0.5, rngs=nnx.Rngs(params=0)),
    ],
    ids=["no rngs", "no deterministic", "wrong rngs", "a mapping", "wrong rngs at the call", "no such stream"],
)
def test_nnx_errors_are_those_of_flax(call):
    raised = []
    for layer in [dropjax.nnx.Dropout, nnx.Dropout]:
        with pytest.raises((ValueError, TypeError, KeyError)) as caught:
            call(layer)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("function", [mc.sample, mc.classify], ids=lambda f: f.__name__)
def test_monte_carlo(function):
    def fn(key):
        return dropjax.dropout(key, X, 0.5)

    name = function.__name__
    raises(ValueError, f"{name}: num_samples must be at least 1, got 0.", function, fn, KEY, 0)
    raises(TypeError, f"{name}: num_samples must be an integer, got 1.5.", function, fn, KEY, 1.5)
    raises(ValueError, f"{name}: chunk_size must be at least 1, got 0.", function, fn, KEY, 3, chunk_size=0)
    raises(TypeError, f"{name}: fn must be a function of a key, got 3.", function, 3, KEY, 3)
    raises(TypeError, f"{name}: key must be a JAX random key, got 0.", function, fn, 0, 3)
    message = "classify: fn must return logits, a float array [..., classes] of at least one class, got "
    raises(
        TypeError, message + "int32[2].", mc.classify, lambda key: jax.random.key_data(key).astype(jnp.int32), KEY, 3
    )
    raises(TypeError, message, mc.classify, lambda key: (fn(key), X), KEY, 3)


@pytest.mark.parametrize("function", [mc.reliability, mc.calibration_error], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("probabilities", "labels", "kind", "message"),
    [
        (np.ones((3, 2)), np.zeros((3, 2), int), ValueError, "must be of shapes [n, classes] and [n], got"),
        (np.ones((3, 2), int), np.zeros(3, int), TypeError, "probabilities must be floats and labels integers, got"),
        (np.ones((3, 2)), np.zeros(3), TypeError, "probabilities must be floats and labels integers, got float32"),
        (np.full((3, 2), -1.0), np.zeros(3, int), ValueError, "probabilities must be in [0, 1], got -1. For logits"),
        (np.full((3, 2), np.nan), np.zeros(3, int), ValueError, "probabilities must be in [0, 1], got nan."),
        (np.ones((3, 2)), np.full(3, 7), ValueError, "labels must be in [0, 2), got 7."),
    ],
)
def test_calibration(function, probabilities, labels, kind, message):
    with pytest.raises(kind) as caught:
        function(probabilities, labels)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [mc.sample, mc.classify], ids=lambda f: f.__name__)
def test_a_function_that_ignores_its_key(function):
    for fn in [lambda key: X, lambda key: (jax.random.split(key), X)[1]]:
        with pytest.warns(UserWarning, match=f"{function.__name__}: fn ignores its key, so its 5 samples are all"):
            function(fn, KEY, 5)
    function(lambda key: X, KEY, 1)  # one deterministic pass is meant
