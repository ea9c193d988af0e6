"""What is computed once for all samples, and what for each."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jax import Array

from dropjax import _arguments, _checks
from dropjax.mc import hoisting, tracing

_MOVES = {
    "broadcast_in_dim", "iota", "reshape", "transpose", "slice", "squeeze", "expand_dims", "concatenate", "gather",
    "dynamic_slice", "dynamic_update_slice", "convert_element_type", "bitcast_convert_type", "copy", "copy_p", "pad",
    "rev", "split", "unstack", "random_wrap", "random_unwrap", "sharding_constraint", "reshard", "optimization_barrier",
    "pvary", "pcast", "stop_gradient", "debug_callback", "debug_print",
}  # fmt: skip


class Explanation(NamedTuple):
    """How one pass divides into what is computed once for all samples and what for each; `print` shows a table."""

    shared_flops: int
    """Floating point operations that are done once."""
    sampled_flops: int
    """Floating point operations that are done for each sample."""
    shared_equations: int
    """Equations that are run once, those inside opened calls counted one by one."""
    sampled_equations: int
    """Equations that are run for each sample."""
    table: str
    """The same as text, by primitive."""

    @property
    def share(self) -> float:
        """Share of the operations of one pass that is done once, in `[0, 1]`."""
        return self.shared_flops / max(self.shared_flops + self.sampled_flops, 1)

    def __str__(self) -> str:
        """The table."""
        return self.table


@_arguments.public
def explain(fn: Callable[[Array], Any], key: Array) -> Explanation:
    """Says how much of a stochastic function is computed once for all samples.

    Operations are counted from the shapes in the traced program, nothing is compiled or run: 2 m n k for a product,
    likewise for convolutions, one for each element that is computed elsewhere, none for moving data. Loops count
    as often as they are known to run (a while loop once), of branches the dearest counts.

    Args:
      fn: function of a key that returns a pytree of arrays, as for `sample`.
      key: one JAX key.

    Returns:
      `Explanation`.

    Raises:
      TypeError, ValueError: if fn is not a function or the key not a key.

    Example:
      >>> import dropjax
      >>> w = jnp.ones((256, 256))
      >>> head = lambda key: dropjax.dropout(key, jnp.ones((4, 256)) @ w, 0.5) @ w[:, :2]
      >>> explain(head, jax.random.key(0)).share > 0.5
      True
    """
    program, _, _ = tracing.trace("explain", fn, _checks.key("explain", key))
    shared, sampled = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    _count(program, shared, sampled)
    once, each = shared[0].total(), sampled[0].total()
    _checks.known_length("explain", "each dimension in fn", once + each)
    rows = sorted(shared[1].keys() | sampled[1].keys(), key=lambda name: -shared[0][name] - sampled[0][name])
    lines = [f"{'':<24}{'once':>10}{'FLOPs':>12}{'each':>10}{'FLOPs':>12}"]
    lines += [
        f"{name[:23]:<24}{shared[1][name]:>10}{shared[0][name]:>12.3g}{sampled[1][name]:>10}{sampled[0][name]:>12.3g}"
        for name in rows
    ]
    found = Explanation(once, each, shared[1].total(), sampled[1].total(), "")
    lines.append(f"{'all':<24}{found.shared_equations:>10}{once:>12.3g}{found.sampled_equations:>10}{each:>12.3g}")
    cost = (once + 100 * each) / max(once + each, 1)
    lines.append(f"{found.share:.1%} of a pass is computed once; 100 samples cost {cost:.3g} passes.")
    return found._replace(table="\n".join(lines))


def _count(program: hoisting.Program, shared: tuple[Counter, Counter], sampled: tuple[Counter, Counter]) -> None:
    for steps, (flops, numbers) in ((program.shared, shared), (program.sampled, sampled)):
        for step in steps:
            if step.body is None:
                flops[step.equation.primitive.name] += _flops(step.equation)
                numbers[step.equation.primitive.name] += 1
    for step in program.shared:
        if step.body is not None:
            _count(step.body, shared, sampled)


def _flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    results = sum(_size(v) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * results * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * results * math.prod(kernel) // max(kernel[params["dimension_numbers"].rhs_spec[0]], 1)
    if bodies := [_total(body.eqns) for body in hoisting.bodies(equation)]:
        if name == "cond":
            return max(bodies)
        times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
        return times * sum(bodies)
    if name in _MOVES:
        return 0
    if name.startswith(("reduce_", "arg", "cum", "sort")):
        return sum(_size(v) for v in equation.invars)
    return results


def _total(equations: Iterable[Any]) -> int:
    return sum(_flops(equation) for equation in equations)


def _size(v: Any) -> int:
    return math.prod(getattr(v.aval, "shape", ()))
