"""The inputs of metrics: known values are checked, traced ones that are invalid give NaN, and sums do not overflow."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _checks
from dropjax.masks import nan_unless

_ROOM = 2.0**-40  # sums of 2^40 of what it multiplies do not overflow


def array(function: str, argument: str, value: Any, *, whole: bool = False) -> Array:
    """Returns a value as an array, and names the field to pass where the value is a whole summary.

    Unless it must be whole, integers that JAX's own do not hold become floats: JAX would wrap those of NumPy around,
    and refuse those of Python.
    """
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        remedy = f"Pass one of its fields: {', '.join(value._fields)}."
        if argument in value._fields:
            remedy = f"Pass its field {argument}."
        elif argument == "logits" and "probabilities" in value._fields:
            remedy = "Pass the logarithm of its field probabilities."
        raise TypeError(f"{function}: {argument} must be an array, got a {type(value).__name__}. {remedy}")
    try:
        if not whole and isinstance(value, int | list | tuple | np.ndarray | np.generic) and _checks.is_known(value):
            known, held = np.asarray(value), np.iinfo(jnp.result_type(int))
            if known.dtype.kind in "iu" and known.size and not held.min <= known.min() <= known.max() <= held.max:
                value = known.astype(np.float64)
        if value is not None:
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(
        f"{function}: {argument} must be an array of numbers, got {_checks.describe(value)}. "
        "Convert it with jnp.asarray."
    )


def real(function: str, argument: str, value: Any) -> Array:
    """Returns a value as an array of floats or integers."""
    x = array(function, argument, value)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{function}: {argument} must be real numbers, got {_checks.describe(x)}.")
    return x


def widen(*arrays: Array) -> tuple[Array, ...]:
    """Returns arrays in one dtype, float32 or, where one of them is float64, float64."""
    wide = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
    return tuple(x.astype(wide) for x in arrays)


def headroom(*arrays: Array) -> Array:
    """Returns for each element 1, or 2^-40 where a number is so large that sums of it may overflow.

    Metrics in units of the target are computed of numbers times this, and divided by it.
    """
    largest = functools.reduce(jnp.maximum, [jnp.abs(lax.stop_gradient(x)) for x in arrays])
    limit = float(jnp.finfo(largest.dtype).max) * _ROOM
    return jnp.where(largest > limit, jnp.asarray(_ROOM, largest.dtype), jnp.asarray(1, largest.dtype))


def mean(values: Array) -> Array:
    """Returns the mean, which is infinite only where the dtype does not hold it, or a value is infinite."""
    room = headroom(values).min()
    return (values * room).mean() / room


def difference(a: Array, b: Array) -> Array:
    """Returns a - b, which is 0 where both are the same infinity."""
    same = (a == b) & jnp.isinf(a)
    return jnp.where(same, 0, a) - jnp.where(same, 0, b)


def log_softmax(logits: Array, room: ArrayLike = 1) -> Array:
    """Returns the logarithm of the softmax over the last dimension, times `headroom`.

    The largest is subtracted twice. Compiled on a CPU, s * z - max is rounded once, so that of large logits s * z the
    largest is not 0, and `jax.nn.log_softmax` is NaN.
    """
    shifted = logits * room
    for _ in range(2):
        shifted = difference(shifted, lax.stop_gradient(shifted.max(-1, keepdims=True)))
    return shifted - room * jnp.log(jnp.exp(shifted / room).sum(-1, keepdims=True))


def log_mean_exp(values: Array, room: ArrayLike = 1) -> Array:
    """Returns the logarithm of the mean of exp(values / room) over the first dimension, times room."""
    largest = lax.stop_gradient(values.max(0))
    return largest + room * jnp.log(jnp.exp(difference(values, largest[None]) / room).mean(0))


def warn_of_probabilities(function: str, logits: Any, remedy: str) -> None:
    """Warns the caller of a public function whose logits look like probabilities."""
    if _checks.look_like_probabilities(logits):
        _checks.warn(
            f"{function}: logits must be unnormalised, got numbers of at least 0 that sum to 1 over the classes, as "
            f"probabilities do. {remedy}",
        )


def classes(function: str, probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Checks probabilities `[n, classes]` and labels `[n]`."""
    y = labelled(function, "probabilities", probabilities, labels, (2,))
    return simplex(function, probabilities), y


def simplex(function: str, probabilities: ArrayLike) -> Array:
    """Checks class probabilities `[n, classes]`."""
    p = array(function, "probabilities", probabilities)
    if not jnp.issubdtype(p.dtype, jnp.floating):
        raise TypeError(f"{function}: probabilities must be floats, got {_checks.describe(p)}.")
    if p.ndim != 2 or not p.size:
        raise ValueError(
            f"{function}: probabilities must be of shape [n, classes], n and classes at least 1, got "
            f"{_checks.describe(p)}."
        )
    if _checks.is_known(probabilities):
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


def clean(probabilities: Array, labels: Array | None = None) -> tuple[Array, Array]:
    """Returns checked probabilities, wide, and whether each row and its label are valid; 0 in rows that are not."""
    (p,) = widen(probabilities)
    between, summing = _good(p, probabilities.dtype)
    valid = between & summing
    if labels is not None:
        valid &= is_label(labels, probabilities)
    return jnp.where(valid[:, None], p, 0), valid


def is_label(labels: Array, predictions: Array) -> Array:
    """Whether each label is one of the classes."""
    return (labels >= 0) & (labels < predictions.shape[-1])


def at_label(values: Array, labels: Array) -> Array:
    """Returns the value of the true class, `[..., n]` of `[..., n, classes]`; of some class where there is none."""
    index = jnp.clip(labels, 0, values.shape[-1] - 1)
    index = jnp.broadcast_to(index.reshape((1,) * (values.ndim - 2) + (-1, 1)), (*values.shape[:-1], 1))
    return jnp.take_along_axis(values, index, -1)[..., 0]


def _good(p: Any, dtype: Any) -> tuple[Any, Any]:
    return ((p >= 0) & (p <= 1.001)).all(-1), abs(p.sum(-1) - 1) <= slack(dtype)


def slack(dtype: Any) -> float:
    """How far from 1 probabilities may sum: each may have been rounded to its dtype."""
    return 0.01 + float(jnp.finfo(dtype).eps)


def labelled(function: str, what: str, predictions: ArrayLike, labels: ArrayLike, ranks: tuple[int, ...]) -> Array:
    """Checks floats `[..., n, classes]` and labels `[n]`; returns the labels as int32, -1 where they are none."""
    x, y = array(function, what, predictions), array(function, "labels", labels, whole=True)
    got = f"got {_checks.describe(x)} and {_checks.describe(y)}."
    if x.ndim not in ranks or y.shape != x.shape[-2:-1]:
        shapes = "[n, classes]" if ranks == (2,) else "[n, classes] (or [T, n, classes])"
        remedy = "For one-hot labels pass their argmax."
        if x.ndim > 2 and y.shape == x.shape[:-1]:
            remedy = "Reshape both, so that all but the classes is one dimension."
        elif y.ndim in ranks and x.shape == y.shape[-2:-1]:
            remedy = f"The order of the arguments is {what}, labels."
        elif x.ndim == 1 and y.shape == x.shape:
            remedy = "For two classes pass both: stack 1 - p and p along a last dimension."
        elif y.shape == (*x.shape[-2:-1], 1):
            remedy = "Ravel the labels."
        raise ValueError(f"{function}: {what} and labels must be of shapes {shapes} and [n], {got} {remedy}")
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(y.dtype, jnp.integer):
        remedy = "Convert them with labels.astype(int)." if jnp.issubdtype(x.dtype, jnp.floating) else ""
        raise TypeError(f"{function}: {what} must be floats and labels integers, {got} {remedy}".rstrip())
    if not x.size:
        raise ValueError(f"{function}: {what} must hold at least one example, {got}")
    if _checks.is_known(labels):
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
    found = [array(function, name, value) for name, value in arrays.items()]
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
    if _checks.is_known(value):
        values = np.asarray(value).astype(np.float64)
        wrong = values[~good(values)]
        if wrong.size:
            raise ValueError(f"{function}: {rule.format(got=f'got {wrong.flat[0]:g}.')}")


def positive(function: str, argument: str, value: Any, wide: Array, remedy: str = "") -> Array:
    """Checks that known numbers are above 0 and finite in the dtype of `wide`; returns NaN where traced ones aren't."""
    limits = jnp.finfo(wide.dtype)
    tiny, largest = float(limits.tiny), float(limits.max)
    require(function, f"{argument} must be above 0, {{got}}{remedy}", value, lambda number: number > 0)
    rule = f"{argument} must be in [{tiny:.2g}, {largest:.2g}], the normal numbers of {wide.dtype}, {{got}}{remedy}"
    require(function, rule, value, lambda number: (number >= tiny) & (number <= largest))
    return nan_unless((wide > 0) & (wide < jnp.inf), wide)


def choice(function: str, argument: str, value: Any, options: tuple[Any, ...]) -> None:
    """Checks an option that is one of a few."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{function}: {argument} must be one of {options}, got {_checks.describe(value)}.")


def fraction(function: str, argument: str, value: Any) -> float:
    """Returns a known number strictly between 0 and 1, as the decimal it is written as: 0.1 for `np.float32(0.1)`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{function}: {argument} must be a number, got {_checks.describe(value)}.")
    number = float(str(value))  # infinite for an integer that no float holds
    if not 0 < number < 1:
        hint = f" For a percentage, pass {number / 100:g}." if 1 < number < 100 else ""
        raise ValueError(f"{function}: {argument} must be in (0, 1), got {_checks.describe(number)}.{hint}")
    return number
