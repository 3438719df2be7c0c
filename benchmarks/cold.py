# SPDX-License-Identifier: Apache-2.0
"""Training batches from arrays on disk whose pages are not in the cache of the system.

    python benchmarks/cold.py [--events 65_700_000] [--users 646_233] [--folder /a/disk]

Writes values and offsets of random items and lengths, and reads the first batches of an epoch: with
the pages in the cache, with the pages dropped (`posix_fadvise`), and so again as the loader reads
arrays larger than memory (`fastrec.data.paging`). Prints sequences and events a second of wall
time, and what the disk read. Each way starts with another seed: the disk may have a cache.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastrec.data import paging
from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views


def write_arrays(folder: Path, users: int, events: int, items: int) -> None:
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(0, events, users - 1))
    np.save(folder / "offsets.npy", np.concatenate(([0], cuts, [events])))
    np.save(folder / "values.npy", rng.integers(0, items, events, dtype=np.int32))


def drop(file: Path) -> None:
    """Take the pages of a file out of the cache of the system."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read_bytes() -> int:
    """Bytes that this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def report(name: str, folder: Path, options, seed: int, cold: bool) -> None:
    values, offsets = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("values", "offsets"))
    schema = {"num_users": options.users, "num_items": options.items}
    schema["num_interactions"] = options.events
    if cold:
        drop(folder / "values.npy")
    else:
        values.sum()
    side = SideData(SequenceDataset(folder, schema, values, np.array(offsets)))
    views = Views({"main": [NextItem()]}, lambda batch: batch, side, options.max_len)
    loader = SequenceLoader(views, batch_size=options.batch_size, seed=seed)
    loader._users_of_all_ranks(0)  # the order of the epoch is made before
    events, read, start = 0, read_bytes(), time.perf_counter()
    for step in range(options.batches):
        events += len(loader.batch_at(step)["main"].values)
    seconds = time.perf_counter() - start
    sequences = options.batches * options.batch_size
    print(
        f"{name:<14} {sequences / seconds:9,.0f} sequences/s {events / seconds:12,.0f} events/s"
        f" {(read_bytes() - read) / 2**20:7,.0f} MiB read"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=65_700_000)
    parser.add_argument("--users", type=int, default=646_233)
    parser.add_argument("--items", type=int, default=141_939)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_arrays(Path(folder), options.users, options.events, options.items)
        report("in the cache", Path(folder), options, 1, cold=False)
        for turn in range(2):
            paging.SHARE = 1e9
            report("cold", Path(folder), options, 2 + turn, cold=True)
            paging.SHARE = 0.0
            report("cold, fetched", Path(folder), options, 4 + turn, cold=True)


if __name__ == "__main__":
    main()
