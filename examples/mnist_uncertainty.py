"""MNIST with and without Monte Carlo dropout: error, test likelihood, calibration, and digits that are not digits.

Two networks of two hidden layers of 1,200 units learn MNIST, one without dropout and one with rate 0.5. Compared are
the first, the second without dropout at the test, and the second with T passes whose dropout is on.

    pip install '.[examples]'
    python examples/mnist_uncertainty.py                 # scikit-learn's 8x8 digits, a minute
    python examples/mnist_uncertainty.py --data DIR      # MNIST, its four IDX .gz files in DIR
"""

import argparse
import gzip
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
import sklearn
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import dropjax
from dropjax import mc, training
from dropjax.linen import Dropout
from dropjax.mc import plots

BATCH = 128
PUBLIC = {"deterministic": (1.58, -572.9), "Monte Carlo": (1.37, -435.5)}  # JavierAntoran/Bayesian-Neural-Networks
COLORS = {"no dropout": "#707070", "dropout off at the test": "#D55E00", "Monte Carlo": "#0072B2"}


class Network(nn.Module):
    """Two hidden layers of ReLU units, each followed by dropout."""

    hidden: int
    rate: float

    @nn.compact
    def __call__(self, images: Array, deterministic: bool = True) -> Array:
        """Returns logits `[n, 10]` of images `[n, height, width]` in [0, 1]."""
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = Dropout(self.rate, deterministic=deterministic)(nn.relu(nn.Dense(self.hidden)(x)))
        return nn.Dense(10)(x)


class Split(NamedTuple):
    """Images, float32 `[n, height, width]` in [0, 1], and labels, int32 `[n]`."""

    images: np.ndarray
    labels: np.ndarray


def load(folder: Path | None) -> tuple[Split, Split]:
    """Returns training and test digits: MNIST's, or the halves of scikit-learn's."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        both = (images.reshape(-1, 8, 8)[order] / 16, labels[order])
        return tuple(Split(*(of[rows] for of in typed(*both))) for rows in (slice(0, 898), slice(898, None)))  # type: ignore[return-value]

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read()[header:], np.uint8)

    parts = []
    for name in ("train", "t10k"):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28) / 255
        parts.append(Split(*typed(images, read(f"{name}-labels-idx1-ubyte.gz", 8))))
    return parts[0], parts[1]


def typed(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as JAX takes them."""
    return np.asarray(images, np.float32), np.asarray(labels, np.int32)


def fit(model: Network, train: Split, args: argparse.Namespace) -> Any:
    """Trains on shuffled batches, with weight decay and a learning rate that falls to 0; returns the variables."""
    per_epoch = len(train.labels) // BATCH
    steps = args.epochs * per_epoch

    def loss(variables: Any, batch: Split, key: Array) -> Array:
        logits: Any = model.apply(variables, batch.images, deterministic=False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def batch(step: int) -> Split:
        epoch, place = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([args.seed, epoch]).permutation(len(train.labels))
        rows = orders[epoch][place * BATCH : (place + 1) * BATCH]
        return Split(train.images[rows], train.labels[rows])

    orders: dict[int, np.ndarray] = {}
    folder = args.checkpoint_dir and args.checkpoint_dir / f"{model.rate}-{args.hidden}-{args.epochs}-{args.seed}"
    return training.fit(
        loss, model.init(jax.random.key(args.seed), train.images[:1]),
        optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=1e-4), batch, seed=args.seed, steps=steps,
        checkpoint_dir=folder, checkpoint_every=max(1, args.epochs // 10) * per_epoch, progress=not args.quiet,
    ).state  # fmt: skip


def predict(model: Network, variables: Any, images: np.ndarray, samples: int, seed: int) -> mc.Classification:
    """Returns what T passes say of the images, a thousand at a time; of a single pass, dropout is off."""

    @jax.jit
    def summary(images: Array) -> Any:
        def logits(key: Array) -> Any:
            rngs = {"dropout": key} if samples > 1 else {}
            return model.apply(variables, images, deterministic=samples == 1, rngs=rngs)

        return mc.classify(logits, jax.random.key(seed), samples, chunk_size=5)

    found = [jax.tree.map(np.asarray, summary(images[i : i + 1000])) for i in range(0, len(images), 1000)]
    fields: Any = [np.concatenate(of) if np.ndim(of[0]) else of[0] for of in zip(*found, strict=True)]
    return mc.Classification(*fields)


def judge(of: mc.Classification, labels: np.ndarray) -> dict[str, float]:
    """Returns what a test set says of predictions."""
    p = of.probabilities
    return {
        "error %": float(100 * (p.argmax(-1) != labels).mean()),
        "log likelihood": float(-mc.negative_log_likelihood(p, labels) * len(labels)),
        "Brier score": float(mc.brier(p, labels)),
        "calibration error": float(mc.calibration_error(p, labels)),
    }


def recalibrate(p: Any, labels: np.ndarray) -> dict[str, float]:
    """Fits one temperature on the first half of the test and returns what it does to the second."""
    half = len(labels) // 2
    logits = np.log(np.maximum(p, 1e-30))
    temperature, _ = mc.fit_temperature(logits[:half], labels[:half])
    after = jax.nn.softmax(mc.temperature_scale(logits[half:], temperature))
    before, labels = p[half:], labels[half:]
    return {
        "temperature": float(temperature),
        "calibration error before": float(mc.calibration_error(before, labels)),
        "calibration error after": float(mc.calibration_error(after, labels)),
    }


def change(images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns digits unlike those of training."""
    return {"rotated by 90°": np.rot90(images, axes=(1, 2)).copy(), "inverted": 1 - images}


def run(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, mc.Classification], Split, Any]:
    """Trains both networks and judges three predictors; returns the results, and what the figure needs."""
    train, test = load(args.data)
    asked = {"no dropout": (0.0, 1), "dropout off at the test": (0.5, 1), "Monte Carlo": (0.5, args.samples)}
    variables: dict[float, Any] = {}
    clean: dict[str, mc.Classification] = {}
    results: dict[str, Any] = {}
    entropies: dict[tuple[str, str], Any] = {}
    for name, (rate, samples) in asked.items():
        model = Network(args.hidden, rate)
        if rate not in variables:
            variables[rate] = fit(model, train, args)
        clean[name] = predict(model, variables[rate], test.images, samples, args.seed)
        results[name] = judge(clean[name], test.labels) | recalibrate(clean[name].probabilities, test.labels)
        for kind, images in change(test.images).items():
            of = predict(model, variables[rate], images, samples, args.seed)
            entropies[name, kind] = of.predictive_entropy
            found = mc.detection(clean[name].predictive_entropy, of.predictive_entropy)
            results[name][f"AUROC, {kind}"] = found.auroc
    return results, clean, test, entropies


def draw(clean: dict[str, mc.Classification], test: Split, entropies: Any, path: Path) -> None:
    """Draws reliability, and entropies of digits as they are and turned."""
    with matplotlib.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13.3, 4.2), layout="constrained")
        axes = figure.subplots(1, 3)
        for name, of in clean.items():
            plots.reliability(of.probabilities, test.labels, label=name, color=COLORS[name], ax=axes[0])
        for ax, name in zip(axes[1:], list(clean)[1:], strict=True):
            plots.entropies(clean[name].predictive_entropy, entropies[name, "rotated by 90°"], log=True, ax=ax)
            ax.set_title(f"Digits and rotated digits: {name}", size=12)
        figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX .gz files; without it, 8x8 digits")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of training, at least 1")
    parser.add_argument("--hidden", type=int, help="units of a hidden layer; 1200, and 256 without --data")
    parser.add_argument("--samples", type=int, default=100, help="Monte Carlo samples, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, in [0, 2^32)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results and the figure")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of checkpoints, from which the same run resumes")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    if args.data and not (args.data / "train-images-idx3-ubyte.gz").is_file():
        parser.error(f"argument --data: no train-images-idx3-ubyte.gz in {args.data}")
    args.hidden = args.hidden or (1200 if args.data else 256)
    if args.epochs < 1 or args.samples < 2 or args.hidden < 1 or not 0 <= args.seed < 2**32:
        parser.error("--epochs and --hidden must be at least 1, --samples at least 2, --seed in [0, 2^32)")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, judges, prints, and writes the results and the figure."""
    args = parse(argv)
    if not args.data:
        print("No --data: scikit-learn's 8x8 digits; the public numbers are of MNIST.")
    began = time.perf_counter()
    results, clean, test, entropies = run(args)
    seconds = time.perf_counter() - began
    print(f"{len(test.labels)} test digits, {args.epochs} epochs, T = {args.samples}, {seconds:.0f} s")
    print(f"{'':<28}" + "".join(f"{name:>26}" for name in results))
    for metric in results["Monte Carlo"]:
        print(f"{metric:<28}" + "".join(f"{of[metric]:>26.4f}" for of in results.values()))
    if args.data:
        print("public reproduction, error % and log likelihood:", PUBLIC)
    about = {
        "results": results, "options": vars(args), "seconds": seconds, "python": platform.python_version(),
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, flax, optax, np, sklearn)},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }  # fmt: skip
    (args.out / "mnist_uncertainty.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    draw(clean, test, entropies, args.out / "mnist_uncertainty.png")
    print(f"Wrote mnist_uncertainty.json and mnist_uncertainty.png into {args.out}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
