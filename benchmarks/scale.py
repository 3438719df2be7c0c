# SPDX-License-Identifier: Apache-2.0
"""What a size needs on paper: memory, network and steps per second of 8 and 64 GPUs.

    python benchmarks/scale.py [--items 1e8] [--events 1e10] [--gpu H200] ...

Nothing here is measured on a GPU. Rates of the hardware are those that its maker publishes; shares
of them that a step reaches are assumptions (`--compute`, `--bandwidth`), to be replaced by what
`benchmarks/gpu_evidence.py` measures. Sums of times assume that nothing overlaps: an upper bound.

Letters: V items, D width, E events, U users, G GPUs, T events of a step on one GPU, K negatives,
R distinct rows of a step on one GPU.
"""

import argparse
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """Published rates: bf16 products without sparsity in operations/s, bytes/s of memory, bytes of
    memory; bytes/s in one direction between GPUs of a host and of one GPU to other hosts."""

    products: float
    memory_rate: float
    memory: float
    inside: float
    outside: float


# NVIDIA's data sheets of H100 SXM, H200 SXM and B200 (HGX): NVLink 4 and 5 have 900 and 1,800 GB/s,
# half of it in each direction; hosts with one 400 Gb/s InfiniBand (NDR) adapter a GPU.
GPUS = {
    "H100": Gpu(989e12, 3.35e12, 80 * GB, 450 * GB, 50 * GB),
    "H200": Gpu(989e12, 4.8e12, 141 * GB, 450 * GB, 50 * GB),
    "B200": Gpu(2250e12, 8e12, 180 * GB, 900 * GB, 50 * GB),
}
HOST = 8  # GPUs of a host


def state_bytes(width: int, optimizer: str) -> int:
    """Bytes of a row with its bias and the state of its optimiser, float32."""
    row = 4 * (width + 1)
    return {"adamw": 3 * row, "rowwise_adagrad": row + 4}[optimizer]


def exchange_seconds(sent: float, gpus: int, gpu: Gpu, share: float) -> float:
    """Seconds in which each GPU sends `sent` bytes to all GPUs in equal parts."""
    near = sent * (min(gpus, HOST) - 1) / gpus
    far = sent * max(gpus - HOST, 0) / gpus
    return near / (gpu.inside * share) + far / (gpu.outside * share)


def sampled_step(o, gpus: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of the parts of a step with sampled losses, the rows sharded over the GPUs."""
    tokens, row = o.batch * o.length, 4 * (o.width + 1)
    rows = o.distinct * tokens + o.negatives
    encoder = o.layers * (24 * o.width**2 + 4 * o.length * o.width) * tokens
    scores = 2 * tokens * (o.negatives + 1) * o.width
    # Of a layer about 12 tensors of the width, 16-bit, are written and read in three passes each.
    activations = o.layers * 12 * 3 * 2 * 2 * o.width * tokens
    moved = rows * (2 * state_bytes(o.width, o.optimizer) + 2 * row)  # update; pull and push
    return {
        "products": 3 * (encoder + scores) / (gpu.products * o.compute),
        "activations": activations / (gpu.memory_rate * o.bandwidth),
        "table": moved / (gpu.memory_rate * o.bandwidth),
        "exchange": exchange_seconds(rows * (2 * row + 8), gpus, gpu, o.bandwidth),
    }


def full_step(o, gpus: int, gpu: Gpu) -> dict[str, float]:
    """The same of a step with the full softmax, items divided over the GPUs: every GPU scores the
    rows of all GPUs against its items, and updates all of these."""
    scored, items = o.scored * gpus, o.items / gpus
    products = 3 * 2 * scored * items * o.width
    swept = items * (3 * 4 * (o.width + 1) + 2 * state_bytes(o.width, o.optimizer))
    gathered = scored * o.width * 4 * 2  # states to all GPUs, their gradients back
    return {
        "products": products / (gpu.products * o.compute),
        "activations": 0.0,
        "table": swept / (gpu.memory_rate * o.bandwidth),
        "exchange": exchange_seconds(gathered, gpus, gpu, o.bandwidth),
    }


def print_steps(o, gpu: Gpu) -> None:
    columns = "products | activations | table | exchange | steps/s | events/s | epoch"
    print(f"\n| {o.gpu}, step | GPUs | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, step, rows in (
        (f"sampled, {o.batch} x {o.length} events, {o.negatives} negatives a GPU", sampled_step,
         o.batch * o.length),
        (f"full softmax, {o.scored} scored events a GPU", full_step, o.scored),
    ):  # fmt: skip
        for gpus in o.gpus:
            parts = step(o, gpus, gpu)
            rate = 1 / sum(parts.values())
            times = " | ".join(f"{1e3 * seconds:,.2f} ms" for seconds in parts.values())
            events = rate * rows * gpus
            print(
                f"| {name} | {gpus} | {times} | {rate:,.1f} | {events:,.0f} |"
                f" {o.events / events / 60:,.0f} min |"
            )


def print_memory(o, gpu: Gpu) -> None:
    print("\n| bytes | all | " + " | ".join(f"each of {g}" for g in o.gpus) + " |")
    print("|---|---|" + "---|" * len(o.gpus))
    for name, size in (
        ("table, float32", o.items * 4 * (o.width + 1)),
        ("and moments of AdamW", o.items * state_bytes(o.width, "adamw")),
        ("and row-wise Adagrad", o.items * state_bytes(o.width, "rowwise_adagrad")),
        ("and AdamW with a dense gradient and its temporaries", o.items * 5 * 4 * (o.width + 1)),
    ):
        each = " | ".join(
            f"{size / g / GB:,.1f} GB{'' if size / g < gpu.memory else ', **too much**'}"
            for g in o.gpus
        )
        print(f"| {name} | {size / GB:,.1f} GB | {each} |")


def print_data(o) -> None:
    users = o.events / o.events_per_user
    print("\n| data | size or time | grows with |\n|---|---|---|")
    for name, value, of in (
        ("values.npy, int32, mapped", f"{4 * o.events / GB:,.0f} GB of disk", "E"),
        ("offsets.npy, mapped", f"{8 * users / GB:,.1f} GB", "U"),
        ("interactions.parquet", f"{o.parquet_bytes * o.events / GB:,.0f} GB of disk", "E"),
        ("scratch of `prepare`, at its peak", f"{50 * o.events / GB:,.0f} GB of disk", "E"),
        ("`prepare`, one core", f"{o.events / o.prepare_rate / 3600:,.1f} h", "E"),
        ("`prepare`, ids and their places",
         f"{(users + o.items) * o.id_bytes / GB:,.1f} GB of memory", "U + V"),
        ("order of an epoch, in each process", f"{24 * users / GB:,.1f} GB of memory", "U"),
        ("ids of a service, a Python dictionary",
         f"{o.items * 159 / GB:,.0f} GB of memory", "V"),
        ("a checkpoint with AdamW", f"{o.items * state_bytes(o.width, 'adamw') / GB:,.0f} GB", "V"),
    ):  # fmt: skip
        print(f"| {name} | {value} | {of} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=float, default=1e8)
    parser.add_argument("--events", type=float, default=1e10)
    parser.add_argument("--events-per-user", type=float, default=100)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024, help="sequences a GPU")
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--negatives", type=int, default=8192, help="shared by a GPU's step")
    parser.add_argument("--scored", type=int, default=512, help="events a GPU, full softmax")
    parser.add_argument("--distinct", type=float, default=0.6, help="rows of a step per event")
    parser.add_argument("--optimizer", choices=["adamw", "rowwise_adagrad"], default="adamw")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H200")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--compute", type=float, default=0.3, help="share of the product rate")
    parser.add_argument("--bandwidth", type=float, default=0.6, help="share of the byte rates")
    parser.add_argument("--prepare-rate", type=float, default=1e6, help="a core, measured")
    parser.add_argument("--parquet-bytes", type=float, default=7.0, help="an event, measured")
    parser.add_argument("--id-bytes", type=float, default=76.0, help="measured")
    options = parser.parse_args()
    gpu = GPUS[options.gpu]
    print_memory(options, gpu)
    print_steps(options, gpu)
    print_data(options)


if __name__ == "__main__":
    main()
