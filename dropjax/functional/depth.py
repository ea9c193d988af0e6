"""Stochastic depth: whole residual branches are dropped."""

import functools
from collections.abc import Mapping

from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks, bits, masks, sharding
from dropjax._checks import Rate

MODES = ("row", "batch")


def drop_path(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    mode: str = "row",
    scale: bool = True,
    batch_axis: int = 0,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops the residual branch of whole examples, or of the whole batch: stochastic depth.

    y = x m / q (or x m without `scale`) with one m ~ Bernoulli(q), q = 1 - rate, for each example or for the
    batch. With `scale`, E[y] = x and Var[y] = x^2 rate / (1 - rate), and inference needs no change; without
    it E[y] = q x, as in the paper, which multiplies the branch by q at test time.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[batch, ...]`: the branch alone, before it is added to the residual stream.
      rate: probability of dropping a branch, in `[0, 1]`: a number, or a float array that broadcasts
        against x. It may be traced, and is not differentiated.
      mode: `"row"`, a decision for each example, or `"batch"`, one for all.
      scale: whether what is kept is divided by q.
      batch_axis: the axis of the examples.
      start: `{dim: index}`, where this piece starts in the whole array; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> drop_path(jax.random.key(0), jnp.ones((4, 2)), 0.5).tolist()
      [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]

    Reference:
      Huang, Sun, Liu, Sedra, Weinberger, [Deep networks with stochastic
      depth](https://arxiv.org/abs/1603.09382), 2016 (mode "batch", without scale). Larsson, Maire,
      Shakhnarovich, [FractalNet](https://arxiv.org/abs/1605.07648), 2017. timm drops by row and scales.
    """
    x = _checks.array("drop_path", x)
    checked = _checks.rate("drop_path", rate, x.shape)
    if mode not in MODES:
        raise ValueError(f"drop_path: mode must be one of {MODES}, got {_checks.describe(mode)}.")
    batch = _checks.dim("drop_path", "batch_axis", batch_axis, x.ndim)
    shared = [d for d in range(x.ndim) if mode == "batch" or d != batch]
    _checks.whole("drop_path", checked, shared, "a branch that is dropped")
    draw = bits.draw("drop_path", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    return _drop_path(draw, x, checked, scale)


@functools.partial(masks.redrawn, static_argnums=(3,))
def _drop_path(draw: bits.Draw, x: Array, rate: Rate, scale: bool) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, rescale=scale)
