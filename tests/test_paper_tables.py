# SPDX-License-Identifier: Apache-2.0
"""Tables of papers: every cell is commands that can be run, on files in the shape of MovieLens."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastrec.cli import _recipe_settings
from fastrec.data.dataset import SequenceDataset
from fastrec.data.settings import from_values
from fastrec.training.config import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.papers import adaptssr, clue, contrastive, differences, survey, survey_ratings
from benchmarks.papers.cells import commands, run_table
from benchmarks.papers.movielens import (
    GENRES,
    KEPT,
    TARGET,
    meta,
    ml_1m,
    ml_100k,
    split,
)

PARTS = (survey, survey_ratings, adaptssr, clue, contrastive)
TABLES = {part.__name__.split(".")[-1]: part for part in PARTS}
CELLS = [(name, cell) for name, part in TABLES.items() for cell in part.cells()]
# A cell of each way through a table.
SOME = {
    ("survey", "bert4rec.none"), ("survey", "bert4rec.model.nip.meta"),
    ("survey", "caser.embedding.mip.meta"), ("survey_ratings", "dacf.model"),
    ("adaptssr", "adaptssr.age"), ("clue", "figure4.0.4"), ("contrastive", "beauty.sasrec"),
    ("contrastive", "beauty.duorec-cosine.time"),
    ("contrastive", "beauty.ccl.time"), ("contrastive", "beauty.adaptssr.steps"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """60 users and 480 movies: the files of ml-1m, and of ml-100k."""
    folder, generator = tmp_path_factory.mktemp("movielens"), np.random.default_rng(0)
    one, hundred = folder / "ml-1m", folder / "ml-100k"
    one.mkdir()
    hundred.mkdir()
    genres = [generator.choice(GENRES, 2, replace=False).tolist() for _ in range(480)]
    genres[:180] = [[TARGET[i % 3], "Drama"] for i in range(180)]
    genres[180:300] = [["Animation" if i % 2 else "Comedy"] for i in range(120)]
    events = [(u + 1, i + 1) for u in range(60) for i in generator.permutation(480)[:45].tolist()]
    text = "".join(f"{user} {item}\n" for user, item in events)
    (one / "ml-1m.txt").write_text(text)
    movies = [(i, 1950 + i % 50, each) for i, each in enumerate(genres)]
    lines = [f"{7 + i}::Film, The ({year})::{'|'.join(each)}\n" for i, year, each in movies]
    (one / "movies.dat").write_text("".join(lines), encoding="latin-1")
    (one / "users.dat").write_text(
        "".join(f"{500 + u}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{u % 4}::x\n" for u in range(60))
    )
    for name, first in (("items", 7), ("users", 500)):
        number = 480 if name == "items" else 60
        lines = "".join(f"{i + 1} {first + i}\n" for i in range(number))
        (one / f"sas_to_original_{name}.txt").write_text(lines)
    for name in ("Beauty", "LastFM", "Yelp"):
        lists = (f"{user} {' '.join(str(item) for who, item in events if who == user)}\n"
                 for user in range(1, 61))  # fmt: skip
        (folder / f"{name}.txt").write_text("".join(lists))
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    for place, (user, item) in enumerate(events):
        lines.append(f"{user}\t{item}\t{generator.integers(1, 6)}\t{9 * place}\n")
    (hundred / "ml-100k.inter").write_text("".join(lines))
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"]
    lines += [f"{i + 1}\tFilm\t{year}\t{' '.join(each)}\n" for i, year, each in movies]
    (hundred / "ml-100k.item").write_text("".join(lines))
    return {"ml-1m": one, "ml-100k": hundred, "all": folder}


def test_domains_have_the_same_users_and_no_common_item(sources):
    for read, name in ((ml_1m, "ml-1m"), (ml_100k, "ml-100k")):
        events, items = read(sources[name])
        source, target = split(events, items)
        assert set(source["user"]) == set(target["user"]) and len(set(source["user"])) > 40
        genres = dict(items.select("item", "genres").iter_rows())
        assert all(set(genres[item]) & set(TARGET) for item in set(target["item"]))
        assert not any(set(genres[item]) & set(TARGET) for item in set(source["item"]))
        lengths = target.group_by("user").len()["len"]
        assert lengths.max() == KEPT and lengths.min() >= 6
        whole = events.filter(pl.col("user") == 3)["item"].to_list()
        kept = [item for item in whole if set(genres[item]) & set(TARGET)][-KEPT:]
        assert target.filter(pl.col("user") == 3)["item"].to_list() in (kept, [])
    vectors = dict(meta(items).iter_rows())
    item, (one, two), year = next(row for row in items.iter_rows() if len(row[1]) == 2)
    expected = [0.5 * (genre in (one, two)) for genre in GENRES]
    assert vectors[item][:18] == expected and sum(vectors[item][18:]) == 1
    assert vectors[item][18 + (year - 1910) // 10] == 1


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_recipes_that_can_be_run(name, tmp_path):
    """Runs that cells share have the same flags, and a model starts from a run before it."""
    known = {}
    for cell in TABLES[name].cells().values():
        before = set()
        for run in cell.runs:
            assert known.setdefault(run.name, run) == run
            assert run.init is None or run.init in before
            before.add(run.name)
        for line in commands(cell, tmp_path, 0, 2)[:-1]:
            settings = _recipe_settings(line[1:])[0]
            recipe = from_values(Recipe, settings)
            assert any(stage.steps == 2 for stage in recipe.stages.values())


def run(sources, output: Path, table: str, *flags: str) -> None:
    names = {"survey_ratings": "ml-100k", "contrastive": "all"}
    source = sources[names.get(table, "ml-1m")]
    part = TABLES[table]
    prepare = {
        "survey": lambda raw, out: survey.prepare_domains(raw, out, ml_1m),
        "survey_ratings": lambda raw, out: survey_ratings.prepare_domains(raw, out, ml_100k),
        "contrastive": contrastive.prepare,
        "clue": clue.prepare_cold,
        "adaptssr": adaptssr.prepare_users,
    }[table]
    run_table("", part.cells(), prepare, [f"--source={source}", f"--output={output}", *flags])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in TABLES}


@pytest.mark.parametrize(
    ("table", "cell"),
    [pytest.param(*each, marks=() if each in SOME else pytest.mark.exhaustive) for each in CELLS],
)
def test_a_cell_is_one_command(sources, outputs, table, cell, capsys):
    output = outputs[table]
    run(sources, output, table, f"--cells={cell}", "--short=2")
    result = output / "seed-0-short-2" / f"{cell}.json"
    assert json.loads(result.read_text())["metrics"]["model"]
    capsys.readouterr()
    run(sources, output, table, f"--cells={cell}", "--short=2")  # nothing is left to do
    assert "fastrec" not in capsys.readouterr().out
    run(sources, output, table, f"--cells={cell}", "--table", "--short=2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| cell |") and any(line.startswith(f"| {cell} |") for line in lines)


def test_what_a_transfer_takes(sources, outputs):
    """Of a cell that the test above has run, or runs here: user vectors and knowledge alone."""
    run(sources, outputs["survey"], "survey", "--cells=caser.embedding.mip.meta", "--short=2")
    folder = outputs["survey"] / "seed-0-short-2" / "caser.embedding.mip.meta"
    taken = set(json.loads((folder / "transfer.json").read_text())["taken"])
    assert "item_head.users.weight" in taken and not any("encoder." in name for name in taken)
    assert any(name.startswith("item_input.features.") for name in taken)
    data = [SequenceDataset.load(outputs["survey"] / name) for name in ("source", "target")]
    assert data[0].users_hash == data[1].users_hash
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


def test_the_commands_are_printed_or_an_unknown_cell_is_named(sources, tmp_path, capsys):
    run(sources, tmp_path, "clue", "--cells", "table3.mask", "--print")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("fastrec")] == [
        "pretrain", "finetune", "evaluate",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
    run(sources, tmp_path, "clue", "--cells", "table3", "--list")
    views = ("zero", "dropout", "mask", "crop", "permute")
    assert capsys.readouterr().out.split() == [f"table3.{view}" for view in views]
    with pytest.raises(SystemExit):
        run(sources, tmp_path, "clue", "--cells", "none")


def test_equal_time_is_equal_time():
    """What the trainings of a cell cost adds up to SASRec's steps, but for rounding to the number
    of validations; in `steps` the next items have as many as SASRec's."""
    for name, data in contrastive.DATA.items():
        made = contrastive.cells()
        for method in (*contrastive.JOINT, *contrastive.BEFORE):
            each = contrastive.BEFORE.get(method, ())
            last = "sasrec" if each else contrastive.JOINT[method][0]
            names = [*(training for training, _, _ in each), last]
            costs = [contrastive.COSTS[key][list(contrastive.DATA).index(name)] for key in names]
            steps = {
                kind: [asked_steps(run) for run in made[f"{name}.{method}.{kind}"].runs]
                for kind in ("time", "steps")
            }
            spent = sum(cost * count for cost, count in zip(costs, steps["time"], strict=True))
            assert abs(spent - data.steps) <= contrastive.TRIES * sum(costs) / 2
            assert steps["steps"][-1] == data.steps
            before = data.steps / 2 if each else 0
            assert abs(sum(steps["steps"][:-1]) - before) <= contrastive.TRIES


def asked_steps(run) -> int:
    key = f"--{run.stage}.steps="
    return next(int(flag.removeprefix(key)) for flag in run.flags if flag.startswith(key))


def test_differences_are_those_of_the_same_users(tmp_path):
    """Against a loop; two seeds of one cell, of which the base has both, and a third alone."""
    generator, gain = np.random.default_rng(0), {}
    for name in ("beauty.sasrec", "beauty.clue.time"):
        for seed in (0, 1) if name == "beauty.sasrec" else (0, 1, 2):
            folder = tmp_path / f"seed-{seed}"
            for run in contrastive.cells()[name].runs:
                (folder / run.name).mkdir(parents=True)
                (folder / run.name / "summary.json").write_text('{"cpu_seconds": 90.0}')
            ranks = generator.integers(1, 21, 50)
            order = generator.permutation(50)
            table = pl.DataFrame({"user_id": order, "rank": ranks[order]})
            table.write_parquet(folder / f"{name}.parquet")
            (folder / f"{name}.json").write_text("{}")
            gain[name, seed] = [100 / np.log2(rank + 1) * (rank <= 10) for rank in ranks]
    own, base = (
        np.array([gain[name, seed] for seed in (0, 1)])
        for name in ("beauty.clue.time", "beauty.sasrec")
    )
    apart = (own - base).mean(0)
    folders = {seed: tmp_path / f"seed-{seed}" for seed in (0, 1, 2)}
    lines = differences.table(folders, "beauty").splitlines()
    assert len(lines) == 4 and lines[2].startswith("| beauty.sasrec | 0 1 |")
    cell = [text.strip() for text in lines[3].split("|")[1:-1]]
    assert cell[:2] == ["beauty.clue.time", "0 1"] and cell[6] == "3.0"
    assert cell[3] == f"{own.mean():.2f} ± {own.mean(1).std(ddof=1):.2f}"
    assert cell[5] == f"{apart.mean():+.2f} ± {apart.std(ddof=1) / np.sqrt(50):.2f}"


def test_a_trial_is_not_taken_for_a_result(sources, outputs, capsys):
    output = outputs["contrastive"]
    run(sources, output, "contrastive", "--cells=beauty.sasrec", "--short=2")
    capsys.readouterr()
    run(sources, output, "contrastive", "--cells=beauty.sasrec", "--table")
    assert "beauty.sasrec" not in capsys.readouterr().out
    for flags, steps in ((), 4000), (("--short=3",), 3):
        run(sources, output, "contrastive", "--cells=beauty.sasrec", "--print", *flags)
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith("fastrec pretrain ") and "--resume" not in line
        assert re.findall(r"--pretraining.steps=(\d+)", line)[-1] == str(steps)


def test_differences_of_trials(sources, outputs, capsys):
    for cell in ("beauty.sasrec", "beauty.ccl.time"):
        run(sources, outputs["contrastive"], "contrastive", f"--cells={cell}", "--short=2")
    asked = [f"--output={outputs['contrastive']}", "--seeds=0"]
    capsys.readouterr()
    differences.main([*asked, "--data=beauty", "--short=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| beauty.sasrec | 0 |") and " ± " not in lines[2]
    assert any(line.startswith("| beauty.ccl.time | 0 |") and " ± " in line for line in lines)
    differences.main([*asked, "--data=beauty"])
    assert len(capsys.readouterr().out.splitlines()) == 2, "trials are no results"
    with pytest.raises(SystemExit):
        differences.main([*asked, "--data=nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
