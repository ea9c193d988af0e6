"""What both frameworks know of a layer: which fields it declares, and what these may be."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks, sharding

NUMBERS = (ArrayLike, ArrayLike | None)
"""What fields are declared as that may be numbers or arrays."""


@functools.cache
def declared(layer: type) -> Mapping[str, Any]:
    """The fields that a layer has from dropjax, and their types: a user's subclass may have others of any value."""
    ours = [cls for cls in layer.__mro__ if cls.__module__.startswith("dropjax.")]
    types = {name: kind for cls in ours[::-1] for name, kind in inspect.get_annotations(cls).items()}
    return {field.name: types[field.name] for field in dataclasses.fields(layer) if field.name in types}


def check(layer: Any, name: str, value: Any) -> None:
    """Checks a declared field: a number in its function's range, an integer, a flag, a known word or a module."""
    cls: Any = type(layer)
    kind, of_layer = declared(cls)[name], cls.__name__
    function = getattr(layer, "_ranges", "") or getattr(getattr(layer, "_function", None), "__name__", "")
    if kind is bool:
        _checks.flag(of_layer, name, value)
    elif kind is float and isinstance(value, Array | np.ndarray):
        raise TypeError(f"{of_layer}: {name} must be a number, got {_checks.describe(value)}. Pass float(value).")
    elif kind is float or (kind in NUMBERS and not (value is None and kind != ArrayLike)):
        _checks.field(of_layer, function, name, value)
    elif kind is int or (kind == int | None and value is not None):
        least = -sys.maxsize if name.endswith("_axis") else int(name == "num_masks")
        _checks.integer(of_layer, name, value, least)
    elif kind is str and name != "rng_collection":
        _checks.choice(function, name, value, of_layer)
    elif name == "module" and not isinstance(value, kind):
        framework = "nnx" if "nnx" in kind.__module__ else "linen"
        remedy = " Build it." if isinstance(value, type) else ""
        raise TypeError(f"{of_layer}: module must be a flax.{framework}.Module, got {_checks.describe(value)}.{remedy}")


def unmoved(layer: Any, start: Any, inputs: Any) -> None:
    """Checks `start` where nothing is drawn, as it is checked where something is."""
    if start is not None:
        sharding.starts(layer._function.__name__, start, jnp.shape(inputs))
