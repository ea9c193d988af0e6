"""The pure functions, one family a file; `dropjax` itself exports them."""
