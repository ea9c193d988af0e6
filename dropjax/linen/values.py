"""Layers as values: what they are built with is checked, and compared and hashed with the arrays in it."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jax import Array

from dropjax import _arguments, _checks, _layers, sharding


class Value(nn.Module):
    """A module whose fields are checked when it is built, and compared and hashed by value.

    Traced arrays, and those of other processes too, are equal where they are one object.
    """

    _ranges: ClassVar[str] = ""  # the function whose ranges the fields have, where it is not `_function`

    def __init_subclass__(cls, **options: Any) -> None:
        for name in ("__eq__", "__hash__"):  # or Flax would make those of a dataclass, which fail for arrays
            if name not in vars(cls):
                setattr(cls, name, getattr(Value, name))
        super().__init_subclass__(**options)
        _arguments.layers(cls)

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *_values(self)))

    def __post_init__(self) -> None:
        layer: Any = type(self)
        for name in _layers.declared(layer):
            value = getattr(self, name)
            _layers.check(self, name, value)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif name == "sharded_dims":
                object.__setattr__(self, name, sharding.pairs(value))
            elif isinstance(value, Array | np.ndarray):
                object.__setattr__(self, "__fn_or_cls__", _Fingerprint(self))
        super().__post_init__()


def _values(layer: Any) -> list[Any]:
    return [_frozen(getattr(layer, field.name)) for field in dataclasses.fields(layer) if field.compare]


def _frozen(value: Any) -> Any:
    """The value, or what stands for it in comparisons and hashes: for an array, also in a module or in a list."""
    if isinstance(value, nn.Module):
        fields = [field.name for field in dataclasses.fields(value) if field.compare and field.name != "parent"]
        return type(value), *(_frozen(getattr(value, name)) for name in fields)
    if isinstance(value, list | tuple):
        return type(value), *map(_frozen, value)
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(of)) for key, of in value.items())
    return frozenset(value) if isinstance(value, set) else _without_array(value)


def _without_array(value: Any) -> Any:
    if not isinstance(value, Array | np.ndarray):
        return value.item() if isinstance(value, np.generic) else value
    if _checks.is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return "array", id(value)
    return "array", str(value.dtype), value.shape, hashlib.sha256(np.asarray(value).tobytes()).hexdigest()


class _Fingerprint:
    """Stands for a layer with an array where Flax's `nn.jit` compares modules: it would iterate over the array."""

    def __init__(self, layer: Value) -> None:
        self.layer = layer

    def __iter__(self) -> Iterator[Any]:
        layer: Any = self.layer
        yield f"{type(layer).__module__}.{type(layer).__qualname__}"
        for field in dataclasses.fields(layer):
            if field.name not in ("parent", "name"):
                value = getattr(layer, field.name)
                # An address may come again, and nn.jit keeps hashes alone; Flax's number of a module does not.
                yield layer._id if _checks.is_traced(value) else _without_array(value)
        if layer.scope is not None:
            yield repr(layer.scope.rng_counters)
