"""Token dropout: which tokens, how many, in which order, and the same for every piece."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy import stats

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import bits
from tests import oracle
from tests.test_errors import KEY, raises

pytestmark = pytest.mark.usefixtures("quick_compiler")
X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 7, 3)), jnp.float32)


def expected(key, x, keep, prefix=0, ordered=True):
    """The tokens of the largest words, in NumPy; the first one of equal words."""
    words = oracle.words(jax.random.key_data(key), x.shape, (2,))[:, prefix:, 0]
    order = np.argsort(~words, axis=1, kind="stable")[:, :keep] + prefix
    order = np.sort(order, axis=1) if ordered else order
    indices = np.concatenate([np.broadcast_to(np.arange(prefix), (len(x), prefix)), order], 1)
    return np.stack([np.asarray(row)[i] for row, i in zip(x, indices, strict=True)]), indices


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("prefix", "keep"), [(0, 3), (2, 3), (1, 6), (7, 0), (0, 0)])
def test_matches_its_oracle(key, prefix, keep, ordered):
    tokens, indices = dropjax.token_dropout(key, X, num_keep=keep, num_prefix_tokens=prefix, ordered=ordered)
    for found, wanted in zip((tokens, indices), expected(key, X, keep, prefix, ordered), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert indices.dtype == jnp.int32


def test_any_axes(key):
    tokens, indices = dropjax.token_dropout(key, X, num_keep=3)
    moved = dropjax.token_dropout(key, X[:, None], num_keep=3, token_axis=2)
    np.testing.assert_array_equal(jnp.take_along_axis(X[:, None], moved.indices[:, None, :, None], 2), moved.tokens)
    first = dropjax.token_dropout(key, X, num_keep=2, token_axis=0, batch_axes=-1)
    np.testing.assert_array_equal(jnp.take_along_axis(X, first.indices.T[:, None], 0), first.tokens)
    one = dropjax.token_dropout(key, X, num_keep=3, batch_axes=())
    assert one.indices.shape == (3,)
    np.testing.assert_array_equal(one.tokens, X[:, one.indices])
    assert tokens.shape == (4, 3, 3) == (*indices.shape, 3)


def test_all_subsets_and_all_orders_are_equally_likely(key):
    """The chi-square statistic of n = 20,000 examples is below its upper quantile of 1e-6, for one fixed key."""
    n = 20_000
    indices = np.asarray(dropjax.token_dropout(key, jnp.ones((n, 5)), num_keep=2, ordered=False).indices)
    for count, cells in [(indices, itertools.permutations), (np.sort(indices), itertools.combinations)]:
        cells = list(cells(range(5), 2))
        counts = [(count == cell).all(1).sum() for cell in cells]
        assert sum(counts) == n
        assert stats.chisquare(counts).statistic < stats.chi2.isf(1e-6, len(cells) - 1)
    ordered = dropjax.token_dropout(key, jnp.ones((n, 5)), num_keep=2).indices
    np.testing.assert_array_equal(np.sort(indices), ordered)


def test_equal_words_keep_the_first_tokens(key, monkeypatch):
    monkeypatch.setattr(bits, "words", lambda draw, shape: jnp.full((shape[0], shape[1], 1), 7, jnp.uint32))
    x = jnp.ones((2, 9, 4))  # a shape of its own, so that it is traced anew
    indices = dropjax.token_dropout(key, x, num_keep=4, num_prefix_tokens=1, ordered=False).indices
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3, 4]] * 2)


def test_fewer_tokens_are_some_of_more(key):
    chosen = [dropjax.token_dropout(key, X, num_keep=k).indices for k in (0, 2, 5, 7)]
    for few, more in itertools.pairwise(chosen):
        assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(few, more, strict=True))
    assert (chosen[-1] == jnp.arange(7)[None]).all()
    np.testing.assert_array_equal(dropjax.token_dropout(key, X, 0.0).tokens, X)


@pytest.mark.parametrize(
    ("tokens", "rate", "keep"),
    [
        (100, 0.9, 10),  # where 100 * (1 - 0.9) is 9.999...
        (3, 1 / 3, 2),  # and rates that are no short decimals
        (196, 1 / 7, 168),
        (300, 1 - 2 / 3, 200),
        (300, np.float32(1 / 3), 200),
        (10**6, 0.5000001, 499_999),  # which float32 would round to 0.50000012
        (10**6, np.float32(0.5), 500_000),
        (100, np.float32(0.9), 10),
        (100, jnp.float32(0.1), 90),  # where 1 - float32(0.1) is below 0.9
        (196, 0.5, 98),
        (197, 0.5, 98),
        (196, 0.75, 49),
        (10, 0.999, 1),
        (3, 1e-7, 2),
        (0, 0.5, 0),
        (10, 0, 10),
    ],
)
def test_length_of_a_rate(tokens, rate, keep):
    for prefix in (0, 1):
        x = jnp.ones((2, tokens + prefix))
        made = jax.eval_shape(lambda x=x, p=prefix: dropjax.token_dropout(KEY, x, rate, num_prefix_tokens=p))
        assert made.tokens.shape == made.indices.shape == (2, keep + prefix)


def test_gradient_is_the_scatter_of_the_kept(key):
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(4, 4, 3)), jnp.float32)

    def loss(x):
        return (dropjax.token_dropout(key, x, num_keep=3, num_prefix_tokens=1).tokens * weights).sum()

    indices = dropjax.token_dropout(key, X, num_keep=3, num_prefix_tokens=1).indices
    wanted = np.zeros(X.shape, np.float32)
    for b, i in itertools.product(range(4), range(4)):
        wanted[b, indices[b, i]] += weights[b, i]
    for found in [jax.grad(loss)(X), jax.jit(jax.grad(jax.checkpoint(loss)))(X)]:
        np.testing.assert_array_equal(found, wanted)
    value, tangent = jax.jvp(loss, (X,), (X,))
    assert value == tangent
    _, backward = jax.vjp(lambda x: dropjax.token_dropout(key, x, 0.5).tokens, X)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes"))
    assert kept <= 4 * 3 * 4  # the indices


def test_jit_vmap_scan_and_keys(key):
    keys = jax.random.split(key, 3)
    one = [dropjax.token_dropout(k, X, 0.5) for k in keys]
    drop = jax.jit(lambda k: dropjax.token_dropout(k, X, 0.5))
    many = jax.vmap(drop)(keys)
    _, scanned = jax.lax.scan(lambda c, k: (c, drop(k)), 0, keys)
    for i in range(3):
        for found in [drop(keys[i]), jax.tree.map(lambda a: a[i], many), jax.tree.map(lambda a: a[i], scanned)]:  # noqa: B023
            np.testing.assert_array_equal(found.indices, one[i].indices)
            np.testing.assert_array_equal(found.tokens, one[i].tokens)
    assert not (one[0].indices == one[1].indices).all()
    over_x = jax.vmap(lambda x: dropjax.token_dropout(key, x, 0.5, token_axis=0, batch_axes=()))(X)
    assert (over_x.indices == over_x.indices[:1]).all()  # vmap is a loop: one key, one choice


def test_pieces_and_shards_choose_as_the_whole(key):
    x = jnp.concatenate([X, X + 1])
    whole = dropjax.token_dropout(key, x, 0.5, num_prefix_tokens=1)
    pieces = [dropjax.token_dropout(key, x[i : i + 4], 0.5, num_prefix_tokens=1, start={0: i}) for i in (0, 4)]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def cut(dims):
        spec = P("data") if 0 in dims else P(None, None, "data")
        drop = jax.shard_map(
            lambda x: tuple(dropjax.token_dropout(key, x, 0.5, num_prefix_tokens=1, sharded_dims=dims)),
            mesh=mesh, in_specs=spec, out_specs=(spec, P("data") if 0 in dims else P()),
        )  # fmt: skip
        return jax.jit(drop)

    for found in [jax.tree.map(lambda *a: jnp.concatenate(a), *pieces), cut({0: "data"})(x)]:
        np.testing.assert_array_equal(found[0], whole.tokens)
        np.testing.assert_array_equal(found[1], whole.indices)
    wide = jnp.concatenate([x, x, x], 2)[:, :, :8]
    np.testing.assert_array_equal(
        cut({2: "data"})(wide)[0], dropjax.token_dropout(key, wide, 0.5, num_prefix_tokens=1).tokens
    )
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
    program = jax.jit(lambda x: dropjax.token_dropout(key, x, 0.5, num_prefix_tokens=1))
    np.testing.assert_array_equal(program(placed).tokens, whole.tokens)
    text = program.lower(placed).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_dtypes_and_empty_arrays(key):
    indices = dropjax.token_dropout(key, X, 0.5).indices
    for dtype in [jnp.bfloat16, jnp.float16, jnp.complex64]:
        tokens = dropjax.token_dropout(key, X.astype(dtype), 0.5)
        assert tokens.tokens.dtype == dtype
        np.testing.assert_array_equal(tokens.indices, indices)
    with jax.enable_x64(True):
        tokens = dropjax.token_dropout(key, np.asarray(X, np.float64), 0.5)
        assert tokens.tokens.dtype == jnp.float64
        assert tokens.indices.dtype == jnp.int32
        np.testing.assert_array_equal(tokens.indices, indices)
    for shape in [(0, 4, 2), (2, 0, 3), (2, 4, 0), (0, 4)]:
        assert dropjax.token_dropout(key, jnp.ones(shape), 0.5).tokens.shape == (shape[0], shape[1] // 2, *shape[2:])


def test_errors():
    def fails(kind, message, **options):
        raises(kind, message, dropjax.token_dropout, KEY, X, **options)

    fails(ValueError, "one of rate and num_keep must be given, got None (NoneType) and None (NoneType).")
    fails(ValueError, "one of rate and num_keep must be given, got 0.5 and 3.", rate=0.5, num_keep=3)
    fails(ValueError, "rate must be in [0, 1), got 1.0. To keep only the prefix, pass num_keep=0.", rate=1.0)
    fails(ValueError, "rate must be in [0, 1), got -0.5.", rate=-0.5)
    fails(ValueError, "rate must be one number, got shape (4,).", rate=np.full(4, 0.5))
    fails(TypeError, "rate must be a number or a float array, got True (bool).", rate=True)
    fails(ValueError, "num_keep must be at least 0, got -1.", num_keep=-1)
    fails(ValueError, "num_keep must be at most 5, the number of tokens, got 6.", num_keep=6, num_prefix_tokens=2)
    fails(TypeError, "num_keep must be an integer, got 2.5.", num_keep=2.5)
    fails(ValueError, "num_prefix_tokens must be at most 7, got 8.", rate=0.5, num_prefix_tokens=8)
    fails(ValueError, "token_axis must be in [-3, 3) for rank 3, got 3.", rate=0.5, token_axis=3)
    fails(ValueError, "token_axis must not be one of batch_axes, got 0 and (0,).", rate=0.5, token_axis=0)
    fails(ValueError, "start and sharded_dims must not be along token_axis", rate=0.5, start={1: 4})
    raises(TypeError, "x must be a float or complex array", dropjax.token_dropout, KEY, jnp.ones((2, 3), int), 0.5)
    raises(TypeError, "key must be a JAX random key, got 0.", dropjax.token_dropout, 0, X, 0.5)
    with pytest.raises(TypeError, match=r"token_dropout: rate must be known while tracing.* Pass num_keep"):
        jax.jit(lambda rate: dropjax.token_dropout(KEY, X, rate))(0.5)
    mesh = jax.make_mesh((7,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for dims, message in [({1: "data"}, "must not be along token_axis"), (None, "x must be accounted for")]:
        drop = jax.shard_map(
            lambda x: dropjax.token_dropout(KEY, x, num_keep=1, sharded_dims=dims).tokens,  # noqa: B023
            mesh=mesh, in_specs=P(None, "data"), out_specs=P(None, "data"),
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            drop(X)


def test_layers(key):
    options = {"num_prefix_tokens": 1, "ordered": False}
    expected = dropjax.token_dropout(key, X, num_keep=2, **options)
    one = dropjax.linen.TokenDropout(num_keep=2, **options)
    two = dropjax.nnx.TokenDropout(num_keep=2, **options)
    for found in [one.apply({}, X, False, key), two(X, rngs=key), jax.jit(lambda k: two(X, rngs=k))(key)]:
        assert all((f == e).all() for f, e in zip(found, expected, strict=True))
    second = dropjax.token_dropout(key, X[2:], num_keep=2, start={0: 2}, **options)
    for found in [one.apply({}, X[2:], False, key, start={0: 2}), two(X[2:], rngs=key, start={0: 2})]:
        np.testing.assert_array_equal(found.indices, second.indices)
        np.testing.assert_array_equal(found.indices, expected.indices[2:])
    drawn = dropjax.nnx.TokenDropout(0.5, rngs=nnx.Rngs(0))(X)
    assert drawn.tokens.shape == (4, 3, 3)
    assert dropjax.linen.TokenDropout(0.5).apply({}, X, False, rngs={"dropout": key}).tokens.shape == (4, 3, 3)
    for whole in [one.apply({}, X, True), two(X, deterministic=True), dropjax.nnx.TokenDropout(0.0)(X, rngs=key)]:
        np.testing.assert_array_equal(whole.tokens, X)
        np.testing.assert_array_equal(whole.indices, np.tile(np.arange(7), (4, 1)))
    first = dropjax.linen.TokenDropout(0.5, token_axis=0, batch_axes=(1, 2), deterministic=True).apply({}, X)
    np.testing.assert_array_equal(first.indices, np.broadcast_to(np.arange(4), (7, 3, 4)))
    assert hash(one) == hash(dropjax.linen.TokenDropout(num_keep=2, **options))
    for module in [dropjax.linen, dropjax.nnx]:
        with pytest.raises(ValueError, match=r"token_dropout: one of rate and num_keep must be given, got 0.0 and 3"):
            module.TokenDropout(0.0, num_keep=3)
