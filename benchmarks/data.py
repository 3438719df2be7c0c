# SPDX-License-Identifier: Apache-2.0
"""Speed of the data path on one core: `python benchmarks/data.py [--sequences 1000000]`.

Generates synthetic sequences, then times, for one epoch: the order of the epoch and gather, and the
same with the steps of a view. Prints sequences per second of wall time and of CPU time (one thread,
so the latter does not depend on what else runs). --smoke is tiny.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from fastrec.data.batch import framed
from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader, epoch_order
from fastrec.data.prepare.synthetic import generate
from fastrec.data.side import SideData
from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.one_of import OneOf
from fastrec.data.steps.reorder import Reorder
from fastrec.data.views import Views

VIEWS = {
    "gather": [],
    "gather + mask": [Mask()],
    "gather + mask 80/10/10": [Mask(replace=0.8, random=0.1)],
    "gather + mask exact": [Mask(exact=True)],
    "gather + mask_last": [MaskLast()],
    "gather + next_item": [NextItem()],
    "gather + one_of": [OneOf([Crop(0.6), Mask(0.3), Reorder(0.6)])],
}


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=768)
    parser.add_argument("--max-len", type=int, default=30)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.sequences, options.items = 5_000, 500
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, items = Path(folder) / "data", options.items
        seconds = timed(lambda: generate(path, num_users=options.sequences, num_items=items))
        print(f"generate {options.sequences:,} users, {items:,} items: {seconds:.2f} s")
        dataset = SequenceDataset.load(path)
        print(f"load and validate {dataset.num_events:,} events: ", end="")
        print(f"{timed(lambda: SequenceDataset.load(path)) * 1e3:.1f} ms")
        report(dataset, options)


def report(dataset: SequenceDataset, options) -> None:
    tokens = dict(before=[dataset.num_items + 1], after=[dataset.num_items + 2])
    for name, steps in VIEWS.items():
        views = Views(
            {"main": steps}, partial(framed, **tokens), SideData(dataset, "all"), options.max_len
        )
        loader = SequenceLoader(views, batch_size=options.batch_size, seed=1)
        start, cpu, events = time.perf_counter(), time.process_time(), 0
        for batch in loader:
            events += len(batch["main"].values)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(
            f"{name:<30}{dataset.num_users / seconds:>11,.0f} sequences/s"
            f"{dataset.num_users / cpu:>11,.0f} per CPU second"
            f"{cpu / len(loader) * 1e3:>7.2f} CPU ms per batch of {options.batch_size}"
        )
    print(f"tokens per batch of the last: {events / len(loader):,.0f}")
    order = timed(lambda: epoch_order(loader.users, 1, 10))
    print(f"order of an epoch: {order * 1e3:.0f} ms (included above)")


if __name__ == "__main__":
    main()
