"""Ways to trace: what a context changes in a model enters the keys of JAX's caches, and no program."""

import contextlib
import contextvars
from collections.abc import Hashable, Iterator

import jax

_ways: contextvars.ContextVar[tuple[Hashable, ...]] = contextvars.ContextVar("_ways", default=())
_keyed = jax.make_user_context(default_value=())


@contextlib.contextmanager
def traced_as(way: Hashable) -> Iterator[None]:
    """Inside this context nothing that was traced in another way is taken from a cache.

    Args:
      way: what distinguishes the traces. Equal ways share them, so that a second call compiles
        nothing: then a trace must depend on nothing but its way and its arguments. An `object()`
        shares them with no other.
    """
    ways = (*_ways.get(), way)
    token = _ways.set(ways)
    try:
        with _keyed(ways):
            yield
    finally:
        _ways.reset(token)
