"""Selective prediction and out-of-distribution detection: does uncertainty flag errors and unfamiliar inputs?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs


class RiskCoverage(NamedTuple):
    """The mean loss of the most certain predictions, for each share of them that is kept."""

    coverage: Array
    """k / n for k = 1, ..., n; float32 `[n]`."""
    risk: Array
    """Mean loss of the k most certain predictions, `[n]`."""
    aurc: Array
    """Area under the curve: the mean of `risk`; lower is better."""
    excess_aurc: Array
    """How much larger it is than that of the best order, the losses' own (E-AURC); at least 0."""


class Detection(NamedTuple):
    """How well scores tell inputs of another kind, which count as positive, from the usual ones; Python floats."""

    auroc: float
    """Probability that a foreign input scores higher than a usual one, ties half: 0.5 by chance."""
    aupr: float
    """Average precision: by chance the share of foreign inputs."""
    fpr_at_95_tpr: float
    """Share of the usual inputs flagged by the highest threshold that flags at least 95 % of the foreign ones."""


@_arguments.public
def risk_coverage(uncertainty: ArrayLike, losses: ArrayLike) -> RiskCoverage:
    """Orders predictions by uncertainty and returns the mean loss of the k most certain, for each k.

    Predictions of equal uncertainty may come in any order: the risk is its mean over all of their orders. So the
    order of the examples does not matter, and a constant uncertainty gives the mean loss everywhere.

    Args:
      uncertainty: real `[n]`, higher where less certain: an entropy, a variance, 1 - confidence.
      losses: bool or real `[n]`: whether the prediction is wrong, or its loss. An infinite one makes the areas
        infinite, and their difference NaN; the mean of losses of which some are +inf and others -inf is NaN.

    Returns:
      `RiskCoverage`; all NaN where a traced uncertainty or loss is NaN.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or a known value is NaN.

    Example:
      >>> risk_coverage(jnp.array([0.1, 0.9, 0.2, 0.2]), jnp.array([False, True, True, False])).risk
      Array([0.        , 0.25      , 0.33333334, 0.5       ], dtype=float32)

    Reference:
      Geifman, El-Yaniv, [Selective classification for deep neural networks](https://arxiv.org/abs/1705.08500), 2017;
      Geifman, Uziel, El-Yaniv, [Bias-reduced uncertainty estimation](https://arxiv.org/abs/1805.08206), 2019 (areas).
    """
    if _inputs.array("risk_coverage", "losses", losses).dtype == jnp.bool_:
        losses = jnp.asarray(losses).astype(jnp.float32)
    u, loss = _inputs.numbers("risk_coverage", uncertainty=uncertainty, losses=losses)
    if u.ndim != 1:
        raise ValueError(f"risk_coverage: uncertainty must be of shape [n], got {_checks.describe(u)}. Ravel both.")
    _checks.known_length("risk_coverage", "dimension 0 of uncertainty", u.shape[0])
    for name, value in [("uncertainty", uncertainty), ("losses", losses)]:
        _inputs.require("risk_coverage", f"{name} must not be NaN, {{got}}", value, lambda of: ~np.isnan(of))
    return _risk_coverage(u, loss)


@jax.jit
def _risk_coverage(u: Array, loss: Array) -> RiskCoverage:
    valid = ~(jnp.isnan(u).any() | jnp.isnan(loss).any())
    room = _inputs.headroom(loss).min()
    loss = loss * room
    count = jnp.arange(1, len(u) + 1)

    def mean(u: Array, loss: Array) -> Array:
        order = jnp.argsort(u)
        u, total = u[order], jnp.concatenate([jnp.zeros(1, loss.dtype), jnp.cumsum(loss[order])])
        first, last = jnp.searchsorted(u, u), jnp.searchsorted(u, u, side="right")
        share = (count - first).astype(loss.dtype) / (last - first).astype(loss.dtype)
        return (total[first] + share * (total[last] - total[first])) / count.astype(loss.dtype)

    def risk(u: Array) -> Array:
        # Infinities are counted apart: differences of their sums are inf - inf.
        above, below = (mean(u, (loss == end).astype(loss.dtype)) > 0 for end in (jnp.inf, -jnp.inf))
        finite = mean(u, jnp.where(jnp.isinf(loss), 0, loss)) / room
        return finite + (jnp.where(above, jnp.inf, 0) - jnp.where(below, jnp.inf, 0)).astype(loss.dtype)

    curve, best = risk(u), risk(loss)
    aurc, least = _inputs.mean(curve), _inputs.mean(best)
    coverage = count.astype(loss.dtype) / len(u)
    return RiskCoverage(coverage, *(nan_unless(valid, of) for of in (curve, aurc, jnp.maximum(aurc - least, 0))))


@_arguments.public
def detection(usual: ArrayLike, foreign: ArrayLike) -> Detection:
    """Returns how well an uncertainty tells inputs of another kind (out of distribution) from the usual ones.

    The foreign inputs are the positive class. Some papers (ODIN) take the usual ones: that is
    `detection(-foreign, -usual)`, of the same AUROC. It uses scikit-learn, outside jit.

    Args:
      usual: real `[n]`, the uncertainty of inputs like those of training.
      foreign: real `[m]`, that of inputs of another kind; higher if the uncertainty is any good.

    Returns:
      `Detection`.

    Raises:
      TypeError, ValueError: if an argument is traced, empty, NaN or not of one dimension.
      ModuleNotFoundError: if scikit-learn is not installed.

    Example:
      >>> detection(jnp.array([0.1, 0.3]), jnp.array([0.2, 0.9])).auroc
      0.75

    Reference:
      Hendrycks, Gimpel, [A baseline for detecting misclassified and out-of-distribution
      examples](https://arxiv.org/abs/1610.02136), 2017; Hendrycks, Mazeika, Dietterich, [Deep anomaly detection with
      outlier exposure](https://arxiv.org/abs/1812.04606), 2019 (foreign inputs positive); Liang, Li, Srikant,
      [ODIN](https://arxiv.org/abs/1706.02690), 2018 (usual inputs positive).
    """
    scores = [_scores(name, of) for name, of in [("usual", usual), ("foreign", foreign)]]
    try:
        from sklearn import metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "detection: scikit-learn must be installed, got no module sklearn. pip install scikit-learn."
        ) from error
    positive, both = np.repeat([0, 1], [len(of) for of in scores]), np.concatenate(scores)
    # infinities keep their order, which is all that counts
    both = np.unique(both, return_inverse=True)[1]
    false, true, _ = metrics.roc_curve(positive, both, drop_intermediate=False)
    auroc, aupr = metrics.roc_auc_score(positive, both), metrics.average_precision_score(positive, both)
    return Detection(float(auroc), float(aupr), float(false[np.argmax(true >= 0.95)]))


def _scores(name: str, value: Any) -> np.ndarray:
    if not _checks.is_known(value):
        raise TypeError(f"detection: {name} must be known values, got traced ones. Call it outside jit.")
    (x,) = _inputs.numbers("detection", **{name: value})
    if x.ndim != 1:
        raise ValueError(f"detection: {name} must be of shape [n], got {_checks.describe(x)}. Ravel it.")
    _inputs.require("detection", f"{name} must not be NaN, {{got}}", value, lambda of: ~np.isnan(of))
    return np.asarray(value)
