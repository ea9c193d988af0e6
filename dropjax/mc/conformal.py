"""Split conformal prediction: sets and intervals that hold the truth as often as was asked for."""

import functools
import math
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs

Score = Literal["lac", "aps"]
_NOISE = " Add the standard deviation of the noise, or a small number."


@_arguments.public
def conformal_threshold(scores: ArrayLike, alpha: float) -> Array:
    """Returns the k-th smallest score, k = ceil((n + 1) (1 - alpha)), or infinity if n is too small for it.

    If the n held-out examples and a new one are exchangeable, the score of the new one is at most this with
    probability at least 1 - alpha, and without ties at most 1 - alpha + 1 / (n + 1). That is over held-out
    and new examples together: with these held-out examples the coverage is Beta(k, n + 1 - k) distributed. It
    says nothing of single classes or regions, and nothing if new examples come from elsewhere.

    Args:
      scores: real `[n]`, of held-out examples: `conformal_scores` or `conformal_residuals`.
      alpha: how often the truth may be missed, a known number in (0, 1), taken as the decimal it is written as.

    Returns:
      Scalar of the dtype of scores, float32 at least, and one of them; infinity where n < 1 / alpha - 1, NaN where a
      traced score is NaN.

    Raises:
      TypeError, ValueError: if scores are not numbers `[n]` or known ones are NaN, or alpha is out of range.

    Example:
      >>> conformal_threshold(jnp.arange(1.0, 10.0), 0.1), conformal_threshold(jnp.arange(1.0, 9.0), 0.1)
      (Array(9., dtype=float32), Array(inf, dtype=float32))

    Reference:
      Vovk, Gammerman, Shafer, [Algorithmic learning in a random world](https://doi.org/10.1007/b106715), 2005;
      Angelopoulos, Bates, [A gentle introduction to conformal prediction](https://arxiv.org/abs/2107.07511), 2021.
    """
    (s,) = _inputs.numbers("conformal_threshold", scores=scores)
    if s.ndim != 1:
        raise ValueError(f"conformal_threshold: scores must be of shape [n], got {_checks.describe(s)}.")
    _checks.known_length("conformal_threshold", "dimension 0 of scores", s.shape[0])
    alpha = _inputs.fraction("conformal_threshold", "alpha", alpha)
    _inputs.require("conformal_threshold", "scores must not be NaN, {got}", scores, lambda of: ~np.isnan(of))
    k = math.ceil((len(s) + 1) * (1 - Fraction(repr(alpha))))
    return _smallest(s, k)


@functools.partial(jax.jit, static_argnums=1)
def _smallest(s: Array, k: int) -> Array:
    threshold = jnp.sort(s)[k - 1] if k <= len(s) else jnp.asarray(jnp.inf, s.dtype)
    return nan_unless(~jnp.isnan(s).any(), threshold)


@_arguments.public
def conformal_scores(
    probabilities: ArrayLike, labels: ArrayLike, *, score: Score = "lac", key: Array | None = None
) -> Array:
    """Returns how little each true class was expected: the scores of a conformal classifier.

    `"lac"` is 1 - p of the true class, which gives the smallest sets on average. `"aps"` is the sum of the
    probabilities down to the true class, from the most probable on, which gives larger sets to harder inputs; with a
    key less u times the last one, u ~ U(0, 1), without which its sets cover more than was asked for.

    Args:
      probabilities: float `[n, classes]` of held-out examples, such as the means over Monte Carlo samples.
      labels: int `[n]`, the true classes.
      score: `"lac"` or `"aps"`.
      key: for `"aps"`, one JAX key that randomises the scores; pass another one to `conformal_sets`.

    Returns:
      float32 `[n]`, float64 for float64; NaN where traced probabilities or labels are out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> conformal_scores(jnp.array([[0.5, 0.25, 0.25]]), jnp.array([1])), conformal_scores(
      ...     jnp.array([[0.5, 0.25, 0.25]]), jnp.array([1]), score="aps")
      (Array([0.75], dtype=float32), Array([0.75], dtype=float32))

    Reference:
      Sadinle, Lei, Wasserman, [Least ambiguous set-valued classifiers](https://arxiv.org/abs/1609.00451), 2019;
      Romano, Sesia, Candès, [Classification with valid and adaptive coverage](https://arxiv.org/abs/2006.02544), 2020.
    """
    p, y = _inputs.classes("conformal_scores", probabilities, labels)
    return _of_labels(p, y, score, _check("conformal_scores", score, key))


@_arguments.public
def conformal_sets(
    probabilities: ArrayLike, threshold: ArrayLike, *, score: Score = "lac", key: Array | None = None
) -> Array:
    """Returns the classes whose score is not above the threshold: the set that holds the truth.

    A set may be empty, where every class is less expected than the truth mostly was; that is part of the
    coverage. Where the threshold or a score is NaN all classes are in it.

    Args:
      probabilities: float `[n, classes]` of new examples.
      threshold: scalar, `conformal_threshold(conformal_scores(...), alpha)` of the same score.
      score: `"lac"` or `"aps"`.
      key: for `"aps"`, if the scores had one: another one.

    Returns:
      bool `[n, classes]`.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or known values are out of range.

    Example:
      >>> conformal_sets(jnp.array([[0.6, 0.3, 0.1]]), 0.75)
      Array([[ True,  True, False]], dtype=bool)

    Reference:
      Sadinle, Lei, Wasserman, [Least ambiguous set-valued classifiers](https://arxiv.org/abs/1609.00451), 2019;
      Romano, Sesia, Candès, [Classification with valid and adaptive coverage](https://arxiv.org/abs/2006.02544), 2020.
    """
    p = _inputs.simplex("conformal_sets", probabilities)
    key = _check("conformal_sets", score, key)
    return _sets(p, _scalar("conformal_sets", threshold), score, key)


@_arguments.public
def conformal_residuals(mean: ArrayLike, targets: ArrayLike, *, std: ArrayLike | None = None) -> Array:
    """Returns |target - mean|, divided by std where it is given: the scores of a conformal regression.

    Args:
      mean: real `[n]`, predictions for held-out examples.
      targets: real, of the same shape.
      std: real, of the same shape, above 0 and finite: such as the standard deviation over Monte Carlo samples, plus
        the noise. It makes intervals wide where it is large, and need not be calibrated.

    Returns:
      float32 `[n]`, float64 for float64; infinite where one of mean and target is, 0 where both are the same infinity;
      NaN where one is NaN, or a traced std is out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or a known std is out of range.

    Example:
      >>> conformal_residuals(jnp.array([1.0]), jnp.array([4.0]), std=jnp.array([2.0]))
      Array([1.5], dtype=float32)

    Reference:
      Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, [Distribution-free predictive inference for
      regression](https://arxiv.org/abs/1604.04173), 2018.
    """
    if std is None:
        m, y = _inputs.numbers("conformal_residuals", mean=mean, targets=targets)
        return jnp.abs(_inputs.difference(y, m))
    m, y, s = _inputs.numbers("conformal_residuals", mean=mean, targets=targets, std=std)
    s, room = _inputs.positive("conformal_residuals", "std", std, s, _NOISE), _inputs.headroom(m, y)
    return jnp.abs(_inputs.difference(y * room, m * room)) / s / room


@_arguments.public
def conformal_intervals(mean: ArrayLike, threshold: ArrayLike, *, std: ArrayLike | None = None) -> tuple[Array, Array]:
    """Returns the interval mean ± threshold, times std where it is given.

    Args:
      mean: real `[n]`, predictions for new examples.
      threshold: scalar, `conformal_threshold(conformal_residuals(...), alpha)`.
      std: real, of the same shape as mean, above 0 and finite, if the residuals were divided by it.

    Returns:
      The lower and the upper ends, of the shape of mean: -inf and inf where the threshold is infinite; NaN where a mean
      or the threshold is NaN, or a traced std is out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or a known std is out of range.

    Example:
      >>> conformal_intervals(jnp.array([1.0]), 0.5, std=jnp.array([4.0]))
      (Array([-1.], dtype=float32), Array([3.], dtype=float32))

    Reference:
      Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, [Distribution-free predictive inference for
      regression](https://arxiv.org/abs/1604.04173), 2018.
    """
    (m,) = _inputs.numbers("conformal_intervals", mean=mean)
    s = jnp.ones_like(m)
    if std is not None:
        m, s = _inputs.numbers("conformal_intervals", mean=mean, std=std)
        s = _inputs.positive("conformal_intervals", "std", std, s, _NOISE)
    t = _scalar("conformal_intervals", threshold).astype(m.dtype)
    t, room = jnp.broadcast_to(t, m.shape), _inputs.headroom(m)
    half = t * room * s
    center = jnp.where(jnp.isinf(half) & ~jnp.isnan(m), 0, m * room)  # an endless interval has no center
    return (center - half) / room, (center + half) / room


def _check(function: str, score: str, key: Array | None) -> Array | None:
    _inputs.choice(function, "score", score, ("lac", "aps"))
    if key is None:
        return None
    if score == "lac":
        raise ValueError(f"{function}: key must be None for score='lac', which is not randomised, got a key.")
    return _checks.key(function, key)


@functools.partial(jax.jit, static_argnums=2)
def _of_labels(p: Array, labels: Array, score: str, key: Array | None) -> Array:
    p, valid = _inputs.clean(p, labels)
    return nan_unless(valid, _inputs.at_label(_scores(p, score, key), labels))


@functools.partial(jax.jit, static_argnums=2)
def _sets(p: Array, threshold: Array, score: str, key: Array | None) -> Array:
    p, valid = _inputs.clean(p)
    scores, limit = _inputs.widen(_scores(p, score, key), threshold)
    return ~(scores > limit) | ~valid[:, None]


def _scores(p: Array, score: str, key: Array | None) -> Array:
    """Scores of all classes, `[n, classes]`."""
    if score == "lac":
        return 1 - p
    order = jnp.argsort(-p, -1)  # stable: equal probabilities in the order of the classes
    total = jnp.take_along_axis(jnp.cumsum(jnp.take_along_axis(p, order, -1), -1), jnp.argsort(order, -1), -1)
    if key is None:
        return total
    return total - p * jax.random.uniform(key, (p.shape[0], 1), p.dtype)


def _scalar(function: str, threshold: ArrayLike) -> Array:
    number = _checks.is_array(threshold) or isinstance(threshold, int | float | complex | list | tuple)
    x = _inputs.array(function, "threshold", threshold) if number else jnp.zeros((), bool)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{function}: threshold must be a real scalar, got {_checks.describe(threshold)}.")
    if x.shape != ():
        raise ValueError(f"{function}: threshold must be a scalar, got {_checks.describe(threshold)}.")
    return x
