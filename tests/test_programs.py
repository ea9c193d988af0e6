"""Tracing the same code twice gives the same program, and what is jitted inside a model is traced for each context."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax.linen
import dropjax.nnx
from tests import programs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
X = jnp.ones((4, 16))


@pytest.fixture(scope="module")
def elsewhere():
    """The hashes of all programs in another process, with another seed of Python's hashes."""
    command = [sys.executable, "-m", "tests.programs"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_the_same_program_twice_and_in_another_process(elsewhere, key, name):
    first = programs.text(name)
    dropjax.linen.mc_apply(nn.Dropout(0.5, deterministic=True), {}, key, X)  # what one process does on its own
    assert programs.text(name) == first
    assert programs.digest(first) == elsewhere[name]


PLAIN = jax.jit(lambda x, key: nn.Dropout(0.5).apply({}, x, deterministic=True, rngs={"dropout": key}))
TRAINED = jax.jit(lambda x, key: nn.Dropout(0.5).apply({}, x, deterministic=False, rngs={"dropout": key}))


class Jitted(nn.Module):
    """All dropout is inside functions that are jitted once, and called for evaluation or for training."""

    how: str
    train: bool = False

    @nn.compact
    def __call__(self, x):
        if self.how == "nn.jit":
            return nn.jit(nn.Dropout)(0.5, deterministic=not self.train)(x)
        key = self.make_rng("dropout") if self.has_rng("dropout") else jax.random.key(0)
        return (TRAINED if self.train else PLAIN)(x, key)


def shared(y):
    return bool((y == y[:1]).all())


@pytest.mark.parametrize("how", ["nn.jit", "jax.jit"])
def test_a_jit_inside_a_linen_model_is_traced_for_each_context(key, how):
    model, linen = Jitted(how), dropjax.linen
    for _ in range(2):  # the second time all are in the caches
        np.testing.assert_array_equal(model.apply({}, X), X)
        each = linen.mc_apply(model, {}, key, X)
        assert not shared(each)
        assert (linen.mc_apply(model, {}, jax.random.fold_in(key, 1), X) != each).any()
        one = linen.mc_apply(model, {}, key, X, masks="shared")
        assert shared(one)
        assert set(np.unique(one).tolist()) == {0.0, 2.0}
        np.testing.assert_array_equal(model.apply({}, X), X)
        np.testing.assert_array_equal(linen.mc_apply(model, {}, key, X), each)

    trained = Jitted(how, train=True)
    run = lambda: trained.apply({}, X, rngs={"dropout": key})  # noqa: E731
    theirs = run()
    for _ in range(2):
        with linen.replace_flax("threefry"):
            np.testing.assert_array_equal(run(), theirs)
            with linen.replace_flax():
                ours = run()
                np.testing.assert_array_equal(linen.mc_apply(trained, {}, key, X), each)
        assert (ours != theirs).any()
        np.testing.assert_array_equal(run(), theirs)
        np.testing.assert_array_equal(model.apply({}, X), X)


def test_a_second_call_traces_nothing_that_is_jitted_inside(key):
    """It is found in the caches by the way to draw; a call without dropout is an error all the same."""
    traces = []

    @jax.jit
    def inner(x, key):
        traces.append(x)
        return nn.Dropout(0.5).apply({}, x, deterministic=True, rngs={"dropout": key})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner(x, self.make_rng("dropout")) + nn.Dropout(0.1)(x, deterministic=True)

    for masks in ["per_example", "shared"]:
        before = len(traces)
        for i in range(3):
            dropjax.linen.mc_apply(Model(), {}, jax.random.fold_in(key, i), X, masks=masks)
        assert len(traces) == before + 1
    zero = nn.jit(nn.Dropout)(0.0, deterministic=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="mc_apply: module must have dropout of a rate above 0"):
            dropjax.linen.mc_apply(zero, {}, key, X)


@nnx.jit
def inside(layer, x):
    return layer(x)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return inside(self.drop, x)


def test_a_jit_inside_an_nnx_model_is_traced_for_each_view(key):
    model = Network(nnx.Rngs(0))
    for _ in range(2):
        np.testing.assert_array_equal(model(X), X)
        each = dropjax.nnx.mc_view(model, key)(X)
        assert not shared(each)
        assert shared(dropjax.nnx.mc_view(model, key, masks="shared")(X))
        assert (dropjax.nnx.mc_view(model, jax.random.fold_in(key, 1))(X) != each).any()
        np.testing.assert_array_equal(dropjax.nnx.mc_view(model, key)(X), each)
    trained = nnx.clone(model)
    trained.train()
    theirs = nnx.clone(trained)(X)
    np.testing.assert_array_equal(dropjax.nnx.replace_flax(nnx.clone(trained), "threefry")(X), theirs)
    assert (dropjax.nnx.replace_flax(nnx.clone(trained))(X) != theirs).any()
    np.testing.assert_array_equal(nnx.clone(trained)(X), theirs)
