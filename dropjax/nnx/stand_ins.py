"""Classes that stand in for those of a model whose source is not touched: subclasses, so that `isinstance` holds."""

import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx
from flax.nnx.nn import attention

from dropjax import _flax_attention, _tracing
from dropjax.nnx.base import FlaxDropout
from dropjax.nnx.layers import Dropout

_weights = attention.dot_product_attention_weights
_FUNCTIONS = (_weights, attention.dot_product_attention)
_NAMES = {function.__name__ for function in _FUNCTIONS}
_BASES = frozenset(nnx.Module.__mro__)


class _Meta(type(nnx.Module)):  # type: ignore[misc]  # a metaclass by its value
    """The class of these classes, which are pickled by what they are made of."""


@functools.cache
def _subclass(make: Any, kind: Any, *how: Any) -> type:
    bases, methods = make(kind, *how)
    meta = _Meta if issubclass(_Meta, type(kind)) else type(kind)
    return meta(kind.__name__, bases, {"__module__": __name__, "_made_of": (make, kind, *how), **methods})


copyreg.pickle(_Meta, lambda cls: (_subclass, cls._made_of))  # type: ignore[arg-type, return-value]  # of a class


def own_class(module: nnx.Module) -> Any:
    """The class of a module before another stood in for it."""
    kind = type(module)
    while "_made_of" in vars(kind) and vars(kind)["_made_of"][0] is not _replacing:
        kind = vars(kind)["_made_of"][1]
    return kind


def is_flax(module: nnx.Module) -> bool:
    """Whether a module is Flax's dropout, or a subclass without a call of its own."""
    return type(module).__call__ is FlaxDropout.__call__


def replace(module: Any, generator: str) -> None:
    """Makes Flax's dropout ours in place, so that lists, dicts and shared references keep it."""
    kind: Any = type(module)
    module.__class__ = _subclass(_replacing, kind)
    module.generator, module.sharded_dims = generator, None


def _replacing(kind: type) -> tuple[tuple[type, ...], dict[str, Any]]:
    return (Dropout, kind), {}


def draw_by(module: Any, call: Callable[..., Any]) -> None:
    """Has a module called through `call(own call, module, ...)`; its layout stays."""
    module.__class__ = _subclass(_calling, own_class(module), call)


def _calling(kind: type, call: Callable[..., Any]) -> tuple[tuple[type, ...], dict[str, Any]]:
    own = kind.__call__

    @functools.wraps(own)
    def __call__(self: Any, *args: Any, **options: Any) -> Any:
        return call(own, self, *args, **options)

    return (kind,), {"__call__": __call__}


def attend_by(module: Any, decide: Callable[..., _flax_attention.Drop | None], how: str, evaluate: bool) -> None:
    """Has the attention that a module calls dropped as `decide(module, how, arguments of the call)` says.

    Args:
      module: the module, which changes its class.
      decide: a function of a module of dropjax.
      how: what it takes besides.
      evaluate: whether Flax's own layer is called as for evaluation, whatever its arguments say.
    """
    _flax_attention.install("nnx", _weights)
    module.__class__ = _subclass(_attending, own_class(module), decide, how, evaluate)


def _attending(
    kind: type, decide: Callable[..., Any], how: str, evaluate: bool
) -> tuple[tuple[type, ...], dict[str, Any]]:
    def inside(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        overrule = evaluate and name == "__call__" and issubclass(kind, nnx.MultiHeadAttention)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **options: Any) -> Any:
            options |= {"deterministic": True, "rngs": None} if overrule else {}
            token = _flax_attention.handler.set(functools.partial(decide, self, how))
            try:
                with _tracing.traced_as((decide.__name__, how)):
                    return own(self, *args, **options)
            finally:
                _flax_attention.handler.reset(token)

        return method

    names = {name for base in kind.__mro__ if base not in _BASES for name in vars(base)}
    own = {name: inspect.getattr_static(kind, name) for name in sorted(names) if name == "__call__" or name[:2] != "__"}
    return (kind,), {name: inside(name, of) for name, of in own.items() if isinstance(of, types.FunctionType)}


def attends(module: nnx.Module) -> bool:
    """Whether a module calls Flax's attention: by its methods, what they call, or a function that it holds."""
    held = [value for value in vars(module).values() if callable(value) and not isinstance(value, nnx.Module)]
    return _methods_attend(own_class(module)) or any(_reaches(value, set()) for value in held)


@functools.cache
def _methods_attend(kind: type) -> bool:
    methods = {name: value for base in kind.__mro__ if base not in _BASES for name, value in vars(base).items()}
    return any(_reaches(getattr(of, "__func__", of), set()) for name, of in methods.items() if name != "__init__")


def _reaches(function: Any, seen: set[int]) -> bool:
    """Whether the code of a function, or of functions that it names, names one of Flax's attention functions."""
    function = function.func if isinstance(function, functools.partial) else function
    function = inspect.unwrap(function) if callable(function) else function
    if any(function is one for one in _FUNCTIONS):
        return True
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return False
    seen.add(id(function))
    if function.__module__.partition(".")[0] in ("jax", "numpy"):
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    return any(_reaches(thing, seen) for thing in (*cells, *_named(function)))


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What the names in the code of a function stand for: globals, and attributes of modules among them."""
    codes, names = [function.__code__], set[str]()
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    spaces, entered, known = [function.__globals__], {id(function.__globals__)}, set[str]()
    for space in spaces:
        for name in names & space.keys():
            known.add(name)
            yield space[name]
            if isinstance(space[name], types.ModuleType) and id(vars(space[name])) not in entered:
                entered.add(id(vars(space[name])))
                spaces.append(vars(space[name]))
    if (names - known) & _NAMES:  # imported inside the function
        yield _weights


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
