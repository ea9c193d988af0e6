"""What several draws of one function cost: their divergence, and samples of a head."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, masks, sharding
from dropjax.functional import elementwise


class RDrop(NamedTuple):
    """Two draws of a function and how much they disagree."""

    logits: Array
    """`[2, ...]`, as the function returned them: the task's loss is the mean over both."""
    divergence: Array
    """`[...]` without the axis of classes, float32 at least: its mean times alpha is added to the loss."""


@_arguments.public
def r_drop(fn: Callable[[Array], Array], key: Array, *, axis: int = -1, logits: bool = True) -> RDrop:
    """Runs a stochastic function for two keys at once, and measures by how much its two predictions differ.

    loss = mean over both draws of the task's loss + alpha * mean of (KL(p1 || p2) + KL(p2 || p1)) / 2. Both draws are
    one batch (`jax.vmap` over the keys), which reads the weights once. A function that ignores its key, such as a
    network in evaluation, has a divergence of exactly 0: no error, and no regularisation.

    Args:
      fn: function of a key that returns logits, real float `[..., classes]`.
      key: one JAX key; it is consumed.
      axis: the axis of the classes in what fn returns.
      logits: whether fn returns logits; False where it returns probabilities. Outside jit probabilities that are
        taken for logits are a warning.

    Returns:
      `RDrop`: logits `[2, ...]` and their divergence `[...]`.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> import dropjax
      >>> x = jnp.ones((3, 4))
      >>> logits, divergence = r_drop(lambda key: dropjax.dropout(key, x, 0.5), jax.random.key(0))
      >>> logits.shape, divergence.shape
      ((2, 3, 4), (3,))

    Reference:
      Wu, Li, Wang, Meng, Qin, Chen, Zhang, Liu, [R-Drop: regularized dropout for neural
      networks](https://arxiv.org/abs/2106.14448), 2021. Peers sum the divergence over batch and classes, or average
      it over both, which changes the meaning of alpha; here the mean over the batch is the caller's.
    """
    if not callable(fn):
        raise TypeError(f"r_drop: fn must be a function of a key, got {_checks.describe(fn)}.")
    keys = jax.random.split(_checks.key("r_drop", key))
    logits = _checks.flag("r_drop", "logits", logits)
    outputs = jax.vmap(fn)(keys)
    if not _checks.is_array(outputs) or not jnp.issubdtype(outputs.dtype, jnp.floating) or outputs.ndim < 2:
        got = _checks.describe(outputs[0] if _checks.is_array(outputs) else outputs)
        raise TypeError(f"r_drop: fn must return logits, a float array [..., classes], got {got}.")
    axis = _checks.dim("r_drop", "axis", axis, outputs.ndim - 1)
    _check_kind("r_drop", "fn must return", outputs, axis + 1, logits)
    return RDrop(outputs, _symmetric_kl(outputs[0], outputs[1], axis, logits))


@_arguments.public
def symmetric_kl(logits_p: ArrayLike, logits_q: ArrayLike, *, axis: int = -1, logits: bool = True) -> Array:
    """Measures by how much two categorical distributions differ, from their logits or probabilities.

    (KL(p || q) + KL(q || p)) / 2 = sum over classes of (p - q) (log p - log q) / 2. No term is negative, in floating
    point, too, and equal logits give exactly 0, without cancellation near it. A class of logit -inf in both adds
    nothing; in one of them alone, infinity, which is a constant to the derivative.

    Args:
      logits_p: real float `[..., classes]`.
      logits_q: real float `[..., classes]`, of the same shape.
      axis: the axis of the classes.
      logits: whether both are logits; False where both are probabilities, which are divided by their sums. Outside
        jit probabilities that are taken for logits are a warning.

    Returns:
      float32, or float64 for such logits, `[...]`: at least 0. NaN where logits have no softmax, since one is NaN or
      infinity or all are -infinity, and where a probability is NaN or negative.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
      >>> round(float(symmetric_kl(jnp.log(p), jnp.log(q))), 4)  # log(3) / 8
      0.1373

    Reference:
      Jeffreys, [An invariant form for the prior probability in estimation
      problems](https://doi.org/10.1098/rspa.1946.0056), 1946.
    """
    p, q = (_checks.array("symmetric_kl", logits, real=True) for logits in (logits_p, logits_q))
    if p.shape != q.shape or p.dtype != q.dtype:
        raise ValueError(
            "symmetric_kl: logits_p and logits_q must be of one shape and dtype, got "
            f"{_checks.describe(p)} and {_checks.describe(q)}."
        )
    axis, logits = _checks.dim("symmetric_kl", "axis", axis, p.ndim), _checks.flag("symmetric_kl", "logits", logits)
    for argument, values in {"logits_p": p, "logits_q": q}.items():
        _check_kind("symmetric_kl", f"{argument} must be", values, axis, logits)
    return _symmetric_kl(p, q, axis, logits)


def _check_kind(function: str, must: str, values: Array, axis: int, logits: bool) -> None:
    """Warns of known logits that look like probabilities, and raises where known probabilities are none."""
    if logits and _checks.look_like_probabilities(values, axis):
        _checks.warn(
            f"{function}: {must} logits, got values of at least 0 that sum to 1 over the classes, which look like "
            "probabilities. For those pass logits=False."
        )
    if logits or not _checks.is_known(values) or values.shape[axis] < 2 or not values.size:
        return
    known: Any = np.asarray(values).astype(np.float64)
    least, sums = known.min(), known.sum(axis)
    if least < 0 or (np.abs(sums - 1) > 0.011 + float(jnp.finfo(values.dtype).eps)).any():
        raise ValueError(
            f"{function}: {must} probabilities of at least 0 that sum to 1 over the classes, got values from "
            f"{least:g} and sums from {sums.min():g} to {sums.max():g}. For logits leave logits=True."
        )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _symmetric_kl(p: Array, q: Array, axis: int, logits: bool) -> Array:
    p, q = (a.astype(masks.wide(a)) for a in (p, q))
    if not logits:
        p, q = (masks.nan_unless(a >= 0, jnp.where(a > 0, jnp.log(jnp.where(a > 0, a, 1)), -jnp.inf)) for a in (p, q))
    p, q = (jax.nn.log_softmax(a, axis) for a in (p, q))
    infinite = (p == -jnp.inf) != (q == -jnp.inf)
    p, q = (jnp.where((p == -jnp.inf) | (q == -jnp.inf), 0, a) for a in (p, q))
    # (e^p - e^q) (p - q) = -e^p expm1(-d) d for d = p - q >= 0, and the same with p and q exchanged
    more, less = jnp.where(p >= q, p - q, 0), jnp.where(p < q, q - p, 0)
    terms = -jnp.exp(p) * jnp.expm1(-more) * more - jnp.exp(q) * jnp.expm1(-less) * less
    return jnp.where(infinite, jnp.inf, terms).sum(axis) / 2


@_arguments.public
def multi_sample_dropout(
    key: Array,
    fn: Callable[[Array], Any],
    x: ArrayLike,
    rate: ArrayLike,
    *,
    num_samples: int,
    broadcast_dims: Sequence[int] = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Any:
    """Applies a head to several dropped copies of what the body of a network computed once.

    y_t = fn(dropout(key_t, x, rate)) for the keys `jax.random.split(key, num_samples)`. The loss is the mean of the
    samples' losses, which is not the loss of the mean of the outputs.

    Args:
      key: one JAX key; it is consumed.
      fn: the head, a function of an array like x to a pytree of arrays; it runs under `jax.vmap`.
      x: float or complex `[...]`, the features.
      rate: probability of dropping an element, in `[0, 1]`: a number, or a float array that broadcasts
        against x. It may be traced, and is not differentiated.
      num_samples: how many dropped copies, at least 1; the paper uses 8 or so.
      broadcast_dims: dimensions along which a mask is shared; negatives count from the end.
      generator: `"mix"` or `"threefry"`, as for `dropout`.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension of x.

    Returns:
      The pytree of fn with arrays `[num_samples, ...]`. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> x, head = jnp.ones((2, 3)), jnp.ones((3, 5))
      >>> multi_sample_dropout(jax.random.key(0), lambda x: x @ head, x, 0.5, num_samples=8).shape
      (8, 2, 5)

    Reference:
      Inoue, [Multi-sample dropout for accelerated training and better
      generalization](https://arxiv.org/abs/1905.09788), 2019.
    """
    name = "multi_sample_dropout"
    if not callable(fn):
        raise TypeError(f"{name}: fn must be a function of x, got {_checks.describe(fn)}.")
    num_samples = _checks.integer(name, "num_samples", num_samples, 1)
    x = _checks.array(name, x)
    _checks.rate(name, rate, x.shape)
    keys = jax.random.split(_checks.key(name, key), num_samples)

    def sample(key: Array) -> Any:
        return fn(
            elementwise.dropout(
                key, x, rate,
                broadcast_dims=broadcast_dims, generator=generator, start=start, sharded_dims=sharded_dims,
            )
        )  # fmt: skip

    return jax.vmap(sample)(keys)
