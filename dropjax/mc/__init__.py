"""Monte Carlo dropout: samples, summaries of their uncertainty, and how well it is calibrated.

Everything takes `fn`, any function of a key that draws one forward pass, so it serves Linen, NNX, Haiku,
Equinox and plain JAX alike.
"""

from dropjax.mc.calibration import Reliability as Reliability
from dropjax.mc.calibration import calibration_error as calibration_error
from dropjax.mc.calibration import reliability as reliability
from dropjax.mc.sampling import sample as sample
from dropjax.mc.summaries import Classification as Classification
from dropjax.mc.summaries import classify as classify
