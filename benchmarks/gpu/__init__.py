"""Sections of `benchmarks/gpu_evidence.py`."""
