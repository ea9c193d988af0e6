"""Dropout on attention weights in models that call Flax's attention, however they import it.

Models bind `dot_product_attention_weights` by name, so that its identity must stay: its code is
exchanged for a call of this file, which runs the original code and, where a context asks for it,
applies our dropout to the weights. All of Flax's attention passes through that function, also
`dot_product_attention` and its grouped queries.
"""

import contextvars
import inspect
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from dropjax.functional import elementwise


class Drop(NamedTuple):
    """The dropout of one call."""

    key: Array
    rate: Any
    generator: str = "mix"
    share_batch: bool = False
    """Whether all examples share the mask, as `broadcast_dropout` shares it over batch and heads."""


Handler = contextvars.ContextVar[Callable[[Mapping[str, Any]], Drop | None] | None]
linen: Handler = contextvars.ContextVar("linen", default=None)
nnx: Handler = contextvars.ContextVar("nnx", default=None)
"""Map the arguments of a call to its dropout, or to None where Flax's own code decides, for each framework alone."""

_originals: dict[str, Callable[..., Array]] = {}
_lock = threading.Lock()


def _linen(*args: Any, **kwargs: Any) -> Any:  # runs with the globals of Flax's module
    from dropjax._flax_attention import call

    return call("linen", *args, **kwargs)


def _nnx(*args: Any, **kwargs: Any) -> Any:  # likewise
    from dropjax._flax_attention import call

    return call("nnx", *args, **kwargs)


def install(framework: str, function: Any) -> None:
    """Has every call of the function pass through `call`, once; its identity and signature stay.

    Args:
      framework: `"linen"` or `"nnx"`.
      function: the framework's `dot_product_attention_weights`.
    """
    with _lock:
        if framework in _originals:
            return
        original = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        original.__kwdefaults__ = function.__kwdefaults__
        _originals[framework] = original
        function.__signature__ = inspect.signature(function)
        function.__code__ = {"linen": _linen, "nnx": _nnx}[framework].__code__


def call(framework: str, /, *args: Any, **kwargs: Any) -> Array:
    """Returns the attention weights, after our dropout where the context asks for it."""
    original, decide = _originals[framework], {"linen": linen, "nnx": nnx}[framework].get()
    if decide is None:
        return original(*args, **kwargs)
    given = inspect.signature(original).bind(*args, **kwargs)
    given.apply_defaults()
    drop = decide(given.arguments)
    if drop is None:
        return original(*args, **kwargs)
    broadcast = given.arguments["broadcast_dropout"]
    given.arguments |= {"deterministic": True, "dropout_rate": 0.0, "dropout_rng": None}
    weights = original(*given.args, **given.kwargs)
    shared = tuple(range(weights.ndim - 2)) if broadcast else (0,) * drop.share_batch
    return elementwise.dropout(drop.key, weights, drop.rate, broadcast_dims=shared, generator=drop.generator)
