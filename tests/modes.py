"""The whole package in rows, for JAX's own ways of looking: `python -m tests.modes MODE RESULTS` runs all in one.

A row is a name and a callable without arguments, of one tiny shape; it returns a pytree of arrays, the gradients too.
"""

import pickle
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dropjax
import dropjax.linen
import dropjax.nnx
from dropjax import constraints, schedules
from tests.variants import VARIANTS

MODES = {
    "plain": {},
    "debug_nans": {"jax_debug_nans": True},
    "debug_nans and disable_jit": {"jax_debug_nans": True, "jax_disable_jit": True},
    "checking_leaks": {"jax_check_tracer_leaks": True},
    "enable_checks": {"jax_enable_checks": True},
    "debug_key_reuse": {"jax_debug_key_reuse": True},
    "enable_x64": {"jax_enable_x64": True},
    "strict promotion": {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
}
SHAPE = (2, 3, 4)
RATE = 0.3


def inputs(shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def f32(values):
    return jnp.asarray(np.array(values, np.float32))


def key():
    return jax.random.key(20)


def trained(f, *args):
    """What a function returns, and its gradients by all arguments."""

    def loss(*args):
        y = f(*args)
        floats = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        weights = [np.cos(np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype) for leaf in floats]
        return sum((leaf * w).sum() for leaf, w in zip(floats, weights, strict=True)), y

    return jax.grad(loss, argnums=tuple(range(len(args))), has_aux=True)(*args)


def array_rate(variant):
    """The largest array that may be a rate, from 0 to 1, or to 1/2 where 1 is an error."""
    whole = variant.whole_rate or (5, 4, 6)
    shape = [1 if length == 1 else n for length, n in zip(whole, SHAPE, strict=True)]
    highest = 0.5 if "rate_one" in variant.not_for else 1
    return jnp.asarray(np.linspace(0, highest, int(np.prod(shape)), dtype=np.float32).reshape(shape))


def of_variants():
    for name, row in VARIANTS.items():
        for kind, rate in {"": lambda _: RATE, ", rates in an array": array_rate}.items():
            yield (
                f"{name}{kind}",
                lambda row=row, rate=rate: trained(
                    lambda x: row.function(key(), x, rate(row), **row.options), inputs()
                ),
            )


def of_others():
    """What `tests/variants.py` has no row for: OTHERS."""
    x, kernel, nodes = inputs, lambda: inputs((4, 2)), np.array([0, 1, 2], np.int32)
    params = lambda: {"w": inputs((4, 2)), "b": f32([1, 1])}  # noqa: E731
    masks = np.array([[True, False, True, True], [True, True, False, True]])
    yield "keep_mask", lambda: dropjax.keep_mask(key(), SHAPE, RATE)
    yield "keep_mask, rates in an array", lambda: dropjax.keep_mask(key(), SHAPE, inputs() ** 2 % 1)
    yield "apply_mask", lambda: trained(lambda x: dropjax.apply_mask(x, x > 0, RATE), x())
    for rate in (0.0, 0.5, 1.0):
        yield (
            f"apply_mask, rate {rate} in an array",
            lambda rate=rate: trained(
                lambda x: dropjax.apply_mask(x.at[0, 0].set(jnp.inf), x > 0, jnp.float32(rate)), x()
            ),
        )
    yield "dropout, threefry", lambda: trained(lambda x: dropjax.dropout(key(), x, RATE, generator="threefry"), x())
    yield (
        "dropout, threefry, rate in an array",
        lambda: trained(lambda x: dropjax.dropout(key(), x, jnp.float32(RATE), generator="threefry"), x()),
    )
    yield "dropout of infinities", lambda: dropjax.dropout(key(), jnp.full(SHAPE, jnp.inf, jnp.float32), jnp.float32(1))
    yield "token_dropout", lambda: trained(lambda x: dropjax.token_dropout(key(), x, 0.5), x())
    yield "standout", lambda: trained(lambda x, z: dropjax.standout(key(), x, z), x(), x())
    yield (
        "standout of infinite logits",
        lambda: trained(lambda x, a: dropjax.standout(key(), x, f32([np.inf] * 4), alpha=a), x(), jnp.float32(0)),
    )
    yield (
        "standout_expectation",
        lambda: trained(lambda x, z, a, b: dropjax.standout_expectation(x, z, alpha=a, beta=b), x(), x(), *half(2)),
    )
    yield (
        "standout_expectation of infinite logits",
        lambda: trained(
            lambda x, z, a: dropjax.standout_expectation(x, z, alpha=a), x(), f32([-np.inf, np.inf, 0, 1]), half()
        ),
    )
    for kind, rate in {"": RATE, ", rate in an array": np.full(3, RATE, np.float32)}.items():
        yield (
            f"drop_edge{kind}",
            lambda rate=rate: dropjax.drop_edge(key(), nodes, nodes[::-1], jnp.asarray(rate), undirected=True),
        )
    yield "drop_node", lambda: dropjax.drop_node(key(), 3, nodes, nodes[::-1], RATE)
    for kind, rate in {"": RATE, ", rate in an array": np.float32(RATE)}.items():
        for seed in (0, 1, 2):
            yield (
                f"layer_drop{kind}, key {seed}",
                lambda rate=rate, seed=seed: trained(
                    lambda x: dropjax.layer_drop(jax.random.key(seed), lambda x: 2 * x, x, jnp.asarray(rate)), x()
                ),
            )
    yield (
        "layer_drop, vmapped",
        lambda: trained(
            lambda x: jax.vmap(lambda key: dropjax.layer_drop(key, jnp.sin, x, 0.5))(jax.random.split(key())), x()
        ),
    )
    yield "weight_drop", lambda: trained(lambda p: dropjax.weight_drop(key(), p, RATE, names="w"), params())
    yield "masksembles_masks", lambda: dropjax.masksembles_masks(key(), 4, 2, 1.5)
    yield "masksembles", lambda: trained(lambda x: dropjax.masksembles(x, masks), x())
    yield (
        "masksembles, members traced",
        lambda: trained(lambda x: jax.jit(dropjax.masksembles)(x, masks, members=jnp.array([1, 0])), x()),
    )
    yield (
        "masksembles_samples",
        lambda: trained(lambda x: dropjax.masksembles_samples(lambda x: dropjax.masksembles(x, masks), x, 2), x()),
    )
    yield (
        "multi_sample_dropout",
        lambda: trained(lambda x: dropjax.multi_sample_dropout(key(), jnp.sin, x, RATE, num_samples=2), x()),
    )
    yield (
        "r_drop",
        lambda: trained(lambda x: dropjax.r_drop(lambda key: dropjax.dropout(key, x, RATE), key()), x()),
    )
    yield "symmetric_kl", lambda: trained(dropjax.symmetric_kl, x(), 2 * x())
    yield (
        "symmetric_kl of probabilities",
        lambda: trained(lambda p, q: dropjax.symmetric_kl(p, q, logits=False), f32([0, 0.5, 0.5]), f32([0, 1.0, 0])),
    )
    low = lambda: f32([[-np.inf, 0, 1], [0, -np.inf, 3e38]])  # noqa: E731
    yield "symmetric_kl of infinite logits", lambda: trained(dropjax.symmetric_kl, low(), low()[:, ::-1])
    for kind, value in {"": 0.2, " of extremes": np.array([-np.inf, np.inf, 0, 90], np.float32)}.items():
        yield (
            f"concrete_dropout{kind}",
            lambda value=value: trained(lambda x, p: dropjax.concrete_dropout(key(), x, p), x(), jnp.float32(value)),
        )
        yield (
            f"concrete_dropout_kl{kind}",
            lambda value=value: trained(dropjax.concrete_dropout_kl, jnp.float32(value), kernel()),
        )
    yield (
        "concrete_dropout, temperature in an array",
        lambda: trained(lambda x: dropjax.concrete_dropout(key(), x, 0.1, temperature=half()), x()),
    )
    yield (
        "variational_gaussian_dropout",
        lambda: trained(lambda x, a: dropjax.variational_gaussian_dropout(key(), x, a), x(), f32([-np.inf, -2, 0, 1])),
    )
    for name in ("sigmoid", "cubic"):
        yield (
            f"variational_dropout_kl, {name}",
            lambda name=name: trained(
                lambda a: dropjax.variational_dropout_kl(a, approximation=name), f32([-90.0, -2, 0])
            ),
        )
    yield (
        "variational_dropout_kl of extremes",
        lambda: trained(dropjax.variational_dropout_kl, f32([-np.inf, np.inf, 3e38])),
    )
    yield (
        "local_reparametrization",
        lambda: trained(lambda x, v: dropjax.local_reparametrization(key(), x, v), x(), f32([0, 1e-30, 1, 1e30])),
    )
    for function, values in {
        dropjax.variational_dense: [-2.0, np.array([[200], [-np.inf], [0], [10]], np.float32)],
        dropjax.sparse_variational_dense: [-9.0, np.array([[-np.inf], [-90], [0], [10]], np.float32)],
    }.items():
        for value in values:
            yield (
                f"{function.__name__}{' of extremes' if np.ndim(value) else ''}",
                lambda function=function, value=value: trained(
                    lambda x, w, a: function(key(), x, w, a),
                    x().at[0, 0].set(0).at[1, 0].set(1e10),
                    kernel().at[0].set(0),
                    jnp.float32(value),
                ),
            )
    for function in (dropjax.sparse_log_alpha, dropjax.sparse_kernel, dropjax.sparsity):
        yield (
            function.__name__,
            lambda function=function: trained(function, kernel().at[0].set(0), f32([[-3.0]] * 4)),
        )


def half(number=None):
    return jnp.float32(0.5) if number is None else [jnp.float32(0.5)] * number


def of_constraints_and_schedules():
    for name, value in {"clip_norm": 0.5, "clip_norm, no bound": np.inf, "clip_norm, bound in an array": None}.items():
        yield (
            name,
            lambda value=value: trained(
                lambda w: constraints.clip_norm(w, half() if value is None else value, axis=0),
                inputs((4, 3)).at[:, 0].set(0),
            ),
        )

    def max_norm():
        transform, params = constraints.max_norm(0.5, axis=0), {"kernel": inputs((4, 3)).at[:, 0].set(0)}
        return transform.update(params, transform.init(params), params)[0]

    yield "max_norm", max_norm
    for name, schedule in {
        "constant": schedules.constant(0.5),
        "linear": schedules.linear(0.0, 0.5, 4),
        "cosine": schedules.cosine(0.5, 0.0, 4),
        "early": schedules.early(0.5, 4),
        "early, decay": schedules.early(0.5, 4, decay=True),
        "late": schedules.late(0.5, 4),
        "curriculum": schedules.curriculum(0.5, 0.1),
    }.items():
        yield f"schedules.{name}", lambda schedule=schedule: [schedule(3), schedule(jnp.uint32(3))]
        yield (
            f"schedules.{name} and dropout",
            lambda schedule=schedule: trained(lambda x: dropjax.dropout(key(), x, schedule(jnp.int32(3))), inputs()),
        )
    yield "schedules.depth", lambda: jnp.asarray(schedules.depth(0.5, (2, 1), mode="stagewise"))


def of_layers():
    """Every layer of both frameworks, in training and in evaluation."""
    layers = {f"{row.layer} of {name}": (row.layer, (RATE,), row.options) for name, row in VARIANTS.items()}
    layers |= {"Dropout, rates in an array": ("Dropout", None, VARIANTS["dropout"])}
    layers |= {"ConcreteDropout": ("ConcreteDropout", (), {"shape": 4})}
    layers |= {"VariationalGaussianDropout": ("VariationalGaussianDropout", (), {"shape": 4})}
    layers |= {"TokenDropout": ("TokenDropout", (0.5,), {})}
    shapes = {f"SpatialDropout{n}D": (2, *[2] * n, 3) for n in (1, 2, 3)}
    layers |= {name: (name, (RATE,), {}) for name in shapes}
    for name, (layer, args, options) in layers.items():
        if args is None:
            args, options = (lambda row=options: (array_rate(row),)), options.options
        for evaluation in (False, True):
            yield (
                f"linen.{name}{', evaluation' * evaluation}",
                lambda layer=layer, args=args, options=options, evaluation=evaluation: of_linen(
                    lambda: getattr(dropjax.linen, layer)(*(args() if callable(args) else args), **options),
                    inputs(shapes.get(layer, SHAPE)),
                    deterministic=evaluation,
                ),
            )
            yield (
                f"nnx.{name}{', evaluation' * evaluation}",
                lambda layer=layer, args=args, options=options, evaluation=evaluation: of_nnx(
                    lambda rngs: getattr(dropjax.nnx, layer)(
                        *(args() if callable(args) else args), **options, rngs=rngs
                    ),
                    inputs(shapes.get(layer, SHAPE)),
                    deterministic=evaluation,
                ),
            )
    for evaluation in (False, True):
        for name, (linen, flax_nnx, args) in {
            "Standout": (dropjax.linen.Standout, lambda rngs: dropjax.nnx.Standout(rngs=rngs), [inputs(SHAPE)]),
            "VariationalDense": (
                lambda: dropjax.linen.VariationalDense(3, per="unit"),
                lambda rngs: dropjax.nnx.VariationalDense(4, 3, per="unit", rngs=rngs),
                [],
            ),
            "SparseVariationalDense": (
                lambda: dropjax.linen.SparseVariationalDense(3),
                lambda rngs: dropjax.nnx.SparseVariationalDense(4, 3, rngs=rngs),
                [],
            ),
            "DropConnectDense": (
                lambda: dropjax.linen.DropConnectDense(3, RATE),
                lambda rngs: dropjax.nnx.DropConnectDense(4, 3, RATE, rngs=rngs),
                [],
            ),
            "LayerDrop": (
                lambda: dropjax.linen.LayerDrop(nn.Dense(4), RATE),
                lambda rngs: dropjax.nnx.LayerDrop(nnx.Linear(4, 4, rngs=rngs), RATE, rngs=rngs),
                [],
            ),
            "LayerDrop that leaves out": (
                lambda: dropjax.linen.LayerDrop(nn.BatchNorm(use_running_average=False), jnp.float32(0.99)),
                lambda rngs: dropjax.nnx.LayerDrop(nnx.BatchNorm(4, rngs=rngs), jnp.float32(0.99), rngs=rngs),
                [],
            ),
            "WeightDrop": (
                lambda: dropjax.linen.WeightDrop(nn.Dense(3), RATE, names="kernel"),
                lambda rngs: dropjax.nnx.WeightDrop(nnx.Linear(4, 3, rngs=rngs), RATE, names="kernel", rngs=rngs),
                [],
            ),
        }.items():
            yield (
                f"linen.{name}{', evaluation' * evaluation}",
                lambda linen=linen, args=args, evaluation=evaluation: of_linen(
                    linen, inputs(), *args, deterministic=evaluation
                ),
            )
            yield (
                f"nnx.{name}{', evaluation' * evaluation}",
                lambda flax_nnx=flax_nnx, args=args, evaluation=evaluation: of_nnx(
                    flax_nnx, inputs(), *args, deterministic=evaluation
                ),
            )
    yield "linen.Masksembles", lambda: of_linen(lambda: dropjax.linen.Masksembles(2, 1.5), inputs())
    yield "nnx.Masksembles", lambda: of_nnx(lambda rngs: dropjax.nnx.Masksembles(4, 2, 1.5, rngs=rngs), inputs())


def of_linen(make, x, *args, **options):
    layer = make()
    variables = layer.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x, *args, **options)
    params = variables.pop("params", {})

    def run(params, x):
        rngs = {"dropout": jax.random.key(3)}
        return layer.apply(
            {"params": params, **variables}, x, *args, rngs=rngs, mutable=["losses", "batch_stats"], **options
        )

    return run(params, x) if options.get("deterministic") else trained(run, params, x)


def of_nnx(make, x, *args, **options):
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def run(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x, *args, **options)

    return run(params, x) if options.get("deterministic") else trained(run, params, x)


def table():
    from tests import mc_rows, metric_rows  # which make arrays: in the mode

    rows = [*of_variants(), *of_others(), *of_constraints_and_schedules(), *of_layers()]
    return [*rows, *mc_rows.ROWS, *metric_rows.ROWS]


def run(mode):
    """What each row gives in a mode: its arrays, or its error."""
    for flag, value in MODES[mode].items():
        jax.config.update(flag, value)
    results = {}
    for name, row in table():
        try:
            results[name] = [np.asarray(leaf) for leaf in jax.tree.leaves(row())]
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


if __name__ == "__main__":
    results = run(sys.argv[1])
    with open(sys.argv[2], "wb") as file:
        pickle.dump(results, file)
