"""Figures of uncertainty, with matplotlib: each function draws on `ax`, or on a new figure, and returns the Axes.

    from dropjax.mc import plots

    plots.reliability(probabilities, labels).figure.savefig("reliability.png")

A new figure is not one of pyplot's: nothing is shown, or kept, that you do not hold.
"""

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from dropjax import _arguments, _checks
from dropjax.mc import _inputs, calibration, selection

__all__ = ["convergence", "entropies", "regression", "reliability", "risk_coverage"]

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dropjax.mc.plots: matplotlib must be installed, got no module matplotlib. pip install matplotlib."
    ) from error

BLUE, ORANGE, PALE, GREY = "#0072B2", "#D55E00", "#A6CBE3", "#707070"  # from Okabe and Ito's colour-blind-safe set


@_arguments.public
def regression(
    x: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    data: tuple[ArrayLike, ArrayLike] | None = None,
    color: Any = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Draws the mean over one input, with bands of one and two standard deviations.

    Args:
      x: real `[n]`, the inputs, in any order.
      mean: real `[n]`.
      std: real `[n]`, at least 0.
      data: the inputs and targets of points to draw.
      color: of the line and its bands.
      ax: where to draw; None for a new figure.

    Returns:
      The Axes.
    """
    x, mean, std = _rows("regression", x=x, mean=mean, std=std)
    _inputs.require("regression", "std must not be negative, {got}", std, lambda of: ~(of < 0))
    order = np.argsort(x)
    x, mean, std = x[order], mean[order], std[order]
    ax = _axes(ax)
    for width, alpha in [(2, 0.15), (1, 0.25)]:
        ax.fill_between(x, mean - width * std, mean + width * std, color=color, alpha=alpha, lw=0)
    ax.plot(x, mean, color=color, lw=2)
    if data is not None:
        ax.plot(*_rows("regression", inputs=data[0], targets=data[1]), ".", color="black", ms=4)
    ax.margins(x=0)  # holds all the points, and what was drawn before
    ax.set(xlabel="input", ylabel="mean, ± 1 and 2 standard deviations")
    return ax


@_arguments.public
def reliability(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 10,
    binning: calibration.Binning = "equal_width",
    label: str | None = None,
    color: Any = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Draws accuracy over confidence, with standard errors; the larger a point, the more predictions.

    Args:
      probabilities: float `[n, classes]`.
      labels: int `[n]`, the true classes.
      num_bins: number of bins.
      binning: `"equal_width"` or `"equal_mass"`, as for `dropjax.mc.reliability`.
      label: what to call it in a legend.
      color: of the points.
      ax: where to draw; None for a new figure. A second diagram on the same Axes adds to it.

    Returns:
      The Axes.
    """
    bins = calibration.reliability(probabilities, labels, num_bins=num_bins, binning=binning)
    confidence, accuracy, size = (np.asarray(of)[np.asarray(bins.size) > 0] for of in bins)
    smooth = (accuracy * size + 1) / (size + 2)  # so that a bin in which all are right has an error, too
    ax, low = _axes(ax), confidence.min() - 0.05
    if ax.lines:
        low = min(low, ax.get_xlim()[0])
    else:
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
    ax.errorbar(confidence, accuracy, np.sqrt(smooth * (1 - smooth) / size), color=color, fmt="none", elinewidth=1.5)
    ax.scatter(confidence, accuracy, 15 + 135 * size / size.max(), color=color, label=label, zorder=3)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(max(low, 0), 1.02), ylim=(0, 1.03))
    return _legend(ax, label)


@_arguments.public
def risk_coverage(
    uncertainty: ArrayLike,
    losses: ArrayLike,
    *,
    label: str | None = None,
    color: Any = BLUE,
    ax: Axes | None = None,
) -> Axes:
    """Draws the mean loss of the most certain predictions over the share of them that is kept.

    Args:
      uncertainty: real `[n]`, higher where less certain.
      losses: bool or real `[n]`: whether the prediction is wrong, or its loss.
      label: what to call it in a legend, which adds its area.
      color: of the line.
      ax: where to draw; None for a new figure.

    Returns:
      The Axes.
    """
    curve = selection.risk_coverage(uncertainty, losses)
    rule = "losses must have a finite mean, {got} Clip the infinite ones."
    _inputs.require("risk_coverage", rule, curve.risk, np.isfinite)
    ax = _axes(ax)
    name = None if label is None else f"{label}, area {float(curve.aurc):.4f}"
    ax.plot(np.asarray(curve.coverage), np.asarray(curve.risk), color=color, lw=2, label=name)
    ax.set(xlabel="share of predictions kept, most certain first", ylabel="their mean loss", xlim=(0, 1))
    curves = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    top = max(of[len(of) // 20 :].max() for of in curves)  # the first few are noise
    ax.set_ylim(min(0, *(of.min() for of in curves)), 1.1 * top if top > 0 else 1)
    return _legend(ax, label)


@_arguments.public
def entropies(
    usual: ArrayLike,
    foreign: ArrayLike,
    *,
    num_bins: int = 30,
    log: bool = False,
    xlabel: str = "predictive entropy (nats)",
    ax: Axes | None = None,
) -> Axes:
    """Draws histograms of an uncertainty of usual inputs against one of inputs of another kind, on the same bins.

    Args:
      usual: real `[n]`, the uncertainty of inputs like those of training.
      foreign: real `[m]`, that of inputs of another kind.
      num_bins: number of bins.
      log: whether the bins are equally wide in the logarithm, from a hundred thousandth of the highest
        value on; the first one holds all below.
      xlabel: what the uncertainty is.
      ax: where to draw; None for a new figure.

    Returns:
      The Axes.
    """
    (usual,), (foreign,) = _rows("entropies", usual=usual), _rows("entropies", foreign=foreign)
    for name, values in [("usual", usual), ("foreign", foreign)]:
        _inputs.require("entropies", f"{name} must be finite, {{got}} No bin holds it.", values, np.isfinite)
    num_bins = _checks.integer("entropies", "num_bins", num_bins, 1)
    high = max(usual.max(), foreign.max())
    if _checks.flag("entropies", "log", log) and not high > 0:
        raise ValueError(f"entropies: values must be above 0 where log=True, got at most {high:g}.")
    edges: Any
    if log:
        edges = np.geomspace(high * 1e-5, high, num_bins + 1)
    else:
        edges = np.histogram_bin_edges(np.concatenate([usual, foreign]), num_bins)
    ax = _axes(ax)
    for values, color, name in [(usual, BLUE, "usual"), (foreign, ORANGE, "foreign")]:
        share = np.full(len(values), 1 / len(values))
        inside = np.clip(values, edges[0], edges[-1])
        ax.hist(inside, edges, weights=share, color=color, alpha=0.3)
        ax.hist(inside, edges, weights=share, color=color, histtype="step", lw=1.5, label=name)
    ax.set(xlabel=xlabel, ylabel="share of inputs", xlim=(edges[0], edges[-1]), xscale="log" if log else "linear")
    return _legend(ax, "")


@_arguments.public
def convergence(samples: ArrayLike, *, color: Any = BLUE, ax: Axes | None = None) -> Axes:
    """Draws the mean of the first T samples over T, with two of its standard errors.

    The standard error is the samples' deviation divided by sqrt(T): where the band is wider than
    what matters, more samples are needed.

    Args:
      samples: real `[T]`, at least 2: one number of each sample, such as the probability of a class.
      color: of the line and its band.
      ax: where to draw; None for a new figure.

    Returns:
      The Axes.
    """
    (x,) = _rows("convergence", samples=samples)
    if len(x) < 2:
        raise ValueError("convergence: samples must be at least 2, got 1.")
    count = np.arange(1, len(x) + 1)
    mean = np.cumsum(x) / count
    centred = x - x.mean()
    square = np.cumsum(centred**2) - np.cumsum(centred) ** 2 / count
    error = 2 * np.sqrt(np.maximum(square[1:], 0) / count[:-1] / count[1:])
    ax = _axes(ax)
    before = (ax.get_xlim()[1], *ax.get_ylim()) if ax.lines else (3, np.inf, -np.inf)
    ax.fill_between(count[1:], mean[1:] - error, mean[1:] + error, color=color, alpha=0.25, lw=0)
    ax.plot(count, mean, color=color, lw=2)
    ax.axhline(mean[-1], color=GREY, lw=1, ls="--")
    ax.set(xlabel="samples", ylabel="mean ± 2 standard errors", xscale="log", xlim=(2, max(len(x), before[0])))
    spread = 2.5 * error[min(8, len(error) - 1)]  # the first bands, of a few samples, would fill the figure
    if spread > 0:
        ax.set_ylim(min(mean[-1] - spread, before[1]), max(mean[-1] + spread, before[2]))
    return ax


def _rows(function: str, **values: ArrayLike) -> tuple[np.ndarray, ...]:
    if any(not _checks.is_known(of) for of in values.values()):
        raise TypeError(f"{function}: {' and '.join(values)} must be known values, got traced ones. Draw outside jit.")
    found = _inputs.numbers(function, **values)
    if found[0].ndim != 1:
        raise ValueError(f"{function}: {' and '.join(values)} must be of shape [n], got {_checks.describe(found[0])}.")
    return tuple(np.asarray(of).astype(np.float64) for of in found)


def _axes(ax: Axes | None) -> Axes:
    return Figure(figsize=(5, 4), layout="constrained").add_subplot() if ax is None else ax


def _legend(ax: Axes, label: str | None) -> Axes:
    if label is not None:
        ax.legend(frameon=False)
    return ax
