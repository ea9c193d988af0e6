"""The pure functions, one family a file; `dropjax` itself exports them."""

from typing import TYPE_CHECKING

from dropjax import _names

if not TYPE_CHECKING:
    __getattr__, __dir__ = _names.lazy(__name__)
