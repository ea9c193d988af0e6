"""What it takes in both frameworks to turn the dropout of a model on: what draws, and which masks may be shared."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dropjax import _checks, sharding

MASKS = ("per_example", "shared")
_RATES = ("rate", "stddev", "beta")  # names of what drops nothing at 0
_AXES = ("channel_axis", "head_axis", "token_axis")


def draws(layer: Any) -> bool:
    """Whether a layer may draw at all: its rate is traced, learned or not 0."""
    function = getattr(layer, "_function", None)
    name = "rate" if function is None else sharding.fields(function)[0]
    return name not in _RATES or not is_zero(getattr(layer, name, None))


def is_zero(rate: Any) -> bool:
    """Whether a rate is known to be 0."""
    if _checks.is_traced(rate) or not getattr(rate, "is_fully_addressable", True):
        return False
    return (isinstance(rate, int | float) or _checks.is_array(rate)) and bool((np.asarray(rate) == 0).all())


def is_shared(layer: Any, inputs: Any) -> bool:
    """Whether dimension 0 shares its mask anyway, since decisions do not differ along it."""
    batch = getattr(layer, "batch_axes", None)
    return batch is not None and 0 not in [d % max(jnp.ndim(inputs), 1) for d in np.atleast_1d(batch).tolist()]


def batched(function: str, layer: str, inputs: Any, rank: int = 2) -> None:
    """Raises where the first dimension of what a layer is given is not that of the examples."""
    if jnp.ndim(inputs) < rank:
        raise ValueError(
            f"{function}: masks must be 'per_example' where inputs have no batch, got 'shared' and "
            f"{_checks.describe(inputs)} for {layer}. Dimension 0 of what it is given must be the examples, also under "
            "vmap: add it, or let vmap run over other things."
        )


def of_rows(function: str, layer: Any, call: Callable[..., Any], inputs: Any, place: dict[str, Any]) -> Any:
    """Calls a layer for each example as if it were the first, so that all of them have its mask.

    Args:
      function: name for error messages.
      layer: the layer.
      call: what it computes, of inputs `[1, ...]` and of the place of these.
      inputs: array `[examples, ...]`.
      place: keyword arguments of the call; `indices` are cut as the inputs are.

    Returns:
      What the calls return, an array or a tuple of arrays, without their dimensions of length 1.
    """
    name = type(layer).__name__
    batched(function, name, inputs)
    for axis in _AXES:
        if getattr(layer, axis, None) in (0, -jnp.ndim(inputs)):
            raise ValueError(
                f"{function}: masks must be 'per_example' where dimension 0 holds no examples, got 'shared' and "
                f"{axis} 0 of {name}. For examples along dimension 0 change {axis}."
            )
    cut = [d for d, _ in getattr(layer, "sharded_dims", None) or ()] + list(place.get("start") or ())
    if any(d in (0, -jnp.ndim(inputs)) for d in cut):
        raise ValueError(
            f"{function}: masks must be 'per_example' where dimension 0 is cut, got 'shared' and sharded_dims or start "
            f"of dimension 0 of {name}: each piece would have a mask of its own."
        )
    indices = place.get("indices")

    def of_one(row: Array, index: Array | None) -> Any:
        place_of_one = place if index is None else {**place, "indices": index[None]}
        return jax.tree.map(lambda of: of[0], call(row[None], **place_of_one))

    return jax.vmap(of_one, in_axes=(0, None if indices is None else 0))(jnp.asarray(inputs), indices)


def unshared(function: str, layer: Any) -> ValueError:
    """The error of a layer whose noise cannot be shared."""
    name = type(layer).__name__
    return ValueError(f"{function}: masks must be 'per_example' for {name}, got 'shared'. It has none to share.")
