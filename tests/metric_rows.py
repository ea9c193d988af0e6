"""Rows for JAX's own ways of looking (debug_nans, disable_jit, checking_leaks, ...): one or more a metric, tiny shapes.

A row is a name and a callable without arguments. None has a NaN in its arguments or its value.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dropjax import mc
from dropjax.mc import moments

P = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.1, 0.2, 0.7], [0.25, 0.25, 0.5]], np.float32)  # with ends and ties
Z = np.array([[2, -1, -np.inf], [0.5, 0.5, 0.25], [-3, 0, 2], [1e4, 0, -1e4]], np.float32)
LABELS = np.array([0, 2, 1, 0], np.int32)
X = np.array([[0.5, -1, 2, 0], [0.5, 3, 2, 1], [-2, 1e37, 2, 1e-30]], np.float32)
Y = np.array([0.5, 0, 2, -1e37], np.float32)
STD = np.array([1, 0.5, 1e-20, 1e20], np.float32)
VAR = np.array([0, 1, 1e-30, 4], np.float32)


def metric(function, *args, by=(0,), **options):
    """The value of a metric, and the gradients of its sum by some of its arguments."""

    def run():
        arrays = [jnp.asarray(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        value = function(*arrays, **options)

        def total(*args):
            leaves = jax.tree.leaves(function(*args, **options))
            return sum(leaf.sum() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

        return value, jax.grad(total, by)(*arrays) if by else ()

    return run


def key():
    return jax.random.key(0)


ROWS = [
    ("brier", metric(mc.brier, P, LABELS)),
    ("negative_log_likelihood", metric(mc.negative_log_likelihood, P[2:], LABELS[2:])),
    ("negative_log_likelihood, infinite", metric(mc.negative_log_likelihood, P, LABELS, by=())),
    ("negative_log_likelihood, logits", metric(mc.negative_log_likelihood, Z[:3, :2], LABELS[:3] % 2, logits=True)),
    (
        "negative_log_likelihood, samples",
        metric(mc.negative_log_likelihood, np.stack([Z, Z[::-1]]), LABELS, logits=True),
    ),
    ("interval_coverage", metric(mc.interval_coverage, Y - STD, Y + STD, X[0], by=(0, 1))),
    (
        "interval_coverage, infinite",
        metric(mc.interval_coverage, np.full(4, -np.inf, np.float32), np.full(4, np.inf, np.float32), Y),
    ),
    ("pinball", metric(mc.pinball, X[0], Y, 0.3, by=(0, 1))),
    (
        "pinball, infinite",
        metric(mc.pinball, np.full(4, np.inf, np.float32), np.float32([np.inf, 0, 1, -np.inf]), 0.3, by=()),
    ),
    ("crps", metric(mc.crps, X, Y, by=(0, 1))),
    ("crps, fair", metric(mc.crps, X, Y, by=(0, 1), fair=True)),
    ("crps, infinite", metric(mc.crps, X, np.full(4, np.inf, np.float32), by=())),
    ("crps_gaussian", metric(mc.crps_gaussian, X[0], STD, Y, by=(0, 1, 2))),
    ("crps_gaussian, known", metric(mc.crps_gaussian, X[0], 0 * STD, X[0], by=(0, 1, 2))),
    (
        "crps_gaussian, infinite",
        metric(mc.crps_gaussian, X[0], np.full(4, np.inf, np.float32), np.full(4, np.inf, np.float32), by=()),
    ),
    ("reliability", metric(mc.reliability, P, LABELS, num_bins=1)),
    ("reliability, equal mass", metric(mc.reliability, P, LABELS, num_bins=2, binning="equal_mass")),
    ("calibration_error", metric(mc.calibration_error, P, LABELS)),
    ("calibration_error, l2", metric(mc.calibration_error, P, LABELS, classwise=True, norm="l2")),
    ("calibration_error, max", metric(mc.calibration_error, P, LABELS, binning="equal_mass", norm="max")),
    ("risk_coverage", metric(mc.risk_coverage, np.float32([1, 2, 2, np.inf]), Y, by=(1,))),
    ("detection", lambda: mc.detection(X[0], Y)),
    ("fit_temperature", metric(lambda *args: mc.fit_temperature(*args)[0], 4 * Z[:3], LABELS[:3] // 2)),
    (
        "fit_temperature, samples",
        metric(lambda *args: mc.fit_temperature(*args)[0], np.stack([Z, Z / 2]) / 4, LABELS // 2, by=()),
    ),
    ("temperature_scale", metric(mc.temperature_scale, Z[1:], 0.5)),
    ("conformal_threshold", metric(mc.conformal_threshold, Y, 0.3)),
    ("conformal_threshold, infinite", metric(mc.conformal_threshold, Y, 0.1)),
    ("conformal_scores", metric(mc.conformal_scores, P, LABELS)),
    ("conformal_scores, aps", lambda: mc.conformal_scores(P, LABELS, score="aps", key=key())),
    ("conformal_sets", lambda: mc.conformal_sets(P, 0.5)),
    ("conformal_sets, aps", lambda: mc.conformal_sets(P, jnp.inf, score="aps", key=key())),
    ("conformal_residuals", metric(mc.conformal_residuals, X[0], Y, by=(0, 1))),
    ("conformal_residuals, std", lambda: mc.conformal_residuals(X[0], Y, std=STD)),
    ("conformal_intervals", metric(mc.conformal_intervals, X[0], 0.5)),
    ("conformal_intervals, infinite", lambda: mc.conformal_intervals(X[0], jnp.float32(np.inf), std=STD)),
    ("moments.dropout", metric(moments.dropout, X[0], VAR, np.float32([0, 0.3, 0.999, 1]), by=(0, 1, 2))),
    (
        "moments.dense",
        metric(moments.dense, X[0], VAR, np.ones((4, 2), np.float32), np.ones(2, np.float32), by=(0, 1, 2, 3)),
    ),
    ("moments.relu", metric(moments.relu, np.float32([-1, 1e37, 1, 0]), VAR, by=(0, 1))),
]
