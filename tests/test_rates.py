"""One rate for all dropout layers of a Linen model, from a schedule inside a jitted step."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
import dropjax.linen
from dropjax.linen import with_rates

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
X = jnp.ones((4, 64))
RATED = sorted(
    name
    for name, kind in vars(dropjax.linen).items()
    if isinstance(kind, type) and "rate" in inspect.signature(kind).parameters and name != "TokenDropout"
)
SHAPES = {
    "SpatialDropout1D": (4, 8, 16),
    "SpatialDropout2D": (4, 9, 9, 8),
    "SpatialDropout3D": (4, 3, 3, 3, 8),
    "DropBlock": (4, 9, 9, 8),
    "DropHead": (4, 8, 16),
}


def make(name, rate, deterministic=False):
    options = {"DropBlock": {"block_size": 3}, "WeightDrop": {"names": "kernel"}}.get(name, {})
    inner = {"LayerDrop": (nn.Dense(64),), "WeightDrop": (nn.Dense(8),), "DropConnectDense": (8,)}.get(name, ())
    return getattr(dropjax.linen, name)(*inner, rate, **options, deterministic=deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("name", RATED)
def test_every_layer_with_a_rate_has_that_of_the_context(key, name):
    """What a layer built with 0.1 gives inside is what one built with the rate gives; its field stays."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPES.get(name, (4, 64))), jnp.float32)
    layer = make(name, 0.1)
    variables = layer.init({"params": key, "dropout": key}, x)

    def run(layer):
        return layer.apply(variables, x, rngs={"dropout": key})

    @jax.jit
    def step(rate):
        with with_rates(rate):
            return run(layer)

    for rate in [0.0, 0.4]:
        expected = run(make(name, rate))
        np.testing.assert_allclose(step(jnp.float32(rate)), expected, rtol=1e-5, atol=1e-6)
        with with_rates(rate):
            np.testing.assert_allclose(run(layer), expected, rtol=1e-5, atol=1e-6)
    assert layer.rate == 0.1


class Model(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        off = not self.train
        x = nn.remat(dropjax.linen.Dropout)(0.1, deterministic=off, name="first")(x)
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=2)
        x, _ = block(off, name="blocks")(x, None)
        return nn.Dropout(0.2, deterministic=off, name="flax")(x)


class Block(nn.Module):
    off: bool

    @nn.compact
    def __call__(self, x, _):
        return nn.jit(dropjax.linen.Dropout)(0.3, deterministic=self.off, name="inner")(x), None


def zeros(y):
    return float((y == 0).mean())


def test_a_traced_rate_compiles_once_and_is_read_at_each_call(key):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(rate, key):
        with with_rates(rate):
            return Model().apply({}, X, rngs={"dropout": key})

    for rate in [0.0, 0.5, 1.0, 0.0]:
        rest = 1 - 0.8 * (1 - rate) ** 3  # Flax's own keeps 0.2
        assert abs(zeros(step(jnp.float32(rate), key)) - rest) < 6 * np.sqrt(0.25 / X.size)


def test_no_traced_rate_leaks(key):
    layer = nn.remat(dropjax.linen.Dropout)(0.1, deterministic=False)

    @jax.jit
    def step(rate):
        with with_rates(rate):
            return layer.apply({}, X, rngs={"dropout": key})

    with jax.checking_leaks():
        np.testing.assert_array_equal(step(0.0), X)
    assert layer.rate == 0.1


@pytest.mark.parametrize("rate", [0.5, np.float32(0.5), jnp.float32(0.5), lambda path, rate: 0.5])
def test_flax_under_replace_flax_and_mc_apply(key, rate):
    """In any order of the contexts; also an eager call, and a second one."""

    class Attending(nn.Module):
        off: bool = False

        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(1, dropout_rate=0.1, deterministic=self.off, broadcast_dropout=False)(x)
            return nn.Dropout(0.2, deterministic=self.off)(x)

    x = jnp.ones((2, 8, 16))
    variables = Attending(off=True).init(key, x)

    class Built(nn.Module):
        off: bool = False

        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(
                1, dropout_rate=0.5, deterministic=self.off, broadcast_dropout=False
            )
            return nn.Dropout(0.5, deterministic=self.off)(attention(x))

    linen = dropjax.linen
    for _ in range(2):
        run = lambda model: model.apply(variables, x, rngs={"dropout": key})  # noqa: E731
        with linen.replace_flax():
            expected = run(Built())
            with with_rates(rate):
                np.testing.assert_allclose(run(Attending()), expected, rtol=1e-5)
        with with_rates(rate), linen.replace_flax():
            np.testing.assert_allclose(run(Attending()), expected, rtol=1e-5)
            mc = linen.mc_apply(Attending(off=True), variables, key, x)
        np.testing.assert_allclose(mc, linen.mc_apply(Built(off=True), variables, key, x), rtol=1e-5)
        assert (linen.mc_apply(Attending(off=True), variables, key, x) != mc).any()


def test_a_function_of_path_and_rate(key):
    seen = {}

    def rates(path, rate):
        seen[path] = rate
        return rate * 0 if path == "first" else 1.0

    with with_rates(rates):
        y = Model().apply({}, X, rngs={"dropout": key})
    assert seen == {"first": 0.1, "blocks/inner": 0.3} or seen == {"first": 0.1, "inner": 0.3}
    np.testing.assert_array_equal(y, 0)

    @jax.jit
    def step(share):
        with with_rates(lambda path, rate: rate * share):
            return dropjax.linen.Dropout(0.5, deterministic=False).apply({}, X, rngs={"dropout": key})

    assert zeros(step(jnp.float32(0))) == 0
    assert abs(zeros(step(jnp.float32(1))) - 0.5) < 6 * np.sqrt(0.25 / X.size)


def test_what_has_no_rate_keeps_its_own(key):
    """Learned rates, standard deviations, logits and numbers of tokens; and what is deterministic."""
    rate = dropjax.linen.Dropout(0.5, deterministic=False)
    layers = {
        "ConcreteDropout": dropjax.linen.ConcreteDropout(deterministic=False),
        "GaussianNoise": dropjax.linen.GaussianNoise(0.5, deterministic=False),
        "TokenDropout": dropjax.linen.TokenDropout(num_keep=2, deterministic=False),
    }
    x = jnp.ones((2, 4, 8))
    for layer in layers.values():
        variables = layer.init({"params": key, "dropout": key}, x)
        run = lambda: layer.apply(variables, x, rngs={"dropout": key})  # noqa: B023, E731
        expected = run()
        with with_rates(0.9):
            rate.apply({}, x, rngs={"dropout": key})
            jax.tree.map(np.testing.assert_array_equal, run(), expected)
    with with_rates(0.9):
        np.testing.assert_array_equal(Model(train=False).apply({}, X), X)
    nothing = pytest.raises(ValueError, match="with_rates: model must call a layer with a rate inside the context")
    with nothing, with_rates(0.77):
        layers["GaussianNoise"].apply({}, x, rngs={"dropout": key})


def test_inner_contexts_and_numbers_around_a_jitted_function(key):
    layer = dropjax.linen.Dropout(0.1, deterministic=False)
    run = jax.jit(lambda: layer.apply({}, X, rngs={"dropout": key}))
    own = run()
    for _ in range(2):  # the second time from the caches
        with with_rates(0.0):
            np.testing.assert_array_equal(run(), X)
            with with_rates(1.0):
                np.testing.assert_array_equal(run(), 0)
            np.testing.assert_array_equal(run(), X)
    np.testing.assert_array_equal(run(), own)


def test_an_outer_context_is_content_where_an_inner_rate_holds(key):
    run = jax.jit(lambda: dropjax.linen.Dropout(0.1, deterministic=False).apply({}, X, rngs={"dropout": key}))
    for inner in (1.0, 1.0, jnp.float32(1), lambda path, rate: 1.0):  # the second is not traced anew
        with with_rates(lambda path, rate: rate), with_rates(inner):
            np.testing.assert_array_equal(run(), 0 * X)


def test_bad_calls():
    for rate, error in [("0.5", TypeError), (True, TypeError), (None, TypeError), (nn.Dropout(0.5), TypeError)]:
        with pytest.raises(error, match="with_rates: rate must be a number or a float array"):
            with_rates(rate)
    for rate in [1.5, -0.1, np.nan, jnp.float32(2)]:
        with pytest.raises(ValueError, match=r"with_rates: rate must be in \[0, 1\]"):
            with_rates(rate)
    for of in [dropjax.schedules.linear(0.0, 0.5, 10), lambda: 0.5, lambda rate: rate]:
        for set_rates in (with_rates, lambda rate: dropjax.nnx.set_rates(dropjax.nnx.Dropout(0.5), rate)):
            with pytest.raises(TypeError, match=r"_rates: rate must be .* of two, .* schedule\(step\)"):
                set_rates(of)
    with pytest.raises(
        ValueError, match=r"with_rates: rate must be a number or a scalar array, got float32\[3\]. For other"
    ):
        with_rates(jnp.zeros(3))
    layer = dropjax.linen.Dropout(0.5, deterministic=False)
    out = pytest.raises(ValueError, match=r"with_rates: the returned rate must be in \[0, 1\]")
    with out, with_rates(lambda path, rate: 5):
        layer.apply({}, X, rngs={"dropout": jax.random.key(0)})
    none = pytest.raises(ValueError, match="with_rates: model must call a layer with a rate inside the context, got no")
    for rate in [0.77, jnp.float32(0.79), lambda path, rate: 0.5]:
        with none, with_rates(rate):
            pass

    @jax.jit
    def traced(rate):
        with with_rates(rate):
            return rate

    with none:
        traced(0.5)
    with pytest.raises(ZeroDivisionError), with_rates(0.66):  # not hidden by the check at the end
        1 / 0  # noqa: B018
