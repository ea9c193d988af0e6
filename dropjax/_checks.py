"""One voice for errors: everything a user passes is checked here, before any mathematics.

Messages read "function: argument must be ..., got ..." and end with the remedy where there is one.
"""

import contextlib
import dataclasses
import inspect
import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.typing import ArrayLike

MAX_INDEX = 2**32  # every index of an element is a 32-bit word
GENERATORS = ("mix", "threefry")
_RANGES = {
    ("gaussian_dropout", "rate"): "[0, 1)",
    ("token_dropout", "rate"): "[0, 1)",
    ("gaussian_noise", "stddev"): "[0, inf)",
    ("concrete_dropout", "temperature"): "(0, 1]",
    ("concrete_dropout", "initial_rate"): "(0, 1)",
    ("concrete_dropout_kl", "length_scale"): "[0, inf)",
    ("standout", "alpha"): "(-inf, inf)",
    ("standout", "beta"): "(-inf, inf)",
    ("mask_feature", "fill_value"): "(-inf, inf)",
    ("masksembles_masks", "scale"): "[1, 100]",
    ("variational_gaussian_dropout", "initial_log_alpha"): "(-inf, inf)",
    ("variational_dense", "initial_log_alpha"): "(-inf, inf)",
    ("sparse_variational_dense", "initial_log_sigma2"): "(-inf, inf)",
    ("sparse_variational_dense", "threshold"): "[-inf, inf]",
}
"""The ranges of arguments that are not in [0, 1], by function and argument."""
_CHOICES = {
    ("drop_path", "mode"): ("row", "batch"),
    ("mask_feature", "mode"): ("all", "row", "col"),
    ("drop_block", "normalize"): ("expected", "example", "batch"),
    ("targeted_dropout", "kind"): ("weight", "unit"),
    ("variational_dense", "per"): ("weight", "unit", "layer"),
    ("sparse_variational_dense", "per"): ("weight", "unit", "layer"),
}
"""The words that an argument may be, by function and argument."""
_WITHOUT_ZERO_OR_NAN = ("float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A rate that is known while tracing: part of the program, not of its data."""

    value: float


Rate = Fixed | Array
"""A checked rate: fixed, or float32 of the rank of x or a scalar."""


def describe(value: Any) -> str:
    """`float32[4,3]` for arrays, `1.5` or `'half' (str)` for everything else."""
    if is_array(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    text = repr(value) if len(repr(value)) <= 60 else "a value"
    return text if type(value) in (int, float) else f"{text} ({type(value).__name__})"


def warn(message: str) -> None:
    """Warns at the line of the user's that called dropjax."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith("dropjax."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_array(value: Any) -> TypeGuard[Array]:
    """Whether the value is an array of JAX or NumPy, or a NumPy number, or stands for one when traced."""
    return isinstance(value, Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_typed(key: Array) -> bool:
    """Whether a key is typed (`jax.random.key`) and not legacy (`jax.random.PRNGKey`)."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def is_known(value: Any) -> bool:
    """Whether the values of an array, or of a list of them, can be looked at here and now."""
    value = jnp.asarray(value) if hasattr(value, "__jax_array__") else value
    leaves = jax.tree.leaves(value)
    return not any(is_traced(leaf) or not getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def look_like_probabilities(values: Any, axis: int = -1) -> bool:
    """Whether known values are at least 0 and sum to 1 along an axis, as logits hardly ever do."""
    if not is_known(values):
        return False
    x = np.asarray(values)
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size or x.ndim < 1 or x.shape[axis] < 2:
        return False
    slack = 1e-3 + float(jnp.finfo(x.dtype).eps)  # each may have been rounded to its dtype
    x = x.astype(np.float64)
    return bool((x >= 0).all() and (np.abs(x.sum(axis) - 1) <= slack).all())


def is_symbolic(length: Any) -> bool:
    """Whether a length is unknown while tracing, as in an export with symbolic shapes."""
    return export.is_symbolic_dim(length)


def known_length(function: str, dimension: str, length: Any) -> None:
    """Raises where a length that decides the shape of a result, or of a part of it, is symbolic."""
    if is_symbolic(length):
        raise TypeError(
            f"{function}: the length of {dimension} must be known while tracing, got {length}. Export with a number "
            "there; other dimensions may be symbolic."
        )


def is_traced(value: Any) -> bool:
    """Whether the value is unknown while tracing (under jit, vmap, grad, scan)."""
    return isinstance(value, jax.core.Tracer)


def array(function: str, x: ArrayLike, *, real: bool = False, argument: str = "x") -> Array:
    """Returns x as an array of a float or complex dtype that dropout can be applied to."""
    name = f"{function}: {argument} must"
    numeric = is_array(x) and getattr(x.dtype, "kind", "") not in "OSUMm"
    typed = is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if typed or not (numeric or hasattr(x, "__jax_array__") or isinstance(x, complex | float | int)):
        remedy = "" if typed else " Convert it with jnp.asarray."
        raise TypeError(f"{name} be a float or complex array, got {describe(x)}.{remedy}")
    x = x if isinstance(x, Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} be a float or complex array, got {describe(x)}. Dropping scales what it keeps, which integers "
            "cannot hold: convert with x.astype(jnp.float32), or drop after the embedding."
        )
    if real and jnp.iscomplexobj(x):
        raise TypeError(f"{name} be a real float array, got {describe(x)}. Its real part is x.real.")
    if x.dtype.name in _WITHOUT_ZERO_OR_NAN:
        raise TypeError(f"{name} have a dtype with a zero and a NaN, got {describe(x)}. Use another float dtype.")
    return x


def mask(function: str, mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Returns a boolean mask that broadcasts against an array of `shape`."""
    if not is_array(mask) or mask.dtype != jnp.bool_:
        raise TypeError(f"{function}: mask must be a boolean array (True = kept), got {describe(mask)}.")
    return broadcasts(function, "mask", jnp.asarray(mask), shape)


def rate(
    function: str, value: Any, shape: tuple[int, ...], *, argument: str = "rate", range: str | None = None
) -> Rate:
    """Returns the rate: `Fixed` for a number, float32 of the rank of `shape` (or a scalar) for an array.

    Values that are known are checked, also under jit; a traced one is checked by the mathematics,
    which returns NaN where it is out of range.
    """
    range = range or _RANGES.get((function, argument), "[0, 1]")
    if hasattr(value, "__jax_array__"):
        value = jnp.asarray(value)
    number = isinstance(value, int | float | np.generic) and not isinstance(value, bool)
    if not number and not isinstance(value, np.ndarray | Array):
        raise TypeError(
            f"{function}: {argument} must be a number or a float array, got {describe(value)}. "
            "Convert lists with jnp.asarray."
        )
    if is_array(value) and not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{function}: {argument} must be a number or a float array, got {describe(value)}.")
    rates = None if number else broadcasts(function, argument, jnp.asarray(value), shape)
    known = not is_traced(value) and getattr(value, "is_fully_addressable", True)
    if known:
        _in_range(function, floats(value), argument, range)
    return Fixed(float(value)) if rates is None else rates.astype(jnp.float32)


def field(layer: str, function: str, argument: str, value: Any) -> None:
    """Checks the numbers and NumPy arrays that a layer is built with, in the range of its function's argument.

    Of JAX arrays it checks the dtype; their values are checked at the call, since reading them back
    is slow, and impossible while tracing.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", None) if is_array(value) or hasattr(value, "__jax_array__") else None
    if not number and (dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))):
        raise TypeError(
            f"{layer}: {argument} must be a number or a float array, got {describe(value)}. "
            "Convert lists with jnp.asarray."
        )
    if number or isinstance(value, np.generic | np.ndarray):
        _in_range(layer, floats(value), argument, _RANGES.get((function, argument), "[0, 1]"))


def of_layers(function: str, rate: Any) -> None:
    """Checks that a function that sets the rates of layers takes the path and the rate of one."""
    with contextlib.suppress(ValueError):  # of what has no signature
        try:
            inspect.signature(rate).bind("", 0.0)
        except TypeError:
            raise TypeError(
                f"{function}: rate must be a number, an array, or a function of two, (path, rate) -> rate, got "
                f"{describe(rate)}. Of a schedule pass schedule(step)."
            ) from None


def floats(value: Any) -> np.ndarray:
    """Returns known numbers in float64, infinite where an integer is beyond it."""
    try:
        return np.asarray(value, dtype=np.float64)
    except OverflowError:
        return np.asarray(np.inf if value > 0 else -np.inf)


def whole(function: str, rate: Rate, dims: Sequence[int], what: str) -> None:
    """A rate that differs within what is dropped as a whole would drop parts of it."""
    if not isinstance(rate, Fixed) and rate.ndim and any(rate.shape[d] != 1 for d in dims):
        raise ValueError(
            f"{function}: rate must be the same in {what}, of length 1 along dimensions {tuple(dims)} of x, got shape "
            f"{rate.shape}. A rate for each example has shape (batch{', 1' * (rate.ndim - 1)})."
        )


def _in_range(function: str, values: np.ndarray, argument: str, range: str) -> None:
    rounded = values.astype(np.float32)  # what is drawn with
    low, high = (float(end.strip("[]() ")) for end in range.split(","))
    good = (values >= low) & (rounded > low if range[0] == "(" else True)
    good &= (values <= high) & (rounded < high if range[-1] == ")" else True)
    if not good.all():
        wrong = float(values[~good].flat[0])
        hint = f" For a percentage, pass {wrong / 100:g}." if 1.5 < wrong <= 100 and high == 1 else ""
        if 0 < wrong <= 1 and function in ("gaussian_dropout", "GaussianDropout"):
            hint = " Its variance is infinite at 1."
        if wrong == 1 and function in ("token_dropout", "TokenDropout"):
            hint = " To keep only the prefix, pass num_keep=0."
        raise ValueError(f"{function}: {argument} must be in {range}, got {wrong}.{hint}")


def broadcasts(function: str, argument: str, value: Array, shape: tuple[int, ...]) -> Array:
    """Returns the value, if it broadcasts against `shape`, with that rank."""
    try:
        good = jnp.broadcast_shapes(value.shape, shape) == tuple(shape)
    except ValueError:
        good = False
    if not good:
        remedy = "" if value.ndim > len(shape) else " Add axes of length 1 until it does."
        raise ValueError(
            f"{function}: {argument} must broadcast against the shape {tuple(shape)} of x, got shape {value.shape}."
            + remedy
        )
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape) if value.ndim else value


def shape(function: str, value: Any) -> tuple[int, ...]:
    """Returns a shape as a tuple of Python integers."""
    try:
        given = (value,) if hasattr(value, "__index__") or is_symbolic(value) else value
        lengths = tuple(n if is_symbolic(n) else operator.index(n) for n in given)
    except TypeError:
        remedy = " Pass its shape." if is_array(value) else ""
        raise TypeError(f"{function}: shape must be a tuple of integers, got {describe(value)}.{remedy}") from None
    if any(n < 0 for n in lengths if not is_symbolic(n)):
        raise ValueError(f"{function}: shape must not be negative, got {lengths}.")
    return lengths


def integer(function: str, argument: str, value: Any, least: int) -> int:
    """Returns an integer option of at least `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{function}: {argument} must be an integer, got {describe(value)}.")
    if number < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {number}.")
    return number


def flag(function: str, argument: str, value: Any) -> bool:
    """Returns an option that is True or False: a string would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{function}: {argument} must be True or False, got {describe(value)}.")
    return bool(value)


def real(function: str, argument: str, value: Any, range: str | None = None) -> Array:
    """Returns a number or a float array that is differentiated as an array; known values are checked for a range."""
    value = jnp.asarray(value) if hasattr(value, "__jax_array__") else value
    number = isinstance(value, int | float | np.integer) and not isinstance(value, bool)
    if not number and not (is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)):
        raise TypeError(f"{function}: {argument} must be a number or a float array, got {describe(value)}.")
    if range and not is_traced(value) and getattr(value, "is_fully_addressable", True):
        _in_range(function, floats(value), argument, range)
    return jnp.asarray(float(floats(value)) if number else value)


def dim(function: str, argument: str, value: Any, rank: int) -> int:
    """Returns a dimension counted from the front."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{function}: {argument} must name dimensions by integers, got {describe(value)}.")
    number = operator.index(value)
    if not -rank <= number < rank:
        raise ValueError(f"{function}: {argument} must be in [{-rank}, {rank}) for rank {rank}, got {number}.")
    return number % rank


def dims(function: str, argument: str, values: Any, rank: int) -> tuple[int, ...]:
    """Returns dimensions counted from the front, sorted, each at most once."""
    values = (values,) if np.ndim(values) == 0 and hasattr(values, "__index__") else values
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{function}: {argument} must be a sequence of dimensions, got {describe(values)}.")
    found = [dim(function, argument, value, rank) for value in values]
    if len(set(found)) < len(found):
        raise ValueError(f"{function}: {argument} must name each dimension once, got {tuple(values)}.")
    return tuple(sorted(found))


def indices(function: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Returns integers whose shape begins that of x; known ones are checked not to be negative."""
    if not is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{function}: indices must be an integer array, got {describe(value)}.")
    if shape[: value.ndim] != tuple(value.shape) or value.ndim > len(shape):
        raise ValueError(
            f"{function}: indices must have the first dimensions of x, {tuple(shape)}, got shape {value.shape}."
        )
    if not is_traced(value) and getattr(value, "is_fully_addressable", True) and (np.asarray(value) < 0).any():
        raise ValueError(f"{function}: indices must not be negative, got {np.asarray(value).min()}.")
    return jnp.asarray(value)


def places(
    function: str, rank: int, channel_axis: Any, batch_axes: Any, *, argument: str = "channel_axis"
) -> list[int]:
    """The dimensions along which the places of one channel (or head) of one example lie."""
    channel = dim(function, argument, channel_axis, rank)
    batch = dims(function, "batch_axes", batch_axes, rank)
    if channel in batch:
        raise ValueError(
            f"{function}: {argument} must not be one of batch_axes, got {channel_axis} and {batch_axes}. "
            "For one example without a batch pass batch_axes=()."
        )
    return [d for d in range(rank) if d != channel and d not in batch]


def generator(function: str, name: str) -> None:
    """Checks the name of the generator of mask bits."""
    choice(function, "generator", name)


def choice(function: str, argument: str, value: Any, layer: str | None = None) -> None:
    """Checks an argument of a function, or the field of that name of a layer, that must be one of several words."""
    words = GENERATORS if argument == "generator" else _CHOICES[function, argument]
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{layer or function}: {argument} must be one of {words}, got {describe(value)}.")


def key(function: str, value: Any) -> Array:
    """Returns exactly one key, typed (`jax.random.key`) or legacy (`jax.random.PRNGKey`)."""
    dtype = value.dtype if is_array(value) else None
    typed = dtype is not None and is_typed(value)
    if typed and value.shape == ():
        return value
    legacy = dtype == np.uint32 and value.ndim >= 1 and value.shape[-1] in (1, 2, 4)
    if legacy and value.ndim == 1:
        return jnp.asarray(value)
    if typed or legacy:
        keys = value.shape if typed else value.shape[:-1]
        raise ValueError(
            f"{function}: key must be one key, got an array of keys of shape {keys}. "
            "Index it, or use jax.vmap to draw once for each key."
        )
    if dtype == np.uint32:
        raise ValueError(
            f"{function}: key must be one key of 1, 2 or 4 words, got {describe(value)}. "
            "Make one with jax.random.key(0)."
        )
    remedy = "" if is_array(value) else " Make one with jax.random.key(0)."
    remedy = " Call the stream for a key, rngs.dropout()." if "Rng" in type(value).__name__ else remedy
    raise TypeError(f"{function}: key must be a JAX random key, got {describe(value)}.{remedy}")


def of_all_processes(function: str, argument: str, value: Any, remedy: str) -> None:
    """Of several processes, each would take an array of its own for the whole: their results would drift apart."""
    if jax.process_count() > 1 and is_array(value) and value.ndim and getattr(value, "is_fully_addressable", True):
        raise ValueError(
            f"{function}: {argument} must lie on the devices of all processes, got {describe(value)} of this process "
            f"alone. Place it with {remedy}."
        )


@contextlib.contextmanager
def together(function: str) -> Iterator[None]:
    """Where one of several processes ends, the others fail in what they wait for: says what to do then."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not str(error).startswith(f"{function}: "):
            error.add_note(
                f"{function}: process {jax.process_index()} of {jax.process_count()} stopped here. If another one "
                "ended first, its output says why. Start all of them again: with checkpoint_dir they continue."
            )
        raise
