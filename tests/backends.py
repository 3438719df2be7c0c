# SPDX-License-Identifier: Apache-2.0
"""Tests by backend: one that cannot run here is skipped with its reason, not left out."""

import pytest
import torch

from fastrec.backend import unavailable_reason


def needs(backend: str, op: str) -> pytest.MarkDecorator:
    why = unavailable_reason(backend, op, torch.device("cpu"))
    return pytest.mark.skipif(why is not None, reason=str(why))


def params(op: str, *names: str) -> list:
    return [pytest.param(name, marks=needs(name, op)) for name in names]


def backends(op: str, *names: str) -> pytest.MarkDecorator:
    """The test runs with `backend` as each of `names`."""
    return pytest.mark.parametrize("backend", params(op, *names))
