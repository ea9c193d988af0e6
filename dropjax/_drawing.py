"""Shared by `linen.mc_apply` and `nnx.mc_view`: which layers are stochastic, and how a batch can share one mask."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dropjax import _checks, sharding

MASKS = ("per_example", "shared")
_RATES = ("rate", "stddev", "beta")  # names of what drops nothing at 0
_AXES = ("channel_axis", "head_axis", "token_axis")
_DROPS = re.compile(r"drop|stochastic_?depth", re.IGNORECASE)
_KEEPS = re.compile(r"^(keep|survival)_?(prob|probability|rate)$", re.IGNORECASE)
_LAYERS = re.compile(r"drop_?(out|path|block|connect)|stochastic_?depth", re.IGNORECASE)
_told: set[tuple[str, str]] = set()


class Draw(NamedTuple):
    """One row of `mc_draws`: a layer that draws, or a module that has a dropout rate and does not draw."""

    path: str
    """Where the module stands in the model, its names joined by `/`; empty for the model itself."""
    kind: str
    """The name of its class; for attention weights, that of the module that calls Flax's attention."""
    rate: Any
    """Its rate (`stddev`, `beta`) if it is one number; else `traced`, `learned`, `unknown`, or dtype and shape."""
    drawn: bool
    """Whether it draws."""


class Draws(tuple[Draw, ...]):
    """The rows of `mc_draws` in the order of the call, those that do not draw last. It prints as a table."""

    def __str__(self) -> str:
        rows = [(row.path or ".", row.kind, str(row.rate), "yes" if row.drawn else "NO") for row in self]
        table = [("path", "kind", "rate", "draws"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)

    __repr__ = __str__


class Record:
    """What one call of a model draws, and which modules with a dropout rate it meets."""

    def __init__(self) -> None:
        self.drawn: dict[str, Draw] = {}
        self.met: dict[str, Draw] = {}

    def draw(self, path: str, kind: type, rate: Any) -> None:
        """Notes a layer that draws."""
        self.drawn.setdefault(path, Draw(path, kind.__name__, _shown(rate), True))

    def meet(self, path: str, kind: type, rate: Any) -> None:
        """Notes a module with a dropout rate, which may yet draw, itself or through a layer that it holds."""
        if rate is not None:
            self.met.setdefault(path, Draw(path, kind.__name__, _shown(rate), False))

    def draws(self) -> Draws:
        """The rows of `mc_draws`."""
        return Draws([*self.drawn.values(), *self._missed()])

    def missed(self) -> list[Draw]:
        """The modules with a rate above 0 at or under which nothing drew."""
        return [row for row in self._missed() if row.rate != 0]

    def _missed(self) -> Iterator[Draw]:
        for path, row in self.met.items():
            inside = f"{path}/" if path else ""
            holds = any(met != path and met.startswith(inside) for met in self.met)
            if row.rate == "unknown" and holds:
                continue  # what it holds has the rate
            if not any(drew == path or drew.startswith(inside) for drew in self.drawn):
                yield row


def not_yet_told(model: str, missed: Iterable[Draw]) -> list[Draw]:
    """The rows that this function has not returned before, for this model."""
    rows = [row for row in missed if (model, row.path) not in _told]
    _told.update((model, row.path) for row in rows)
    return rows


def warn(function: str, rows: Iterable[Draw]) -> None:
    """Warns of modules that have a rate above 0 and do not draw."""
    if names := told(rows):
        _checks.warn(f"{function}: the dropout of {names} stays off. {REMEDY}")


REMEDY = (
    "Drawn are Flax's Dropout, the layers of dropjax, and weights of Flax's attention functions. "
    "Other dropout takes its key as in training; mc_draws lists what a call draws."
)


def none_drawn(function: str, missed: Iterable[Draw]) -> ValueError:
    """The error of a model in which nothing draws."""
    return ValueError(
        f"{function}: module must have dropout of a rate above 0 that it calls, got {told(missed) or 'none'}. {REMEDY}"
    )


def no_key(function: str, kind: type, remedy: str) -> ValueError:
    """The error of attention that a module calls inside a transformation of JAX."""
    return ValueError(
        f"{function}: attention must be called by {kind.__name__} itself, got a call inside a transformation of JAX, "
        "such as jax.jit, which cannot take a key from the module. Use that of Flax and pass it the module, "
        f"{remedy}; or call the model as for training, if it passes a key to the function then."
    )


def told(rows: Iterable[Draw]) -> str:
    """Names the modules of some rows."""
    return ", ".join(f"{row.path or 'the model'} ({row.kind}, rate {row.rate})" for row in rows)


def named_rate(kind: type, fields: Mapping[str, Any]) -> float | str | None:
    """The dropout rate that a module of a third party names among its fields, if it does.

    Args:
      kind: its class.
      fields: its attributes by name, as `vars` gives them: nothing of the module's own runs.

    Returns:
      The largest number in [0, 1] that is called a rate of dropout, or 1 less what is called one of keeping; a text
      where only the name of the class shows a dropout, or the rate is traced. None where there is no rate; or where it
      is 0, unless the class calls itself a dropout.
    """
    is_dropout = any(_DROPS.search(base.__name__) for base in kind.__mro__)
    names = r"^(p|rate|prob|probability)$" if is_dropout else r"^$"
    rates = []
    for name, value in fields.items():
        keeps = _KEEPS.search(name) is not None
        if not (keeps or _DROPS.search(name) or re.search(names, name)):
            continue
        value = value.get_value() if isinstance(value, nnx.Variable) else value
        if not _is_float(value):
            continue
        if not _checks.is_known(value):
            return "traced"
        number = np.asarray(value).item()
        if 0 <= number <= 1:
            rates.append(round(1 - number, 6) if keeps else number)
    unknown = "unknown" if any(_LAYERS.search(base.__name__) for base in kind.__mro__) and not rates else None
    return max((rate for rate in rates if rate or is_dropout), default=unknown)


def _is_float(value: Any) -> bool:
    if isinstance(value, float):
        return True
    array = _checks.is_array(value) or isinstance(value, np.generic)
    return array and not value.shape and jnp.issubdtype(value.dtype, jnp.floating)


def rate_of(layer: Any) -> Any:
    """The rate of a layer of dropjax or Flax; None where it is learned or given at the call."""
    function = getattr(layer, "_function", None)
    name = "rate" if function is None else sharding.fields(function)[0]
    rate: Any = getattr(layer, name, None) if name in _RATES else None
    return rate.get_value() if hasattr(rate, "get_value") else rate


def draws(layer: Any) -> bool:
    """Whether a layer may draw at all: its rate is traced, learned or not 0."""
    return not is_zero(rate_of(layer))


def is_zero(rate: Any) -> bool:
    """Whether a rate is known to be 0."""
    if _checks.is_traced(rate) or not getattr(rate, "is_fully_addressable", True):
        return False
    return (isinstance(rate, int | float) or _checks.is_array(rate)) and bool((np.asarray(rate) == 0).all())


def _shown(rate: Any) -> Any:
    if rate is None or isinstance(rate, str):
        return rate or "learned"
    if is_zero(rate):
        return 0.0
    if np.ndim(rate):
        return _checks.describe(rate)
    known = not _checks.is_traced(rate) and getattr(rate, "is_fully_addressable", True)
    return float(rate) if known else "traced"


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
    cut = [*(sharding.manual(getattr(layer, "sharded_dims", None)) or ()), *(place.get("start") or ())]
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
