# SPDX-License-Identifier: Apache-2.0
"""A training step by the number of items: all rows of the tables updated, or those touched.

    python -m benchmarks.tables --items 20000 1000000
    python -m benchmarks.tables --items 1000000 --loss all --steps 5

Users of 3 to 16 items by Zipf's law, width 64. Of `sasrec-sampled` 256 users (some 2,300 events),
256 negatives an event by popularity; of `sasrec`, the softmax over all items, 64 (some 540). Each
case runs in a process of its own: median and minimum of process CPU time and of wall time in ms,
and the largest resident memory in MiB beyond what the process had before the model, with that of
the weights and of the optimizer's averages.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

WIDTH = 64


def case(items: int, recipe: str, tables: dict, batch: int | None = None, shuffled: bool = False):
    """(module of a stage, its loader) of users who are drawn. Items are numbered by popularity, or
    in any order."""
    import numpy as np

    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.loader import SequenceLoader
    from fastrec.data.side import SideData
    from fastrec.data.views import Views
    from fastrec.nn.user_model import UserModel
    from fastrec.objectives.joint import JointObjective
    from fastrec.training.config import Recipe
    from fastrec.training.module import StageModule
    from fastrec.training.rows import use_rows

    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 17, 20_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    drawn = items ** generator.random(offsets[-1])  # Zipf: chance 1 / rank
    values = drawn.astype(np.int32).clip(1) - 1
    if shuffled:
        values = generator.permutation(items).astype(np.int32)[values]
    schema = {"num_users": len(lengths), "num_items": items, "num_interactions": len(values)}
    dataset = SequenceDataset("memory", schema, values, offsets)
    sizes = {} if batch is None else {"batch_size": batch}
    chosen = Recipe.load(recipe, tables=tables, **sizes)
    stage = chosen.stage("pretraining")
    model = UserModel(items, chosen.model)
    side = SideData(dataset)
    objective = JointObjective(stage.parts, model, side)
    if stage.tables.update == "rows":
        use_rows(model, objective.parts.values())
    views = Views(stage.views, model.frame, side, chosen.model.max_len)
    loader = SequenceLoader(views, batch_size=stage.batch_size)
    judge = type("Judge", (), {"metric_names": [stage.monitored]})()
    return StageModule(model, objective, stage, loader, judge), loader


def measure(items: int, update: str, optimizer: str | None, steps: int, loss: str) -> dict:
    import torch

    from fastrec.objectives.joint import total_loss
    from fastrec.random import Rng

    before = memory()
    tables = {"update": update, **({"optimizer": optimizer} if update == "rows" else {})}
    recipe, batch = ("sasrec-sampled", 256) if loss == "sampled" else ("sasrec", 64)
    module, loader = case(items, recipe, tables, batch)
    model, objective = module.model, module.objective
    optimizer_ = module.configure_optimizers()["optimizer"]
    times = []
    for number in range(steps + 2):
        start = time.process_time(), time.perf_counter()
        terms = objective(model, loader.batch_at(number), Rng(0, number))
        total_loss(terms).backward()
        optimizer_.step()
        optimizer_.zero_grad(set_to_none=True)
        times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu, wall = ([1e3 * each for each in column] for column in zip(*times[2:], strict=True))
    weights = sum(p.numel() for p in model.parameters()) * 4
    state = sum(
        part.numel() * part.element_size()
        for each in optimizer_.state.values()
        for part in each.values()
        if isinstance(part, torch.Tensor)
    )
    return {
        "cpu": [median(cpu), min(cpu)],
        "wall": [median(wall), min(wall)],
        "memory": memory() - before,
        "weights": weights / 2**20,
        "state": state / 2**20,
    }


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[20_000, 1_000_000])
    parser.add_argument("--update", nargs="+", default=["dense", "rows"])
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--loss", choices=("sampled", "all"), default="sampled")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", action="store_true", help="one case, as JSON")
    options = parser.parse_args()
    if options.one:
        asked = options.items[0], options.update[0], options.optimizer, options.steps
        print(json.dumps(measure(*asked, options.loss)))
        return
    print("items, update: cpu ms (median, min), wall ms (median, min), MiB (weights, state)")
    for items in options.items:
        for update in options.update:
            command = [sys.executable, "-m", "benchmarks.tables", "--one", "--items", str(items)]
            command += ["--update", update, "--optimizer", options.optimizer]
            command += ["--steps", str(options.steps), "--loss", options.loss]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr[-2000:])
            got = json.loads(made.stdout.splitlines()[-1])
            print(
                f"{items:>10,} {update:<6} cpu {got['cpu'][0]:.0f}, {got['cpu'][1]:.0f}"
                f"  wall {got['wall'][0]:.0f}, {got['wall'][1]:.0f}  MiB {got['memory']:.0f}"
                f" ({got['weights']:.0f}, {got['state']:.0f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
