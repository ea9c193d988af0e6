"""One network, one key, many ways of spreading it over devices: the masks are those of one device, bit for bit.

Eight virtual CPU devices run one training step of a small transformer as a single device would, and data, tensor,
sequence and pipeline parallel, with parameters sharded (FSDP) and under pmap. This compares the masks that were
drawn, the outputs and the gradients, prints checksums, and draws which device drew which part of a mask:

    pip install '.[examples]'
    python examples/multi_device.py
"""

import argparse
import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropjax

LAYERS, BATCH, SEQUENCE, WIDTH, HEADS, HIDDEN = 4, 8, 8, 16, 8, 32
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#A89A00"  # after Okabe and Ito
RATE, MICROBATCHES = 0.3, 4
KINDS = "attention", "hidden", "residual"  # [batch, heads, sequence, sequence] and twice [batch, sequence, units]
Params = dict[str, Any]
Masks = dict[str, Any]


class Place(NamedTuple):
    """Which piece of the activations a device holds, and how the pieces travel into and out of a layer."""

    cuts: dict[str, dict[int | None, str]]
    """`sharded_dims` of each kind of activation"""
    start: Mapping[int, Array] | None = None
    enter: Callable[[Array], Array] = lambda x: x
    leave: Callable[[Array], Array] = lambda x: x


class Step(NamedTuple):
    """The masks `[layers, ...]` of one training step, its output `[batch, sequence, width]`, and its gradients."""

    masks: Any
    output: Any
    gradients: Any


WHOLE = Place({kind: {} for kind in KINDS})
DATA = Place({kind: {0: "data"} for kind in KINDS})
# Heads and hidden units are cut. After the psum every device holds the whole residual stream, and must drop alike.
HEADWISE: dict[str, dict[int | None, str]] = {"attention": {1: "model"}, "hidden": {2: "model"}, "residual": {}}
TENSOR = Place(HEADWISE, leave=lambda x: lax.psum(x, "model"))
TOKENS = Place(
    HEADWISE | {"residual": {1: "model"}},
    enter=lambda x: lax.all_gather(x, "model", axis=1, tiled=True),
    leave=lambda x: lax.psum_scatter(x, "model", scatter_dimension=1, tiled=True),
)
BOTH = Place({kind: cut | {0: "data"} for kind, cut in HEADWISE.items()}, leave=TENSOR.leave)


def layer(weights: Params, keys: Array, x: Array, place: Place) -> tuple[Array, Masks]:
    """Causal attention and a feed-forward block side by side, of which a device computes its heads and units."""
    masks = {}

    def drop(kind: str, x: Array) -> Array:
        drawn = functools.partial(dropjax.dropout, start=place.start, sharded_dims=place.cuts[kind])
        # Dropout is linear in x: its derivative is its mask, of which the network itself has no need.
        y, slope = jax.jvp(lambda x: drawn(keys[KINDS.index(kind)], x, RATE), (x,), (jnp.ones_like(x),))
        masks[kind] = slope != 0
        return y

    seen = place.enter(x)
    q, k, v = jnp.einsum("bsw,cwhd->cbhsd", seen, weights["qkv"])
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k)
    scores = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones_like(scores)) > 0, scores, -jnp.inf))
    heads = jnp.einsum("bhqk,bhkd->bqhd", drop("attention", scores), v)
    units = drop("hidden", jax.nn.gelu(seen @ weights["up"]))
    part = jnp.einsum("bqhd,hdw->bqw", heads, weights["out"]) + units @ weights["down"]
    return x + drop("residual", place.leave(part)), masks


def network(params: Params, keys: Array, x: Array, place: Place) -> tuple[Array, Masks]:
    """All layers, or those of one stage."""
    return lax.scan(lambda x, of: layer(*of, x, place), x, (params, keys))


def pipeline(params: Params, keys: Array, batches: Array, place: Place) -> tuple[Array, Masks]:
    """One stage: at tick t it takes microbatch t - stage from the stage before it."""
    stage, stages = lax.axis_index("stage"), lax.axis_size("stage")
    count, rows = batches.shape[0], batches.shape[1] * lax.axis_size("data")

    def tick(x: Array, t: Array) -> tuple[Array, tuple[Array, Masks]]:
        number = jnp.clip(t - stage, 0, count - 1)  # clipped in the bubble, whose results nobody reads
        here = place._replace(start={0: number * rows})
        y, masks = network(params, keys, jnp.where(stage == 0, batches[number], x), here)
        return lax.ppermute(y, "stage", [(i, i + 1) for i in range(stages - 1)]), (y, masks)

    empty = lax.pcast(jnp.zeros_like(batches[0]), "stage", to="varying")
    ticks = lax.scan(tick, empty, jnp.arange(count + stages - 1))[1]
    y, masks = jax.tree.map(lambda of: lax.dynamic_slice_in_dim(of, stage, count), ticks)
    y = lax.psum(jnp.where(stage == stages - 1, y, 0), "stage")
    return y, {kind: mask.swapaxes(0, 1) for kind, mask in masks.items()}


def step(network: Callable, params: Params, keys: Array, x: Array, target: Array) -> Step:
    """One training step on a batch or a device's piece of it."""

    def loss(params: Params) -> tuple[Array, Step]:
        y, masks = network(params, keys, x)
        return 0.5 * ((y - target) ** 2).sum(), Step(masks, y, None)

    gradients, found = jax.grad(loss, has_aux=True)(params)
    return found._replace(gradients=gradients)


def cut_params(layers: str | None, model: str | None) -> dict[str, P]:
    """Returns how the parameters are cut: layers over one axis, heads and hidden units over another."""
    rows, columns = P(layers, model), P(layers, None, model)
    return {"qkv": P(layers, None, None, model), "out": rows, "up": columns, "down": rows}


single = jax.jit(functools.partial(step, functools.partial(network, place=WHOLE)))


def mapped(place: Place, batch: P, **axes: int) -> Callable[..., Step]:
    """Returns the step under shard_map, whose types know which gradients to add up over which axes."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    stage, model = (axis if axis in axes else None for axis in ("stage", "model"))
    params = cut_params(stage, model)
    before = ("stage", None) if stage else (None,)  # layers, and microbatches
    masks = {kind: P(*before, *(cut.get(d) for d in range(3))) for kind, cut in place.cuts.items()}
    shards = jax.shard_map(
        functools.partial(step, functools.partial(pipeline if stage else network, place=place)),
        mesh=mesh,
        in_specs=(params, P(stage), batch, batch),
        out_specs=Step(masks, batch, params),
    )

    def run(params: Params, keys: Array, *pair: Array) -> Step:
        pieces = (MICROBATCHES, -1, SEQUENCE, WIDTH) if stage else (BATCH, SEQUENCE, WIDTH)
        return jax.jit(shards)(params, keys, *(of.reshape(pieces) for of in pair))

    return run


def fsdp(kind: AxisType) -> Callable[..., Step]:
    """Returns the step under jit alone: batch and parameters are cut over the devices, dropjax is told nothing."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, P("data"))
    shards = {name: NamedSharding(mesh, spec) for name, spec in cut_params(None, "data").items()}

    def gathering(params: Params, keys: Array, x: Array) -> tuple[Array, Masks]:
        # With automatic axes the compiler gathers the parameters, with explicit ones the program says where.
        whole = jax.sharding.reshard(params, P()) if kind == AxisType.Explicit else params
        return network(whole, keys, x, WHOLE)

    compiled = jax.jit(functools.partial(step, gathering), out_shardings=Step(None, rows, shards))

    def run(params: Params, keys: Array, *pair: Array) -> Step:
        with jax.set_mesh(mesh):
            return compiled(jax.device_put(params, shards), keys, *jax.device_put(pair, rows))

    return run


def pmapped(params: Params, keys: Array, *pair: Array) -> Step:
    """The step under pmap, whose types know nothing of devices: gradients are added up by hand."""

    def piece(*given: Any) -> Step:
        found = step(functools.partial(network, place=DATA), *given)
        return found._replace(gradients=lax.psum(found.gradients, "data"))

    run = jax.pmap(piece, "data", in_axes=(None, None, 0, 0), out_axes=Step(1, 0, None))
    return run(params, keys, *(of.reshape(8, -1, SEQUENCE, WIDTH) for of in pair))


RECIPES: dict[str, tuple[str, Callable[[], Callable[..., Step]]]] = {
    "one device": ("1", lambda: single),
    "data": ("8 data", lambda: mapped(DATA, P("data"), data=8)),
    "tensor": ("8 model", lambda: mapped(TENSOR, P(), model=8)),
    "sequence": ("8 model", lambda: mapped(TOKENS, P(None, "model"), model=8)),
    "data × tensor": ("4 data, 2 model", lambda: mapped(BOTH, P("data"), data=4, model=2)),
    "pipeline × data": ("4 stage, 2 data", lambda: mapped(DATA, P(None, "data"), stage=4, data=2)),
    "FSDP": ("8 data", lambda: fsdp(AxisType.Auto)),
    "FSDP, explicit": ("8 data", lambda: fsdp(AxisType.Explicit)),
    "pmap": ("8 data", lambda: pmapped),
}


def make(seed: int) -> tuple[Params, Array, Any, Any]:
    """Returns parameters, a key for each layer and kind of activation, a batch, and what it should become."""
    draw, heads = np.random.default_rng(seed).normal, (HEADS, WIDTH // HEADS)
    shapes = {"qkv": (3, WIDTH, *heads), "out": (*heads, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    scale = 0.5 * WIDTH**-0.5
    params = {name: draw(0, scale, (LAYERS, *shape)).astype(np.float32) for name, shape in shapes.items()}
    keys = jax.random.split(jax.random.key(seed), (LAYERS, len(KINDS)))
    return params, keys, *draw(size=(2, BATCH, SEQUENCE, WIDTH)).astype(np.float32)


def shake(seed: int, numbers: Any) -> Any:
    """Changes each number, up or down at random, by as much as the order of a sum can.

    However the products of a sum of n are added up, the result is the exact sum for factors that are changed by at
    most n eps / 2 of themselves (Higham, Accuracy and stability of numerical algorithms, 2002, section 3.1), so two
    orders lie a change of n eps apart at most; n is the longest sum, that of a gradient over all tokens. To first
    order this is no worst case, as directions are random, but a generous limit: every number changes by the whole of
    n eps, where the errors of a real sum grow with the square root of n.
    """
    flip = np.random.default_rng(seed).choice
    change = float(np.finfo(np.float32).eps) * BATCH * SEQUENCE
    return jax.tree.map(lambda of: (of * (1 + flip([-change, change], of.shape))).astype(np.float32), numbers)


def numbers(step: Step) -> dict[str, Any]:
    """Returns the output and the gradients by name."""
    return {"output": np.reshape(step.output, (BATCH, SEQUENCE, WIDTH)), **jax.tree.map(np.asarray, step.gradients)}


def largest(a: Step, b: Step) -> dict[str, float]:
    """Returns the largest difference of each array."""
    return {name: float(np.abs(one - numbers(b)[name]).max()) for name, one in numbers(a).items()}


def compare(seed: int) -> tuple[dict[str, Step], dict[str, dict[str, Any]]]:
    """Returns each recipe's step, and what it has in common with that of one device."""
    params, keys, *pair = make(seed)
    one = single(params, keys, *pair)
    shaken, *others = shake(seed, (params, *pair))
    bounds = largest(single(shaken, keys, *others), one)
    steps = {name: recipe()(params, keys, *pair) for name, (_, recipe) in RECIPES.items()}
    results = {}
    for name, found in steps.items():
        masks = {kind: np.reshape(found.masks[kind], one.masks[kind].shape) for kind in KINDS}
        results[name] = {
            "mesh": RECIPES[name][0],
            "checksum": f"{zlib.crc32(b''.join(np.packbits(mask).tobytes() for mask in masks.values())):08x}",
            "equal": all(np.array_equal(masks[kind], one.masks[kind]) for kind in KINDS),
            "differences": largest(found, one),
            "bounds": bounds,
        }
    return steps, results


def tell(results: dict[str, dict[str, Any]]) -> bool:
    """Prints a row for each recipe, with that gradient which is nearest to its bound; returns whether all is well."""
    print(f"{'':<17}{'mesh':<17}{'masks':<10}{'equal':<7}{'output':<9}{'bound':<10}{'gradient':<10}bound")
    well = True
    for name, of in results.items():
        near = max(list(of["bounds"])[1:], key=lambda name: of["differences"][name] / of["bounds"][name])
        pairs = [(of["differences"][name], of["bounds"][name]) for name in ("output", near)]
        well &= of["equal"] and all(difference <= bound for difference, bound in pairs)
        print(f"{name:<17}{of['mesh']:<17}{of['checksum']:<10}{'yes' if of['equal'] else 'NO':<7}", end="")
        print("".join(f"{difference:<9.1e}{bound:<10.1e}" for difference, bound in pairs).rstrip())
    return well


def drew(mask: Array) -> np.ndarray:
    """Returns which device drew each element; where several drew the same, they take turns."""
    holders: dict[str, tuple[Any, list[int]]] = {}
    for shard in mask.addressable_shards:
        holders.setdefault(str(shard.index), (shard.index, []))[1].append(shard.device.id)
    turns, device = np.indices(mask.shape).sum(0), np.empty(mask.shape, int)
    for index, devices in holders.values():
        device[index] = np.array(devices)[turns[index] % len(devices)]
    return device


def draw(steps: dict[str, Step], path: Path) -> None:
    """Draws two masks of the second layer, tokens down and units across, coloured by the device that drew them."""
    from matplotlib.colors import to_rgb  # here, since the recipes do without
    from matplotlib.figure import Figure

    names = [name for name in steps if name != "FSDP, explicit"]
    figure, colors = Figure(figsize=(13.33, 8.4)), np.array([to_rgb(color) for color in COLORS])
    figure.subplots_adjust(0.03, 0.105, 0.99, 0.855, wspace=0.1, hspace=0.06)
    for row, kind, units in zip(figure.subplots(2, len(names)), KINDS[1:], (HIDDEN, WIDTH), strict=True):
        for ax, name in zip(row, names, strict=True):
            mask = steps[name].masks[kind]
            kept, device = (np.reshape(of, (LAYERS, -1, units))[1] for of in (mask, drew(mask)))
            ax.imshow(np.where(kept[..., None], colors[device], 1 - 0.15 * (1 - colors[device])), aspect="auto")
            ax.set(xticks=[], yticks=[])
            if kind == "hidden":
                ax.set_title(name, size=12, weight="bold")
        row[0].set_ylabel(f"{kind}: 64 tokens × {units}", size=13)
    text = figure.text
    text(0.03, 0.945, "The same masks, however the network is spread over devices", size=18, weight="bold")
    text(0.03, 0.905, "The pattern is the same in every panel; the colour says which device drew it.", size=13)
    text(0.03, 0.045, "device", size=13)
    for i, color in enumerate(COLORS):
        text(0.09 + 0.03 * i, 0.045, f" {i} ", size=13, color="white", weight="bold", backgroundcolor=color)
    text(0.35, 0.062, "Pale: dropped. Mixed colours: several devices hold the same, and drew the same.", size=12)
    text(0.35, 0.025, "Pipeline: this layer's two devices drew their halves of four microbatches in turn.", size=12)
    figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all recipes, prints the comparison, and writes it and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="in [0, 2^32), by default 0")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of results, by default out")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be in [0, 2^32), got {args.seed}")
    if jax.device_count() != 8:
        parser.error(f"eight devices are needed, got {jax.device_count()}: unset XLA_FLAGS and JAX_PLATFORMS")
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all the time goes to compiling
    steps, results = compare(args.seed)
    well = tell(results)
    about = {
        "results": results,
        "options": vars(args),
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, np)},
    }
    (args.out / "multi_device.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    draw(steps, args.out / "multi_device.png")
    print(f"Wrote multi_device.png and multi_device.json into {args.out}.")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
