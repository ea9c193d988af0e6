"""Monte Carlo dropout on handwritten digits: does a network know when it does not know?

A small convolutional network learns scikit-learn's 8x8 scans with dropout. At inference dropout stays on, and
the T passes are summarised. This compares them with the usual deterministic pass, on test digits and on digits
unlike those of training, prints what it finds, good or bad, and draws it in one figure:

    pip install '.[examples]'
    python examples/mc_digits.py
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import train_test_split

import dropjax
from dropjax import mc, training
from dropjax.linen import Dropout, SpatialDropout

CLASSES = np.arange(10)
NOISE = 5  # standard deviation, where pixels are in [0, 16]
METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "accuracy": lambda labels, p: accuracy_score(labels, p.argmax(-1)),
    "negative log likelihood": lambda labels, p: log_loss(labels, p, labels=CLASSES),
    "Brier score": lambda labels, p: ((p - np.eye(10)[labels]) ** 2).sum(-1).mean(),
    "calibration error": jax.jit(lambda labels, p: mc.calibration_error(p, labels)),
}
COLORS = "#D55E00", "#0072B2"  # deterministic and Monte Carlo, from Okabe and Ito's colour-blind-safe set
PALE, GREY = "#A6CBE3", "#707070"
STYLE: Any = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlepad": 9}


class Network(nn.Module):
    """Two convolutions and a dense head, with dropout of channels at half the rate between the convolutions."""

    rate: float

    @nn.compact
    def __call__(self, images: Array, deterministic: bool = True) -> Array:
        """Returns logits `[n, 10]` of images `[n, 8, 8]` whose pixels are in [0, 16]."""
        x = nn.relu(nn.Conv(16, (3, 3))(images[..., None] / 16))
        x = SpatialDropout(self.rate / 2, deterministic=deterministic)(x)
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = Dropout(self.rate, deterministic=deterministic)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(128)(x))
        x = Dropout(self.rate, deterministic=deterministic)(x)
        return nn.Dense(10)(x)


class Split(NamedTuple):
    """Images, float32 `[n, 8, 8]`, and labels, int32 `[n]`."""

    images: Any
    labels: Any


class Prediction(NamedTuple):
    """What both methods say of the same images; the deterministic pass is a single sample without dropout."""

    deterministic: mc.Classification
    monte_carlo: mc.Classification


def load(seed: int) -> list[Split]:
    """Returns 40 % of the digits for training, 10 % for validation, and 50 % for a test with narrow intervals."""
    images, labels = load_digits(return_X_y=True)
    half, test = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=seed)
    train, validation = train_test_split(half, test_size=0.2, stratify=labels[half], random_state=seed)
    images, labels = images.reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int32)
    return [Split(images[rows], labels[rows]) for rows in (train, validation, test)]


def change(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns the images as they are, and changed in three ways."""
    noise = np.random.default_rng(seed).normal(0, NOISE, images.shape).astype(np.float32)
    noisy = np.clip(images + noise, 0, 16)
    return {"clean": images, "rotated": np.rot90(images, axes=(1, 2)), "noisy": noisy, "inverted": 16 - images}


def fit(model: Network, train: Split, validation: Split, args: argparse.Namespace) -> training.Fit:
    """Trains on random batches with the loss of one pass with dropout."""

    def loss(variables: Any, data: Split, **options: Any) -> Array:
        logits: Any = model.apply(variables, data.images, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()

    def batch(step: int) -> Split:
        rows = np.random.default_rng([args.seed, step]).choice(len(train.labels), 64, replace=False)
        return Split(train.images[rows], train.labels[rows])

    return training.fit(
        lambda variables, data, key: loss(variables, data, deterministic=False, rngs={"dropout": key}),
        model.init(jax.random.key(args.seed), train.images[:1]),
        optax.adamw(optax.cosine_decay_schedule(3e-3, args.steps)),
        batch,
        seed=args.seed,
        steps=args.steps,
        evaluate=jax.jit(lambda variables: {"validation loss": loss(variables, validation)}),
        evaluate_every=20,
        checkpoint_dir=args.checkpoint_dir and args.checkpoint_dir / f"{args.seed}-{args.steps}-{args.rate}",
        progress=not args.quiet,
    )


def ask(model: Network, variables: Any, args: argparse.Namespace) -> tuple[Callable, Callable]:
    """Returns two compiled functions: the prediction for images, and the samples for some rows of them."""
    key = jax.random.key(args.seed)

    def logits(images: Array, key: Array | None = None) -> Any:
        rngs = {} if key is None else {"dropout": key}
        return model.apply(variables, images, deterministic=key is None, rngs=rngs)

    @jax.jit
    def predict(images: Array) -> Prediction:
        deterministic = mc.classify(lambda key: logits(images), key, 1)
        return Prediction(deterministic, mc.classify(lambda key: logits(images, key), key, args.samples, chunk_size=10))

    @jax.jit
    def probabilities(images: Array, rows: Array) -> Array:
        return mc.sample(lambda key: jax.nn.softmax(logits(images, key)[rows]), key, args.samples, chunk_size=10)

    return predict, probabilities


def measure(predictions: dict[str, Prediction], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each number of the table for both methods, `[2]`; AUROC is of telling changed digits from clean ones."""
    clean, *changed = predictions.values()

    def auroc(low: Any, high: Any) -> float:
        return roc_auc_score(np.repeat([0, 1], len(low)), np.concatenate([low, high]))

    found = {name: [metric(labels, of.probabilities) for of in clean] for name, metric in METRICS.items()}
    for name, other in zip(list(predictions)[1:], changed, strict=True):
        entropy = [auroc(a.predictive_entropy, b.predictive_entropy) for a, b in zip(clean, other, strict=True)]
        information = auroc(clean.monte_carlo.mutual_information, other.monte_carlo.mutual_information)
        found[f"AUROC of {name}, entropy"] = entropy
        found[f"AUROC of {name}, mutual information"] = [entropy[0], information]
    return {name: np.array(both, float) for name, both in found.items()}


def compare(predictions: dict[str, Prediction], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns and prints the numbers, with standard errors of their differences by a bootstrap over the digits."""
    resampled = np.random.default_rng(0).integers(len(labels), size=(100, len(labels)))
    replicas = [
        measure(jax.tree.map(lambda of, r=rows: of[r] if of.ndim else of, predictions), labels[rows])
        for rows in resampled
    ]
    results = {}
    print(f"{len(labels)} test digits{'':<24}deterministic  Monte Carlo   difference ± s.e.")
    for name, (usual, ours) in measure(predictions, labels).items():
        error = np.std([np.diff(replica[name]) for replica in replicas], ddof=1)
        print(f"{name:<37}{usual:13.4f}{ours:13.4f}   {ours - usual:+.4f} ± {error:.4f}")
        numbers = zip((*Prediction._fields, "difference", "error"), (usual, ours, ours - usual, error), strict=True)
        results[name] = {key: float(value) for key, value in numbers}
    print(f"AUROC: clean against rotated by 90°, noisy (σ = {NOISE} of 16), inverted; deterministic: always entropy.")
    return results


def draw_learning(ax: Axes, fitted: training.Fit) -> None:
    """Draws the losses of training and of validation."""
    window = min(25, len(fitted.losses))
    smooth = np.convolve(fitted.losses, np.full(window, 1 / window), "valid")
    steps, losses = zip(*[(step, of["validation loss"]) for step, of in fitted.history], strict=True)
    ax.semilogy(np.arange(len(smooth)) + window, smooth, color=GREY, lw=2.5)
    ax.semilogy(steps, losses, color="black", lw=2.5)
    ax.annotate("training, dropout on", (window, smooth[0]), (8, -4), textcoords="offset points", color=GREY)
    ax.annotate("validation, dropout off", (steps[-1], losses[-1]), (0, 10), textcoords="offset points", ha="right")
    ax.set(title="Learning", xlabel="step", ylabel="loss (nats)")


def draw_reliability(ax: Axes, clean: Prediction, labels: np.ndarray) -> None:
    """Draws accuracy over confidence with standard errors, in the bins that hold at least 5 digits."""
    ax.plot([0.3, 1], [0.3, 1], color=GREY, lw=1, ls="--")
    for of, color, name, place in zip(clean, COLORS, ("deterministic", "Monte Carlo"), (0.86, 0.94), strict=True):
        bins = jax.tree.map(np.asarray, mc.reliability(of.probabilities, labels, num_bins=10))
        confidence, accuracy, size = (values[bins.size >= 5] for values in bins)
        smooth = (accuracy * size + 1) / (size + 2)
        error = np.sqrt(smooth * (1 - smooth) / size)
        ax.errorbar(confidence, accuracy, error, color=color, marker="o", ms=7, lw=2.5, elinewidth=1)
        ax.text(0.03, place, name, color=color, weight="bold", transform=ax.transAxes)
    ax.set(title="Reliability on test digits", xlabel="confidence", ylabel="accuracy", ylim=(None, 1.03))


def draw_entropy(axes: Any, images: dict[str, np.ndarray], predictions: dict[str, Prediction], results: dict) -> None:
    """Draws histograms of the entropies, a row for each kind of digits; the first bin holds all that is below."""
    edges = np.geomspace(1e-5, np.log(10), 31)
    for ax, (name, both) in zip(axes, predictions.items(), strict=True):
        usual, ours = (np.clip(of.predictive_entropy, edges[0], edges[-1]) for of in both)
        ax.hist(ours, edges, color=PALE)
        ax.hist([usual, ours], edges, color=COLORS, histtype="step", lw=1.5)
        ax.set(xscale="log", yticks=[], xlim=(edges[0], edges[-1]))
        ax.spines["left"].set_visible(False)
        ax.tick_params(labelbottom=ax is axes[-1])
        ax.text(-0.17, 0.35, name, ha="right", transform=ax.transAxes)
        picture = ax.inset_axes((-0.15, 0, 0.13, 0.95))
        picture.imshow(images[name][0], cmap="gray_r", vmin=0, vmax=16)
        picture.axis("off")
        row = results.get(f"AUROC of {name}, entropy")
        texts = [f"AUROC {row[of]:.2f}" for of in both._fields] if row else ["deterministic", "Monte Carlo"]
        for text, color, place in zip(texts, COLORS, (0.25, 0.6), strict=True):
            ax.text(1.03, place, text, color=color, weight="bold", transform=ax.transAxes)
    axes[0].set_title("Uncertainty of changed digits")
    axes[-1].set_xlabel("predictive entropy (nats)")


def draw_digits(cells: Any, test: Split, rows: np.ndarray, samples: np.ndarray) -> None:
    """Draws digits and what their samples `[T, rows, 10]` say: the mean, and the range of the middle 90 %."""
    for (picture, bars), row, of in zip(cells.T, rows, samples.swapaxes(0, 1), strict=True):
        mean, label = of.mean(0), test.labels[row]
        picture.imshow(test.images[row], cmap="gray_r", vmin=0, vmax=16)
        picture.axis("off")
        bars.bar(CLASSES, mean, color=[COLORS[1] if c == label else PALE for c in CLASSES])
        bars.vlines(CLASSES, *np.percentile(of, [5, 95], axis=0), color="black", lw=1)
        bars.set(xticks=CLASSES, yticks=[0, 1], ylim=(0, 1), xlabel=f"says {mean.argmax()}, is {label}")
        bars.tick_params(axis="x", length=0, labelsize=10)
    cells[1, 0].set_ylabel("probability")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="seed of everything, in [0, 2^32)")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 64 digits, at least 1")
    parser.add_argument("--rate", type=float, default=0.3, help="dropout rate of the dense layers, in [0, 1)")
    parser.add_argument("--samples", type=int, default=100, help="Monte Carlo samples, at least 1")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of mc_digits.png and mc_digits.json")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of checkpoints, from which the same run resumes")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    for name, least, below in (("seed", 0, 2**32), ("steps", 1, 10**6), ("rate", 0, 1), ("samples", 1, 10**6)):
        if not least <= (value := getattr(args, name)) < below:
            parser.error(f"argument --{name}: must be in [{least}, {below}), got {value}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, compares, prints, and writes the results and the figure."""
    args = parse(argv)
    train, validation, test = load(args.seed)
    images = change(test.images, args.seed)
    model = Network(args.rate)
    fitted = fit(model, train, validation, args)
    predict, probabilities = ask(model, fitted.state, args)
    predictions = {name: jax.tree.map(np.asarray, predict(of)) for name, of in images.items()}
    results = compare(predictions, test.labels)
    about = {
        "results": results,
        "options": vars(args),
        "versions": {of.__name__: of.__version__ for of in (dropjax, jax, flax, optax, np, sklearn, matplotlib)},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    (args.out / "mc_digits.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    order = np.argsort(predictions["clean"].monte_carlo.predictive_entropy)
    first_of_class = np.sort(np.unique(test.labels[order], return_index=True)[1])
    rows = np.concatenate([order[first_of_class[:3]], order[:-5:-1]])
    samples = np.asarray(probabilities(test.images, rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.33, 7.5))
        top = figure.add_gridspec(1, 3, left=0.065, right=0.885, bottom=0.575, top=0.945, wspace=0.48)
        left = figure.add_gridspec(2, 3, left=0.065, right=0.42, bottom=0.135, top=0.41)
        right = figure.add_gridspec(2, 4, left=0.505, right=0.985, bottom=0.135, top=0.41)
        draw_learning(figure.add_subplot(top[0]), fitted)
        draw_reliability(figure.add_subplot(top[1]), predictions["clean"], test.labels)
        draw_entropy(top[2].subgridspec(4, 1).subplots(), images, predictions, results)
        draw_digits(left.subplots(), test, rows[:3], samples[:, :3])
        draw_digits(right.subplots(), test, rows[3:], samples[:, 3:])
        figure.text(0.065, 0.44, "Surest test digits of three classes", size=14, weight="bold")
        figure.text(0.505, 0.44, "Least sure test digits", size=14, weight="bold")
        caption = f"Bars: mean of {args.samples} samples, dark for the true class. Lines: middle 90 % of the samples."
        caption += " Entropies: the first bin holds all below."
        figure.text(0.065, 0.025, caption, color=GREY)
        figure.savefig(args.out / "mc_digits.png", dpi=200)
    print(f"Wrote mc_digits.png and mc_digits.json into {args.out}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
