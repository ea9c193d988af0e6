"""Our dropout in Linen models whose source is not touched."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.linen import attention
from jax import Array

from dropjax import _arguments, _checks, _flax_attention, _tracing
from dropjax.functional import elementwise
from dropjax.linen import base, rates

FlaxDropout = nn.Dropout  # Flax's own, also where somebody sets flax.linen.Dropout to ours
_weights = attention.dot_product_attention_weights
_call = inspect.unwrap(FlaxDropout.__call__)


@_arguments.public
def replace_flax(generator: str = "mix") -> contextlib.AbstractContextManager[None]:
    """Inside this context Flax's dropout is ours, in models whose source you do not touch.

    Replaces `flax.linen.Dropout` and the dropout on attention weights wherever a model calls Flax's
    `dot_product_attention` or `dot_product_attention_weights`, as `MultiHeadDotProductAttention`
    does, under whatever name it imported them. Layers with a dropout of their own, or with another
    attention function, are left alone. Parameters, rng streams and checkpoints stay as they are. A
    jitted function is traced anew inside the context, so none keeps the dropout that it was
    compiled with. The context holds for the thread that enters it; within another one the inner
    generator holds.

    Args:
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.

    Raises:
      TypeError, ValueError: if the generator is not one of these. A model is not an argument.

    Example:
      >>> model = nn.Dropout(0.5, deterministic=False)
      >>> with replace_flax():
      ...   y = model.apply({}, jnp.ones((2, 3)), rngs={"dropout": jax.random.key(0)})
    """
    if not isinstance(generator, str):
        raise TypeError(
            f"replace_flax: generator must be a string, got {type(generator).__name__}. It is a context and takes no "
            "model: with replace_flax(): model.apply(...)."
        )
    _checks.generator("replace_flax", generator)
    return _replaced(generator)


@contextlib.contextmanager
def _replaced(generator: str) -> Iterator[None]:
    run = _Replacing(generator)
    with nn.intercept_methods(run.intercept), drawing(run.attend, ("replace_flax", generator)):
        yield


@contextlib.contextmanager
def drawing(attend: Callable[[Mapping[str, Any]], _flax_attention.Drop | None], way: Any) -> Iterator[None]:
    """Has attention drawn as `attend` decides, and what is jitted traced for this way."""
    _flax_attention.install("linen", _weights)
    token = _flax_attention.linen.set(attend)
    try:
        with _tracing.traced_as(way):
            yield
    finally:
        _flax_attention.linen.reset(token)


def is_flax_dropout(context: Any) -> bool:
    """Whether what is called is the dropout of Flax itself, also from a subclass by `super()`."""
    return isinstance(context.module, FlaxDropout) and getattr(context.orig_method, "func", None) is _call


class _Replacing:
    """What one context does."""

    def __init__(self, generator: str) -> None:
        self.generator = generator
        self.callers: list[tuple[nn.Module, list[Array]]] = []  # the modules that run now, and keys of their streams

    def intercept(self, next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if _flax_attention.linen.get() != self.attend:  # an inner context holds
            return next_method(*args, **kwargs)
        if is_flax_dropout(context):
            with rates.set_on(module):
                return self._drop(module, *args, **kwargs)
        if any(module is caller for caller, _ in self.callers):
            return next_method(*args, **kwargs)
        keys: list[Array] = []

        def make_rng(name: str = "params") -> Array:
            keys.append(type(module).make_rng(module, name))
            return keys[-1]

        object.__setattr__(module, "make_rng", make_rng)  # a bound module is frozen
        self.callers.append((module, keys))
        try:
            return next_method(*args, **kwargs)
        finally:
            self.callers.pop()
            object.__delattr__(module, "make_rng")

    def _drop(self, layer: Any, inputs: Any, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        key = base.key_of(layer, layer.rate, deterministic, rng, self.generator)
        fields = {"broadcast_dims": layer.broadcast_dims, "generator": self.generator}
        return inputs if key is None else elementwise.dropout(key, inputs, layer.rate, **fields)

    def attend(self, given: Mapping[str, Any]) -> _flax_attention.Drop | None:
        """Our dropout where Flax drops, too; a key of the module's stream becomes that of its path."""
        key, rate = given["dropout_rng"], given["dropout_rate"]
        if given["deterministic"] or key is None:
            return None
        if self.callers:
            rate = rates.set_for(self.callers[-1][0], rate)
        makers = [module for module, keys in self.callers if any(key is own for own in keys)]
        if makers and self.generator == "mix":
            key = base.key_of_path(makers[-1], key)
        return None if isinstance(rate, int | float) and rate == 0 else _flax_attention.Drop(key, rate, self.generator)
