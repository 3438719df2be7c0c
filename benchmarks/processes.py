# SPDX-License-Identifier: Apache-2.0
"""A training step on one process and on several, by what happens to the item table.

    python -m benchmarks.processes --items 1000000                      # sampled negatives, by rows
    python -m benchmarks.processes --items 1000000 --whole --batch 64   # the softmax over all items

Users, items and negatives are those of `benchmarks.tables`, one thread a process, gloo. A step is
the batch, forward, backward, the exchange of gradients and the optimizer; of several processes the
slowest is printed: median and minimum of wall time and of process CPU time in ms, the largest
resident memory of a process beyond what it had before the trainer was imported, that after the last
step, and the mean loss of the steps.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.tables import case, memory


def measure(options) -> dict:
    import torch
    import torch.distributed as dist

    from fastrec.nn.sharded import shard_tables, sharded_parameters
    from fastrec.objectives.joint import of_all_ranks, total_loss
    from fastrec.random import Rng
    from fastrec.training.processes import let_go
    from fastrec.training.rows import share_gradients, tables_of

    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    update = "dense" if options.whole else "rows"
    tables = {"update": update} if options.whole else {"update": update, "optimizer": "adam"}
    recipe = "sasrec" if options.whole else "sasrec-sampled"
    before, began = memory(), now()
    torch.manual_seed(0)
    module, loader = case(options.items, recipe, tables, options.batch, not options.by_popularity)
    model, objective = module.model, module.objective
    shared = []
    if world > 1:
        loader.rank, loader.world_size = dist.get_rank(), world
        if options.how == "shard":
            shard_tables(model, dist.group.WORLD)
        elif not options.whole:
            shared = tables_of(model)
    ours = {id(p) for p, _ in sharded_parameters(model).values()} | set(map(id, shared))
    common = [p for p in module.parameters() if id(p) not in ours]
    optimizer = module.configure_optimizers()["optimizer"]
    times, cpu, losses = [], [], []
    for number in range(options.steps + 2):
        if world > 1:
            dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        terms = objective(model, loader.batch_at(number), Rng(0, number))
        loss = total_loss(of_all_ranks(terms, world))
        loss.backward()
        if world > 1:
            share_gradients(shared)
            grads = [p.grad for p in common if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads]) / world  # as DDP does
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - used))
        losses.append(loss.item())
    found = [median(times[2:]), min(times[2:]), median(cpu[2:]), min(cpu[2:]), memory() - before]
    found += [now() - began, sum(losses) / len(losses)]
    if world > 1:
        seen = torch.tensor(found, dtype=torch.float64)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        mean = torch.tensor(found[-1] / world, dtype=torch.float64)
        dist.all_reduce(mean)
        found = [*seen.tolist()[:-1], mean.item()]
        let_go()
        dist.destroy_process_group()
    names = ("median", "minimum", "cpu", "least", "memory", "kept", "loss")
    return dict(zip(names, found, strict=True))


def now() -> float:
    """MiB that are resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(arguments: list[str], how: str, world: int) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.processes", *arguments, "--how", how]
    made = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        made.append(
            subprocess.Popen(
                command, env={**os.environ, **place}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate() for process in made]
    for process, (_, error) in zip(made, said, strict=True):
        if process.returncode:
            sys.exit(error[-2000:])
    return json.loads(said[0][0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--whole", action="store_true", help="the softmax over all items")
    parser.add_argument("--by_popularity", action="store_true", help="the number of an item")
    parser.add_argument("--batch", type=int, default=256, help="users of a step, on all processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="of all cases, in turn")
    parser.add_argument("--how", choices=["shard", "copies"], help="one case, as JSON")
    options = parser.parse_args()
    if options.how:
        print(json.dumps(measure(options)))
        return
    cases = [("copies", 1), ("copies", options.processes), ("shard", options.processes)]
    if options.whole:  # copies of a dense table: its gradient is all-reduced, and no gain
        cases = [cases[0], cases[2]]
    print("table, processes: wall, cpu ms (median, min)  MiB (most, at the end)  loss")
    for _ in range(options.rounds):
        for how, world in cases:
            got = run(sys.argv[1:], how, world)
            print(
                f"{how:<6} {world}  {got['median']:.0f}, {got['minimum']:.0f}"
                f"  cpu {got['cpu']:.0f}, {got['least']:.0f}"
                f"  {got['memory']:.0f}, {got['kept']:.0f}  {got['loss']:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
