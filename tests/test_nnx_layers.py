"""NNX layers: what their calls take, what they are built with, and mesh axes that are not manual."""

import copy
import functools
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax.sharding import PartitionSpec as P

import dropjax
import dropjax.nnx
from dropjax._layers import declared
from dropjax.nnx.base import Stochastic
from tests.test_errors import raises
from tests.test_nnx_rates import KEY, LAYERS, ROWS
from tests.test_nnx_rates import build as build_with

pytestmark = pytest.mark.usefixtures("quick_compiler")
SIZES = {
    "LayerDrop": lambda: (nnx.Linear(4, 4, rngs=nnx.Rngs(1)), 0.5),
    "WeightDrop": lambda: (nnx.Linear(4, 4, rngs=nnx.Rngs(1)), 0.5),
    "DropConnectDense": lambda: (4, 4, 0.5),
    "VariationalDense": lambda: (4, 4),
    "SparseVariationalDense": lambda: (4, 4),
    "Masksembles": lambda: (4, 2, 2.0),
    "ConcreteDropout": lambda: (),
    "VariationalGaussianDropout": lambda: (),
    "Standout": lambda: (),
}
"""What a layer is built with that takes more, or less, than a rate."""
ALL = {n: c for n, c in vars(dropjax.nnx).items() if inspect.isclass(c) and issubclass(c, nnx.Module)}
every = pytest.mark.parametrize("name", ALL)


def build(name, *args, **fields):
    args = args or SIZES.get(name, lambda: (0.5,))()
    fields = {"names": "kernel", **fields} if name == "WeightDrop" else fields
    return ALL[name](*args, **{"rngs": nnx.Rngs(0), **fields})


def inputs(name):
    rank = {"SpatialDropout1D": 3, "SpatialDropout2D": 4, "SpatialDropout3D": 5, "DropBlock": 4, "DropHead": 4}.get(
        name, 3
    )
    x = jnp.linspace(1, 2, 2 ** (rank - 1) * 4).reshape(*[2] * (rank - 1), 4)
    return (x, x - 1.5) if name == "Standout" else (x,)


@every
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_keyword_that_is_not_named_is_an_error(name, rate, deterministic):
    """In training and evaluation, at the rates at which nothing is dropped or run, too."""
    layer = build(name)
    if "rate" in getattr(type(layer), "__dataclass_fields__", {}) and (name, rate) not in [
        ("GaussianDropout", 1.0),
        ("TokenDropout", 1.0),
    ]:
        layer.rate = rate
    if isinstance(layer, Stochastic):
        layer.deterministic = deterministic
    for wrong in ("training", "determinstic", "nonsense", "rng", "indices"):
        if (name, wrong) == ("EmbeddingDropout", "indices"):
            continue
        with pytest.raises(TypeError, match=rf"\b{wrong}\b"):
            layer(*inputs(name), **{wrong: 3})
    kinds = {p.kind for p in inspect.signature(ALL[name].__call__).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds or name in ("LayerDrop", "WeightDrop")
    with pytest.raises(TypeError, match="nonsense"):
        build(name, nonsense=3)


def test_embeddings_take_their_indices(key):
    table, words = jnp.ones((7, 4)), jnp.array([[1, 1], [2, 6]])
    layer = dropjax.nnx.EmbeddingDropout(0.5)
    np.testing.assert_array_equal(layer(table[words], rngs=key, indices=words), layer(table, rngs=key)[words])


BAD = [
    (50, ValueError, "got 50.0. For a percentage, pass 0.5."),
    (-0.1, ValueError, "got -0.1."),
    (np.nan, ValueError, "got nan."),
    (np.float32(1.5), ValueError, "got 1.5."),
    (np.array([0.5, 7.0]), ValueError, "got 7.0."),
    (None, TypeError, "must be a number or a float array, got None"),
    ("half", TypeError, "must be a number or a float array, got 'half' (str)."),
    ([0.5], TypeError, "must be a number or a float array, got [0.5] (list). Convert lists with jnp.asarray."),
    (True, TypeError, "must be a number or a float array, got True (bool)."),
    (jnp.bool_(True), TypeError, "must be a number or a float array, got bool[]."),
    (jax.random.key(0), TypeError, "must be a number or a float array, got key<fry>[]."),
    (-(10**400), ValueError, "got -inf."),
]
RANGES = {"GaussianNoise.stddev": (-0.1, -(10**400)), "Standout.alpha": (np.nan,), "Standout.beta": (np.nan,)}
RANGES |= {f"{n}.{f}": (np.nan,) for n, f in ROWS if f == "threshold" or f.startswith("initial_log")}
TAKES_NONE = "TokenDropout"


@pytest.mark.parametrize(("name", "field"), [*ROWS, ("DropConnectDense", "rate"), ("TokenDropout", "rate")])
def test_bad_numbers_do_not_pass_construction(name, field):
    for value, kind, message in BAD:
        unbounded = RANGES.get(f"{name}.{field}")
        if unbounded and kind is ValueError and not any(value is bad for bad in unbounded):
            continue
        if name == TAKES_NONE and (value is None or np.ndim(value)):
            continue
        args = list(SIZES.get(name, lambda: (0.5,))())
        if field == "rate":
            args[-1] = value
        fields = {} if field == "rate" else {field: value}
        if field in ("stddev", "beta") and name != "Standout":
            args, fields = [value], {}
        with pytest.raises(kind) as caught:
            build(name, *args, **fields)
        assert str(caught.value).startswith(f"{name}: {field} must be ")
        assert message in str(caught.value)
        if name != "DropConnectDense":
            layer = build(name)
            with pytest.raises(kind):
                setattr(layer, field, value)
            np.testing.assert_array_equal(getattr(layer, field), getattr(build(name), field))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(n, "generator", "philox") for n, c in LAYERS.items() if "generator" in c.__dataclass_fields__]
    + [("DropPath", "mode", "rows"), ("MaskFeature", "mode", "column"), ("DropBlock", "normalize", "mean")]
    + [
        ("MaskFeature", "mode", ["col"]),
        ("TargetedDropout", "kind", "units"),
        ("VariationalDense", "per", "row"),
        ("SparseVariationalDense", "per", 3),
    ],
)
def test_bad_words_do_not_pass_construction(name, field, value):
    with pytest.raises(ValueError, match=f"^{name}: {field} must be one of .*, got {re.escape(repr(value))}"):
        build(name, **{field: value})


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, c in LAYERS.items() for f, kind in declared(c).items() if kind is bool]
)
def test_bad_flags_do_not_pass_construction(name, field):
    raises(TypeError, f"{name}: {field} must be True or False, got 'no' (str).", build, name, **{field: "no"})
    raises(TypeError, f"{name}: {field} must be True or False, got 1.", build, name, **{field: 1})


@pytest.mark.parametrize("name", LAYERS)
def test_bad_integers_do_not_pass_construction(name):
    for field, kind in declared(LAYERS[name]).items():
        if kind in (int, int | None):
            for value in (1.5, "last", True):
                raises(TypeError, f"{name}: {field} must be an integer, got ", build_with, name, field, value)
            if not field.endswith("_axis"):
                raises(ValueError, f"{name}: {field} must be at least 0, got -1.", build_with, name, field, -1)


def test_what_is_part_of_the_program_is_no_array():
    for value in (jnp.float32(1), np.array(1.0)):
        raises(TypeError, "MaskFeature: fill_value must be a number, got ", build, "MaskFeature", fill_value=value)


STARTS = [(3, TypeError, "start must be a mapping"), ({9: 0}, ValueError, "start must be in")]
STARTS += [({0: -1}, ValueError, r"start\[0\] must not be"), ({0: 0.5}, TypeError, r"start\[0\] must be an integer")]


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if "start" in inspect.signature(c.__call__).parameters])
def test_start_is_checked_in_every_mode(name):
    layer = build(name)
    for deterministic in (True, False):
        for start, kind, message in STARTS:
            with pytest.raises(kind, match=message):
                layer(*inputs(name), rngs=KEY, deterministic=deterministic, start=start)
        layer(*inputs(name), rngs=KEY, deterministic=deterministic, start={2 if name == "TargetedDropout" else 0: 2})


def test_indices_are_checked_in_every_mode():
    layer, x = build("EmbeddingDropout"), jnp.ones((2, 3, 4))
    for deterministic in (True, False):
        for indices, kind, message in [
            (jnp.ones((2, 3)), TypeError, "indices must be an integer array"),
            (jnp.ones((3, 2), int), ValueError, "indices must have the first dimensions of x"),
            (-jnp.ones((2, 3), int), ValueError, "indices must not be negative"),
        ]:
            with pytest.raises(kind, match=f"embedding_dropout: {message}"):
                layer(x, rngs=KEY, deterministic=deterministic, indices=indices)


def test_fields_of_a_subclass_are_its_own():
    @nnx.dataclass(eq=False)
    class Gained(dropjax.nnx.Dropout):
        gain: float = 7.0
        tag: str = "x"
        flag: bool = None

    assert Gained(0.5, gain=9, tag="y").gain == 9
    raises(ValueError, "Gained: rate must be in [0, 1], got 2.0", Gained, 2)


def test_token_dropout_is_checked_when_it_is_built():
    raises(
        ValueError, "TokenDropout: rate must be in [0, 1), got 1.0. To keep only the prefix", build, "TokenDropout", 1
    )
    raises(ValueError, "one of rate and num_keep must be given, got None", dropjax.nnx.TokenDropout)
    raises(ValueError, "one of rate and num_keep must be given, got 0.5 and 3.", build, "TokenDropout", num_keep=3)
    raises(ValueError, "TokenDropout: num_keep must be at least 0, got -1.", dropjax.nnx.TokenDropout, num_keep=-1)
    raises(TypeError, "num_prefix_tokens must be an integer", build, "TokenDropout", num_prefix_tokens=0.5)
    raises(TypeError, "rate must be one number that is known", build, "TokenDropout", jnp.array([0.5, 0.2]))
    with pytest.raises(TypeError, match=r"TokenDropout: rate must be one number .*, got float32\[\]\. Pass num_keep"):
        jax.jit(lambda rate: build("TokenDropout", rate).rate)(0.5)
    x = jnp.ones((2, 10, 1))
    for rate in (np.array(0.9), jnp.float32(0.9), np.float32(0.9), 0.9):  # a number of the program, also under jit
        layer = build("TokenDropout", rate)
        assert nnx.jit(lambda layer, x: layer(x).tokens)(layer, x).shape == (2, 1, 1)


@every
def test_layers_are_pickled_copied_and_hashed(name):
    layer = build(name)
    options = {} if name == "Masksembles" else {"rngs": KEY}
    expected = jax.tree.leaves(layer(*inputs(name), **options))
    for same in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), nnx.clone(layer)):
        assert isinstance(hash(same), int)
        assert same != layer  # modules are compared as Flax's are, by identity
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(same(*inputs(name), **options)), expected)
    assert hash(nnx.graphdef(layer)) == hash(nnx.graphdef(nnx.clone(layer)))
    assert nnx.graphdef(layer) == nnx.graphdef(nnx.clone(layer))


def test_lists_are_tuples_in_fields_alone():
    class Ours(dropjax.nnx.Dropout):
        def __init__(self):
            super().__init__(0.5, broadcast_dims=[0])
            self.items = [1, 2]

    layer = Ours()
    assert (layer.broadcast_dims, layer.items) == ((0,), [1, 2])
    layer.broadcast_dims = [1]
    assert layer.broadcast_dims == (1,)
    layer.rate = nnx.data(jnp.float32(0.25))  # what Flax's own error advises
    assert layer.rate == 0.25


def test_initialisers_make_the_parameters_and_are_not_kept():
    for name in ("VariationalDense", "SparseVariationalDense"):
        layer = build(name, kernel_init=nnx.initializers.constant(2.0), bias_init=nnx.initializers.ones)
        assert (layer.kernel[...] == 2).all()
        assert (layer.bias[...] == 1).all()
        assert not {"kernel_init", "bias_init"} & set(vars(layer))


def test_drop_connect_dense_multiplies_as_linear_does():
    """What else `nnx.Linear` takes counts in the call, too."""
    x, calls = inputs("DropConnectDense")[0], []

    def dot_general(*args, **options):
        calls.append(options)
        return jax.lax.dot_general(*args, **options)

    for options in [{"preferred_element_type": jnp.bfloat16, "use_bias": False}, {"dot_general": dot_general}]:
        ours, flax = build("DropConnectDense", **options), nnx.Linear(4, 4, rngs=nnx.Rngs(0), **options)
        y, expected = ours(x, deterministic=True), flax(x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
    assert len(calls) == 2


CUT = [n for n, c in ALL.items() if "sharded_dims" in inspect.signature(c).parameters]


@pytest.mark.parametrize("name", CUT)
def test_axes_that_are_not_manual_are_ignored(name):
    options = {"sharded_dims": {0: "data", 1: ("model", "data")}}
    x = inputs(name)
    expected = build(name)(*x, rngs=KEY)
    for cut in [options, {"sharded_dims": lambda path: options["sharded_dims"]}][: 1 + (name == "WeightDrop")]:
        layer = build(name, **cut)
        jax.tree.map(np.testing.assert_array_equal, layer(*x, rngs=KEY), expected)
        y = jax.jit(lambda layer, *x: layer(*x, rngs=KEY))(layer, *x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), y, expected)


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


ROWS_OF_X = {
    "Dropout": 0,
    "DropPath": 0,
    "Standout": 0,
    "VariationalDense": 0,
    "TokenDropout": 0,
    "EmbeddingDropout": 0,
}


@pytest.mark.parametrize("name", ROWS_OF_X)
def test_one_layer_for_a_plain_call_and_for_shard_map(name):
    layer, x = build(name, sharded_dims={0: "data"}), inputs(name)
    expected = layer(*x, rngs=KEY)
    run = jax.shard_map(lambda *x: layer(*x, rngs=KEY), mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, jax.jit(run)(*x), expected)
    automatic = jax.sharding.NamedSharding(mesh(), P("data"))
    jax.tree.map(near, jax.jit(lambda *x: layer(*x, rngs=KEY), in_shardings=automatic)(*x), expected)
    wrong = build(name, sharded_dims={0: "dta"})
    with pytest.raises(ValueError, match="must be accounted for over mesh axis 'data'"):
        jax.shard_map(lambda *x: wrong(*x, rngs=KEY), mesh=mesh(), in_specs=P("data"), out_specs=P("data"))(*x)
    if name == "Dropout":
        run = jax.pmap(lambda x: layer(x, rngs=KEY), axis_name="data", devices=jax.devices()[:2])
        near(run(x[0][:, None]).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", ["WeightDrop", "DropConnectDense"])
def test_one_wrapper_for_a_plain_call_and_for_shard_map(name):
    """Kernels that are cut: each shard multiplies its features by its rows of the kernel."""
    layer, x = build(name, sharded_dims={0: "data"}), inputs(name)[0]
    expected = layer(x, rngs=KEY)
    graph, state = nnx.split(layer)
    specs = jax.tree.map(lambda leaf: P("data") if leaf.shape == (4, 4) else P(), state)

    def run(state, x):
        return jax.lax.psum(nnx.merge(graph, state)(x, rngs=KEY), "data")

    cut = jax.shard_map(run, mesh=mesh(), in_specs=(specs, P(None, None, "data")), out_specs=P())
    np.testing.assert_allclose(jax.jit(cut)(state, x), expected, rtol=1e-5, atol=1e-5)  # biases are 0


X = jnp.ones((1, 32))


def transformed(how, layer):
    """Two calls of a transformed function of a layer as an argument, which is not returned."""
    run = {"jit": jax.jit, "checkpoint": jax.checkpoint, "state": jax.jit}[how]
    if how == "state":
        graph, state = nnx.split(layer)
        run = run(lambda state, x: nnx.merge(graph, state)(x))
        return run(state, X), run(state, X)
    run = run(lambda layer, x: layer(x))
    return run(layer, X), run(layer, X)


@pytest.mark.parametrize("make", [dropjax.nnx.Dropout, nnx.Dropout], ids=["ours", "Flax's"])
def test_streams_under_the_transformations_of_jax_are_as_the_docs_say(make):
    """As Flax's: closed over, an error; an argument that is not returned, one mask; returned, a new one."""
    layer = make(0.5, rngs=nnx.Rngs(0))
    for closed in [
        lambda: jax.jit(lambda x: layer(x))(X),
        lambda: jax.checkpoint(lambda x: layer(x))(X),
        lambda: jax.vmap(lambda x: layer(x))(X),
        lambda: jax.grad(lambda x: layer(x).sum())(X),
        lambda: jax.lax.scan(lambda c, _: (c, layer(X)), 0, None, 2),
    ]:
        with pytest.raises(TraceContextError) as caught:
            closed()
        if make is dropjax.nnx.Dropout:
            assert "Give the key at the call, rngs=key, or pass" in caught.value.__notes__[0]
    for how in ("jit", "checkpoint", "state"):
        first, second = transformed(how, layer)
        np.testing.assert_array_equal(first, second)
    rows = jax.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, jnp.ones((2, 32)))
    np.testing.assert_array_equal(*rows)
    assert layer.rngs.count[...] == 0
    run = jax.jit(lambda layer, x: (layer(x), layer))
    first, after = run(layer, X)
    assert (first != run(after, X)[0]).any()
    _, rows = jax.lax.scan(lambda layer, _: (layer, layer(X)), layer, None, 2)
    assert (rows[0] != rows[1]).any()
    both = nnx.jit(lambda layer, x: layer(x))
    assert (both(layer, X) != both(layer, X)).any()
