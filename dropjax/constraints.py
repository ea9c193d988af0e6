"""Constraints on weights that go with dropout: the max-norm constraint, for optax and as a function."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, masks

__all__ = ["clip_norm", "max_norm"]

_NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`."
)  # optax's own words, which it does not export


@_arguments.public
def max_norm(max_value: ArrayLike, *, axis: int | Sequence[int]) -> optax.GradientTransformation:
    """Changes updates so that each unit's weights have a norm of at most `max_value` once they are applied.

    Put it last in `optax.chain`: `optax.apply_updates` then gives `clip_norm(params + updates)`. Updates of units that
    stay within the bound pass as they are, bit for bit. Every parameter must have an axis of units besides `axis`;
    `optax.masked` keeps biases and all else out, as below, and one `masked` for each kind of kernel serves
    dense and convolutional layers side by side.

    What is added is a difference, rounded once to the dtype of the updates: a weight that was w before the
    step may be off by eps |w|, which is nothing unless w was far outside. Begin inside: initialise with `clip_norm`.

    Args:
      max_value: above 0, or inf for no bound: a number, or a float scalar that may be traced.
      axis: over which a unit's weights lie, as for `clip_norm`: 0 for dense kernels `[inputs, units]`, (0, 1, 2)
        for kernels of two-dimensional convolutions `[height, width, inputs, units]`.

    Returns:
      An `optax.GradientTransformation` without state, whose `update` needs `params`.

    Raises:
      TypeError, ValueError: if an argument is not as said above; when updating, if `params` is None, or a
        parameter is no real float array or has no axis of units.

    Example:
      >>> def kernels(params):
      ...   return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
      >>> optimizer = optax.chain(optax.sgd(1.0), optax.masked(max_norm(3.0, axis=0), kernels))
      >>> params = {"kernel": jnp.ones((2, 5)), "bias": jnp.ones(5)}
      >>> updates, _ = optimizer.update({"kernel": -8 * params["kernel"], "bias": params["bias"]},
      ...   optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> float(jnp.linalg.norm(params["kernel"], axis=0).round(5).max()), float(params["bias"][0])
      (3.0, 0.0)

    Reference:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, [Dropout: a simple way to prevent neural
      networks from overfitting](https://jmlr.org/papers/v15/srivastava14a.html), 2014, section 5.1. Keras's MaxNorm.
    """
    _limit("max_norm", max_value, jnp.result_type(float))
    return optax.GradientTransformation(_no_state, functools.partial(_update, max_value, axis))


def _no_state(params: Any) -> optax.EmptyState:
    return optax.EmptyState()


def _update(max_value: Any, axis: Any, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if params is None:
        raise ValueError(_NO_PARAMS)
    leaf = functools.partial(_bounded, max_value, axis)
    return jax.tree_util.tree_map_with_path(leaf, updates, params, is_leaf=lambda leaf: leaf is None), state


def _bounded(max_value: Any, axis: Any, path: Any, update: Any, param: Any) -> Any:
    """Returns the update of one parameter, changed where a unit's weights would pass the bound."""
    if update is None or param is None:
        return update
    update, param = (_checks.array("max_norm", array, real=True) for array in (update, param))
    dims = _checks.dims("max_norm", "axis", axis, param.ndim)
    if len(dims) == param.ndim:
        raise ValueError(
            f"max_norm: axis must leave an axis of units, got {axis} for {jax.tree_util.keystr(path) or 'params'} "
            f"of shape {param.shape}. Constrain kernels only, with optax.masked."
        )
    if update.shape != param.shape:
        raise ValueError(
            f"max_norm: updates must have the shapes of params, got {update.shape} for {param.shape} at "
            f"{jax.tree_util.keystr(path) or 'params'}."
        )
    wide = max(masks.wide(param), masks.wide(update))
    after = (param.astype(wide) + update.astype(wide)).astype(param.dtype)  # what optax.apply_updates gives
    bounded = clip_norm(after, max_value, axis=dims)
    change = (bounded.astype(wide) - param.astype(wide)).astype(update.dtype)
    return jnp.where(bounded == after, update, change)


@_arguments.public
def clip_norm(w: ArrayLike, max_value: ArrayLike, *, axis: int | Sequence[int]) -> Array:
    """Scales down each unit's weights whose norm exceeds `max_value`, to that norm.

    y = w min(1, max_value / ||w||_2), with the norm over `axis`, in float32 at least, and free of overflow. Weights
    within the bound stay as they are, bit for bit. Keras divides by ||w|| + 1e-7 instead, and shrinks all a little.
    The norm of y exceeds `max_value` by rounding only: by about half an eps of the dtype of w at most.

    Inside shard_map cut w along the axes of units only: the norm is that of the piece that is seen.

    Args:
      w: real float `[...]`.
      max_value: above 0, or inf for no bound: a number, or a float scalar that may be traced.
      axis: one or more axes over which a unit's weights lie; negatives count from the end.

    Returns:
      Array of the shape and dtype of w. A unit with a NaN is NaN, and an infinity becomes NaN; all is NaN where a
      traced `max_value` is not above 0.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> clip_norm(jnp.array([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [1.0, 0.5]]), 1.0, axis=0)[0].tolist()
      [0.5, 0.5]

    Reference:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, [Dropout: a simple way to prevent neural
      networks from overfitting](https://jmlr.org/papers/v15/srivastava14a.html), 2014, section 5.1.
    """
    w = _checks.array("clip_norm", w, real=True)
    dims = _checks.dims("clip_norm", "axis", axis, w.ndim)
    wide = w.astype(masks.wide(w))
    limit = _limit("clip_norm", max_value, wide.dtype).astype(wide.dtype)
    tiny = jnp.finfo(wide.dtype).tiny
    largest = lax.stop_gradient(jnp.max(jnp.abs(wide), axis=dims, keepdims=True, initial=0))
    unit = jnp.clip(largest, 2 * tiny, 0.5 / tiny)  # no square overflows, and XLA divides by multiplying with 1 / unit
    squares = jnp.sum((wide / unit) ** 2, axis=dims, keepdims=True)
    norm = jnp.sqrt(jnp.where(squares == 0, 1, squares))  # in this unit; the square root has no gradient at 0
    within = ((squares == 0) | (norm <= limit / unit)) & (limit > 0)
    bounded = (wide / unit) * (jnp.where(within, 1, limit) / norm)
    return jnp.where(within, w, bounded.astype(w.dtype))


def _limit(function: str, value: Any, dtype: Any) -> Array:
    number = isinstance(value, int | float | np.generic) and not isinstance(value, bool)
    if not number and not (_checks.is_array(value) and value.shape == ()):
        raise TypeError(
            f"{function}: max_value must be a number or a float scalar, got {_checks.describe(value)}. "
            "Use jax.vmap for several."
        )
    array = jnp.asarray(_checks.floats(value), dtype=float) if number else jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{function}: max_value must be a number or a float scalar, got {_checks.describe(value)}.")
    if _checks.is_traced(value):
        return masks.nan_unless(array > 0, array)
    if not np.asarray(value) > 0:
        raise ValueError(f"{function}: max_value must be above 0, got {value}.")
    if np.asarray(value) < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"{function}: max_value must be at least {jnp.finfo(dtype).tiny}, the least normal number of "
            f"{np.dtype(dtype)}, got {value}."
        )
    return array
