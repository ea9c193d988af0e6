"""What `assert_masks_differ` finds, what it believes, and gradients and microbatches that it must let pass."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dropjax
from dropjax import linen
from dropjax.sharding import assert_masks_differ
from tests.test_sharding import mesh
from tests.test_variants import inputs


def cut(f, **options):
    """A step: f on the pieces of one array."""
    return jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), **options))


def folded(key, x, by):
    return dropjax.dropout(jax.random.fold_in(key, jax.lax.axis_index("data") // by), x, 0.5)


def in_a_scan(key, x, by):
    """Rematerialised layers, whose keys are the same on every `by` shards in the last layer only."""

    def layer(x, i):
        shard = jax.lax.axis_index("data") // jnp.where(i == 3, by, 1)
        return dropjax.dropout(jax.random.fold_in(jax.random.fold_in(key, i), shard), x, 0.5), None

    return jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(4))[0]


@pytest.mark.parametrize("drops", [folded, in_a_scan])
def test_the_checker_finds_keys_that_differ_in_type_only(drops, key):
    """In a step that ran before, and in its gradient: values are compared, not types."""
    x = jnp.ones((8, 4))
    for by in (1, 2):
        step = cut(lambda x, by=by: drops(key, x, by))
        step(x)
        for run in (step, jax.jit(jax.grad(lambda x, step=step: step(x).sum()))):
            if by == 1:
                assert_masks_differ(run, x)
            else:
                with pytest.raises(AssertionError, match=r"two shards drew the same mask: dropout on .*'data': "):
                    assert_masks_differ(run, x)


def test_the_checker_believes_declared_copies_only(key):
    x = jnp.ones((8, 4))
    said = {0: "data", None: "model"}
    assert_masks_differ(cut(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims=said), check_vma=False), x)
    with pytest.raises(
        AssertionError,
        match=r"'data': 0, 'model': 0\}, elements \[0:2, 0:4\], and dropout on \{'data': 0, 'model': 1\}",
    ):
        assert_masks_differ(cut(lambda x: dropjax.dropout(key, x, 0.5, sharded_dims={}), check_vma=False), x)
    starts = cut(lambda x: dropjax.dropout(key, x, 0.5, start={0: jax.lax.axis_index("data") * 0 + 8}))
    with pytest.raises(AssertionError, match=r"elements \[8:10, 0:4\], and"):
        assert_masks_differ(starts, x)
    overlap = cut(lambda x: dropjax.dropout(key, x, 0.5, start={0: jax.lax.axis_index("data")}))
    with pytest.raises(AssertionError, match=r"elements \[0:2, 0:4\], and dropout on .*, elements \[1:3, 0:4\]"):
        assert_masks_differ(overlap, x)
    channels = cut(lambda x: dropjax.spatial_dropout(key, x[None], 0.5, sharded_dims={1: "data"})[0])
    assert_masks_differ(channels, x)  # a cut through places that share their mask
    invariant = jax.shard_map(
        lambda x: dropjax.dropout(key, jax.lax.psum(x, "data"), 0.5), mesh=mesh(), in_specs=P("data"), out_specs=P()
    )
    assert_masks_differ(jax.jit(invariant), x)


def test_the_checker_sees_pmap_and_layers_and_flax_replaced(key):
    x, keys = jnp.ones((8, 4)), jax.random.split(key, 8)
    run = jax.pmap(lambda x, key: dropjax.dropout(key, x, 0.5, sharded_dims={}), axis_name="i")
    assert_masks_differ(run, x, keys)
    with pytest.raises(AssertionError, match="'i': 0}"):
        assert_masks_differ(run, x, keys[jnp.array([0, 0, 1, 2, 3, 4, 5, 6])])
    for module in (linen.Dropout(0.5, deterministic=False), flax.linen.Dropout(0.5, deterministic=False)):
        step = cut(
            lambda x, module=module: module.apply(
                {}, x, rngs={"dropout": jax.random.fold_in(key, jax.lax.axis_index("data") * 0)}
            )
        )
        with linen.replace_flax(), pytest.raises(AssertionError, match="two shards drew the same mask"):
            assert_masks_differ(step, x)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="jax 0.10.0 does not compile its axis_index there")
def test_the_checker_looks_at_values_where_an_unchecked_region_has_lost_an_axis(key):
    """Inside an unchecked region types forget its axis: no other check sees this."""
    x, spec = jnp.arange(32.0).reshape(8, 4), P(None, "model")

    def nested(dims):
        def columns(x):
            return dropjax.dropout(key, x, 0.5, sharded_dims=dims)

        inner = jax.shard_map(columns, in_specs=spec, out_specs=spec, axis_names={"model"})
        return cut(lambda x: inner(x), axis_names={"data"}, check_vma=False)

    assert_masks_differ(nested({0: "data", 1: "model"}), x)
    assert_masks_differ(nested({1: "model"}), jnp.ones((8, 4)))  # the same x on all: masks may be the same
    with pytest.raises(AssertionError, match="two shards drew the same mask"):
        assert_masks_differ(nested({1: "model"}), x)


def test_the_checker_looks_at_the_values_of_callbacks(key):
    """Their type does not vary: no other check sees this."""
    x = jnp.ones((8, 4))

    def called_back(x):
        values = jax.pure_callback(
            lambda i: np.full((2, 4), i, np.float32), jax.ShapeDtypeStruct((2, 4), x.dtype), jax.lax.axis_index("data")
        )
        return dropjax.dropout(key, values, 0.5) * x

    with pytest.raises(AssertionError, match="two shards drew the same mask"):
        assert_masks_differ(cut(called_back), x)


def test_the_gradient_of_nested_regions(key):
    x, spec = inputs((8, 4)), P(None, "model")

    def columns(x):
        return dropjax.dropout(key, x, 0.5, sharded_dims={0: "data", 1: "model"})

    rows = cut(
        lambda x: jax.shard_map(columns, in_specs=spec, out_specs=spec, axis_names={"model"})(x), axis_names={"data"}
    )
    slope = jax.jit(jax.grad(lambda x: rows(x).sum()))(x)
    np.testing.assert_array_equal(slope, dropjax.dropout(key, jnp.ones_like(x), 0.5))


def test_microbatches_of_a_device_lie_within_its_rows(key):
    """Each device's four rows in two microbatches: start counts rows of the whole batch."""
    x = jnp.ones((16, 4))

    def step(x):
        first = jax.lax.axis_index("data") * len(x)
        parts = [dropjax.dropout(key, x[i : i + 2], 0.5, start={0: first + i}) for i in (0, 2)]
        return jnp.concatenate(parts)

    np.testing.assert_array_equal(cut(step)(x), dropjax.dropout(key, x, 0.5))
    assert_masks_differ(cut(step), x)


def test_the_checker_wants_something_to_check(key):
    assert_masks_differ(jax.jit(lambda x: dropjax.dropout(key, x, 0.5)), jnp.ones(4))  # whole: nothing can repeat
    with pytest.raises(ValueError, match="fn must draw by dropjax, got a function that draws nothing"):
        assert_masks_differ(lambda x: x, jnp.ones(4))
    with pytest.raises(ValueError, match="fn must draw by dropjax"):
        assert_masks_differ(flax.linen.Dropout(0.5, deterministic=False).apply, {}, jnp.ones(4), rngs={"dropout": key})
