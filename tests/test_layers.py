"""Layers are their functions: same fields, same values; drop-in for Flax's."""

import copy
import dataclasses
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import sharding
from tests.test_linen_keys import Stream, word
from tests.test_variants import RATE, assert_same, draw, every, inputs
from tests.variants import OTHER_LAYERS, VARIANTS

pytestmark = pytest.mark.usefixtures("quick_compiler")
FRAMEWORK = {"deterministic", "rng_collection", "rngs", "parent", "name"}
NAMES = sorted({row.layer for row in VARIANTS.values()})


def linen_layer(variant, **fields):
    return getattr(dropjax.linen, variant.layer)(RATE, **variant.options, **fields)


def nnx_layer(variant, **fields):
    return getattr(dropjax.nnx, variant.layer)(RATE, **variant.options, **fields)


@every
def test_linen_layer_equals_its_function(variant, key):
    x = inputs()
    expected = draw(variant, key, x)
    np.testing.assert_array_equal(linen_layer(variant).apply({}, x, deterministic=False, rng=key), expected)
    stream = linen_layer(variant, deterministic=False).apply({}, x, rngs={"dropout": key})
    again = linen_layer(variant).apply({}, x, False, rngs={"dropout": key})
    np.testing.assert_array_equal(stream, again)
    own = jax.random.fold_in(Stream().apply({}, x, rngs={"dropout": key}), word(()))
    np.testing.assert_array_equal(stream, draw(variant, own, x))
    np.testing.assert_array_equal(linen_layer(variant).apply({}, x, deterministic=True), x)
    piece = linen_layer(variant).apply({}, x[2:], deterministic=False, rng=key, start={0: 2})
    assert_same(variant, piece, expected[2:], x[2:])


@every
def test_nnx_layer_equals_its_function(variant, key):
    x = inputs()
    expected = draw(variant, key, x)
    layer = nnx_layer(variant)
    np.testing.assert_array_equal(layer(x, rngs=key), expected)
    own = nnx_layer(variant, rngs=nnx.Rngs(dropout=key))  # forks, as Flax's does
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=key).fork()), own(x))
    np.testing.assert_array_equal(layer(x, deterministic=True), x)
    assert_same(variant, layer(x[2:], rngs=key, start={0: 2}), expected[2:], x[2:])


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_the_parameters_of_the_function(name):
    for module in [dropjax.linen, dropjax.nnx]:
        layer = getattr(module, name)
        options = {
            p.name: p.default
            for p in inspect.signature(layer._function).parameters.values()
            if p.kind == inspect.Parameter.KEYWORD_ONLY and p.name not in ("start", "indices")  # given at the call
        }
        rate, names = sharding.fields(layer._function)
        fields = {f.name: f.default for f in dataclasses.fields(layer) if f.name not in {*FRAMEWORK, rate}}
        assert sorted(fields) == sorted(names)
        assert fields == options


def test_every_variant_has_both_layers():
    for module in [dropjax.linen, dropjax.nnx]:
        layers = {n: c for n, c in vars(module).items() if inspect.isclass(c) and hasattr(c, "_function")}
        named = {n for n, c in layers.items() if not hasattr(c.__base__, "_function")}
        assert named == {*NAMES, *OTHER_LAYERS}


@pytest.mark.parametrize("ours", [dropjax.linen.Dropout, dropjax.nnx.Dropout])
def test_signatures_begin_with_those_of_flax(ours):
    theirs = {dropjax.linen.Dropout: nn.Dropout, dropjax.nnx.Dropout: nnx.Dropout}[ours]

    def parameters(signature):
        return [(p.name, p.kind, p.default) for p in signature.parameters.values() if p.name not in ("parent", "name")]

    expected = inspect.signature(theirs.__init__ if theirs is nnx.Dropout else theirs)
    expected = [p for p in parameters(expected) if p[0] != "self"]
    found = parameters(inspect.signature(ours))
    in_order = sum(kind != inspect.Parameter.KEYWORD_ONLY for _, kind, _ in expected)
    assert found[:in_order] == expected[:in_order]
    assert all(parameter in found for parameter in expected[in_order:])
    call = parameters(inspect.signature(theirs.__call__))
    assert parameters(inspect.signature(ours.__call__))[: len(call)] == call


@pytest.mark.parametrize("name", NAMES)
def test_linen_layers_are_values(name):
    layer = getattr(dropjax.linen, name)(0.5, sharded_dims={1: "b", 0: "a", None: "c"})
    same = getattr(dropjax.linen, name)(0.5, sharded_dims={0: "a", None: "c", 1: "b"})
    assert layer == same
    assert hash(layer) == hash(same)
    assert pickle.loads(pickle.dumps(getattr(dropjax.linen, name)(0.5))) == getattr(dropjax.linen, name)(0.5)
    assert copy.deepcopy(layer) == layer


@pytest.mark.parametrize("name", NAMES)
def test_nnx_layers_are_modules(name, key):
    layer = getattr(dropjax.nnx, name)(0.5, rngs=nnx.Rngs(0), sharded_dims={None: "c", 0: "a"})
    assert layer.sharded_dims == ((0, "a"), (None, "c"))
    layer = getattr(dropjax.nnx, name)(0.5, rngs=nnx.Rngs(0))
    x = inputs()
    expected = nnx.clone(layer)(x)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(layer))(x), expected)
    np.testing.assert_array_equal(nnx.view(layer, deterministic=True)(x), x)
    assert getattr(pickle.loads(pickle.dumps(layer)), sharding.fields(layer._function)[0]) == 0.5
    assert isinstance(hash(layer), int)
    assert inspect.signature(layer) == inspect.signature(type(layer).__call__).replace(
        parameters=list(inspect.signature(type(layer).__call__).parameters.values())[1:]
    )
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    layer.train()
    assert (layer(x) != x).any()


@pytest.mark.parametrize("name", NAMES)
def test_layers_in_tables(name):
    """Flax's tabulate wraps every public function that it finds on a module's class."""
    assert name in nnx.tabulate(getattr(dropjax.nnx, name)(0.5, rngs=nnx.Rngs(0)), inputs())
    layer = getattr(dropjax.linen, name)(0.5, deterministic=False)
    assert name in layer.tabulate({"dropout": jax.random.key(0)}, inputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nnx_layer_under_plain_jax_transformations(name, key):
    """With a key at the call no stream is mutated, so nothing of NNX's own transformations is needed."""
    layer, x = getattr(dropjax.nnx, name)(0.5), inputs()
    expected = layer(x, rngs=key)
    keys = jax.random.split(key, 3)
    np.testing.assert_allclose(jax.jit(lambda x, key: layer(x, rngs=key))(x, key), expected, rtol=1e-6, atol=1e-6)
    rows = jax.vmap(lambda key: layer(x, rngs=key))(keys)
    _, scanned = jax.lax.scan(lambda c, key: (c, layer(x, rngs=key)), 0, keys)
    np.testing.assert_allclose(rows, scanned, rtol=1e-6, atol=1e-6)
    assert (rows[0] != rows[1]).any()
    jax.grad(lambda x: jax.checkpoint(lambda x: layer(x, rngs=key))(x).sum())(x)


def test_nnx_layer_with_streams_under_nnx_jit_draws_anew():
    layer, x = dropjax.nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((8, 8))
    step = nnx.jit(lambda layer, x: layer(x))
    first, second = step(layer, x), step(layer, x)
    assert (first != second).any()
    fresh = dropjax.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(x), first)
    np.testing.assert_array_equal(fresh(x), second)


def test_rates_may_be_traced_arrays(key):
    x = inputs()
    linen = jax.jit(lambda r: dropjax.linen.Dropout(r).apply({}, x, deterministic=False, rng=key))
    nnx_ = jax.jit(lambda r: dropjax.nnx.Dropout(r)(x, rngs=key))
    for rate in [0.0, 0.3, 1.0]:
        expected = dropjax.dropout(key, x, rate)
        np.testing.assert_array_equal(linen(jnp.float32(rate)), expected)
        np.testing.assert_array_equal(nnx_(jnp.float32(rate)), expected)


def test_rate_zero_needs_no_rng():
    x = jnp.ones(3)
    assert dropjax.linen.Dropout(0.0).apply({}, x, deterministic=False) is x
    assert dropjax.nnx.Dropout(0.0)(x) is x


def test_subclasses_may_have_fields_of_their_own(key):
    class Tagged(dropjax.linen.Dropout):
        tag: str = "x"

    class Named(dropjax.nnx.Dropout):
        pass

    x = inputs()
    for y in [Tagged(0.5, deterministic=False).apply({}, x, rng=key), Named(0.5)(x, rngs=key)]:
        np.testing.assert_array_equal(y, dropjax.dropout(key, x, 0.5))


def test_other_rng_collection(key):
    x = inputs()
    layer = dropjax.linen.Dropout(0.5, rng_collection="noise", deterministic=False)
    expected = dropjax.linen.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": key})
    np.testing.assert_array_equal(layer.apply({}, x, rngs={"noise": key}), expected)
    ours = dropjax.nnx.Dropout(0.5, rng_collection="noise", rngs=nnx.Rngs(noise=key))
    np.testing.assert_array_equal(ours(x), dropjax.nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=key))(x))


def test_sharded_dims_field(key):
    x = jnp.ones((8, 4))
    for run in [
        lambda x: dropjax.linen.Dropout(0.5, False or (), False, sharded_dims={0: "i"}).apply({}, x, rng=key),
        lambda x: dropjax.nnx.Dropout(0.5, sharded_dims={0: "i"})(x, rngs=key),
    ]:
        y = jax.pmap(run, axis_name="i")(x.reshape(8, 1, 4)).reshape(8, 4)
        np.testing.assert_array_equal(y, dropjax.dropout(key, x, 0.5))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_spatial_dropout_under_the_names_of_keras(n, key):
    x = jnp.ones((4, *[2] * n, 3))
    linen, ours = (getattr(module, f"SpatialDropout{n}D") for module in [dropjax.linen, dropjax.nnx])
    expected = dropjax.spatial_dropout(key, x, RATE)
    np.testing.assert_array_equal(linen(RATE, deterministic=False).apply({}, x, rng=key), expected)
    np.testing.assert_array_equal(ours(RATE)(x, rngs=key), expected)
    first = ours(RATE, channel_axis=1)(jnp.moveaxis(x, -1, 1), rngs=key)
    assert (first == first[:, :, *[slice(0, 1)] * n]).all()
    with pytest.raises(ValueError, match=rf"SpatialDropout{n}D: x must have {n + 2} dimensions, .* got {n + 1}\. Spat"):
        ours(RATE)(x[0], rngs=key)
