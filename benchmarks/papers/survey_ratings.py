# SPDX-License-Identifier: Apache-2.0
"""Table 3 of "Knowledge transfer via pre-training for recommendation" (Zeng et al., 2021): the
ratings of a small catalogue, with and without the model of a larger one.

    python -m benchmarks.papers.survey_ratings --source ml-100k --output runs/ratings

Of MovieLens-100K, which has ratings where the ml-1m.txt of SASRec has none.
"""

from benchmarks.papers.cells import Cell, Run, run_table
from benchmarks.papers.movielens import ml_100k, prepare_domains

RECIPES = {"dacf": "dacf", "bert4rec": "bert4rec-rating"}
# All but the items, and of DACF the layers between.
TAKEN = {"dacf": "[encoder]", "bert4rec": "[input, encoder, rating]"}


def cells() -> dict[str, Cell]:
    made = {}
    for name, recipe in RECIPES.items():
        source, target = (
            (f"--config={recipe}", f"--data={{output}}/{data}") for data in ("source", "target")
        )
        made[f"{name}.none"] = Cell(
            (Run(f"{name}.none", "pretrain", "pretraining", target),), target[1:]
        )
        first = Run(f"{name}.source", "pretrain", "pretraining", source)
        take = f"--pretraining.init.take={TAKEN[name]}"
        last = Run(f"{name}.model", "finetune", "pretraining", (*target, take), first.name)
        made[f"{name}.model"] = Cell((first, last), target[1:])
    return made


if __name__ == "__main__":
    run_table(__doc__ or "", cells(), lambda raw, out: prepare_domains(raw, out, ml_100k))
