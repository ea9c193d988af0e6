"""How far may the uncertainty of Monte Carlo dropout be trusted? The judges of `dropjax.mc` on handwritten digits.

Trains the network of mc_digits.py, then judges its probabilities, plain and with dropout on: calibration before and
after a temperature, selective prediction, detection of rotated digits, conformal sets, and how many samples it took.
The temperature and the conformal threshold come from 450 held-out digits, all numbers from the other 449:

    pip install '.[examples]'
    python examples/judge_digits.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import mc_digits
import numpy as np
from matplotlib.figure import Figure

from dropjax import mc
from dropjax.mc import plots

ALPHA = 0.01


def predict(model: mc_digits.Network, variables: Any, args: argparse.Namespace) -> Any:
    """Returns a compiled function of images: the logits of one pass without dropout, `[1, n, 10]`, and of samples."""

    @jax.jit
    def logits(images: Any) -> tuple[Any, Any]:
        def one_pass(key: Any) -> Any:
            return model.apply(variables, images, deterministic=False, rngs={"dropout": key})

        samples = mc.sample(one_pass, jax.random.key(args.seed), args.samples, chunk_size=10)
        plain: Any = model.apply(variables, images)
        return plain[None], samples

    return logits


def entropy(p: Any) -> Any:
    """Returns the entropies `[n]` of probabilities `[n, classes]`, in nats."""
    return -jax.scipy.special.xlogy(p, p).sum(-1)


def judge(held_out: Any, new: Any, rotated: Any, labels: tuple[Any, Any]) -> dict[str, Any]:
    """Returns the numbers of one method; the logits are `[T, n, 10]`."""
    before = jax.nn.softmax(new).mean(0)
    fitted = mc.fit_temperature(held_out, labels[0])
    known, p, foreign = (
        jax.nn.softmax(mc.temperature_scale(of, fitted.temperature)).mean(0) for of in (held_out, new, rotated)
    )
    threshold = mc.conformal_threshold(mc.conformal_scores(known, labels[0]), ALPHA)
    sets = np.asarray(mc.conformal_sets(p, threshold))
    detection = mc.detection(entropy(p), entropy(foreign))
    return {
        "temperature": fitted.temperature,
        "negative log likelihood, before": mc.negative_log_likelihood(before, labels[1]),
        "negative log likelihood, after": mc.negative_log_likelihood(p, labels[1]),
        "calibration error, before": mc.calibration_error(before, labels[1]),
        "calibration error, after": mc.calibration_error(p, labels[1]),
        "classwise error of equal mass, after": mc.calibration_error(
            p, labels[1], classwise=True, binning="equal_mass"
        ),
        "area under risk-coverage": mc.risk_coverage(entropy(p), p.argmax(-1) != labels[1]).aurc,
        "AUROC of rotated": detection.auroc,
        "AUPR of rotated": detection.aupr,
        "FPR at 95 % TPR of rotated": detection.fpr_at_95_tpr,
        f"coverage of the {1 - ALPHA:.0%} sets": sets[np.arange(len(labels[1])), labels[1]].mean(),
        "mean size of the sets": sets.sum(-1).mean(),
        "mean size of the sets of rotated": mc.conformal_sets(foreign, threshold).sum(-1).mean(),
    }


def draw(new: Any, rotated: Any, labels: Any, temperature: Any, path: Path) -> None:
    """Draws what the samples `[T, n, 10]` say."""
    p, scaled = (jax.nn.softmax(of).mean(0) for of in (new, mc.temperature_scale(new, temperature)))
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    plots.reliability(p, labels, num_bins=6, label="as trained", color=plots.ORANGE, ax=axes[0])
    plots.reliability(scaled, labels, num_bins=6, label=f"temperature {float(temperature):.2f}", ax=axes[0])
    plots.risk_coverage(entropy(p), p.argmax(-1) != labels, label="entropy", ax=axes[1])
    plots.risk_coverage(0 * entropy(p), p.argmax(-1) != labels, label="any order", color=plots.ORANGE, ax=axes[1])
    plots.entropies(entropy(p), entropy(jax.nn.softmax(rotated).mean(0)), log=True, ax=axes[2])
    least_sure = int(entropy(p).argmax())
    plots.convergence(jax.nn.softmax(new)[:, least_sure, p[least_sure].argmax()], ax=axes[3])
    titles = [
        "Reliability",
        "Risk of the digits kept",
        "Rotated digits (foreign)",
        "Probability of the least sure digit",
    ]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", weight="bold")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, judges, prints, and writes the figure; the options are those of mc_digits.py."""
    args = mc_digits.parse(argv)
    train, validation, test = mc_digits.load(args.seed)
    model = mc_digits.Network(args.rate)
    logits = predict(model, mc_digits.fit(model, train, validation, args).state, args)
    half = (len(test.labels) + 1) // 2
    held_out = logits(test.images[:half])
    new = logits(test.images[half:])
    rotated = logits(mc_digits.change(test.images[half:], args.seed)["rotated"])
    labels = test.labels[:half], test.labels[half:]
    methods = [judge(*of, labels) for of in zip(held_out, new, rotated, strict=True)]
    print(f"{half} held-out and {len(labels[1])} test digits{'':<10}deterministic  Monte Carlo")
    for name in methods[0]:
        print(f"{name:<37}{float(methods[0][name]):13.4f}{float(methods[1][name]):13.4f}")
    draw(new[1], rotated[1], labels[1], methods[1]["temperature"], args.out / "judge_digits.png")
    print(f"Wrote judge_digits.png into {args.out}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
