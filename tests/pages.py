# SPDX-License-Identifier: Apache-2.0
"""The fenced blocks of the pages, the commands in them, and the files that they take as given.

A page is README, CONTRIBUTING or a page of docs/ that is no log. `tests/test_pages.py` has a rule
for every kind of block.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare.synthetic import generate
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe
from fastrec.training.fit import fit

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if "log" not in page.relative_to(ROOT).parts
)
FENCE = re.compile(r"^( *)(```+|~~~+) *([\w-]*)")
MARK = re.compile(r"<!-- (\w+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, what stands behind the fence, and the mark above it, as in
    `<!-- service -->`, by which another test finds it."""

    page: str
    section: str
    line: int
    language: str
    text: str
    mark: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, whatever they are called and however they are indented."""
    found: list[Block] = []
    fence, start, section, above = None, 0, "", ""
    lines = (ROOT / page).read_text().splitlines()
    for number, line in enumerate(lines):
        at = FENCE.match(line)
        if fence is None and at:
            fence, start = at, number
        elif fence is None:
            section = line.lstrip("# ") if line.startswith("#") else section
            above = line if line.strip() else above
        elif line.strip().startswith(fence[2]):
            mark, text = MARK.fullmatch(above.strip()), "\n".join(lines[start + 1 : number])
            found.append(Block(page, section, start + 1, fence[3], text + "\n", mark and mark[1]))
            fence, above = None, ""
    assert fence is None, f"{page}:{start + 1}: a block without an end"
    return found


def anchors(file: Path) -> set[str]:
    """The headings of a page as GitHub makes them parts of a link."""
    outside = re.sub(r"(?ms)^```.*?^```", "", file.read_text())
    named = (re.sub(r"\]\([^)]*\)", "", line) for line in re.findall(r"(?m)^#+ (.*)$", outside))
    return {re.sub(r"[^\w -]", "", name.lower()).strip().replace(" ", "-") for name in named}


def inline(page: str, begins: str) -> list[str]:
    """Benchmarks between backticks in the text of a page, those with a choice or a gap left out."""
    found = re.findall(rf"`({begins}(?:-m )?benchmarks[^`]*)`", (ROOT / page).read_text())
    return [" ".join(command.split()) for command in found if not re.search(r"[|[]", command)]


# Variables of commands that the text beside them sets.
VARIABLES = {"S": "0", "R": "uprec", "T": "profile"}


def commands(block: Block, programs: tuple[str, ...]) -> list[list[str]]:
    """The commands of a shell block as bash makes them of it: quotes, loops, comments and
    variables. A command that is none of the programs fails."""
    prelude = "set -eu\n" + "".join(
        f"{name}() {{ printf '%s\\037' {name} \"$@\" >&3; printf '\\036' >&3; }}\n"
        for name in programs
    )
    read, write = os.pipe()
    with os.fdopen(read) as pipe:
        ran = subprocess.run(
            ["bash", "-c", f"exec 3>&{write}\n{prelude}{block.text}"], pass_fds=[write],
            env={**VARIABLES, "PATH": ""}, text=True, capture_output=True, timeout=60,
            executable=shutil.which("bash"),
        )  # fmt: skip
        os.close(write)
        assert ran.returncode == 0 and not ran.stderr, f"{block}: {ran.stderr}"
        found = pipe.read().split("\036")[:-1]
    assert found, f"{block} has no command"
    return [each.split("\037")[:-1] for each in found]


def write_sources(folder: Path) -> None:
    """Small files under the names that pages give to theirs: 200 users and 150 items."""
    given = folder / "data"
    dataset = generate(given, num_users=200, num_items=150, seed=3, max_length=20)
    users, items = dataset.user_ids(), dataset.item_ids()
    log = pl.read_parquet(given / "interactions.parquet").select(
        pl.col("user").replace_strict(range(200), users).alias("user_id"),
        pl.col("item").replace_strict(range(150), items).alias("item_id"),
        pl.col("timestamp") + 1_500_000_000,
        "rating",
    )
    for name in ("log", "ratings", "books", "music", "news", "tomorrow"):
        log.write_csv(folder / f"{name}.csv")
    for name in ("data/ml", "data/ml-1m", "data/beauty", "data/ciao", "data/friends"):
        shutil.copytree(given, folder / "of" / name)
    histories = log.group_by("user_id", maintain_order=True).agg("item_id").rows()
    text = "".join(f"{user} {' '.join(map(str, seen))}\n" for user, seen in histories)
    for name in ("Yelp.txt", "LastFM.txt", "Beauty.txt"):
        (folder / name).write_text(text)
    _write_tables(folder, log, items)
    _write_recbole(folder / "ml-100k", log)
    (folder / "users.txt").write_text("3\n14\n")
    (folder / "items.txt").write_text("5\n9\n")
    (folder / "in_stock.txt").write_text("".join(f"{item}\n" for item in items[:40]))
    (folder / "histories.jsonl").write_text("[5, 9, 2]\n[7]\n")
    for block in (block for page in PAGES for block in blocks(page)):
        if name := re.match(r"# ([\w-]+\.yaml)$", block.text, re.M):
            (folder / name[1]).write_text(block.text)
    recipe = Recipe.load("sasrec", steps=2, validate_every=2, model={"width": 8, "max_len": 20})
    fit(dataset, recipe=recipe, output=folder / "run", progress=False)
    shutil.move(folder / "run" / "model", folder / "model")


def _write_tables(folder: Path, log: pl.DataFrame, items: list) -> None:
    """Attributes, vectors, friends and labels."""
    draw = np.random.default_rng(0)
    vectors = pl.Series(draw.normal(size=(len(items), 12)).tolist())
    colours = ("red", "green", "blue", "black")
    words = [f"{colours[i % 4]} thing {i}" for i in items]
    for name in ("books", "music"):
        pl.DataFrame({"item_id": items, "text": vectors}).write_parquet(
            folder / f"{name}_vectors.parquet"
        )
        pl.DataFrame({"item_id": items, "title": words, "brand": words[::-1]}).write_parquet(
            folder / f"{name}.parquet"
        )
    shutil.copy(folder / "books_vectors.parquet", folder / "text.parquet")
    users = log["user_id"].unique(maintain_order=True)
    counts = draw.integers(1, 900, (2, len(users)))
    pl.DataFrame(
        {
            "s3_user": users,
            "total_listen_count": counts[0],
            "n_tag_assignments": counts[1],
            "top_tagID": counts[0] % 7,
        }
    ).write_csv(folder / "user_attrs.tsv", separator="\t")
    friends = pl.DataFrame({"user": users, "friend": users.shuffle(seed=0)})
    friends = friends.filter(pl.col("user") != pl.col("friend"))
    friends.write_csv(folder / "friends.tsv", separator="\t")
    labels = {"user": users, "item": [f"video-{n % 30}" for n in counts[1]]}
    pl.DataFrame(labels).write_csv(folder / "videos.csv")
    tags = {str(item): [int(item) % 5 + 1, 6 + int(item) % 3] for item in items}
    (folder / "Yelp_item2attributes.json").write_text(json.dumps(tags))


def _write_recbole(folder: Path, log: pl.DataFrame) -> None:
    folder.mkdir()
    columns = ("user_id:token", "item_id:token", "timestamp:float", "rating:float")
    named = log.rename(dict(zip(log.columns, columns, strict=True)))
    named.write_csv(folder / f"{folder.name}.inter", separator="\t")


def give(sources: Path, name: str) -> None:
    """Copy a source to its name in the current folder, unless something is there."""
    run = name in ("run/model", "runs/finetune/model")
    found = sources / "model" if run else sources / name
    found = sources / "of" / name if not found.exists() else found
    if found.exists() and name and not Path(name).exists():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if found.is_dir() else shutil.copy)(found, name)


def loaded(sources: Path) -> tuple[SequenceDataset, UserModel]:
    return SequenceDataset.load(sources / "data"), UserModel.from_pretrained(sources / "model")
