"""The calls of public functions: wrong keywords and arguments in another order are errors that say so."""

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _checks, _names

_P = ParamSpec("_P")
_R = TypeVar("_R")
_NUMBERS = {"floats", "number", "integer"}
_KINDS = {
    "key": {"key"},
    "fn": {"function"},
    "loss_fn": {"function"},
    "data": {"function"},
    "module": {"function", "other"},
    "model": {"function", "other"},
    "variables": {"mapping"},
    "optimizer": {"other"},
    "shape": {"shape", "integer"},
    "blocks": {"shape", "integer"},
    "nodes": {"integers", "integer"},
    "senders": {"integers"},
    "receivers": {"integers"},
    "labels": {"integers"},
    "mask": {"flags"},
    "masks": {"flags", "floats", "integers"},
    "threshold": {"number", "integer"},
    "temperature": {"number", "integer"},
}
"""What kinds of values arguments take, by their names; others by their annotations."""
_SHAPES = re.compile(r"shape|rank|dimension|one number|\[[a-z.]")  # what an error of a shape says
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_ANNOTATED = {
    int: {"integer"},
    float: {"number", "integer"},
    str: {"text"},
    Array: _NUMBERS,
    ArrayLike: _NUMBERS,
    ArrayLike | None: _NUMBERS,
}


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets the errors of a function's call name what is meant; what it does and returns is as before."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # costs nothing where there is none
            if (better := _binding(function, args, kwargs)) is not None:
                raise better from None
            if (better := _ordered(function, args, error)) is not None:
                raise better from error
            raise

    return call


def layers(*exported: Any) -> None:
    """Lets the errors of building and of calling layers of ours name the keywords that are meant."""
    kinds = {kind for layer in exported if isinstance(layer, type) for kind in layer.__mro__}
    for kind in (kind for kind in kinds if kind.__module__.startswith("dropjax.")):
        for name in {"__init__", "__call__"} & vars(kind).keys():
            if not hasattr(vars(kind)[name], "explained"):
                setattr(kind, name, _method(vars(kind)[name]))


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except TypeError as error:
            if (better := _binding(function, (self, *args), kwargs, type(self).__name__)) is not None:
                raise better from None
            if (better := _handed_on(function, kwargs, type(self).__name__, error)) is not None:
                raise better from error
            raise

    call.explained = True  # type: ignore[attr-defined]  # functions take attributes
    return call


def _binding(
    function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], layer: str | None = None
) -> TypeError | None:
    """The error of arguments that a function, or a layer's method, does not take, or None if it takes them."""
    signature, name = inspect.signature(function), layer or function.__name__
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        if layer:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        named = [p.name for p in signature.parameters.values() if p.kind not in _VARIADIC]
        if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):  # which may take them
            kwargs = {keyword: value for keyword, value in kwargs.items() if _names.is_meant(keyword, named)}
        wrong = _names.explain(name, kwargs, named)
        missing = re.fullmatch(r"missing a required .*argument: '(\w+)'", str(error))
        text = f"{missing[1]} must be given, got none" if missing else f"got {error}"
        return wrong or TypeError(f"{name}: {text}. {_order(signature)}")
    return None


def _handed_on(function: Callable[..., Any], kwargs: dict[str, Any], layer: str, error: TypeError) -> TypeError | None:
    """The error of another library's keyword for one of a layer's that the layer hands on to what it is made of."""
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in _VARIADIC][1:]
    refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if refused is None or refused[1] not in kwargs or not _names.is_meant(refused[1], named):
        return None
    return _names.explain(layer, [refused[1]], named)


def _ordered(function: Callable[..., Any], args: tuple, error: Exception) -> TypeError | None:
    """States the order of the arguments where they seem to be in another one.

    An error of ours gets it as its remedy; for any other one it returns an error of ours.
    """
    signature, name = inspect.signature(function), function.__name__
    order, text = _order(signature), str(error)
    ours = text.startswith(f"{name}: ")
    parameters = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.KEYWORD_ONLY]
    if parameters and parameters[-1].kind == inspect.Parameter.VAR_POSITIONAL:
        parameters += parameters[-1:] * (len(args) - len(parameters))
    given = list(zip(parameters, args, strict=False))
    if len(given) < 2 or order in text or not (_swapped(given) or (ours and _misplaced(given, text))):
        return None
    if ours and type(error) in (TypeError, ValueError):
        error.args = (f"{text} {order}",)
        return None
    kinds = ", ".join(_checks.describe(value) for value in args)
    return TypeError(f"{name}: arguments must be in their order, got {kinds}. {order}")


def _swapped(given: list[tuple[inspect.Parameter, Any]]) -> bool:
    """Whether two arguments would fit better in each other's place."""

    def fits(parameter: inspect.Parameter, value: Any) -> bool:
        takes = _takes(parameter)
        return takes is None or _kind(value) in takes

    return any(
        fits(p, second) + fits(q, first) > fits(p, first) + fits(q, second)
        for (p, first), (q, second) in itertools.combinations(given, 2)
    )


def _misplaced(given: list[tuple[inspect.Parameter, Any]], text: str) -> bool:
    """Whether an array is given for the key, or an error names an argument whose kind or shape may be another one's."""
    if any(p.name == "key" and _kind(value) == "floats" for p, value in given):
        return True
    named = set(re.split(r",? and |, | ", text.partition(": ")[2].partition(" must ")[0]))
    taken = set().union(*(_takes(p) or () for p, _ in given))
    for p, value in given:
        kind = _kind(value)
        wrong = p.name in named and kind not in (_takes(p) or {kind}) and kind not in ("number", "integer")
        if wrong and kind in taken - {"other"}:
            return True
    arrays = {p.name: np.shape(value) for p, value in given if _kind(value) in _NUMBERS | {"flags", "integers"}}
    if not _SHAPES.search(text) or "while tracing" in text:  # a length that is symbolic is in no wrong place
        return False
    if any(len(first) < len(second) for first, second in itertools.combinations(arrays.values(), 2)):
        return True  # a number, and then the array that it is for
    has_remedy = ". " in text.partition(", got ")[2] and not (len(named) > 1 and arrays.keys() - named)
    return bool(named & arrays.keys()) and len(set(arrays.values())) > 1 and not has_remedy


def _takes(parameter: inspect.Parameter) -> set[str] | None:
    """The kinds of values that a parameter takes; None for all."""
    return _KINDS.get(parameter.name) or _ANNOTATED.get(parameter.annotation)


def _kind(value: Any) -> str:
    """What kind of argument a value may be."""
    if _checks.is_array(value):
        if _checks.is_typed(value) or (value.dtype == np.uint32 and value.ndim):
            return "key"
        if value.dtype == np.bool_:
            return "flags" if value.ndim else "flag"
        if jnp.issubdtype(value.dtype, jnp.integer):
            return "integers" if value.ndim else "integer"
        return "floats" if value.ndim else "number"
    for kinds, kind in ((bool, "flag"), (int, "integer"), (float | complex, "number"), (str, "text")):
        if isinstance(value, kinds):
            return kind
    if isinstance(value, tuple | list) and all(isinstance(n, int) for n in value):
        return "shape"
    if hasattr(value, "keys"):
        return "mapping"
    return "function" if callable(value) else "other"


def _order(signature: inspect.Signature) -> str:
    """The order of the arguments, as the remedy of an error."""
    parameters = signature.parameters.values()
    ordered = [p for p in parameters if p.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)]
    names = [f"*{p.name}" if p.kind == inspect.Parameter.VAR_POSITIONAL else p.name for p in ordered]
    named = [p.name for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY and p.default is p.empty]
    text = f"The order of the arguments is {', '.join(names)}."
    return text if not named else f"{text[:-1]}, and by keyword {', '.join(named)}."
