"""The command line on a real file, from raw text to recommendations in the original ids."""

import json
import subprocess
import sys

import numpy as np
import polars
import pytest

from fastrec.cli import _read_users, main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.synthetic import generate
from fastrec.evaluation import serve
from fastrec.evaluation.protocols import row_blocks
from fastrec.nn.user_model import UserModel
from fastrec.training.config import Recipe, Users
from fastrec.training.run_folder import describe_model
from fastrec.training.sweep import with_value

FLAGS = [
    "--model.width=16", "--model.layers=1", "--pretraining.steps=20",
    "--pretraining.validate_every=10", "--finetuning.steps=10", "--finetuning.validate_every=5",
    "--evaluation.negatives=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """200 users with string ids who walk around a ring of 60 items, as csv."""
    path = tmp_path_factory.mktemp("raw") / "log.csv"
    generator = np.random.default_rng(0)
    lines = ["who,what,when"]
    for user in range(200):
        place = int(generator.integers(60))
        for event in range(int(generator.integers(5, 12))):
            lines.append(f"u{user},item-{place},{1000 * user + event}")
            place = (place + int(generator.integers(1, 3))) % 60
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    main(
        ["prepare", f"--source={raw}", f"--output={data}", "--format=table", "--user_column=who",
         "--item_column=what", "--timestamp_column=when"]
    )  # fmt: skip
    config = ["--config", "uprec-mip", *FLAGS, f"--data={data}"]
    main(["pretrain", *config, f"--output={folder / 'pretrain'}"])
    main(
        ["finetune", *config, f"--init={folder / 'pretrain' / 'model'}",
         f"--output={folder / 'finetune'}"]
    )  # fmt: skip
    return folder


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
    assert _read_users(None) is None
    (tmp_path / "users.txt").write_text("Ann Lee\r\n\n u7 \n")
    assert _read_users(tmp_path / "users.txt") == ["Ann Lee", "u7"]
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
    "--config=uprec", "--model.width=16", "--model.layers=1", "--pretraining.steps=20",
    "--pretraining.validate_every=20", "--profile.steps=40", "--profile.validate_every=20",
    "--profile.learning_rate=0.01", "--relation.steps=20", "--relation.validate_every=20",
    "--users.fraction=0.7", "--social.negatives=9", "--evaluation.negatives=20",
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

    # The head of pre-training reads the maximum, that of fine-tuning [CLS].
    assert json.loads((model / "trained_on.json").read_text())["attribute_pool"] == "max"
    for command, path in (("evaluate", "pretrained"), ("finetune", "init")):
        with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
            main(
                [command, *config, "--users.seed=3", "--task=relation", f"--{path}={model}",
                 f"--output={tmp_path / 'other'}"]
            )  # fmt: skip

    call("evaluate", "recommendation", pretrained=model, output=tmp_path / "next.json")
    groups = json.loads((tmp_path / "next.json").read_text())["by_length"]
    assert [name.split(" (")[0] for name in groups] == ["< 8", "8-14", ">= 15"]
    with pytest.raises(SystemExit, match="the model was not trained for this task"):
        (model / "heads.safetensors").unlink()
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
    flags = [*FLAGS, f"--data={runs / 'data'}", f"--output={tmp_path}", "--key=model.dropout"]
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


def test_a_model_meets_only_the_items_that_it_was_trained_on(runs, raw, tmp_path):
    """The same number of items in another order: every id would mean another item."""
    log, other = tmp_path / "log.csv", tmp_path / "data"
    log.write_text(raw.read_text().replace("item-1", "thing-1"))
    main(
        ["prepare", f"--source={log}", f"--output={other}", "--format=table", "--user_column=who",
         "--item_column=what", "--timestamp_column=when"]
    )  # fmt: skip
    with pytest.raises(SystemExit, match="was trained on other items, or in another order"):
        main(
            ["recommend", f"--data={other}", f"--pretrained={runs / 'pretrain' / 'model'}",
             f"--output={tmp_path / 'best.csv'}"]
        )  # fmt: skip
    with pytest.raises(SystemExit, match="items was '[0-9a-f]+', not '[0-9a-f]+'"):
        main(
            ["pretrain", "--config=uprec-mip", *FLAGS, f"--data={other}", "--resume=true",
             f"--output={runs / 'pretrain'}"]
        )  # fmt: skip


def test_a_fine_tuned_model_remembers_whom_its_pre_training_saw(runs, tmp_path):
    """Pre-trained on 90 % of the users, fine-tuned on 80 %: not all of the others are new to it. A
    resumed run need not say what it started from."""
    flags = [f"--data={runs / 'data'}", "--config=uprec-mip", *FLAGS, "--users.fraction=0.8"]
    start = runs / "pretrain" / "model"
    main(["finetune", *flags, f"--init={start}", f"--output={tmp_path / 'run'}"])
    users = json.loads((tmp_path / "run" / "model" / "trained_on.json").read_text())["users"]
    assert [each["fraction"] for each in users] == [0.8, 0.9]
    recipe = Recipe(users=Users(fraction=0.8))
    folder, dataset = tmp_path / "run" / "model", SequenceDataset.load(runs / "data")
    describe_model(folder, dataset, recipe, recipe.finetuning)
    assert json.loads((folder / "trained_on.json").read_text())["users"] == users
    with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
        main(["evaluate", *flags, f"--pretrained={tmp_path / 'run' / 'model'}", "--task=profile"])


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("pretraining.seed", "[1, 2]", "pretraining.seed is set by seeds=1"),
        ("model.size", "[1]", "'size' is no key of ModelConfig"),
        ("model", "[1]", "'model' is a group of keys: model.KEY"),
        ("model.width.x", "[1]", "'width' has no key 'x'"),
        ("model.width", "[0.5]", "width is 16, expected another int, got 0.5"),
        ("model.width", "[]", "there is nothing to run"),
    ],
)
def test_sweep_errors(runs, tmp_path, key, values, message):
    with pytest.raises(SystemExit, match=message):
        main(
            ["sweep", *FLAGS, f"--data={runs / 'data'}", f"--output={tmp_path}",
             f"--key={key}", f"--values={values}"]
        )  # fmt: skip


def test_monitor_must_be_a_metric_of_the_task(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"monitor is 'score', the metrics of this task are"):
        main(
            ["pretrain", *FLAGS, f"--data={runs / 'data'}", f"--output={tmp_path / 'run'}",
             "--pretraining.monitor=score"]
        )  # fmt: skip


def test_tasks_need_attributes_and_relations(runs, tmp_path):
    for objective, message in (
        ("social_relation", "has no relations: prepare it with --relations"),
        ("user_attribute", "has no attributes: prepare the data set with --user_attributes"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(
                ["pretrain", *FLAGS, f"--data={runs / 'data'}", f"--output={tmp_path / objective}",
                 f"--pretraining.objectives.{objective}=1"]
            )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--source=x", "--output=y", "--format=pairs", "--user_column=who"],
            "column names are for --format table",
        ),
        (
            ["prepare", "--source=x", "--output=y", "--format=s3rec", "--on_duplicate=drop"],
            "on_duplicate has no meaning for s3rec",
        ),
        (["pretrain", "--config=uprec-mpi", "--data=x", "--output=y"], "the recipes are bert4rec"),
        (["pretrain", "--data=nowhere", "--output=y"], "nowhere"),
        (["evaluate", "--data={data}", "--pretrained=nowhere"], "nowhere"),
        (
            ["recommend", "--data={data}", "--pretrained={model}", "--output=x.txt"],
            "x.txt: expected",
        ),
        (
            [
                "recommend",
                "--data={data}",
                "--pretrained={model}",
                "--output=x.csv",
                "--users={users}",
            ],
            "the first is 'nobody'",
        ),
        (
            ["recommend", "--data={data}", "--pretrained={model}", "--output=x.csv", "--k=0"],
            "k must",
        ),
        (["embed", "--data={data}", "--pretrained={model}", "--output=x.csv"], "parquet file"),
    ],
)
def test_errors_are_one_line_that_names_the_problem(runs, tmp_path, arguments, message):
    (tmp_path / "users.txt").write_text("nobody\n")
    paths = {
        "data": runs / "data",
        "model": runs / "pretrain" / "model",
        "users": tmp_path / "users.txt",
    }
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**paths) for argument in arguments])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_sweep_of_a_switch():
    assert with_value(Recipe(), "model.pre_norm", True).model.pre_norm is True
    with pytest.raises(ValueError, match="expected another bool, got 1"):
        with_value(Recipe(), "model.pre_norm", 1)
    with pytest.raises(ValueError, match="expected another float, got True"):
        with_value(Recipe(), "model.dropout", True)


def test_without_the_training_extra_the_command_says_what_to_install():
    program = "import sys; sys.modules['lightning'] = None; import fastrec.__main__ as m; m.main()"
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert got.returncode == 1
    assert got.stderr == "fastrec: error: lightning is missing: pip install 'fastrec[train]'\n"


def test_help_and_print_config_name_every_recipe_key():
    run = [sys.executable, "-m", "fastrec", "pretrain"]
    text = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--pretraining.learning_rate" in text and "--model.dropout" in text
    config = subprocess.run(
        [*run, "--config", "uprec-mip", "--print_config"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "fraction: 0.9" in config
