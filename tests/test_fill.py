# SPDX-License-Identifier: Apache-2.0
"""The masked-item model that fills views: what it finds against one sequence at a time, and CCL
from its pre-training to a next item."""

import json

import numpy as np
import pytest
import torch
from builders import Known, dataset_of, lists_of, loader_of, model_of, six_users, synthetic

from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.mask import MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.filler import Filler
from fastrec.random import Rng
from fastrec.training.model_folder import hashes, read_seen

MASK = 20


@pytest.mark.parametrize("config", [{}, {"tokens": ["cls", "sep"]}, {"head_transform": False}])
def test_finds_the_best_items_of_every_mask_and_their_scores(config):
    model = model_of(dropout=0.5, **config)
    torch.nn.init.normal_(model.item_head.bias)
    torch.nn.init.normal_(model.item_embedding.weight)
    sequences = [[1, 2, 3, 4], [], [7], [5, 9, 9, 0, 11, 3]]
    batch = MaskLast(2)(from_sequences(sequences), Rng(0, 0), Known(six_users()))
    items, scores = Filler(model)(batch, 6)
    assert items.shape == scores.shape == (5, 6) and not scores.requires_grad
    row = 0
    for sequence, masked in zip(sequences, lists_of(batch), strict=True):
        encoded = model.encode(model.frame(from_sequences([masked])))
        table = model.item_embedding.weight[:20]
        before = "cls" in model.config.tokens
        for place in range(max(0, len(sequence) - 2), len(sequence)):
            query = model.item_head.query(encoded.states[place + before])
            all_scores = table @ query + model.item_head.bias
            best = all_scores.topk(6)
            assert items[row].tolist() == best.indices.tolist()
            torch.testing.assert_close(scores[row], best.values.detach())
            row += 1
    assert row == 5
    assert not any(p.requires_grad for p in model.parameters()), "it is not trained"
    nothing = from_sequences([[], []])
    assert Filler(model)(MaskLast()(nothing, Rng(0, 0), Known(six_users())), 6)[0].shape == (0, 6)


def test_what_it_cannot_be_asked_is_named():
    with pytest.raises(
        ValueError, match="filler must be a masked-item model, and this one is caus"
    ):
        Filler(model_of(causal=True))
    model, side = model_of(max_len=10), Known(six_users())
    side.filler = Filler(model_of(max_len=6))
    loader = loader_of(model, {"a": [Fill()]}, side)
    with pytest.raises(
        ValueError, match="filler reads 6 items and a view has 10: train one with model.max_len 10"
    ):
        loader.batch_at(0)
    side.filler = Filler(model_of(max_len=10))
    loader_of(model, {"a": [Fill(among=30)]}, side).batch_at(0)  # 20 items are all there are
    long = Known(dataset_of([list(range(14))], 20))
    long.filler = side.filler
    with pytest.raises(ValueError, match="filler reads 10 items and a view has 11"):
        loader_of(model, {"a": [Fill(), NextItem()]}, long).batch_at(0)


def test_what_is_drawn_goes_to_the_event_that_it_was_drawn_for():
    """A model that is told what was there, and is sure of it, puts it back."""
    sequences = [[(u + i) % 20 for i in range(8)] for u in range(20)]
    side = Known(dataset_of(sequences, 20))

    def told(batch, among):
        rows = batch.events["target"] != -100
        scores = torch.full((int(rows.sum()), 20), -9.0)
        scores[torch.arange(len(scores)), batch.events["target"][rows]] = 9.0
        best = scores.topk(among)
        return best.indices, best.values

    side.filler = told
    batch = from_sequences(sequences)
    made = Fill(0.5)(batch, Rng(0, 0), side)
    assert torch.equal(made.values, batch.values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 400 users and a masked-item model that was trained on 60 % of them and 30 more,
    who have the same items."""
    folder = tmp_path_factory.mktemp("ccl")
    synthetic(folder)
    more = synthetic(folder / "more", num_users=430)
    main(["pretrain", "--config=bert4rec", f"--data={more}", f"--output={folder / 'masked'}",
          "--users.fraction=0.6", *SMALL, *short("pretraining", 20)])  # fmt: skip
    return folder


SMALL = ["--model.width=16", "--model.max_len=12"]


def short(stage: str, steps: int) -> list[str]:
    keys = {"steps": steps, "validate_every": steps // 2, "batch_size": 100, "warmup_steps": 0}
    return [f"--{stage}.{key}={value}" for key, value in keys.items()]


def test_from_a_masked_item_model_by_filled_views_to_a_next_item(folder, tmp_path):
    flags = ["--config=ccl", f"--data={folder / 'data'}", *SMALL]
    model = folder / "masked" / "model"
    first = [*flags, *short("pretraining", 4), f"--pretraining.filler={model}"]
    main(["pretrain", *first, f"--output={tmp_path / 'contrast'}"])
    made = json.loads((tmp_path / "contrast" / "summary.json").read_text())
    assert made["best_step"] == made["steps"] == 4, "the last model is kept"
    seen = read_seen(tmp_path / "contrast" / "model")
    assert len(seen) > 400, "somebody whom the filler alone has seen"
    assert np.array_equal(seen, np.union1d(hashes(np.arange(400)), read_seen(model)))
    last = [*flags, *short("recommendation", 4), f"--init={tmp_path / 'contrast' / 'model'}"]
    main(["finetune", *last, f"--output={tmp_path / 'next'}"])
    assert (tmp_path / "next" / "model" / "model.safetensors").is_file()


def test_a_stage_that_fills_says_what_it_lacks(folder, tmp_path):
    flags = ["--config=ccl", f"--data={folder / 'data'}", *SMALL, f"--output={tmp_path / 'run'}"]
    with pytest.raises(
        SystemExit, match="the step fill draws from a masked-item model: the key fi"
    ):
        main(["pretrain", *flags])
    with pytest.raises(SystemExit, match="nowhere holds no fastrec model"):
        main(["pretrain", *flags, "--pretraining.filler=nowhere"])
    main(["pretrain", "--config=clue", f"--data={folder / 'data'}", *SMALL,
          f"--output={tmp_path / 'vectors'}", *short("pretraining", 2)])  # fmt: skip
    with pytest.raises(SystemExit, match="vectors.* cannot be asked about items: .*scores no next"):
        main(["pretrain", *flags, f"--pretraining.filler={tmp_path / 'vectors' / 'model'}"])
    main(["pretrain", "--config=sasrec", f"--data={folder / 'data'}", *SMALL,
          f"--output={tmp_path / 'causal'}", *short("pretraining", 2)])  # fmt: skip
    with pytest.raises(
        SystemExit, match="filler must be a masked-item model, and this one is caus"
    ):
        main(["pretrain", *flags, f"--pretraining.filler={tmp_path / 'causal' / 'model'}"])
    model = folder / "masked" / "model"
    with pytest.raises(SystemExit, match="would be tested on users that it has seen"):
        main(["pretrain", *flags, f"--pretraining.filler={model}", "--users.fraction=0.3"])
