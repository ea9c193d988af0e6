"""Classes that stand in for those of a model whose source is not touched: subclasses, so that `isinstance` holds."""

import contextlib
import copyreg
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_EVALUATED: dict[str, Any] = {"deterministic": True, "rngs": None}
_LIBRARIES = {"flax", "jax", "jaxlib", "numpy", *sys.stdlib_module_names}


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
        call = inspect.signature(own)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **options: Any) -> Any:
            if overrule:
                given = {name: _EVALUATED.get(name, of) for name, of in options.items()}
                with contextlib.suppress(TypeError):  # which the method itself raises, with its name
                    bound = call.bind(self, *args, **given)
                    bound.arguments |= {name: of for name, of in _EVALUATED.items() if name in call.parameters}
                    args, options = bound.args[1:], bound.kwargs
            token = _flax_attention.nnx.set(functools.partial(decide, self, how))
            try:
                with _tracing.traced_as((decide.__name__, how)):
                    return own.__get__(self)(*args, **options)
            finally:
                _flax_attention.nnx.reset(token)

        return method

    own = {name: of for name, of in sorted(_defined(kind).items()) if name == "__call__" or name[:2] != "__"}
    return (kind,), {name: inside(name, of) for name, of in own.items() if _is_method(of)}


def _is_method(of: Any) -> bool:
    """Whether an attribute of a class is a method, also one that a transformation made, such as `nnx.jit`."""
    return callable(of) and hasattr(of, "__get__") and not isinstance(of, staticmethod | type)


def inside_transformation(module: nnx.Module) -> Iterator[Any]:
    """The modules of the class of this one that the functions running now were given, the innermost first.

    Inside a transformation of NNX one of them is the module as it is there.
    """
    frame = sys._getframe().f_back  # none but the stack knows what a transformation calls a function with
    while frame is not None:
        for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            given = frame.f_locals.get(name)
            if type(given) is type(module) and given is not module:
                yield given
        frame = frame.f_back


def attends(module: nnx.Module) -> bool:
    """Whether a module calls Flax's attention: by its methods, what they call, or a function that it holds."""
    return _methods_attend(own_class(module)) or _reaches(list(vars(module).values()), set())


@functools.cache
def _methods_attend(kind: type) -> bool:
    return _reaches([of for name, of in _defined(kind).items() if name != "__init__"], set())


def _defined(kind: type) -> dict[str, Any]:
    return {name: value for base in kind.__mro__[::-1] if base not in _BASES for name, value in vars(base).items()}


def _reaches(thing: Any, seen: set[int]) -> bool:
    """Whether a thing is one of Flax's attention functions, or its code, or what that names or holds, leads to one."""
    if any(thing is one for one in _FUNCTIONS):
        return True
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    return any(_reaches(part, seen) for part in _parts(thing))


def _parts(thing: Any) -> Iterable[Any]:
    """What is called where a thing is; other modules, whose attention is their own, and libraries apart."""
    if isinstance(thing, list | tuple):
        return thing
    if isinstance(thing, Mapping):
        return thing.values()
    if isinstance(thing, functools.partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, property):
        return (thing.fget,)
    kind = thing if isinstance(thing, type) else type(thing)
    if getattr(thing, "__wrapped__", None) is not None:
        return (thing.__wrapped__,)
    if isinstance(thing, types.MethodType | classmethod | staticmethod):
        return (thing.__func__,)
    if isinstance(thing, types.FunctionType):
        own = thing.__module__.partition(".")[0] not in ("jax", "numpy")
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        return (*cells, *defaults, *_named(thing)) if own else ()
    if issubclass(kind, nnx.Object | nnx.Variable) or kind.__module__.partition(".")[0] in _LIBRARIES:
        return ()
    return (*_defined(kind).values(), *(() if thing is kind else getattr(thing, "__dict__", {}).values()))


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
