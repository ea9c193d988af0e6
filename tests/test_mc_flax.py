"""Existing models of Flax, unchanged, under Monte Carlo dropout: what draws, what does not, and what is written."""

import inspect

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
from tests.test_sharding import mesh

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)


class LinenModel(nn.Module):
    rate: float = 0.5
    ours: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=self.rate, broadcast_dropout=False)
        x = x + attention(x, deterministic=not train)
        layer = dropjax.linen.DropPath(self.rate) if self.ours else nn.Dropout(self.rate)
        return nn.Dense(3)(layer(nn.relu(x), deterministic=not train))


class NnxModel(nnx.Module):
    def __init__(self, rate, rngs, ours=False):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, dropout_rate=rate, broadcast_dropout=False, decode=False, rngs=rngs
        )
        self.dropout = dropjax.nnx.DropPath(rate) if ours else nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x, deterministic=True):
        x = self.norm(x)
        x = x + self.attention(x, deterministic=deterministic)
        return self.layers[0](self.dropout(nnx.relu(x), deterministic=deterministic))


pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")


@pytest.fixture(scope="module")
def variables():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(LinenModel().init)(jax.random.key(0), X)


def linen(rate, ours, variables):
    model = LinenModel(rate, ours)
    return lambda key, x, masks="per_example": dropjax.linen.mc_apply(model, variables, key, x, masks=masks)


def nnx_model(rate, ours):
    model = NnxModel(rate, nnx.Rngs(0), ours)
    model.eval()
    return model, lambda key, x, masks="per_example": dropjax.nnx.mc_view(model, key, masks=masks)(x)


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_dropout_draws_and_nothing_is_written(key, variables, framework, ours):
    """Samples differ and repeat under their key; shared masks give equal examples equal outputs; BatchNorm stays."""
    if framework == "linen":
        fn, before = linen(0.5, ours, variables), jax.tree.map(np.asarray, variables)
        after = lambda: variables  # noqa: E731
    else:
        model, fn = nnx_model(0.5, ours)
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, (nnx.BatchStat, nnx.Param))))
        after = lambda: nnx.to_pure_dict(nnx.state(model, (nnx.BatchStat, nnx.Param)))  # noqa: E731
    same = jnp.stack([X[0]] * 4)

    @jax.jit
    def run(key):
        one = jax.random.fold_in(key, 3)
        samples = mc.sample(lambda key: fn(key, X), key, 6, chunk_size=4)
        return samples, fn(one, X), fn(one, same), fn(one, same, "shared"), fn(one, X, "shared")

    samples, fourth, different, equal, shared = run(key)
    np.testing.assert_allclose(samples[3], fourth, atol=1e-5)
    assert (samples.std(0) > 0).any()
    assert jnp.abs(different - different[:1]).max() > 1e-3
    np.testing.assert_allclose(equal, jnp.stack([equal[0]] * 4), atol=1e-6)
    np.testing.assert_allclose(equal[0], shared[0], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after()))


def test_means_and_rates_are_those_of_dropout(key):
    """Identity model: each value is 0 with the rate and x / (1 - rate) otherwise, also in layers set to evaluation."""
    x = jnp.ones((64, 64))
    rigid = nnx.Sequential(nnx.Dropout(0.25, deterministic=True))
    plain = nn.Sequential([nn.Dropout(0.25, deterministic=True)])
    for y in [dropjax.nnx.mc_view(rigid, key)(x), dropjax.linen.mc_apply(plain, {}, key, x)]:
        assert set(np.unique(np.asarray(y))) == {0, np.float32(4 / 3)}
        assert abs((y == 0).mean() - 0.25) < 6 * np.sqrt(0.25 * 0.75 / y.size)
    assert (rigid(x) == x).all()
    shared = dropjax.nnx.mc_view(rigid, key, masks="shared")(x)
    assert (shared == shared[:1]).all()


def drawing(package):
    """The layers of a package that can be deterministic, by name."""
    kinds = {name: of for name, of in vars(package).items() if isinstance(of, type)}
    named = [name for name, of in kinds.items() if "deterministic" in inspect.signature(of).parameters]
    return sorted(named)


class OfWeights(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return x @ self.inner(self.param("kernel", nn.initializers.ones_init(), (16, 16)))


INPUTS = {
    **dict.fromkeys(["SpatialDropout1D", "DropHead", "EmbeddingDropout", "TokenDropout"], (4, 8, 16)),
    **dict.fromkeys(["SpatialDropout2D", "DropBlock"], (4, 9, 9, 8)),
    "SpatialDropout3D": (4, 3, 3, 3, 8),
}
NOT_SHARED = {"Standout", "VariationalDense", "SparseVariationalDense"}


def arguments(name, in_features):
    """What makes a layer, but for the module that it wraps."""
    features = (16, 16) if in_features else (16,)
    fields = {"block_size": 3} if name == "DropBlock" else {"names": "kernel"} if name == "WeightDrop" else {}
    if name in ("VariationalDense", "SparseVariationalDense"):
        return features, {**fields, "initial_log_alpha" if name[0] == "V" else "initial_log_sigma2": 0.0}
    if name in ("Standout", "ConcreteDropout", "VariationalGaussianDropout"):
        return (), fields
    return (*features, 0.5) if name == "DropConnectDense" else (0.5,), fields


def linen_run(name, shape, key):
    args, fields = arguments(name, in_features=False)
    kind = getattr(dropjax.linen, name)
    inner = (nn.Dense(16, use_bias=False),) if name in ("LayerDrop", "WeightDrop") else ()
    layer = kind(*inner, *args, **fields, deterministic=True)
    model = OfWeights(layer) if name in ("DropConnect", "TargetedDropout") else layer
    more = (jnp.zeros(shape),) if name == "Standout" else ()
    x = jnp.ones(shape)
    variables = model.init(key, x, *more)
    return lambda key, masks="per_example": dropjax.linen.mc_apply(model, variables, key, x, *more, masks=masks)


def nnx_run(name, shape, key):
    args, fields = arguments(name, in_features=True)
    rngs = nnx.Rngs(0)
    inner = (nnx.Linear(16, 16, use_bias=False, rngs=rngs),) if name in ("LayerDrop", "WeightDrop") else ()
    layer = getattr(dropjax.nnx, name)(*inner, *args, **fields, deterministic=True, rngs=rngs)
    more = (jnp.zeros(shape),) if name == "Standout" else ()
    x = jnp.ones(shape)

    def run(key, masks="per_example"):
        view = dropjax.nnx.mc_view(layer, key, masks=masks)
        return x @ view(jnp.ones((16, 16))) if name in ("DropConnect", "TargetedDropout") else view(x, *more)

    return run


def test_the_layers_are_those_of_both_frameworks():
    """Those of NNX are named in Linen, too, where the test below takes them from."""
    assert set(drawing(dropjax.nnx)) <= set(drawing(dropjax.linen))
    assert len(drawing(dropjax.nnx)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", drawing(dropjax.linen))
@pytest.mark.parametrize("make", [linen_run, nnx_run])
def test_every_layer_draws(key, make, name):
    """Set to evaluation, of equal examples: keys differ, and under shared masks examples do not."""
    shape = INPUTS.get(name, (4, 16))
    run, keys = make(name, shape, key), jax.random.split(key, 6)
    if name in NOT_SHARED:
        with pytest.raises(ValueError, match=f"masks must be 'per_example' for {name}"):
            run(key, "shared")
    modes = ["per_example"] if name in NOT_SHARED else ["per_example", "shared"]
    both = jax.jit(lambda key: [jax.tree.leaves(run(key, masks)) for masks in modes])
    samples = [both(of) for of in keys]
    first = samples[0][0]
    assert any((a != b).any() for of in samples[1:] for a, b in zip(of[0], first, strict=True))
    for plain, *shared in samples:
        for a, b in zip(shared[0] if shared else plain, plain, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
            if shared:
                np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape))


def sharded(call):
    return jax.shard_map(call, mesh=mesh(), in_specs=jax.P("data"), out_specs=jax.P("data"))(X)


def test_shared_masks_need_a_batch(key):
    """Without one, or where vmap runs over it, features would share a mask."""
    x = jnp.ones(8)
    attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, broadcast_dropout=False)
    heads = nnx.MultiHeadAttention(2, 8, dropout_rate=0.5, broadcast_dropout=False, decode=False, rngs=nnx.Rngs(0))
    parameters = attention.init(key, X[0], deterministic=True)
    linen, view = dropjax.linen, dropjax.nnx.mc_view(nnx.Dropout(0.5), key, masks="shared")
    for run in [
        lambda: linen.mc_apply(nn.Dropout(0.5), {}, key, x, masks="shared"),
        lambda: jax.vmap(lambda x: linen.mc_apply(linen.DropPath(0.5), {}, key, x, masks="shared"))(X[0]),
        lambda: linen.mc_apply(linen.SpatialDropout(0.5, channel_axis=0), {}, key, X, masks="shared"),
        lambda: linen.mc_apply(attention, parameters, key, X[0], deterministic=True, masks="shared"),
        lambda: sharded(
            lambda x: linen.mc_apply(linen.Dropout(0.5, sharded_dims={0: "data"}), {}, key, x, masks="shared")
        ),
        lambda: view(x),
        lambda: sharded(
            lambda x: dropjax.nnx.mc_view(dropjax.nnx.Dropout(0.5, sharded_dims={-3: "data"}), key, masks="shared")(x)
        ),
        lambda: dropjax.nnx.mc_view(heads, key, masks="shared")(X[0]),
    ]:
        with pytest.raises(ValueError, match="masks must be 'per_example' where"):
            run()


def test_subclasses_of_flax_dropout_draw(key):
    class Linen(nn.Dropout):
        pass

    class Nnx(nnx.Dropout):
        pass

    x = jnp.ones((4, 8))
    assert (dropjax.linen.mc_apply(Linen(0.5, deterministic=True), {}, key, x) != x).any()
    assert (dropjax.nnx.mc_view(Nnx(0.5, deterministic=True), key)(x) != x).any()


def test_attention_alone_draws(key, variables):
    """Dropout on attention weights draws where the layer's own rate is 0."""
    attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=True)
    parameters = attention.init(key, X)
    ours = dropjax.linen.mc_apply(attention, parameters, key, X)
    assert jnp.abs(ours - attention.apply(parameters, X)).max() > 1e-3
    model = nnx.MultiHeadAttention(2, 8, dropout_rate=0.5, deterministic=True, decode=False, rngs=nnx.Rngs(0))
    assert jnp.abs(dropjax.nnx.mc_view(model, key)(X) - model(X)).max() > 1e-3
    for masks in ["per_example", "shared"]:
        by_name, by_place = (dropjax.nnx.mc_view(model, key, masks=masks) for _ in range(2))
        np.testing.assert_array_equal(by_name(inputs_q=X), by_place(X))


def test_a_stream_of_its_own_and_a_jit_inside(key):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, rng_collection="noise", deterministic=True)(x)

    x = jnp.ones((4, 8))
    fallen = dropjax.linen.mc_apply(Noisy(), {}, key, x)
    given = dropjax.linen.mc_apply(Noisy(), {}, key, x, rngs={"noise": jax.random.key(9)})
    assert (fallen != x).any()
    assert (given != fallen).any()
    jitted = nn.jit(Noisy)()
    assert (jitted.apply({}, x) == x).all()
    for _ in range(2):
        assert (dropjax.linen.mc_apply(jitted, {}, key, x) != x).any()
    assert (jitted.apply({}, x) == x).all()


def test_what_does_not_become_stochastic_is_an_error(key, variables):
    with pytest.raises(ValueError, match="mc_apply: module must have dropout of a rate above 0"):
        linen(0.0, False, variables)(key, X)
    with pytest.raises(ValueError, match="mc_view: module must have dropout of a rate above 0"):
        nnx_model(0.0, False)[1](key, X)
    for zero in [np.float32(0), jnp.float32(0), jnp.zeros(8)]:
        with pytest.raises(ValueError, match="must have dropout of a rate above 0"):
            dropjax.linen.mc_apply(dropjax.linen.Dropout(zero, deterministic=True), {}, key, X)
        with pytest.raises(ValueError, match="must have dropout of a rate above 0"):
            dropjax.nnx.mc_view(dropjax.nnx.Dropout(zero), key)
    with pytest.raises(ValueError, match="mc_view: masks must be one of"):
        dropjax.nnx.mc_view(nnx.Dropout(0.5), key, masks="all")
    with pytest.raises(ValueError, match="mc_apply: masks must be one of"):
        dropjax.linen.mc_apply(nn.Dropout(0.5), {}, key, X, masks="all")
