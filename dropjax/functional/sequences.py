"""Dropout that makes sequences shorter: tokens are removed, not set to 0."""

import fractions
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, sharding


class Tokens(NamedTuple):
    """What `token_dropout` keeps."""

    tokens: Array
    """x, of length num_prefix_tokens + num_keep along the token axis."""
    indices: Array
    """int32 `[*batch, num_prefix_tokens + num_keep]`: where each of them stood along the token axis of x."""


@_arguments.public
def token_dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike | None = None,
    *,
    num_keep: int | None = None,
    num_prefix_tokens: int = 0,
    ordered: bool = True,
    token_axis: int = 1,
    batch_axes: int | Sequence[int] = (0,),
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Tokens:
    """Removes tokens: each example keeps as many, chosen uniformly, and the sequence becomes shorter.

    y = x[i_1], ..., x[i_k] with {i_1, ..., i_k} uniform over all subsets of k of the n tokens, for each example.
    Every token is kept with probability k / n. Nothing is scaled, since nothing is put in the place of what is
    removed; and at evaluation all tokens are kept. Kept are those with the largest words, so that for one key the
    tokens of a smaller k are among those of a larger one.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex, by default `[batch, tokens, ...]`.
      rate: the part of the tokens to be removed, in `[0, 1)`: one number, known while tracing, since it makes the
        shape of the result. k = max(1, floor(n (1 - rate))) of n tokens. What the rate lost when it was rounded to
        binary is forgiven, n 2^-50 tokens (n 2^-23 for an array): 0.9 of 100 leave 10, and 1 / 3 of 3 leave 2.
      num_keep: k itself, from 0 to n, instead of a rate.
      num_prefix_tokens: how many tokens at the front (classes, registers) are kept always; they count in
        neither n nor k.
      ordered: whether tokens keep their order; if not they come in random order after the prefix.
      token_axis: the axis of the tokens.
      batch_axes: the axes along which decisions differ; `()` for one example.
      start: `{dim: index}`, where this piece starts in the whole array; not along the tokens, of which all
        must be known.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension; not the tokens'.

    Returns:
      `Tokens(tokens, indices)`. Gather with the indices what belongs to the tokens: positions, labels, masks.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> x = jnp.arange(12.0).reshape(1, 6, 2)
      >>> tokens, indices = token_dropout(jax.random.key(0), x, 0.5, num_prefix_tokens=1)
      >>> tokens.shape, bool((x[0][indices[0]] == tokens[0]).all())
      ((1, 3, 2), True)

    Reference:
      Liu, Matsoukas, Strand, Azizpour, Smith, [PatchDropout: economizing vision transformers using patch
      dropout](https://arxiv.org/abs/2208.07220), 2022. He, Chen, Xie, Li, Dollár, Girshick, [Masked autoencoders are
      scalable vision learners](https://arxiv.org/abs/2111.06377), 2021, remove tokens in the same way.
    """
    x = _checks.array("token_dropout", x)
    axis = _checks.dim("token_dropout", "token_axis", token_axis, x.ndim)
    shared = _checks.places("token_dropout", x.ndim, token_axis, batch_axes, argument="token_axis")
    prefix = _checks.integer("token_dropout", "num_prefix_tokens", num_prefix_tokens, 0)
    _checks.known_length("token_dropout", "token_axis", x.shape[axis])
    if prefix > x.shape[axis]:
        raise ValueError(f"token_dropout: num_prefix_tokens must be at most {x.shape[axis]}, got {prefix}.")
    keep = _length(rate, num_keep, x.shape[axis] - prefix)
    draw = bits.draw("token_dropout", key, x, x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    if draw.cut[axis] or draw.origin[axis] is not None:
        raise ValueError(
            "token_dropout: start and sharded_dims must not be along token_axis, since all tokens of an example are "
            f"compared, got {start} and {sharded_dims}. Gather them, or cut the batch."
        )
    return _token_dropout(draw, x, axis, prefix, keep, _checks.flag("token_dropout", "ordered", ordered))


def all_tokens(x: ArrayLike, token_axis: int, batch_axes: int | Sequence[int]) -> Tokens:
    """What `token_dropout` gives where nothing is removed."""
    x = _checks.array("token_dropout", x)
    axis = _checks.dim("token_dropout", "token_axis", token_axis, x.ndim)
    shared = _checks.places("token_dropout", x.ndim, token_axis, batch_axes, argument="token_axis")
    batch = [n for d, n in enumerate(x.shape) if d != axis and d not in shared]
    shape = (*batch, x.shape[axis])
    return Tokens(x, lax.broadcasted_iota(jnp.int32, shape, len(batch)))


def one_of(rate: Any, num_keep: Any) -> None:
    """Checks that one of the two is given."""
    if (rate is None) == (num_keep is None):
        raise ValueError(
            f"token_dropout: one of rate and num_keep must be given, got {_checks.describe(rate)} and "
            f"{_checks.describe(num_keep)}."
        )


def _length(rate: Any, num_keep: Any, tokens: int) -> int:
    """How many of the tokens are kept, from the one of the two that is given."""
    one_of(rate, num_keep)
    if num_keep is not None:
        keep = _checks.integer("token_dropout", "num_keep", num_keep, 0)
        if keep > tokens:
            raise ValueError(f"token_dropout: num_keep must be at most {tokens}, the number of tokens, got {keep}.")
        return keep
    if _checks.is_array(rate) and rate.ndim:
        raise ValueError(f"token_dropout: rate must be one number, got shape {rate.shape}.")
    checked = _checks.rate("token_dropout", rate, ())
    value = checked.value if isinstance(checked, _checks.Fixed) else checked
    if _checks.is_traced(value):
        raise TypeError(
            f"token_dropout: rate must be known while tracing, since it makes the shape of the result, got "
            f"{_checks.describe(value)}. Pass num_keep, or make it a static argument of jit."
        )
    value = float(np.asarray(value))
    lost = 2.0 ** (-50 if isinstance(rate, int | float) else -23)
    exact = 1 - fractions.Fraction(value) + fractions.Fraction(lost)
    return min(tokens, max(1, int(tokens * exact)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _token_dropout(draw: bits.Draw, x: Array, axis: int, prefix: int, keep: int, ordered: bool) -> Tokens:
    words = lax.slice_in_dim(bits.words(draw, x.shape), prefix, None, axis=axis)
    places = lax.broadcasted_iota(jnp.int32, words.shape, axis) + prefix
    _, places = lax.sort((~words, places), dimension=axis, num_keys=2)
    kept = lax.slice_in_dim(places, 0, keep, axis=axis)
    if ordered:
        kept = lax.sort(kept, dimension=axis)
    front = lax.broadcasted_iota(jnp.int32, (*kept.shape[:axis], prefix, *kept.shape[axis + 1 :]), axis)
    indices = jnp.concatenate([front, kept], axis)
    tokens = jnp.take_along_axis(x, indices, axis, mode="promise_in_bounds")
    batch = [n for d, n in enumerate(x.shape) if d != axis and d not in draw.shared]
    return Tokens(tokens, jnp.moveaxis(indices, axis, -1).reshape(*batch, prefix + keep))
