"""Samples of a stochastic function, chunk by chunk."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from dropjax import _checks

_Carry = TypeVar("_Carry")


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


def fold(
    fn: Callable[[Array], Any],
    key: Array,
    num_samples: int,
    chunk_size: int,
    update: Callable[[_Carry, Any], _Carry],
    carry: _Carry,
) -> _Carry:
    """Updates the carry with the samples of one chunk `[chunk, ...]` after another; none is kept."""

    def step(carry: _Carry, samples: Array) -> tuple[_Carry, None]:
        return update(carry, jax.vmap(fn)(_keys(key, samples))), None

    chunks, rest = divmod(num_samples, chunk_size)
    if chunks:
        carry, _ = lax.scan(step, carry, jnp.arange(chunks * chunk_size).reshape(chunks, chunk_size))
    if rest:
        carry, _ = step(carry, jnp.arange(num_samples - rest, num_samples))
    return carry


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
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, samples)
