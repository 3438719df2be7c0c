# SPDX-License-Identifier: Apache-2.0
"""The command line on a real file, from raw text to recommendations in the original ids."""

import json
from dataclasses import replace

import numpy as np
import polars
import pytest
import torch
from cli_runs import FLAGS
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from fastrec import cli_serve, recipes, serve
from fastrec.cli import _recipe_settings, main
from fastrec.cli_serve import read_ids
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare.synthetic import generate
from fastrec.data.settings import from_values
from fastrec.evaluation.blocks import row_blocks
from fastrec.nn.model_files import write_digests
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe, Users
from fastrec.training.heads_file import saved_scales
from fastrec.training.model_folder import hashes, read_seen
from fastrec.training.stage_data import held_out_users, select_users


def test_evaluate_writes_the_metrics_beside_popularity(runs, capsys):
    main(
        ["evaluate", "--config=uprec-mip", *FLAGS, f"--data={runs / 'data'}",
         f"--pretrained={runs / 'finetune' / 'model'}", f"--output={runs / 'metrics.json'}"]
    )  # fmt: skip
    result = json.loads((runs / "metrics.json").read_text())
    assert result["users"] == 180  # the recipe evaluates 90 % of the users
    assert set(result["metrics"]) == {"popularity", "model"}
    assert 0 <= result["metrics"]["model"]["HR@10"] <= 1
    assert "popularity" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_recommend_returns_original_ids_that_the_user_has_not_seen(runs, raw, tmp_path, ending):
    (tmp_path / "users.txt").write_text("u7\nu3\n")
    output = tmp_path / f"best.{ending}"
    main(
        ["recommend", f"--data={runs / 'data'}", f"--pretrained={runs / 'finetune' / 'model'}",
         f"--output={output}", f"--users={tmp_path / 'users.txt'}", "--k=5"]
    )  # fmt: skip
    frame = polars.read_csv(output) if ending == "csv" else polars.read_parquet(output)
    assert frame["user_id"].to_list() == ["u7"] * 5 + ["u3"] * 5
    assert frame["rank"].to_list() == [1, 2, 3, 4, 5] * 2
    log = polars.read_csv(raw)
    for user in ("u7", "u3"):
        seen = set(log.filter(polars.col("who") == user)["what"])
        recommended = frame.filter(polars.col("user_id") == user)["item_id"].to_list()
        assert len(set(recommended)) == 5 and not seen & set(recommended)
        assert all(item.startswith("item-") for item in recommended)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_users_in_parts_are_all_users(runs, tmp_path, monkeypatch, capsys, ending):
    """Parts in memory, and parts of several processes, are the file of one go."""
    read = polars.read_csv if ending == "csv" else polars.read_parquet

    def recommended(name: str, *flags: str):
        output = tmp_path / f"{name}.{ending}"
        main(
            ["recommend", f"--data={runs / 'data'}", f"--pretrained={runs / 'finetune' / 'model'}",
             f"--output={output}", "--k=3", *flags]
        )  # fmt: skip
        return read(output)

    whole = recommended("whole")
    assert "600 rows, the 3 best items of 200 of 200 users" in capsys.readouterr().out
    monkeypatch.setattr(cli_serve, "USERS", 33)
    assert_frame_equal(recommended("small"), whole)  # scores to rounding: other blocks
    assert "600 rows, the 3 best items of 200 of 200 users" in capsys.readouterr().out
    if ending == "parquet":
        assert polars.read_parquet_schema(tmp_path / "small.parquet") == whole.schema
    parts = [recommended(f"part-{number}", f"--part={number}/3") for number in (1, 2, 3)]
    assert [part["user_id"].n_unique() for part in parts] == [66, 67, 67]
    assert_frame_equal(polars.concat(parts), whole)
    (tmp_path / "two.txt").write_text("u7\nu3\n")
    two = f"--users={tmp_path / 'two.txt'}"
    some = [recommended(f"two-{number}", f"--part={number}/3", two) for number in (2, 3)]
    assert [part["user_id"].unique().to_list() for part in some] == [["u7"], ["u3"]]
    none = recommended("two-1", "--part=1/3", two)  # more parts than users: one has no rows
    assert none.schema == some[0].schema or (ending == "csv" and none.columns == some[0].columns)
    assert none.height == 0
    (tmp_path / "nobody.txt").write_text("")
    with pytest.raises(SystemExit, match="the list of users is empty|nobody.txt"):
        recommended("nobody", f"--users={tmp_path / 'nobody.txt'}")
    (tmp_path / "unknown.txt").write_text("u7\n" * 40 + "nobody\n")
    with pytest.raises(SystemExit, match="1 of 41 users are not in the data set, the first is 'no"):
        recommended("unknown", f"--users={tmp_path / 'unknown.txt'}")
    assert not (tmp_path / f"unknown.{ending}").exists()


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/3/4", "-1/3", "1/0"])
def test_parts_that_there_are_not(runs, tmp_path, part):
    with pytest.raises(SystemExit, match=f"part must be like 2/8, from 1/8 to 8/8, got '{part}'"):
        main(
            ["recommend", f"--data={runs / 'data'}", f"--pretrained={runs / 'finetune' / 'model'}",
             f"--output={tmp_path / 'best.csv'}", f"--part={part}"]
        )  # fmt: skip
    with pytest.raises(SystemExit, match="--part is of users, not of --histories"):
        main(
            ["recommend", f"--data={runs / 'data'}", f"--pretrained={runs / 'finetune' / 'model'}",
             f"--output={tmp_path / 'best.csv'}", "--part=1/2", "--histories=there.jsonl"]
        )  # fmt: skip


def test_recommend_with_logit_adjustment_turns_from_popular_items(runs, tmp_path):
    output = tmp_path / "best.csv"
    main(
        ["recommend", f"--data={runs / 'data'}", f"--pretrained={runs / 'finetune' / 'model'}",
         f"--output={output}", "--logit_adjustment=1000", "--k=3", "--seen=none"]
    )  # fmt: skip
    dataset = SequenceDataset.load(runs / "data")
    counts = dict(zip(dataset.item_ids(), dataset.item_counts("train").tolist(), strict=True))
    found = [counts[item] for item in polars.read_csv(output)["item_id"]]
    assert found == 200 * sorted(counts.values())[:3]


def test_users_are_one_a_line_and_their_table_is_read_once(runs, tmp_path, monkeypatch):
    assert read_ids(None) is None
    (tmp_path / "users.txt").write_text("Ann Lee\r\n\nu7\n")
    assert read_ids(tmp_path / "users.txt") == ["Ann Lee", "u7"]
    reads = []
    monkeypatch.setattr(serve, "row_blocks", lambda count: row_blocks(count, 20))
    original = SequenceDataset.user_ids
    monkeypatch.setattr(SequenceDataset, "user_ids", lambda self: reads.append(1) or original(self))
    dataset = SequenceDataset.load(runs / "data")
    model = UserModel.from_pretrained(runs / "finetune" / "model")
    whole = serve.recommend(model, dataset, 3)
    assert whole["user_id"].to_list() == np.repeat(original(dataset), 3).tolist()
    assert len(reads) <= 2, "once for the ids, once for the order"


def test_embed_writes_one_finite_vector_a_user(runs, tmp_path):
    output = tmp_path / "users.parquet"
    main(
        ["embed", f"--data={runs / 'data'}", f"--pretrained={runs / 'pretrain' / 'model'}",
         f"--output={output}"]
    )  # fmt: skip
    vectors = np.stack(polars.read_parquet(output)["vector"].to_list())
    assert vectors.shape == (200, 16) and np.isfinite(vectors).all()
    assert vectors.std(0).min() > 0


SMALL = [
    "--config=uprec", "--model.width=16", "--model.encoder.transformer.layers=1",
    "--pretraining.steps=20", "--pretraining.validate_every=20", "--profile.steps=40",
    "--profile.validate_every=20", "--profile.learning_rate=0.01", "--relation.steps=20",
    "--relation.validate_every=20", "--users.fraction=0.7", "--evaluation.friend_negatives=9",
    "--evaluation.negatives=20",
]  # fmt: skip


def test_uprec_from_pretraining_to_profiles_and_friends(tmp_path, capsys):
    generate(tmp_path / "data", num_users=600, num_items=150, mean_friends=30, seed=3)
    config = [*SMALL, f"--data={tmp_path / 'data'}"]

    def call(command, task=None, run=None, **more):
        more |= {} if task is None else {"task": task}
        main([command, *config, *(f"--{name}={value}" for name, value in more.items())])

    model = tmp_path / "pretrain" / "model"
    call("pretrain", output=tmp_path / "pretrain")
    results = {}
    for task in ("profile", "relation"):
        call("finetune", task, output=tmp_path / task, init=model)
        for name, path in (("tuned", tmp_path / task / "model"), ("pretrained", model)):
            output = tmp_path / f"{task}-{name}.json"
            call("evaluate", task, pretrained=path, output=output)
            results[task, name] = json.loads(output.read_text())
    profile, relation = results["profile", "tuned"], results["relation", "tuned"]
    assert profile["users"] == 180  # 30 % are held out
    assert set(profile["metrics"]["model"]) == {"score", "mean_rating MSE", "region accuracy"}
    assert relation["trained_similarity"] and results["relation", "pretrained"]["pairs"] > 50
    assert set(relation["metrics"]) == {"shared items (Sim)", "model"}
    assert "standard error" in capsys.readouterr().out

    # The head of pre-training reads the maximum, that of fine-tuning [CLS]: both are evaluated as
    # they were trained.
    dataset = SequenceDataset.load(tmp_path / "data")
    for pool, folder in (("max", model), ("cls", tmp_path / "profile" / "model")):
        scales = saved_scales(folder)["user_attributes"]
        assert [scale["pool"] for scale in scales] == [pool] * 2
        trained = UserModel.from_pretrained(folder)
        users = held_out_users(dataset, Users(fraction=0.7))
        with torch.no_grad():
            encoded = trained.encode(trained.inputs(dataset, users, "all"))
            heads = load_file(folder / "heads.safetensors")
            states = trained.pool(encoded, pool)
            logits = states @ heads["user_attributes.linear.weight"].T
            logits += heads["user_attributes.linear.bias"]
        labels = scales[1]["labels"]
        home = dataset.user_attributes()["region"].to_numpy()[users]
        accuracy = (np.array(labels)[logits[:, 1:].argmax(1)] == home).mean()
        found = results["profile", "tuned" if pool == "cls" else "pretrained"]["metrics"]["model"]
        assert found["region accuracy"] == pytest.approx(accuracy)

    for command, path in (("evaluate", "pretrained"), ("finetune", "init")):
        with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
            main(
                [command, *config, "--users.seed=3", "--task=relation", f"--{path}={model}",
                 f"--output={tmp_path / 'other'}"]
            )  # fmt: skip

    call("evaluate", "recommendation", pretrained=model, output=tmp_path / "next.json")
    groups = json.loads((tmp_path / "next.json").read_text())["by_length"]
    assert [name.split(" (")[0] for name in groups] == ["< 8", "8-14", ">= 15"]
    with pytest.raises(SystemExit, match="heads.safetensors is missing"):
        (model / "heads.safetensors").unlink()
        call("evaluate", "profile", pretrained=model)
    with pytest.raises(SystemExit, match="heads.safetensors holds no user_attributes"):
        write_digests(model)
        call("evaluate", "profile", pretrained=model)
    with pytest.raises(SystemExit, match=r"it was trained to predict \{'name': 'mean_rating'"):
        main(
            ["evaluate", *config, "--attributes=[{name: region},{name: mean_rating}]",
             "--task=profile", f"--pretrained={tmp_path / 'profile' / 'model'}"]
        )  # fmt: skip
    with pytest.raises(SystemExit, match="users.fraction is 1.0: no user is held out"):
        main(
            ["evaluate", *config, "--users.fraction=1.0", "--task=relation",
             f"--pretrained={model}"]
        )  # fmt: skip


def test_sweep_compares_values_and_computes_a_point_once(runs, tmp_path, capsys):
    flags = ["--config=uprec-mip", *FLAGS, f"--data={runs / 'data'}", f"--output={tmp_path}"]
    flags.append("--key=model.dropout")
    main(["sweep", *flags, "--values=[0.1, 0.4]", "--seeds=2"])
    assert "± " in capsys.readouterr().out and (tmp_path / "sweep.png").stat().st_size > 1000
    results = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert (
        set(results) == {"0.1", "0.4"}
        and len({str(r) for runs in results.values() for r in runs}) == 4
    )
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/metrics.json")}
    main(["sweep", *flags, "--values=[0.4, 0.1]"])
    assert len(times) == 4 and all(path.stat().st_mtime_ns == t for path, t in times.items())
    with pytest.raises(SystemExit, match="is from another recipe"):
        main(["sweep", *flags, "--values=[0.1]", "--pretraining.learning_rate=0.1"])


def test_a_model_knows_its_items_by_their_ids(runs, raw, tmp_path):
    """The same number of items in another order: every row number would mean another item."""
    log, other = tmp_path / "log.csv", tmp_path / "data"

    def recommended(text: str):
        log.write_text(text)
        main(
            ["prepare", f"--source={log}", f"--output={other}", "--format=table",
             "--user_column=who", "--item_column=what", "--timestamp_column=when",
             "--overwrite=true"]
        )  # fmt: skip
        main(
            ["recommend", f"--data={other}", f"--pretrained={runs / 'pretrain' / 'model'}",
             f"--output={tmp_path / 'best.csv'}", "--overwrite=true"]
        )  # fmt: skip
        return polars.read_csv(tmp_path / "best.csv")

    before = recommended(raw.read_text())
    renamed = raw.read_text().replace("item-11,", "a-new-thing,").replace("item-12,", "item-zzz,")
    with pytest.warns(UserWarning, match="2 of the [0-9]+ items of .* are new to it and begin as"):
        after = recommended(renamed)
    assert after.height == before.height
    same = (before["item_id"] == after["item_id"]).mean()
    assert same > 0.5, "the other items have their own vectors"
    with pytest.raises(SystemExit, match="was trained on other items: it knows none of"):
        recommended(raw.read_text().replace("item-", "thing-"))
    with pytest.raises(SystemExit, match="is of a run on another data set"):
        main(
            ["pretrain", "--config=uprec-mip", *FLAGS, f"--data={other}", "--resume=true",
             f"--output={runs / 'pretrain'}"]
        )  # fmt: skip


def test_a_fine_tuned_model_remembers_whom_its_pre_training_saw(runs, tmp_path):
    """Pre-trained on 90 % of the users, fine-tuned on 80 %: not all of the others are new to it. A
    resumed run need not say what it started from."""
    flags = [f"--data={runs / 'data'}", "--config=uprec-mip", *FLAGS, "--users.fraction=0.8"]
    flags.append("--users.seed=5")
    start = runs / "pretrain" / "model"
    main(["finetune", *flags, f"--init={start}", f"--output={tmp_path / 'run'}"])
    folder, dataset = tmp_path / "run" / "model", SequenceDataset.load(runs / "data")
    own, before = Users(fraction=0.8, seed=5), Users(fraction=0.9)
    both = torch.cat([select_users(dataset, users) for users in (own, before)]).unique()
    assert 180 < len(both) < 200
    assert read_seen(folder).tolist() == sorted(hashes(dataset.user_ids()[both]).tolist())
    with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
        main(["evaluate", *flags, f"--pretrained={tmp_path / 'run' / 'model'}", "--task=profile"])


def test_a_sweep_over_a_step_of_a_view(runs, tmp_path):
    key = "pretraining.views.main.0.mask.share"
    flags = ["--config=uprec-mip", *FLAGS, "--recommendation=null", f"--data={runs / 'data'}"]
    main(["sweep", *flags, f"--output={tmp_path}", f"--key={key}", "--values=[0.1, 0.9]"])
    tables = []
    for value in (0.1, 0.9):
        run = tmp_path / f"{key}={value}" / "seed-0" / "pretraining"
        stage = json.loads((run / "stage.json").read_text())
        assert stage["views"]["main"][0]["mask"]["share"] == value
        tables.append(load_file(run / "model" / "model.safetensors")["item_input.ids.weight"])
    assert not torch.equal(*tables)
    assert json.loads((tmp_path / "sweep.json").read_text())["key"] == key


@pytest.mark.parametrize("recipe", ["uprec-mip", "sasrec"])
def test_recommendations_for_histories_are_those_for_users(runs, recipe):
    dataset = SequenceDataset.load(runs / "data")
    config = from_values(Recipe, recipes.load(recipe)).model
    torch.manual_seed(0)
    model = UserModel(dataset.num_items, replace(config, width=16, max_len=6))
    ids = dataset.item_ids()
    histories = [ids[dataset.gather([user], "all").values].tolist() for user in range(200)]
    for seen in ("exclude", "none"):
        users = serve.recommend(model, dataset, 4, seen=seen)
        asked = serve.recommend(model, dataset, 4, seen=seen, histories=histories)
        assert asked["user_id"].to_list() == np.repeat(np.arange(200), 4).tolist()
        assert users.drop("user_id", "score").equals(asked.drop("user_id", "score"))
        np.testing.assert_allclose(users["score"], asked["score"], rtol=1e-5)
    alone = serve.recommend(model, dataset, 4, histories=histories[7:8])
    assert (
        alone["item_id"].to_list()
        == serve.recommend(model, dataset, 4, [dataset.user_ids()[7]])["item_id"].to_list()
    )
    with pytest.raises(ValueError, match="takes user_ids or histories, not both"):
        serve.recommend(model, dataset, 4, ["u1"], histories=histories)


def test_the_recipe_of_a_run_is_one_that_config_reads(runs):
    folder = runs / "pretrain"
    read = from_values(Recipe, recipes.load(str(folder / "recipe.json")))
    settings, rest = _recipe_settings(["--config", "uprec-mip", *FLAGS])
    assert read == from_values(Recipe, settings) and rest == []


def test_flags_of_the_command_may_stand_in_the_file(runs, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: uprec-mip\ndata: {runs / 'data'}\noutput: {tmp_path / 'file'}\n")
    main(["pretrain", "--config", str(file), *FLAGS, f"--output={tmp_path / 'flag'}"])
    assert (tmp_path / "flag" / "model").is_dir() and not (tmp_path / "file").exists()
