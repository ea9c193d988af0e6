"""The dropout layers for Flax Linen.

`Dropout` takes what `flax.linen.Dropout` takes, in the same order. Every layer also accepts a key at the
call (`rng=`) and the place of its piece (`start=`).
"""

from typing import TYPE_CHECKING

from dropjax import _names
from dropjax.linen import calls, layers, learned, wrappers
from dropjax.linen.calls import *  # noqa: F403  # all of its __all__, so that a new layer is named there alone
from dropjax.linen.layers import *  # noqa: F403  # likewise
from dropjax.linen.learned import *  # noqa: F403  # likewise
from dropjax.linen.monte_carlo import mc_apply as mc_apply
from dropjax.linen.monte_carlo import mc_draws as mc_draws
from dropjax.linen.rates import with_rates as with_rates
from dropjax.linen.replace import replace_flax as replace_flax
from dropjax.linen.wrappers import *  # noqa: F403  # likewise

if not TYPE_CHECKING:
    __getattr__, __dir__ = _names.lazy(__name__)

__all__ = ["mc_apply", "mc_draws", "replace_flax", "with_rates"]
__all__ += calls.__all__
__all__ += layers.__all__
__all__ += learned.__all__
__all__ += wrappers.__all__
