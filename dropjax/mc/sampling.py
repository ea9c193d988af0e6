"""Samples of a stochastic function, chunk by chunk."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dropjax import _checks


def sample(fn: Callable[[Array], Any], key: Array, num_samples: int, *, chunk_size: int | None = None) -> Any:
    """Draws samples of a stochastic function: one forward pass for each.

    Sample t is `fn(fold_in(key, t))`: its masks do not depend on `chunk_size`, and 100 samples are the
    first of 200. Call it inside `jax.jit`.

    Args:
      fn: function of a key that returns a pytree of arrays.
      key: one JAX key.
      num_samples: T, at least 1.
      chunk_size: how many samples are computed at a time, which bounds the memory; None for all.

    Returns:
      The pytree of `fn` with arrays of shape `[T, ...]`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> import dropjax
      >>> samples = sample(lambda key: dropjax.dropout(key, jnp.ones(3), 0.5), jax.random.key(0), 100)
      >>> samples.shape
      (100, 3)

    Reference:
      Gal, Ghahramani, [Dropout as a Bayesian approximation](https://arxiv.org/abs/1506.02142), 2016.
    """
    key, num_samples, chunk_size, _ = check("sample", fn, key, num_samples, chunk_size)
    keys = _keys(key, jnp.arange(num_samples))
    return jax.vmap(fn)(keys) if chunk_size == num_samples else lax.map(fn, keys, batch_size=chunk_size)


def fold(fn: Callable[[Array], Any], key: Array, num_samples: int, chunk_size: int) -> Any:
    """Returns the sum over samples of the pytree `fn(key)`, computed chunk by chunk; none is kept."""

    def chunk(samples: Array) -> Any:
        return jax.tree.map(lambda values: values.sum(0), jax.vmap(fn)(_keys(key, samples)))

    first = num_samples % chunk_size or chunk_size
    rest = jnp.arange(first, num_samples).reshape(-1, chunk_size)
    total = chunk(jnp.arange(first))  # before the scan, so that its carry has the types that sums have on a mesh
    if len(rest):
        total, _ = lax.scan(lambda sums, samples: (jax.tree.map(jnp.add, sums, chunk(samples)), None), total, rest)
    return total


def check(
    function: str, fn: Callable[[Array], Any], key: Array, num_samples: int, chunk_size: int | None
) -> tuple[Array, int, int, Any]:
    """Returns the checked key, number of samples and how many to compute at a time, and the shapes of `fn`."""
    if not callable(fn):
        raise TypeError(f"{function}: fn must be a function of a key, got {_checks.describe(fn)}.")
    num_samples = _checks.integer(function, "num_samples", num_samples, 1)
    chunk_size = num_samples if chunk_size is None else _checks.integer(function, "chunk_size", chunk_size, 1)
    key = _checks.key(function, key)
    program, shapes = jax.make_jaxpr(fn, return_shape=True)(key)
    if num_samples > 1 and not _depends(program.jaxpr):
        warnings.warn(
            f"{function}: fn ignores its key, so its {num_samples} samples are all the same. Is the model in "
            "evaluation mode, or does its dropout take keys from elsewhere?",
            stacklevel=3,
        )
    return key, num_samples, min(chunk_size, num_samples), shapes


def _depends(program: Any) -> bool:
    """Whether any result of a traced function of a key depends on the key."""
    needed = {id(result) for result in program.outvars}
    for equation in reversed(program.eqns):
        if any(id(result) in needed for result in equation.outvars):
            needed |= {id(operand) for operand in equation.invars}
    return any(id(operand) in needed for operand in program.invars)


def _keys(key: Array, samples: Array) -> Array:
    if _checks.is_typed(key) and jax.random.key_impl(key) == "unsafe_rbg":  # whose vmap is not a loop
        return lax.map(lambda t: jax.random.fold_in(key, t), samples)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, samples)
