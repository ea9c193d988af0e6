"""Conformal prediction: the order statistic, the Beta distribution of its coverage, and sets by hand."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dropjax import mc

DRAWS, N, M = 1000, 39, 40
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 8, 9, 19, 20, 99])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.7])
def test_threshold_is_the_order_statistic(n, alpha):
    scores = RNG.permutation(n) + 1.0
    k = math.ceil((n + 1) * (1 - Fraction(str(alpha))))
    assert mc.conformal_threshold(scores, alpha) == (k if k <= n else np.inf)
    if k <= n:  # NumPy's quantile of level k / n
        assert mc.conformal_threshold(scores, alpha) == np.quantile(scores, k / n, method="inverted_cdf")


def test_decimals_are_taken_as_written():
    """1000 (1 - 0.7) is 300.00000000000006 in floats, which would be rounded up to 301."""
    assert mc.conformal_threshold(np.arange(1.0, 1000.0), 0.7) == 300


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_alpha_of_numpy_is_the_decimal_that_it_shows(dtype):
    """float32(0.7) is below 0.7, which would be rounded up to 301."""
    assert mc.conformal_threshold(np.arange(1.0, 1000.0), dtype(0.7)) == 300


def test_threshold_is_one_of_the_scores():
    """Exactly, where the steps of float32 are wide, and where they are infinite."""
    for scores in [1e6 + RNG.uniform(-1, 1, 99), 1e37 * RNG.normal(size=99), [*RNG.normal(size=98), np.inf]]:
        scores = np.asarray(scores, np.float32)
        for alpha in [0.01, 0.05, 0.3]:
            k = math.ceil(100 * (1 - Fraction(str(alpha))))
            assert jax.jit(lambda s, a=alpha: mc.conformal_threshold(s, a))(scores) == np.sort(scores)[k - 1]


def test_coverage_of_intervals_has_the_beta_distribution():
    """With known Gaussian residuals the coverage of each threshold q is 2 Φ(q) - 1 exactly, Beta(k, n + 1 - k)."""
    keys = jax.random.split(jax.random.key(0), DRAWS)

    def one(key, std):
        y = jax.random.normal(key, (N,)) * std
        residuals = mc.conformal_residuals(jnp.zeros(N), y, std=jnp.full(N, std))
        return mc.conformal_intervals(jnp.zeros(1), mc.conformal_threshold(residuals, 0.2), std=jnp.full(1, std))

    low, high = jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, 3.0)
    coverage = stats.norm.cdf(high[:, 0] / 3) - stats.norm.cdf(low[:, 0] / 3)
    assert stats.kstest(coverage, stats.beta(32, N + 1 - 32).cdf).pvalue > 0.001
    assert abs(coverage.mean() - 0.8) < 6 * stats.beta(32, N + 1 - 32).std() / np.sqrt(DRAWS)


def test_coverage_of_sets():
    """Of a badly calibrated classifier, over 1,000 draws of 39 held-out and 40 new examples, within 6 standard errors.

    The covered ones of 40 are Beta-binomial in each draw; where scores are tied, at least that.
    """

    def one(key):
        draw, label, held_out, new = jax.random.split(key, 4)
        z = 2 * jax.random.normal(draw, (N + M, 4))
        y = jax.random.categorical(label, z)
        p = jax.nn.softmax(3 * z)  # too sure
        found = []
        for first, second in [({}, {}), ({"score": "aps"},) * 2, ({"key": held_out}, {"key": new})]:
            options = {"score": "aps"} if first else {}
            threshold = mc.conformal_threshold(mc.conformal_scores(p[:N], y[:N], **options | first), 0.1)
            sets = mc.conformal_sets(p[N:], threshold, **options | second)
            found.append((jnp.take_along_axis(sets, y[N:, None], -1).sum(), sets.sum(-1).mean()))
        return [jnp.stack(of) for of in zip(*found, strict=True)]

    covered, size = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), DRAWS))
    count = stats.betabinom(M, 36, N + 1 - 36)
    error = 6 * count.std() / np.sqrt(DRAWS)
    lac, aps, randomised = covered.mean(0)
    assert abs(lac - count.mean()) < error
    assert abs(randomised - count.mean()) < error
    assert aps > count.mean() - error  # of scores near 1 many are equal
    assert (size.mean(0) > 1).all()
    assert (size.mean(0) < 4).all()


def test_sets_by_hand():
    p = np.array([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]], np.float32)
    labels = np.array([1, 1, 0])
    np.testing.assert_allclose(mc.conformal_scores(p, labels), [0.7, 0.75, 0])
    np.testing.assert_allclose(mc.conformal_scores(p, labels, score="aps"), [0.8, 1, 1])
    np.testing.assert_array_equal(mc.conformal_sets(p, 0.75), [[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(mc.conformal_sets(p, 0.8, score="aps"), [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    assert mc.conformal_sets(p, jnp.inf).all()
    key = jax.random.key(0)
    u = np.asarray(jax.random.uniform(key, (3, 1)))[:, 0]
    randomised = mc.conformal_scores(p, labels, score="aps", key=key)
    np.testing.assert_allclose(randomised, np.array([0.8, 1, 1]) - u * np.array([0.3, 0.25, 1]), rtol=1e-6)


def test_what_is_unknown_is_never_left_out():
    p = jnp.full((2, 4), 0.25).at[0, 0].set(jnp.nan)
    sets = jax.jit(mc.conformal_sets)(p, 0.1)
    np.testing.assert_array_equal(sets, [[True] * 4, [False] * 4])
    threshold = jax.jit(lambda s: mc.conformal_threshold(s, 0.5))(jnp.array([1.0, jnp.nan, 0.0]))
    assert jnp.isnan(threshold)
    assert mc.conformal_sets(jnp.full((1, 4), 0.25), threshold).all()
    scores = jax.jit(mc.conformal_scores)(jnp.full((2, 4), 0.25), jnp.array([0, -1]))
    np.testing.assert_array_equal(scores, [0.75, np.nan])
    assert jnp.isnan(jax.jit(lambda s: mc.conformal_residuals(jnp.ones(1), jnp.ones(1), std=s))(jnp.zeros(1))).all()
    low, high = mc.conformal_intervals(jnp.zeros(2), jnp.inf)
    assert (low == -jnp.inf).all() and (high == jnp.inf).all()  # noqa: PT018


Q = np.full((2, 4), 0.25)
BAD = [
    (mc.conformal_threshold, (np.zeros((2, 2)), 0.1), {}, ValueError, "scores must be of shape [n], got float32[2,2]."),
    (mc.conformal_threshold, (np.zeros(2), 10), {}, ValueError, "in (0, 1), got 10.0. For a percentage, pass 0.1."),
    (mc.conformal_threshold, (np.zeros(2), np.ones(2)), {}, TypeError, "alpha must be a number, got float64[2]."),
    (mc.conformal_threshold, (np.full(2, np.nan), 0.1), {}, ValueError, "scores must not be NaN, got nan."),
    (mc.conformal_threshold, (np.zeros(0), 0.1), {}, ValueError, "scores must hold at least one number, got float"),
    (mc.conformal_scores, (Q, np.zeros(2, int)), {"score": "raps"}, ValueError, "score must be one of ('lac', 'aps')"),
    (
        mc.conformal_scores,
        (Q, np.zeros(2, int)),
        {"key": jax.random.key(0)},
        ValueError,
        "key must be None for score='",
    ),
    (mc.conformal_sets, (Q, np.zeros(2)), {}, ValueError, "threshold must be a scalar, got float64[2]."),
    (mc.conformal_sets, (Q, None), {}, TypeError, "threshold must be a real scalar, got None"),
    (mc.conformal_intervals, (Q, 1j), {}, TypeError, "threshold must be a real scalar, got 1j"),
    (mc.conformal_sets, (Q[0], 0.5), {}, ValueError, "probabilities must be of shape [n, classes], n and classes at"),
    (mc.conformal_sets, (Q * 2, 0.5), {}, ValueError, "probabilities must sum to 1 over the classes, got 2."),
    (mc.conformal_sets, (Q > 0, 0.5), {}, TypeError, "probabilities must be floats, got bool[2,4]."),
    (mc.conformal_residuals, (Q, Q[0]), {}, ValueError, "mean and targets must have one shape, got float32[2,4] and"),
    (mc.conformal_residuals, (Q, Q), {"std": Q * 0}, ValueError, "std must be above 0, got 0. Add the standard devia"),
    (mc.conformal_residuals, (Q, Q), {"std": Q * 1e-39}, ValueError, "the normal numbers of float32, got 2.5e-40. Add"),
    (mc.conformal_intervals, (Q, 1.0), {"std": Q * np.inf}, ValueError, "the normal numbers of float32, got inf."),
    (mc.conformal_sets, (Q, True), {}, TypeError, "threshold must be a real scalar, got True (bool)."),
    (mc.conformal_sets, (Q, [[1], [1, 2]]), {}, TypeError, "threshold must be an array of numbers, got [[1], [1, 2]]"),
    (mc.conformal_intervals, (Q, 1.0), {"std": -Q}, ValueError, "std must be above 0, got -0.25. Add the standard d"),
]


@pytest.mark.parametrize(("function", "args", "options", "kind", "message"), BAD, ids=lambda of: "")
def test_bad_input(function, args, options, kind, message):
    with pytest.raises(kind) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert message in str(caught.value)
