"""Stochastic depth: residual branches that are dropped, and layers that are left out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate


@_arguments.public
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
    _checks.choice("drop_path", "mode", mode)
    batch = _checks.dim("drop_path", "batch_axis", batch_axis, x.ndim)
    shared = [d for d in range(x.ndim) if mode == "batch" or d != batch]
    _checks.whole("drop_path", checked, shared, "a branch that is dropped")
    draw = bits.draw("drop_path", key, (x, checked), x.shape, shared=shared, start=start, sharded_dims=sharded_dims)
    return _drop_path(draw, x, checked, _checks.flag("drop_path", "scale", scale))


@functools.partial(masks.redrawn, static_argnums=(3,))
def _drop_path(draw: bits.Draw, x: Array, rate: Rate, scale: bool) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, rescale=scale)


@_arguments.public
def layer_drop(key: Array, fn: Callable[[Any], Any], x: Any, rate: ArrayLike) -> Any:
    """Leaves a whole layer out: y = fn(x), or x itself, and then fn is not computed.

    y = fn(x) if m else x, with one m ~ Bernoulli(1 - rate), which is `keep_mask(key, (), rate)`. Nothing is scaled:
    with fn(x) = x + f(x), E[y] = x + (1 - rate) f(x) and Var[y] = rate (1 - rate) f(x)^2. The forward pass costs
    in proportion to the layers that are kept, since this is a branch (`lax.switch`) and no selection; the backward pass
    still writes residuals and zeros for the weights of the others. Under `jax.vmap` over the key it is a selection:
    both sides are computed, and the result is the same.

    Args:
      key: one JAX key; it is consumed. Over stacked layers, `lax.scan` over a split array of keys.
      fn: the layer with its residual connection, a function of x to a pytree of the same structure, shapes and dtypes.
      x: a pytree of arrays `[...]` of which one is float or complex.
      rate: probability of dropping the layer, one number in `[0, 1]`. It may be traced, and is not differentiated.

    Returns:
      The pytree of x. Its float arrays are NaN where a traced rate is NaN or out of range, and, where types do not say
      whether keys differ between devices (`pmap`, `check_vma=False`), if they do: there the devices compare keys.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or the key or the rate varies over a manual mesh axis:
        devices would take different branches, and wait for each other in the collectives of fn for ever.

    Example:
      >>> layers = jnp.arange(1.0, 5)  # four stacked layers that add 1, 2, 3 and 4
      >>> keys = jax.random.split(jax.random.key(1), 4)
      >>> step = lambda x, layer: (layer_drop(layer[0], lambda x: x + layer[1], x, 0.5), None)
      >>> jax.lax.scan(step, jnp.zeros(2), (keys, layers))[0].tolist()
      [5.0, 5.0]

    Reference:
      Fan, Grave, Joulin, [Reducing transformer depth on demand with structured
      dropout](https://arxiv.org/abs/1909.11556), 2020. At inference layers are left out by choice, and what is kept
      is not scaled either, as in fairseq.
    """
    if not callable(fn):
        raise TypeError(f"layer_drop: fn must be a function of x, got {_checks.describe(fn)}.")
    x, taken = jax.tree.map(jnp.asarray, x), branch("layer_drop", key, rate)
    if isinstance(taken, int) and taken:  # checked as at other rates, and not computed
        jax.eval_shape(lambda x: _like("layer_drop", x, fn(x)), x)
    return left_out("layer_drop", lax.switch, taken, fn, x)


def branch(function: str, key: Array, rate: ArrayLike) -> int | Array:
    """Draws what becomes of a layer: 0, it runs; 1, it is left out; 2, a bad rate or keys that differ: NaN."""
    key = _checks.key(function, key)
    if _checks.is_array(rate) and rate.ndim:
        raise ValueError(
            f"{function}: rate must be one number, got {_checks.describe(rate)}. Scan over rates and keys together."
        )
    checked = _checks.rate(function, rate, ())
    if axes := sharding.varying((key, checked)):
        raise ValueError(
            f"{function}: key and rate must be the same on every shard, got one that varies over mesh axis "
            f"{min(axes)!r}: devices would take different branches, and wait for each other in the collectives of the "
            "layer for ever. Draw with the key as it was before it was folded or split over the axis."
        )
    words = bits.key_words(function, key)
    if isinstance(checked, _checks.Fixed) and masks.threshold(checked) in (0, 2**32):
        return int(masks.threshold(checked) > 0)
    return _branch(words, checked, tuple(a for a in sharding.untyped() if lax.axis_size(a) > 1))


@functools.partial(jax.jit, static_argnums=2)
def _branch(words: Array, rate: Rate, axes: tuple[str, ...]) -> Array:
    taken = 1 - masks.keep(bits.Draw(words, (), ()), (), rate).astype(jnp.int32)
    taken = jnp.where(masks.valid(rate), taken, 2)
    if axes:  # all devices take one branch, and say NaN if their keys were not one
        same = (lax.pmin(words, axes) == lax.pmax(words, axes)).all() & (lax.pmin(taken, axes) == lax.pmax(taken, axes))
        taken = jnp.where(same, lax.pmax(taken, axes), 2)
    return taken


def left_out(
    function: str, switch: Callable[..., Any], taken: int | Array, fn: Callable[..., Any], *operands: Any
) -> Any:
    """Returns fn of the operands, or the last of them, x; `switch` is that of JAX, or of Linen, with a module first."""
    x = operands[-1]
    if not any(_is_inexact(a) for a in jax.tree.leaves(x)):
        raise TypeError(f"{function}: x must hold a float or complex array, got {_shapes(x)}.")
    if isinstance(taken, int):
        return x if taken else _like(function, x, fn(*operands))
    # The axes over which the results of all branches vary, as the first says, which is traced first. Where branches
    # are not traced (jax.disable_jit) only one runs, and no types need to agree.
    axes: list[Any] = []

    def typed(y: Any) -> Any:
        return jax.tree.map(sharding.spread, y, axes[0]) if axes else y

    def run(*operands: Any) -> Any:
        y = _like(function, x, fn(*operands[:-1]))
        axes.append(jax.tree.map(lambda a, b: sharding.varying((a, b)), x, y))
        return typed(y)

    def skip(*operands: Any) -> Any:
        return typed(operands[-2])

    def poison(*operands: Any) -> Any:
        *_, x, factor = operands
        return typed(jax.tree.map(lambda a: masks.times(a, factor) if _is_inexact(a) else a, x))

    # Under vmap the last branch is computed, too, and differentiated, so that its NaN must depend on what is taken.
    factor = masks.nan_unless(taken < 2, np.float32(1))
    return switch(taken, [run, skip, poison], *operands, factor)


def _like(function: str, x: Any, y: Any) -> Any:
    """Returns what a layer returned, if x can stand in its place."""
    y = jax.tree.map(jnp.asarray, y)
    if _shapes(x) != _shapes(y):
        raise ValueError(
            f"{function}: fn must return the structure, shapes and dtypes of x, which takes its place where the "
            f"layer is left out, got {_shapes(y)} for {_shapes(x)}."
        )
    return y


def _is_inexact(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(_checks.describe, tree))
