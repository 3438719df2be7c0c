# SPDX-License-Identifier: Apache-2.0
"""`fastrec prepare` at size, beside a polars script that does the same without its checks.

    python benchmarks/prepare.py source --events 65_700_000 --file events.csv   (or .parquet)
    python benchmarks/prepare.py run --file events.csv [--only fastrec polars polars-1GB]

`source` writes events block by block: users and items of Zipf-like popularity, times that are a
permutation inside each block and all different, so that there are no duplicates. `run` prepares the
file with each in a process of its own, prints wall and CPU seconds, events per second, peak memory
and a digest of the values.npy that it writes. "polars-1GB" is the script with the budget of 1 GB
that polars' streaming engine has for what does not fit in memory.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BLOCK = 1 << 20


def write_source(file: Path, events: int, users: int, items: int, seed: int) -> None:
    import polars as pl

    rng = np.random.default_rng(seed)
    # Activity of users: log-normal; popularity of items: Zipf with a flat head.
    activity = np.cumsum(np.exp(1.25 * rng.standard_normal(users)))
    popularity = np.cumsum(1 / (np.arange(items) + 50.0) ** 0.8)
    names = rng.permutation(items) + 1

    def blocks():
        for start in range(0, events, BLOCK):
            count = min(BLOCK, events - start)
            user = np.searchsorted(activity, rng.random(count) * activity[-1])
            item = names[np.searchsorted(popularity, rng.random(count) * popularity[-1])]
            when = 1_400_000_000 + 2 * (start + rng.permutation(count))
            yield pl.DataFrame({"user_id": user + 1, "item_id": item, "timestamp": when})

    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        writer = None
        for block in blocks():
            table = block.to_arrow()
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()
        return
    with file.open("wb") as out:
        for number, block in enumerate(blocks()):
            block.write_csv(out, include_header=number == 0)


def with_polars(file: Path, output: Path, k: int) -> None:
    """What a data engineer would write: no check of what the file holds."""
    import polars as pl

    output.mkdir(parents=True)
    scan = pl.scan_parquet if file.suffix == ".parquet" else pl.scan_csv
    events = scan(file).select("user_id", "item_id", "timestamp")
    while True:
        counts = [
            events.group_by(name).len().filter(pl.col("len") >= k).select(name)
            for name in ("user_id", "item_id")
        ]
        before, users, items = pl.collect_all(
            [events.select(pl.len()), *counts], engine="streaming"
        )
        kept = events.join(users.lazy(), on="user_id", how="semi")
        kept = kept.join(items.lazy(), on="item_id", how="semi")
        if kept.select(pl.len()).collect(engine="streaming").item() == before.item():
            break
        events = kept
    numbers = [
        table.sort(name).with_row_index(name.removesuffix("_id"))
        for name, table in (("user_id", users), ("item_id", items))
    ]
    (
        events.with_row_index("row")
        .join(numbers[0].lazy(), on="user_id")
        .join(numbers[1].lazy(), on="item_id")
        .sort("user", "timestamp", "row")
        .select("user", "item", "timestamp")
        .sink_parquet(output / "interactions.parquet", engine="streaming")
    )
    written = pl.scan_parquet(output / "interactions.parquet")
    lengths = written.group_by("user").len().sort("user").collect(engine="streaming")["len"]
    np.save(output / "offsets.npy", np.concatenate(([0], np.cumsum(lengths.to_numpy()))))
    values = written.select(pl.col("item").cast(pl.Int32)).collect(engine="streaming")
    np.save(output / "values.npy", values["item"].to_numpy())
    for name, table in (("users", numbers[0]), ("items", numbers[1])):
        table.write_parquet(output / f"{name}.parquet")


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak resident GiB) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, cpu, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["source", "run", "polars"])
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--events", type=int, default=65_700_000)
    parser.add_argument("--users", type=int, default=646_233)
    parser.add_argument("--items", type=int, default=141_939)
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", default=["fastrec", "polars", "polars-1GB"])
    options = parser.parse_args()
    file, k = options.file, options.k_core
    if options.action == "source":
        return write_source(file, options.events, options.users, options.items, options.seed)
    if options.action == "polars":
        return with_polars(file, options.output, k)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        for name in options.only:
            output = Path(folder) / name
            common = ["--output", str(output)]
            if name == "fastrec":
                common += ["--source", str(file), "--k_core", str(k)]
                command = [sys.executable, "-m", "fastrec", "prepare", *common]
            else:
                command = [sys.executable, __file__, "polars", "--file", str(file), *common]
                command += ["--k-core", str(k)]
            budget = {"POLARS_OOC_MEMORY_BUDGET_MB": "1000"} if name == "polars-1GB" else {}
            seconds, cpu, peak = measured(command, budget)
            values = output / "values.npy"
            events = (values.stat().st_size - 128) // 4
            digest = hashlib.sha256(values.read_bytes()).hexdigest()[:12]
            print(
                f"{name:<11} {seconds:7.1f} s, CPU {cpu:6.1f} s  {events / seconds / 1e6:5.2f}M"
                f" events/s  {peak:5.2f} GiB  values.npy {digest}",
                flush=True,
            )


if __name__ == "__main__":
    main()
