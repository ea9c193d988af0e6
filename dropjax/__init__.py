"""Dropout for JAX: masks that are a pure function of a key and of each element's place.

The functions are here; the layers are in `dropjax.linen` and `dropjax.nnx`, Monte Carlo dropout in
`dropjax.mc`, the training loop in `dropjax.training`.
"""

from dropjax.functional.elementwise import alpha_dropout as alpha_dropout
from dropjax.functional.elementwise import dropout as dropout
from dropjax.functional.elementwise import gaussian_dropout as gaussian_dropout
from dropjax.functional.structured import spatial_dropout as spatial_dropout
from dropjax.masks import apply_mask as apply_mask
from dropjax.masks import keep_mask as keep_mask

__version__ = "0.1.0"
