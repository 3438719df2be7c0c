# SPDX-License-Identifier: Apache-2.0
"""Work in other threads, in order: polars and numpy let go of the interpreter as they compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_NONE = object()
_THREADS = 2


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, the next of which is made while one is used."""
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, _NONE)
        while (item := coming.result()) is not _NONE:
            coming = pool.submit(next, source, _NONE)
            yield item  # type: ignore[misc]


def mapped(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each item in their order, two at a time and no more ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        coming: deque = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > _THREADS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
