"""Judging uncertainty at the ends of what numbers hold: narrow labels, infinities, and what is wrong under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dropjax import mc
from dropjax.mc import calibration

RNG = np.random.default_rng(0)
MANY = RNG.dirichlet(np.ones(300), 40).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.uint32])
def test_labels_of_any_integer_dtype(dtype):
    """With more classes than a narrow dtype can count they are the same labels; -1 and 2^32 - 1 are none."""
    labels = RNG.integers(0, 127, 40)

    @jax.jit
    def judge(labels):
        scores = [mc.brier(MANY, labels), mc.negative_log_likelihood(MANY, labels)]
        logits = jnp.log(MANY)
        scores += [mc.negative_log_likelihood(logits, labels, logits=True), mc.calibration_error(MANY, labels)]
        fitted = mc.fit_temperature(logits, labels).temperature
        return *scores, fitted, mc.conformal_scores(MANY, labels).mean(), mc.reliability(MANY, labels).accuracy

    expected = jax.tree.leaves(judge(labels.astype(np.int32)))
    for found, other in zip(judge(labels.astype(dtype)), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-6)
    np.testing.assert_allclose(mc.brier(MANY, labels.astype(dtype)), expected[0], rtol=1e-6)
    if dtype in (np.int8, np.uint32):
        wrong = labels.astype(dtype)
        wrong[3] = np.array(-1).astype(dtype)
        assert all(jnp.isnan(of).all() for of in judge(wrong))


def test_a_diagram_of_what_is_wrong_has_no_numbers():
    for p, labels in [(MANY, jnp.zeros(40, int).at[3].set(-1)), (jnp.asarray(MANY).at[3].mul(3), jnp.zeros(40, int))]:
        bins = jax.jit(mc.reliability)(p, labels)
        assert jnp.isnan(bins.confidence).all()
        assert jnp.isnan(bins.accuracy).all()
        assert all(
            jnp.isnan(jax.jit(lambda p, y, n=n: mc.calibration_error(p, y, norm=n))(p, labels)) for n in ("l1", "max")
        )


def test_a_confidence_at_the_end_of_a_bin_is_in_it():
    """(b / bins, (b + 1) / bins]: float32(0.6) * 25 is above 15, and the float after 0.9 times 10 is not above 9."""
    for num_bins in (10, 13, 25):
        ends = (np.arange(1, num_bins) / num_bins).astype(np.float32)
        ends = ends[ends > 0.51]
        for confidence, bin in [(ends, 0), (np.nextafter(ends, 2, dtype=np.float32), 1)]:
            p = np.stack([confidence, 1 - confidence], 1)
            size = mc.reliability(p, np.zeros(len(p), int), num_bins=num_bins).size
            last = num_bins - 1 - (1 - bin)
            np.testing.assert_array_equal(size[last - len(p) + 1 : last + 1], 1)
            assert size.sum() == len(p)


def test_examples_times_classes_may_be_more_than_int32_holds(monkeypatch):
    """As if each of 6 classes had 2^30 examples, whose confidence is 1 and accuracy 0."""
    bins = calibration.Reliability(jnp.ones(1), jnp.zeros(1), jnp.full(1, 2**30, jnp.int32))
    monkeypatch.setattr(calibration, "_binned", lambda *_: bins)
    assert mc.calibration_error(np.full((1, 6), 1 / 6), np.zeros(1, int), num_bins=1, classwise=True) == 1


def test_infinite_losses_and_far_targets():
    curve = mc.risk_coverage(jnp.array([1.0, 2, 3]), jnp.array([0, np.inf, 1]))
    np.testing.assert_array_equal(curve.risk, [0, np.inf, np.inf])
    assert jnp.isposinf(curve.aurc)
    tied = mc.risk_coverage(jnp.array([1.0, 2, 2, 0]), jnp.array([3, np.inf, 1, 1])).risk
    np.testing.assert_array_equal(tied, [1, 2, np.inf, np.inf])
    for std, far in [(1e-30, 1e10), (0.0, 1e10), (0.0, 0.0), (1e-4, 1e3)]:
        score = mc.crps_gaussian(jnp.zeros(1), jnp.full(1, std), jnp.full(1, far))
        np.testing.assert_allclose(score, far - std / np.sqrt(np.pi), rtol=1e-6)


def test_temperatures_stay_in_their_bounds():
    """All labels have the highest, or the lowest logit, also where logits differ by more than float32 holds."""
    for size in [4.0, 3e38]:
        logits = np.array([[size, -size]] * 4, np.float32)
        with pytest.warns(UserWarning, match="has no maximum"):
            low, high = (mc.fit_temperature(logits, np.full(4, k)) for k in (0, 1))
        assert low.temperature == np.float32(0.01)
        assert high.temperature == 100
        assert low.at_bound
        assert high.at_bound
    with pytest.warns(UserWarning, match="has no maximum"):
        assert mc.fit_temperature(np.zeros((4, 2), np.float32), np.zeros(4, int)).temperature == np.float32(0.01)
    for bounds in [(5.0,), 5.0, ("a", "b"), None]:
        with pytest.raises(ValueError, match=r"fit_temperature: bounds must be two numbers, 0 < low < high"):
            mc.fit_temperature(logits, np.zeros(4, int), bounds=bounds)
    with pytest.raises(TypeError, match=r"classify: fn must return logits, .* of at least one class"):
        mc.classify(lambda key: jax.random.normal(key, (3, 0)), jax.random.key(0), 2)


BIG = np.array([3 * 10**9, 5 * 10**9, -(2**40)])  # int64, which JAX would wrap around
OF_INTEGERS = {
    "interval_coverage": lambda a: mc.interval_coverage(a - 5, a + 1000, a),
    "pinball": lambda a: mc.pinball(a, a + 10**6, 0.5),
    "crps": lambda a: mc.crps(np.stack([a, a + 2000]), a),
    "crps_gaussian": lambda a: mc.crps_gaussian(a, a * 0 + 1, a + 10**6),
    "risk_coverage": lambda a: mc.risk_coverage(a, a),
    "detection": lambda a: mc.detection(a, -a),
    "conformal_threshold": lambda a: mc.conformal_threshold(a, 0.4),
    "conformal_residuals": lambda a: mc.conformal_residuals(a, a[::-1], std=abs(a)),
    "conformal_intervals": lambda a: mc.conformal_intervals(a, a[0]),
    "conformal_sets": lambda a: mc.conformal_sets(np.float32([[0.5, 0.5]]), a[0]),
    "temperature_scale": lambda a: mc.temperature_scale(np.float32([1, 2]), a[0]),
    "regress": lambda a: mc.regress(lambda key: jnp.zeros(3), jax.random.key(0), 1, targets=a, precision=abs(a)),
    "lists": lambda a: mc.pinball(a.tolist(), (a + 10**6).tolist(), 0.5),
}


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers_that_int32_does_not_hold(name):
    call = OF_INTEGERS[name]
    jax.tree.map(np.testing.assert_array_equal, call(BIG), call(BIG.astype(np.float64)))
    with pytest.raises(ValueError, match=r"brier: labels must be in \[0, 2\), got 4294967296\."):
        mc.brier(np.array([[0.5, 0.5]]), np.array([2**32]))


def test_nothing_that_is_known_has_no_warning_of_what_it_looks_like(recwarn):
    """No logits at all, and none but NaN, are no probabilities; nor is a temperature of NaN at a bound."""
    key, noise = jax.random.key(0), lambda key: jax.random.normal(key)
    mc.classify(lambda key: jnp.zeros((0, 3)) + noise(key), key, 2)
    assert not recwarn
    assert mc.classify(lambda key: jnp.full((1, 3), jnp.nan) * noise(key), key, 2).invalid.all()
    fitted = mc.fit_temperature(jnp.array([[jnp.nan, 1], [0, 1]]), np.array([0, 1]))
    assert np.isnan(fitted.temperature)
    assert not fitted.at_bound
    assert [str(of.message)[:36] for of in recwarn] == ["classify: fn returned logits without"]
