"""The rates of all layers of an NNX model, set from a schedule inside or outside a jitted step."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.nnx import stacks
from dropjax.nnx.base import FlaxDropout, Stochastic
from dropjax.nnx.calls import TokenDropout

_Model = TypeVar("_Model", bound=nnx.Module)


@_arguments.public
def set_rates(model: _Model, rate: ArrayLike | Callable[[str, Any], ArrayLike]) -> _Model:
    """Sets the rates of all dropout layers of an NNX model; changes and returns the model.

    An array, which may be traced, is data of the model from then on, a `Rate`: other values do not compile a jitted
    step again. The first array that takes the place of a number changes the structure of the model, so that a step
    compiles twice: set an array before the first step, or build the layers with one. In a stack of layers for a scan
    each layer gets the rate; where they have no stream, what is beside them shows how many they are.

    Args:
      model: an `nnx.Module` with layers of `dropjax.nnx` that have a field `rate`, also within others, or with Flax's
        own `Dropout` and `MultiHeadAttention`, which take only what is known while tracing.
      rate: a number, an array that broadcasts against the inputs of each layer, or a function of the path of a layer
        (such as `"blocks/0/drop"`) and of its rate that returns its new rate.

    Returns:
      The same model.

    Raises:
      TypeError, ValueError: if a rate is not as said above, or no layer has one; nothing is changed.

    Example:
      >>> from dropjax.nnx import Dropout
      >>> model = nnx.Sequential(Dropout(0.5, rngs=nnx.Rngs(0)), Dropout(0.2, rngs=nnx.Rngs(1)))
      >>> layers = set_rates(model, lambda path, rate: rate / 2 if path == "layers/0" else rate).layers
      >>> [layer.rate for layer in layers]
      [0.25, 0.2]
    """
    rate = rate.get_value() if isinstance(rate, nnx.Variable) else rate
    if callable(rate):
        _checks.of_layers("set_rates", rate)
    changes = []
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    stacked = stacks.shapes(modules)
    for where, module in modules.items():
        if not isinstance(module, nnx.MultiHeadAttention | Stochastic | FlaxDropout):
            continue
        name = "dropout_rate" if isinstance(module, nnx.MultiHeadAttention) else "rate"
        old = getattr(module, name, None)
        if old is None:
            continue
        new: Any = rate
        if callable(rate):
            new = rate(where, old.get_value() if isinstance(old, nnx.Variable) else old)
        if not isinstance(module, Stochastic) or isinstance(module, TokenDropout):
            new = _known(module, where, new)
        function = getattr(getattr(module, "_function", None), "__name__", "")
        _checks.field("set_rates", function, "rate", new)
        if _checks.is_array(new) and new.ndim == 0 and stacked[where]:
            new = jnp.full(stacked[where], new, jnp.float32)
        changes.append((module, name, new))
    if not changes:
        raise ValueError("set_rates: model must have a layer with a rate, got none.")
    for module, name, new in changes:
        try:
            setattr(module, name, new)
        except TraceContextError as error:
            error.add_note(
                "set_rates: a function that JAX transforms cannot change a model that it closes over. Pass the model "
                "as an argument, or set the rates of a copy, nnx.clone(model)."
            )
            raise
    return model


def _known(module: Any, where: str, rate: Any) -> Any:
    """The rate of a layer that takes a number alone."""
    if not _checks.is_array(rate):
        return rate
    if _checks.is_traced(rate) or rate.ndim:
        remedy = "Put ours into the model first, replace_flax(model)."
        if not isinstance(module, FlaxDropout):
            remedy = "Set a number, or leave it out by a function of its path, lambda path, rate: ..."
        raise TypeError(
            f"set_rates: rate must be a number for the {type(module).__name__} at {where!r}, got "
            f"{_checks.describe(rate)}. {remedy}"
        )
    return rate if isinstance(module, TokenDropout) else np.asarray(rate).item()
