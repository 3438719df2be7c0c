# SPDX-License-Identifier: Apache-2.0
"""The code of docs/integrations.md runs as it stands, where the library is installed."""

from pathlib import Path

import pytest

import fastrec

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations.md"


def run(library: str) -> dict:
    pytest.importorskip(library, reason=f"{library} is not installed")
    block = PAGE.read_text().split(f"<!-- {library} -->")[1].split(f"<!-- /{library} -->")[0]
    names: dict = {}
    try:
        exec(compile(block.split("```python")[1].split("```")[0], library, "exec"), names)
    finally:
        fastrec.unpatch()
    return names


def test_transformers():
    (report,) = run("transformers")["patch"].reports
    assert report.model == "BertForMaskedLM" and report.loss_difference < 1e-5
