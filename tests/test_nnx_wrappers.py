"""LayerDrop and WeightDrop of NNX modules that hold all that a module may hold: what is written back, and when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
from dropjax.nnx import Dropout, LayerDrop, WeightDrop, set_rates
from tests.test_errors import raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
KEYS = [jax.random.key(i) for i in range(8)]
KEPT = next(key for key in KEYS if dropjax.keep_mask(key, (), 0.5))
LEFT = next(key for key in KEYS if not dropjax.keep_mask(key, (), 0.5))
X = jnp.ones((2, 4))


class Full(nnx.Module):
    """Arrays that are no variables, alone and in containers, written and not; streams; statistics; static fields."""

    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.table, self.host, self.text, self.nothing = jnp.arange(4.0), np.ones(4, np.float32), "text", None
        self.mixed = nnx.List([jnp.ones(4), nnx.Linear(4, 4, rngs=rngs)])
        self.pytree = nnx.data([jnp.ones(4), {"a": jnp.ones(4)}, (jnp.ones(4),)])
        self.calls, self.named = jnp.int32(0), nnx.Dict(sum=jnp.zeros(4))
        self.rate, self.flax = Dropout(jnp.float32(0.5), rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.inner = LayerDrop(nnx.Linear(4, 4, rngs=rngs), jnp.float32(0.0), rngs=rngs)
        self.rngs = rngs.fork()

    def __call__(self, x, *, scale=1.0):
        self.calls = self.calls + 1
        self.named["sum"] = self.named["sum"] + x[0]
        self.pytree = nnx.data([self.pytree[0] + 1, *self.pytree[1:]])
        h = self.mixed[1](self.linear(x) + self.table[None]) * (self.host * self.mixed[0])[None]
        h = self.norm(h) * self.pytree[1]["a"][None] * self.pytree[2][0][None]
        return x + scale * (self.flax(self.rate(h)) + jax.random.normal(self.rngs.dropout(), (1, 1))) + self.inner(h)


class Reader(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.table, self.host = (
            nnx.Linear(4, 4, rngs=rngs),
            jnp.arange(4.0),
            nnx.data([np.ones(4, np.float32)]),
        )

    def __call__(self, x):
        return self.linear(x) + (self.table * self.host[0])[None]


def drop(module, rate=0.5):
    return LayerDrop(module, rate, rngs=nnx.Rngs(1))


def weigh(module, rate=0.5):
    return WeightDrop(module, rate, names="kernel", rngs=nnx.Rngs(1))


def arrays(module):
    state = nnx.to_flat_state(nnx.state(module))
    values = {path: leaf[...] if isinstance(leaf, nnx.Variable) else leaf for path, leaf in state}
    return {p: np.asarray(jax.random.key_data(v) if p[-1] == "key" else v, np.float32) for p, v in values.items()}


RUNS = {
    "plain": lambda layer, key: layer(X, rngs=key),
    "nnx.jit": nnx.jit(lambda layer, key: layer(X, rngs=key)),
    "jax.jit": lambda layer, key: jax.jit(lambda layer, key: (layer(X, rngs=key), layer.module))(layer, key),
}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("rate", [0.5, None], ids=["number", "array"])
@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("wrap", [drop, weigh])
def test_what_is_run_is_written_back_and_what_is_left_out_is_untouched(wrap, how, rate):
    rate = jnp.float32(0.5) if rate is None else rate
    for key in (KEPT, LEFT):
        layer, alone = wrap(Full(nnx.Rngs(0)), rate), Full(nnx.Rngs(0))
        before = arrays(alone)
        y = RUNS[how](layer, key)
        y, module = y if how == "jax.jit" else (y, layer.module)
        after, runs = arrays(module), wrap is weigh or key is KEPT
        if runs and wrap is weigh:  # the same parameters, dropped by hand
            graph, params, rest = nnx.split(alone, nnx.Param, ...)
            alone = nnx.merge(graph, dropjax.weight_drop(key, params, 0.5, names="kernel"), rest)
        expected = alone(X) if runs else X
        near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        near(y, expected)
        assert after.keys() == before.keys()
        written = {path for path in before if (before[path] != after[path]).any()}
        if not runs:
            assert written == set()
            continue
        own = arrays(alone)
        for path in before:
            near(after[path], before[path] if path[-1] == "kernel" else own[path])
        counts = {("flax", "rngs", "count"), ("rate", "rngs", "count"), ("inner", "rngs", "count")}
        raw = {("calls",), ("named", "sum"), ("pytree", 0)}
        assert {*counts, *raw, ("rngs", "default", "count"), ("norm", "mean"), ("norm", "var")} == written


def test_a_module_that_is_only_read_may_be_closed_over():
    for wrap in (drop, weigh):
        layer = wrap(Reader(nnx.Rngs(0)))
        run = jax.jit(lambda key: layer(X, rngs=key))  # noqa: B023
        for key in (KEPT, LEFT):
            np.testing.assert_allclose(run(key), layer(X, rngs=key), rtol=1e-6)
    nested = LayerDrop(weigh(Reader(nnx.Rngs(0))), 0.5)
    assert {bool((nested(X, rngs=key) != X).any()) for key in (KEPT, LEFT)} == {True, False}


@pytest.mark.usefixtures("standard_promotion")
def test_a_stack_of_wrappers_in_a_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0, 0))
    def make(rate, rngs):
        return LayerDrop(Full(rngs), rate, rngs=rngs)

    layers = make(jnp.array([0.0, 1.0, 0.0]), nnx.Rngs(0))
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    assert (run(X, layers) != X).all()
    np.testing.assert_array_equal(layers.module.calls, [1, 0, 1])
    np.testing.assert_array_equal(layers.module.rngs.dropout.count[...], [1, 0, 1])
    np.testing.assert_array_equal(layers.module.norm.mean[...].any(-1), [True, False, True])
    np.testing.assert_array_equal(run(X, set_rates(layers, jnp.float32(1))), X)
    np.testing.assert_array_equal(layers.module.calls, [1, 0, 1])


@pytest.mark.parametrize("wrap", [drop, weigh])
@pytest.mark.parametrize("rate", [0.0, 1e-12, 0.5, 1.0])
def test_the_module_takes_its_keywords_and_no_others(wrap, rate):
    """Also where it is left out, and at the rate at which it never runs."""

    class Scaled(nnx.Linear):
        def __call__(self, x, *, scale=1.0):
            return scale * super().__call__(x)

    layer = wrap(Scaled(4, 4, rngs=nnx.Rngs(0)), rate)
    for deterministic in (True, False):
        for key in (KEPT, LEFT):
            with pytest.raises(TypeError, match="nonsense"):
                layer(X, deterministic=deterministic, rngs=key, nonsense=3)
            double = layer(X, deterministic=deterministic, rngs=key, scale=2.0)
            once = layer(X, deterministic=deterministic, rngs=key)
            out = wrap is drop and not deterministic and (rate == 1 or (rate == 0.5 and key is LEFT))
            np.testing.assert_allclose(double, X if out else 2 * once, rtol=1e-6)


def test_what_a_module_must_not_do():
    class Counts(nnx.Module):
        def __init__(self):
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            return x

    class Makes(nnx.Module):
        def __init__(self):
            self.last = nnx.data(None)

        def __call__(self, x):
            self.last = nnx.Variable(x)
            return x

    static = "LayerDrop: module must not create variables, nor change what is static, got other static attributes."
    for rate in (0.5, 1.0):
        raises(ValueError, static, LayerDrop(Counts(), rate), X, rngs=KEPT)
        raises(ValueError, "got {('last',)}.", LayerDrop(Makes(), rate), X, rngs=LEFT)
    for wrong in (lambda x: x, nnx.Linear, [nnx.Linear(4, 4, rngs=nnx.Rngs(0))], None):
        raises(TypeError, "LayerDrop: module must be a flax.nnx.Module, got ", drop, wrong)
        raises(TypeError, "WeightDrop: module must be a flax.nnx.Module, got ", weigh, wrong)
    shape = "LayerDrop: fn must return the structure, shapes and dtypes of x"
    for rate in (0.5, 1.0):
        raises(ValueError, shape, LayerDrop(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rate), X, rngs=LEFT)
