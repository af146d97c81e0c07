"""Measurements: nothing here passes or fails. Run each as `python -m integration.bench.NAME` on a quiet machine."""
