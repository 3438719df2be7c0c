# SPDX-License-Identifier: Apache-2.0
"""Table III and figures 4 and 5 of CLUE (Cheng et al., 2021) in form, on ml-1m: cold-start
recommendation of action, thrillers and science fiction from what users saw beside them.

    python -m benchmarks.papers.clue --source ml-1m --output runs/clue --cells table3

Cells are table3.VIEW (views of pre-training), figure4.SHARE and figure4.zero.SHARE (of the training
rows, with and without pre-training) and figure5.DROPOUT.
"""

from benchmarks.papers.cells import Cell, Run, run_table
from benchmarks.papers.movielens import prepare_cold

SHARED = ("--data={output}/cold", "--model.max_len=100")
PRE = tuple(
    f"--pretraining.{flag}" for flag in ("steps=1500", "batch_size=128", "validate_every=250")
)
TASK = tuple(
    f"--cold_start.{flag}"
    for flag in (
        "steps=1500", "batch_size=128", "validate_every=150",
        "learning_rate=0.002", "schedule=linear", "warmup_steps=100",
    )
)  # fmt: skip
VIEWS = {
    "mask": "mask: {share: 0.3}",
    "crop": "crop: {drop: 0.3}",
    "permute": "reorder: {share: 0.3}",
}
SHARES, DROPOUTS = (0.4, 0.6, 0.8, 1.0), (0.1, 0.3, 0.5, 0.7, 0.9)


def cells() -> dict[str, Cell]:
    def made(name: str, first: Run | None, *flags: str) -> Cell:
        recipe = "clue-zero" if first is None else "clue"
        own = (f"--config={recipe}", *SHARED, *TASK, *flags)
        init = None if first is None else first.name
        last = Run(name, "finetune", "cold_start", own, init)
        return Cell((last,) if first is None else (first, last), SHARED[:1])

    def pretrained(name: str, *flags: str) -> Run:
        return Run(name, "pretrain", "pretraining", ("--config=clue", *SHARED, *PRE, *flags))

    plain = pretrained("pre.dropout")
    found = {"table3.zero": made("table3.zero", None)}
    found["table3.dropout"] = made("table3.dropout", plain)
    for view, step in VIEWS.items():
        first = pretrained(
            f"pre.{view}", *(f"--pretraining.views.{each}=[{step}]" for each in ("a", "b"))
        )
        found[f"table3.{view}"] = made(f"table3.{view}", first)
    for share in SHARES:
        for name, first in ((f"figure4.{share}", plain), (f"figure4.zero.{share}", None)):
            found[name] = made(name, first, f"--cold_items.fraction={share}")
    for dropout in DROPOUTS:
        flag = f"--model.dropout={dropout}"
        first = plain if dropout == 0.5 else pretrained(f"pre.dropout-{dropout}", flag)
        found[f"figure5.{dropout}"] = made(f"figure5.{dropout}", first, flag)
    return found


if __name__ == "__main__":
    run_table(__doc__ or "", cells(), prepare_cold)
