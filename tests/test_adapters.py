# SPDX-License-Identifier: Apache-2.0
"""Patches and heads of several tasks beside one frozen model."""

import json
import shutil
from pathlib import Path

import polars
import pytest
import torch
from builders import model_of, synthetic
from safetensors.torch import load_file, save_file

import fastrec
from fastrec import (
    Recommender,
    SequenceDataset,
    UserModel,
    load_model,
    save_adapter,
    user_vectors,
    with_adapter,
)
from fastrec.cli import main
from fastrec.nn.model_files import write_digests

SMALL = ["--config=peterrec", "--model.width=8", "--model.max_len=8", "--users.fraction=0.5",
         "--model.encoder.dilated.dilations=[1, 2]"]  # fmt: skip
TASKS = {"recommendation": "next", "profile": "profile"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model, and two tasks trained beside it, each saved whole and as an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    data = synthetic(folder, num_users=120, num_items=40)
    flags = [*SMALL, f"--data={data}"]
    main(["pretrain", *flags, f"--output={folder / 'base'}", "--pretraining.steps=2"])
    for task, name in TASKS.items():
        main(["finetune", *flags, f"--task={task}", f"--init={folder / 'base' / 'model'}",
              f"--output={folder / name}", f"--{task}.steps=3", f"--{task}.init.patch=3",
              f"--{task}.learning_rate=0.05", f"--{task}.monitor=steps"])  # fmt: skip
        main(["adapter", f"--pretrained={folder / name / 'model'}",
              f"--base={folder / 'base' / 'model'}",
              f"--output={folder / 'adapters' / name}"])  # fmt: skip
    return folder


def of(runs, name):
    return runs / name / "model", runs / "adapters" / name


def test_the_page_switches_between_tasks(runs, tmp_path, monkeypatch):
    """The block of docs/transfer.md."""
    page = Path(__file__).parent.parent / "docs" / "transfer.md"
    text = page.read_text().split("<!-- adapters -->")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "peterrec").symlink_to(runs / "base")
    (tmp_path / "adapters").symlink_to(runs / "adapters")
    names = {"fastrec": fastrec, "dataset": SequenceDataset.load(runs / "data")}
    exec(compile(text, "transfer.md", "exec"), names)
    base, tasks = names["base"], names["tasks"]
    shared = {each.item_table.data_ptr() for each in (base, *tasks.values())}
    assert set(tasks) == set(TASKS.values()) and len(shared) == 1


def test_what_is_saved_is_patches_and_heads_alone(runs, tmp_path, capsys):
    base = load_file(runs / "base" / "model" / "model.safetensors")
    for name in TASKS.values():
        model, adapter = of(runs, name)
        whole, saved = (
            load_file(model / "model.safetensors"),
            load_file(adapter / "adapter.safetensors"),
        )
        expected = {n for n in whole if n not in base or not torch.equal(whole[n], base[n])}
        assert set(saved) == expected and any(".patches." in n for n in saved)
        assert all(".patches." in n or n.startswith("item_head.") for n in saved)
        assert all(torch.equal(saved[n], whole[n]) for n in saved)
        told = json.loads((adapter / "adapter.json").read_text())
        assert told["tensors"] == {n: list(part.shape) for n, part in saved.items()}
        assert (told["patch"], told["patch_form"]) == (3, "serial")
    main(["adapter", f"--pretrained={runs / 'profile' / 'model'}",
          f"--base={runs / 'base' / 'model'}", f"--output={tmp_path / 'made'}"])  # fmt: skip
    heads = load_file(runs / "profile" / "model" / "heads.safetensors")
    some = sum(part.numel() for part in [*saved.values(), *heads.values()])
    tuned = UserModel.from_pretrained(runs / "profile" / "model")
    all_of = sum(p.numel() for p in tuned.parameters())
    all_of += sum(part.numel() for part in heads.values())
    said = capsys.readouterr().out
    assert f"{some:,} of {all_of:,} parameters ({some / all_of:.1%})" in said
    assert "user_attributes.linear.weight [" in said


@pytest.mark.parametrize("name", TASKS.values())
def test_a_model_with_an_adapter_is_the_one_that_was_trained(runs, name):
    """Bit for bit, with the memory of the base, which stays as it was."""
    data = SequenceDataset.load(runs / "data")
    folder, adapter = of(runs, name)
    trained, base = load_model(folder, data), load_model(runs / "base" / "model", data)
    before = user_vectors(base, data, pool="last")
    made = load_model(runs / "base" / "model", data, adapter=adapter)
    for key, part in trained.state_dict().items():
        assert torch.equal(made.state_dict()[key], part), key
    assert user_vectors(made, data, pool="last").equals(user_vectors(trained, data, pool="last"))
    best = Recommender(made, data).recommend(3)
    assert best.equals(Recommender(trained, data).recommend(3))
    assert made.recipe == trained.recipe and made.trained_on["stage"] == trained.trained_on["stage"]
    shared = with_adapter(base, adapter)
    assert shared.item_embedding.weight.data_ptr() == base.item_embedding.weight.data_ptr()
    assert not user_vectors(shared, data, pool="last").equals(before)
    assert user_vectors(base, data, pool="last").equals(before)


def test_a_loaded_adapter_does_not_change_with_its_file(runs, tmp_path):
    """`cp` and `rsync --inplace` write into the file that is there."""
    data = SequenceDataset.load(runs / "data")
    shutil.copytree(of(runs, "next")[1], tmp_path / "adapter")
    made = load_model(runs / "base" / "model", data, adapter=tmp_path / "adapter")
    before = Recommender(made, data).recommend(3)
    file = tmp_path / "adapter" / "adapter.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(file.stat().st_size // 2))
    assert Recommender(made, data).recommend(3).equals(before)


def test_tasks_are_switched_on_the_command_line(runs, tmp_path, capsys):
    for name in TASKS.values():
        folder, adapter = of(runs, name)
        both = [f"--pretrained={runs / 'base' / 'model'}", f"--adapter={adapter}"]
        commands = [("recommend", "csv"), ("embed", "parquet"), ("similar", "csv")]
        for command, kind in commands[: 2 + (name == "next")]:
            found = []
            for place, flags in enumerate(([f"--pretrained={folder}"], both)):
                file = tmp_path / f"{name}-{command}-{place}.{kind}"
                main([command, f"--data={runs / 'data'}", f"--output={file}", *flags])
                found.append(getattr(polars, f"read_{kind}")(file))
            assert found[0].equals(found[1]), (name, command)
        capsys.readouterr()
        main(["evaluate", f"--data={runs / 'data'}", f"--pretrained={folder}"])
        alone = capsys.readouterr().out
        main(["evaluate", f"--data={runs / 'data'}", *both])
        assert capsys.readouterr().out == alone, name
        assert ("held-out users" in alone) == (name == "profile")


def test_held_out_users_are_those_that_neither_has_seen(runs, tmp_path):
    """The base has seen half of the users, and so has the adapter, whose list is empty."""
    _, adapter = of(runs, "profile")
    with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
        main(["evaluate", f"--data={runs / 'data'}", f"--pretrained={runs / 'base' / 'model'}",
              f"--adapter={adapter}", "--config=peterrec", "--task=profile",
              "--users.fraction=0.5", "--users.seed=4"])  # fmt: skip


def test_another_model_is_refused(runs, tmp_path):
    _, adapter = of(runs, "next")
    base = UserModel.from_pretrained(runs / "base" / "model")
    name, weight = next(iter(base.encoder.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="belongs to another model: its patches and heads were"):
        with_adapter(base, adapter)
    with pytest.raises(ValueError, match="belongs to another model"):
        with_adapter(model_of(), adapter)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        with_adapter(base, runs / "next" / "model")
    with pytest.raises(FileNotFoundError, match="but an adapter: --pretrained is its model"):
        UserModel.from_pretrained(adapter)
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"was not trained beside .*: encoder.{name} is another"):
        save_adapter(tmp_path / "made", runs / "next" / "model", tmp_path / "other")
    with pytest.raises(ValueError, match="has nothing that .* has not"):
        save_adapter(tmp_path / "made", tmp_path / "other", tmp_path / "other")
    model_of(num_items=base.num_items).save_pretrained(tmp_path / "kind")
    with pytest.raises(ValueError, match="model.max_len of .* is 8, that of .* 10"):
        save_adapter(tmp_path / "made", runs / "next" / "model", tmp_path / "kind")
    model_of(num_items=7).save_pretrained(tmp_path / "items")
    with pytest.raises(ValueError, match="has 40 items, .* 7: an adapter is of the same items"):
        save_adapter(tmp_path / "made", runs / "next" / "model", tmp_path / "items")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is there, and holds no adapter"):
        save_adapter(tmp_path / "mine", runs / "next" / "model", runs / "base" / "model")
    shutil.copytree(adapter, tmp_path / "noted")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="will not be replaced: 'notes.txt' would be lost"):
        save_adapter(tmp_path / "noted", runs / "next" / "model", runs / "base" / "model")
    assert (tmp_path / "noted" / "notes.txt").read_text() == "mine"
    (tmp_path / "noted" / "notes.txt").unlink()
    save_adapter(tmp_path / "noted", runs / "next" / "model", runs / "base" / "model")
    assert not (tmp_path / "made").exists()


def test_tomorrows_items_come_after_the_adapter(runs, tmp_path):
    """The adapter is of the items that both were trained on."""
    model, adapter = runs / "base" / "model", runs / "adapters" / "next"
    more = SequenceDataset.load(synthetic(tmp_path, num_users=50, num_items=45, seed=2))
    with pytest.warns(UserWarning, match="was trained on"):
        grown = load_model(model, more)
        with pytest.raises(ValueError, match=r"load_model\(FOLDER, dataset, adapter=\.\.\)"):
            with_adapter(grown, adapter)
        found = load_model(model, more, adapter=adapter, same_users=False)
    assert found.num_items == more.num_items


def test_damage_is_named(runs, tmp_path):
    _, adapter = of(runs, "next")
    base = UserModel.from_pretrained(runs / "base" / "model")
    for name in ("adapter.json", "adapter.safetensors", "recipe.json"):
        shutil.copytree(adapter, tmp_path / name)
        with (tmp_path / name / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(ValueError, match=f"{name} is not the file that was written with"):
            with_adapter(base, tmp_path / name)

    def changed(name, **more):
        shutil.copytree(adapter, tmp_path / name)
        told = json.loads((tmp_path / name / "adapter.json").read_text()) | more
        (tmp_path / name / "adapter.json").write_text(json.dumps(told))
        write_digests(tmp_path / name)
        return tmp_path / name

    for more, message in (
        ({"patch": "3"}, "adapter.json: adapter.patch"),
        ({"patch": -1}, "adapter.json: patch must be at least 0"),
        ({"patch": 4}, "must be float32 .*, the file has float32"),
        ({"format": 2}, "adapter.json: unknown format 2"),
        ({"more": 1}, "adapter.json: .*more"),
    ):
        with pytest.raises(ValueError, match=message):
            with_adapter(base, changed(f"{more}", **more))
    bad = changed("weights")
    tensors = load_file(bad / "adapter.safetensors")
    tensors[next(iter(tensors))][:] = float("nan")
    save_file(tensors, bad / "adapter.safetensors")
    write_digests(bad)
    with pytest.raises(ValueError, match="is not finite"):
        with_adapter(base, bad)
