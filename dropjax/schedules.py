"""Dropout rates as functions of the step, and rates over the depth of a network.

A schedule is a function from a step, a number or a traced integer, to a rate, a float32 scalar: what optax calls
a schedule. So optax's own serve as well, and optax's `join_schedules` joins these. A rate that is an array
never recompiles: compute it inside the jitted step, `dropout(key, x, schedule(step))`. Steps are counted in
float32, to the step up to 2^24.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dropjax import _arguments, _checks

__all__ = ["Schedule", "constant", "cosine", "curriculum", "depth", "early", "late", "linear"]

Schedule = Callable[[ArrayLike], Array]
"""From a step to a rate, float32 `[]`; the step may be traced."""


@_arguments.public
def constant(rate: float) -> Schedule:
    """The same rate at every step.

    Args:
      rate: in `[0, 1]`.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> float(constant(0.5)(100))
      0.5
    """
    _rate("constant", "rate", rate)
    return _Formula(_constant, (rate,))


@_arguments.public
def linear(start: float, end: float, steps: int, *, begin: int = 0) -> Schedule:
    """From one rate to another on a straight line: start before `begin`, end from `begin + steps` on.

    Args:
      start: the first rate, in `[0, 1]`.
      end: the last rate, in `[0, 1]`.
      steps: how many steps the change takes, at least 1.
      begin: the step at which it begins.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> [float(linear(0.0, 0.5, 4)(step)) for step in (0, 1, 4, 9)]
      [0.0, 0.125, 0.5, 0.5]
    """
    return _Formula(_linear, _between("linear", start, end, steps, begin))


@_arguments.public
def cosine(start: float, end: float, steps: int, *, begin: int = 0) -> Schedule:
    """From one rate to another on half a cosine, slow at both ends.

    rate = end + (start - end) (1 + cos(π progress)) / 2, with progress from 0 at `begin` to 1 at `begin + steps`.

    Args:
      start: the first rate, in `[0, 1]`.
      end: the last rate, in `[0, 1]`.
      steps: how many steps the change takes, at least 1.
      begin: the step at which it begins.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> [round(float(cosine(0.5, 0.0, 4)(step)), 4) for step in (0, 2, 4)]
      [0.5, 0.25, 0.0]
    """
    return _Formula(_cosine, _between("cosine", start, end, steps, begin))


@_arguments.public
def early(rate: float, steps: int, *, decay: bool = False) -> Schedule:
    """Dropout in the first steps only, which helps networks that underfit.

    Args:
      rate: in `[0, 1]`.
      steps: how many steps have dropout, at least 1.
      decay: whether the rate falls to 0 on a straight line over these steps, instead of at their end.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> [float(early(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.5, 0.5, 0.0]

    Reference:
      Liu, Xu, Jin, Shen, Darrell, [Dropout reduces underfitting](https://arxiv.org/abs/2303.01500), 2023.
    """
    _rate("early", "rate", rate)
    steps = _steps("early", "steps", steps, 1)
    if decay:
        return linear(rate, 0.0, steps)
    return _Formula(_step, (rate, 0.0, steps))


@_arguments.public
def late(rate: float, steps: int) -> Schedule:
    """No dropout in the first steps, then a constant rate.

    Args:
      rate: in `[0, 1]`.
      steps: how many steps have none, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> [float(late(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.0, 0.0, 0.5]

    Reference:
      Liu, Xu, Jin, Shen, Darrell, [Dropout reduces underfitting](https://arxiv.org/abs/2303.01500), 2023.
    """
    _rate("late", "rate", rate)
    steps = _steps("late", "steps", steps, 1)
    return _Formula(_step, (0.0, rate, steps))


@_arguments.public
def curriculum(rate: float, gamma: float) -> Schedule:
    """From no dropout towards a rate, exponentially: first the easy task, then the noisy one.

    rate(step) = rate (1 - exp(-gamma step)). The paper takes gamma = 10 / (number of steps).

    Args:
      rate: the rate that is approached, in `[0, 1]`.
      gamma: speed per step, above 0.

    Returns:
      A schedule.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> [round(float(curriculum(0.5, 0.01)(step)), 3) for step in (0, 100, 1000)]
      [0.0, 0.316, 0.5]

    Reference:
      Morerio, Cavazza, Volpi, Vidal, Murino, [Curriculum dropout](https://arxiv.org/abs/1703.06229), 2017.
    """
    _rate("curriculum", "rate", rate)
    limits = np.finfo(np.float32)
    number = isinstance(gamma, int | float | np.number) and not isinstance(gamma, bool)
    if not number or not limits.tiny <= _checks.floats(gamma) <= limits.max:
        raise ValueError(f"curriculum: gamma must be a float32 number above 0, got {_checks.describe(gamma)}.")
    return _Formula(_curriculum, (rate, gamma))


@_arguments.public
def depth(rate: float, blocks: int | Sequence[int], *, mode: str = "linear") -> np.ndarray:
    """The rate of each block of a deep network, from 0 in the first to `rate` in the last.

    Linear: rate l / (L - 1) for block l of L, counted from 0, as in timm's vision transformers; the paper has
    (l + 1) / L, which is `depth(rate, L + 1)[1:]`, and torchvision's EfficientNet l / L, `depth(rate, L + 1)[:-1]`.
    Stagewise: the same rate in all blocks of a stage, linear over stages. One block or stage alone has 0.

    Args:
      rate: of the last block, in `[0, 1]`.
      blocks: how many there are, or how many each stage has; each at least 1.
      mode: `"linear"` over all blocks, or `"stagewise"`.

    Returns:
      float32 `[number of blocks]`, in NumPy: numbers for layers, or an array to scan over.

    Raises:
      TypeError, ValueError: if an argument is not as said above.

    Example:
      >>> depth(0.2, 3).tolist()
      [0.0, 0.10000000149011612, 0.20000000298023224]
      >>> depth(0.2, (2, 1), mode="stagewise").tolist()
      [0.0, 0.0, 0.20000000298023224]

    Reference:
      Huang, Sun, Liu, Sedra, Weinberger, [Deep networks with stochastic
      depth](https://arxiv.org/abs/1603.09382), 2016.
    """
    _rate("depth", "rate", rate)
    stages = blocks if isinstance(blocks, Sequence | np.ndarray) else (blocks,)
    sizes = [_checks.integer("depth", "blocks", size, 1) for size in stages]
    if mode not in ("linear", "stagewise"):
        raise ValueError(f"depth: mode must be 'linear' or 'stagewise', got {_checks.describe(mode)}.")
    if mode == "stagewise":
        return np.repeat(np.linspace(0, rate, len(sizes), dtype=np.float32), sizes)
    return np.linspace(0, rate, sum(sizes), dtype=np.float32)


def _rate(function: str, argument: str, value: float) -> None:
    if not isinstance(value, int | float | np.number):
        raise TypeError(f"{function}: {argument} must be a number, got {_checks.describe(value)}.")
    _checks.rate(function, value, (), argument=argument)


def _between(function: str, start: float, end: float, steps: int, begin: int) -> tuple[float, float, int, int]:
    """Returns the checked numbers of a change from one rate to another."""
    _rate(function, "start", start)
    _rate(function, "end", end)
    return start, end, _steps(function, "steps", steps, 1), _steps(function, "begin", begin, 0)


def _steps(function: str, argument: str, value: int, least: int) -> int:
    """Returns a checked number of steps."""
    steps = _checks.integer(function, argument, value, least)
    if steps >= 2**63:
        raise ValueError(f"{function}: {argument} must be below 2^63, got {_checks.describe(steps)}.")
    return steps


@dataclasses.dataclass(frozen=True)
class _Formula:
    """A schedule as a value, which pickles, hashes and compares: a function of a step and of fixed numbers."""

    function: Callable[..., Array]
    numbers: tuple[Any, ...]

    def __call__(self, step: ArrayLike) -> Array:
        """Returns the rate at a step."""
        if not _is_real(step):
            raise TypeError(f"schedule: step must be a number or a real array, got {_checks.describe(step)}.")
        return self.function(step, *self.numbers)


def _is_real(step: Any) -> bool:
    if _checks.is_array(step):
        return jnp.issubdtype(step.dtype, jnp.floating) or jnp.issubdtype(step.dtype, jnp.integer)
    return isinstance(step, int | float | list | tuple) or hasattr(step, "__jax_array__")


def _constant(step: ArrayLike, rate: float) -> Array:
    return jnp.full(jnp.shape(step), rate, jnp.float32)


def _linear(step: ArrayLike, start: float, end: float, steps: int, begin: int) -> Array:
    rate = np.float32(start) + np.float32(end - start) * _progress(step, steps, begin)
    return jnp.clip(rate, np.float32(min(start, end)), np.float32(max(start, end)))


def _cosine(step: ArrayLike, start: float, end: float, steps: int, begin: int) -> Array:
    angle = np.float32(np.pi) * _progress(step, steps, begin)
    rate = np.float32(end) + np.float32(start - end) * (1 + jnp.cos(angle)) / 2
    return jnp.clip(rate, np.float32(min(start, end)), np.float32(max(start, end)))


def _step(step: ArrayLike, before: float, after: float, steps: int) -> Array:
    return jnp.where(_count(step) < np.float32(steps), np.float32(before), np.float32(after))


def _curriculum(step: ArrayLike, rate: float, gamma: float) -> Array:
    return np.float32(rate) * -jnp.expm1(np.float32(-gamma) * jnp.maximum(_count(step), 0))


def _progress(step: ArrayLike, steps: int, begin: int) -> Array:
    return jnp.clip((_count(step) - np.float32(begin)) / np.float32(steps), 0, 1)


def _count(step: ArrayLike) -> Array:
    """The step in float32: a difference of unsigned or narrow integers would wrap."""
    return jnp.asarray(step, jnp.float32)
