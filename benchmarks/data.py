"""Speed of the data path on one core: `python benchmarks/data.py [--sequences 1000000]`.

Generates synthetic sequences, then times, for one epoch: the order of the epoch, gather, masking,
and all of it together. Prints sequences per second of wall time and of CPU time (one thread, so the
latter does not depend on what else runs). --smoke is tiny.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from fastrec.data.corruptions import mask_items, mask_last
from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.synthetic import generate


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
    mask_id, cls_id, sep_id = (dataset.num_items + extra for extra in range(3))
    loader = SequenceLoader(
        dataset, "all", batch_size=options.batch_size, max_len=options.max_len, cls_id=cls_id,
        sep_id=sep_id,
    )  # fmt: skip
    tokens = {"num_items": dataset.num_items, "mask_id": mask_id}

    def mask(batch, step, **more):
        return mask_items(batch, seed=1, step=step, probability=0.2, **tokens, **more)

    corruptions = {
        "gather": lambda batch, step: None,
        "gather + mask_items": mask,
        "gather + mask_items 80/10/10": lambda batch, step: mask(
            batch, step, replace_probability=0.8, random_probability=0.1
        ),
        "gather + mask_last": lambda batch, step: mask_last(batch, **tokens),
    }
    batches = len(loader)
    events = 0
    for name, corrupt in corruptions.items():
        # Every pass is a new epoch, so each time includes its order.
        start, cpu = time.perf_counter(), time.process_time()
        for step, batch in enumerate(loader):
            corrupt(batch, step)
            events += len(batch.values)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(
            f"{name:<30}{dataset.num_users / seconds:>11,.0f} sequences/s"
            f"{dataset.num_users / cpu:>11,.0f} per CPU second"
            f"{cpu / batches * 1e3:>7.2f} CPU ms per batch of {options.batch_size}"
        )
    print(f"tokens per batch: {events / batches / len(corruptions):,.0f}")
    order = timed(lambda: loader.users_at(batches * 10))
    print(f"order of an epoch: {order * 1e3:.0f} ms (included above)")


if __name__ == "__main__":
    main()
