# SPDX-License-Identifier: Apache-2.0
"""Pages of a mapped array that does not fit in memory: fetched before they are used, and no others.

A page that is not in memory stops who reads it, and the system reads 32 more around it, of which a
batch of few users among millions needs none.
"""

import mmap
import os

import numpy as np

SHARE = 0.5  # of memory: smaller arrays are soon in it, best by what the system reads around


def read_singly(array: np.ndarray) -> bool:
    """Whether `array` is mapped and larger than `SHARE` of memory; then pages are read one by one
    from now on, and those that `fetch` names before they are used."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not isinstance(array.base, mmap.mmap) or array.nbytes <= SHARE * memory:
        return False
    array.base.madvise(mmap.MADV_RANDOM)
    return True


def fetch(array: np.memmap, starts: np.ndarray, ends: np.ndarray) -> None:
    """Have the system read array[starts[i]:ends[i]] without waiting for it. starts, ends: int64."""
    map_ = array.base
    if not isinstance(map_, mmap.mmap):
        raise TypeError(f"expected a mapped array, got one of {type(map_).__name__}")
    begin = array.offset % mmap.ALLOCATIONGRANULARITY  # where the array begins in the map
    first = (begin + starts * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
    lengths = begin + ends * array.itemsize - first
    some = ends > starts
    for at, length in zip(first[some].tolist(), lengths[some].tolist(), strict=True):
        map_.madvise(mmap.MADV_WILLNEED, at, length)
