"""Measurements against peers, side by side. `python -m benchmarks` runs them; see __main__.py."""
