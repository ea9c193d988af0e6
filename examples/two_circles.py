"""Two circles: does dropout help a network that is much too large for thirty points, and how much?

The case study of a well-known tutorial (machinelearningmastery.com, How to reduce overfitting with dropout
regularization in Keras), which shows one run without and one with dropout, and lists what else to try. Here every
answer is over many seeds: dropout rates from 0 to 0.9, dropout on the input and the max-norm constraint, on the
tutorial's data set and on one drawn anew for each seed. All networks train in one compiled program:

    pip install '.[examples]'
    python examples/two_circles.py
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy
import sklearn
from jax import Array, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import make_circles
from tqdm import tqdm

import dropjax
from dropjax.constraints import max_norm

TRAIN, HIDDEN = 30, 500
EPSILON = 1e-7  # of Adam: Keras's value, added where optax adds it, to the corrected root
COLORS = "#D55E00", "#0072B2"  # control and dropout, from Okabe and Ito's colour-blind-safe set
SET_COLORS = "#7CB4DA", "#00456B"  # one data set, many
GREY = "#707070"
STYLE: Any = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlepad": 9}


class Option(NamedTuple):
    """What is tried: all numbers are data of the one program."""

    rate: Any = 0.0
    """Dropout rate of the hidden layer."""
    input_rate: Any = 0.0
    max_norm: Any = np.inf
    """Bound of the norm of each hidden unit's incoming weights."""


class Data(NamedTuple):
    """Points `[n, 2]` and labels `[n]`, float32; the first 30 are for training, the others for the test."""

    points: Any
    labels: Any


class Network(NamedTuple):
    """One network and all that it trains with."""

    params: Any
    moments: Any
    """Of Adam."""
    key: Any
    option: Option
    data: Data


RATES = [round(0.1 * i, 1) for i in range(10)]
OPTIONS = {"control": Option()} | {f"rate {rate}": Option(rate) for rate in RATES[1:]}
OPTIONS |= {
    "input 0.2": Option(0.0, 0.2),
    "rate 0.4, input 0.2": Option(0.4, 0.2),
    "rate 0.4, max-norm 3": Option(0.4, 0.0, 3.0),
    "rate 0.4, max-norm 0.5": Option(0.4, 0.0, 0.5),
    "max-norm 0.5": Option(0.0, 0.0, 0.5),
}
SETS = "one data set", "many data sets"


def circles(state: int) -> Data:
    """Returns 100 points of two noisy circles; the tutorial's are those of state 1."""
    points, labels = make_circles(n_samples=100, noise=0.1, random_state=state)
    return Data(points.astype(np.float32), labels.astype(np.float32))


def optimizer(option: Option) -> optax.GradientTransformation:
    """Adam with Keras's settings; then the bound on the hidden kernel."""
    kernel = {"hidden": {"kernel": True, "bias": False}, "output": {"kernel": False, "bias": False}}
    bound = optax.masked(max_norm(option.max_norm, axis=0), kernel)
    return optax.chain(optax.adam(1e-3, eps=EPSILON), bound)


def create(key: Array, option: Option, data: Data) -> Network:
    """Returns a network with the initial weights of Keras, which depend on the key alone."""

    def kernel(name: int, inputs: int, outputs: int) -> Array:
        limit = (6 / (inputs + outputs)) ** 0.5
        return jax.random.uniform(jax.random.fold_in(key, name), (inputs, outputs), minval=-limit, maxval=limit)

    params = {
        "hidden": {"kernel": kernel(0, 2, HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "output": {"kernel": kernel(1, HIDDEN, 1), "bias": jnp.zeros(1)},
    }
    return Network(params, optimizer(option).init(params), jax.random.fold_in(key, 2), option, data)


def logits(params: Any, points: Array, option: Option | None = None, key: Array | None = None) -> Array:
    """Returns the logits `[n]`, with dropout where there is a key."""
    if option is not None and key is not None:
        points = dropjax.dropout(jax.random.fold_in(key, 0), points, option.input_rate)
    ones = jnp.ones((len(points), 1))  # the bias as a weight of a constant input: its gradient is part of the product
    weights = jnp.concatenate([params["hidden"]["kernel"], params["hidden"]["bias"][None]])
    hidden = jax.nn.relu(jnp.concatenate([points, ones], 1) @ weights)
    if option is not None and key is not None:
        hidden = dropjax.dropout(jax.random.fold_in(key, 1), hidden, option.rate)
    return hidden @ params["output"]["kernel"][:, 0] + params["output"]["bias"]


def step(network: Network, epoch: Array) -> Network:
    """One epoch: its only batch, of 32, holds all 30 points, so there is nothing to shuffle."""
    points, labels = (of[:TRAIN] for of in network.data)
    key = jax.random.fold_in(network.key, epoch)

    def loss(params: Any) -> Array:
        return optax.sigmoid_binary_cross_entropy(logits(params, points, network.option, key), labels).mean()

    updates, moments = optimizer(network.option).update(jax.grad(loss)(network.params), network.moments, network.params)
    return network._replace(params=optax.apply_updates(network.params, updates), moments=moments)


def train(network: Network, first: Array, epochs: int) -> tuple[Network, Array]:
    """Trains for some epochs; returns also the accuracies without dropout in training and test, `[2]`."""
    network, _ = lax.scan(lambda of, epoch: (step(of, epoch), None), network, first + jnp.arange(epochs))
    right = (logits(network.params, network.data.points) > 0) == (network.data.labels > 0)
    return network, jnp.stack([right[:TRAIN].mean(), right[TRAIN:].mean()])


def at_once() -> int:
    """How many networks a device trains side by side: on a CPU as many as a core's cache holds."""
    return 8 if jax.default_backend() == "cpu" else 1024


@functools.partial(jax.jit, static_argnames="epochs", donate_argnums=0)
def train_all(networks: Network, first: Array, epochs: int) -> tuple[Network, Array]:
    """Trains networks `[n, ...]` in groups, on all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("networks",), axis_types=(AxisType.Auto,))

    def groups(networks: Network, first: Array) -> tuple[Network, Array]:
        return lax.map(lambda of: train(of, first, epochs), networks, batch_size=at_once())

    return jax.shard_map(groups, mesh=mesh, in_specs=(P("networks"), P()), out_specs=P("networks"))(networks, first)


def experiment(args: argparse.Namespace) -> tuple[Any, np.ndarray, np.ndarray]:
    """Trains every option on both kinds of data sets with every seed.

    Networks of one seed begin with the same weights and draw masks from the same keys, whatever the option, so that
    differences are paired. Returns the parameters `[sets, options, seeds, ...]`, the epochs of the curves, and the
    curves `[points, sets, options, seeds, 2]` of accuracy in training and test.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(args.seed)))(jnp.arange(args.seeds))
    many = jax.tree.map(lambda *of: np.stack(of), *[circles(1 + seed) for seed in range(args.seeds)])
    one = jax.tree.map(lambda of: np.stack([of] * args.seeds), circles(1))
    shape = len(SETS), len(OPTIONS), args.seeds
    # every leaf [sets, options, seeds, ...], then one axis of all networks, filled up to whole groups
    options = jax.tree.map(lambda *of: np.array(of, np.float32), *OPTIONS.values())
    rows = np.arange(np.prod(shape))
    rows = np.pad(rows, (0, -len(rows) % (at_once() * jax.device_count())), mode="edge")
    kind, option, seed = np.unravel_index(rows, shape)
    data = jax.tree.map(lambda *of: np.stack(of)[kind, seed], one, many)
    networks = jax.jit(jax.vmap(create))(keys[seed], jax.tree.map(lambda of: of[option], options), data)
    curves, epochs = [], np.arange(0, args.epochs, args.every)
    with tqdm(total=args.epochs, unit="epoch", disable=args.quiet) as progress:
        for first in epochs:
            networks, accuracy = train_all(networks, first, min(args.every, args.epochs - first))
            curves.append(np.asarray(accuracy)[: np.prod(shape)].reshape(*shape, 2))
            progress.update(min(args.every, args.epochs - first))
    params = jax.tree.map(lambda of: np.asarray(of)[: np.prod(shape)].reshape(*shape, *of.shape[1:]), networks.params)
    return params, np.append(epochs[1:], args.epochs), np.stack(curves)


def interval(samples: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over an axis and the half width of its 95 % confidence interval, by Student's t."""
    n = samples.shape[axis]
    half = stats.t.ppf(0.975, n - 1) * samples.std(axis, ddof=1) / n**0.5
    return samples.mean(axis), half


def summarise(final: np.ndarray, norms: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Returns and prints means over seeds with confidence intervals, of accuracies `[sets, options, seeds, 2]`."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind, accuracies, largest in zip(SETS, final, norms, strict=True):
        heading = f"{kind}, {final.shape[2]} seeds"
        print(f"\n{heading:<26}train   test ± 95 %       difference to control  largest norm")
        results[kind] = {}
        for name, of, norm in zip(OPTIONS, accuracies, largest, strict=True):
            (_, test), (_, half) = interval(of, axis=0)
            change, error = interval(of[:, 1] - accuracies[0, :, 1])
            row = {"train": of[:, 0].mean(), "test": test, "test_error": half, "difference": change}
            row |= {"difference_error": error, "largest_norm": norm.mean()}
            results[kind][name] = {key: float(value) for key, value in row.items()}
            compared = f"{change:+.4f} ± {error:.4f}" if name != "control" else ""
            print(f"{name:<26}{row['train']:.4f}  {test:.4f} ± {half:.4f}   {compared:<23}{norm.mean():.2f}")
    print("\nThe intervals are for the mean over seeds, each by itself; differences are paired by seed.")
    print("Largest norm: of the incoming weights of a hidden unit, the mean over seeds of the largest in a network.")
    return results


def draw_curves(ax: Axes, epochs: np.ndarray, curves: np.ndarray) -> None:
    """Draws accuracies `[points, options, seeds, 2]` of control and rate 0.4, with bands of their intervals."""
    for name, color in zip(("control", "rate 0.4"), COLORS, strict=True):
        mean, half = interval(curves[:, list(OPTIONS).index(name)], axis=1)
        for which, style in enumerate(("--", "-")):
            ax.plot(epochs, mean[:, which], style, color=color, lw=2.5 if which else 1.8)
            low, high = (mean[:, which] + sign * half[:, which] for sign in (-1, 1))
            ax.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
        place = 0.30 if name == "control" else 0.22
        ax.text(0.97, place, name, color=color, weight="bold", ha="right", transform=ax.transAxes)
    ax.text(0.97, 0.12, "dashed: training, solid: test", color=GREY, ha="right", transform=ax.transAxes)
    ax.set(title="Learning, one data set", xlabel="epoch", ylabel="accuracy")


def draw_boundary(ax: Axes, params: Any, data: Data, name: str, accuracy: np.ndarray) -> None:
    """Draws the decision boundary of one network, and its data."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.6, 1.6, 300, dtype=np.float32)] * 2), -1)
    probability = jax.nn.sigmoid(logits(params, jnp.asarray(grid.reshape(-1, 2)))).reshape(grid.shape[:2])
    ax.contourf(*grid.transpose(2, 0, 1), probability, [0, 0.5, 1], colors=["#F6D5BF", "#CCE2F0"])
    ax.contour(*grid.transpose(2, 0, 1), probability, [0.5], colors="black", linewidths=1.5)
    for rows, size, edge in ((slice(TRAIN), 70, "black"), (slice(TRAIN, None), 28, "none")):
        colors = [COLORS[int(label)] for label in data.labels[rows]]
        ax.scatter(data.points[rows, 0], data.points[rows, 1], s=size, c=colors, edgecolors=edge, linewidths=1.5)
    ax.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    ax.set_xlabel(f"accuracy: training {accuracy[0]:.2f}, test {accuracy[1]:.2f}")
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_grid(ax: Axes, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draws the test accuracy over the rate."""
    for kind, color, shift in zip(SETS, SET_COLORS, (-0.006, 0.006), strict=True):
        rows = list(results[kind].values())[: len(RATES)]
        mean, half = ([row[key] for row in rows] for key in ("test", "test_error"))
        ax.errorbar(np.array(RATES) + shift, mean, half, color=color, marker="o", ms=7, lw=2.5, elinewidth=1.5)
        ax.text(0.03, 0.06 if shift > 0 else 0.16, kind, color=color, weight="bold", transform=ax.transAxes)
    ax.set(title="Grid search of the rate", xlabel="dropout rate of the hidden layer", ylabel="test accuracy")
    ax.set(xticks=RATES)


def draw_differences(ax: Axes, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draws the differences of all other options to control."""
    names = ["rate 0.4", *list(OPTIONS)[len(RATES) :]]
    for kind, color, shift in zip(SETS, SET_COLORS, (-0.13, 0.13), strict=True):
        rows = [results[kind][name] for name in names]
        change, error = ([row[key] for row in rows] for key in ("difference", "difference_error"))
        ax.errorbar(change, np.arange(len(names)) + shift, xerr=error, color=color, fmt="o", ms=7, elinewidth=2)
    ax.axvline(0, color=GREY, lw=1, ls="--")
    ax.set(title="Other options against control", xlabel="difference of test accuracy, paired by seed")
    ax.set_yticks(np.arange(len(names)), names)
    ax.invert_yaxis()


def draw(epochs: np.ndarray, curves: np.ndarray, params: Any, results: Any, path: Path) -> None:
    """Draws the figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.33, 8.6))
        top = figure.add_gridspec(1, 3, left=0.065, right=0.985, bottom=0.575, top=0.945, wspace=0.16)
        bottom = figure.add_gridspec(1, 2, left=0.065, right=0.985, bottom=0.125, top=0.44, wspace=0.42)
        draw_curves(figure.add_subplot(top[0]), epochs, curves[:, 0])
        for column, name in enumerate(("control", "rate 0.4"), 1):
            row = list(OPTIONS).index(name)
            weights = jax.tree.map(lambda of, row=row: of[0, row, 0], params)
            ax = figure.add_subplot(top[column])
            draw_boundary(ax, weights, circles(1), f"{name.capitalize()}, first seed", curves[-1, 0, row, 0])
        draw_grid(figure.add_subplot(bottom[0]), results)
        draw_differences(figure.add_subplot(bottom[1]), results)
        caption = f"Means over {curves.shape[3]} seeds with 95 % confidence intervals."
        caption += " Large points with a rim: training; small points: test. Many data sets: each seed draws its own."
        figure.text(0.065, 0.025, caption, color=GREY)
        figure.savefig(path, dpi=200)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="seed of everything but the data, in [0, 2^32)")
    parser.add_argument("--seeds", type=int, default=100, help="networks for each option and kind of data, at least 2")
    parser.add_argument("--epochs", type=int, default=4000, help="epochs, at least 1")
    parser.add_argument("--every", type=int, default=100, help="epochs between two points of the curves, at least 1")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of two_circles.png and two_circles.json")
    parser.add_argument("--quick", action="store_true", help="5 seeds")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds = 5
    for name, least, below in (("seed", 0, 2**32), ("seeds", 2, 10**5), ("epochs", 1, 10**6), ("every", 1, 10**6)):
        if not least <= (value := getattr(args, name)) < below:
            parser.error(f"argument --{name}: must be in [{least}, {below}), got {value}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, and writes the results and the figure."""
    args = parse(argv)
    begin = time.perf_counter()
    params, epochs, curves = experiment(args)
    seconds = time.perf_counter() - begin
    norms = np.linalg.norm(params["hidden"]["kernel"], axis=-2).max(-1)
    results = summarise(curves[-1], norms)
    networks = int(np.prod(curves.shape[1:4]))
    print(f"Trained {networks} networks for {args.epochs} epochs in {seconds:.0f} s, compiling included.")
    about = {
        "results": results,
        "accuracies": {"axes": [SETS, [*OPTIONS], "seeds", ["train", "test"]], "values": curves[-1].round(4).tolist()},
        "options": vars(args),
        "seconds": seconds,
        "networks": networks,
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, optax, np, scipy, sklearn, matplotlib)},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    (args.out / "two_circles.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    draw(epochs, curves, params, results, args.out / "two_circles.png")
    print(f"Wrote two_circles.png and two_circles.json into {args.out}.")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # a device for each core
    raise SystemExit(main())
