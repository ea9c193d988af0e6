"""Our dropout in NNX models whose source is not touched."""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

from dropjax import _arguments, _checks, _flax_attention
from dropjax.nnx import stand_ins
from dropjax.nnx.base import Stochastic

_Model = TypeVar("_Model", bound=nnx.Module)


@_arguments.public
def replace_flax(model: _Model, generator: str = "mix") -> _Model:
    """Changes an NNX model in place, so that Flax's dropout in it is ours, and returns the same model.

    Replaces every `flax.nnx.Dropout`, wherever it stands (also in lists and shared), also
    subclasses that do not override `__call__`; and the dropout on attention weights in modules that
    call Flax's `dot_product_attention` or `dot_product_attention_weights`, as `MultiHeadAttention`
    does. They stay instances of their classes, so that `model.set_attributes(nnx.Dropout,
    deterministic=True)` finds them. Layers with a dropout of their own, other attention functions,
    modules of Linen, and what is ours already are left alone. Parameters and rng streams stay as
    they are. To keep the model as it was, pass `nnx.clone(model)`.

    Args:
      model: an `nnx.Module`.
      generator: `"mix"`, or `"threefry"` for Flax's masks bit for bit.

    Returns:
      The same model.

    Raises:
      TypeError, ValueError: if an argument is not as said above, or if the model contains nothing
      to replace.

    Example:
      >>> from dropjax.nnx import Dropout
      >>> layer = replace_flax(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
      >>> isinstance(layer, Dropout), isinstance(layer, nnx.Dropout)
      (True, True)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"replace_flax: model must be an nnx.Module, got {_type(model)}. For a model of Linen use "
            "the context dropjax.linen.replace_flax()."
        )
    if not isinstance(generator, str):
        raise TypeError(f"replace_flax: generator must be a string, got {_type(generator)}.")
    _checks.generator("replace_flax", generator)
    modules = [module for _, module in nnx.iter_modules(model)]
    flax = [module for module in modules if stand_ins.is_flax(module)]
    attending = [module for module in modules if module not in flax and stand_ins.attends(module)]
    if not flax and not attending and not any(isinstance(module, Stochastic) for module in modules):
        raise ValueError(
            "replace_flax: model must contain Flax's Dropout, MultiHeadAttention or a module that "
            "calls Flax's attention, got none."
        )
    for module in flax:
        stand_ins.replace(module, generator)
    for module in attending:
        stand_ins.attend_by(module, drop, generator, evaluate=False)
    return model


def drop(module: nnx.Module, generator: str, given: Mapping[str, Any]) -> _flax_attention.Drop | None:
    """Our dropout on attention weights where Flax drops, too."""
    key, rate = given["dropout_rng"], given["dropout_rate"]
    if given["deterministic"] or key is None or (isinstance(rate, int | float) and rate == 0):
        return None
    return _flax_attention.Drop(key, rate, generator)


def _type(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
