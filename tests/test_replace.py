"""Our dropout in Flax models whose source stays as it is: a transformer with attention, a convolutional network."""

import copy
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

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")


class Block(nn.Module):
    shared: bool

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, broadcast_dropout=self.shared)(
            y, deterministic=not train
        )
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.3)(nn.Dense(8)(y), deterministic=not train)


class Transformer(nn.Module):
    shared: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        for _ in range(2):
            x = nn.remat(Block, static_argnums=(2,))(self.shared)(x, train)
        return x


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.Dropout(0.25, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x.reshape(len(x), -1)))


class NnxTransformer(nnx.Module):
    def __init__(self, shared, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 8, dropout_rate=0.2, broadcast_dropout=shared, decode=False, deterministic=False, rngs=rngs
        )
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)])
        self.shared = self.layers[1]

    def __call__(self, x):
        x = x + self.attention(x)
        for layer in self.layers:
            x = layer(x)
        return x


class NnxConvolutional(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Sequential(
            nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.relu, nnx.Dropout(0.25, broadcast_dims=(1, 2), rngs=rngs)
        )
        self.head = nnx.Dict(dropout=nnx.Dropout(0.5, rngs=rngs))

    def __call__(self, x):
        return self.head["dropout"](self.body(x))


IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype(np.float32)
SEQUENCES = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
LINEN = {
    "transformer": (Transformer(), SEQUENCES),
    "transformer, a mask a head": (Transformer(shared=False), SEQUENCES),
    "convolutional": (Convolutional(), IMAGES),
}
models = pytest.mark.parametrize(("model", "x"), LINEN.values(), ids=LINEN.keys())


def setup(model, x):
    variables = model.init({"params": jax.random.key(0)}, x, train=False)
    return variables, lambda key: model.apply(variables, x, rngs={"dropout": key})


@models
def test_linen_threefry_gives_what_flax_gives(model, x):
    _, run = setup(model, x)
    expected = run(jax.random.key(1))
    with dropjax.linen.replace_flax("threefry"):
        np.testing.assert_allclose(run(jax.random.key(1)), expected, rtol=1e-5, atol=1e-6)


@models
def test_linen_draws_our_masks_and_leaves_the_rest(model, x):
    variables, run = setup(model, x)
    theirs = run(jax.random.key(1))
    with dropjax.linen.replace_flax():
        ours = run(jax.random.key(1))
        np.testing.assert_array_equal(run(jax.random.key(1)), ours)
        inside = model.init({"params": jax.random.key(0)}, x, train=False)
        evaluated = model.apply(variables, x, train=False)
    assert (ours != theirs).any()
    np.testing.assert_array_equal(run(jax.random.key(1)), theirs)
    jax.tree.map(np.testing.assert_array_equal, inside, variables)
    np.testing.assert_array_equal(evaluated, model.apply(variables, x, train=False))


@models
def test_linen_calls_only_our_dropout(model, x, monkeypatch):
    """No draw is left to jax.random.bernoulli, which Flax's layers and attention call."""
    _, run = setup(model, x)
    monkeypatch.setattr(jax.random, "bernoulli", None)
    with pytest.raises(TypeError, match="not callable"):
        run(jax.random.key(1))
    with dropjax.linen.replace_flax():
        run(jax.random.key(1))


@pytest.mark.slow
def test_jitted_function_is_traced_anew_inside_and_outside():
    _, run = setup(*LINEN["transformer"])
    run = jax.jit(run)
    theirs = run(jax.random.key(1))
    with dropjax.linen.replace_flax():
        ours = run(jax.random.key(1))
    with dropjax.linen.replace_flax("threefry"):
        same = run(jax.random.key(1))
    np.testing.assert_array_equal(run(jax.random.key(1)), theirs)
    assert (ours != theirs).any()
    np.testing.assert_allclose(same, theirs, rtol=1e-5, atol=1e-6)
    fresh = jax.jit(lambda key: setup(*LINEN["transformer"])[1](key))
    with dropjax.linen.replace_flax():
        np.testing.assert_allclose(fresh(jax.random.key(1)), ours, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fresh(jax.random.key(1)), theirs, rtol=1e-5, atol=1e-6)


def test_attention_weights_that_are_sown_are_those_before_dropout():
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, SEQUENCES)

    def run():
        return layer.apply(
            variables, SEQUENCES, sow_weights=True, mutable=["intermediates"], rngs={"dropout": jax.random.key(1)}
        )

    (theirs, expected) = run()
    with dropjax.linen.replace_flax("threefry"):
        ours, sown = run()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, sown, expected)


def test_layers_with_a_dropout_of_their_own_are_left_alone():
    class Doubling(nn.Dropout):
        def __call__(self, inputs, deterministic=None, rng=None):
            return inputs * 2

    with dropjax.linen.replace_flax():
        np.testing.assert_array_equal(Doubling(0.5).apply({}, jnp.ones(3)), 2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "make", [NnxTransformer, lambda shared, rngs: NnxConvolutional(rngs)], ids=["transformer", "conv"]
)
def test_nnx_model(make, shared, monkeypatch):
    x = SEQUENCES if make is NnxTransformer else IMAGES

    def model():
        return make(shared, nnx.Rngs(0))

    theirs = model()(x)
    np.testing.assert_allclose(dropjax.nnx.replace_flax(model(), "threefry")(x), theirs, rtol=1e-5, atol=1e-6)
    ours = dropjax.nnx.replace_flax(model())
    for ours_leaf, leaf in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (ours, model())), strict=True):
        np.testing.assert_array_equal(ours_leaf, leaf)
    assert not any(type(m) is nnx.Dropout for _, m in nnx.iter_modules(ours))
    assert (nnx.clone(ours)(x) != theirs).any()
    evaluated = nnx.view(model(), deterministic=True)(x)
    np.testing.assert_allclose(nnx.view(ours, deterministic=True)(x), evaluated, rtol=1e-6)
    monkeypatch.setattr(jax.random, "bernoulli", None)
    jitted = nnx.jit(lambda model, x: model(x))
    assert (jitted(ours, x) != jitted(ours, x)).any()


def test_nnx_shared_modules_stay_shared():
    model = dropjax.nnx.replace_flax(NnxTransformer(True, nnx.Rngs(0)))
    assert model.shared is model.layers[1]
    assert isinstance(model.shared, dropjax.nnx.Dropout)


class Inherited(nnx.Dropout):
    """Without a call of its own."""


def test_nnx_layers_stay_those_of_flax():
    """What looks for Flax's layers finds them, before and after copies, also in a view."""
    model = NnxTransformer(True, nnx.Rngs(0))
    model.inherited = Inherited(0.5, rngs=nnx.Rngs(1))
    ours = dropjax.nnx.replace_flax(model)
    assert ours is model
    graph, state = nnx.split(ours)
    copies = [ours, nnx.clone(ours), nnx.merge(graph, state), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)]
    copies += [nnx.merge(pickle.loads(pickle.dumps(graph)), state)]
    views = [dropjax.nnx.mc_view(one, jax.random.key(0)) for one in (ours, NnxTransformer(True, nnx.Rngs(0)))]
    views += [pickle.loads(pickle.dumps(view)) for view in views]
    for one in copies + views:
        assert nnx.graphdef(one) == nnx.graphdef(nnx.clone(one))
        assert isinstance(one.shared, nnx.Dropout)
        assert isinstance(one.shared, dropjax.nnx.Dropout)
        assert type(one.shared).__name__ == "Dropout"
        assert isinstance(one.attention, nnx.MultiHeadAttention)
        assert sum(isinstance(m, nnx.Dropout) for _, m in nnx.iter_modules(one)) == 1 + hasattr(one, "inherited")
        one.set_attributes(nnx.Dropout, deterministic=True)
        one.set_attributes(nnx.MultiHeadAttention, deterministic=True)
        assert one.shared.deterministic
        assert one.attention.deterministic
    evaluated = nnx.view(NnxTransformer(True, nnx.Rngs(0)), deterministic=True)(SEQUENCES)
    for one in copies:
        assert isinstance(one.inherited, Inherited)
        np.testing.assert_allclose(one(SEQUENCES), evaluated, rtol=1e-6)
        np.testing.assert_array_equal(nnx.jit(lambda m: m(SEQUENCES))(one), one(SEQUENCES))
    for view, again in zip(views[:2], views[2:], strict=True):
        y = view(SEQUENCES)
        assert (y != evaluated).any()
        np.testing.assert_array_equal(again(SEQUENCES), y)


class NnxDirect(nnx.Module):
    """Calls Flax's attention function, as it was given."""

    def __init__(self, attention_fn=nnx.dot_product_attention):
        self.attention_fn = attention_fn

    def __call__(self, *args, **options):
        return self.attention_fn(*args, **options)


def test_nnx_grouped_query_attention():
    """Fewer heads of keys and values than of queries, as the attention function itself allows."""
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, 5, h, 6)) for k, h in zip(keys, [4, 2, 2], strict=True))
    options = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.5, "broadcast_dropout": False}
    expected = nnx.dot_product_attention(query, key, value, **options)
    same, ours = (dropjax.nnx.replace_flax(NnxDirect(), generator) for generator in ["threefry", "mix"])
    np.testing.assert_allclose(same(query, key, value, **options), expected, rtol=1e-5, atol=1e-6)
    assert jnp.abs(ours(query, key, value, **options) - expected).max() > 1e-3


def test_flax_dropout_set_to_ours(monkeypatch):
    """What people do first: nnx.Dropout = dropjax.nnx.Dropout."""
    monkeypatch.setattr(nnx, "Dropout", dropjax.nnx.Dropout)
    monkeypatch.setattr(nn, "Dropout", dropjax.linen.Dropout)
    with pytest.raises(ValueError, match="no `rngs` argument was provided to Dropout"):
        nnx.Dropout(0.5)(SEQUENCES)
    ours = nn.Dropout(0.5, deterministic=False, generator="threefry")
    expected = ours.apply({}, SEQUENCES, rngs={"dropout": jax.random.key(0)})
    with dropjax.linen.replace_flax():  # leaves our own layers, and their fields, alone
        np.testing.assert_array_equal(ours.apply({}, SEQUENCES, rngs={"dropout": jax.random.key(0)}), expected)


def test_bad_calls():
    """Those of Linen are errors at the call, before the context is entered."""
    for wrong in [Transformer(), nnx.Dropout(0.5), Transformer, len, None, 0.5]:
        with pytest.raises(
            TypeError, match=r"replace_flax: generator must be a string, .* takes no model: with replace"
        ):
            dropjax.linen.replace_flax(wrong)
    with pytest.raises(ValueError, match="replace_flax: generator must be one of"):
        dropjax.linen.replace_flax("rbg")
    with pytest.raises(ValueError, match="replace_flax: generator must be one of"):
        dropjax.nnx.replace_flax(nnx.Dropout(0.5), "rbg")
    with pytest.raises(TypeError, match="replace_flax: generator must be a string, got int"):
        dropjax.nnx.replace_flax(nnx.Dropout(0.5), 1)
    for wrong in [Transformer(), nn.Dropout(0.5), "mix", nnx.Dropout]:
        with pytest.raises(TypeError, match=r"model must be an nnx.Module, .* dropjax.linen.replace_flax\(\)"):
            dropjax.nnx.replace_flax(wrong)
    with pytest.raises(ValueError, match="replace_flax: model must contain Flax's Dropout, MultiHeadAttention or"):
        dropjax.nnx.replace_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    layer = dropjax.nnx.replace_flax(nnx.Dropout(0.5))
    assert dropjax.nnx.replace_flax(layer) is layer  # again is no error


def test_as_a_decorator():
    layer = nn.Dropout(0.5, deterministic=False)

    def run():
        return layer.apply({}, SEQUENCES, rngs={"dropout": jax.random.key(1)})

    theirs = run()
    np.testing.assert_array_equal(dropjax.linen.replace_flax("threefry")(run)(), theirs)
    assert (dropjax.linen.replace_flax()(run)() != theirs).any()
    np.testing.assert_array_equal(run(), theirs)


def test_inner_context_holds_and_jit_agrees():
    layer, key = nn.Dropout(0.5, deterministic=False), jax.random.key(1)

    def run(key):
        return layer.apply({}, SEQUENCES, rngs={"dropout": key})

    jitted, theirs = jax.jit(run), run(key)
    with dropjax.linen.replace_flax("threefry"):
        with dropjax.linen.replace_flax("mix"):
            inner = run(key)
            np.testing.assert_array_equal(jitted(key), inner)
        np.testing.assert_array_equal(run(key), theirs)
    with dropjax.linen.replace_flax("mix"):
        np.testing.assert_array_equal(jitted(key), inner)
    assert (inner != theirs).any()


def test_attention_functions_take_what_those_of_flax_take():
    class Direct(nn.Module):
        attention_fn: object = nn.dot_product_attention

        def attend(self, q, v):
            return self.attention_fn(q, q, v, None, None, True, self.make_rng("dropout"), 0.5)

    q = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    run = jax.jit(lambda key: Direct().apply({}, q, q + 1, rngs={"dropout": key}, method="attend"))
    theirs = run(jax.random.key(1))
    with dropjax.linen.replace_flax("threefry"):
        np.testing.assert_allclose(run(jax.random.key(1)), theirs, rtol=1e-5, atol=1e-6)
    with dropjax.linen.replace_flax():
        assert (run(jax.random.key(1)) != theirs).any()
    theirs = nnx.dot_product_attention(q, q, q + 1, None, None, True, jax.random.key(1), 0.5)
    ours = dropjax.nnx.replace_flax(NnxDirect(), "threefry")(q, q, q + 1, None, None, True, jax.random.key(1), 0.5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_converted_attention_evaluates_as_flax_does(dtype):
    def layer():
        return nnx.MultiHeadAttention(
            2, 8, qkv_features=6, dropout_rate=0.2, decode=False, dtype=dtype, rngs=nnx.Rngs(0)
        )

    x, mask = jnp.stack([SEQUENCES, SEQUENCES + 1]), jnp.tril(jnp.ones((2, 1, 1, 5, 5)))
    converted = pickle.loads(pickle.dumps(dropjax.nnx.replace_flax(layer())))
    np.testing.assert_array_equal(
        converted(x, mask=mask, deterministic=True), layer()(x, mask=mask, deterministic=True)
    )
    assert nnx.graphdef(converted) == nnx.graphdef(dropjax.nnx.replace_flax(layer()))


@pytest.mark.parametrize("setting", [jax.enable_x64(True), jax.threefry_partitionable(False)], ids=["x64", "original"])
def test_threefry_where_its_masks_would_not_be_those_of_flax(setting):
    with setting, pytest.raises(ValueError, match="generator must be 'mix' under jax_enable_x64 or without"):
        dropjax.dropout(jax.random.key(0), jnp.ones(3), 0.5, generator="threefry")
