# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend that serves `backend=None` while something is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastrec import backend


@contextmanager
def native(device: str, name: str) -> Iterator[None]:
    """`backend=None` on `device` means `name`."""
    before = backend.NATIVE[device]
    backend.NATIVE[device] = name
    try:
        yield
    finally:
        backend.NATIVE[device] = before


def use_triton(device: str) -> None:
    """For the rest of the process: the Triton kernels, on CPU tensors through the interpreter."""
    backend.NATIVE[device] = "triton"
