"""Targeted dropout: only the weights or units of least magnitude are dropped, so that pruning them costs little."""

import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Fixed, Rate


@_arguments.public
def targeted_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    targeted: ArrayLike = 0.5,
    kind: str = "weight",
    rescale: bool = False,
    channel_axis: int = -1,
    batch_axes: int | Sequence[int] = (),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops only the weights, or whole units, of least magnitude: training for pruning.

    y = x m among the k candidates and y = x elsewhere, with m ~ Bernoulli(q), q = 1 - rate: E[y] = q x for
    candidates, as in the paper, and with `rescale` y = x m / q and E[y] = x. Candidates are, of the n weights
    into each unit, the k = floor(targeted n) of least magnitude (`kind="weight"`), or the k of n units whose
    weights have the least L2 norm (`"unit"`, dropped whole). Of equals the first come first. Apply it to the
    weights in training; the choice of candidates is not differentiated.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[..., inputs, units]`, the kernel of a dense layer or a convolution. A vector, of units
        without inputs, has `kind="unit"`.
      rate: probability of dropping a candidate, in `[0, 1]`: a number, or a float array that broadcasts against
        x. It may be traced, and is not differentiated.
      targeted: share of the weights or units that are candidates, in `[0, 1]`: a number, or a scalar array that may
        be traced, as in the paper's ramp. `targeted n` is taken to float32 accuracy.
      kind: `"weight"` or `"unit"`.
      rescale: whether candidates that are kept are divided by q.
      channel_axis: the axis of the units.
      batch_axes: axes of several kernels in one array, each ranked by itself.
      start: `{dim: index}`, where this piece starts in the whole array; not along dimensions that are ranked.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension; none that is ranked.
        With the number 1 for `targeted` nothing is ranked.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> kernel = jnp.array([[0.1, 3.0], [2.0, 0.2], [0.3, 1.0], [1.0, 2.0]])
      >>> targeted_dropout(jax.random.key(0), kernel, 1.0)
      Array([[0., 3.],
             [2., 0.],
             [0., 0.],
             [1., 2.]], dtype=float32)

    Reference:
      Gomez, Zhang, Kamalakara, Madaan, Swersky, Gal, Hinton, [Learning sparse networks using targeted
      dropout](https://arxiv.org/abs/1905.13678), 2019.
    """
    x = _checks.array("targeted_dropout", x)
    checked = _checks.rate("targeted_dropout", rate, x.shape)
    share = _checks.rate("targeted_dropout", targeted, (), argument="targeted")
    _checks.choice("targeted_dropout", "kind", kind)
    rescale = _checks.flag("targeted_dropout", "rescale", rescale)
    inputs = _checks.places("targeted_dropout", x.ndim, channel_axis, batch_axes)
    unit = channel_axis % x.ndim
    shared = inputs if kind == "unit" else ()
    _checks.whole("targeted_dropout", checked, shared, "all weights of a unit")
    draw = bits.draw(
        "targeted_dropout", key, (x, checked, share), x.shape, shared=shared, start=start, sharded_dims=sharded_dims
    )
    ranked = sorted([unit, *inputs]) if kind == "unit" else inputs
    placed = {d % x.ndim for d in start or ()}
    everything = isinstance(share, Fixed) and share.value == 1
    if not everything and not ranked:
        raise ValueError(
            "targeted_dropout: x must have a dimension of inputs besides channel_axis and batch_axes, along which "
            f"weights are ranked, got shape {x.shape}. To rank the elements of a vector, pass kind='unit'."
        )
    if not everything and any(d in placed or draw.cut[d] for d in ranked):
        raise ValueError(
            f"targeted_dropout: start and sharded_dims must not be along dimensions {tuple(ranked)}, which are ranked "
            f"as a whole, got {start} and {sharded_dims}."
        )
    if everything:
        return _drop(draw, x, checked, rescale)
    return _targeted_dropout(draw, x, checked, share, kind, unit, tuple(inputs), rescale)


@functools.partial(masks.redrawn, static_argnums=(3,))
def _drop(draw: bits.Draw, x: Array, rate: Rate, rescale: bool) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, rescale=rescale)


@functools.partial(masks.redrawn, static_argnums=(4, 5, 6, 7))
def _targeted_dropout(
    draw: bits.Draw, x: Array, rate: Rate, share: Rate, kind: str, unit: int, inputs: tuple[int, ...], rescale: bool
) -> Array:
    magnitude = lax.stop_gradient(jnp.abs(x if jnp.iscomplexobj(x) else x.astype(masks.wide(x))))
    if kind == "unit":
        magnitude = _size(magnitude, inputs)
    lowest = _lowest(magnitude, (unit,) if kind == "unit" else inputs, share)
    dropped = masks.apply(x, masks.keep(draw, x.shape, rate), rate, rescale=rescale)
    valid = masks.valid(rate) & masks.valid(share)
    return jnp.where(lowest, dropped, masks.nan_unless(valid, x))


def _size(magnitude: Array, inputs: tuple[int, ...]) -> Array:
    """The root mean square of each unit's weights, which ranks as their norm; no square overflows or vanishes."""
    tiny = jnp.finfo(magnitude.dtype).tiny
    largest = jnp.clip(jnp.max(magnitude, axis=inputs, keepdims=True, initial=0), 2 * tiny, 0.5 / tiny)
    return largest * jnp.sqrt(((magnitude / largest) ** 2).mean(inputs, keepdims=True))


def _lowest(magnitude: Array, ranked: tuple[int, ...], share: Rate) -> Array:
    """True for the candidates: those of lowest rank among all along the ranked dimensions, ties in order."""
    last = tuple(range(magnitude.ndim - len(ranked), magnitude.ndim))
    moved = jnp.moveaxis(magnitude, ranked, last)
    flat = moved.reshape(*moved.shape[: moved.ndim - len(ranked)], math.prod(moved.shape[d] for d in last))
    rank = jnp.argsort(jnp.argsort(flat, axis=-1, stable=True), axis=-1)
    number = jnp.floor(masks.number(share) * jnp.asarray(flat.shape[-1], jnp.float32) * np.float32(1 + 2**-22))
    candidates = rank < jnp.where(masks.valid(share), number, 0).astype(rank.dtype)
    return jnp.moveaxis(candidates.reshape(moved.shape), last, ranked)
