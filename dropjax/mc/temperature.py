"""Temperature scaling: rescales logits so that confidence matches accuracy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.masks import nan_unless
from dropjax.mc import _inputs, scores

_GRID = 65  # of log temperatures, for samples, whose likelihood may have several maxima
_HALVINGS = 45
_SEARCH = -60.0, 80.0  # log temperatures in units of the largest difference of logits, beyond which nothing changes


class FittedTemperature(NamedTuple):
    """A temperature, and whether it may be used without a second thought."""

    temperature: Array
    """float32 scalar: above 1 where the classifier was too sure, below 1 where it was not sure enough."""
    at_bound: Array
    """Whether it is one of `bounds`, because the likelihood has no maximum between them; bool."""


@_arguments.public
def fit_temperature(
    logits: ArrayLike, labels: ArrayLike, *, bounds: tuple[float, float] = (0.01, 100.0)
) -> FittedTemperature:
    """Finds the temperature whose softmax(logits / temperature) gives held-out labels the highest likelihood.

    The negative log likelihood is convex in 1 / temperature, so bisection on its derivative finds the minimum. For
    samples it is that of the mean over samples, mean_t softmax(logits_t / temperature), which need not be
    convex: the best of a grid of temperatures is refined. Fit it on examples that trained nothing. Where all
    labels have the highest logit the best temperature is 0, and where labels have low logits more often than high ones
    it is infinite: the bound is returned, `at_bound` is True and, outside jit, there is a warning. Where all logits of
    an example are equal every temperature is as good; if all examples are such, the lower bound is returned. The
    temperature is differentiable by the logits, 0 at a bound.

    Args:
      logits: float `[n, classes]`, or those of T samples, `[T, n, classes]`. For mean probabilities pass their log.
      labels: int `[n]`, the true classes.
      bounds: the lowest and the highest temperature to return.

    Returns:
      `FittedTemperature`; NaN where logits have no softmax (NaN, +inf, or all -inf), or a traced label is out of range
      or has probability 0.

    Raises:
      TypeError, ValueError: if shapes, dtypes or bounds do not fit, or known labels are out of range or impossible.
        Known logits that look like probabilities are a warning.

    Example:
      >>> logits = jnp.array([[4.0, 0.0]] * 4)  # sure to 98 %, right in 3 of 4: 4 / log 3
      >>> round(float(fit_temperature(logits, jnp.array([0, 0, 0, 1])).temperature), 2)
      3.64

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017.
    """
    z, labels = scores.check_logits("fit_temperature", logits, labels)
    _checks.known_length("fit_temperature", "dimension 0 of samples of logits", z.shape[0])
    _inputs.warn_of_probabilities("fit_temperature", logits, "For probabilities pass their logarithm.")
    ends = jnp.asarray(_ends(bounds, z.dtype))
    temperature, at_bound, impossible = _fit(z, labels, ends)
    if _checks.is_known(impossible) and bool(impossible):
        raise ValueError(
            "fit_temperature: labels must have a logit above -inf, got -inf at one of them: no temperature gives it a "
            "probability above 0. If these are logs of probabilities, compute them as jax.nn.log_softmax."
        )
    if _checks.is_known(at_bound) and bool(at_bound):
        _checks.warn(
            f"fit_temperature: the likelihood has no maximum in bounds={bounds}, and the temperature is one of "
            "them: either all labels have the highest logit (then take more examples), or the logits tell nothing."
        )
    return FittedTemperature(temperature, at_bound)


def _ends(bounds: Any, dtype: Any) -> np.ndarray:
    """Checks the lowest and the highest temperature; returns them in the dtype of the logits."""
    kinds = int | float | np.integer | np.floating
    two = isinstance(bounds, tuple | list) and len(bounds) == 2
    if two and all(isinstance(end, kinds) and not isinstance(end, bool) for end in bounds):
        limits = np.finfo(dtype)
        if float(limits.tiny) <= bounds[0] < bounds[1] <= float(limits.max):
            low, high = np.array(bounds, np.float64).astype(dtype)
            if low < high:
                return np.array([low, high], dtype)
    raise ValueError(
        f"fit_temperature: bounds must be two numbers, 0 < low < high, that {np.dtype(dtype)} holds, got {bounds}."
    )


@jax.jit
def _fit(logits: Array, labels: Array, ends: Array) -> tuple[Array, Array, Array]:
    valid = scores.has_softmax(logits, labels)
    possible = ~jnp.isneginf(_inputs.at_label(logits, labels)).all(0)
    impossible = (valid & ~possible).any()
    logits = jnp.where((valid & possible)[:, None], logits, 0)
    never = jnp.isneginf(logits)  # -inf stays so at any temperature, and its derivative is 0
    room = _inputs.headroom(jnp.where(never, 0, logits)).min()
    logits = logits * room
    away = jnp.where(never, 0, logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    # In units of the largest difference, so that no quotient in the search overflows or vanishes.
    unit = lax.stop_gradient(-away.min())
    unit = jnp.where(unit == 0, 1, unit)
    away, bounds = away / unit, jnp.clip(jnp.log(ends) - (jnp.log(unit) - jnp.log(room)), *_SEARCH)

    def loss(log_temperature: Array) -> Array:
        scaled = away * jnp.exp(-log_temperature)
        return -scores.log_likelihood(jnp.where(never, -jnp.inf, scaled), labels).mean()

    slope = jax.grad(loss)
    low, high = bounds
    if len(logits) > 1:
        grid = jnp.linspace(low, high, _GRID, dtype=bounds.dtype)
        best = lax.map(loss, grid).argmin()
        low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _GRID - 1)]

    def solve(slope: Callable[[Array], Array], _: Array) -> tuple[Array, tuple[Array, Array]]:
        def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = interval
            middle = (low + high) / 2
            falls = slope(middle) < 0
            return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

        left, right = lax.fori_loop(0, _HALVINGS, halve, (low, high))
        return (left + right) / 2, (left, right)

    def divide(curvature: Callable[[Array], Array], by: Array) -> Array:
        of_one = curvature(jnp.ones_like(by))
        return by / jnp.where(of_one == 0, 1, of_one)

    # its derivative is that of the root, and not that of halving, which is 0
    root, (left, right) = lax.custom_root(slope, low, solve, divide, has_aux=True)
    at_low = (left == bounds[0]) & (slope(bounds[0]) >= 0)
    at_high = (right == bounds[1]) & (slope(bounds[1]) <= 0)
    inside = jnp.clip(unit * jnp.exp(root) / room, *ends)
    fitted = jnp.where(at_low, ends[0], jnp.where(at_high, ends[1], inside))
    known = (valid & possible).all()
    return nan_unless(known, fitted), (at_low | at_high) & known, impossible


@_arguments.public
def temperature_scale(logits: ArrayLike, temperature: ArrayLike) -> Array:
    """Divides logits by a temperature: the order of the classes stays, the confidence changes.

    Args:
      logits: float `[..., classes]`; of samples, before their softmax is averaged.
      temperature: number or scalar array, above 0 and finite, as in `fit_temperature(...).temperature`; it may be
        traced.

    Returns:
      float32 array of the shape of logits, float64 for float64; infinite where that does not hold the quotient, NaN
      where a traced temperature is out of range.

    Raises:
      TypeError, ValueError: if shapes or dtypes do not fit, or a known temperature is out of range. Known logits that
        look like probabilities are a warning.

    Example:
      >>> temperature_scale(jnp.array([2.0, 0.0]), 4)
      Array([0.5, 0. ], dtype=float32)

    Reference:
      Guo, Pleiss, Sun, Weinberger, [On calibration of modern neural
      networks](https://arxiv.org/abs/1706.04599), 2017.
    """
    z = _inputs.array("temperature_scale", "logits", logits)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"temperature_scale: logits must be floats, got {_checks.describe(z)}.")
    number = _checks.is_array(temperature) or isinstance(temperature, int | float)
    t = _inputs.array("temperature_scale", "temperature", temperature) if number else jnp.zeros((), bool)
    if t.shape != () or not (jnp.issubdtype(t.dtype, jnp.floating) or jnp.issubdtype(t.dtype, jnp.integer)):
        raise TypeError(
            "temperature_scale: temperature must be a number or a scalar array, got "
            f"{_checks.describe(temperature)}. Of a fit, pass its field temperature."
        )
    _inputs.warn_of_probabilities("temperature_scale", logits, "For probabilities pass their logarithm.")
    (z,) = _inputs.widen(z)
    return z / _inputs.positive("temperature_scale", "temperature", temperature, t.astype(z.dtype))
