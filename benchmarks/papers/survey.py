# SPDX-License-Identifier: Apache-2.0
"""Table 2 of "Knowledge transfer via pre-training for recommendation" (Zeng et al., 2021): the
next items in a small catalogue, from the model of a larger one. Table 3 is `survey_ratings`.

    python -m benchmarks.papers.survey --source ml-1m --output runs/survey \\
        --cells bert4rec.model.mip

Cells are MODEL.none, MODEL.embedding.TASK and MODEL.model.TASK, with and without ".meta".
"""

from benchmarks.papers.cells import HERE, Cell, Run, run_table
from benchmarks.papers.movielens import ml_1m, prepare_domains

TASKS = {
    "bert4rec": {"mip": (), "nip": (
        "--pretraining.views.main=[next_item: {}]", "--pretraining.init.causal=true",
    )},
    "caser": {"nip": (), "mip": (
        "--pretraining.views.main=[mask: {share: 0.2, replace: 0.8, random: 0.1}]",
    )},
}  # fmt: skip
META = {"bert4rec": 16, "caser": 25}  # width of the knowledge beside an item
# What goes to the other catalogue: user vectors and knowledge, or all but the items.
TAKEN = {
    ("embedding", False): "[users]",
    ("embedding", True): "[users, input]",
    ("model", "bert4rec"): "[users, input, encoder, transform]",
    ("model", "caser"): "[users, input, encoder]",
}


def flags(model: str, data: str, known: bool) -> tuple[str, ...]:
    own = (f"--config={HERE / f'survey-{model}.yaml'}", f"--data={{output}}/{data}")
    extra = f"--model.items.features={{meta: {{width: {META[model]}}}}}"
    return (*own, extra) if known else own


def cells() -> dict[str, Cell]:
    made = {}
    for model, tasks in TASKS.items():
        for known in (False, True):
            tail = ".meta" if known else ""
            target = flags(model, "target", known)
            asked = flags(model, "target", False)[:2]
            name = f"{model}.none{tail}"
            made[name] = Cell((Run(name, "finetune", "recommendation", target),), asked)
            for task, views in tasks.items():
                first = Run(
                    f"{model}.source.{task}{tail}", "pretrain", "pretraining",
                    (*flags(model, "source", known), *views),
                )  # fmt: skip
                for transfer in ("embedding", "model"):
                    key = known if transfer == "embedding" else model
                    name = f"{model}.{transfer}.{task}{tail}"
                    take = f"--recommendation.init.take={TAKEN[transfer, key]}"
                    last = Run(name, "finetune", "recommendation", (*target, take), first.name)
                    made[name] = Cell((first, last), asked)
    return dict(sorted(made.items(), key=lambda pair: pair[0].split(".")[0]))


if __name__ == "__main__":
    run_table(__doc__ or "", cells(), lambda raw, out: prepare_domains(raw, out, ml_1m))
