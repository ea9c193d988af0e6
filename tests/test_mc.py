"""Monte Carlo dropout: samples, streamed summaries and calibration, against closed forms and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import brier_score_loss

import dropjax
from dropjax import mc

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)


def logits(key):
    return dropjax.dropout(key, X, 0.4) @ WEIGHTS


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 20, 100])
def test_sample_t_is_the_forward_pass_with_the_folded_key(key, chunk_size):
    masks = mc.sample(lambda key: dropjax.keep_mask(key, (4, 6), 0.5), key, 20, chunk_size=chunk_size)
    loop = [dropjax.keep_mask(jax.random.fold_in(key, t), (4, 6), 0.5) for t in range(20)]
    np.testing.assert_array_equal(masks, np.stack(loop))
    samples = jax.jit(lambda key: mc.sample(logits, key, 20, chunk_size=chunk_size))(key)
    np.testing.assert_allclose(samples, np.stack([logits(jax.random.fold_in(key, t)) for t in range(20)]), atol=1e-5)
    np.testing.assert_array_equal(masks[:10], mc.sample(lambda key: dropjax.keep_mask(key, (4, 6), 0.5), key, 10))


def test_samples_are_pytrees(key):
    samples = mc.sample(lambda key: {"a": logits(key), "b": (jnp.ones(2),)}, key, 5, chunk_size=2)
    assert jax.tree.map(jnp.shape, samples) == {"a": (5, 5, 3), "b": ((5, 2),)}


def test_a_linear_layer_under_dropout_has_the_known_mean_and_variance(key):
    """y = sum_i x_i m_i w_i / q: mean x·w and variance sum (x_i w_i)^2 r / (1 - r)."""
    n, rate = 50_000, 0.4
    y = np.asarray(
        mc.sample(lambda key: dropjax.dropout(key, X[0], rate) @ WEIGHTS, key, n, chunk_size=5000), np.float64
    )
    terms = np.asarray(X[0])[:, None] * np.asarray(WEIGHTS)
    mean, variance = terms.sum(0), (terms**2).sum(0) * rate / (1 - rate)
    assert (np.abs(y.mean(0) - mean) < 6 * np.sqrt(variance / n)).all()
    fourth = 3 * variance**2 + (terms**4 * (rate**3 + (1 - rate) ** 3) * rate / (1 - rate) ** 3).sum(0)
    assert (np.abs(y.var(0) - variance) < 6 * np.sqrt(fourth / n)).all()


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 32, 50])
def test_classify_is_the_summary_of_the_samples(key, chunk_size):
    summary = jax.jit(lambda key: mc.classify(logits, key, 50, chunk_size=chunk_size))(key)
    p = np.exp(np.asarray(jax.nn.log_softmax(mc.sample(logits, key, 50)), np.float64))
    np.testing.assert_allclose(summary.probabilities, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(summary.predictive_entropy, stats.entropy(p.mean(0), axis=-1), atol=1e-5)
    np.testing.assert_allclose(summary.expected_entropy, stats.entropy(p, axis=-1).mean(0), atol=1e-5)
    information = stats.entropy(p.mean(0), axis=-1) - stats.entropy(p, axis=-1).mean(0)
    np.testing.assert_allclose(summary.mutual_information, information, atol=1e-5)
    votes = np.stack([np.bincount(row, minlength=3) for row in p.argmax(-1).T])
    np.testing.assert_array_equal(summary.votes, votes)
    np.testing.assert_allclose(summary.variation_ratio, 1 - votes.max(-1) / 50, atol=1e-6)
    variance = np.take_along_axis(p.var(0), p.mean(0).argmax(-1)[:, None], -1)[:, 0]
    np.testing.assert_allclose(summary.variance, variance, rtol=1e-5)
    assert summary.num_samples == 50


def test_hand_made_samples(key):
    """Two members that are certain of different classes: all uncertainty is epistemic, one bit of it."""

    def certain(key):
        return jnp.where(jax.random.bits(key) % 2 == 0, jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]))

    summary = mc.classify(certain, key, 4000)
    assert summary.expected_entropy == 0
    np.testing.assert_allclose(summary.mutual_information, np.log(2), atol=1e-3)
    undecided = mc.classify(lambda key: 0 * jax.random.normal(key, (2,)), key, 10)
    np.testing.assert_allclose(undecided.expected_entropy, np.log(2), rtol=1e-6)
    assert undecided.mutual_information == 0
    assert undecided.variation_ratio == 0
    assert undecided.variance == 0


@pytest.mark.slow
def test_classify_keeps_no_samples(key):
    x = jnp.ones((256, 64))

    def fn(key):
        return dropjax.dropout(key, x, 0.5)

    def memory(chunk_size, num_samples):
        run = jax.jit(lambda key: mc.classify(fn, key, num_samples, chunk_size=chunk_size))
        return run.lower(key).compile().memory_analysis().temp_size_in_bytes

    assert memory(4, 400) <= 1.1 * memory(4, 40)
    assert memory(4, 400) < x.nbytes * 40


def test_narrow_logits_are_summarised_in_float32(key):
    summary = mc.classify(lambda key: logits(key).astype(jnp.bfloat16), key, 10)
    assert all(field.dtype == jnp.float32 for field in summary[:4])


def test_calibration_error_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.85, 0.15], [0.3, 0.7], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 0])
    # ten bins: 0.95 right, 0.85 wrong, 0.7 right, 0.55 wrong, one a bin
    expected = (0.05 + 0.85 + 0.3 + 0.55) / 4
    np.testing.assert_allclose(mc.calibration_error(probabilities, labels, num_bins=10), expected, rtol=1e-6)
    one_bin = abs(0.5 - (0.95 + 0.85 + 0.7 + 0.55) / 4)
    np.testing.assert_allclose(mc.calibration_error(probabilities, labels, num_bins=1), one_bin, rtol=1e-6)


def test_reliability_against_numpy():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 500).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    bins = mc.reliability(probabilities, labels, num_bins=12)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    edges = np.linspace(0, 1, 13)
    for b in range(12):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        assert bins.size[b] == inside.sum()
        if inside.any():
            np.testing.assert_allclose(bins.confidence[b], confidence[inside].mean(), rtol=1e-5)
            np.testing.assert_allclose(bins.accuracy[b], right[inside].mean(), rtol=1e-5)
        else:
            assert jnp.isnan(bins.accuracy[b])


def test_a_calibrated_forecaster_has_little_error_and_an_overconfident_one_much():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    labels = (rng.uniform(size=p.size) > p).astype(int)
    calibrated = np.stack([p, 1 - p], -1)
    # in each of 8 bins the gap has a standard deviation of at most 0.5 / sqrt(2500)
    assert mc.calibration_error(calibrated, labels) < 0.02
    certain = np.stack([np.ones_like(p), np.zeros_like(p)], -1)
    np.testing.assert_allclose(mc.calibration_error(certain, labels), 0.25, atol=0.02)
    assert brier_score_loss(labels, 1 - p) < brier_score_loss(labels, certain[:, 1])


@pytest.mark.slow
def test_calibration_of_narrow_and_many_predictions():
    """Sums neither stall (bfloat16 at 256, float32 at 2^24) nor overflow (float16)."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4) * 0.3, 20_000).astype(np.float32)
    labels = rng.integers(0, 4, 20_000)
    expected = mc.calibration_error(p, labels)
    for dtype in [jnp.bfloat16, jnp.float16]:
        np.testing.assert_allclose(mc.calibration_error(jnp.asarray(p, dtype), labels), expected, atol=0.01)
    n = 2**24 + 2**22
    bins = mc.reliability(jnp.tile(jnp.array([[1.0, 0.0]], jnp.bfloat16), (n, 1)), jnp.zeros(n, jnp.int32))
    np.testing.assert_allclose([bins.accuracy[-1], bins.confidence[-1]], 1, rtol=1e-6)
    assert bins.size[-1] == n


def test_gradients_of_entropies_are_finite_where_a_class_underflows(key):
    extreme = jnp.array([[150.0, 0.0, 1.0]])

    def summary(s):
        return mc.classify(lambda key: dropjax.dropout(key, jnp.ones((1, 3)), 0.5) + s * extreme, key, 8)

    for field in ["predictive_entropy", "expected_entropy", "mutual_information"]:
        assert jnp.isfinite(jax.grad(lambda s: getattr(summary(s), field).sum())(1.0))  # noqa: B023


def test_logits_without_a_softmax_are_reported(key):
    """NaN, +inf and only -inf have none; a class of -inf has probability 0."""
    rows = jnp.array([[0.0, jnp.nan], [0.0, jnp.inf], [-jnp.inf, -jnp.inf], [0.0, -jnp.inf], [1.0, 2.0]])

    def fn(key):
        return jnp.where(jax.random.bernoulli(key, 0.5), rows, jnp.zeros_like(rows))

    inside = jax.jit(lambda key: mc.classify(fn, key, 20, chunk_size=6))(key)
    with pytest.warns(UserWarning, match="classify: fn returned logits without a softmax .* for 3 of 5 inputs"):
        outside = mc.classify(fn, key, 20)
    for summary in [inside, outside]:
        np.testing.assert_array_equal(summary.invalid, [True, True, True, False, False])
        for field in [*summary[:4], summary.variation_ratio, summary.variance]:
            assert jnp.isnan(field[:3]).all()
            assert jnp.isfinite(field[3:]).all()
    tolerant = jax.jit(lambda key: mc.classify(fn, key, 5000, tolerance=0.05))(key)
    assert tolerant.num_samples < 500  # what is invalid does not keep the others waiting


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_samples_with_keys_of_other_implementations(impl):
    key = jax.random.key(0, impl=impl)
    masks = mc.sample(lambda key: dropjax.keep_mask(key, (64,), 0.5), key, 7, chunk_size=3)
    loop = [dropjax.keep_mask(jax.random.fold_in(key, t), (64,), 0.5) for t in range(7)]
    np.testing.assert_array_equal(masks, np.stack(loop))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_summaries_inside_shard_map_and_on_explicit_axes(key, chunk_size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    expected = mc.classify(lambda key: dropjax.dropout(key, x, 0.5), key, 7).probabilities
    cut = jax.sharding.PartitionSpec("data")

    def summary(x, **place):
        return mc.classify(
            lambda key: dropjax.dropout(key, x, 0.5, **place), key, 7, chunk_size=chunk_size
        ).probabilities

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.shard_map(lambda x: summary(x, sharded_dims={0: "data"}), mesh=mesh, in_specs=cut, out_specs=cut)
    np.testing.assert_allclose(jax.jit(shards)(x), expected, atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, cut))
        np.testing.assert_allclose(jax.jit(summary)(placed), expected, atol=1e-6)
