"""Monte Carlo dropout: samples, summaries of their uncertainty, and how well it is calibrated.

Everything takes `fn`, any function of a key that draws one forward pass, so it serves Linen, NNX, Haiku,
Equinox and plain JAX alike.
"""

from typing import TYPE_CHECKING

from dropjax import _names
from dropjax.mc import moments as moments
from dropjax.mc.calibration import Reliability as Reliability
from dropjax.mc.calibration import calibration_error as calibration_error
from dropjax.mc.calibration import reliability as reliability
from dropjax.mc.classification import Classification as Classification
from dropjax.mc.classification import classify as classify
from dropjax.mc.conformal import conformal_intervals as conformal_intervals
from dropjax.mc.conformal import conformal_residuals as conformal_residuals
from dropjax.mc.conformal import conformal_scores as conformal_scores
from dropjax.mc.conformal import conformal_sets as conformal_sets
from dropjax.mc.conformal import conformal_threshold as conformal_threshold
from dropjax.mc.explaining import Explanation as Explanation
from dropjax.mc.explaining import explain as explain
from dropjax.mc.regression import Regression as Regression
from dropjax.mc.regression import regress as regress
from dropjax.mc.sampling import sample as sample
from dropjax.mc.scores import Coverage as Coverage
from dropjax.mc.scores import brier as brier
from dropjax.mc.scores import crps as crps
from dropjax.mc.scores import crps_gaussian as crps_gaussian
from dropjax.mc.scores import interval_coverage as interval_coverage
from dropjax.mc.scores import negative_log_likelihood as negative_log_likelihood
from dropjax.mc.scores import pinball as pinball
from dropjax.mc.selection import Detection as Detection
from dropjax.mc.selection import RiskCoverage as RiskCoverage
from dropjax.mc.selection import detection as detection
from dropjax.mc.selection import risk_coverage as risk_coverage
from dropjax.mc.temperature import FittedTemperature as FittedTemperature
from dropjax.mc.temperature import fit_temperature as fit_temperature
from dropjax.mc.temperature import temperature_scale as temperature_scale

if TYPE_CHECKING:
    from dropjax.mc import plots as plots
else:
    __getattr__, __dir__ = _names.lazy(__name__, "plots")

__all__ = [
    "Classification",
    "Coverage",
    "Detection",
    "Explanation",
    "FittedTemperature",
    "Regression",
    "Reliability",
    "RiskCoverage",
    "brier",
    "calibration_error",
    "classify",
    "conformal_intervals",
    "conformal_residuals",
    "conformal_scores",
    "conformal_sets",
    "conformal_threshold",
    "crps",
    "crps_gaussian",
    "detection",
    "explain",
    "fit_temperature",
    "interval_coverage",
    "negative_log_likelihood",
    "pinball",
    "regress",
    "reliability",
    "risk_coverage",
    "sample",
    "temperature_scale",
]
