"""What the judges of uncertainty take: known values are checked, unknown ones give NaN where they are wrong."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks


def is_known(value: Any) -> bool:
    """Whether the values of an array can be looked at here and now."""
    return not _checks.is_traced(value) and getattr(value, "is_fully_addressable", True)


def widen(*arrays: Array) -> tuple[Array, ...]:
    """Returns arrays in one dtype, float32 or, where one of them is float64, float64."""
    wide = jnp.float64 if any(of.dtype == jnp.float64 for of in arrays) else jnp.float32
    return tuple(of.astype(wide) for of in arrays)


def classes(function: str, probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Checks probabilities `[n, classes]` and labels `[n]`."""
    y = labelled(function, "probabilities", probabilities, labels, (2,))
    return simplex(function, probabilities), y


def simplex(function: str, probabilities: ArrayLike) -> Array:
    """Checks class probabilities `[n, classes]`."""
    p = jnp.asarray(probabilities)
    if not jnp.issubdtype(p.dtype, jnp.floating):
        raise TypeError(f"{function}: probabilities must be floats, got {_checks.describe(p)}.")
    if p.ndim != 2 or not p.size:
        raise ValueError(
            f"{function}: probabilities must be of shape [n, classes], n and classes at least 1, got "
            f"{_checks.describe(p)}."
        )
    if is_known(probabilities):
        values = np.asarray(probabilities).astype(np.float64)
        between, summing = _good(values, p.dtype)
        if not between.all():
            wrong = values[~((values >= 0) & (values <= 1.001))][0]
            raise ValueError(
                f"{function}: probabilities must be in [0, 1], got {wrong:g}. For logits pass their softmax."
            )
        if not summing.all():
            raise ValueError(
                f"{function}: probabilities must sum to 1 over the classes, got {values.sum(-1)[~summing][0]:.6g}. "
                "For logits pass their softmax, for two classes both of their probabilities."
            )
    return p


def clean(probabilities: Array, labels: Array | None = None) -> Array:
    """Returns checked probabilities, wide; NaN in rows that are wrong, or whose label is."""
    (p,) = widen(probabilities)
    between, summing = _good(p, probabilities.dtype)
    right = between & summing
    if labels is not None:
        right &= is_label(labels, probabilities)
    return jnp.where(right[:, None], p, jnp.nan)


def is_label(labels: Array, predictions: Array) -> Array:
    """Whether each label is one of the classes."""
    return (labels >= 0) & (labels < predictions.shape[-1])


def at_label(values: Array, labels: Array) -> Array:
    """Returns the value of the true class, `[..., n]` of `[..., n, classes]`; of some class where there is none."""
    index = jnp.clip(labels, 0, values.shape[-1] - 1)
    index = jnp.broadcast_to(index.reshape((1,) * (values.ndim - 2) + (-1, 1)), (*values.shape[:-1], 1))
    return jnp.take_along_axis(values, index, -1)[..., 0]


def _good(p: Any, dtype: Any) -> tuple[Any, Any]:
    slack = 0.01 + float(jnp.finfo(dtype).eps)  # each may have been rounded to its dtype
    return ((p >= 0) & (p <= 1.001)).all(-1), abs(p.sum(-1) - 1) <= slack


def labelled(function: str, what: str, predictions: ArrayLike, labels: ArrayLike, ranks: tuple[int, ...]) -> Array:
    """Checks floats `[..., n, classes]` and labels `[n]`; returns the labels as int32, -1 where they are none."""
    x, y = jnp.asarray(predictions), jnp.asarray(labels)
    got = f"got {_checks.describe(x)} and {_checks.describe(y)}."
    if x.ndim not in ranks or y.shape != x.shape[-2:-1]:
        shapes = "[n, classes]" if ranks == (2,) else "[n, classes] (or [T, n, classes])"
        remedy = "For one-hot labels pass their argmax."
        if x.ndim > 2 and y.shape == x.shape[:-1]:
            remedy = "Reshape both, so that all but the classes is one dimension."
        raise ValueError(f"{function}: {what} and labels must be of shapes {shapes} and [n], {got} {remedy}")
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"{function}: {what} must be floats and labels integers, {got}")
    if not x.size:
        raise ValueError(f"{function}: {what} must hold at least one example, {got}")
    if is_known(labels):
        values = np.asarray(labels)
        wrong = values[(values < 0) | (values >= x.shape[-1])]
        if wrong.size:
            raise ValueError(
                f"{function}: labels must be in [0, {x.shape[-1]}), got {wrong[0]}. Leave out the examples without one."
            )
    if y.dtype.itemsize < 4:  # which may not hold the number of classes
        y = y.astype(jnp.int32)
    right = (y >= 0) & (y < x.shape[-1])
    return jnp.where(right, jnp.where(right, y, 0).astype(jnp.int32), -1)


def numbers(function: str, **arrays: ArrayLike) -> tuple[Array, ...]:
    """Returns real arrays of one shape and of one wide dtype."""
    found = [jnp.asarray(of) for of in arrays.values()]
    got = " and ".join(_checks.describe(of) for of in found)
    names = " and ".join(arrays)
    if any(not (jnp.issubdtype(of.dtype, jnp.floating) or jnp.issubdtype(of.dtype, jnp.integer)) for of in found):
        raise TypeError(f"{function}: {names} must be real numbers, got {got}.")
    if any(of.shape != found[0].shape for of in found):
        raise ValueError(
            f"{function}: {names} must have one shape, got {got}. Reshape them: broadcasting [n] against [n, 1] would "
            "compare everything with everything."
        )
    if not found[0].size:
        raise ValueError(f"{function}: {names} must hold at least one number, got {got}.")
    return widen(*found)


def require(function: str, rule: str, value: Any, good: Any) -> None:
    """Raises where a known value is not as the rule says; `good` is a function of NumPy values."""
    if is_known(value):
        values = np.asarray(value).astype(np.float64)
        wrong = values[~good(values)]
        if wrong.size:
            raise ValueError(f"{function}: {rule.format(got=f'got {wrong.flat[0]:g}.')}")


def choice(function: str, argument: str, value: Any, options: tuple[Any, ...]) -> None:
    """Checks an option that is one of a few."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{function}: {argument} must be one of {options}, got {_checks.describe(value)}.")


def fraction(function: str, argument: str, value: Any) -> float:
    """Returns a known number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{function}: {argument} must be a number, got {_checks.describe(value)}.")
    if not 0 < value < 1:
        hint = f" For a percentage, pass {value / 100:g}." if 1 < value < 100 else ""
        raise ValueError(f"{function}: {argument} must be in (0, 1), got {_checks.describe(float(value))}.{hint}")
    return float(value)
