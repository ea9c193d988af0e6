"""Every variant on every mesh: what eight devices draw is what one draws."""

import dataclasses
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dropjax
import dropjax.linen
import dropjax.nnx
from tests.test_variants import assert_same, draw, every, inputs
from tests.variants import VARIANTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")
SHAPES = {"8": (8,), "4x2": (4, 2), "2x4": (2, 4), "2x2x2": (2, 2, 2), "3x2 of 8": (3, 2)}
NAMES = ("data", "model", "stage")


def mesh_of(shape, kind=AxisType.Auto, order=None):
    """A mesh of the first devices, or of the devices in an order."""
    devices = np.array(jax.devices())[... if order is None else np.asarray(order)][: math.prod(shape)]
    return Mesh(devices.reshape(shape), NAMES[: len(shape)], axis_types=(kind,) * len(shape))


def specs(names):
    """Both orders of two axes, over one dimension and over several."""
    *others, last = names
    if not others:
        return [P(last), P(None, None, last)]
    return [P(names), P(names[::-1]), P(last, names[0]), P(names[0], None, last)]


@pytest.mark.parametrize("variant", ["dropout", "spatial_dropout"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_mesh_shapes_and_device_orders(variant, shape, kind, key):
    """No collective, and the output lies as the input does; on explicit axes the devices are shuffled."""
    variant, x = VARIANTS[variant], inputs((24, 24, 24))
    mesh = mesh_of(shape, kind, None if kind == AxisType.Auto else np.random.default_rng(0).permutation(8))
    expected = draw(variant, key, x)
    for spec in specs(mesh.axis_names):
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            step = jax.jit(lambda key, x: draw(variant, key, x)).lower(key, placed).compile()
            y = step(key, placed)
        assert_same(variant, y, expected, x)
        assert y.sharding.is_equivalent_to(placed.sharding, x.ndim)
        assert not any(op in step.as_text() for op in COLLECTIVES)


@every
def test_layers_and_their_gradients_on_explicit_axes(variant, key):
    """Linen's and NNX's layer, over a dimension that the mask may share, in a jitted step and its gradient."""
    x, mesh = inputs((8, 4, 16)), mesh_of((4, 2), AxisType.Explicit)
    linen = getattr(dropjax.linen, variant.layer)(0.3, deterministic=False, **variant.options)
    ours = getattr(dropjax.nnx, variant.layer)(0.3, **variant.options)
    expected = draw(variant, key, x, 0.3)
    slope = jax.grad(lambda x: draw(variant, key, x, 0.3).sum())(x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        for call in (lambda x: linen.apply({}, x, rng=key), lambda x: ours(x, rngs=key)):
            y = jax.jit(call)(placed)
            assert_same(variant, y, expected, x)
            assert jax.typeof(y).sharding.spec == P("data", "model", None)
            assert_same(variant, jax.jit(jax.grad(lambda x, call=call: call(x).sum()))(placed), slope, x)


@every
def test_layers_in_shard_map(variant, key):
    """The field sharded_dims of both layers; NNX draws from a stream of its own that every device holds."""
    x, mesh, spec = inputs((8, 4, 16)), mesh_of((4, 2)), P("data", None, "model")
    linen, ours = (
        getattr(frontend, variant.layer)(
            0.3, deterministic=False, sharded_dims={0: "data", 2: "model"}, **variant.options
        )
        for frontend in (dropjax.linen, dropjax.nnx)
    )
    whole = dataclasses.replace(linen, sharded_dims=None).apply({}, x, rngs={"dropout": key})
    for call, expected in (
        (lambda x, key: linen.apply({}, x, rngs={"dropout": key}), whole),
        (lambda x, key: ours(x, rngs=nnx.Rngs(key)), draw(variant, nnx.Rngs(key).dropout(), x)),
    ):
        shards = jax.shard_map(call, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
        assert_same(variant, jax.jit(shards)(x, key), expected, x)


def test_nested_shard_maps(key):
    """The outer region cuts the rows, the inner one the columns; or the columns are left to jit."""
    x, mesh = inputs((8, 4, 16)), mesh_of((4, 2))
    expected = dropjax.dropout(key, x, 0.5)

    def columns(x):
        return dropjax.dropout(key, x, 0.5, sharded_dims={0: "data", 2: "model"})

    def rows(x):
        spec = P(None, None, "model")
        return jax.shard_map(columns, in_specs=spec, out_specs=spec, axis_names={"model"})(x)

    def alone(x):
        return dropjax.dropout(key, x, 0.5, sharded_dims={0: "data"})

    placed = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
    for region in (rows, alone):
        run = jax.shard_map(region, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        np.testing.assert_array_equal(jax.jit(run)(placed), expected)


def test_tensor_parallel_types_raise_no_false_alarm(key):
    """psum makes copies that need no word, psum_scatter makes pieces, and all_gather copies that are declared."""
    x, mesh = inputs((8, 4, 16)), mesh_of((4, 2))
    whole = x * 2

    def region(x):
        copies = jax.lax.psum(x, "model")
        pieces = jax.lax.psum_scatter(x, "model", scatter_dimension=2, tiled=True)
        gathered = jax.lax.all_gather(pieces, "model", axis=2, tiled=True)
        return (
            dropjax.dropout(key, copies, 0.5, sharded_dims={0: "data"}),
            dropjax.dropout(key, pieces, 0.5, sharded_dims={0: "data", 2: "model"}),
            dropjax.dropout(key, gathered, 0.5, sharded_dims={0: "data", None: "model"})[None],
        )

    specs = (P("data"), P("data", None, "model"), P("model", "data"))
    run = jax.shard_map(region, mesh=mesh, in_specs=P("data"), out_specs=specs)
    copies, pieces, gathered = jax.jit(run)(x)
    for found in (copies, pieces, *gathered):
        np.testing.assert_array_equal(found, dropjax.dropout(key, whole, 0.5))


@every
def test_constrained_and_donated(variant, key):
    x, mesh = inputs((8, 4, 10)), mesh_of((4, 2))
    expected = draw(variant, key, x)

    @jax.jit
    def constrained(x):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", None, "model")))
        y = draw(variant, key, x)
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P(None, "data", "model")))

    assert_same(variant, constrained(x), expected, x)
    placed = jax.device_put(x, NamedSharding(mesh, P("model", "data")))
    donated = jax.jit(lambda x: draw(variant, key, x), donate_argnums=0)
    assert_same(variant, donated(placed), expected, x)
    assert placed.is_deleted()


@every
def test_a_length_that_the_mesh_does_not_divide(variant, key):
    """Inside jit JAX pads it, or replicates: no mask changes."""
    x, mesh = inputs((6, 4, 10)), mesh_of((4, 2))

    @jax.jit
    def uneven(x):
        return draw(variant, key, jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", None, "model"))))

    assert_same(variant, uneven(x), draw(variant, key, x), x)


def test_what_jax_and_flax_do_not_do(key):
    """The table at the end of docs/sharding.md: the day one of these changes is noticed here."""
    x = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"evenly divide|divisible"):
        jax.device_put(x, NamedSharding(mesh_of((4, 2)), P("data")))

    def gathered(x):
        return dropjax.dropout(key, jax.lax.all_gather(x, "model", axis=0, tiled=True), 0.5)

    region = jax.shard_map(gathered, mesh=mesh_of((4, 2)), in_specs=P("model"), out_specs=P("model"))
    with pytest.raises(ValueError, match="mesh axis 'model', over which it varies"):
        jax.jit(region)(x)
    both = mesh_of((4, 2), AxisType.Explicit)
    rows = jax.device_put(jnp.ones((8, 4)), NamedSharding(both, P("data")))
    partial = {"mesh": both, "in_specs": P("data"), "out_specs": P("data"), "axis_names": {"data"}}
    called = jax.shard_map(lambda x: jax.debug.callback(print, jax.lax.axis_index("data")) or x, **partial)
    with pytest.raises(NotImplementedError, match="Explicit"):
        jax.jit(called)(rows)
    drawn = jax.shard_map(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims={0: "data"}), **partial)
    np.testing.assert_array_equal(jax.jit(drawn)(rows), dropjax.dropout(key, jnp.ones((8, 4)), 0.5))
    explicit, rngs = mesh_of((2,), AxisType.Explicit), nnx.Rngs(0)
    with jax.set_mesh(explicit):
        placed = jax.device_put(x, NamedSharding(explicit, P("data")))
        with pytest.raises(Exception, match=r"select .* must be scalar or have the same sharding"):
            flax.linen.Dropout(0.5, deterministic=False).apply({}, placed, rngs={"dropout": key})
        with pytest.raises(ValueError, match="does not evenly divide the dimension size 1"):
            nnx.Dropout(0.5, broadcast_dims=(0,), rngs=rngs)(placed)
        for run in [
            lambda x: dropjax.targeted_dropout(key, x, 0.5),
            lambda x: dropjax.token_dropout(key, x, 0.5, token_axis=0, batch_axes=()).tokens,
            lambda x: dropjax.masksembles_samples(lambda x: x, x, 3),
        ]:
            with pytest.raises(Exception, match=r"sharding"):
                run(placed)
            np.testing.assert_array_equal(run(jax.sharding.reshard(placed, P())), run(x))


@st.composite
def places(draw_one):
    """A mesh, a shape, which dimension is cut over which of the mesh's axes, and how the region is entered."""
    mesh_shape = draw_one(st.sampled_from([(8,), (4, 2), (2, 4), (2, 2, 2), (3, 2)]))
    rank = draw_one(st.integers(2, 4))
    axes = draw_one(st.permutations(NAMES[: len(mesh_shape)]))
    cuts = [draw_one(st.sampled_from([None, *range(rank)])) for _ in axes]
    over = {d: tuple(a for a, cut in zip(axes, cuts, strict=True) if cut == d) for d in range(rank)}
    size = dict(zip(NAMES, mesh_shape, strict=False))
    lengths = [math.prod(size[a] for a in over[d]) * draw_one(st.integers(1, 3)) for d in range(rank)]
    lengths[-1] *= draw_one(st.sampled_from([1, 5, 16]))
    mode = draw_one(st.sampled_from(["auto", "explicit", "shard_map", "unchecked"]))
    order = draw_one(st.permutations(range(8)))
    return mesh_shape, tuple(lengths), over, mode, order


@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    place=places(),
    name=st.sampled_from(sorted(VARIANTS)),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.97]),
    traced=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    seed=st.integers(0, 2**32 - 1),
    start=st.sampled_from([0, 7, 2**31]),
)
def test_any_place_draws_what_one_device_draws(place, name, rate, traced, dtype, seed, start):
    (mesh_shape, shape, over, mode, order), variant = place, VARIANTS[name]
    key, x = jax.random.key(seed), inputs(shape, dtype)
    rate = jnp.float32(rate) if traced else rate
    spec = P(*(over[d] or None for d in range(len(shape))))
    cut = {d: names for d, names in over.items() if names}
    copies = tuple(a for a in NAMES[: len(mesh_shape)] if all(a not in names for names in cut.values()))
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = mesh_of(mesh_shape, kind, order)
    first = {0: start}

    def run(x, rate):
        return draw(variant, key, x, rate, start=first)

    def piece(x, rate):
        said = cut | ({None: copies} if mode == "unchecked" and copies else {})
        return draw(variant, key, x, rate, start=first, sharded_dims=said)

    expected = run(x, rate)
    with jax.set_mesh(mesh):
        if mode in ("auto", "explicit"):
            step = jax.jit(run)
        else:
            step = jax.jit(
                jax.shard_map(piece, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=mode == "shard_map")
            )
        y = step(jax.device_put(x, NamedSharding(mesh, spec)), rate)
    assert_same(variant, y, expected, x)
