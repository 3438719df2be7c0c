# SPDX-License-Identifier: Apache-2.0
"""Errors of the command line are one line that names the problem."""

import subprocess
import sys

import pytest
from cli_runs import FLAGS

from fastrec.cli import main


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("seed", "[1, 2]", "seed is set by seeds=1"),
        (
            "pretraining.views.main.1.mask.share",
            "[0.1]",
            r"'1' is no key of list; those are \['0'\]",
        ),
        ("pretraining.views.main.0", "[0.1]", "'0' is a group of keys: 0.KEY"),
        ("pretraining.views.side.0", "[0.1]", r"'side' is no key of dict; those are \['main'\]"),
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
            ["sweep", "--config=uprec-mip", *FLAGS, f"--data={runs / 'data'}",
             f"--output={tmp_path}", f"--key={key}", f"--values={values}"]
        )  # fmt: skip


def test_monitor_must_be_a_metric_of_the_task(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"monitor is 'score', the metrics of this task are"):
        main(
            ["pretrain", "--config=uprec-mip", *FLAGS, f"--data={runs / 'data'}",
             f"--output={tmp_path / 'run'}", "--pretraining.monitor=score"]
        )  # fmt: skip


def test_objectives_need_attributes_and_relations(runs, tmp_path):
    for objective, view, message in (
        ("friends", "[friend: {}]", "has no relations: prepare it with --relations"),
        ("user_attributes", "[]", "has no attributes: prepare the data set with --user_attributes"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(
                ["pretrain", "--config=uprec-mip", *FLAGS, f"--data={runs / 'data'}",
                 f"--output={tmp_path / objective}", f"--pretraining.views.main={view}",
                 f"--pretraining.objectives={{item: null, {objective}: {{}}}}"]
            )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--source=x", "--output=y", "--format=pairs", "--user_column=who"],
            "--user_column has no effect on --format pairs",
        ),
        (
            ["prepare", "--source=x", "--output=y", "--format=s3rec", "--on_duplicate=drop"],
            "--on_duplicate has no effect on --format s3rec",
        ),
        (["pretrain", "--config=uprec-mpi", "--data=x", "--output=y"], "the recipes are adaptssr"),
        (["pretrain", "--config=sasrec", "--data=nowhere", "--output=y"], "nowhere"),
        (["evaluate", "--config=sasrec", "--data={data}", "--pretrained=nowhere"], "nowhere"),
        (["evaluate", "--data={data}", "--pretrained=nowhere"], "nowhere holds no fastrec model"),
        (
            [
                "finetune",
                "--config=sasrec",
                "--data={data}",
                "--output=y",
                "--recommendation.steps=9",
            ],
            "there is no objective to train in stage 'recommendation'; stages are ['pretraining']",
        ),
        (
            ["pretrain", "--data={data}", "--output=y"],
            "there is no stage to run: --config names a recipe",
        ),
        (
            ["finetune", "--config=uprec", "--data={data}", "--output=y", "--task=profiles"],
            "this recipe has no stage 'profiles'; its stages are ['pretraining',"
            " 'recommendation', 'profile', 'relation']",
        ),
        (
            ["finetune", "--config=sasrec", "--data={data}", "--output=y", "--task=profile"],
            "this recipe has no stage 'profile'; its stages are ['pretraining'] (--task)",
        ),
        (
            [
                "evaluate",
                "--config=sasrec",
                "--data={data}",
                "--pretrained={model}",
                "--task=relation",
            ],
            "this recipe has no stage 'relation'; its stages are ['pretraining']",
        ),
        (["recommend", "--k=x"], "\"k\": Expected a <class 'int'>"),
        (["pretrain", "--config=sasrec", "--data"], "--data: expected one argument"),
        (["pretrain", "--config"], "--config has no value"),
        (["pretrain", "--seed", "--resume=true"], "--seed has no value"),
        (["pretrain", "--config=sasrec", "extra"], "unrecognized arguments: extra"),
        (["pretrian"], "invalid choice: 'pretrian'"),
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


@pytest.mark.parametrize(("module", "command"), [("lightning", "pretrain"), ("yaml", "evaluate")])
def test_without_the_training_extra_the_command_says_what_to_install(module, command, runs):
    program = (
        f"import sys; sys.modules[{module!r}] = None; import fastrec.__main__ as m;"
        f"sys.argv = ['fastrec', {command!r}, '--config=sasrec', '--data={runs / 'data'}',"
        f" '--output={runs / 'none'}', '--pretrained=x'][: 5 if {command!r} == 'pretrain' else 6];"
        "m.main()"
    )
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert got.returncode == 1
    assert got.stderr == f"fastrec: error: {module} is missing: pip install 'fastrec[train]'\n"
