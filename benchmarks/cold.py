# SPDX-License-Identifier: Apache-2.0
"""Training batches of a data set on disk, first with its pages out of the cache, then with them in.

    python benchmarks/cold.py --data DATA [--batches 400] [--batch-size 256] [--max-len 50]

The pages of values.npy and offsets.npy are dropped (`posix_fadvise`: other files stay cached), the
batches of an epoch's beginning are read, and the same batches again. Prints sequences and events a
second of wall time, and how much of values.npy the cold batches brought in.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-len", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = SequenceDataset.load(options.data, validate=False)
    print(f"{dataset.num_users:,} users, {dataset.num_events:,} events")
    views = Views({"main": [NextItem()]}, lambda batch: batch, SideData(dataset), options.max_len)
    for name in ("cold", "warm"):
        loader = SequenceLoader(views, batch_size=options.batch_size, seed=1)
        loader._users_of_all_ranks(0)  # the order of the epoch
        if name == "cold":
            for file in ("values.npy", "offsets.npy"):
                drop(options.data / file)
        events, read, start = 0, read_bytes(), time.perf_counter()
        for step in range(options.batches):
            events += len(loader.batch_at(step)["main"].values)
        seconds = time.perf_counter() - start
        sequences = options.batches * options.batch_size
        print(
            f"{name}: {sequences / seconds:,.0f} sequences/s, {events / seconds:,.0f} events/s,"
            f" {(read_bytes() - read) / 2**20:,.0f} MiB read"
        )


if __name__ == "__main__":
    main()
