# SPDX-License-Identifier: Apache-2.0
"""Random calls of ops, valid and wrong, end in the right values or in an error that a caller
expects; a crash ends the process that makes them.

FASTREC_FUZZ sets how many; `make fuzz` makes 50,000 with an extension that is built with
-fsanitize=address (FASTREC_FUZZ_EXTENSION). A failure names its seed, see fuzz_ops.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = int(os.environ.get("FASTREC_FUZZ", 400))
BATCHES = max(1, min(10, CALLS // 400))


def environment() -> dict[str, str]:
    """That of a child; the sanitizer has to be loaded before everything else, and with it the
    library whose exceptions it watches."""
    if "FASTREC_FUZZ_EXTENSION" not in os.environ:
        return dict(os.environ)
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return os.environ | {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("batch", range(BATCHES))
def test_calls(batch, tmp_path):
    script, count = Path(__file__).with_name("fuzz_ops.py"), CALLS // BATCHES
    output = tmp_path / "calls.txt"
    with output.open("w") as file:
        arguments = [sys.executable, script, *map(str, (batch, count, BATCHES))]
        child = subprocess.run(
            arguments, stdout=file, stderr=subprocess.PIPE, text=True, env=environment()
        )
    lines = output.read_text().splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    last = lines[-1] if lines else "nothing was called"
    assert child.returncode == 0, "\n".join([*wrong[:20], last, child.stderr[-3000:]])
    assert last == f"{count} calls, 0 wrong"
