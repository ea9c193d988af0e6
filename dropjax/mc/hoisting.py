"""What does not depend on the key is computed once: a traced function, parted by its dependence.

An equation of the traced program is shared when no operand depends on the key. Calls that depend on it in part
(jit, checkpoint, custom_jvp, custom_vjp) are opened and parted in turn; a scan, a while, a cond and a shard_map
count as one. A reference that the function makes, and what uses it, is made for each sample.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

_PLAIN = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("checkpoint", "remat", "remat2")
_RULES = ("custom_jvp_call", "custom_vjp_call")
VIEWS = ("broadcast_in_dim", "iota")  # they compute nothing, and done again where they are used they fuse

Values = dict[Any, Any]


class Step(NamedTuple):
    """An equation, and for a call that is opened its body."""

    equation: Any
    body: "Program | None" = None


class Program:
    """A traced program in two parts, shared and sampled.

    Attributes:
      shared: the steps of the part that is computed once.
      sampled: the steps of the part that is computed for each sample; an opened call is in both.
      depends: for each argument, whether it depends on the key.
      varies: for each result, likewise.
    """

    def __init__(self, program: Any, depends: Sequence[bool], *, whole: bool) -> None:
        """Parts a program, given for each argument whether it depends on the key.

        If `whole`, the sampled part returns all results, else only those that vary.
        """
        self._program = program
        self.depends = list(depends)
        self.shared: list[Step] = []
        self.sampled: list[Step] = []
        self._varying = {v for v, of_key in zip(program.invars, depends, strict=True) if of_key}
        self._written: set[Any] = set()  # references that samples write: what is read later is theirs
        self._views: dict[Any, Any] = {}
        self._replayed: set[Any] = set()
        self._crossing: dict[Any, None] = {}  # shared values that samples need, in order
        for equation in program.eqns:
            self._part(equation)
        self.varies = [_is_variable(v) and v in self._varying for v in program.outvars]
        self._returned = [
            v if whole or of_key else None for v, of_key in zip(program.outvars, self.varies, strict=True)
        ]
        self._need(v for v in self._returned if v is not None)

    def _part(self, equation: Any) -> None:
        depends = [_is_variable(v) and (v in self._varying or v in self._written) for v in equation.invars]
        makes_reference = any(hasattr(v.aval, "inner_aval") for v in equation.outvars)  # samples may write to it
        if not any(depends) and not makes_reference:
            self.shared.append(Step(equation))
            if equation.primitive.name in VIEWS:
                self._views[equation.outvars[0]] = equation
            return
        references = {equation.invars[e.input_index] for e in equation.effects if hasattr(e, "input_index")}
        self._written |= references
        body = None if references else _open(equation, depends)
        step = Step(equation, body)
        with_rule = equation.primitive.name in _RULES
        if body is not None:
            self.shared.append(step)
        if body is None or with_rule:  # a derivative rule takes all operands
            self._need(equation.invars)
        varies = [True] * len(equation.outvars) if body is None or with_rule else body.varies
        self._varying |= {v for v, of_key in zip(equation.outvars, varies, strict=True) if of_key}
        self.sampled.append(step)

    def _need(self, operands: Iterable[Any]) -> None:
        for v in operands:
            if not _is_variable(v) or v in self._varying or v in self._replayed:
                continue
            if v in self._views:
                self._need(self._views[v].invars)
                self.sampled.append(Step(self._views[v]))
                self._replayed.add(v)
            else:
                self._crossing[v] = None

    def run_shared(self, consts: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], Any]:
        """Computes the shared part once.

        Args:
          consts: the program's constants.
          arguments: its arguments; those that depend on the key are not looked at.

        Returns:
          The results, None for those that vary, and what `run_sampled` needs.
        """
        values: Values = dict(zip(self._program.constvars, consts, strict=True))
        values |= {v: x for v, x in zip(self._program.invars, arguments, strict=True) if v not in self._varying}
        inner = []
        for step in self.shared:
            if step.body is None:
                values |= _run(step.equation, values)
                continue
            results, needed = _run_shared_call(
                step.equation, step.body, [_value(v, values) for v in step.equation.invars]
            )
            inner.append(needed)
            if step.equation.primitive.name not in _RULES:
                values |= {v: x for v, x in zip(step.equation.outvars, results, strict=True) if x is not None}
        results = [
            None if varies else _value(v, values) for v, varies in zip(self._program.outvars, self.varies, strict=True)
        ]
        return results, ([values[v] for v in self._crossing], inner)

    def run_sampled(self, arguments: Sequence[Any], needed: Any) -> list[Any]:
        """Computes the sampled part.

        Args:
          arguments: the program's arguments; those that do not depend on the key are not looked at.
          needed: what `run_shared` returned for it.

        Returns:
          The results; None for those that do not vary, unless the program is `whole`.
        """
        crossing, inner = needed[0], iter(needed[1])
        values: Values = dict(zip(self._crossing, crossing, strict=True))
        values |= {v: x for v, x in zip(self._program.invars, arguments, strict=True) if v in self._varying}
        for step in self.sampled:
            if step.body is None:
                values |= _run(step.equation, values)
                continue
            results = _run_sampled_call(
                step.equation, step.body, [_value(v, values) for v in step.equation.invars], next(inner)
            )
            values |= {v: x for v, x in zip(step.equation.outvars, results, strict=True) if x is not None}
        return [None if v is None else _value(v, values) for v in self._returned]


def part(fn: Callable[[Any], Any], key: Any) -> tuple[Program, Sequence[Any], Any]:
    """Traces a function of a key; returns its program in two parts, its constants, and the shapes of its result."""
    # A function of our own each time, since JAX remembers traces by function, and what fn closes over may have changed.
    traced, shapes = jax.make_jaxpr(lambda key: fn(key), return_shape=True)(key)
    return Program(traced.jaxpr, [True], whole=True), traced.consts, shapes


def _is_variable(v: Any) -> bool:
    return not isinstance(v, core.Literal)


def _value(v: Any, values: Mapping[Any, Any]) -> Any:
    """The value of an operand; None where it belongs to the other part."""
    return values.get(v) if _is_variable(v) else v.val


def _run(equation: Any, values: Mapping[Any, Any]) -> Values:
    """Runs one equation as it stands, with its context, derivative rules and effects."""
    operands = list(dict.fromkeys(v for v in equation.invars if _is_variable(v)))
    results = list(equation.outvars)
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    program = empty.replace(invars=operands, outvars=results, eqns=[equation], effects=equation.effects)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))
    return dict(zip(results, run(*[values[v] for v in operands]), strict=True))


def _open(equation: Any, depends: Sequence[bool]) -> Program | None:
    """The parted body of a call; None if it shares nothing, or if opening it would change what it means."""
    name, params = equation.primitive.name, equation.params
    if name in _PLAIN:
        opens = _says_nothing(params)
    elif name in _REMAT:
        opens = not params["differentiated"]
    else:
        opens = name in _RULES and not equation.effects
    if not opens:
        return None
    body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    program = Program(getattr(body, "jaxpr", body), depends, whole=name in _RULES)
    shares = any(step.equation.primitive.name not in VIEWS for step in program.shared)
    return program if shares or not all(program.varies) else None


def _says_nothing(params: Mapping[str, Any]) -> bool:
    """Whether a jit has no shardings, layouts, donated arguments or compiler options."""
    said = [*params.get("in_layouts", ()), *params.get("out_layouts", ())]
    shardings = [*params.get("in_shardings", ()), *params.get("out_shardings", ())]
    said += [s for s in shardings if type(s).__name__ != "UnspecifiedValue"]
    return not any(s is not None for s in said) and not any(
        [*params.get("donated_invars", ()), *params.get("compiler_options_kvs", ())]
    )


def _scope(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """The named scope around a call, which its body does not know of."""
    scope = str(equation.source_info.name_stack)
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def _run_shared_call(equation: Any, body: Program, operands: list[Any]) -> tuple[list[Any], Any]:
    closed = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
    consts = getattr(closed, "consts", ())
    with _scope(equation):
        if equation.primitive.name in _RULES:  # the rule differentiates, not the body
            return body.run_shared(consts, [lax.stop_gradient(x) for x in operands])
        if equation.primitive.name in _REMAT:
            return _checkpoint(equation)(lambda operands: body.run_shared(consts, operands))(operands)
        return body.run_shared(consts, operands)


def _run_sampled_call(equation: Any, body: Program, operands: list[Any], needed: Any) -> list[Any]:
    with _scope(equation):
        if equation.primitive.name in _RULES:
            return _with_rule(equation, body)(operands, needed)
        if equation.primitive.name in _REMAT:
            return _checkpoint(equation)(body.run_sampled)(operands, needed)
        return body.run_sampled(operands, needed)


def _checkpoint(equation: Any) -> Callable[[Callable], Callable]:
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    return lambda fn: jax.checkpoint(fn, **options)


def _with_rule(equation: Any, body: Program) -> Callable[[list[Any], Any], list[Any]]:
    """The sampled part of a function with a derivative rule; differentiated, that rule runs, whole."""

    def whole(*operands: Any) -> list[Any]:
        values = {v: x for v, x in zip(equation.invars, operands, strict=True) if _is_variable(v)}
        results = _run(equation, values)
        return [results[v] for v in equation.outvars]

    if equation.primitive.name == "custom_jvp_call":
        forward = jax.custom_jvp(body.run_sampled)
        forward.defjvp(lambda primals, tangents: jax.jvp(whole, tuple(primals[0]), tuple(tangents[0])))
        return forward

    def run(operands: list[Any], needed: Any) -> list[Any]:
        closed = operands[: equation.params["num_consts"]]  # closed over, for which there is no derivative

        def forward(operands: list[Any], needed: Any) -> Any:
            results, pull = jax.vjp(lambda *operands: whole(*closed, *operands), *operands)
            return _of_each(body, [*closed, *operands], results), pull

        def primal(operands: list[Any], needed: Any) -> list[Any]:
            return _of_each(body, [*closed, *operands], body.run_sampled([*closed, *operands], needed))

        backward = jax.custom_vjp(primal)
        backward.defvjp(forward, lambda pull, cotangents: (list(pull(cotangents)), None))
        return backward(operands[len(closed) :], needed)

    return run


def _of_each(body: Program, operands: list[Any], results: list[Any]) -> list[Any]:
    """The same results, each of which depends on the key.

    Where vmap sees one that does not, it hands the rule the sum of its cotangents, once for each sample.
    """
    of_key = next(x for x, depends in zip(operands, body.depends, strict=True) if depends)
    data = jax.random.key_data(of_key) if jnp.issubdtype(of_key.dtype, jax.dtypes.prng_key) else of_key
    which = (data.reshape(-1)[:1] != 0).any()
    return [
        lax.select_n(jnp.broadcast_to(which, jnp.shape(x)), x, x)
        if not varies and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        else x
        for x, varies in zip(results, body.varies, strict=True)
    ]


def loops(program: Program) -> bool:
    """Whether samples draw from keys of a kind for which vmap does not draw what a loop draws (rbg, unsafe_rbg)."""
    return any(_draws_in_blocks(step.equation) for step in program.sampled)


def _draws_in_blocks(equation: Any) -> bool:
    name = equation.primitive.name
    if name == "rng_bit_generator":
        return True
    if name.startswith("random_") and name not in ("random_wrap", "random_unwrap", "random_seed", "random_clone"):
        dtypes = [str(getattr(v.aval, "dtype", "")) for v in equation.invars]
        return any(dtype.startswith("key<") and dtype != "key<fry>" for dtype in dtypes)
    return any(_draws_in_blocks(inner) for body in bodies(equation) for inner in body.eqns)


def bodies(equation: Any) -> list[Any]:
    """The programs that an equation holds."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, core.ClosedJaxpr | core.Jaxpr):
                found.append(getattr(each, "jaxpr", each))
    return found
