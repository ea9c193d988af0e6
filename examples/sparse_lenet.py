"""How few weights does a network need? Sparse variational dropout finds out while it learns digits.

LeNet-300-100 starts with noise on each of its weights, and the noise is learned. A weight whose noise outgrows it is
set to 0 at evaluation. After training hardly any are left, and the network is as good as it was:

    pip install '.[examples]'
    python examples/sparse_lenet.py                       # scikit-learn's 8x8 digits, which need no file
    python examples/sparse_lenet.py --data FOLDER         # MNIST: the four files *-ubyte.gz
"""

import argparse
import functools
import gzip
import itertools
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import sklearn
from flax import nnx
from jax import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dropjax
from dropjax import training
from dropjax.nnx import SparseVariationalDense

BATCH = 256
FILES = {
    name: f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for name, kind in ((f"{part} images", "images-idx3"), (f"{part} labels", "labels-idx1"))
}
COLORS = "#0072B2", "#D55E00", "#009E73"  # one for each layer, from Okabe and Ito's colour-blind-safe set
STYLE: Any = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlepad": 9}


class LeNet(nnx.Module):
    """Two hidden layers of 300 and 100 units, and noise on every weight."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        sizes = (features, 300, 100, 10)
        self.layers = nnx.List(SparseVariationalDense(*of, rngs=rngs) for of in itertools.pairwise(sizes))

    def __call__(self, images: Array, key: Array | None = None) -> Array:
        """Returns logits `[n, 10]` of images `[n, features]`; with noise where there is a key."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        x = images
        for layer, own, last in zip(self.layers, keys, (False, False, True), strict=True):
            x = layer(x, rngs=own, deterministic=own is None)
            x = x if last else nnx.relu(x)
        return x


class Batch(NamedTuple):
    """Images, float32 `[n, features]` in [0, 1], labels, int32 `[n]`, and how much the divergence counts."""

    images: Any
    labels: Any
    warmth: Any = 1.0


def read(path: Path) -> np.ndarray:
    """Returns the array in a file of the IDX format of bytes: two zeros, the type 8, the rank, the lengths."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"sparse_lenet: {path} must be an IDX file of bytes, got one that begins with {raw[:4]!r}.")
    lengths = np.frombuffer(raw, ">i4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(lengths)


def load(folder: Path | None, seed: int) -> tuple[Batch, Batch]:
    """Returns training and test digits: MNIST from a folder, or those that scikit-learn brings along."""
    if folder is None:
        print("No --data: scikit-learn's 8x8 digits, of which 1,437 for training. MNIST needs a folder.")
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
        train, test = split[::2], split[1::2]
    else:
        if missing := [name for name in FILES.values() if not (folder / name).is_file()]:
            raise SystemExit(f"sparse_lenet: --data must be a folder with {', '.join(missing)}, got {folder}.")
        arrays = [read(folder / name) for name in FILES.values()]
        flat = [of.reshape(len(of), -1) / 255 if of.ndim == 3 else of for of in arrays]
        train, test = flat[:2], flat[2:]
    train, test = (Batch(of[0].astype(np.float32), of[1].astype(np.int32)) for of in (train, test))
    return train, test


def fit(train: Batch, test: Batch, args: argparse.Namespace) -> tuple[training.Fit, LeNet]:
    """Trains with the divergence counted more and more at first, and measures after every epoch."""
    examples = len(train.labels)
    steps = -(-examples // BATCH)  # of an epoch; the last batch borrows from the order's beginning
    total, warm = args.epochs * steps, max(1, int(args.warmup * args.epochs * steps))

    @functools.lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([args.seed, epoch]).permutation(examples)

    def batch(step: int) -> Batch:
        epoch, i = divmod(step, steps)
        rows = np.take(order(epoch), range(i * BATCH, (i + 1) * BATCH), mode="wrap")
        return Batch(train.images[rows], train.labels[rows], np.float32(min(1, step / warm)))

    def loss(model: LeNet, of: Batch, key: Array) -> Array:
        likelihood = optax.softmax_cross_entropy_with_integer_labels(model(of.images, key), of.labels).mean()
        return likelihood + of.warmth / examples * sum(layer.kl() for layer in model.layers)

    @nnx.jit
    def measured(model: LeNet, images: Array, labels: Array) -> dict[str, Any]:
        zeros = [layer.mean_kernel() == 0 for layer in model.layers]
        found = {f"sparsity of layer {i + 1}": of.mean() for i, of in enumerate(zeros)}
        found["sparsity"] = jnp.concatenate([of.ravel() for of in zeros]).mean()
        return {"test error": (model(images).argmax(-1) != labels).mean()} | found

    fitted = training.fit(
        loss,
        LeNet(train.images.shape[1], nnx.Rngs(args.seed)),
        optax.adam(optax.linear_schedule(args.rate, 0, total)),
        batch,
        seed=args.seed,
        steps=total,
        evaluate=lambda model: measured(model, test.images, test.labels),
        evaluate_every=steps,
        progress=not args.quiet,
    )
    return fitted, fitted.state


def draw_history(error: Axes, sparse: Axes, history: list[tuple[int, dict[str, float]]]) -> None:
    """Draws the test error, and the share of weights that are left in each layer, over the epochs."""
    epochs = np.arange(len(history)) + 1
    errors = 100 * np.array([of["test error"] for _, of in history])
    error.plot(epochs, errors, color="black", lw=2.5)
    error.annotate(f"{errors[-1]:.2f} %", (epochs[-1], errors[-1]), (0, 8), textcoords="offset points", ha="right")
    error.set(title="Test error", xlabel="epoch", ylabel="%", ylim=(0, 2.5 * np.median(errors)))
    names = [f"sparsity of layer {i}" for i in (1, 2, 3)]
    for name, color in zip([*names, "sparsity"], (*COLORS, "black"), strict=True):
        left = 100 * (1 - np.array([of[name] for _, of in history]))
        sparse.semilogy(epochs, left, color=color, lw=2.5)
        text = f"{name.removeprefix('sparsity of ').replace('sparsity', 'all')}: {left[-1]:.1f} %"
        place = (6, {"all": 2, "layer 1": -10}.get(text.partition(":")[0], -4))  # these two lie close
        sparse.annotate(text, (epochs[-1], left[-1]), place, textcoords="offset points", color=color)
    sparse.set(title="Weights left", xlabel="epoch", ylabel="%", yticks=[1, 10, 100], yticklabels=["1", "10", "100"])


def draw_pixels(ax: Axes, model: LeNet, test: Batch) -> None:
    """Draws how many weights each pixel has left, beside the mean digit."""
    left = np.asarray(model.layers[0].mean_kernel() != 0).sum(1)
    side = int(np.sqrt(len(left)))
    shown = ax.imshow(left.reshape(side, side), cmap="Blues", vmin=0)
    ax.contour(test.images.mean(0).reshape(side, side), [0.05], colors="black", linewidths=1)
    ax.set(title="Weights left of each pixel, of 300", xticks=[], yticks=[])
    ax.set_xlabel(f"{(left == 0).sum()} of {len(left)} have none; outlined: the mean digit")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(shown, ax=ax, shrink=0.8)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--data", type=Path, help="folder of MNIST's four files; without, scikit-learn's digits")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, in [0, 2^32)")
    parser.add_argument("--epochs", type=int, help="at least 1; by default 25, and 300 of scikit-learn's digits")
    parser.add_argument("--rate", type=float, default=2e-3, help="first learning rate, in (0, 1); it falls to 0")
    parser.add_argument("--warmup", type=float, default=0.3, help="share of steps until the divergence counts in full")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of sparse_lenet.png and .json")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (25 if args.data else 300)
    args.epochs = max(1, args.epochs // 10) if args.quick else args.epochs
    for name, least, below in (("seed", 0, 2**32), ("epochs", 1, 10**5), ("rate", 1e-9, 1), ("warmup", 0, 1)):
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
    train, test = load(args.data, args.seed)
    started = time.monotonic()
    fitted, model = fit(train, test, args)
    seconds = time.monotonic() - started
    results = fitted.history[-1][1]
    print(f"{len(train.labels):,} training digits, {args.epochs} epochs, {seconds:.0f} s; after the last epoch")
    for name, value in results.items():
        print(f"{name:<22}{100 * value:8.2f} %")
    print(f"{'weights left, 1 in':<22}{1 / max(1 - results['sparsity'], 1e-9):8.1f}")
    about = {
        "results": results,
        "history": fitted.history,
        "seconds": seconds,
        "options": vars(args),
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, flax, optax, np, sklearn, matplotlib)},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    (args.out / "sparse_lenet.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.33, 4.2), layout="constrained")
        error, sparse, pixels = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        draw_history(error, sparse, fitted.history)
        draw_pixels(pixels, model, test)
        figure.savefig(args.out / "sparse_lenet.png", dpi=200)
    print(f"Wrote sparse_lenet.png and sparse_lenet.json into {args.out}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
