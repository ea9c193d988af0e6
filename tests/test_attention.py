"""Dropout on attention weights in models that call Flax's attention functions themselves, however they import them."""

import functools
import inspect
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.linen.attention import dot_product_attention_weights
from flax.nnx.nn.attention import dot_product_attention_weights as nnx_weights

import dropjax
import dropjax.linen
import dropjax.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2, 4)), jnp.float32)
RATE = 0.5


def applied(weights):
    return jnp.einsum("...hqk,...khd->...qhd", weights, X)


def in_a_helper(function, *args, **options):
    return function(*args, **options)


LINEN = {
    "nn.dot_product_attention": lambda **o: nn.dot_product_attention(X, X, X, **o),
    "nn.attention.dot_product_attention": lambda **o: nn.attention.dot_product_attention(X, X, value=X, **o),
    "nn.attention.dot_product_attention_weights": lambda **o: applied(
        nn.attention.dot_product_attention_weights(X, X, **o)
    ),
    "imported by name": lambda **o: applied(dot_product_attention_weights(X, X, **o)),
    "by keyword": lambda **o: applied(dot_product_attention_weights(query=X, key=X, **o)),
    "by position": lambda deterministic, dropout_rng, **o: applied(
        dot_product_attention_weights(X, X, None, None, o["broadcast_dropout"], dropout_rng, RATE, deterministic)
    ),
    "in a partial": lambda **o: functools.partial(nn.dot_product_attention, X, X, X, dropout_rate=RATE)(**o),
    "in a helper": lambda **o: in_a_helper(nn.dot_product_attention, X, X, X, **o),
}
NNX = {
    "nnx.dot_product_attention": lambda **o: nnx.dot_product_attention(X, X, X, **o),
    "nnx.nn.attention.dot_product_attention": lambda **o: nnx.nn.attention.dot_product_attention(X, X, value=X, **o),
    "nnx.nn.attention.dot_product_attention_weights": lambda **o: applied(
        nnx.nn.attention.dot_product_attention_weights(X, X, **o)
    ),
    "imported by name": lambda **o: applied(nnx_weights(X, X, **o)),
    "by position": lambda deterministic, dropout_rng, **o: applied(
        nnx_weights(X, X, None, None, o["broadcast_dropout"], dropout_rng, RATE, deterministic)
    ),
    "in a helper": lambda **o: in_a_helper(nnx.dot_product_attention, X, X, X, **o),
}


class Attending(nn.Module):
    call: object

    def __call__(self, deterministic=True):
        rng = None if deterministic else self.make_rng("dropout")
        return self.call(dropout_rate=RATE, deterministic=deterministic, dropout_rng=rng, broadcast_dropout=False)


class Model(nn.Module):
    call: object

    @nn.compact
    def __call__(self, deterministic=True):
        return Attending(self.call, name="attention")(deterministic)


class NnxAttending(nnx.Module):
    def __init__(self, call, rngs):
        self.call, self.rngs, self.deterministic = call, rngs.dropout.fork(), True

    def __call__(self):
        rng = None if self.deterministic else self.rngs()
        return self.call(dropout_rate=RATE, deterministic=self.deterministic, dropout_rng=rng, broadcast_dropout=False)


def expected(key, share_batch=False):
    """Attention in NumPy's order, with dropjax's masks of a key."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", X / 2, X)
    weights = jax.nn.softmax(scores)
    return applied(dropjax.dropout(key, weights, RATE, broadcast_dims=(0,) * share_batch))


@pytest.mark.parametrize("name", LINEN)
def test_linen(key, name):
    model, linen = Model(LINEN[name]), dropjax.linen
    evaluated = model.apply({})
    drawn = linen.mc_apply(model, {}, key)
    one = linen.mc_apply(model, {}, key, masks="shared")
    for y, share in [(drawn, False), (one, True)]:  # the key is that of the layer that calls the function
        layer = Keyed().apply({}, rngs={"dropout": key})
        np.testing.assert_allclose(y, expected(layer, share), rtol=1e-5, atol=1e-6)
    train = lambda: model.apply({}, deterministic=False, rngs={"dropout": key})  # noqa: E731
    theirs = train()
    with linen.replace_flax("threefry"):
        np.testing.assert_allclose(train(), theirs, rtol=1e-5, atol=1e-6)
    with linen.replace_flax():
        np.testing.assert_allclose(train(), drawn, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model.apply({}), evaluated)
    np.testing.assert_array_equal(train(), theirs)
    np.testing.assert_array_equal(model.apply({}), evaluated)
    assert linen.mc_draws(model, {}) == (("attention", "Attending", RATE, True),)


class Keyed(nn.Module):
    """Gives the key of a layer of dropjax at the path of the attention above."""

    @nn.compact
    def __call__(self):
        class Key(nn.Module):
            def __call__(self):
                return dropjax.linen.base.key_from_stream(self, "dropout")

        return Key(name="attention")()


@pytest.mark.parametrize("name", NNX)
def test_nnx(key, name):
    model = NnxAttending(NNX[name], nnx.Rngs(0))
    evaluated = model()
    drawn = dropjax.nnx.mc_view(model, key)()
    layer = jax.random.fold_in(jax.random.fold_in(key, 0), 0)  # the first stream's first key
    np.testing.assert_allclose(drawn, expected(layer), rtol=1e-5, atol=1e-6)
    one = dropjax.nnx.mc_view(model, key, masks="shared")()
    np.testing.assert_allclose(one, expected(layer, share_batch=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model(), evaluated)
    model.set_attributes(deterministic=False)
    theirs = nnx.clone(model)()
    same = dropjax.nnx.replace_flax(nnx.clone(model), "threefry")()
    np.testing.assert_allclose(same, theirs, rtol=1e-5, atol=1e-6)
    ours = dropjax.nnx.replace_flax(nnx.clone(model))
    np.testing.assert_allclose(nnx.clone(ours)(), expected(nnx.clone(model).rngs()), rtol=1e-5, atol=1e-6)
    assert isinstance(ours, NnxAttending)
    np.testing.assert_array_equal(nnx.clone(model)(), theirs)
    assert dropjax.nnx.mc_draws(model) == (("", "NnxAttending", RATE, True),)


class Helper:
    def attend(self, **options):
        return nnx.dot_product_attention(X, X, X, **options)

    @property
    def attention(self):
        return self.attend


class Beside(nnx.Module):
    """Attention that a module calls by ways of its own, beside dropout that shows."""

    def __init__(self, call):
        self.call, self.drop = nnx.static(call), nnx.Dropout(0.5)

    def __call__(self):
        return self.call(self.drop(X), dropout_rate=RATE, deterministic=True, broadcast_dropout=False)


BY_NAME = {"own": None, "flax": lambda **options: nnx.dot_product_attention(X, X, X, **options)}
HIDDEN = {
    "a helper's method": lambda x, helper=Helper(), **o: helper.attend(**o),  # noqa: B008
    "a class": lambda x, **o: Helper().attend(**o),
    "a property": lambda x, **o: Helper().attention(**o),
    "a table": lambda x, **o: BY_NAME["flax"](**o),
    "an argument by default": lambda x, attend=nnx.dot_product_attention, **o: attend(X, X, X, **o),
    "a name that is made": lambda x, **o: getattr(nnx, "_".join(["dot", "product", "attention"]))(X, X, X, **o),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_attention_of_nnx(key, name):
    model = Beside(HIDDEN[name])
    drawn = dropjax.nnx.mc_view(model, key)()
    layer = jax.random.fold_in(jax.random.fold_in(key, 1), 0)  # the second stream's first key
    np.testing.assert_allclose(drawn, expected(layer), rtol=1e-5, atol=1e-6)
    assert dropjax.nnx.mc_draws(model) == (("drop", "Dropout", 0.5, True), ("", "Beside", RATE, True))


TRANSFORMED = {
    "nnx.jit": nnx.jit,
    "nnx.jit with options": functools.partial(nnx.jit, inline=True),
    "nnx.remat": nnx.remat,
    "inside a method": lambda method: lambda self: nnx.remat(lambda module: method(module))(self),
    "twice": lambda method: nnx.jit(nnx.remat(method)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_methods_that_nnx_transforms(key, name):
    """The key is that of the module as it is inside the transformation."""

    class Transformed(nnx.Module):
        def __init__(self, train=False):
            self.rngs, self.train_ = nnx.Rngs(0).dropout.fork(), train

        @TRANSFORMED[name]
        def __call__(self):
            rng = self.rngs() if self.train_ else None
            return NNX["in a helper"](
                deterministic=rng is None, dropout_rng=rng, broadcast_dropout=False, dropout_rate=RATE
            )

    model, view = Transformed(), dropjax.nnx.mc_view(Transformed(), key)
    evaluated = model()
    for i in range(2):
        layer = jax.random.fold_in(jax.random.fold_in(key, 0), i)
        np.testing.assert_allclose(view(), expected(layer), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model(), evaluated)
    assert dropjax.nnx.mc_draws(model) == (("", "Transformed", RATE, True),)
    ours = dropjax.nnx.replace_flax(Transformed(train=True))()
    np.testing.assert_allclose(ours, expected(Transformed().rngs()), rtol=1e-5, atol=1e-6)


class WithoutFlag(nnx.MultiHeadAttention):
    def __call__(self, x, train=False):
        return super().__call__(x, deterministic=not train)


class ByPosition(nnx.MultiHeadAttention):
    def __call__(self, x, deterministic=True):
        return super().__call__(x, deterministic=deterministic)


class HandedOn(nnx.MultiHeadAttention):
    def __call__(self, x, **options):
        return super().__call__(x, **options)


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [(WithoutFlag, (), {}), (ByPosition, (False,), {}), (ByPosition, (), {}), (HandedOn, (), {"deterministic": False})],
)
def test_subclasses_of_attention(key, kind, args, options):
    """They draw what Flax's layer draws, whatever flags their call has."""
    fields = {"dropout_rate": RATE, "broadcast_dropout": False, "decode": False, "keep_rngs": False}
    x, make = X[:, :, 0], lambda kind: kind(2, 4, **fields, rngs=nnx.Rngs(0))
    drawn = dropjax.nnx.mc_view(make(kind), key)(x, *args, **options)
    np.testing.assert_array_equal(drawn, dropjax.nnx.mc_view(make(nnx.MultiHeadAttention), key)(x))
    if kind is not HandedOn:
        with pytest.raises(TypeError, match=r"__call__\(\) got an unexpected keyword argument 'nonsense'"):
            dropjax.nnx.mc_view(make(kind), key)(x, nonsense=1)


@pytest.mark.parametrize("make", [lambda of: of, functools.partial, lambda of: type("", (), {"__call__": of})()])
def test_a_function_in_the_place_of_a_method(key, make):
    def function(*module):
        return LINEN["in a helper"](deterministic=True, broadcast_dropout=False, dropout_rate=RATE)

    method = make(function)
    drawn = dropjax.linen.mc_apply(nn.Dropout(RATE), {}, key, method=method)
    np.testing.assert_allclose(drawn, expected(Rooted().apply({}, rngs={"dropout": key})), rtol=1e-5, atol=1e-6)
    assert dropjax.linen.mc_draws(nn.Dropout(RATE), {}, method=method) == (("", "Dropout", RATE, True),)


class Rooted(nn.Module):
    def __call__(self):
        return dropjax.linen.base.key_from_stream(self, "dropout")


def test_a_key_of_the_callers_own_stays_as_it_is(key):
    """Only a key of the module's stream becomes that of its path."""
    model = Attending(lambda **o: nn.dot_product_attention(X, X, X, **{**o, "dropout_rng": key}))
    with dropjax.linen.replace_flax():
        y = model.apply({}, deterministic=False, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(y, expected(key), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [dot_product_attention_weights, nnx_weights])
def test_the_functions_stay_what_they_are(key, function):
    """Their identity, signature, values and errors, also where other threads call them."""
    dropjax.linen.mc_apply(Model(LINEN["by keyword"]), {}, key)
    dropjax.nnx.mc_view(NnxAttending(NNX["by position"], nnx.Rngs(0)), key)
    module = inspect.getmodule(function)
    assert module.dot_product_attention_weights is function
    assert list(inspect.signature(function).parameters)[:6] == [
        "query",
        "key",
        "bias",
        "mask",
        "broadcast_dropout",
        "dropout_rng",
    ]
    assert inspect.signature(function).parameters["dropout_rate"].default == 0.0
    assert function.__name__ == "dot_product_attention_weights"
    assert "attention weights" in function.__doc__
    np.testing.assert_allclose(jax.jit(function)(X, X).sum(-1), 1, rtol=1e-5)
    with pytest.raises(TypeError, match=r"dot_product_attention_weights.*missing 1 required"):
        function(X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        function(X, X, rate=0.5)

    plain, results = function(X, X), {}
    with dropjax.linen.replace_flax():
        thread = threading.Thread(
            target=lambda: results.update(y=function(X, X, dropout_rng=key, dropout_rate=0.5, broadcast_dropout=False))
        )
        thread.start()
        thread.join()
    keep = jax.random.bernoulli(key, 0.5, plain.shape)  # Flax's own masks: the context is that of the other thread
    np.testing.assert_allclose(results["y"], plain * keep * 2, rtol=1e-5)


@jax.jit
def jitted(key, deterministic):
    return nn.dot_product_attention(
        X, X, X, dropout_rng=key, dropout_rate=RATE, deterministic=deterministic is None, broadcast_dropout=False
    )


@jax.jit
def nnx_jitted(key, deterministic):
    return nnx.dot_product_attention(
        X, X, X, dropout_rng=key, dropout_rate=RATE, deterministic=deterministic is None, broadcast_dropout=False
    )


class InJit(nn.Module):
    train: bool = False

    def __call__(self):
        return jitted(self.make_rng("dropout"), 0) if self.train else jitted(None, None)


class NnxInJit(nnx.Module):
    def __init__(self, train):
        self.train_, self.rngs = train, nnx.Rngs(0).dropout.fork()

    def __call__(self):
        return nnx_jitted(self.rngs(), 0) if self.train_ else nnx_jitted(None, None)


def test_attention_in_a_function_that_jax_jits(key):
    """A key that it closed over would be used again from the cache: there the key must be an argument."""
    linen, nnx_model = dropjax.linen, dropjax.nnx
    for _ in range(2):
        jitted(None, None), nnx_jitted(None, None)
        with pytest.raises(ValueError, match="mc_apply: attention must be called by InJit itself, got a call inside"):
            linen.mc_apply(InJit(), {}, key)
        with pytest.raises(ValueError, match="mc_view: attention must be called by NnxInJit itself, got a call inside"):
            nnx_model.mc_view(NnxInJit(False), key)()
    drawn = [linen.mc_apply(InJit(train=True), {}, jax.random.fold_in(key, i)) for i in (0, 1, 1)]
    assert jnp.abs(drawn[0] - drawn[1]).max() > 1e-3
    np.testing.assert_array_equal(drawn[1], drawn[2])
    view = nnx_model.mc_view(NnxInJit(True), key)
    assert jnp.abs(view() - view()).max() > 1e-3

    class Mapped(nn.Module):
        def __call__(self):
            def attend(x):
                return nn.dot_product_attention(x, x, x, dropout_rate=RATE, deterministic=True)

            return jax.vmap(attend)(X)

    np.testing.assert_allclose(linen.mc_apply(Mapped(), {}, key).shape, X.shape)
