"""Traces a function of a key that a user passed, and says where it is not one."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from dropjax import _checks
from dropjax.mc import hoisting

_NOTES = {  # by name, since Flax is not imported here
    "TraceContextError": "fn must not draw from the streams of an NNX model. Take a view of it with fn's key: "
    "lambda key: dropjax.nnx.mc_view(model, key)(x).",
    "InvalidRngError": "fn must give the dropout of a Linen model a key. Let dropjax do it: "
    "lambda key: dropjax.linen.mc_apply(model, variables, key, x).",
}


def trace(function: str, fn: Callable[[Array], Any], key: Array) -> tuple[hoisting.Program, Sequence[Any], Any]:
    """Checks and traces a function of a key; returns what `hoisting.part` does."""
    try:
        signature = inspect.signature(fn)
        signature.bind(key)
    except ValueError:  # some functions in C have none
        pass
    except TypeError:
        if not callable(fn):
            raise TypeError(f"{function}: fn must be a function of a key, got {_checks.describe(fn)}.") from None
        raise TypeError(
            f"{function}: fn must be a function of one argument, a key, got one of {signature}. Wrap it: "
            "lambda key: ..."
        ) from None

    def checked(key: Array) -> Any:
        try:
            result = fn(key)
        except Exception as error:
            if note := _NOTES.get(type(error).__name__):
                error.add_note(f"{function}: {note}")
            raise
        for leaf in jax.tree.leaves(result):
            if not (_checks.is_array(leaf) or isinstance(leaf, bool | int | float | complex)):
                raise TypeError(f"{function}: fn must return arrays, got {_checks.describe(leaf)}.")
        return result

    return hoisting.part(checked, key)
