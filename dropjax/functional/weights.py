"""Dropout of weights: of one kernel, and of named parameters of a model."""

import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, bits, masks, sharding
from dropjax._checks import Rate

Names = str | Sequence[str] | Callable[[str], bool]
"""Which parameters: the ends of their paths, with `*` and `?`, or a function of a path to True or False."""


@_arguments.public
def drop_connect(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    generator: str = "mix",
    start: Mapping[int, ArrayLike] | None = None,
    sharded_dims: sharding.ShardedDims | None = None,
) -> Array:
    """Drops single weights of a kernel, one mask for all examples: the connections, not the units.

    w = x m / q with m ~ Bernoulli(q) for each weight, q = 1 - rate: E[w] = x and Var[w] = x^2 rate / (1 - rate), so
    that for inputs a the units get E[a w] = a x and Var[a w] = (a^2)(x^2) rate / (1 - rate), summed over inputs. For a
    mask for each example use `jax.vmap` over keys, which makes a kernel for each.

    Args:
      key: one JAX key; it is consumed.
      x: float or complex `[...]`, a kernel.
      rate: probability of dropping a weight, in `[0, 1]`: a number, or a float array that broadcasts against
        x. It may be traced, and is not differentiated.
      broadcast_dims: dimensions along which the mask is shared; 1 for whole input units of `[inputs, outputs]`.
      generator: `"mix"` or `"threefry"`, as for `dropout`.
      start: `{dim: index}`, where this piece starts in the whole kernel; indices may be traced.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension of the kernel.

    Returns:
      Array of the shape and dtype of x. NaN where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> inputs, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> y = inputs @ drop_connect(jax.random.key(0), kernel, 0.5)

    Reference:
      Wan, Zeiler, Zhang, LeCun, Fergus, [Regularization of neural networks using
      DropConnect](https://proceedings.mlr.press/v28/wan13.html), 2013. There the mask differs from example to example
      and is not divided by q; at inference units are sampled from a Gaussian of these two moments.
    """
    x = _checks.array("drop_connect", x)
    checked = _checks.rate("drop_connect", rate, x.shape)
    draw = bits.draw(
        "drop_connect", key, (x, checked), x.shape,
        shared=broadcast_dims, generator=generator, start=start, sharded_dims=sharded_dims,
    )  # fmt: skip
    return _drop_connect(draw, x, checked)


@masks.redrawn
def _drop_connect(draw: bits.Draw, x: Array, rate: Rate) -> Array:
    return masks.apply(x, masks.keep(draw, x.shape, rate), rate, draw.generator)


@_arguments.public
def weight_drop(
    key: Array,
    params: Any,
    rate: ArrayLike,
    *,
    names: Names,
    sharded_dims: sharding.ShardedDims | Callable[[str], sharding.ShardedDims | None] | None = None,
) -> Any:
    """Applies `drop_connect` to the named parameters of a model and leaves the others as they are.

    One call draws one mask for each parameter: drop once, before the loop over time, and a recurrent network has the
    same mask at all times. The key of a parameter is threefry2x32 of the key's words under the first two words of the
    SHA-256 of its path, so that its mask depends on its name and not on what else is dropped.

    Args:
      key: one JAX key; it is consumed.
      params: a pytree of arrays `[...]`: the params of Linen, an `nnx.State`, or any other.
      rate: probability of dropping a weight, in `[0, 1]`: a number, or a float array that broadcasts against each
        named parameter. It may be traced, and is not differentiated.
      names: what is dropped: one or several ends of paths such as `"hf/kernel"`, in which `*` and `?` stand for any
        characters, or a function of a path. Paths are joined by `/`; the last `value` of an NNX variable is left out.
      sharded_dims: inside shard_map or pmap, `{dim: axis name}` for each cut dimension of the named parameters, or a
        function of a path to that.

    Returns:
      The same pytree with named parameters dropped. NaN in them where a traced rate is NaN or out of range.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or a name is that of no parameter.

    Example:
      >>> params = {"cell": {"hf": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "if": {"kernel": jnp.ones(3)}}}
      >>> dropped = weight_drop(jax.random.key(1), params, 0.5, names="h?/kernel")
      >>> dropped["cell"]["hf"]["kernel"].tolist()
      [[2.0, 0.0], [2.0, 2.0]]

    Reference:
      Merity, Keskar, Socher, [Regularizing and optimizing LSTM language models](https://arxiv.org/abs/1708.02182),
      2018: the matrices from hidden state to hidden state.
    """
    leaves, structure = jax.tree.flatten(params)
    paths, named = named_paths(params, names)
    words = bits.key_words("weight_drop", _checks.key("weight_drop", key))
    for i, path in enumerate(paths):
        if named[i]:
            cut = sharded_dims(path) if callable(sharded_dims) else sharded_dims
            leaves[i] = _of_path(words, path, leaves[i], rate, cut)
    return jax.tree.unflatten(structure, leaves)


def _of_path(words: Array, path: str, leaf: Any, rate: ArrayLike, cut: sharding.ShardedDims | None) -> Array:
    digest = np.frombuffer(hashlib.sha256(path.encode()).digest()[:8], "<u4").astype(np.uint32)
    key = jnp.stack(bits.threefry2x32(words[0], words[1], digest[0], digest[1]))
    try:
        return drop_connect(key, leaf, rate, sharded_dims=cut)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("drop_connect: ", f"weight_drop: of {path!r}, ", 1)) from None


def named_paths(params: Any, names: Names) -> tuple[list[str], list[bool]]:
    """Returns the path of each parameter, and which are named; those have a path, and so a mask, of their own."""
    paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    named = _named(paths, names)
    chosen = [path for path, is_named in zip(paths, named, strict=True) if is_named]
    if twice := [path for path in chosen if chosen.count(path) > 1]:
        raise ValueError(
            f"weight_drop: params must have a path of its own for each named parameter, got {twice[0]!r} twice, which "
            "would repeat one mask. Rename one of the two."
        )
    return paths, named


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def _named(paths: Sequence[str], names: Names) -> list[bool]:
    """Which paths are named; every name must be that of one at least."""
    if callable(names):
        named = [bool(names(path)) for path in paths]
        unknown: list[Any] = [] if any(named) else [names]
    else:
        ends = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Sequence) else ()
        if not ends or not all(isinstance(end, str) for end in ends):
            raise TypeError(
                f"weight_drop: names must be one or several ends of paths, or a function of a path, got "
                f"{_checks.describe(names)}."
            )
        patterns = {end: "*/" + end.replace("[", "[[]") for end in ends}  # a bracket is no class of characters
        hits = {end: [fnmatch.fnmatchcase(f"/{path}", pattern) for path in paths] for end, pattern in patterns.items()}
        named = [any(of_end) for of_end in zip(*hits.values(), strict=True)]
        unknown = [end for end in ends if not any(hits[end])]
    if unknown:
        raise ValueError(
            f"weight_drop: names must each be the end of the path of a parameter, got {_checks.describe(unknown[0])}, "
            f"which none has. There are: {', '.join(paths) or 'no parameters'}."
        )
    return named
