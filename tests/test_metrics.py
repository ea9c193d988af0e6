"""Judging uncertainty: calibration, scores, selection, detection, temperature, against scikit-learn and by counting."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

from dropjax import mc
from dropjax.mc import moments

RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(4) * 0.7, 240).astype(np.float32)
Y = RNG.integers(0, 4, 240)
Z = RNG.normal(size=(300, 5)).astype(np.float32) * 3
LABELS = (Z + RNG.gumbel(size=Z.shape)).argmax(-1)  # drawn from softmax(Z)
OF_P = (np.log(P) + RNG.gumbel(size=P.shape)).argmax(-1)  # drawn from P
CONFIDENCE = np.concatenate([P.max(-1)[:200], np.full(40, 0.5, np.float32)])  # with ties
CALIBRATION = [("equal_width", False), ("equal_mass", False), ("equal_width", True), ("equal_mass", True)]


def two(p):
    """Probabilities whose second class has the probabilities p."""
    return np.stack([1 - p, p], -1).astype(np.float32)


def gaps(confidence, right, num_bins, binning):
    """Sizes and gaps of the bins that are not empty, by a loop."""
    ranks = np.array([(confidence < c).sum() for c in confidence])
    for b in range(num_bins):
        if binning == "equal_width":
            inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins) | (b == 0) & (confidence == 0)
        else:
            inside = (ranks * num_bins >= b * len(ranks)) & (ranks * num_bins < (b + 1) * len(ranks))
        if inside.any():
            yield inside.sum(), abs(right[inside].mean() - confidence[inside].astype(float).mean())


@pytest.mark.parametrize(("binning", "classwise"), CALIBRATION)
def test_calibration_error_is_the_loop_over_bins(binning, classwise):
    p = np.concatenate([P, np.tile([[0.5, 0.25, 0.25, 0]], (60, 1)).astype(np.float32)])  # with ties and zeros
    labels = np.concatenate([Y, Y[:60]])
    pairs = [(p[:, k], labels == k) for k in range(4)] if classwise else [(p.max(-1), p.argmax(-1) == labels)]
    bins = np.array([bin for pair in pairs for bin in gaps(*pair, 7, binning)])
    share, gap = bins[:, 0] / bins[:, 0].sum(), bins[:, 1]
    options = {"num_bins": 7, "binning": binning, "classwise": classwise}
    found = jax.jit(lambda *args: [mc.calibration_error(*args, norm=of, **options) for of in ("l1", "l2", "max")])
    np.testing.assert_allclose(found(p, labels), [share @ gap, np.sqrt(share @ gap**2), gap.max()], atol=2e-6)


@pytest.mark.parametrize(("binning", "strategy"), [("equal_width", "uniform"), ("equal_mass", "quantile")])
def test_reliability_is_the_calibration_curve_of_scikit_learn(binning, strategy):
    """Of two classes with confidence 0.5 to 1; without ties both define equal mass alike where bins divide n."""
    p, wins = RNG.uniform(0.5, 1, 240).astype(np.float32), RNG.integers(0, 2, 240)
    bins = mc.reliability(two(p), wins, num_bins=8, binning=binning)
    accuracy, confidence = calibration_curve(wins, p, n_bins=8, strategy=strategy)
    filled = np.asarray(bins.size) > 0
    np.testing.assert_allclose(bins.accuracy[filled], accuracy, rtol=1e-6)
    np.testing.assert_allclose(bins.confidence[filled], confidence, rtol=1e-6)
    assert binning == "equal_width" or (bins.size == 30).all()


def test_equal_mass_does_not_depend_on_the_order_of_ties():
    p, right = two(0.5 + CONFIDENCE / 2), RNG.integers(0, 2, 240)
    order = RNG.permutation(240)
    for a, b in zip(
        mc.reliability(p, right, binning="equal_mass"),
        mc.reliability(p[order], right[order], binning="equal_mass"),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert mc.reliability(p, right, binning="equal_mass").size.max() >= 40


def test_scores_of_probabilities_are_those_of_scikit_learn():
    np.testing.assert_allclose(mc.negative_log_likelihood(P, Y), metrics.log_loss(Y, P, labels=range(4)), rtol=1e-6)
    np.testing.assert_allclose(mc.brier(P, Y), ((P - np.eye(4)[Y]) ** 2).sum(-1).mean(), rtol=1e-6)
    p, y = CONFIDENCE, RNG.integers(0, 2, 240)
    np.testing.assert_allclose(mc.brier(two(p), y), 2 * metrics.brier_score_loss(y, p), rtol=1e-6)
    assert mc.negative_log_likelihood(np.eye(4, dtype=np.float32), np.arange(4)) == 0
    assert mc.negative_log_likelihood(np.eye(4, dtype=np.float32), np.arange(4)[::-1].copy()) == np.inf
    assert mc.brier(np.eye(4, dtype=np.float32), np.arange(4)[::-1].copy()) == 2


def test_likelihood_of_logits_and_of_samples():
    logits, labels = RNG.normal(size=(6, 50, 3)).astype(np.float32) * 40, RNG.integers(0, 3, 50)
    log_p = special.log_softmax(logits.astype(float), -1)[:, np.arange(50), labels]
    one = mc.negative_log_likelihood(logits[0], labels, logits=True)
    np.testing.assert_allclose(one, -log_p[0].mean(), rtol=1e-6)
    all_of_them = mc.negative_log_likelihood(logits, labels, logits=True)
    np.testing.assert_allclose(all_of_them, -(special.logsumexp(log_p, 0) - np.log(6)).mean(), rtol=1e-6)
    assert all_of_them < -log_p.mean()  # Jensen


@pytest.mark.parametrize("losses", [[0, 1, 1, 0, 1, 0, 0], [0.5, 2.0, 0.1, 3.0, 0.0, 1.0, 7.0]])
def test_risk_coverage_is_the_mean_over_all_orders_of_ties(losses):
    uncertainty, losses = np.array([0.2, 0.9, 0.2, 0.5, 0.5, 0.2, 0.1], np.float32), np.array(losses)
    orders = [order for order in itertools.permutations(range(7)) if (np.diff(uncertainty[list(order)]) >= 0).all()]
    assert len(orders) == 12
    curves = np.cumsum(losses[np.array(orders)], -1) / np.arange(1, 8)
    best = (np.cumsum(np.sort(losses)) / np.arange(1, 8)).mean()
    found = jax.jit(mc.risk_coverage)(uncertainty, losses)
    np.testing.assert_allclose(found.risk, curves.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.coverage, np.arange(1, 8) / 7, rtol=1e-6)
    np.testing.assert_allclose(found.aurc, curves.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.excess_aurc, curves.mean() - best, rtol=1e-4, atol=1e-6)


def test_risk_coverage_of_the_best_and_of_no_order():
    losses = RNG.uniform(size=1000).astype(np.float32)
    assert mc.risk_coverage(losses, losses).excess_aurc < 1e-6
    constant = mc.risk_coverage(np.ones(1000), losses)
    np.testing.assert_allclose(constant.risk, losses.mean(), rtol=1e-5)
    wrong = mc.risk_coverage(losses, losses > 0.5)
    np.testing.assert_allclose(wrong.risk[-1], (losses > 0.5).mean(), rtol=1e-6)
    assert wrong.risk[400] == 0


def test_detection_is_that_of_scikit_learn_and_by_counting():
    usual, foreign = np.round(RNG.normal(size=200), 1), np.round(RNG.normal(1, 1, 100), 1)  # with ties
    found = mc.detection(usual, foreign)
    positive, scores = np.repeat([0, 1], [200, 100]), np.concatenate([usual, foreign])
    assert found.auroc == metrics.roc_auc_score(positive, scores)
    assert found.aupr == metrics.average_precision_score(positive, scores)
    pairs = np.sign(foreign[:, None] - usual[None])
    np.testing.assert_allclose(found.auroc, (1 + pairs.mean()) / 2)
    threshold = max(t for t in scores if (foreign >= t).mean() >= 0.95)
    assert found.fpr_at_95_tpr == (usual >= threshold).mean()
    swapped = mc.detection(-foreign, -usual)
    np.testing.assert_allclose(swapped.auroc, found.auroc)
    threshold = min(t for t in scores if (usual <= t).mean() >= 0.95)
    assert swapped.fpr_at_95_tpr == (foreign <= threshold).mean()
    perfect = mc.detection(jnp.zeros(3), jnp.array([1.0, jnp.inf]))
    assert perfect == (1, 1, 0)


def test_intervals_of_a_known_distribution():
    """The 90 % interval of N(0, 1) holds 90 % ± 6 standard errors, and is 2 x 1.645 wide."""
    y = RNG.normal(size=20_000)
    half = np.full(y.size, stats.norm.ppf(0.95))
    found = mc.interval_coverage(-half, half, y)
    assert abs(found.coverage - 0.9) < 6 * np.sqrt(0.09 / y.size)
    np.testing.assert_allclose(found.width, 2 * half[0], rtol=1e-6)
    q = RNG.normal(size=y.size)
    expected = metrics.mean_pinball_loss(y, q, alpha=0.3)
    np.testing.assert_allclose(mc.pinball(q, y, 0.3), expected, rtol=1e-5)


def test_continuous_ranked_probability_scores():
    """Against the integral over (F(t) - [t >= y])^2, and against all pairs of samples."""
    for mean, std, y in [(0.0, 1.0, 0.3), (2.0, 0.5, -1.0)]:
        dist = stats.norm(mean, std)
        below = integrate.quad(lambda t: dist.cdf(t) ** 2, -9, y)[0]  # noqa: B023
        above = integrate.quad(lambda t: dist.sf(t) ** 2, y, 9)[0]  # noqa: B023
        np.testing.assert_allclose(mc.crps_gaussian(mean, std, y), below + above, rtol=1e-5)
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=3)
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1)) / 2
    np.testing.assert_allclose(mc.crps(x, y), (np.abs(x - y).mean(0) - pairs / 49).mean(), rtol=1e-5)
    np.testing.assert_allclose(mc.crps(x, y, fair=True), (np.abs(x - y).mean(0) - pairs / 42).mean(), rtol=1e-5)
    many, target = RNG.normal(size=(4, 50_000)), np.full(50_000, 0.3)
    # the fair score of 4 samples is unbiased; each has a standard deviation below 0.6
    expected = mc.crps_gaussian(0.0, 1.0, 0.3)
    assert abs(mc.crps(many, target, fair=True) - expected) < 6 * 0.6 / np.sqrt(50_000)
    assert mc.crps(many, target) > expected + 0.1  # E|X - X'| / (2 T) = 0.14 more


def best_temperature(logits, labels):
    def loss(log_t):
        log_p = special.log_softmax(np.asarray(logits, float) / np.exp(log_t), -1)[..., np.arange(len(labels)), labels]
        return -(special.logsumexp(log_p, 0) - np.log(len(log_p)) if log_p.ndim == 2 else log_p).mean()

    grid = np.linspace(-4, 4, 81)
    best = grid[np.argmin([loss(t) for t in grid])]
    return np.exp(optimize.minimize_scalar(loss, bounds=(best - 0.2, best + 0.2), options={"xatol": 1e-9}).x)


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_temperature_of_logits_that_are_too_small_or_too_large(factor):
    """The temperature of factor Z is about the factor."""
    labels = LABELS
    found = mc.fit_temperature(factor * Z, labels)
    assert not found.at_bound
    np.testing.assert_allclose(found.temperature, best_temperature(factor * Z, labels), rtol=1e-4)
    np.testing.assert_allclose(found.temperature, factor, rtol=0.3)
    scaled = mc.temperature_scale(factor * Z, found.temperature)
    least = mc.negative_log_likelihood(scaled, labels, logits=True)
    for t in [0.98, 1.02]:
        assert mc.negative_log_likelihood(scaled / t, labels, logits=True) > least


def test_temperature_of_samples_and_of_mean_probabilities():
    samples = 4 * Z[None] + RNG.normal(size=(8, *Z.shape)).astype(np.float32) * 4
    labels = LABELS
    found = mc.fit_temperature(samples, labels).temperature
    np.testing.assert_allclose(found, best_temperature(samples, labels), rtol=1e-3)
    logs = np.log(special.softmax(samples, -1).mean(0))
    np.testing.assert_allclose(mc.fit_temperature(logs, labels).temperature, best_temperature(logs, labels), rtol=1e-4)
    masked = np.concatenate([Z, np.full((300, 1), -np.inf, np.float32)], -1)  # a class that is never possible
    np.testing.assert_allclose(
        mc.fit_temperature(masked, labels).temperature, mc.fit_temperature(Z, labels).temperature, rtol=1e-5
    )


def test_temperature_has_the_derivative_of_the_minimum():
    """It is homogeneous: logits times a have the temperature times a, so that sum of logits times derivatives is it."""
    z = Z[:60]
    fit = jax.value_and_grad(lambda z, labels: mc.fit_temperature(z, labels).temperature)
    temperature, slope = fit(z, LABELS[:60])
    np.testing.assert_allclose((slope * z).sum(), temperature, rtol=1e-3)
    with pytest.warns(UserWarning, match="has no maximum"):
        bound, slope = fit(z, z.argmax(-1))
    assert bound == np.float32(0.01)
    assert (slope == 0).all()


def test_temperatures_at_the_bounds_are_said():
    right, useless = Z.argmax(-1), Z.argmin(-1)
    for labels, bound in [(right, 0.01), (useless, 100)]:
        with pytest.warns(UserWarning, match="fit_temperature: the likelihood has no maximum in bounds"):
            found = mc.fit_temperature(Z, labels)
        assert found.at_bound
        np.testing.assert_allclose(found.temperature, bound, rtol=1e-5)
        assert jax.jit(mc.fit_temperature)(Z[None].repeat(2, 0), labels).at_bound
    with pytest.warns(UserWarning, match="or the logits tell nothing"):
        assert mc.fit_temperature(np.zeros((4, 2)), np.array([0, 1, 1, 1])).at_bound


def test_gradients_and_narrow_dtypes():
    def error(p, **options):
        return mc.calibration_error(p, Y, **options)

    assert jnp.isfinite(jax.grad(error)(P, classwise=True, binning="equal_mass")).all()
    assert jnp.isfinite(jax.grad(lambda p: mc.calibration_error(p, np.arange(4), norm="l2"))(jnp.eye(4))).all()
    assert jnp.isfinite(jax.grad(mc.crps_gaussian, (0, 1))(jnp.zeros(2), jnp.array([0.0, 1.0]), jnp.ones(2))[0]).all()
    p = jnp.asarray(P, jnp.bfloat16)
    for f in [mc.brier, mc.negative_log_likelihood]:
        assert f(p, Y).dtype == jnp.float32
        np.testing.assert_allclose(f(p, Y), f(P, Y), rtol=0.02)
    with jax.enable_x64(True):
        wide = P.astype(np.float64) / P.sum(-1, keepdims=True, dtype=float)
        np.testing.assert_allclose(mc.negative_log_likelihood(wide, Y), metrics.log_loss(Y, wide), rtol=1e-14)
        wide = jax.eval_shape(mc.fit_temperature, Z.astype(np.float64), LABELS)
        assert wide.temperature.dtype == jnp.float64


N2 = np.zeros(2)
BAD = [
    (mc.brier, (P + 7, Y), {}, ValueError, "probabilities must be in [0, 1], got 7."),
    (mc.brier, (P * np.nan, Y), {}, ValueError, "probabilities must be in [0, 1], got nan. For logits pass their soft"),
    (mc.brier, (P[None], Y[None]), {}, ValueError, "Reshape both, so that all but the classes is one dimension."),
    (mc.brier, (P / 2, Y), {}, ValueError, "probabilities must sum to 1 over the classes, got 0.5. For logits"),
    (mc.brier, (P, Y - 1), {}, ValueError, "labels must be in [0, 4), got -1. Leave out the examples without one."),
    (mc.brier, (P[:0], Y[:0]), {}, ValueError, "probabilities must hold at least one example, got float32[0,4]"),
    (mc.negative_log_likelihood, (P[0], Y), {"logits": True}, ValueError, "logits and labels must be of shapes [n, cl"),
    (mc.negative_log_likelihood, (P, Y * 1.0), {"logits": True}, TypeError, "logits must be floats and labels integ"),
    (mc.calibration_error, (P, Y), {"binning": "width"}, ValueError, "binning must be one of ('equal_width', 'equal_m"),
    (mc.calibration_error, (P, Y), {"norm": 1}, ValueError, "norm must be one of ('l1', 'l2', 'max'), got 1."),
    (mc.calibration_error, (P, Y), {"classwise": "no"}, TypeError, "classwise must be True or False, got 'no'"),
    (mc.negative_log_likelihood, (P, Y), {"logits": "no"}, TypeError, "logits must be True or False, got 'no'"),
    (mc.crps, (P, P[0]), {"fair": "no"}, TypeError, "fair must be True or False, got 'no'"),
    (mc.reliability, (P, Y), {"num_bins": 0}, ValueError, "num_bins must be at least 1, got 0."),
    (mc.reliability, (P, Y), {"num_bins": 2**31}, ValueError, "num_bins must be at most 65536, got 2147483648."),
    (mc.calibration_error, (P, Y), {"num_bins": 65537}, ValueError, "num_bins must be at most 65536, got 65537."),
    (mc.brier, (Y, P), {}, ValueError, "The order of the arguments is probabilities, labels."),
    (mc.fit_temperature, (LABELS, Z), {}, ValueError, "The order of the arguments is logits, labels."),
    (mc.crps, (P[0], P), {}, ValueError, "The order of the arguments is samples, targets."),
    (mc.brier, (P, np.eye(4)[Y]), {}, ValueError, "For one-hot labels pass their argmax."),
    (mc.brier, (P, Y[:, None]), {}, ValueError, "Ravel the labels."),
    (mc.brier, (P[:, 0], Y), {}, ValueError, "For two classes pass both: stack 1 - p and p along a last dimension."),
    (
        mc.brier,
        (P, Y * 1.0),
        {},
        TypeError,
        "labels integers, got float32[240,4] and float32[240]. Convert them with la",
    ),
    (
        mc.brier,
        ([[0.1, 0.9], [1.0]], [0, 1]),
        {},
        TypeError,
        "probabilities must be an array of numbers, got [[0.1, 0.",
    ),
    (
        mc.brier,
        (P, None),
        {},
        TypeError,
        "labels must be an array of numbers, got None (NoneType). Convert it with jnp.",
    ),
    (mc.crps, (lambda key: key, Y), {}, TypeError, "samples must be an array of numbers, got <function"),
    (mc.pinball, ([10**400], [1.0], 0.5), {}, TypeError, "quantiles must be an array of numbers, got a value (list)."),
    (mc.pinball, (N2, N2, 10**400), {}, ValueError, "level must be in (0, 1), got inf."),
    (mc.risk_coverage, (P, P), {}, ValueError, "uncertainty must be of shape [n], got float32[240,4]. Ravel both."),
    (mc.risk_coverage, (N2, N2 * np.nan), {}, ValueError, "losses must not be NaN, got nan."),
    (mc.risk_coverage, (N2 > 0, N2), {}, TypeError, "uncertainty and losses must be real numbers, got bool[2] and fl"),
    (mc.detection, (N2 * np.nan, N2), {}, ValueError, "usual must not be NaN, got nan."),
    (mc.detection, (N2, N2[:0]), {}, ValueError, "foreign must hold at least one number, got float32[0]."),
    (mc.detection, (N2, P), {}, ValueError, "foreign must be of shape [n], got float32[240,4]. Ravel it."),
    (mc.interval_coverage, (N2, N2 - 1, N2), {}, ValueError, "upper must not be below lower, got -1."),
    (mc.interval_coverage, (N2, N2, N2[:, None]), {}, ValueError, "must have one shape, got float32[2] and float32[2]"),
    (mc.pinball, (N2, N2, 90), {}, ValueError, "level must be in (0, 1), got 90.0. For a percentage, pass 0.9."),
    (mc.crps, (N2[:1], np.zeros(())), {"fair": True}, ValueError, "got float32[1] and float32[]. Draw more"),
    (mc.crps_gaussian, (N2, N2 - 1, N2), {}, ValueError, "std must not be negative, got -1."),
    (mc.fit_temperature, (Z, Y), {}, ValueError, "logits and labels must be of shapes [n, classes] (or [T, n, classe"),
    (mc.fit_temperature, (Z[:240], Y), {"bounds": (1, 1)}, ValueError, "bounds must be two numbers, 0 < low < high,"),
    (
        mc.fit_temperature,
        (np.array([[-np.inf, 0.0], [0.0, 0.0]]), N2.astype(int)),
        {},
        ValueError,
        "labels must have a logit above -inf",
    ),
    (mc.temperature_scale, (Z, 0), {}, ValueError, "temperature must be above 0, got 0."),
    (
        mc.temperature_scale,
        (Z, 1e-50),
        {},
        ValueError,
        "in [1.2e-38, 3.4e+38], the normal numbers of float32, got 1e-50",
    ),
    (mc.temperature_scale, (Z, np.inf), {}, ValueError, "the normal numbers of float32, got inf."),
    (
        mc.temperature_scale,
        (Z, np.array(True)),
        {},
        TypeError,
        "temperature must be a number or a scalar array, got bool",
    ),
    (mc.temperature_scale, (Z, 10**400), {}, TypeError, "temperature must be an array of numbers, got a value."),
    (mc.temperature_scale, (Z, N2), {}, TypeError, "temperature must be a number or a scalar array, got float64[2]."),
    (mc.temperature_scale, (np.arange(3), 1.0), {}, TypeError, "logits must be floats, got int32[3]."),
    *[
        (mc.fit_temperature, (Z[:240], Y), {"bounds": bounds}, ValueError, f"that float32 holds, got {bounds}.")
        for bounds in [(1e-50, 9), (True, 9), (1, 10**400), (1, 1 + 1e-12), (np.nan, 1), (1, np.inf)]
    ],
]


@pytest.mark.parametrize(("function", "args", "options", "kind", "message"), BAD, ids=lambda of: "")
def test_bad_input(function, args, options, kind, message):
    with pytest.raises(kind) as caught:
        function(*args, **options)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert message in str(caught.value)


SUMMARY = mc.Classification(*[P] * len(mc.Classification._fields))
OF_SUMMARY = [
    (mc.brier, ("probabilities", Y), "Pass its field probabilities."),
    (mc.calibration_error, ("probabilities", Y), "Pass its field probabilities."),
    (mc.reliability, ("probabilities", Y), "Pass its field probabilities."),
    (mc.negative_log_likelihood, ("probabilities", Y), "Pass its field probabilities."),
    (mc.conformal_scores, ("probabilities", Y), "Pass its field probabilities."),
    (mc.conformal_sets, ("probabilities", 0.5), "Pass its field probabilities."),
    (mc.fit_temperature, ("logits", Y), "Pass the logarithm of its field probabilities."),
    (mc.temperature_scale, ("logits", 2.0), "Pass the logarithm of its field probabilities."),
    (mc.risk_coverage, ("uncertainty", N2), "Pass one of its fields: probabilities, predictive_entropy, expected"),
    (mc.risk_coverage, (N2, "losses"), "Pass one of its fields:"),
    (mc.detection, ("usual", N2), "Pass one of its fields:"),
    (mc.crps, ("samples", N2), "Pass one of its fields:"),
    (mc.crps_gaussian, ("mean", N2, N2), "Pass one of its fields:"),
    (mc.pinball, ("quantiles", N2, 0.5), "Pass one of its fields:"),
    (mc.interval_coverage, ("lower", N2, N2), "Pass one of its fields:"),
    (mc.conformal_threshold, ("scores", 0.1), "Pass one of its fields:"),
    (mc.conformal_sets, (P, "threshold"), "Pass one of its fields:"),
    (mc.conformal_residuals, ("mean", N2), "Pass one of its fields:"),
    (mc.conformal_intervals, ("mean", 0.5), "Pass one of its fields:"),
    (moments.relu, ("mean", N2), "Pass one of its fields:"),
    (moments.dropout, (N2, "var", 0.5), "Pass one of its fields:"),
    (moments.dense, ("mean", N2, N2), "Pass one of its fields:"),
]


@pytest.mark.parametrize(("function", "args", "remedy"), OF_SUMMARY, ids=lambda of: "")
def test_a_summary_for_an_array(function, args, remedy):
    """A named tuple of arrays of one shape would be stacked without a word."""
    (name,) = [arg for arg in args if isinstance(arg, str)]
    with pytest.raises(TypeError) as caught:
        function(*[SUMMARY if isinstance(arg, str) else arg for arg in args])
    message = f"{function.__name__}: {name} must be an array, got a Classification. {remedy}"
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("judge", "remedy"),
    [
        (lambda p: mc.negative_log_likelihood(p, OF_P, logits=True), "For probabilities pass logits=False."),
        (lambda p: mc.fit_temperature(p, OF_P).temperature, "For probabilities pass their logarithm."),
        (lambda p: mc.temperature_scale(p, 2.0), "For probabilities pass their logarithm."),
    ],
)
def test_probabilities_for_logits_are_a_warning(judge, remedy):
    """Where all are at least 0 and sum to 1, of one pass and of samples, in any dtype; not under jit."""
    for p in [P.tolist(), np.stack([P, P]), jnp.asarray(P, jnp.bfloat16)]:
        with pytest.warns(
            UserWarning, match="logits must be unnormalised, got numbers of at least 0 that sum"
        ) as caught:
            judge(p)
        assert caught[0].filename == __file__
        assert remedy in str(caught[0].message)
    for logits in [P + 0.1, P - P.mean(), P * 2]:
        judge(logits)
    jax.jit(judge)(P)


def test_lists_are_arrays():
    assert mc.brier(P.tolist(), Y.tolist()) == mc.brier(P, Y)
    traced = jax.jit(lambda loss: mc.risk_coverage([1.0, 2.0], [loss, 0.0]).risk)(1.0)
    np.testing.assert_array_equal(traced, [1, 0.5])


@pytest.mark.parametrize("fair", [False, True])
def test_crps_of_more_samples_than_int32_holds_pairs_of(fair):
    """Of N(0, 1) at 0 it is (sqrt(2) - 1) / sqrt(π); by sorting, whose pairs are sums over ranks."""
    x = RNG.normal(size=(50_000, 2))
    rank = np.arange(1, 50_001) * 2 - 50_001.0
    pairs = (rank[:, None] * np.sort(x, 0)).sum(0) / (50_000 * (50_000 - fair))
    expected = (np.abs(x).mean(0) - pairs).mean()
    np.testing.assert_allclose(mc.crps(x, np.zeros(2), fair=fair), expected, rtol=1e-5)
    assert abs(expected - (np.sqrt(2) - 1) / np.sqrt(np.pi)) < 0.01


@pytest.mark.parametrize("num_bins", [1, 15])
@pytest.mark.parametrize("binning", ["equal_width", "equal_mass"])
def test_means_of_bins_do_not_drift(num_bins, binning):
    """Of a million confidences, whose float32 sum in one go, or in blocks of thousands, is off by 1e-5 and more."""
    for confidence in [np.full(2**20, 0.9), RNG.uniform(0.934, 0.999, 2**20)]:
        p = two(confidence)
        bins = mc.reliability(p, np.ones(2**20, np.int32), num_bins=num_bins, binning=binning)
        size = np.asarray(bins.size)
        mean = (np.asarray(bins.confidence, np.float64)[size > 0] * size[size > 0]).sum() / size.sum()
        np.testing.assert_allclose(mean, p[:, 1].astype(np.float64).mean(), rtol=2e-7)
        assert size.sum() == 2**20


def test_likelihood_of_large_logits_under_jit():
    """Compiled on a CPU, s * z - max is rounded once: of `jax.nn.log_softmax` the largest is NaN."""
    for samples in (1, 3):
        z = RNG.normal(size=(samples, 60, 5)).astype(np.float32)
        labels = RNG.integers(0, 5, 60)
        for scale in (1e9, 1e12, 1e30):
            log_p = special.log_softmax(z.astype(float) * scale, -1)[:, np.arange(60), labels]
            expected = -(special.logsumexp(log_p, 0) - np.log(samples)).mean()
            value = jax.jit(lambda s, z: mc.negative_log_likelihood(s * z, labels, logits=True))(scale, z)  # noqa: B023
            np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_what_is_not_known_while_tracing_becomes_nan():
    """Labels out of range (such as -1 for a missing one), logits instead of probabilities, NaN."""
    wrong = jnp.asarray(Y).at[3].set(-1)
    for f in [mc.brier, mc.calibration_error, mc.negative_log_likelihood]:
        for p, labels in [(P, wrong), (P * 3, Y), (P / 3, Y), (P * np.nan, Y)]:
            assert jnp.isnan(jax.jit(f)(p, labels))
    assert jnp.isnan(jax.jit(mc.fit_temperature)(P, wrong).temperature)
    assert jnp.isnan(jax.jit(mc.temperature_scale)(P, -1.0)).all()
    assert jnp.isnan(jax.jit(mc.risk_coverage)(N2, N2 * np.nan).risk).all()
    assert jnp.isnan(jax.jit(mc.interval_coverage)(N2, N2 - 1, N2).coverage)
    assert jnp.isnan(jax.jit(mc.crps_gaussian)(N2, N2 - 1, N2))
    constants = jax.jit(lambda: mc.brier(P, Y))()  # known values are checked under jit, too
    np.testing.assert_allclose(constants, mc.brier(P, Y), rtol=1e-6)
    with pytest.raises(ValueError, match="got -1"):
        jax.jit(lambda: mc.brier(P, np.asarray(wrong)))()


def test_detection_outside_jit_and_without_scikit_learn(monkeypatch):
    with pytest.raises(TypeError, match="detection: usual must be known values, got traced ones"):
        jax.jit(lambda of: mc.detection(of, N2).auroc)(N2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="detection: scikit-learn must be installed"):
        mc.detection(N2, N2)
