"""targeted_dropout against sorts in NumPy: who is a candidate, ties, kernels of convolutions, units."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropjax
from tests import oracle

pytestmark = pytest.mark.usefixtures("quick_compiler")
KERNEL = np.random.default_rng(1).normal(size=(3, 2, 5, 8)).astype(np.float32)  # of a convolution


def lowest(magnitude, share):
    """The candidates of one ranking, a vector: sorted by magnitude and place."""
    order = sorted(range(len(magnitude)), key=lambda i: (magnitude[i], i))
    chosen = np.zeros(len(magnitude), bool)
    chosen[order[: int(share * len(magnitude) + 1e-4)]] = True
    return chosen


@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.7])
def test_candidates(share, key):
    """At rate 1 the candidates are 0: by weight in each column, by unit among all units; by traced shares, too."""
    flat = np.abs(KERNEL).reshape(-1, 8)
    weights = np.stack([lowest(column, share) for column in flat.T], 1).reshape(KERNEL.shape)
    units = lowest(np.sqrt((flat.astype(np.float64) ** 2).sum(0)), share)
    for kind, candidates in [("weight", weights), ("unit", np.broadcast_to(units, KERNEL.shape))]:
        run = jax.jit(lambda s: dropjax.targeted_dropout(key, KERNEL, 1.0, targeted=s, kind=kind))  # noqa: B023
        for y in [run(jnp.float32(share)), dropjax.targeted_dropout(key, KERNEL, 1.0, targeted=share, kind=kind)]:
            np.testing.assert_array_equal(y, np.where(candidates, 0, KERNEL))


def test_units_of_any_size_are_ranked(key):
    """The squares of these weights leave float32; units of one size and one order are ranked at every scale."""
    for size in (1e-25, 1.0, 1e25, 1e38):
        x = jnp.asarray(size * np.array([[3.0, 1, 0, 2], [1, 1, 0, 2]]), jnp.float32)
        y = dropjax.targeted_dropout(key, x, 1.0, kind="unit", targeted=0.75)
        np.testing.assert_array_equal(y, np.asarray(x) * np.array([1, 0, 0, 0], np.float32))
    vector = dropjax.targeted_dropout(key, jnp.array([1.0, -3.0, 2.0, 0.5]), 1.0, kind="unit")
    assert vector.tolist() == [0, -3, 2, 0]


def test_decisions_are_those_of_the_words(key):
    words, candidates = jax.random.key_data(key), np.stack([lowest(c, 0.5) for c in np.abs(KERNEL).reshape(-1, 8).T], 1)
    candidates, kept = candidates.reshape(KERNEL.shape), oracle.keep(words, KERNEL.shape, 0.4)
    plain = dropjax.targeted_dropout(key, KERNEL, 0.4)
    np.testing.assert_array_equal(plain, np.where(candidates & ~kept, 0, KERNEL))
    scaled = dropjax.targeted_dropout(key, KERNEL, 0.4, rescale=True)
    expected = np.where(candidates, np.where(kept, KERNEL * oracle.scale(0.4), np.float32(0)), KERNEL)
    np.testing.assert_array_equal(scaled, expected)
    slope = jax.grad(lambda x: dropjax.targeted_dropout(key, x, 0.4).sum())(KERNEL)
    np.testing.assert_array_equal(slope, ~(candidates & ~kept))
    units = dropjax.targeted_dropout(key, KERNEL, 0.4, kind="unit", targeted=1.0)
    np.testing.assert_array_equal(units, np.where(oracle.keep(words, KERNEL.shape, 0.4, (0, 1, 2)), KERNEL, 0))


def test_ties_go_in_order_and_stacked_kernels_rank_by_themselves(key):
    ties = jnp.ones((5, 3))
    np.testing.assert_array_equal(
        dropjax.targeted_dropout(key, ties, 1.0, targeted=0.4), np.where(np.arange(5)[:, None] < 2, 0, ties)
    )
    stack = jnp.asarray(KERNEL[:, 0])
    y = dropjax.targeted_dropout(key, stack, 1.0, batch_axes=0)
    for one, kernel in zip(y, stack, strict=True):
        np.testing.assert_array_equal(one, dropjax.targeted_dropout(key, kernel, 1.0))
    part = dropjax.targeted_dropout(key, stack[1:], 0.5, batch_axes=0, start={0: 1})
    np.testing.assert_array_equal(part, dropjax.targeted_dropout(key, stack, 0.5, batch_axes=0)[1:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64])
def test_dtypes_and_empty_kernels(dtype, key):
    x = jnp.asarray(KERNEL[0, 0]).astype(dtype)
    y = dropjax.targeted_dropout(key, x, 1.0, kind="weight")
    assert y.dtype == dtype
    assert ((y == 0).sum(0) == 2).all()  # floor(0.5 * 5)
    assert dropjax.targeted_dropout(key, jnp.zeros((0, 3), dtype), 0.5, kind="unit").shape == (0, 3)


def test_errors_and_nan(key):
    for options, message in [
        ({"kind": "column"}, "kind must be one of ('weight', 'unit'), got 'column' (str)."),
        ({"targeted": 1.5}, "targeted must be in [0, 1], got 1.5."),
        ({"start": {0: 1}}, "start and sharded_dims must not be along dimensions (0,), which are ranked as a whole"),
        ({"kind": "unit", "start": {1: 1}}, "start and sharded_dims must not be along dimensions (0, 1), which are"),
    ]:
        with pytest.raises(ValueError, match=re.escape("targeted_dropout: " + message)):
            dropjax.targeted_dropout(key, jnp.ones((4, 2)), 0.5, **options)
    for x, batch in [(jnp.ones(4), ()), (jnp.ones((4, 2)), 0)]:
        with pytest.raises(ValueError, match="targeted_dropout: x must have a dimension of inputs besides"):
            dropjax.targeted_dropout(key, x, 0.5, batch_axes=batch)
    run = jax.jit(lambda rate, share: dropjax.targeted_dropout(key, jnp.ones((4, 2)), rate, targeted=share))
    assert jnp.isnan(run(1.5, 0.5)).all()
    assert jnp.isnan(run(0.5, jnp.nan)).all()
