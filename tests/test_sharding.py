"""The same masks on one device and on eight: jit, shard_map, pmap; and errors where masks would repeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropjax
from dropjax import bits
from tests.test_variants import assert_same, draw, every, inputs

SHAPE = (8, 4, 16)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@every
@pytest.mark.parametrize("spec", [P("data", None, "model"), P(None, None, ("model", "data"))], ids=str)
def test_jit_with_automatic_axes(variant, key, spec):
    x = inputs(SHAPE)
    step = jax.jit(lambda key, x: draw(variant, key, x))
    placed = jax.device_put(x, NamedSharding(mesh(), spec))
    y = step(key, placed)
    assert_same(variant, y, draw(variant, key, x), x)
    assert y.sharding.is_equivalent_to(placed.sharding, x.ndim)
    hlo = step.lower(key, placed).compile().as_text()
    assert not any(op in hlo for op in ["all-gather", "all-reduce", "collective-permute", "all-to-all"])


@every
def test_jit_with_explicit_axes(variant, key):
    x = inputs(SHAPE)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), P("data", "model")))
        y = jax.jit(lambda key, x: draw(variant, key, x))(key, placed)
    assert_same(variant, y, draw(variant, key, x), x)
    assert jax.typeof(y).sharding.spec == P("data", "model", None)


@pytest.mark.slow
@every
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (P("data"), {0: "data"}),
        (P(("model", "data"), None), {0: ("model", "data")}),
        (P(None, "model", "data"), {-1: "data", 1: "model"}),
    ],
    ids=str,
)
def test_shard_map(variant, key, spec, dims, check_vma):
    x = inputs(SHAPE)
    whole = {"data", "model"} - {
        name for names in dims.values() for name in ([names] if isinstance(names, str) else names)
    }
    copies = {} if check_vma or not whole else {None: tuple(whole)}  # where types say nothing, all axes are named

    def piece(key, x):
        return draw(variant, key, x, sharded_dims=dims | copies)

    shards = jax.shard_map(piece, mesh=mesh(), in_specs=(P(), spec), out_specs=spec, check_vma=check_vma)
    assert_same(variant, jax.jit(shards)(key, x), draw(variant, key, x), x)


@pytest.mark.slow
@every
def test_pmap(variant, key):
    x = inputs((32, 4, 6))
    parts = x.reshape(8, 4, 4, 6)
    run = jax.pmap(lambda x, key: draw(variant, key, x, sharded_dims={0: "i"}), axis_name="i", in_axes=(0, None))
    assert_same(variant, run(parts, key).reshape(x.shape), draw(variant, key, x), x)


def test_start_composes_with_sharded_dims(key):
    x = jnp.ones((16, 4))
    whole = dropjax.dropout(key, x, 0.5)

    def piece(x, start):
        return dropjax.dropout(key, x, 0.5, start={0: start}, sharded_dims={0: "data"})

    run = jax.jit(jax.shard_map(piece, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data")))
    np.testing.assert_array_equal(jnp.concatenate([run(x[:8], 0), run(x[8:], 8)]), whole)


def test_masks_and_words_by_shape(key):
    def piece():
        mask = dropjax.keep_mask(key, (2, 4), 0.5, sharded_dims={0: "data", None: "model"})
        words = bits.random_words(key, (2, 4), sharded_dims={0: "data", None: "model"})
        return mask, words

    specs = (P("data"), P("data"))
    mask, words = jax.jit(jax.shard_map(piece, mesh=mesh(), in_specs=(), out_specs=specs))()
    np.testing.assert_array_equal(mask, dropjax.keep_mask(key, (8, 4), 0.5))
    np.testing.assert_array_equal(words, bits.random_words(key, (8, 4)))


def test_a_repeated_mask_is_an_error_in_checked_shard_map(key):
    x = jnp.ones((8, 4))

    def run(f, spec=None):
        spec = P("data") if spec is None else spec
        return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(spec,), out_specs=spec))(x)

    with pytest.raises(
        ValueError, match="x must be accounted for over mesh axis 'data', over which it varies"
    ) as caught:
        run(lambda x: dropjax.dropout(key, x, 0.5))
    for remedy in ["sharded_dims={dim: 'data'}", "sharded_dims={None: 'data'}", "jax.lax.axis_index('data')"]:
        assert remedy in str(caught.value)
    with pytest.raises(ValueError, match="mesh axis 'model'"):
        run(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims={0: "data"}), P("data", "model"))
    with pytest.raises(ValueError, match="keep_mask: x must be accounted for over mesh axis"):
        run(lambda x: x * dropjax.keep_mask(key, x.shape, 0.5).astype(x.dtype))
    copies = run(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims={None: "data"}))
    np.testing.assert_array_equal(copies[:2], copies[2:4])
    folded = run(lambda x: dropjax.dropout(jax.random.fold_in(key, jax.lax.axis_index("data")), x, 0.5))
    assert (folded[:2] != folded[2:4]).any()
    replicated = run(lambda x: dropjax.dropout(key, x, 0.5), P())
    np.testing.assert_array_equal(replicated, dropjax.dropout(key, x, 0.5))


def test_a_repeated_mask_is_an_error_in_pmap_and_unchecked_shard_map(key):
    message = "dropout: sharded_dims must be given inside pmap and unchecked shard_map"
    with pytest.raises(ValueError, match=message):
        jax.pmap(lambda x: dropjax.dropout(key, x, 0.5), axis_name="i")(jnp.ones((8, 4)))
    unchecked = {"mesh": mesh(), "in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    with pytest.raises(ValueError, match=message):
        jax.jit(jax.shard_map(lambda x: dropjax.dropout(key, x, 0.5), **unchecked))(jnp.ones((8, 4)))
    with pytest.raises(
        ValueError, match=r"dropout: .* inside pmap, .* Give the pmap an axis_name and pass \{dim: axis"
    ):
        jax.pmap(lambda x: dropjax.dropout(key, x, 0.5))(jnp.ones((8, 4)))
    meant = jax.jit(jax.shard_map(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims={}), **unchecked))
    assert meant(jnp.ones((8, 4))).shape == (8, 4)


@pytest.mark.parametrize(
    ("dims", "kind", "message"),
    [
        ({0: "nowhere"}, ValueError, "sharded_dims must name manual mesh axes, which here are .*, got 'nowhere'"),
        ({0: "data", 1: "data"}, ValueError, "sharded_dims must name each dimension and each axis once"),
        ({0: "data", -2: "model"}, ValueError, "sharded_dims must name each dimension and each axis once"),
        ({5: "data"}, ValueError, "sharded_dims must be in"),
        (3, TypeError, "sharded_dims must be a mapping"),
        ({0: 0}, TypeError, "sharded_dims must map a dimension to the name of a mesh axis, or to several, got 0 for 0"),
        ({0: "data", 1: None}, TypeError, "sharded_dims must map a dimension .* got None .* Leave out dimensions"),
    ],
)
def test_bad_sharded_dims(key, dims, kind, message):
    with pytest.raises(kind, match=f"dropout: {message}"):
        jax.jit(
            jax.shard_map(
                lambda x: dropjax.dropout(key, x, 0.5, sharded_dims=dims),
                mesh=mesh(), in_specs=P("data"), out_specs=P("data"),
            )
        )(jnp.ones((8, 4)))  # fmt: skip


def test_sharded_dims_outside_a_manual_region(key):
    with pytest.raises(ValueError, match=r"Under jax\.jit the arrays are whole"):
        dropjax.dropout(key, jnp.ones((8, 4)), 0.5, sharded_dims={0: "data"})


def test_indices_past_two_to_the_32_over_a_mesh(key):
    def piece():
        return bits.random_words(key, (1, 4), start={0: 2**32 - 3}, sharded_dims={0: "data", None: "model"})

    with pytest.raises(ValueError, match="random_words: indices must be below 2\\^32"):
        jax.jit(jax.shard_map(piece, mesh=mesh(), in_specs=(), out_specs=P("data")))()


def test_every_axis_must_be_named_where_types_say_nothing(key):
    x, unchecked = jnp.ones((8, 4)), {"mesh": mesh(), "in_specs": P("data", "model"), "out_specs": P("data", "model")}

    def run(dims):
        return jax.jit(
            jax.shard_map(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims=dims), check_vma=False, **unchecked)
        )(x)

    with pytest.raises(ValueError, match=r"for every axis of .* Pass \{dim: 'data'\} for a cut"):
        run({1: "model"})
    np.testing.assert_array_equal(run({0: "data", 1: "model"}), dropjax.dropout(key, x, 0.5))


def test_what_varies_is_x_or_its_rate_and_a_start_that_varies_is_a_place(key):
    rates = jnp.linspace(0.1, 0.9, 8)[:, None]

    def run(f):
        return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P("data")))

    with pytest.raises(ValueError, match="mesh axis 'data'"):
        run(lambda rate: dropjax.dropout(key, jnp.ones((2, 4)), rate))(rates)
    placed = run(lambda x: dropjax.dropout(key, x, 0.5, start={0: jax.lax.axis_index("data") * 2}))(jnp.ones((8, 4)))
    np.testing.assert_array_equal(placed, dropjax.dropout(key, jnp.ones((8, 4)), 0.5))
