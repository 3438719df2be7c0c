# SPDX-License-Identifier: Apache-2.0
"""Sections of `benchmarks/gpu_evidence.py`."""
