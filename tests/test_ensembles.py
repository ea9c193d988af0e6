"""Masksembles, samples of a head, and the divergence of two draws, against closed forms and enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy import special, stats

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax.functional import ensembles
from tests.test_errors import KEY, X, raises

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.mark.parametrize(
    ("features", "count", "scale"), [(64, 4, 2.0), (12, 4, 3.0), (10, 3, 1.5), (33, 2, 6.0), (5, 1, 4.0), (7, 4, 1)]
)
def test_masks_have_one_size_and_use_every_feature(features, count, scale):
    masks = np.asarray(dropjax.masksembles_masks(KEY, features, count, scale))
    assert masks.shape == (count, features)
    assert masks.dtype == bool
    assert masks.any(0).all()
    assert len(set(masks.sum(1))) == 1
    by_formula = features / (scale * (1 - (1 - 1 / scale) ** count))  # the paper's, for the ones of a mask
    assert abs(masks.sum(1)[0] - by_formula) < 1
    np.testing.assert_array_equal(dropjax.masksembles_masks(KEY, features, count, scale), masks)
    jitted = jax.jit(lambda key: dropjax.masksembles_masks(key, features, count, scale))
    np.testing.assert_array_equal(jitted(KEY), masks)


def test_two_masks_share_what_their_sizes_say():
    masks = np.asarray(dropjax.masksembles_masks(KEY, 100, 2, 2.0))
    assert (masks[0] & masks[1]).sum() == 2 * masks[0].sum() - 100


def expected_overlap(features, count, ones, places):
    """E[ones that masks 1 and 2 share | exactly `features` places are used], by summing over all ways to get there."""
    chain = np.zeros(
        (features + 1, features + 1)
    )  # over how many are used after mask k, given the use of masks 1 and 2
    after_two = {}
    for shared in range(ones + 1):
        if (used := 2 * ones - shared) <= features:
            after_two[used] = stats.hypergeom.pmf(shared, places, ones, ones)
    total = weighted = 0.0
    for used, chance in after_two.items():
        chain = np.zeros(features + 1)
        chain[used] = chance
        for _ in range(count - 2):
            following = np.zeros(features + 1)
            for now in np.flatnonzero(chain):
                for new in range(min(ones, features - now) + 1):
                    following[now + new] += chain[now] * stats.hypergeom.pmf(ones - new, places, now, ones)
            chain = following
        total += chain[features]
        weighted += chain[features] * (2 * ones - used)
    return weighted / total


def test_the_mean_overlap_is_that_of_enumeration_and_near_the_papers_scale():
    """400 sets of 4 masks: 6 standard errors of the sets' means; and m / scale up to the rounding of sizes."""
    features, count, scale, n = 24, 4, 2.0, 400
    ones, places = ensembles._sizes(features, count, scale)
    draw = jax.vmap(functools.partial(dropjax.masksembles_masks, num_features=24, num_masks=4, scale=scale))
    masks = np.asarray(draw(jax.random.split(KEY, n)), float)
    assert (masks.sum(2) == ones).all()
    shared = np.einsum("nif,njf->nij", masks, masks)[:, *np.triu_indices(count, 1)].mean(1)
    expected = expected_overlap(features, count, ones, places)
    assert abs(shared.mean() - expected) < 6 * shared.std() / np.sqrt(n)
    assert abs(expected - ones / scale) < 0.5
    per_feature = masks.mean((0, 1))  # no feature is kept more often than another, in any mask
    assert np.abs(per_feature - ones / features).max() < 6 * np.sqrt(0.25 / (n * count))
    assert np.abs(masks.mean((0, 2)) - ones / features).max() < 1e-6


def test_sizes_can_be_met_and_scales_are_near():
    """The masks are drawn until they fit: for any request the sizes must make that likely (exact chance by chain)."""
    for features, count, scale in [(1, 1, 1.0), (2, 4, 3.0), (10, 4, 2.0), (16, 8, 100.0), (31, 3, 1.05), (64, 4, 6.0)]:
        ones, places = ensembles._sizes(features, count, scale)
        chance = np.zeros(features + 1)
        chance[ones] = 1
        for _ in range(count - 1):
            following = np.zeros(features + 1)
            for now in np.flatnonzero(chance):
                new = np.arange(min(ones, features - now) + 1)
                following[now + new] += chance[now] * stats.hypergeom.pmf(ones - new, places, now, ones)
            chance = following
        assert chance[features] > 0.05


MASKS = jnp.array([[True, False, True], [False, True, True]])


def test_examples_have_the_mask_of_their_member():
    x = jnp.arange(1.0, 13).reshape(4, 3)
    np.testing.assert_array_equal(dropjax.masksembles(x, MASKS), np.where(np.repeat(MASKS, 2, 0), x, 0))
    cyclic = np.asarray(MASKS)[[0, 1, 0, 1]]
    members = jnp.arange(4) % 2
    np.testing.assert_array_equal(dropjax.masksembles(x, MASKS, members=members), np.where(cyclic, x, 0))
    np.testing.assert_array_equal(dropjax.masksembles(x, MASKS, members=1), np.where(MASKS[1], x, 0))
    images = jnp.ones((3, 2, 4, 4), jnp.bfloat16)  # [channels, ..., batch, ...]
    y = dropjax.masksembles(images, MASKS, channel_axis=0, batch_axis=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[:, 1, :, 3].astype(jnp.float32), np.repeat(MASKS, 2, 0).T)
    slope = jax.grad(lambda x: dropjax.masksembles(x, MASKS).sum())(x.at[0, 1].set(jnp.inf))
    np.testing.assert_array_equal(slope, np.repeat(MASKS, 2, 0))
    traced = jax.jit(lambda members: dropjax.masksembles(x, MASKS, members=members))(jnp.array([0, 1, 2, -1]))
    np.testing.assert_array_equal(
        np.isnan(traced), np.array([[False], [False], [True], [True]]) & np.ones((4, 3), bool)
    )
    assert dropjax.masksembles(jnp.zeros((0, 3)), MASKS).shape == (0, 3)


def test_all_members_of_a_network(key):
    x = {"x": jnp.ones((5, 3))}
    found = jax.jit(lambda x: dropjax.masksembles_samples(lambda x: dropjax.masksembles(x["x"], MASKS), x, 2))(x)
    np.testing.assert_array_equal(found, np.broadcast_to(np.asarray(MASKS)[:, None], (2, 5, 3)))


def test_layers_hold_their_masks(key):
    x = jnp.ones((8, 12))
    linen = nn.Sequential([dropjax.linen.Masksembles(4, 2.0), dropjax.linen.Masksembles(4, 2.0)])
    variables = jax.jit(linen.init)(key, x)
    assert set(variables) == {"masksembles"}
    first, second = (variables["masksembles"][f"layers_{i}"]["masks"] for i in (0, 1))
    assert (first != second).any()
    expected = dropjax.masksembles(dropjax.masksembles(x, first), second)
    np.testing.assert_array_equal(linen.apply(variables, x), expected)
    layer = nnx.jit(lambda: dropjax.nnx.Masksembles(12, 4, 2.0, rngs=nnx.Rngs(0)))()
    masks = layer.masks[...]
    np.testing.assert_array_equal(layer(x), dropjax.masksembles(x, masks))
    np.testing.assert_array_equal(layer(x, members=3), dropjax.masksembles(x, masks, members=3))
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert masks.shape == (4, 12)


def test_errors_of_masksembles():
    draw, apply, samples = dropjax.masksembles_masks, dropjax.masksembles, dropjax.masksembles_samples
    raises(ValueError, "scale must be in [1, 100], got 0.5.", draw, KEY, 12, 4, 0.5)
    raises(ValueError, "scale must be in [1, 100], got nan.", draw, KEY, 12, 4, np.nan)
    raises(TypeError, "scale must be a number, got '2' (str).", draw, KEY, 12, 4, "2")
    raises(ValueError, "num_features must be at least 1, got 0.", draw, KEY, 0, 4, 2.0)
    raises(TypeError, "num_masks must be an integer, got 2.5.", draw, KEY, 12, 2.5, 2.0)
    raises(TypeError, "key must be a JAX random key, got 12.", draw, 12, 4, 2, 2.0)
    message = "the batch must be a multiple of the 2 masks, got 3 examples. Pass members=jnp.arange(3) % 2, or one"
    raises(ValueError, message, apply, jnp.ones((3, 3)), MASKS)
    raises(ValueError, "masks must be bool [num_masks, 3] for x of shape (2, 3), got float32[2,3].", apply, X, X)
    raises(ValueError, "masks must be bool [num_masks, 3] for x of shape (2, 3), got bool[3].", apply, X, MASKS[0])
    raises(ValueError, "members must be in [0, 2), got 0 to 2.", apply, X, MASKS, members=np.array([0, 2]))
    raises(TypeError, "members must be integers of shape (2,), one for", apply, X, MASKS, members=np.zeros(3, int))
    raises(TypeError, "members must be integers of shape (2,), one for", apply, X, MASKS, members=0.5)
    raises(ValueError, "batch_axis and channel_axis must differ, got 0 and -2.", apply, X, MASKS, channel_axis=-2)
    raises(TypeError, "fn must be a function of a batch, got float32[2,3].", samples, X, X, 2)
    raises(ValueError, "fn must return arrays [4, ...], one for each example, got float32[].", samples, jnp.sum, X, 2)
    raises(ValueError, "x must be arrays [batch, ...] of one batch, got ", samples, jnp.sum, (X, jnp.ones(3)), 2)


def test_members_of_narrow_integers_and_of_shards():
    """Narrow integers do not wrap round the number of masks, and no device groups its own piece."""
    many = jnp.asarray(np.eye(300, dtype=bool))
    for members in (np.array([44, 100], np.uint8), np.array([44, -1], np.int8)):
        y = jax.jit(lambda members: dropjax.masksembles(jnp.ones((2, 300)), many, members=members))(members)
        np.testing.assert_array_equal(y[0], np.arange(300) == 44)
        np.testing.assert_array_equal(y[1], np.arange(300) == 100 if members[1] > 0 else np.full(300, np.nan))
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    x, members = jnp.ones((4, 3)), jnp.array([0, 0, 1, 1])
    for check in (True, False):
        shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("a"), check_vma=check)
        with pytest.raises(ValueError, match="masksembles: members must be given inside shard_map"):
            shard(lambda x: dropjax.masksembles(x, MASKS), in_specs=P("a"))(x)
        y = shard(lambda x, m: dropjax.masksembles(x, MASKS, members=m), in_specs=P("a"))(x, members)
        np.testing.assert_array_equal(y, dropjax.masksembles(x, MASKS))


def test_multi_sample_dropout_is_the_head_of_each_draw(key):
    x, head = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), jnp.ones((6, 2))
    run = jax.jit(
        lambda x, rate: dropjax.multi_sample_dropout(key, lambda x: jnp.tanh(x @ head), x, rate, num_samples=3)
    )
    found = run(x, jnp.float32(0.5))
    expected = [jnp.tanh(dropjax.dropout(own, x, 0.5) @ head) for own in jax.random.split(key, 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert jnp.isnan(run(x, jnp.float32(2))).all()
    piece = dropjax.multi_sample_dropout(key, lambda x: x, x[2:], 0.5, num_samples=3, start={0: 2})
    np.testing.assert_array_equal(piece, dropjax.multi_sample_dropout(key, lambda x: x, x, 0.5, num_samples=3)[:, 2:])
    draw = dropjax.multi_sample_dropout
    raises(ValueError, "num_samples must be at least 1, got 0.", draw, key, lambda x: x, x, 0.5, num_samples=0)
    raises(TypeError, "fn must be a function of x, got float32[4,6].", draw, key, x, lambda x: x, 0.5, num_samples=2)
    raises(ValueError, "rate must be in [0, 1], got 1.5.", draw, key, lambda x: x, x, 1.5, num_samples=2)
    raises(TypeError, "x must be a float or complex array", draw, key, lambda x: x, jnp.arange(3), 0.5, num_samples=2)


def test_divergence_is_that_of_scipy_and_of_bernoulli_variables():
    rng = np.random.default_rng(0)
    p, q = (rng.normal(size=(50, 7)).astype(np.float32) * 3 for _ in range(2))
    a, b = (special.softmax(logits.astype(np.float64), -1) for logits in (p, q))
    expected = (special.rel_entr(a, b) + special.rel_entr(b, a)).sum(-1) / 2
    np.testing.assert_allclose(dropjax.symmetric_kl(p, q), expected, rtol=1e-5)
    np.testing.assert_allclose(dropjax.symmetric_kl(p.T, q.T, axis=0), expected, rtol=1e-5)
    s, t = rng.normal(size=(2, 50)).astype(np.float32)
    two = [jnp.stack([jnp.zeros(50), jnp.asarray(logit)], -1) for logit in (s, t)]
    closed = (special.expit(s) - special.expit(t)) * (s - t) / 2  # of Bernoulli variables with these log odds
    np.testing.assert_allclose(dropjax.symmetric_kl(*two), closed, rtol=2e-5, atol=1e-9)


def test_divergence_near_and_far():
    """No cancellation near equality: to second order it is the variance of the difference, d^2 p (1 - p) / 2."""
    equal = jnp.array([[0.3, -2.0, 5.0]])
    assert dropjax.symmetric_kl(equal, equal) == 0
    d = np.float32(2.0**-12)
    near = dropjax.symmetric_kl(jnp.array([0.0, 0.0]), jnp.array([0.0, d]))
    np.testing.assert_allclose(near, d**2 / 8, rtol=1e-3)
    far = dropjax.symmetric_kl(jnp.array([0.0, 1e4]), jnp.array([1e4, 0.0]))
    np.testing.assert_allclose(far, 1e4, rtol=1e-6)
    impossible = jnp.array([0.5, -jnp.inf, 1.0])
    np.testing.assert_array_equal(
        dropjax.symmetric_kl(impossible, jnp.array([1.0, -jnp.inf, 2.0])),
        dropjax.symmetric_kl(impossible[::2], jnp.array([1.0, 2.0])),
    )
    slope = jax.grad(dropjax.symmetric_kl)(impossible, jnp.array([0.0, -jnp.inf, 1.0]))
    assert jnp.isfinite(slope).all()
    assert dropjax.symmetric_kl(impossible, jnp.zeros(3)) == jnp.inf
    tail = jnp.array([0.0, -200.0])  # a probability that float32 does not hold is not 0
    for p, q in [(tail, jnp.array([0.0, -jnp.inf])), (jnp.array([0.0, -jnp.inf]), tail)]:
        value, slopes = jax.value_and_grad(dropjax.symmetric_kl, (0, 1))(p, q)
        assert value == jnp.inf
        assert jnp.isfinite(jnp.stack(slopes)).all()
    random = jax.random.normal(KEY, (2, 1000, 3))
    near = random[0] + 1e-6 * random[1]
    assert (dropjax.symmetric_kl(random[0], near) >= 0).all()
    assert dropjax.symmetric_kl(random[0].astype(jnp.bfloat16), random[1].astype(jnp.bfloat16)).dtype == jnp.float32


def test_gradients_of_the_divergence():
    """Against central differences in float64, and at equality the second derivative, the variance matrix of p."""
    with jax.enable_x64(True):
        p, q = np.random.default_rng(0).normal(size=(2, 5))
        slope, h = jax.grad(dropjax.symmetric_kl)(p, q), 1e-5
        shifted = [[dropjax.symmetric_kl(p + s * h * e, q) for e in np.eye(5)] for s in (1, -1)]
        np.testing.assert_allclose(slope, (np.array(shifted[0]) - np.array(shifted[1])) / (2 * h), rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(jax.grad(dropjax.symmetric_kl)(p, p), np.zeros(5))
        of = special.softmax(p)
        curvature = jax.hessian(dropjax.symmetric_kl)(jnp.asarray(p), jnp.asarray(p))
        np.testing.assert_allclose(curvature, np.diag(of) - np.outer(of, of), atol=1e-12)


def test_r_drop_is_two_draws_of_one_batch(key):
    x, calls = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), []

    def fn(key):
        calls.append(1)
        return dropjax.dropout(key, x, 0.5)

    logits, divergence = jax.jit(lambda key: dropjax.r_drop(fn, key))(key)
    assert len(calls) == 1
    expected = jnp.stack([dropjax.dropout(own, x, 0.5) for own in jax.random.split(key)])
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_allclose(divergence, dropjax.symmetric_kl(*expected), rtol=1e-5)
    assert dropjax.r_drop(lambda key: x, key).divergence.tolist() == [0, 0, 0, 0]
    assert dropjax.r_drop(fn, key, axis=0).divergence.shape == (6,)
    raises(TypeError, "fn must be a function of a key, got 3.", dropjax.r_drop, 3, key)
    raises(
        TypeError,
        "fn must return logits, a float array [..., classes], got int32[3].",
        dropjax.r_drop,
        lambda key: jnp.arange(3),
        key,
    )
    raises(TypeError, "fn must return logits, a float array", dropjax.r_drop, lambda key: (x, x), key)
    raises(TypeError, "key must be a JAX random key, got 0.", dropjax.r_drop, fn, 0)
    raises(ValueError, "axis must be in [-2, 2) for rank 2, got 2.", dropjax.r_drop, fn, key, axis=2)
    message = "logits_p and logits_q must be of one shape and dtype, got float32[2,3] and float32[3]."
    raises(ValueError, message, dropjax.symmetric_kl, X, X[0])
    raises(TypeError, "x must be a float", dropjax.symmetric_kl, jnp.arange(3), jnp.arange(3))
