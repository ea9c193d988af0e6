"""drop_block against loops over places, closed forms and enumeration; and against the formulas of its peers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dropjax
from dropjax._checks import Fixed
from dropjax.functional import blocks
from tests import oracle

pytestmark = pytest.mark.usefixtures("quick_compiler")
R = 0.3


def mask_by_loops(words, shape, rate, sizes, whole=False, shared=False):
    """m of a [batch, *space, channels] map: a place is dropped if the block of any seed lies on it."""
    space = shape[1:-1]
    sizes = [min(b, n) if whole else b for b, n in zip(sizes, space, strict=True)]
    lengths = [n + (1 - b if whole else b - 1) for b, n in zip(sizes, space, strict=True)]
    seeds = oracle.words(words, (shape[0], *lengths, 1 if shared else shape[-1]))
    drawn = seeds < gamma(space, sizes, rate, whole) * 2**32
    kept = np.ones(shape, bool)
    for b, *at, c in np.argwhere(drawn):
        first = at if whole else [i - size + 1 for i, size in zip(at, sizes, strict=True)]
        block = tuple(slice(max(i, 0), i + size) for i, size in zip(first, sizes, strict=True))
        kept[(b, *block, slice(None) if shared else c)] = False
    return kept


def gamma(space, sizes, rate, whole):
    """By bisection in float64 of the mean over places of (1 - gamma)^n."""
    n = covers(space, sizes, whole)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ((1 - middle) ** n).mean() > 1 - rate else (low, middle)
    return low


def covers(space, sizes, whole):
    """How many blocks may cover each place, counted one block after another."""
    n = np.zeros(space)
    starts = [range(length - b + 1) if whole else range(1 - b, length) for b, length in zip(sizes, space, strict=True)]
    for at in itertools.product(*starts):
        n[tuple(slice(max(i, 0), i + b) for i, b in zip(at, sizes, strict=True))] += 1
    return n


SHAPES = [
    ((3, 11, 4), 4, (4,)),  # 1D, even
    ((2, 7, 6, 3), (3, 2), (3, 2)),  # 2D
    ((2, 4, 5, 3, 2), 2, (2, 2, 2)),  # 3D
    ((4, 3, 2, 3), 5, (5, 5)),  # blocks longer than the map
    ((64, 5), 7, ()),  # no spatial dimension: dropout
]


@pytest.mark.parametrize(
    ("shape", "size", "sizes", "whole"),
    [(*case, False) for case in SHAPES] + [(*case, True) for case in SHAPES[1:4:2]],
    ids=str,
)
def test_masks_are_those_of_loops_over_blocks(shape, size, sizes, whole, key):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    words = jax.random.key_data(key)
    kept = mask_by_loops(words, shape, R, sizes, whole)
    assert 0 < kept.sum() < kept.size
    y = dropjax.drop_block(key, x, R, block_size=size, whole_blocks=whole)
    np.testing.assert_array_equal(y, np.where(kept, x * oracle.scale(R), np.float32(0)))


def test_counts_normalise(key):
    """The share that was kept, of each example and of the batch, by sums over the loops' mask."""
    shape = (3, 5, 4, 2)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for normalize, axes, whole, shared in [("example", (1, 2, 3), False, True), ("batch", None, True, False)]:
        kept = mask_by_loops(jax.random.key_data(key), shape, 0.6, (2, 2), whole, shared)
        y = dropjax.drop_block(
            key, x, 0.6, block_size=2, whole_blocks=whole, shared_channels=shared, normalize=normalize
        )
        share = kept.mean(axes, keepdims=True)
        np.testing.assert_allclose(y, np.where(kept, x / np.maximum(share, 1e-9), 0), rtol=1e-6)


def test_where_nothing_is_kept_y_and_its_gradient_are_zero(key):
    """At rate 0.999 a map of 4 places is kept with a probability below 0.004, and this key keeps none of either."""
    x = jnp.ones((2, 2, 2, 1))
    run = jax.jit(jax.value_and_grad(lambda x, r: dropjax.drop_block(key, x, r, normalize="example").sum()))
    for rate, y in [(0.999, 0), (1, 0), (0, 8), (1.5, np.nan)]:
        value, gradient = run(x, jnp.float32(rate))
        np.testing.assert_array_equal(value, y)
        np.testing.assert_array_equal(gradient, jnp.full_like(x, y / 8))
    assert (dropjax.drop_block(key, x, 1, normalize="batch") == 0).all()
    assert (dropjax.drop_block(key, x, 0, normalize="batch") == x).all()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("space", "sizes"), [((4,), (2,)), ((2, 3), (2, 2)), ((2,), (3,))])
def test_expected_share_by_enumeration_of_all_seeds(space, sizes, whole):
    """Over every pattern of seeds with its probability: the mean share that is kept is 1 - rate, to 2 n / 2^32."""
    described = blocks.Blocks(tuple(range(1, 1 + len(space))), sizes, whole, ())
    shape = (1, *space, 1)
    t = int(blocks._threshold(Fixed(R), described.covers(shape)))
    seeds, n = described.seeds(shape)[1:-1], covers(space, described.within(shape), whole)
    within = described.within(shape)
    kept = 0.0
    for pattern in itertools.product([False, True], repeat=int(np.prod(seeds))):
        drawn = np.argwhere(np.reshape(pattern, seeds))
        mask = np.ones(space)
        for at in drawn:
            first = at if whole else at - np.array(within) + 1
            mask[tuple(slice(max(i, 0), i + b) for i, b in zip(first, within, strict=True))] = 0
        kept += mask.mean() * (t / 2**32) ** len(drawn) * (1 - t / 2**32) ** (len(pattern) - len(drawn))
    assert abs(kept - (1 - float(np.float32(R)))) < (2 * n.max() + 8) * 2.0**-32


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("space", "sizes"), [((14, 14), (7, 7)), ((56,), (9,)), ((8, 8, 8), (3,) * 3), ((4, 4), (1, 1))]
)
def test_threshold_against_the_closed_form(space, sizes, whole):
    """The mean of (1 - t / 2^32)^n over places is q to within 2 n 2^-32, and arrays find the same t."""
    described = blocks.Blocks(tuple(range(1, 1 + len(space))), sizes, whole, ())
    table = described.covers((1, *space, 1))
    n = covers(space, sizes, whole)
    assert {int(k): int((n == k).sum()) for k in np.unique(n)} == table or not whole
    rates = [1e-6, 0.1, 0.5, 0.9, 0.999]
    fixed = [int(blocks._threshold(Fixed(rate), table)) for rate in rates]
    found = jax.jit(lambda rates: blocks._threshold(rates, table))(jnp.asarray(rates, jnp.float32))
    assert fixed == [int(t) for t in found]
    for rate, t in zip(rates, fixed, strict=True):
        q = 1 - float(np.float32(rate))
        assert abs(((1 - t / 2**32) ** n).mean() - q) < (2 * n.max() + len(table) + 1) * 2.0**-32
    if sizes == (1, 1):
        assert fixed == [oracle.threshold(rate) for rate in rates]  # blocks of one place are dropout


def test_mean_share_of_whole_blocks_and_of_corners(key):
    """A batch's mean lies within 6 standard errors, of the batch's own spread, and a corner drops gamma."""
    x = jnp.ones((4000, 6, 6, 1))
    kept = np.asarray(dropjax.drop_block(key, x, R, block_size=3, whole_blocks=True) != 0)[..., 0]
    shares = kept.mean((1, 2))
    assert abs(shares.mean() - (1 - R)) < 6 * shares.std() / np.sqrt(len(x))
    chance = gamma((6, 6), (3, 3), R, True)
    for corner in [kept[:, 0, 0], kept[:, -1, -1], kept[:, 0, -1]]:
        assert abs(corner.mean() - (1 - chance)) < 6 * np.sqrt(chance * (1 - chance) / len(x))


def test_shards_over_batch_space_and_channels(key):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 6, 4)), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cases = [
        ("expected", False, P(None, "a", "b"), {1: "a", 2: "b"}),
        ("batch", True, P("b", "a", None), {0: "b", 1: "a"}),
    ]
    for normalize, shared, spec, dims in cases:
        options = {"block_size": 3, "normalize": normalize, "shared_channels": shared}
        piece = jax.shard_map(
            lambda x: dropjax.drop_block(key, x, R, sharded_dims=dims, **options),  # noqa: B023
            mesh=mesh, in_specs=spec, out_specs=spec,
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(piece)(x), dropjax.drop_block(key, x, R, **options))
    dx = jax.jit(jax.grad(lambda x: piece(x).sum()))(x)
    np.testing.assert_array_equal(dx, dropjax.drop_block(key, jnp.ones_like(x), R, **options))


def test_pieces_of_space_and_of_the_batch(key):
    x = jnp.ones((4, 8, 6, 2))
    whole = dropjax.drop_block(key, x, R, block_size=3)
    part = dropjax.drop_block(key, x[1:, 2:, 3:5], R, block_size=3, start={0: 1, 1: 2, 2: 3})
    np.testing.assert_array_equal(part, whole[1:, 2:, 3:5])
    whole = dropjax.drop_block(key, x, R, block_size=3, whole_blocks=True, normalize="example")
    part = dropjax.drop_block(key, x[1:], R, block_size=3, whole_blocks=True, normalize="example", start={0: 1})
    np.testing.assert_array_equal(part, whole[1:])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0."),
        ({"block_size": 2.5}, TypeError, "block_size must be an integer, got 2.5."),
        ({"block_size": (3, 3, 3)}, ValueError, "block_size must be one number or one for each of the 2 spatial dim"),
        ({"normalize": "mean"}, ValueError, "normalize must be one of ('expected', 'example', 'batch'), got 'mean'"),
        ({"normalize": "batch", "start": {0: 2}}, ValueError, "start must not be along what is counted, (0, 1, 2, 3)"),
        ({"normalize": "example", "start": {-1: 2}}, ValueError, "start must not be along what is counted, (1, 2, 3)"),
        ({"whole_blocks": True, "start": {1: 2}}, ValueError, "whole_blocks must be False where start or sharded_dims"),
        ({"start": {1: 2**32 - 5}}, ValueError, "indices must be below 2^32, got 4294967291 to 4294967299 along dim"),
        ({"rate": jnp.full((2, 3, 1, 1), 0.5)}, ValueError, "rate must be the same in all places that a block can"),
        ({"rate": jnp.full((2,), 0.5), "shared_channels": True}, ValueError, "rate must be the same in all places"),
    ],
    ids=str,
)
def test_errors(options, kind, message, key):
    with pytest.raises(kind) as caught:
        dropjax.drop_block(key, jnp.ones((2, 3, 3, 2)), **{"rate": 0.5, **options})
    assert str(caught.value).startswith("drop_block: " + message)


def test_peers_drop_another_share():
    """The closed forms that docs/variants.md gives for a 14 x 14 map, block 7, rate 0.1.

    timm's default draws seeds in the whole map, each the centre of a block that the border may cut.
    """
    whole = covers((14, 14), (7, 7), True)
    theirs = 0.1 * 14 * 14 / (7**2 * (14 - 7 + 1) ** 2)
    reach = np.array([min(i, 3) + min(13 - i, 3) + 1 for i in range(14)])
    np.testing.assert_allclose(1 - ((1 - theirs) ** whole).mean(), 0.093, atol=5e-4)
    np.testing.assert_allclose(1 - ((1 - theirs) ** np.outer(reach, reach)).mean(), 0.209, atol=5e-4)
    ours = gamma((14, 14), (7, 7), 0.1, True)
    np.testing.assert_allclose([ours, 1 - (1 - ours) ** 49], [0.0068, 0.283], atol=5e-4)


def test_torchvisions_formula_on_its_own_seeds():
    """With torch: padding by half a block and a maximum are, for an odd block, whole blocks that begin at seeds."""
    torch = pytest.importorskip("torch")
    seeds = np.random.default_rng(0).random((2, 1, 5, 6)) < 0.1
    padded = torch.nn.functional.pad(torch.tensor(seeds, dtype=torch.float32), [1] * 4)
    theirs = 1 - torch.nn.functional.max_pool2d(padded, 3, 1, 1).numpy()
    kept = np.ones((2, 1, 7, 8))
    for b, c, i, j in np.argwhere(seeds):
        kept[b, c, i : i + 3, j : j + 3] = 0
    np.testing.assert_array_equal(theirs, kept)
