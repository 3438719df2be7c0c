# SPDX-License-Identifier: Apache-2.0
"""The table of "AdaptSSR" (Yu et al., 2023) in form, on ml-1m: pre-training methods by age, gender
and occupation of users who were not seen, and by the next item of those who were.

    python -m benchmarks.papers.adaptssr --source ml-1m --output runs/adaptssr --cells adaptssr.age

Cells are METHOD.TASK. Every method has its recipe's encoder, two layers of width 64 (PeterRec: four
blocks), reads 100 items and is fine-tuned as a whole, PeterRec by its patches.
"""

from benchmarks.papers.cells import HERE, Cell, Run, run_table
from benchmarks.papers.movielens import prepare_users

PRETRAINED = 2000  # steps of each pre-training
ATTRIBUTES = ("age", "gender", "occupation")
MASKED = "--recommendation.views.main=[mask_last: {}]"  # bidirectional models are asked at [MASK]
# Recipe, and the flags of its tasks. Pools are those that a method has trained.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("adaptssr", (MASKED, "--profile.init.pool=null")),
    "peterrec": ("peterrec", (
        "--profile.objectives.user_attributes.pool=last",
        "--profile.init={freeze: [items, encoder], patch: 16}",
        "--recommendation.init={freeze: [items, encoder], patch: 16}",
    )),
    "ptum": ("ptum", (MASKED,)),
    "clue": ("clue", ("--profile.objectives.user_attributes.pool=ur",)),
    "ccl": ("ccl", ()),
    "idicl": ("idicl", ("--profile.objectives.user_attributes.pool={interests: 8}",)),
    "cl4srec": ("cl4srec", ()),
    "coserec": ("coserec", ()),
    "duorec": ("duorec", ()),
    "adaptssr": ("adaptssr", (MASKED, "--profile.init.pool=rank")),
}  # fmt: skip


def cells() -> dict[str, Cell]:
    made = {}
    for method, (recipe, own) in METHODS.items():
        shared = (
            f"--config={recipe}", f"--config={HERE / 'adaptssr-tasks.yaml'}",
            "--data={output}/users", "--model.width=64", "--model.max_len=100",
        )  # fmt: skip
        before = () if method == "none" else _pretraining(method, shared)
        init = before[-1].name if before else None
        for task in (*ATTRIBUTES, "next"):
            name, stage = f"{method}.{task}", "recommendation" if task == "next" else "profile"
            flags = (*shared, *own)
            if task != "next":
                flags += (f"--attributes=[{{name: {task}}}]",)
            made[name] = Cell((*before, Run(name, "finetune", stage, flags, init)), shared[2:3])
    return made


def _pretraining(method: str, shared: tuple[str, ...]) -> tuple[Run, ...]:
    steps = (f"--pretraining.steps={PRETRAINED}", "--pretraining.batch_size=128")
    if method == "ccl":
        masked = ("--config=bert4rec", *shared[1:], *steps, MASKED)
        first = Run("ccl.filler", "pretrain", "pretraining", masked)
        filler = "--pretraining.filler={runs}/ccl.filler/model"
        return first, Run("ccl.pre", "pretrain", "pretraining", (*shared, *steps, filler))
    run = Run(f"{method}.pre", "pretrain", "pretraining", (*shared, *steps, *_asked(method)))
    if method != "adaptssr":
        return (run,)
    ranked = (*shared, MASKED, f"--ranking.steps={PRETRAINED}")
    return run, Run("adaptssr.ranking", "finetune", "ranking", ranked, run.name)


def _asked(method: str) -> tuple[str, ...]:
    """A recipe is checked with all its stages, those that this run does not train as well."""
    return tuple(flag for flag in METHODS[method][1] if flag == MASKED)


if __name__ == "__main__":
    run_table(__doc__ or "", cells(), prepare_users)
