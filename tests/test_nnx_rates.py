"""Fields of NNX layers that are arrays: data under every transformation, and set for a whole model at once."""

import copy
import dataclasses
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax.typing import ArrayLike

import dropjax
import dropjax.nnx
from dropjax.nnx import Dropout, LayerDrop, Rate, TokenDropout, WeightDrop, set_rates
from dropjax.nnx.base import Stochastic
from tests.test_errors import raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
LAYERS = {n: c for n, c in vars(dropjax.nnx).items() if inspect.isclass(c) and issubclass(c, Stochastic)}
ROWS = [(n, f.name) for n, c in LAYERS.items() for f in dataclasses.fields(c) if f.type == ArrayLike]
LATER = [(n, f) for n, f in ROWS if f != "threshold" and not f.startswith("initial_")]  # used in training, at each call
every = pytest.mark.parametrize(("name", "field"), ROWS, ids=[f"{n}.{f}" for n, f in ROWS])
later = pytest.mark.parametrize(("name", "field"), LATER, ids=[f"{n}.{f}" for n, f in LATER])
KEY = jax.random.key(3)
RANKS = {"SpatialDropout1D": 3, "SpatialDropout3D": 5, "LayerDrop": 2, "WeightDrop": 2}


def build(name, field, value, rngs=None):
    """A layer whose field has a value; those that have no rate besides have 0.5."""
    rngs = nnx.Rngs(0) if rngs is None else rngs
    fields = {"rate": 0.5} if "rate" in LAYERS[name].__dataclass_fields__ else {}
    if "in_features" in LAYERS[name].__dataclass_fields__:
        fields |= {"in_features": 4, "out_features": 4}
    if name in ("LayerDrop", "WeightDrop"):
        fields["module"] = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(7))
    if name == "WeightDrop":
        fields["names"] = "kernel"
    return LAYERS[name](**{**fields, field: value}, rngs=rngs)


def call(layer, **options):
    name = type(layer).__name__
    x = jnp.linspace(1, 2, 4 * 2 ** (RANKS.get(name, 4) - 1)).reshape(*[2] * (RANKS.get(name, 4) - 1), 4)
    return layer(x, *[x - 1.5] * (name == "Standout"), **options)


def near(y, expected):
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_table_has_every_field_that_may_be_an_array():
    kinds = {field for _, field in LATER}
    assert kinds == {"rate", "stddev", "beta", "alpha", "targeted", "temperature"}
    first = {"initial_rate", "initial_log_alpha", "initial_log_sigma2", "threshold"}
    assert {field for _, field in ROWS} - kinds == first
    assert len(ROWS) > 20


@pytest.mark.slow
@every
def test_an_array_is_a_variable_and_a_number_is_no_state(name, field):
    layer, number = build(name, field, np.array(0.5)), build(name, field, 0.5)
    expected = call(number, rngs=KEY)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(number))}
    assert (field,) not in paths
    assert {path for path, _ in nnx.to_flat_state(nnx.state(layer))} == {*paths, (field,)}
    assert isinstance(getattr(layer, field), Rate)
    assert getattr(layer, field)[...].dtype == jnp.float32
    assert (2 * getattr(layer, field), 1 - getattr(layer, field), float(getattr(layer, field))) == (1, 0.5, 0.5)
    assert hash(nnx.graphdef(layer)) == hash(nnx.graphdef(build(name, field, jnp.float32(0.25))))
    for same in [
        layer,
        nnx.merge(*nnx.split(layer)),
        nnx.clone(layer),
        nnx.view(layer, deterministic=False),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ]:
        np.testing.assert_array_equal(call(same, rngs=KEY), expected)
        assert isinstance(getattr(same, field), Rate)
        assert float(getattr(same, field)) == 0.5
    abstract = nnx.eval_shape(lambda: build(name, field, jnp.float32(0.5)))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(abstract)))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(layer)))
    restored = nnx.merge(nnx.graphdef(abstract), nnx.state(layer))
    np.testing.assert_array_equal(call(restored, rngs=KEY), expected)
    for old in (build(name, field, 0.25), build(name, field, jnp.float32(0.25))):
        nnx.update(old, nnx.state(layer))
        assert float(getattr(old, field)) == 0.5
    nnx.update(layer, nnx.state(number))
    assert float(getattr(layer, field)) == 0.5
    assert "Rate" in nnx.tabulate(Call(layer))


class Call(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self):
        return call(self.layer)


@pytest.mark.parametrize(("name", "field"), sorted({*ROWS} - {*LATER}))
def test_what_a_layer_begins_with_may_be_traced(name, field):
    layer = nnx.jit(lambda value: build(name, field, value))(jnp.float32(0.25))
    number = build(name, field, 0.25)
    for mode in ({"rngs": KEY}, {"deterministic": True}):
        near(call(layer, **mode), call(number, **mode))
        near(nnx.jit(lambda layer: call(layer, **mode))(layer), call(number, **mode))  # noqa: B023
    assert float(getattr(layer, field)) == 0.25


@pytest.mark.slow
@later
def test_a_field_that_is_set_in_a_jitted_step(name, field):
    """Traced twice, since an array takes the place of a number, and no more; the value stays behind."""
    layer, traces = build(name, field, 0.5), []

    @nnx.jit
    def step(layer, value, key):
        traces.append(1)
        setattr(layer, field, value)
        return call(layer, rngs=key)

    for value in (0.25, 0.5, 0.75):
        y = step(layer, jnp.float32(value), KEY)
        near(y, call(build(name, field, value), rngs=KEY))
        assert float(getattr(layer, field)) == value
    setattr(layer, field, 0.25)  # a number takes the place of the array without changing the structure
    np.testing.assert_array_equal(step(layer, getattr(layer, field)[...], KEY), step(layer, jnp.float32(0.25), KEY))
    assert len(traces) == 2


@pytest.mark.slow
@later
def test_a_stack_has_a_value_for_each_layer(name, field):
    values = jnp.array([0.25, 0.75], jnp.float32)

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0, 0))
    def make(value, rngs):
        return build(name, field, value, rngs)

    layers = make(values, nnx.Rngs(0))
    np.testing.assert_array_equal(getattr(layers, field)[...], values)
    run = nnx.jit(nnx.vmap(lambda layer: call(layer, rngs=KEY)))
    for value in (values, jnp.float32(0.5)):
        setattr(layers, field, value)
        for y, one in zip(run(layers), jnp.broadcast_to(value, 2), strict=True):
            near(y, call(build(name, field, one), rngs=KEY))


class Block(nnx.Module):
    def __init__(self, rate, rngs):
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.linear(x))


X = jnp.ones((2, 4))


def block(rate=None):
    return Block(jnp.float32(0.5) if rate is None else rate, nnx.Rngs(0))


TRANSFORMATIONS = {
    "nnx.jit": lambda model: nnx.jit(lambda model, x: model(x))(model, X),
    "nnx.remat": lambda model: nnx.remat(lambda model, x: model(x))(model, X),
    "nnx.cond": lambda model: nnx.cond(True, lambda model, x: model(x), lambda model, x: x, model, X),
    "nnx.cached_partial": lambda model: nnx.cached_partial(nnx.jit(lambda model, x: model(x)), model)(X),
    "nnx.fori_loop": lambda model: nnx.fori_loop(0, 1, lambda i, c: (c[0], c[0](c[1])), (model, X))[1],
    "nnx.grad": lambda model: nnx.value_and_grad(lambda model: (model(X).sum(), model(X)), has_aux=True)(model)[0][1],
    "jax.jit": lambda model: jax.jit(lambda model, x: model(x))(model, X),
    "jax.jit of the state": lambda model: jax.jit(lambda s, x: nnx.merge(nnx.graphdef(model), s)(x))(
        nnx.state(model), X
    ),
    "jax.checkpoint": lambda model: jax.checkpoint(lambda model, x: model(x))(model, X),
}


@pytest.mark.parametrize("run", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_transformations(run):
    """Once with the value that the layer was built with, once with another."""
    for rate in (0.5, 1.0):
        ours, number = block(), block(rate)
        ours.drop.rate = jnp.float32(rate)
        near(run(ours), run(number))


def test_gradients_and_optimisers_leave_rates_alone():
    model = block()
    assert set(nnx.to_pure_dict(nnx.grad(lambda model: model(X).sum())(model))) == {"linear"}
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rate):
        set_rates(model, rate)
        optimizer.update(model, nnx.grad(lambda model: model(X).sum())(model))

    for rate in (0.1, 0.2):
        before = model.linear.kernel[...]
        step(model, optimizer, jnp.float32(rate))
        assert float(model.drop.rate) == np.float32(rate)
        assert (model.linear.kernel[...] != before).all()
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert (set(params), set(rest)) == ({"linear"}, {"drop"})


@pytest.mark.parametrize(("written", "read"), [(0.25, None), (None, 0.25), (None, None), (0.25, 0.5)])
def test_checkpoints(tmp_path, written, read):
    """With arrays on both sides the rate is restored; where one side has numbers, rates are left out."""
    both = written is None and read is None
    what = nnx.Not(nnx.RngState) if both else nnx.All(nnx.Not(nnx.RngState), nnx.Not(Rate))
    old = block(jnp.float32(0.25) if written is None else written)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(old, what))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "model",
            nnx.state(nnx.eval_shape(lambda: block(jnp.float32(0.5) if read is None else read)), what),
        )
    model = block(read)
    nnx.update(model, restored)
    np.testing.assert_array_equal(model.linear.kernel[...], old.linear.kernel[...])
    assert float(model.drop.rate) == (0.25 if both or read == 0.25 else 0.5)


class Model(nnx.Module):
    def __init__(self, rate=0.5):
        rngs = nnx.Rngs(0)
        linear = lambda: nnx.Linear(4, 4, rngs=rngs)  # noqa: E731
        self.blocks = nnx.List([block(rate), block(rate)])
        self.skip = LayerDrop(nnx.Sequential(linear(), Dropout(rate, rngs=rngs)), rate, rngs=rngs)
        self.weights = WeightDrop(linear(), rate, names="kernel", rngs=rngs)
        self.dense = dropjax.nnx.DropConnectDense(4, 4, rate, rngs=rngs)
        self.noise = dropjax.nnx.GaussianNoise(0.5, rngs=rngs)
        self.tokens = TokenDropout(num_keep=1)

    def __call__(self, x):
        for part in (*self.blocks, self.skip, self.weights, self.dense, self.noise):
            x = part(x)
        return x


PATHS = ["blocks/0/drop", "blocks/1/drop", "dense/drop", "skip", "skip/module/layers/1", "weights"]


def rates(model):
    old = {}
    set_rates(model, lambda path, rate: old.setdefault(path, rate))
    return {path: float(rate) for path, rate in sorted(old.items())}


def test_rates_of_a_model():
    model = Model()
    assert rates(model) == dict.fromkeys(PATHS, 0.5)
    assert set_rates(model, 0.25) is model
    assert rates(model) == dict.fromkeys(PATHS, 0.25)
    assert not list(nnx.to_flat_state(nnx.state(model, Rate)))
    set_rates(model, lambda path, rate: rate / 2 if path.startswith("blocks/0") else rate)
    assert rates(model) == {**dict.fromkeys(PATHS, 0.25), "blocks/0/drop": 0.125}
    set_rates(model, jnp.float32(0.5))
    assert rates(model) == dict.fromkeys(PATHS, 0.5)
    set_rates(model, lambda path, rate: rate / 2)
    assert rates(model) == dict.fromkeys(PATHS, 0.25)
    assert len(list(nnx.to_flat_state(nnx.state(model, Rate)))) == len(PATHS)
    assert (model.noise.stddev, model.tokens.rate) == (0.5, None)
    set_rates(model, model.skip.rate)
    assert model.weights.rate is not model.skip.rate


@pytest.mark.slow
def test_a_schedule_in_a_jitted_step():
    """Values of a number model in the same state; a number compiles again once, an array never."""
    for first, expected in [(0.5, 2), (jnp.float32(0), 1)]:
        model, traces = Model(first), []

        @nnx.jit
        def step(model, number, x):
            traces.append(1)  # noqa: B023
            return set_rates(model, 0.25 * number)(x)

        for i in range(4):
            oracle = set_rates(nnx.clone(model), 0.25 * i)
            near(step(model, jnp.float32(i), X), oracle(X))
            assert rates(model) == dict.fromkeys(PATHS, 0.25 * i)
        assert len(traces) == expected


def test_a_model_whose_layers_were_given_one_array_is_donated():
    rate = jnp.float32(0.5)
    model = nnx.List([Dropout(rate, rngs=nnx.Rngs(0)), Dropout(rate, rngs=nnx.Rngs(1))])
    step = nnx.jit(lambda model, x: model[1](model[0](x)), donate_argnums=0)
    for _ in range(2):
        step(model, X)
        near(rate, 0.5)
        set_rates(model, rate)


@later
def test_an_abstract_model_takes_an_abstract_rate(name, field):
    abstract = nnx.eval_shape(lambda: build(name, field, jnp.float32(0.5)))
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    setattr(abstract, field, shape)
    assert getattr(abstract, field).get_value() == shape


def test_a_schedule_in_plain_jit():
    traces = []
    graph, state = nnx.split(block(0.5))

    @jax.jit
    def step(state, rate, x):
        traces.append(1)
        model = set_rates(nnx.merge(graph, state), rate)
        return model(x), nnx.state(model)

    y, state = step(state, jnp.float32(0.5), X)
    model = block(0.5)
    near(y, model(X))
    nnx.update(model, state)  # what was a number is a variable now
    graph, state = nnx.split(model)
    for rate in (0.25, 1.0):
        y, state = step(state, jnp.float32(rate), X)
    near(y, X)
    assert len(traces) == 2

    drop = Dropout(0.5)
    keyed = jax.jit(lambda drop, rate, key, x: set_rates(drop, rate)(x, rngs=key))
    for rate in (0.25, 1.0):
        near(keyed(drop, jnp.float32(rate), KEY, X), dropjax.dropout(KEY, X, rate))
    assert drop.rate == 0.5
    near(jax.jit(lambda rate: set_rates(nnx.clone(drop), rate)(X, rngs=KEY))(jnp.float32(1)), 0 * X)
    for closed in (block(), block(0.5)):
        with pytest.raises(TraceContextError) as caught:
            jax.jit(lambda rate: set_rates(closed, rate)(X))(jnp.float32(0.5))  # noqa: B023
        assert "Pass the model as an argument, or set the rates of a copy" in caught.value.__notes__[0]


@pytest.mark.parametrize("first", [None, jnp.array([0.0, 0.1, 0.2], jnp.float32)], ids=["number", "array"])
def test_a_stack_for_a_scan(first):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(None if first is None else 0, 0))
    def make(rate, rngs):
        return Block(0.5 if rate is None else rate, rngs)

    layers = make(first, nnx.Rngs(0))
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    near(run(X, set_rates(layers, jnp.float32(1))), X)
    assert layers.drop.rate.shape == (3,)
    kept = run(X, set_rates(layers, jnp.array([1, 1, 0], jnp.float32)))
    assert (kept != X).all()
    inside = nnx.scan(lambda x, layer, rate: set_rates(layer, rate)(x), in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    near(inside(X, layers, jnp.ones(3)), X)
    np.testing.assert_array_equal(layers.drop.rate[...], jnp.ones(3))


def test_a_stack_whose_layers_have_no_stream():
    """What is beside them shows how many they are."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        linear = nnx.Linear(4, 4, rngs=rngs)
        return nnx.Dict(skip=LayerDrop(nnx.Sequential(linear), 0.5), drop=Dropout(0.5), linear=linear)

    layers, keys = make(nnx.Rngs(0)), jax.random.split(KEY, 3)
    run = nnx.scan(
        lambda x, layer, key: layer["skip"](layer["drop"](x, rngs=key) + 1, rngs=key),
        in_axes=(nnx.Carry, 0, 0),
        out_axes=nnx.Carry,
    )
    near(run(X, set_rates(layers, jnp.float32(1)), keys), X)
    near(run(X, set_rates(layers, lambda path, rate: jnp.float32(path == "skip")), keys), X + 3)
    assert layers["skip"].rate.shape == layers["drop"].rate.shape == (3,)


def test_layers_of_flax_take_what_is_known():
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.Dropout(0.5), nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, rngs=rngs), TokenDropout(0.5)])
    for rate in (0.25, jnp.float32(0.125), np.float32(0.75)):
        set_rates(model, rate)
        assert [model[0].rate, model[1].dropout_rate, model[2].rate] == [float(rate)] * 3
    with pytest.raises(TypeError, match=r"set_rates: rate must be a number for the Dropout at '0', got float32\[\]\. "
                       r"Put ours into the model first, replace_flax\(model\)\."):  # fmt: skip
        jax.jit(lambda rate: set_rates(nnx.clone(model), rate))(jnp.float32(0.5))
    for one in (model[1], model[2]):
        with pytest.raises(TypeError, match=r"number for the .* at '', got float32.* leave it out by a function"):
            jax.jit(lambda rate: set_rates(nnx.clone(one), rate) and rate)(jnp.float32(0.5))  # noqa: B023
    ours = dropjax.nnx.replace_flax(nnx.Dropout(0.5))
    near(jax.jit(lambda layer, rate: set_rates(layer, rate)(X, rngs=KEY))(ours, jnp.float32(1)), 0 * X)


def test_errors_change_nothing():
    model = Model()
    raises(ValueError, "set_rates: rate must be in [0, 1], got 50.0. For a percentage, pass 0.5.", set_rates, model, 50)
    raises(ValueError, "got 1.5.", set_rates, model, np.array([0.5, 1.5]))
    raises(ValueError, "got 2.0.", set_rates, model, lambda path, rate: 2 if path == PATHS[-1] else 0.1)
    raises(TypeError, "set_rates: rate must be a number or a float array, got None", set_rates, model, None)
    raises(TypeError, "got None", set_rates, model, lambda path, rate: None)
    assert rates(model) == dict.fromkeys(PATHS, 0.5)
    message = "set_rates: model must have a layer with a rate, got none."
    raises(ValueError, message, set_rates, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.5)
    raises(ValueError, message, set_rates, TokenDropout(num_keep=3), 0.5)
