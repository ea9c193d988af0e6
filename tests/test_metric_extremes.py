"""Metrics at the ends of what numbers hold, against the formulas in float64: finite in, finite out, or infinite where
that is the value; NaN only where an input is invalid."""

import warnings

import jax
import numpy as np
import pytest
from scipy import special, stats

from dropjax import mc
from dropjax.mc import moments
from tests.metric_rows import ROWS as LOOKED_AT

pytestmark = pytest.mark.usefixtures("quick_compiler")
RNG = np.random.default_rng(0)
N = 24
X, Y = RNG.uniform(-1, 1, (6, N)), RNG.uniform(-1, 1, N)
STD = RNG.uniform(0.1, 1, N)
LOW, HIGH = np.sort(RNG.uniform(-1, 1, (2, N)), 0)
U = np.round(RNG.uniform(size=N), 1)  # with ties
Z, LABELS = RNG.uniform(-1, 1, (N, 4)), RNG.integers(0, 4, N)
SURE = (Z + 3 * np.eye(4)[LABELS] * (U > 0.3)[:, None]) / 4
BOUNDS = (2e-38, 3e38)
OTHERS = {"classify", "regress", "sample", "explain"}  # in tests/mc_rows.py
INF, NAN = np.inf, np.nan


def crps(x, y, fair):
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1))
    return (np.abs(x - y).mean(0) - pairs / (2 * len(x) * (len(x) - fair))).mean()


def crps_gaussian(m, s, y):
    z = (y - m) / s
    return (s * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))).mean()


def risk(u, loss):
    """The mean over the orders of ties, by their expected sums."""
    curve = []
    for k in range(1, len(u) + 1):
        last = np.sort(u)[k - 1]
        sure, tied = loss[u < last], loss[u == last]
        curve.append((sure.sum() + (k - len(sure)) * tied.mean()) / k)
    return np.array(curve)


def likelihood(z):
    return -special.log_softmax(z, -1)[np.arange(N), LABELS].mean()


def intervals(a):
    return a * Y - a * 0.5 * STD, a * Y + a * 0.5 * STD


ROWS = {  # of numbers a x: the metric, and its value in float64
    "crps": (lambda a: mc.crps(a * X, a * Y), lambda a: crps(a * X, a * Y, False)),
    "crps, fair": (lambda a: mc.crps(a * X, a * Y, fair=True), lambda a: crps(a * X, a * Y, True)),
    "crps of one sample": (lambda a: mc.crps(a * X[:1], a * Y), lambda a: np.abs(a * X[0] - a * Y).mean()),
    "crps_gaussian": (
        lambda a: mc.crps_gaussian(a * X[0], a * STD, a * Y),
        lambda a: crps_gaussian(a * X[0], a * STD, a * Y),
    ),
    "pinball": (
        lambda a: mc.pinball(a * X[0], a * Y, 0.3),
        lambda a: np.maximum(0.3 * (a * Y - a * X[0]), 0.7 * (a * X[0] - a * Y)).mean(),
    ),
    "interval_coverage": (
        lambda a: mc.interval_coverage(a * LOW, a * HIGH, a * Y),
        lambda a: (((LOW <= Y) & (Y <= HIGH)).mean(), (a * HIGH - a * LOW).mean()),
    ),
    "risk_coverage": (
        lambda a: mc.risk_coverage(U, a * Y).risk,
        lambda a: risk(U, a * Y),
    ),
    "risk_coverage, areas": (
        lambda a: mc.risk_coverage(U, a * Y)[2:],
        lambda a: (risk(U, a * Y).mean(), risk(U, a * Y).mean() - risk(a * Y, a * Y).mean()),
    ),
    "negative_log_likelihood": (
        lambda a: mc.negative_log_likelihood(a * Z, LABELS, logits=True),
        lambda a: likelihood(a * Z),
    ),
    "temperature_scale": (lambda a: mc.temperature_scale(a * Z, 0.5 * a), lambda a: 2 * Z),
    "fit_temperature": (
        lambda a: mc.fit_temperature(a * SURE, LABELS, bounds=BOUNDS)[0],
        lambda a: a * FITTED,
    ),
    "conformal_residuals": (lambda a: mc.conformal_residuals(a * X[0], a * Y), lambda a: np.abs(a * X[0] - a * Y)),
    "conformal_residuals, std": (
        lambda a: mc.conformal_residuals(a * X[0], a * Y, std=a * STD),
        lambda a: np.abs(X[0] - Y) / STD,
    ),
    "conformal_intervals": (lambda a: mc.conformal_intervals(a * Y, 0.5, std=a * STD), intervals),
    "conformal_threshold": (lambda a: mc.conformal_threshold(a * Y, 0.3), lambda a: np.sort(a * Y)[17]),
    "moments.dropout": (
        lambda a: moments.dropout(a * Y, a * STD, 0.2),
        lambda a: (a * Y, (a * STD + 0.2 * (a * Y) ** 2) / 0.8),
    ),
    "moments.relu, mean": (
        lambda a: moments.relu(1e-20 * a * Y, 1e-20 * a * 1e-20 * a * STD)[0],
        lambda a: 1e-20 * a * stats.norm.pdf(Y / STD**0.5) * STD**0.5 + 1e-20 * a * Y * stats.norm.cdf(Y / STD**0.5),
    ),
}
FITTED = float(ROWS["fit_temperature"][0](1.0))


@pytest.mark.parametrize("name", ROWS)
def test_large_and_small_numbers(name):
    """Also where sums of them overflow; where float32 does not hold the value it is infinite."""
    metric, formula = ROWS[name]
    jitted = jax.jit(metric)
    for a in [1.0, 1e-30, 1e20, 1e37, 3e38]:
        a = float(np.float32(a))
        with np.errstate(over="ignore"):
            expected = [np.asarray(value).astype(np.float32) for value in jax.tree.leaves(formula(a))]
        values = jax.tree.leaves(jitted(a))
        for value, other in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, other, rtol=2e-5, atol=1e-6 * a, err_msg=f"{name} of {a}")


INFINITE = {
    "crps, target": (lambda: mc.crps(c(0, 1), r(INF)), INF),
    "crps, sample": (lambda: mc.crps(c(0, INF), r(0)), INF),
    "crps, sample, fair": (lambda: mc.crps(c(0, INF), r(0), fair=True), INF),
    "crps, opposite samples": (lambda: mc.crps(c(-INF, INF), r(0)), INF),
    "crps, opposite target": (lambda: mc.crps(c(-INF, 1), r(INF)), INF),
    "crps, all the same": (lambda: mc.crps(c(INF, INF), r(INF)), 0),
    "crps, one of two": (lambda: mc.crps(np.stack([r(INF, 0)] * 2), r(INF, 3)), 1.5),
    "crps, NaN": (lambda: mc.crps(c(NAN, 0), r(INF)), NAN),
    "crps_gaussian, target": (lambda: mc.crps_gaussian(r(0), r(1), r(-INF)), INF),
    "crps_gaussian, mean": (lambda: mc.crps_gaussian(r(INF), r(1), r(0)), INF),
    "crps_gaussian, std": (lambda: mc.crps_gaussian(r(0), r(INF), r(0)), INF),
    "crps_gaussian, std and target": (lambda: mc.crps_gaussian(r(0), r(INF), r(INF)), INF),
    "crps_gaussian, same": (lambda: mc.crps_gaussian(r(INF), r(0), r(INF)), 0),
    "crps_gaussian, NaN": (lambda: mc.crps_gaussian(r(0), r(INF), r(NAN)), NAN),
    "pinball, target": (lambda: mc.pinball(r(0), r(INF), 1e-50), INF),
    "pinball, quantile": (lambda: mc.pinball(r(INF), r(0), 0.3), INF),
    "pinball, opposite": (lambda: mc.pinball(r(-INF), r(INF), 0.3), INF),
    "pinball, same": (lambda: mc.pinball(r(INF, 0), r(INF, 2), 0.5), 0.5),
    "pinball, NaN": (lambda: mc.pinball(r(NAN), r(INF), 0.3), NAN),
    "interval_coverage": (lambda: mc.interval_coverage(r(-INF), r(INF), r(0)), (1, INF)),
    "interval_coverage, same": (lambda: mc.interval_coverage(r(INF, 0), r(INF, 1), r(INF, 2)), (0.5, 0.5)),
    "interval_coverage, half": (lambda: mc.interval_coverage(r(-INF), r(0), r(1)), (0, INF)),
    "risk_coverage": (lambda: mc.risk_coverage(r(1, 2, 3), r(1, -INF, 0)).risk, (1, -INF, -INF)),
    "risk_coverage, opposite": (lambda: mc.risk_coverage(r(1, 2, 3), r(-INF, INF, 1)).risk, (-INF, NAN, NAN)),
    "risk_coverage, tied": (lambda: mc.risk_coverage(r(1, 2, 2), r(1, INF, -INF)).risk, (1, NAN, NAN)),
    "risk_coverage, areas": (lambda: mc.risk_coverage(r(1, 2, 3), r(INF, 0, 1))[2:], (INF, NAN)),
    "risk_coverage, uncertainty": (lambda: mc.risk_coverage(r(INF, -INF, 0), r(1, 0, 0)).risk, (0, 0, 1 / 3)),
    "likelihood of 0": (lambda: mc.negative_log_likelihood(np.eye(2), np.array([0, 0])), INF),
    "likelihood of 1": (lambda: mc.negative_log_likelihood(np.eye(2), np.array([0, 1])), 0),
    "likelihood, -inf": (lambda: mc.negative_log_likelihood(np.array([[-INF, 0]]), np.array([0]), logits=True), INF),
    "likelihood, other": (lambda: mc.negative_log_likelihood(np.array([[-INF, 3]]), np.array([1]), logits=True), 0),
    "likelihood, a sample": (
        lambda: mc.negative_log_likelihood(np.array([[[-INF, 0]], [[0, -INF]]]), np.array([0]), logits=True),
        np.log(2),
    ),
    "likelihood, +inf": (lambda: mc.negative_log_likelihood(np.array([[INF, 0]]), np.array([0]), logits=True), NAN),
    "likelihood, all -inf": (
        lambda: mc.negative_log_likelihood(np.full((1, 2), -INF), np.array([0]), logits=True),
        NAN,
    ),
    "temperature_scale": (lambda: mc.temperature_scale(r(-INF, 0, 2, INF), 2.0), (-INF, 0, 1, INF)),
    "conformal_residuals": (lambda: mc.conformal_residuals(r(INF, INF, 0), r(INF, 0, -INF)), (0, INF, INF)),
    "conformal_residuals, std": (lambda: mc.conformal_residuals(r(INF, INF), r(INF, 0), std=r(2, 2)), (0, INF)),
    "conformal_intervals": (lambda: mc.conformal_intervals(r(INF, 0), INF), (-INF, -INF, INF, INF)),
    "conformal_intervals, mean": (lambda: mc.conformal_intervals(r(INF, -INF), 1.0), (INF, -INF, INF, -INF)),
    "conformal_threshold": (lambda: mc.conformal_threshold(r(INF, 0, -INF), 0.5), 0),
    "conformal_threshold, +inf": (lambda: mc.conformal_threshold(r(INF, 0, -INF), 0.3), INF),
    "moments.dropout": (lambda: moments.dropout(r(INF, INF, 1e30), r(2, 2, 0), r(0, 1, 1)), (INF, 0, 0, 2, 0, 0)),
    "moments.dropout, var": (lambda: moments.dropout(r(1, 1), r(INF, INF), r(0.5, 1)), (1, 0, INF, 0)),
    "moments.relu": (lambda: moments.relu(r(-INF, INF, 0), r(1, 1, INF)), (0, INF, INF, 0, 1, INF)),
    "moments.relu, known": (lambda: moments.relu(r(-INF, INF), r(0, 0)), (0, INF, 0, 0)),
}


def r(*numbers):
    return np.array(numbers, np.float32)


def c(*numbers):
    return r(*numbers)[:, None]


@pytest.mark.parametrize("name", INFINITE)
def test_infinities(name):
    """They are the limit of large numbers, and NaN only where there is none, or where an input is NaN."""
    metric, expected = INFINITE[name]
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(metric())]
    np.testing.assert_allclose(np.concatenate(leaves), np.ravel(expected), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), LOOKED_AT, ids=[name for name, _ in LOOKED_AT])
def test_no_nan_is_made(name, run):
    """Nor in a gradient, which is finite where the value is; `tests/modes.py` looks at each operation of these rows."""
    with jax.debug_nans(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaves = jax.tree.leaves(run())
    assert all(np.isfinite(leaf).all() for leaf in leaves) or "infinite" in name


def test_every_metric_has_a_row():
    public = {
        name for name in vars(mc) if callable(getattr(mc, name)) and getattr(mc, name).__module__.startswith("dropjax")
    }
    public = {name for name in public if not isinstance(getattr(mc, name), type)} - OTHERS
    public |= {"moments.dropout", "moments.dense", "moments.relu"}
    assert public == {name.split(",")[0] for name, _ in LOOKED_AT}
