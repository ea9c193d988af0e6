"""One rate for all dropout of a Linen model, from a schedule inside a jitted step."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike

from dropjax import _arguments, _checks, _tracing
from dropjax.linen import base, wrappers

LAYERS = (base.Bare, wrappers.DropConnectDense, wrappers.LayerDrop, wrappers.WeightDrop)
"""All that have a rate among their fields are of these classes."""

_met_before: set[float] = set()


@_arguments.public
def with_rates(rate: ArrayLike | Callable[[str, Any], ArrayLike]) -> contextlib.AbstractContextManager[None]:
    """Inside this context all dropout layers of a model have the given rate, which may be traced.

    Enter it inside a jitted step, around `model.apply`, with a rate from a schedule: then nothing
    is compiled anew when the rate changes, also to and from 0. It holds for every layer of
    `dropjax.linen` with a field `rate`; and for Flax's Dropout and attention, where they are
    replaced by `replace_flax` or called by `mc_apply` (attention that is built with a rate of 0 has
    no dropout). Layers with a learned rate, a `stddev` or a `num_keep` keep theirs, and so does
    what is deterministic. The context holds for the thread that enters it; within another one the
    inner rate holds.

    Args:
      rate: a number; a scalar float array; or a function `(path, rate) -> rate` of the path of each
        layer, its names joined by `/`, and the rate that it was built with: for some layers only,
        or to scale. Modules of one configuration under `nn.jit` are one layer, whose path begins
        there.

    Returns:
      The context.

    Raises:
      TypeError, ValueError: if the rate is not as said above; or, at the end, if no layer with a
      rate was called.

    Example:
      >>> from dropjax.linen import Dropout
      >>> model, x = nn.Sequential([nn.Dense(4), Dropout(0.1, deterministic=False)]), jnp.ones((2, 3))
      >>> variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
      >>> @jax.jit
      ... def step(variables, x, key, i):
      ...   with with_rates(jnp.minimum(i / 1000, 0.5)):
      ...     return model.apply(variables, x, rngs={"dropout": key})
      >>> y = step(variables, x, jax.random.key(2), 100)
    """
    if isinstance(rate, nn.Module) or not callable(rate):
        if _checks.is_array(rate) and rate.ndim:
            raise ValueError(
                f"with_rates: rate must be a number or a scalar array, got {_checks.describe(rate)}. "
                "For other rates in some layers pass a function (path, rate) -> rate."
            )
        _checks.rate("with_rates", rate, ())
        if not _checks.is_traced(rate):
            rate = float(rate)  # type: ignore[arg-type]  # checked
    else:
        _checks.of_layers("with_rates", rate)
    return _with_rates(rate)


class _Setting:
    """The rate that a context sets."""

    def __init__(self, rate: Any) -> None:
        self.rate, self.met = rate, False
        self.inside: set[int] = set()  # modules whose field is that of the context now

    def __call__(self, module: nn.Module, own: Any) -> Any:
        self.met = True
        if not callable(self.rate):
            return self.rate
        rate = self.rate(path(module), own)
        _checks.rate("with_rates", rate, jnp.shape(rate), argument="the returned rate")
        return rate


_setting: contextvars.ContextVar[_Setting | None] = contextvars.ContextVar("_setting", default=None)


@contextlib.contextmanager
def _with_rates(rate: Any) -> Iterator[None]:
    setting = _Setting(rate)
    token = _setting.set(setting)
    # What is traced with a number may be used again; a traced rate, or what a function returns, only in its own trace.
    way = ("with_rates", rate) if isinstance(rate, float) else object()
    try:
        with nn.intercept_methods(_intercept), _tracing.traced_as(way):
            yield
    finally:
        _setting.reset(token)
    if setting.met and isinstance(rate, float):
        _met_before.add(rate)
    met = setting.met or (isinstance(rate, float) and rate in _met_before)
    if (outer := _setting.get()) is not None:
        outer.met |= met
    if not met:
        raise ValueError(
            "with_rates: model must call a layer with a rate inside the context, got none. Set are the "
            "layers of dropjax.linen, and Flax's where replace_flax or mc_apply holds, too."
        )


def _intercept(next_method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if context.method_name != "__call__" or not isinstance(context.module, LAYERS):
        return next_method(*args, **kwargs)
    with set_on(context.module):
        return next_method(*args, **kwargs)


@contextlib.contextmanager
def set_on(layer: Any) -> Iterator[None]:
    """Sets the field `rate` of a layer for one call, where a context says so; a bound module is frozen otherwise."""
    setting, own = _setting.get(), vars(layer).get("rate")
    if setting is None or own is None or id(layer) in setting.inside:
        yield
        return
    object.__setattr__(layer, "rate", setting(layer, own))
    setting.inside.add(id(layer))
    try:
        yield
    finally:
        setting.inside.remove(id(layer))
        object.__setattr__(layer, "rate", own)


def set_for(module: nn.Module, own: Any) -> Any:
    """The rate of the attention weights in a module, where a context sets one."""
    setting = _setting.get()
    return own if setting is None else setting(module, own)


def path(module: nn.Module) -> str:
    """Where a module stands in its model."""
    return "/".join(module.path)
