"""Mean and variance through a network with dropout in one pass, without sampling.

Each function takes and returns the mean and the variance of every unit, and takes the units to be
uncorrelated. For dropout followed by one dense layer that is exact. Behind a hidden layer it is not: its
units share the inputs that were dropped, so that their sums vary more or less than is said here, and a sum is
only about Gaussian, the less so the narrower the layer. docs/judging_uncertainty.md has numbers.

    mean, var = moments.dropout(x, jnp.zeros_like(x), 0.1)
    mean, var = moments.relu(*moments.dense(mean, var, kernel, bias))
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, masks
from dropjax.mc import _inputs

__all__ = ["dense", "dropout", "relu"]


@_arguments.public
def dropout(mean: ArrayLike, var: ArrayLike, rate: ArrayLike) -> tuple[Array, Array]:
    """Returns the mean and variance of units under dropout.

    y = x m / q with m ~ Bernoulli(q), q = 1 - rate: E[y] = E[x] and Var[y] = (Var[x] + rate E[x]^2) / q, exactly.
    Gaussian dropout has the same. At a rate of 1 both are 0, as in `dropjax.dropout`.

    Args:
      mean: float `[...]`.
      var: float, of the same shape, at least 0; zeros for a known input.
      rate: probability of dropping, in `[0, 1]`: a number, or a float array that broadcasts against mean.

    Returns:
      The mean and the variance, float32, or float64 for float64. NaN where a traced rate or variance is out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> dropout(jnp.array([2.0]), jnp.array([0.0]), 0.5)
      (Array([2.], dtype=float32), Array([4.], dtype=float32))

    Reference:
      Wang, Manning, [Fast dropout training](https://proceedings.mlr.press/v28/wang13a.html), 2013.
    """
    m, v = _check("dropout", mean, var)
    checked = _checks.rate("dropout", rate, m.shape)
    r = jnp.asarray(checked.value if isinstance(checked, _checks.Fixed) else checked).astype(m.dtype)
    r = jnp.broadcast_to(r, m.shape)
    kept = r < 1
    noise = r * jnp.where(r > 0, m, 0) * jnp.where(r > 0, m, 0)  # r m^2, of which m^2 alone may overflow
    variance = jnp.where(kept, v + noise, 0) / jnp.where(kept, 1 - r, 1)
    valid = (r >= 0) & (r <= 1)
    return masks.nan_unless(valid, jnp.where(kept, m, 0)), masks.nan_unless(valid, variance)


@_arguments.public
def dense(mean: ArrayLike, var: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None) -> tuple[Array, Array]:
    """Returns the mean and variance of a dense layer of uncorrelated units.

    E[y] = E[x] W + b and Var[y] = Var[x] W^2, the square of each element: exact if the units are uncorrelated, as
    those behind dropout of a known input are.

    Args:
      mean: float `[..., inputs]`.
      var: float, of the same shape, at least 0.
      kernel: float `[inputs, outputs]`.
      bias: float `[outputs]`, or None.

    Returns:
      The mean and the variance, `[..., outputs]`, float32, or float64 for float64; the variance is NaN where a traced
      one is negative.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> dense(jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0]), jnp.array([[3.0], [1.0]]))
      (Array([4.], dtype=float32), Array([11.], dtype=float32))

    Reference:
      Wang, Manning, [Fast dropout training](https://proceedings.mlr.press/v28/wang13a.html), 2013.
    """
    m, v = _check("dense", mean, var)
    w = _inputs.array("dense", "kernel", kernel)
    b = None if bias is None else _inputs.array("dense", "bias", bias)
    fits = m.ndim >= 1 and w.ndim == 2 and w.shape[0] == m.shape[-1] and (b is None or b.shape == w.shape[1:])
    got = f"got {_checks.describe(w)} and {'None' if b is None else _checks.describe(b)}"
    if not fits:
        raise ValueError(
            f"dense: kernel and bias must be of shapes [inputs, outputs] and [outputs], {got} "
            f"for a mean of {_checks.describe(m)}."
        )
    if not all(jnp.issubdtype(of.dtype, jnp.floating) for of in (w, w if b is None else b)):
        raise TypeError(f"dense: kernel and bias must be floats, {got}.")
    m, v, w = _inputs.widen(m, v, w)
    shift = jnp.zeros((), m.dtype) if b is None else b.astype(m.dtype)
    product = jnp.matmul(m, w, precision=jax.lax.Precision.HIGHEST)
    shift = jnp.broadcast_to(shift.reshape((1,) * (product.ndim - shift.ndim) + shift.shape), product.shape)
    return product + shift, jnp.matmul(v, w**2, precision=jax.lax.Precision.HIGHEST)


@_arguments.public
def relu(mean: ArrayLike, var: ArrayLike) -> tuple[Array, Array]:
    """Returns the mean and variance of max(x, 0) for Gaussian x.

    With a = mean / sigma: E[y] = sigma (a Φ(a) + φ(a)), Var[y] = sigma^2 (Φ + a^2 Φ (1 - Φ) - a φ (2 Φ - 1) - φ^2).
    Beside the rounding of the results, errors are below 1e-6 sigma and 1e-6 sigma^2.

    Args:
      mean: float `[...]`.
      var: float, of the same shape, at least 0; where it is 0 this is the ReLU of the mean.

    Returns:
      The mean and the variance, float32, or float64 for float64. NaN where a traced variance is negative.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> relu(jnp.array([0.0, 3.0]), jnp.array([1.0, 0.0]))[0].round(4)
      Array([0.3989, 3.    ], dtype=float32)

    Reference:
      Frey, Hinton, [Variational learning in nonlinear Gaussian belief
      networks](https://doi.org/10.1162/089976699300016872), 1999.
    """
    return _relu(*_check("relu", mean, var))


@jax.jit
def _relu(m: Array, v: Array) -> tuple[Array, Array]:
    sigma = jnp.sqrt(jnp.where(v == 0, 1, v))
    a = jnp.clip(m / sigma, -1e4, 1e4)  # beyond, Φ is 0 or 1; its square would overflow
    above, below, density = jax.scipy.special.ndtr(a), jax.scipy.special.ndtr(-a), jax.scipy.stats.norm.pdf(a)
    first = jnp.maximum(m, jnp.finfo(m.dtype).min) * above + sigma * density  # not -inf times 0
    second = above + a**2 * above * below + a * density * (below - above) - density**2
    known = jnp.where(m > 0, v, 0)  # keeps the derivative by the variance
    return (
        jnp.where(v == 0, jnp.maximum(m, 0), jnp.maximum(first, 0)),
        jnp.where(v == 0, known, sigma**2 * jnp.maximum(second, 0)),
    )


def _check(function: str, mean: ArrayLike, var: ArrayLike) -> tuple[Array, Array]:
    m, v = _inputs.array(function, "mean", mean), _inputs.array(function, "var", var)
    got = f"got {_checks.describe(m)} and {_checks.describe(v)}."
    if not all(jnp.issubdtype(of.dtype, jnp.floating) for of in (m, v)):
        raise TypeError(f"{function}: mean and var must be floats, {got}")
    if m.shape != v.shape:
        raise ValueError(f"{function}: mean and var must have one shape, {got} For a known input var is zeros.")
    _inputs.require(
        function, "var must not be negative, {got} It is the square of a deviation.", var, lambda of: ~(of < 0)
    )
    m, v = _inputs.widen(m, v)
    return m, masks.nan_unless(~(v < 0), v)
