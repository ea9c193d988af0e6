"""Speed against peers and against the physical limit; run as `python -m benchmarks.NAME`."""
