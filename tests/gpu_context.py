# SPDX-License-Identifier: Apache-2.0
"""What the tests of `benchmarks/gpu` stand on."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu.context import Context, Results


def context(tmp_path, section="encoder", seconds=60.0) -> Context:
    """Of a section on CPU tensors and tiny shapes that has so many seconds."""
    found = Context("cpu", True, Results(tmp_path / "results.json"), section)
    found.deadline = time.time() + seconds
    found.results.begin(section, {"device": "test"})
    return found
