"""What a call draws and does not: `mc_draws`, and the warning of what stays off."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import dropjax
import dropjax.linen
import dropjax.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
X = jnp.ones((2, 3, 4))


class TheirDropout(nn.Module):
    """Of a third party, in Flax's style."""

    rate: float

    def __call__(self, x, deterministic=True):
        return x if deterministic else x * jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)


class Overriding(nn.Dropout):
    """A subclass that does its own thing."""

    def __call__(self, inputs, deterministic=None, rng=None):
        return inputs * 2


class Calling(nn.Dropout):
    """A subclass that calls Flax's by super."""

    def __call__(self, inputs):
        return super().__call__(inputs, True) + 1


class OnlyInTraining(nn.Module):
    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(self.dropout_rate)(x, deterministic=False) if train else x


def own_attention(query, key, value, **options):
    return value


class Block(nn.Module):
    """One of each kind."""

    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.1, name="flax")(x, deterministic=True)
        x = dropjax.linen.DropPath(0.2, name="ours")(x, deterministic=True)
        x = dropjax.linen.GaussianNoise(0.3, name="noise")(x, deterministic=True)
        x = dropjax.linen.ConcreteDropout(name="learned")(x, deterministic=True)
        x = dropjax.linen.Dropout(jnp.full(4, 0.5), name="array")(x, deterministic=True)
        x = nn.Dropout(0.0, name="zero")(x, deterministic=True)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.4, name="attention")(x, deterministic=True)
        x = Calling(0.15, name="calling")(x)
        x = TheirDropout(0.5, name="theirs")(x)
        x = Overriding(0.6, name="overriding")(x, deterministic=True)
        own = nn.MultiHeadDotProductAttention(2, dropout_rate=0.7, attention_fn=own_attention, name="own_attention")
        x = own(x, deterministic=True)
        x = OnlyInTraining(0.8, name="only_in_training")(x)
        return bridge.to_linen(nnx.Dropout, 0.9, deterministic=True, name="bridged")(x)


class Model(nn.Module):
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)


ROWS = {
    ("block/flax", "Dropout", 0.1, True),
    ("block/ours", "DropPath", 0.2, True),
    ("block/noise", "GaussianNoise", 0.3, True),
    ("block/learned", "ConcreteDropout", "learned", True),
    ("block/array", "Dropout", "float32[4]", True),
    ("block/attention", "MultiHeadDotProductAttention", 0.4, True),
    ("block/calling", "Calling", 0.15, True),
    ("block/zero", "Dropout", 0.0, False),
    ("block/theirs", "TheirDropout", 0.5, False),
    ("block/overriding", "Overriding", 0.6, False),
    ("block/own_attention", "MultiHeadDotProductAttention", 0.7, False),
    ("block/only_in_training", "OnlyInTraining", 0.8, False),
    ("block/bridged", "Dropout", 0.9, False),
}


def initialised(model):
    return model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, X)


def test_linen_draws():
    """All rows, also of abstract variables and inputs; nothing runs."""
    model = Model()
    variables = jax.eval_shape(lambda: initialised(model))
    draws = dropjax.linen.mc_draws(model, variables, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert {tuple(row) for row in draws} == ROWS
    assert [row.drawn for row in draws] == sorted((row.drawn for row in draws), reverse=True)
    lines = str(draws).split("\n")
    assert lines[0].split() == ["path", "kind", "rate", "draws"]
    assert lines[1].split() == ["block/flax", "Dropout", "0.1", "yes"]
    assert lines[-1].split()[-1] == "NO"
    assert repr(draws) == str(draws)
    assert dropjax.linen.mc_draws(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), X), X) == ()


def test_linen_warns_once(key):
    model = Model()
    variables = initialised(model)
    expected = {path for path, _, rate, drawn in ROWS if not drawn and rate}
    with pytest.warns(UserWarning, match="mc_apply: the dropout of .* stays off") as caught:
        dropjax.linen.mc_apply(model, variables, key, X)
    assert len(caught) == 1
    assert {path for path, *_ in ROWS if f" {path} (" in str(caught[0].message)} == expected
    with warnings.catch_warnings(action="error"):
        dropjax.linen.mc_apply(model, variables, key, X)  # and not at each call
        dropjax.linen.mc_apply(Quiet(), {}, key, X)


class Quiet(nn.Module):
    """What holds a rate and dropout that draws, also where that is jitted and found in a cache."""

    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dropout)(self.dropout_rate, deterministic=True)(x)


def test_no_warning_of_what_is_found_in_a_cache(key):
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            dropjax.linen.mc_apply(Quiet(), {}, key, X)


def test_subclasses_that_call_flax_draw(key):
    y = dropjax.linen.mc_apply(Calling(0.5), {}, key, X)
    assert set(np.unique(y).tolist()) == {1.0, 3.0}
    with dropjax.linen.replace_flax():
        np.testing.assert_array_equal(Calling(0.5).apply({}, X), X + 1)


class NnxTheirs(nnx.Module):
    def __init__(self, drop_prob):
        self.drop_prob = drop_prob

    def __call__(self, x):
        return x


class NnxOverriding(nnx.Dropout):
    def __call__(self, x):
        return x


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.dropout_rate = 0.1
        self.flax = nnx.Dropout(0.1, rngs=rngs)
        self.ours = dropjax.nnx.DropPath(0.2, rngs=rngs)
        self.learned = dropjax.nnx.ConcreteDropout(rngs=rngs)
        self.zero = nnx.Dropout(0.0, rngs=rngs)
        heads = {"dropout_rate": 0.4, "decode": False, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(2, 4, **heads)
        self.own_attention = nnx.MultiHeadAttention(2, 4, attention_fn=own_attention, **heads)
        self.theirs, self.overriding = NnxTheirs(0.5), NnxOverriding(0.6, rngs=rngs)
        self.unused = nnx.Dropout(0.3, rngs=rngs)
        self.bridged = bridge.ToNNX(nn.Sequential([nn.Dropout(0.9, deterministic=True)]))

    def __call__(self, x):
        x = self.attention(self.zero(self.learned(self.ours(self.flax(x)))))
        return self.bridged(self.overriding(self.theirs(self.own_attention(x))))


NNX_ROWS = {
    ("flax", "Dropout", 0.1, True),
    ("ours", "DropPath", 0.2, True),
    ("learned", "ConcreteDropout", "learned", True),
    ("attention", "MultiHeadAttention", 0.4, True),
    ("zero", "Dropout", 0.0, False),
    ("own_attention", "MultiHeadAttention", 0.4, False),
    ("theirs", "NnxTheirs", 0.5, False),
    ("overriding", "NnxOverriding", 0.6, False),
    ("unused", "Dropout", 0.3, False),
    ("bridged/layers_0", "Dropout", 0.9, False),
}


def test_nnx_draws():
    model = NnxModel(nnx.Rngs(0))
    draws = dropjax.nnx.mc_draws(model, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert {tuple(row) for row in draws} == NNX_ROWS
    scaled = dropjax.nnx.mc_draws(nnx.Sequential(model), X, masks="shared")
    assert {tuple(row) for row in scaled} == {(f"layers/0/{path}", *rest) for path, *rest in NNX_ROWS}


def test_nnx_warns_once(key):
    """Of what the model contains when the view is made; of Linen's layers in a bridge when they are called."""
    model = NnxModel(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="mc_view: the dropout of .* stays off") as caught:
        view = dropjax.nnx.mc_view(model, key)
    assert len(caught) == 1
    named = {path for path, *_ in NNX_ROWS if f" {path} (" in str(caught[0].message)}
    assert named == {"own_attention", "theirs", "overriding"}
    with pytest.warns(UserWarning, match="mc_view: the dropout of bridged/layers_0 .Dropout, rate 0.9. stays off"):
        view(X)
    with warnings.catch_warnings(action="error"):
        dropjax.nnx.mc_view(model, key)(X)


def of_third_parties(base):
    """Modules whose dropout is code of their own: class, the names of their fields, a value, and the rate told."""

    def __call__(self, x):
        return x

    table = [
        ("Dropout", "keep_prob", 0.75, 0.25),
        ("Block", "survival_prob", 0.75, 0.25),
        ("Dropout", "rate", np.float32(0.25), 0.25),
        ("Dropout", "rate", jnp.float32(0.25), 0.25),
        ("DropPath", "config", (0.25,), "unknown"),
        ("Backdrop", "config", (0.25,), None),
        ("Block", "keep_prob", 1.0, None),
        ("Block", "dropped", jnp.ones(3), None),
    ]
    for kind, name, value, rate in table:
        yield type(kind, (base,), {"__call__": __call__, "__annotations__": {name: object}}), name, value, rate


def test_the_names_that_third_parties_give_their_rates(key):
    """What keeps is told, too, as are arrays; where only the class is called a dropout, its rate is unknown."""
    linen = [(kind(**{name: value}), rate) for kind, name, value, rate in of_third_parties(nn.Module)]
    model = nn.Sequential([nn.Dropout(0.5, deterministic=True), *(layer for layer, _ in linen)])
    expected = {f"layers_{i + 1}": rate for i, (_, rate) in enumerate(linen) if rate}
    assert {row.path: row.rate for row in dropjax.linen.mc_draws(model, {}, X) if not row.drawn} == expected
    with pytest.warns(UserWarning, match="stays off") as caught:
        dropjax.linen.mc_apply(model, {}, key, X)
    assert [f"{path} (" in str(caught[0].message) for path in expected] == [True] * len(expected)

    layers = [nnx.Dropout(0.5)]
    for kind, name, value, _ in of_third_parties(nnx.Module):
        layers.append(kind())
        setattr(layers[-1], name, nnx.Variable(value) if isinstance(value, jax.Array) else value)
    named = {path.replace("_", "/"): rate for path, rate in expected.items()}
    with pytest.warns(UserWarning, match="stays off") as caught:
        dropjax.nnx.mc_view(nnx.Sequential(*layers), key)
    for path, rate in named.items():
        assert f"{path} ({type(layers[int(path[-1])]).__name__}, rate {rate})" in str(caught[0].message)
    draws = dropjax.nnx.mc_draws(nnx.Sequential(*layers), X)
    traced = {"layers/4": "traced"}  # arrays of the model are arguments of what is traced
    assert {row.path: row.rate for row in draws if not row.drawn} == {**named, **traced}


class Holding(nn.Module):
    """Called a dropout, and holds one that shows its rate."""

    rates: tuple = (0.0,)

    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dropout(rate, deterministic=True) for rate in self.rates])(x)


class DropoutBlock(Holding):
    pass


def test_an_unknown_rate_is_that_of_what_a_module_holds(key):
    assert [row.rate for row in dropjax.linen.mc_draws(DropoutBlock(), {}, X)] == [0.0]
    with pytest.raises(ValueError, match="got none"):
        dropjax.linen.mc_apply(DropoutBlock(), {}, key, X)


def test_where_no_key_reaches_a_layer(key):
    inner = Holding((0.5,))

    class Applied(nn.Module):
        def __call__(self, x):
            return inner.apply({}, x)

    layer = {"rate": 0.5, "deterministic": True}
    for make in [nn.Dropout, dropjax.linen.Dropout]:
        mapped = nn.vmap(make, variable_axes={}, split_rngs={"params": True})(**layer)
        with pytest.raises(ValueError, match=r"mc_apply: .* must get the stream 'dropout', got none"):
            dropjax.linen.mc_apply(mapped, {}, key, X)
    with pytest.raises(ValueError, match="mc_apply: Dropout_0 must get the stream 'dropout', got none"):
        dropjax.linen.mc_apply(Applied(), {}, key, X)

    class Mapped(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x):
            return jax.vmap(self.drop)(x)

    with pytest.raises(Exception, match="Cannot mutate") as caught:
        dropjax.nnx.mc_view(Mapped(), key)(X)
    assert "mc_view: a function that JAX transforms" in caught.value.__notes__[0]


def test_a_method_and_arguments_that_are_no_arrays():
    class Encoder(nn.Module):
        def setup(self):
            self.drop = nn.Dropout(0.5)

        def encode(self, x, scale, train=False):
            return self.drop(x * scale, deterministic=not train), "text"

    class NnxEncoder(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5)

        def encode(self, x, scale, train=False):
            return self.drop(x * scale, deterministic=not train), "text"

    row = (("drop", "Dropout", 0.5, True),)
    assert dropjax.linen.mc_draws(Encoder(), {}, X, 2, method="encode", train=False) == row
    assert dropjax.linen.mc_draws(Encoder(), {}, X, scale=2, method=Encoder.encode, masks="shared") == row
    assert dropjax.nnx.mc_draws(NnxEncoder(), X, 2, method="encode", train=False) == row


def test_bad_calls():
    with pytest.raises(ValueError, match="mc_draws: masks must be one of"):
        dropjax.linen.mc_draws(nn.Dropout(0.5), {}, X, masks="all")
    with pytest.raises(ValueError, match="mc_draws: masks must be one of"):
        dropjax.nnx.mc_draws(nnx.Dropout(0.5), X, masks="all")
    for call in [dropjax.nnx.mc_draws, lambda model: dropjax.nnx.mc_view(model, jax.random.key(0))]:
        with pytest.raises(TypeError, match=r"must be an nnx.Module, got .* For Linen use dropjax.linen"):
            call(nn.Dropout(0.5))


class Guarded(nn.Module):
    """Attributes that it does not have run its own code."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=True)(x)

    def __getattr__(self, name):
        if name in ("attention_fn", "rate", "dropout_rate", "deterministic", "generator", "drop"):
            raise ZeroDivisionError(name)
        return super().__getattr__(name)

    @property
    def drop_rate(self):
        raise ZeroDivisionError


class NnxGuarded(nnx.Module):
    def __init__(self):
        self.layer = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)

    def __getattr__(self, name):
        if name in ("attention_fn", "rate", "dropout_rate", "generator", "drop"):
            raise ZeroDivisionError(name)
        return super().__getattribute__(name)

    @property
    def drop_rate(self):
        raise ZeroDivisionError


class InLinen(nn.Module):
    """A model of NNX, which holds one of Linen, inside Linen."""

    off: bool = True

    @nn.compact
    def __call__(self, x):
        options = {"dropout_rate": 0.5, "decode": False, "deterministic": True}
        x = bridge.to_linen(nnx.MultiHeadAttention, 2, 4, **options, name="theirs")(x)
        x = bridge.to_linen(InNnx, name="both")(x)
        return nn.Dropout(0.5, deterministic=self.off)(x)


class InNnx(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=rate, deterministic=True)
        self.attention = bridge.ToNNX(attention, rngs=rngs)
        self.attention.lazy_init(X)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.attention(x))


def test_no_code_of_a_module_runs_but_its_own_calls(key):
    linen = dropjax.linen
    assert (linen.mc_apply(Guarded(), {}, key, X) != X).any()
    assert len(linen.mc_draws(Guarded(), {}, X)) == 1
    with linen.replace_flax():
        np.testing.assert_array_equal(Guarded().apply({}, X), X)
    with linen.with_rates(0.5), linen.replace_flax():
        np.testing.assert_array_equal(Guarded().apply({}, X), X)
    assert (dropjax.nnx.mc_view(NnxGuarded(), key)(X) != X).any()
    assert len(dropjax.nnx.mc_draws(NnxGuarded(), X)) == 1
    np.testing.assert_array_equal(dropjax.nnx.replace_flax(NnxGuarded())(X), X)


@pytest.mark.filterwarnings("ignore:.*the dropout of:UserWarning")
def test_bridges_both_ways(key):
    """Everything runs; what the other framework holds stays as it is, also where its attention was drawn before."""
    linen = dropjax.linen
    attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=True)
    linen.mc_apply(attention, initialised(attention), key, X)
    dropjax.nnx.mc_view(InNnx(nnx.Rngs(0)), key)
    model = InLinen()
    variables = initialised(model)
    run = lambda off=True: InLinen(off).apply(variables, X, rngs={"dropout": key})  # noqa: E731
    evaluated = run()
    with linen.replace_flax():
        np.testing.assert_allclose(run(), evaluated, rtol=1e-6)
        ours = run(off=False)
    drawn = linen.mc_apply(model, variables, key, X)
    for y in [ours, drawn]:
        np.testing.assert_allclose(y, evaluated * 2 * (y != 0), rtol=1e-5)
    np.testing.assert_allclose(ours, drawn, rtol=1e-5)
    with linen.with_rates(1.0), linen.replace_flax():
        np.testing.assert_array_equal(run(off=False), 0)
    assert {("both/drop", "Dropout", 0.5, False), ("Dropout_0", "Dropout", 0.5, True)} <= set(
        linen.mc_draws(model, variables, X)
    )

    inner = InNnx(nnx.Rngs(0), 0.5)
    evaluated = inner(X)
    drawn = dropjax.nnx.mc_view(inner, key)(X)
    np.testing.assert_allclose(drawn, evaluated * 2 * (drawn != 0), rtol=1e-5)
    assert dropjax.nnx.mc_draws(inner, X)[0] == ("drop", "Dropout", 0.5, True)
    assert [row[1:] for row in dropjax.nnx.mc_draws(inner, X)[1:]] == [("MultiHeadDotProductAttention", 0.5, False)]
    np.testing.assert_allclose(dropjax.nnx.replace_flax(nnx.clone(inner))(X), evaluated, rtol=1e-6)
    np.testing.assert_allclose(inner(X), evaluated, rtol=1e-6)
