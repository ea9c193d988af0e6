"""LayerDrop: a layer that is left out is not computed, and what that means under transformations and on meshes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import dropjax
import dropjax.linen
import dropjax.nnx
from tests.test_errors import raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
LAYERS = 5
KEYS = jax.random.split(jax.random.key(4), LAYERS)
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, 3, 3)), jnp.float32) / 2
assert [bool(dropjax.keep_mask(key, (), 0.5)) for key in KEYS].count(True) in range(1, LAYERS)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)


def block(x, w):
    return x + jnp.tanh(x @ w)


def stack(x, weights, keys, rate, fn=block):
    def layer(x, of):
        return dropjax.layer_drop(of[0], lambda x: fn(x, of[1]), x, rate), None

    return lax.scan(layer, x, (keys, weights))[0]


def keeps(keys, rate):
    return np.asarray(jax.vmap(lambda key: dropjax.keep_mask(key, (), rate))(keys))


def by_hand(x, weights, kept, fn=block):
    """The layers that `keep_mask` keeps, in a Python loop without any branch."""
    for i in np.flatnonzero(kept):
        x = fn(x, weights[i])
    return x


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_values_and_gradients_are_those_of_the_layers_that_are_kept(rate):
    """Only the compiler differs between both sides: a few roundings of 5 layers, far below 1e-5."""

    kept = keeps(KEYS, rate)
    expected = jax.jit(jax.value_and_grad(lambda x, w: (by_hand(x, w, kept) ** 2).sum(), (0, 1)))(X, WEIGHTS)
    found = jax.jit(jax.value_and_grad(lambda x, w: (stack(x, w, KEYS, rate) ** 2).sum(), (0, 1)))(X, WEIGHTS)
    again = jax.jit(jax.grad(jax.checkpoint(lambda x, w: (stack(x, w, KEYS, jnp.float32(rate)) ** 2).sum()), (0, 1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), again(X, WEIGHTS), expected[1])


def test_a_layer_that_is_left_out_is_not_computed():
    """The host counts how often a layer runs, forward and backward."""
    ran = []

    def counted(x, w):
        jax.debug.callback(lambda: ran.append(1))
        return block(x, w)

    kept = keeps(KEYS, 0.5)
    jax.block_until_ready(jax.jit(lambda x: stack(x, WEIGHTS, KEYS, 0.5, counted))(X))
    jax.effects_barrier()
    assert len(ran) == sum(kept)


def test_under_vmap_over_keys_the_results_are_the_same():
    """There a branch is a selection, whose sides are both computed and differentiated: gradients stay finite."""
    draw = lambda key, rate: dropjax.layer_drop(key, lambda x: block(x, WEIGHTS[0]), X, rate)  # noqa: E731
    one, rows = jax.jit(draw), jax.jit(jax.vmap(draw, in_axes=(0, None)))
    for rate in [jnp.float32(0), jnp.float32(0.5), jnp.float32(1)]:
        np.testing.assert_allclose(rows(KEYS, rate), [one(key, rate) for key in KEYS], rtol=1e-6)
    slopes = jax.vmap(jax.grad(lambda x, key, rate: dropjax.layer_drop(key, lambda x: 3 * x, x, rate)), (None, 0, None))
    found = jax.jit(slopes)(jnp.float32(1), KEYS, jnp.float32(0.5))
    np.testing.assert_array_equal(found, np.where(keeps(KEYS, 0.5), 3, 1))


@pytest.mark.parametrize("rate", [np.nan, -0.1, 1.5])
def test_a_traced_bad_rate_is_nan_in_values_and_gradients(rate):
    x = {"h": X, "step": jnp.int32(3), "narrow": jnp.ones(2, jnp.bfloat16)}

    def loss(x, rate):
        y = dropjax.layer_drop(KEYS[0], lambda x: x, x, rate)
        return y["h"].sum() + y["narrow"].sum().astype(jnp.float32), y

    (_, y), slope = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(x, jnp.float32(rate))
    assert all(jnp.isnan(of[name]).all() for of in (y, slope) for name in ("h", "narrow"))
    assert y["step"] == 3
    assert y["narrow"].dtype == jnp.bfloat16


def test_the_rate_is_not_differentiated_and_not_compiled_in():
    step = jax.jit(jax.grad(lambda rate: stack(X, WEIGHTS, KEYS, rate).sum()))
    assert [float(step(jnp.float32(rate))) for rate in (0.0, 0.3, 1.0)] == [0, 0, 0]
    assert step._cache_size() == 1


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def with_psum(x, w):
    return x + lax.psum(jnp.tanh(x @ w), "data")


@pytest.mark.parametrize("typed", [True, False])
def test_inside_shard_map_all_devices_take_one_branch(typed):
    """Layers that wait for each other in a collective; what x does not vary over, the layer's output may."""
    x, cut = jnp.ones((4, 3)), P("data")
    keys = KEYS[:4]
    run = jax.shard_map(
        lambda x, keys: stack(x, WEIGHTS[:4], keys, 0.5, with_psum),
        mesh=mesh(), in_specs=(cut, P()), out_specs=cut, check_vma=typed,
    )  # fmt: skip
    expected = by_hand(x, WEIGHTS[:4], keeps(keys, 0.5), lambda x, w: x + 4 * jnp.tanh(x @ w))
    np.testing.assert_allclose(jax.jit(run)(x, keys), expected, rtol=1e-5)
    kept = next(key for key in KEYS if dropjax.keep_mask(key, (), 0.5))
    left = next(key for key in KEYS if not dropjax.keep_mask(key, (), 0.5))
    for key, expected in [(kept, [0, 1, 2, 3]), (left, [0, 0, 0, 0])]:
        place = jax.shard_map(
            lambda x, key: dropjax.layer_drop(key, lambda x: x + lax.axis_index("data").astype(x.dtype), x, 0.5),
            mesh=mesh(), in_specs=P(), out_specs=cut, check_vma=typed,
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(place)(jnp.zeros(1), key), expected)


def test_a_key_or_rate_that_differs_between_devices_is_an_error_or_where_types_do_not_say_nan():
    def folded(x):
        return dropjax.layer_drop(jax.random.fold_in(KEYS[0], lax.axis_index("data")), lambda x: x, x, 0.5)

    def rated(x):
        return dropjax.layer_drop(KEYS[0], lambda x: x, x, x.sum() / 8)

    for fn in [folded, rated]:
        run = jax.jit(jax.shard_map(fn, mesh=mesh(), in_specs=P("data"), out_specs=P("data")))
        with pytest.raises(ValueError, match=r"layer_drop: key and rate must be the same on every shard, got one that "
                           r"varies over mesh axis 'data': devices would take different branches"):  # fmt: skip
            run(jnp.ones(4))
    unchecked = jax.shard_map(folded, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False)
    assert jnp.isnan(jax.jit(unchecked)(jnp.ones(4))).all()
    for options in [{}, {"axis_name": "i"}]:
        run = jax.pmap(lambda key, x: dropjax.layer_drop(key, lambda x: x + 1, x, 0.5), **options)
        assert jnp.isnan(run(jax.random.split(KEYS[0], 8), jnp.ones((8, 2)))).all()
        same = jnp.broadcast_to(KEYS[0], (8,))
        kept = dropjax.keep_mask(KEYS[0], (), 0.5)
        np.testing.assert_array_equal(run(same, jnp.ones((8, 2))), np.full((8, 2), 1 + int(kept)))


def test_errors():
    drop, key = dropjax.layer_drop, KEYS[0]
    message = "layer_drop: fn must return the structure, shapes and dtypes of x, which takes its place where the layer "
    raises(ValueError, message + "is left out, got float32[2] for float32[2,3].", drop, key, lambda x: x[:, 0], X, 0.5)
    raises(ValueError, "got bfloat16[2,3] for float32[2,3].", drop, key, lambda x: x.astype(jnp.bfloat16), X, 0.5)
    for rate in (0, 0.5, 1.0):
        raises(ValueError, "is left out, got ", drop, key, lambda x: (x, x), X, rate)
    raises(TypeError, "fn must be a function of x, got float32[2,3].", drop, key, X, lambda x: x, 0.5)
    raises(TypeError, "x must hold a float or complex array, got int32[3].", drop, key, lambda x: x, jnp.arange(3), 0.5)
    raises(ValueError, "rate must be one number, got float32[3]. Scan over", drop, key, lambda x: x, X, jnp.ones(3))
    raises(ValueError, "rate must be in [0, 1], got 1.5.", drop, key, lambda x: x, X, 1.5)
    raises(TypeError, "key must be a JAX random key, got 0.", drop, 0, lambda x: x, X, 0.5)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
        self.sow("intermediates", "h", h)  # does nothing where the collection is not mutable
        return x + nn.Dropout(0.5, deterministic=False)(h)


@pytest.mark.usefixtures("standard_promotion")
def test_linen_wrapper(key):
    """What is left out keeps its statistics; initialisation makes all parameters, whatever is drawn."""
    layer = dropjax.linen.LayerDrop(LinenBlock(), 0.5, deterministic=False)
    variables = layer.init({"params": key, "dropout": key}, X)
    assert set(variables["params"]["module"]) == {"Dense_0", "BatchNorm_0"}
    run = jax.jit(lambda v, rng: layer.apply(v, X, rng=rng, rngs={"dropout": key}, mutable=["batch_stats"]))
    for own in KEYS[:4]:
        y, new = run(variables, own)
        kept = bool(dropjax.keep_mask(own, (), 0.5))
        changed = jax.tree.leaves(new)[0] != jax.tree.leaves(variables["batch_stats"])[0]
        assert (y != X).any() == changed.all() == kept
    assert not all(dropjax.keep_mask(own, (), 0.5) for own in KEYS[:4])
    slopes = jax.grad(
        lambda v: (layer.apply(v, X, rng=KEYS[0], rngs={"dropout": key}, mutable=["batch_stats"])[0]).sum()
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes(variables)))
    bad = layer.clone(rate=jnp.float32(2))
    with pytest.raises(ValueError, match=r"LayerDrop: rate must be in \[0, 1\], got 2.0"):
        bad.apply(variables, X, rng=key, rngs={"dropout": key}, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"LayerDrop: module must not make variables, .* in \['intermediates'\]"):
        layer.apply(variables, X, rng=key, rngs={"dropout": key}, mutable=["batch_stats", "intermediates"])
    plain = dropjax.linen.LayerDrop(nn.Dense(3), 1.0)
    variables = plain.init(key, X, deterministic=False)
    np.testing.assert_array_equal(plain.apply(variables, X, deterministic=False, rng=key), X)
    np.testing.assert_array_equal(
        plain.apply(variables, X, deterministic=True), nn.Dense(3).apply({"params": variables["params"]["module"]}, X)
    )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(self.linear(x)))


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_wrapper():
    """What is left out keeps its statistics and its streams; parameters have a gradient where it is run."""
    layer = dropjax.nnx.LayerDrop(NnxBlock(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
    step = nnx.jit(lambda layer, key: layer(X, rngs=key))
    slope_of = nnx.jit(lambda layer, key: nnx.grad(lambda layer: (layer(X, rngs=key) ** 2).sum())(layer))
    count = 0
    for own in KEYS[:4]:
        before = layer.module.norm.mean[...]
        y, kept = step(layer, own), bool(dropjax.keep_mask(own, (), 0.5))
        count += kept
        assert (y != X).any() == (layer.module.norm.mean[...] != before).all() == kept
        assert layer.module.dropout.rngs.count[...] == count
        slope = slope_of(nnx.clone(layer), own)
        assert bool((slope["module"]["norm"]["bias"][...] != 0).any()) == kept
    assert 0 < count < 4
    before = nnx.to_pure_dict(nnx.state(layer.module, nnx.Param))
    own_stream = nnx.jit(lambda layer: layer(X))
    drawn = {bool((own_stream(layer) != X).any()) for _ in range(6)}
    assert drawn == {True, False}
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer.module, nnx.Param)), before)
    layer.eval()
    assert layer.module.dropout.deterministic
    np.testing.assert_array_equal(layer(X), layer.module(X))


def test_nnx_wrapper_under_plain_transformations():
    """A module of the surrounding program is read, and with a key at the call nothing needs to be written."""
    linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    layer = dropjax.nnx.LayerDrop(linear, 0.5)
    run = jax.jit(lambda key, x: layer(x, rngs=key))
    for own in KEYS[:4]:
        expected = linear(X) if dropjax.keep_mask(own, (), 0.5) else X
        np.testing.assert_allclose(run(own, X), expected, rtol=1e-6)
