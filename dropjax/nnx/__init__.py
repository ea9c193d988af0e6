"""The dropout layers for Flax NNX.

`Dropout` takes what `flax.nnx.Dropout` takes, in the same order. Every layer also accepts a key at the
call (`rngs=`), so that plain `jax.jit`, `jax.grad` and `lax.scan` need no mutable stream, and the place of
its piece (`start=`).
"""

from typing import TYPE_CHECKING

from dropjax import _arguments, _names
from dropjax.nnx import calls, layers, learned, wrappers
from dropjax.nnx.base import Rate as Rate
from dropjax.nnx.calls import *  # noqa: F403  # all of its __all__, so that a new layer is named there alone
from dropjax.nnx.layers import *  # noqa: F403  # likewise
from dropjax.nnx.learned import *  # noqa: F403  # likewise
from dropjax.nnx.monte_carlo import mc_draws as mc_draws
from dropjax.nnx.monte_carlo import mc_view as mc_view
from dropjax.nnx.rates import set_rates as set_rates
from dropjax.nnx.replace import replace_flax as replace_flax
from dropjax.nnx.wrappers import *  # noqa: F403  # likewise

if not TYPE_CHECKING:
    __getattr__, __dir__ = _names.lazy(__name__)

__all__ = ["Rate", "mc_draws", "mc_view", "replace_flax", "set_rates"]
__all__ += calls.__all__
__all__ += layers.__all__
__all__ += learned.__all__
__all__ += wrappers.__all__

_arguments.layers(*map(globals().get, __all__))
