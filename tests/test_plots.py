"""Plots draw what the numbers say, on the Axes they are given, and leave nothing in pyplot."""

import os
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from dropjax import mc
from dropjax.mc import plots

RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(3), 200).astype(np.float32)
Y = RNG.integers(0, 3, 200)
U = RNG.uniform(size=200).astype(np.float32)
PLOTS = {
    "regression": lambda ax: plots.regression(U, U, U, data=(U, U), ax=ax),
    "reliability": lambda ax: plots.reliability(P, Y, binning="equal_mass", label="network", ax=ax),
    "risk_coverage": lambda ax: plots.risk_coverage(U, U > 0.5, label="network", ax=ax),
    "entropies": lambda ax: plots.entropies(U, U + 1, log=True, ax=ax),
    "convergence": lambda ax: plots.convergence(U, ax=ax),
}


@pytest.fixture(autouse=True)
def agg(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS.keys())
def test_every_plot_draws_on_its_axes_or_on_a_new_figure(draw):
    before = dict(mpl.rcParams)
    ax = Figure().add_subplot()
    assert draw(ax) is ax
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert draw(ax) is ax  # a second time adds to it
    new = draw(None)
    assert new.figure is not ax.figure
    new.figure.canvas.draw()
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_is_drawn_is_what_is_measured():
    curve = mc.risk_coverage(U, U > 0.5)
    (line,) = plots.risk_coverage(U, U > 0.5, label="network").lines
    np.testing.assert_array_equal(line.get_xydata(), np.stack([curve.coverage, curve.risk], -1))
    assert line.get_label() == f"network, area {float(curve.aurc):.4f}"

    bins = mc.reliability(P, Y, num_bins=5)
    filled = np.asarray(bins.size) > 0
    points = plots.reliability(P, Y, num_bins=5).collections[-1].get_offsets()
    np.testing.assert_allclose(points, np.stack([bins.confidence, bins.accuracy], -1)[filled], rtol=1e-6)

    ax = plots.convergence(U)
    np.testing.assert_allclose(ax.lines[0].get_ydata()[[0, 9, -1]], [U[0], U[:10].mean(), U.mean()], rtol=1e-5)
    band = ax.collections[0].get_paths()[0].vertices
    for t in [2, 10, 200]:  # two standard errors of the mean, with the unbiased variance
        ends = band[np.isclose(band[:, 0], t)][:, 1]
        expected = 4 * U[:t].astype(float).std(ddof=1) / np.sqrt(t)
        np.testing.assert_allclose(np.ptp(ends), expected, rtol=1e-5)

    bars = np.array([patch.get_height() for patch in plots.entropies(U, U + 1).patches if hasattr(patch, "get_height")])
    np.testing.assert_allclose(bars.sum(), 2, rtol=1e-6)  # shares of both

    order = np.argsort(U)
    np.testing.assert_allclose(plots.regression(U, 2 * U, U).lines[0].get_xydata()[:, 1], 2 * U[order], rtol=1e-6)


def test_what_was_drawn_before_stays_in_sight():
    ax = plots.regression(U, U, U, data=([-3.0], [0.0]))
    plots.regression(U + 4, U, U, ax=ax)
    np.testing.assert_allclose(ax.get_xlim(), [-3, U.max() + 4], rtol=1e-6)
    ax = plots.convergence(U)
    (low, high), _ = ax.get_ylim(), plots.convergence(U[:20] + 4, ax=ax)
    assert ax.get_xlim()[1] == 200
    assert ax.get_ylim()[0] == low
    assert ax.get_ylim()[1] > 4 > high


def test_bad_input():
    for call, message in [
        (lambda: plots.regression(U, U, -U), "regression: std must not be negative, got -"),
        (lambda: plots.regression(P, P, P), "regression: x and mean and std must be of shape [n], got float32[200,3]."),
        (lambda: plots.convergence(U[:1]), "convergence: samples must be at least 2, got 1."),
        (
            lambda: plots.entropies(0 * U, 0 * U, log=True),
            "entropies: values must be above 0 where log=True, got at mo",
        ),
        (lambda: plots.entropies(U, U * np.nan, log=True), "entropies: foreign must be finite, got nan."),
        (lambda: plots.entropies(U + np.inf, U), "entropies: usual must be finite, got inf."),
        (lambda: plots.risk_coverage(U, U + np.inf), "risk_coverage: losses must have a finite mean, got inf."),
        (lambda: plots.entropies(U, U, num_bins=0), "entropies: num_bins must be at least 1, got 0."),
    ]:
        with pytest.raises(ValueError, match=r".") as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "draw",
    [
        lambda summary: plots.regression(U, summary, U),
        lambda summary: plots.regression(U, U, summary),
        lambda summary: plots.reliability(summary, Y),
        lambda summary: plots.risk_coverage(summary, U),
        lambda summary: plots.entropies(U, summary),
        lambda summary: plots.convergence(summary),
    ],
)
def test_a_whole_summary_is_none_of_its_fields(draw):
    with pytest.raises(
        TypeError, match=r"must be an array, got a Regression\. Pass (its field mean|one of its fields: mean, ep)"
    ):
        draw(mc.Regression(*[np.zeros(3)] * 8))


def test_importing_mc_needs_neither_matplotlib_nor_scikit_learn():
    code = "import sys; sys.modules['matplotlib'] = sys.modules['sklearn'] = None\n"
    code += "import dropjax.mc\ntry:\n    import dropjax.mc.plots\nexcept ImportError as error:\n    print(error)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "dropjax.mc.plots: matplotlib must be installed, got no module matplotlib." in run.stdout, run.stderr
