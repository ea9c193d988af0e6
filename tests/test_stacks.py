"""Views of stacked layers, for `nnx.scan` and `nnx.vmap`: each has masks of its own, whether or not it has a stream."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropjax.nnx
from dropjax.nnx import mc_view

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiler")
X = jnp.ones((2, 64))


class Block(nnx.Module):
    """A layer of Flax, and dropout without a stream, whose key comes at the call in training, or with one."""

    def __init__(self, rngs, kind=nnx.Dropout, stream=False, other=nnx.Linear):
        self.other = other(64, 64, rngs=rngs) if other is nnx.Linear else other(64, rngs=rngs)
        self.drop = kind(0.5, rngs=rngs if stream else None)

    def __call__(self, x, rngs=None):
        return x, self.drop(jnp.ones_like(x) + 0 * self.other(x), rngs=rngs)


def stack(n, make, rngs):
    return nnx.split_rngs(splits=n)(nnx.vmap(make))(rngs)


def scanned(blocks, x):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, blocks)[1]


def rematerialised(blocks, x):
    run = nnx.remat(lambda block, x: block(x))
    return nnx.scan(lambda x, block: run(block, x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, blocks)[1]


def mapped(blocks, x):
    return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, x)[1]


def check(run, model, key):
    """Every layer of every pass keeps half of its units, as no other does, and as it does under its key again."""
    view = mc_view(model, key)
    masks = np.concatenate([run(view, X), run(view, X)]).reshape(-1, X.size)
    assert set(np.unique(masks).tolist()) == {0.0, 2.0}
    for a, b in itertools.combinations(masks, 2):
        assert abs((a == b).mean() - 0.5) < 6 * np.sqrt(0.25 / X.size)
    np.testing.assert_array_equal(run(mc_view(model, key), X).reshape(-1, X.size), masks[: len(masks) // 2])
    assert (run(mc_view(model, jax.random.fold_in(key, 1)), X).reshape(-1, X.size) != masks[: len(masks) // 2]).any()
    shared = np.asarray(run(mc_view(model, key, masks="shared"), X))
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[..., :1, :], shared.shape))
    assert len(np.unique(shared.reshape(-1, *X.shape)[:, 0], axis=0)) == len(masks) // 2


@pytest.mark.slow
@pytest.mark.parametrize("run", [scanned, rematerialised, mapped])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [nnx.Dropout, dropjax.nnx.Dropout])
def test_stacks(key, run, stream, kind):
    check(run, stack(3, lambda rngs: Block(rngs, kind, stream), nnx.Rngs(0)), key)


@pytest.mark.parametrize("other", [nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.Linear])
def test_every_layer_beside_shows_the_stack(key, other):
    check(scanned, stack(3, lambda rngs: Block(rngs, other=other), nnx.Rngs(0)), key)


class Pair(nnx.Module):
    """A stack inside a stacked module that has dropout of its own."""

    def __init__(self, rngs):
        self.inner = stack(2, Block, rngs)
        self.norm, self.drop = nnx.LayerNorm(64, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x):
        return x, jnp.concatenate([scanned(self.inner, x), self.drop(jnp.ones_like(x))[None]])


class Whole(nnx.Module):
    """Stacks of two lengths beside dropout that is not stacked."""

    def __init__(self, rngs):
        self.first, self.second = stack(3, Block, rngs), stack(2, Block, rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x):
        parts = [scanned(self.first, x), scanned(self.second, x), self.drop(jnp.ones_like(x))[None]]
        return x, jnp.concatenate(parts)


class Nothing(nnx.Module):
    """A module of dropout alone, beside a stack: it seems to be stacked, and is not."""

    def __init__(self, rngs):
        self.blocks, self.drop = stack(3, Block, rngs), nnx.Dropout(0.5)

    def __call__(self, x):
        return x, jnp.concatenate([scanned(self.blocks, x), self.drop(jnp.ones_like(x))[None]])


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda rngs: stack(2, Pair, rngs), Whole, Nothing], ids=["nested", "two", "beside"])
def test_nested_stacks_and_stacks_beside_others(key, make):
    model = make(nnx.Rngs(0))
    run = scanned if isinstance(model, Pair) else lambda model, x: model(x)[1]
    check(run, model, key)
    if not isinstance(model, Pair):
        assert len(dropjax.nnx.mc_draws(model, X)) == len(
            [1 for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
        )


class Attending(nnx.Module):
    def __init__(self, rngs, direct):
        self.direct, self.rngs = direct, None
        self.project = nnx.Linear(8, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, dropout_rate=0.5, broadcast_dropout=False, decode=False, keep_rngs=False, rngs=rngs
        )

    def __call__(self, x):
        if not self.direct:
            return x, self.attention(x, deterministic=True)
        q = self.project(x)[:, :, None]
        return x, nnx.dot_product_attention(q, q, q, dropout_rate=0.5, deterministic=True, broadcast_dropout=False)[
            :, :, 0
        ]


@pytest.mark.parametrize("direct", [False, True])
def test_stacked_attention(key, direct):
    """Layers of equal parameters give unequal results, since they draw unequal masks."""
    layer = Attending(nnx.Rngs(0), direct)
    graph, state = nnx.split(layer)
    blocks = nnx.merge(graph, jax.tree.map(lambda value: jnp.stack([value] * 3), state))
    x = jax.random.normal(key, (2, 5, 8))
    for run in [scanned, mapped]:
        y = run(mc_view(blocks, key), x)
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            assert jnp.abs(y[i] - y[j]).max() > 1e-3
    assert [
        row.drawn
        for row in dropjax.nnx.mc_draws(layer, x)
        if row.kind == ("Attending" if direct else "MultiHeadAttention")
    ] == [True]
