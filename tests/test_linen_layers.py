"""What holds for every Linen layer: what a call takes, what it is built with, and that it is a value."""

import copy
import dataclasses
import functools
import inspect
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dropjax.linen
from dropjax._layers import declared
from tests.linen_layers import KEY, LAYERS, RATED, build, deterministic, inputs, rate_of, variables
from tests.test_errors import raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
every = pytest.mark.parametrize("name", LAYERS)
rated = pytest.mark.parametrize("name", RATED)


def test_every_layer_is_tried():
    assert set(LAYERS) == {name for name, layer in vars(dropjax.linen).items() if isinstance(layer, type)}


@every
def test_a_call_names_every_argument(name):
    """Wrappers hand theirs to what they wrap, which may take any."""
    call = inspect.signature(getattr(dropjax.linen, name).__call__).parameters.values()
    assert any(p.kind == p.VAR_KEYWORD for p in call) == (name in ("LayerDrop", "WeightDrop"))


@every
def test_unknown_arguments_are_errors_in_every_mode(name):
    args = inputs(name)
    params = variables(build(name), *args)
    for rate in (0.0, 0.5, 1.0) if name in RATED and name not in ("GaussianDropout", "TokenDropout") else (0.5,):
        layer = build(name, rate)
        for training in (True, False):
            mode = deterministic(layer, not training)
            for wrong in ({"training": True}, {"determinstic": False}, {"nonsense": 3}):
                with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
                    layer.apply(params, *args, rngs={"dropout": KEY}, **mode, **wrong)
            with pytest.raises(TypeError, match=r"positional argument|multiple values"):
                layer.apply(params, *args, None, KEY, 3, 4, rngs={"dropout": KEY}, **mode)
    with pytest.raises(TypeError, match="unexpected keyword argument 'training'"):
        layer.init({"params": KEY, "dropout": KEY}, *args, training=True, **mode)


@pytest.mark.parametrize("name", [name for name in LAYERS if "start" in inspect.signature(
    getattr(dropjax.linen, name).__call__).parameters])  # fmt: skip
def test_start_is_checked_in_every_mode(name):
    layer, args = build(name), inputs(name)
    params = variables(layer, *args)
    for training in (True, False):
        mode = deterministic(layer, not training)
        for start, kind, message in [
            (3, TypeError, "start must be a mapping"),
            ({9: 0}, ValueError, "start must be in"),
            ({0: -1}, ValueError, "start[0] must not be negative"),
            ({0: 1.5}, TypeError, "start[0] must be an integer"),
        ]:
            with pytest.raises(kind, match=re.escape(message)):
                layer.apply(params, *args, rng=KEY, start=start, **mode)
        layer.apply(params, *args, rng=KEY, start={2 if name == "TargetedDropout" else 0: 2}, **mode)


def test_indices_of_embeddings_are_checked_in_every_mode():
    layer, x = build("EmbeddingDropout"), jnp.ones((2, 3, 4))
    for training in (True, False):
        for indices, kind, message in [
            (jnp.ones((2, 3)), TypeError, "indices must be an integer array"),
            (jnp.ones((3, 2), int), ValueError, "indices must have the first dimensions of x"),
            (-jnp.ones((2, 3), int), ValueError, "indices must not be negative"),
        ]:
            with pytest.raises(kind, match=f"embedding_dropout: {message}"):
                layer.apply({}, x, not training, KEY, indices=indices)
        layer.apply({}, x, not training, KEY, indices=jnp.ones((2, 3), int))


@rated
def test_rates_are_checked_when_a_layer_is_built(name):
    field, high = (
        rate_of(name),
        {"GaussianNoise": "inf)", "GaussianDropout": "1)", "TokenDropout": "1)"}.get(name, "1]"),
    )
    bad = [-0.1, np.nan, -np.inf, np.float32(-1), np.array([[0.5], [-1]])]
    bad += [] if name == "GaussianNoise" else [50, 1.5, np.float64(2), np.array(7), np.int64(3)]
    bad += [1.0] if high == "1)" else []
    for value in bad:
        wrong = float(np.asarray(value).flat[-1])
        raises(ValueError, f"{name}: {field} must be in [0, {high}, got {wrong}", build, name, value)
    none = [None] * (name != "TokenDropout")
    for value in ["half", [0.5], (0.5,), True, 1j, object(), np.array("a"), np.array(True), jnp.array(1j), KEY, *none]:
        raises(TypeError, f"{name}: {field} must be a number or a float array, got ", build, name, value)
    for value in [0, 0.5, np.float32(0.25), np.full((2, 1), 0.5), jnp.float32(7), jnp.bfloat16(0.5)]:
        assert getattr(build(name, value), field) is value  # arrays of JAX are checked at the call
    raises(ValueError, f"{name}: {field} must be in [0, {high}, got -inf", build, name, -(10**400))
    jax.jit(lambda rate: build(name, rate) and rate)(0.5)
    assert getattr(build(name).clone(**{field: 0.25}), field) == 0.25
    raises(ValueError, f"{name}: {field} must be in ", build(name).clone, **{field: -3.0})


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("Dropout", "generator", "philox", "generator must be one of ('mix', 'threefry'), got 'philox' (str)."),
        ("SpatialDropout", "generator", None, "generator must be one of ('mix', 'threefry'), got None"),
        ("DropPath", "mode", "rows", "mode must be one of ('row', 'batch'), got 'rows' (str)."),
        ("MaskFeature", "mode", "cols", "mode must be one of ('all', 'row', 'col'), got 'cols' (str)."),
        ("MaskFeature", "fill_value", np.nan, "fill_value must be in (-inf, inf), got nan."),
        ("DropBlock", "normalize", "none", "normalize must be one of ('expected', 'example', 'batch'), got 'none'"),
        ("TargetedDropout", "kind", "row", "kind must be one of ('weight', 'unit'), got 'row' (str)."),
        ("TargetedDropout", "targeted", 50, "targeted must be in [0, 1], got 50.0. For a percentage, pass 0.5."),
        ("Standout", "alpha", np.inf, "alpha must be in (-inf, inf), got inf."),
        ("Standout", "beta", np.nan, "beta must be in (-inf, inf), got nan."),
        ("ConcreteDropout", "initial_rate", 1.0, "initial_rate must be in (0, 1), got 1.0."),
        ("ConcreteDropout", "temperature", 0.0, "temperature must be in (0, 1], got 0.0."),
        ("VariationalGaussianDropout", "initial_log_alpha", np.inf, "initial_log_alpha must be in (-inf, inf), got"),
        ("VariationalDense", "initial_log_alpha", np.nan, "initial_log_alpha must be in (-inf, inf), got nan."),
        ("VariationalDense", "per", "row", "per must be one of ('weight', 'unit', 'layer'), got 'row' (str)."),
        ("SparseVariationalDense", "initial_log_sigma2", np.inf, "initial_log_sigma2 must be in (-inf, inf), got inf."),
        ("SparseVariationalDense", "threshold", np.nan, "threshold must be in [-inf, inf], got nan."),
        ("Masksembles", "scale", 0.5, "scale must be in [1, 100], got 0.5."),
        ("Masksembles", "num_masks", 0, "num_masks must be at least 1, got 0."),
        ("TokenDropout", "num_keep", 3, "one of rate and num_keep must be given, got 0.5 and 3."),
        ("TokenDropout", "rate", None, "one of rate and num_keep must be given, got None (NoneType) and None"),
    ],
)  # fmt: skip
def test_other_fields_are_checked_when_a_layer_is_built(name, field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build(name, **{field: value})
    assert str(caught.value).lower().startswith(f"{name}: ".lower()) or name == "TokenDropout"


@pytest.mark.parametrize("name", [name for name in LAYERS if any(
    field.type is bool for field in dataclasses.fields(getattr(dropjax.linen, name)))])  # fmt: skip
def test_flags_are_checked_when_a_layer_is_built(name):
    for field in dataclasses.fields(getattr(dropjax.linen, name)):
        if field.type is bool:
            raises(
                TypeError, f"{name}: {field.name} must be True or False, got 'no'", build, name, **{field.name: "no"}
            )


@every
def test_integers_and_modules_are_checked_when_a_layer_is_built(name):
    for field, kind in declared(getattr(dropjax.linen, name)).items():
        if kind in (int, int | None):
            raises(TypeError, f"{name}: {field} must be an integer, got 1.5.", build, name, **{field: 1.5})
        if field.endswith("features") or field.startswith("num_"):
            raises(ValueError, f"{name}: {field} must be at least ", build, name, **{field: -1})
        if kind is float:
            raises(TypeError, f"{name}: {field} must be a number, got ", build, name, **{field: jnp.float32(1)})
        if kind is nn.Module:
            for wrong in (nn.Dense, lambda x: x, None):  # a class would take the inputs for its fields
                raises(TypeError, f"{name}: {field} must be a flax.linen.Module, got ", build, name, **{field: wrong})


def test_fields_of_a_subclass_are_its_own():
    class Gained(dropjax.linen.Dropout):
        gain: float = 7.0
        tag: str = "x"
        flag: bool = None

    assert Gained(0.5, gain=9, tag="y").gain == 9
    raises(ValueError, "Gained: rate must be in [0, 1], got 2.0", Gained, 2)


ARRAYS = {
    "jax": lambda: jnp.full((2, 1, 1), 0.5),
    "jax scalar": lambda: jnp.float32(0.5),
    "numpy": lambda: np.full((2, 1, 1), 0.5, np.float32),
    "numpy scalar": lambda: np.array(0.5, np.float32),
}


@rated
def test_layers_are_values_whatever_array_their_rate_is(name):
    for make in ARRAYS.values():
        layer, same, other = build(name, make()), build(name, make()), build(name, make() / 2)
        assert layer == same
        assert hash(layer) == hash(same)
        assert layer != other
        assert hash(layer) != hash(other)
        assert layer != build(name, 0.5)
        assert copy.deepcopy(layer) == copy.copy(layer) == layer.clone() == dataclasses.replace(layer) == layer
        if name not in ("LayerDrop", "WeightDrop", "DropConnectDense"):  # Flax's initialisers are not pickled
            assert pickle.loads(pickle.dumps(layer)) == layer
    count = jax.jit(lambda layer: len(seen.append(layer) or seen), static_argnums=0)
    seen = []
    assert count(build(name, jnp.float32(0.5))) == count(build(name, jnp.float32(0.5))) == len(seen) == 1
    assert count(build(name, jnp.float32(0.25))) == 2


@every
def test_layers_are_hashed_with_lists_and_mappings(name):
    fields = {field.name for field in dataclasses.fields(getattr(dropjax.linen, name))}
    given = {"broadcast_dims": [0, 1], "batch_axes": [0], "block_size": [3, 3], "shape": [3], "names": ["kernel", "a"]}
    given = {name: value for name, value in given.items() if name in fields}
    if "sharded_dims" in fields:
        given["sharded_dims"] = {1: ["b", "c"], 0: "a", None: "d"}
    layer = build(name, **given)
    assert layer == build(name, **given)
    assert hash(layer) == hash(copy.deepcopy(layer)) == hash(layer.clone())
    assert layer == build(
        name, **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )


class Table(nn.Module):
    table: jax.Array
    layers: tuple | list = ()


@pytest.mark.parametrize("name", ["LayerDrop", "WeightDrop"])
def test_wrappers_are_values_whatever_they_wrap(name):
    """Arrays, lists and mappings in the fields of a module, and of the modules in it."""

    def make(value):
        table = Table(jnp.full(3, value), [nn.Dense(2), {"a": np.full(2, value)}])
        return build(name, module=nn.Sequential([nn.Dense(3), Table(np.zeros(2), (table,))]))

    layer = make(0.5)
    assert layer == make(0.5) == copy.deepcopy(layer) == layer.clone()
    assert layer != make(0.25)
    assert hash(layer) == hash(make(0.5))
    assert hash(layer) != hash(make(0.25))


class Holder(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, *args):
        return self.layer(*args)


LIFTS = [functools.cache(lift) for lift in (nn.jit, nn.remat)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dropout", "GaussianNoise", "DropConnectDense", "LayerDrop", "WeightDrop"])
def test_rates_in_arrays_under_lifted_transforms(name):
    """Of the layer itself and of a module that holds it; each trace has its own rate, not that of the first."""
    args = inputs(name)
    params = variables(build(name), *args)
    held_params = {kind: {"layer": of} for kind, of in params.items()}

    def run(lift, rate):
        layer = build(name, rate, deterministic=False)
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name not in ("parent", "name")}
        own = lift(type(layer))(**fields).apply(params, *args, rngs={"dropout": KEY})
        return own, lift(Holder)(layer).apply(held_params, *args, rngs={"dropout": KEY})

    for lift in LIFTS:
        step = jax.jit(functools.partial(run, lift))
        for value in (0.25, 0.75):
            expected = run(lift, value)
            for found in (
                run(lift, jnp.float32(value)),
                run(lift, np.array(value, np.float32)),
                step(jnp.float32(value)),
            ):
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@every
def test_layers_in_tables_and_copies(name):
    layer, args = build(name), inputs(name)
    mode = deterministic(layer, False)
    assert name in layer.tabulate({"params": KEY, "dropout": KEY}, *args, **mode)
    params = variables(layer, *args)
    expected = layer.apply(params, *args, rngs={"dropout": KEY}, **mode)
    for same in (copy.deepcopy(layer), layer.clone(), layer.copy(), dataclasses.replace(layer)):
        found = same.apply(params, *args, rngs={"dropout": KEY}, **mode)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


SHARDED = [name for name in LAYERS if hasattr(getattr(dropjax.linen, name), "sharded_dims")]
OF_WEIGHTS = ("DropConnect", "DropConnectDense", "TargetedDropout", "WeightDrop")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_one_model_serves_whole_arrays_and_shards(name):
    """`sharded_dims` counts inside shard_map alone, where the masks are slices of those of the whole."""
    args, dims = tuple(jnp.concatenate([x, x + 1]) for x in inputs(name)), {0: "data"}
    if name in OF_WEIGHTS:  # each device has all of them
        dims = (lambda path: {None: "data"}) if name == "WeightDrop" else {None: "data"}
    whole, sharded = build(name), build(name, sharded_dims=dims)
    params = variables(sharded, *args)
    jax.tree.map(np.testing.assert_array_equal, params, variables(whole, *args))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P() if name in OF_WEIGHTS else P("data")

    def run(layer, *args, deterministic=False):
        return layer.apply(params, *args, deterministic=deterministic, rng=KEY)

    expected = run(whole, *args)
    step = functools.partial(run, sharded)
    piece = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with jax.set_mesh(mesh):
        automatic = jax.jit(step)(*args)
    for found in (step(*args), jax.jit(piece)(*args), automatic):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    jax.tree.map(np.testing.assert_array_equal, step(*args, deterministic=True), run(whole, *args, deterministic=True))


def test_the_axes_of_a_pmap_and_of_a_mistake():
    x, layer = jnp.ones((4, 2, 8)), dropjax.linen.Dropout(0.5, deterministic=False, sharded_dims={0: "data"})
    expected = dropjax.dropout(KEY, x.reshape(8, 8), 0.5)
    run = lambda x: layer.apply({}, x, rng=KEY)  # noqa: E731
    np.testing.assert_array_equal(jax.pmap(run, axis_name="data")(x).reshape(8, 8), expected)
    np.testing.assert_array_equal(run(x.reshape(8, 8)), expected)
    with pytest.raises(ValueError, match="dropout: sharded_dims must be given inside pmap"):
        jax.pmap(run, axis_name="date")(x)
    mesh = jax.make_mesh((4,), ("date",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="dropout: x must be accounted for over mesh axis 'date'"):
        jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("date"), out_specs=P("date")))(x.reshape(8, 8))
    for wrong in (3, {0: 3}):
        with pytest.raises(TypeError, match="dropout: sharded_dims must "):
            layer.clone(sharded_dims=wrong).apply({}, x, rng=KEY)
