"""Dropout of rows of an embedding, and of attention heads."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
def embedding_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    indices: ArrayLike | None = None,
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops whole words: one decision for each row of the vocabulary, wherever the word stands.

    y = x m / q with one m ~ Bernoulli(q), q = 1 - rate, for each row: E[y] = x and Var[y] = x^2 rate / (1 - rate).
    With `indices`, only the rows that were looked up are drawn, and the result is the same to the bit:
    embedding_dropout(key, table, rate)[indices] == embedding_dropout(key, table[indices], rate, indices=indices).

    Args:
      key: one JAX key; it is consumed.
      x: float or complex: the table `[vocabulary, ...]`, or with `indices` what was looked up,
        `[*indices.shape, ...]`. Without `indices` the first axis is always the vocabulary's.
      rate: probability of dropping a row, in `[0, 1]`: a number, or a float array that broadcasts against
        x, a rate for each row of the table; with `indices` one for all. It may be traced, and is not
        differentiated.
      indices: integers `[...]`, the row of the vocabulary of each embedding in x: of the whole vocabulary, also
        where it is cut over devices. Traced ones are not checked to be within it.
      start: `{dim: index}`, where this piece of the table starts; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension. With `indices` the
        place is known, and only copies need a word, `{None: axis name}`.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> table, words = jnp.ones((10, 2)), jnp.array([3, 1, 3])
      >>> y = embedding_dropout(jax.random.key(0), table[words], 0.5, indices=words)
      >>> bool((y[0] == y[2]).all())
      True

    Reference:
      Gal, Ghahramani, [A theoretically grounded application of dropout in recurrent neural
      networks](https://arxiv.org/abs/1512.05287), 2016. Merity, Keskar, Socher, [Regularizing and optimizing
      LSTM language models](https://arxiv.org/abs/1708.02182), 2017.
    """
    x = _checks.array("embedding_dropout", x)
    checked = _checks.rate("embedding_dropout", rate, x.shape)
    if x.ndim == 0:
        raise ValueError("embedding_dropout: x must have a dimension of the vocabulary, got a scalar.")
    if indices is None:
        shared = range(1, x.ndim)
        _checks.whole("embedding_dropout", checked, shared, "a row of the vocabulary")
        draw = bits.draw(
            "embedding_dropout", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims
        )
        return _embedding_dropout(draw, x, checked, None)
    if start or any(d is not None for d in dict(sharded_dims or {})):
        raise ValueError(
            "embedding_dropout: start and sharded_dims must not name dimensions with indices, which are places, got "
            f"{start} and {sharded_dims}."
        )
    rows = _checks.indices("embedding_dropout", indices, x.shape)
    table = (1,) * (1 + x.ndim - rows.ndim)
    _checks.whole("embedding_dropout", checked, range(x.ndim), "all rows of the vocabulary where indices are given")
    draw = bits.draw("embedding_dropout", key, (), table, shared=range(1, len(table)), sharded_dims=sharded_dims or {})
    return _embedding_dropout(draw, x, checked, rows.astype(jnp.uint32))


@masks.redrawn
def _embedding_dropout(draw: bits.Draw, x: Array, rate: Rate, rows: Array | None) -> Array:
    if rows is None:
        return masks.apply(x, masks.keep(draw, x.shape, rate), rate)
    words = bits.words_at(draw, rows, *[np.uint32(0)] * (len(draw.origin) - 1))
    return masks.apply(x, masks.above(words.reshape(rows.shape + (1,) * (x.ndim - rows.ndim)), rate), rate)


@_arguments.public
def drop_head(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    head_axis: int = 1,
    batch_axes: int | Sequence[int] = (0,),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops whole attention heads and scales the others up by how many were really kept.

    y = x m H / K with one m ~ Bernoulli(1 - rate) for each example and head, H the number of heads and K that of
    the kept ones. Where all heads of an example are dropped y is 0, so that E[y] = x (1 - rate^H) and
    E[y^2] = x^2 H E[1 / K; K > 0].

    Args:
      key: one JAX key; it is consumed.
      x: float or complex, by default `[batch, heads, queries, keys]`, attention weights, or the heads' outputs
        with the heads in that place.
      rate: probability of dropping a head, in `[0, 1]`: a number, or a float array that broadcasts
        against x and is the same for all heads of an example. It may be traced, and is not differentiated.
      head_axis: the axis of the heads; -2 for outputs `[batch, length, heads, head_dim]`.
      batch_axes: the axes along which decisions differ besides the head's; `()` for one example.
      start: `{dim: index}`, where this piece starts in the whole array; not along the heads, of which all
        must be known.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension. Nothing is
        communicated where the heads are cut, since each device draws the decisions of all.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> drop_head(jax.random.key(4), jnp.ones((1, 4, 1)), 0.5).ravel().tolist()
      [2.0, 0.0, 0.0, 2.0]

    Reference:
      Zhou, Ge, Xu, Wei, Zhou, [Scheduled DropHead: a regularization method for transformer
      models](https://arxiv.org/abs/2004.13342), 2020.
    """
    x = _checks.array("drop_head", x)
    checked = _checks.rate("drop_head", rate, x.shape)
    head = _checks.dim("drop_head", "head_axis", head_axis, x.ndim)
    shared = _checks.places("drop_head", x.ndim, head_axis, batch_axes, argument="head_axis")
    _checks.whole("drop_head", checked, sorted([head, *shared]), "all heads of an example")
    draw = bits.draw("drop_head", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    if any(d % x.ndim == head for d in start or ()):
        raise ValueError(f"drop_head: start must not be along head_axis, since all heads are counted, got {start}.")
    heads = x.shape[head] * (lax.axis_size(draw.cut[head]) if draw.cut[head] else 1)
    return _drop_head(draw, x, checked, head, heads)


@functools.partial(masks.redrawn, static_argnums=(3, 4))
def _drop_head(draw: bits.Draw, x: Array, rate: Rate, head: int, heads: int) -> Array:
    cut = (*draw.cut[:head], (), *draw.cut[head + 1 :])
    everywhere = dataclasses.replace(draw, origin=(*draw.origin[:head], None, *draw.origin[head + 1 :]), cut=cut)
    count = masks.keep(everywhere, (*x.shape[:head], heads, *x.shape[head + 1 :]), rate).sum(head, keepdims=True)
    factor = heads / jnp.maximum(count, 1).astype(jnp.float32)
    nothing = masks.nan_unless(masks.valid(rate), np.float32(0))
    scaled = masks.widened(x, factor + nothing)
    return jnp.where(masks.keep(draw, x.shape, rate), scaled, jnp.asarray(nothing, scaled.dtype)).astype(x.dtype)
