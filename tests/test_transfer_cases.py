# SPDX-License-Identifier: Apache-2.0
"""Transfer by the command line, on MovieLens-100K cut in two: other items for the same users (Zeng
et al., 2021, section 3.3: nothing, embeddings or the model are taken), other users of the same
items; and PeterRec from pre-training to a profile."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from test_data_prepare import shared

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.nn.user_model import UserModel

RECIPE = """
model:
  {width: 16, max_len: 20, user_width: 8, encoder: {transformer: {causal: true, layers: 1}},
   items: {rating: {width: 4}}}
pretraining: &stage
  {views: {main: [next_item: {}]}, objectives: {item: {}}, steps: 20, batch_size: 128,
   validate_every: 20, learning_rate: 0.01}
recommendation: *stage
"""


def said(*lines: str) -> list[str]:
    return [f"--{line}" for line in lines]


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """Data sets `drama` and `other`, items by genre with the users who have ten events in both;
    `first` and `second`, the users in two halves with the items that have events in both."""
    source, folder = shared("ml-100k"), tmp_path_factory.mktemp("cut")
    names = ["user", "item", "rating", "timestamp"]
    log = pl.read_csv(source / "ml-100k.inter", separator="\t", new_columns=names)
    lines = (source / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    fields = [line.split("\t") for line in lines]
    drama = [int(item) for item, *_, genres in fields if "Drama" in genres.split()]
    parts = {"drama": pl.col("item").is_in(drama), "second": pl.col("user") > 470}
    pairs = [("drama", "other", "user", 10), ("second", "first", "item", 1)]
    for name, other, both, least in pairs:
        halves = {name: log.filter(parts[name]), other: log.filter(~parts[name])}
        counts = [
            half.group_by(both).len().filter(pl.col("len") >= least) for half in halves.values()
        ]
        kept = counts[0].join(counts[1], on=both)[both].implode()
        for half, frame in halves.items():
            frame.filter(pl.col(both).is_in(kept)).write_csv(folder / f"{half}.csv")
            main(["prepare", *said(f"source={folder / half}.csv", f"output={folder / half}")])
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("drama", "first"):
        main(["pretrain", *of(folder, name), f"--output={folder / 'runs' / name}"])
    return folder


def of(cut: Path, data: str) -> list[str]:
    return said(f"config={cut / 'recipe.yaml'}", f"data={cut / data}", "device=cpu")


def tuned(cut: Path, output: Path, data: str, start: str, *init: str):
    """(the tensors at the start of a fine-tuning, by transfer.json; its model; the one before)."""
    initial = cut / "runs" / start / "model"
    flags = [f"--recommendation.init.{each}" for each in init]
    main(["finetune", *of(cut, data), f"--init={initial}", f"--output={output}", *flags])
    made = json.loads((output / "transfer.json").read_text())
    model = UserModel.from_pretrained(output / "model")
    return made, model, UserModel.from_pretrained(initial)


TAKEN = {
    "embedding": ("[users]", ("item_head.users.",)),
    "model": (
        "[input,encoder,transform,users]",
        ("item_head.users.", "item_head.dense.", "item_head.norm.", "encoder.",
         "item_input.levels.", "item_input.join."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_other_items_of_the_same_users(cut, tmp_path, case, capsys):
    data = [SequenceDataset.load(cut / name) for name in ("drama", "other")]
    assert data[0].users_hash == data[1].users_hash and data[0].num_users > 500
    assert not set(data[0].item_ids()) & set(data[1].item_ids())
    parts, prefixes = TAKEN[case]
    made, model, initial = tuned(
        cut, tmp_path / "run", "other", "drama", f"take={parts}", "freeze=[users]"
    )
    expected = {name for name in initial.state_dict() if name.startswith(prefixes)}
    if case == "model":
        expected.add("item_input.ids.weight: special tokens")
        assert made["taken"]["item_input.ids.weight: special tokens"] == [4, 16]
    assert set(made["taken"]) == expected
    assert {"item_input.ids.weight", "item_head.bias"} <= set(made["new"])
    assert "item_head.users.weight" not in made["trained"]
    vectors = initial.item_head.users.weight
    assert vectors.abs().max() > 0 and torch.equal(model.item_head.users.weight, vectors)
    assert f"taken over: {len(expected)} of" in capsys.readouterr().out
    main(["evaluate", f"--data={cut / 'other'}", f"--pretrained={tmp_path / 'run' / 'model'}"])


def test_nothing_is_taken_without_a_model(cut, tmp_path):
    main(["finetune", *of(cut, "other"), f"--output={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "transfer.json").exists()


def test_other_users_of_the_same_items(cut, tmp_path):
    data = [SequenceDataset.load(cut / name) for name in ("first", "second")]
    assert data[0].items_hash == data[1].items_hash
    made, model, initial = tuned(cut, tmp_path / "run", "second", "first", "users=other")
    assert set(made["taken"]) == set(initial.state_dict()) - {"item_head.users.weight"}
    assert model.num_users == data[1].num_users != initial.num_users


def test_parts_that_cannot_be_taken(cut, tmp_path, capsys):
    def refused(*init: str, data: str = "other", start: str = "drama") -> str:
        with pytest.raises(SystemExit) as stopped:
            tuned(cut, tmp_path / "run", data, start, *init)
        return str(stopped.value)

    assert "knows none of" in refused("take=[items,encoder]")
    assert "knows none of" in refused("take=[head]")
    assert "they are of other users" in refused("take=[users]", start="first")
    assert "users, whose vectors init.users: other starts anew" in refused(
        "take=[users]", "users=other"
    )
    assert "names 'vectors', expected some of ['items', 'encoder', 'head', 'input'" in refused(
        "take=[vectors]"
    )


def test_peterrec_from_pretraining_to_a_profile(tmp_path, capsys):
    """Of the frozen model patches, biases of items and heads are trained, and nothing else."""
    source = shared("ml-100k")
    flags = said(f"data={tmp_path / 'data'}", "config=peterrec", "device=cpu")
    main(
        ["prepare", *said(f"source={source}", f"output={tmp_path / 'data'}", "format=recbole",
                          "max_users=200", "k_core=5")]
    )  # fmt: skip

    def short(stage: str) -> list[str]:
        return [*flags, *said(f"{stage}.steps=8", f"{stage}.validate_every=8")]

    main(["pretrain", *short("pretraining"), "--model.width=16", f"--output={tmp_path / 'base'}"])
    base = UserModel.from_pretrained(tmp_path / "base" / "model")
    for task in ("recommendation", "profile"):
        run, model = tmp_path / task, tmp_path / "base" / "model"
        form = "parallel" if task == "profile" else "serial"
        main(
            ["finetune", *short(task), f"--task={task}", f"--init={model}", f"--output={run}",
             f"--{task}.init.patch=4", f"--{task}.init.patch_form={form}"]
        )  # fmt: skip
        after = UserModel.from_pretrained(run / "model")
        assert after.config.encoder.dilated.patch_form == form
        for name, value in base.state_dict().items():
            if not name.startswith("item_head."):
                assert torch.equal(after.state_dict()[name], value), name
        trained = json.loads((run / "transfer.json").read_text())["trained"]
        assert sum(".patches." in name for name in trained) == 4 * 2 * 4
        rest = [name for name in trained if ".patches." not in name]
        assert all(name.startswith(("item_head.bias", "user_attributes.")) for name in rest)
        main(
            ["evaluate", *flags, f"--task={task}", f"--pretrained={run / 'model'}"]
        )  # fmt: skip
    assert "trained: " in capsys.readouterr().out
