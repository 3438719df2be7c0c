# SPDX-License-Identifier: Apache-2.0
"""SASRec and BERT4Rec of RecBole with and without the patch: the original is the oracle."""

import random

import pytest
import torch

import fastrec

pytest.importorskip("recbole", reason="recbole is not installed")

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.data.transform import MaskItemSequence
from recbole.evaluator.collector import Collector
from recbole.model import sequential_recommender
from recbole.trainer import Trainer

from fastrec.integrations.recbole import TopItems
from fastrec.integrations.recbole_mask import mask_items

USERS, ITEMS, LENGTH = 50, 40, 12
MODELS = ("SASRec", "BERT4Rec")
pytestmark = [
    pytest.mark.filterwarnings("error:fastrec leaves"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:(?!fastrec)"),
]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(name, **settings) -> (trainer, train data, test data) of histories of 5 to 20 items."""
    monkeypatch.chdir(tmp_path)  # RecBole writes logs where it stands
    monkeypatch.setattr("sys.argv", ["test"])  # and reads the command line
    draw = random.Random(0)
    (tmp_path / "file").mkdir()
    with open(tmp_path / "file" / "file.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user in range(USERS):
            for place in range(draw.randint(5, 20)):
                file.write(f"{user}\t{draw.randrange(ITEMS)}\t{place}\n")

    def make(name, metrics=("Recall", "MRR", "NDCG"), **more):
        settings = dict(
            data_path=str(tmp_path), USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id",
            TIME_FIELD="timestamp", load_col={"inter": ["user_id", "item_id", "timestamp"]},
            MAX_ITEM_LIST_LENGTH=LENGTH, train_batch_size=64, eval_batch_size=32, loss_type="CE",
            train_neg_sample_args=None, use_gpu=False, metrics=list(metrics), topk=[3, 7],
            valid_metric="MRR@7", epochs=1, seed=3, reproducibility=True, mask_ratio=0.3,
            eval_args=dict(split={"LS": "valid_and_test"}, order="TO", mode="full"),
            n_layers=2, n_heads=2, hidden_size=16, inner_size=32,
            hidden_dropout_prob=0.0, attn_dropout_prob=0.0,
        )  # fmt: skip
        config = Config(model=name, dataset="file", config_dict=settings | more)
        torch.manual_seed(0)
        train, _, test = data_preparation(config, create_dataset(config))
        model = getattr(sequential_recommender, name)(config, train.dataset).train()
        for parameter in model.parameters():  # biases of 0 would not be seen to be missing
            parameter.data += 0.3 * torch.randn_like(parameter)
        return Trainer(config, model), train, test

    return make


def step(model, batch):
    model.zero_grad()
    loss = model.calculate_loss(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("act", ["gelu", "relu", "swish"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_original(build, name, act):
    trainer, train, _ = build(name, hidden_act=act)
    batch = next(iter(train))
    loss, gradients = step(trainer.model, batch)
    with fastrec.patch("recbole"):
        found, others = step(trainer.model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    assert min(g.abs().max() for n, g in gradients.items() if "key.bias" not in n) > 1e-4
    assert torch.equal(trainer.model.calculate_loss(batch), loss)


@pytest.mark.parametrize("name", MODELS)
def test_metrics_are_those_of_the_original(build, name):
    needs = ("Recall", "MRR", "NDCG", "Hit", "MAP", "Precision", "ShannonEntropy")
    trainer, _, test = build(name, metrics=needs, eval_batch_size=16)
    expected = trainer.evaluate(test, load_best_model=False)
    with fastrec.patch("recbole"):
        assert trainer.evaluate(test, load_best_model=False) == expected
    assert 0 < expected["mrr@7"] < 1 and len(expected) == 14


@pytest.mark.parametrize("name", MODELS)
def test_the_best_items_are_those_of_the_scores(build, name):
    trainer, _, test = build(name)
    trainer.model.eval()
    trainer.tot_item_num = trainer.model.n_items
    batch = next(iter(test))
    with torch.no_grad():
        scores = trainer._full_sort_batch_eval(batch)[1]
        with fastrec.patch("recbole"):
            best = trainer._full_sort_batch_eval(batch)[1].indices
    assert torch.equal(best, scores.topk(7).indices) and (best > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_of_the_trainer(build, name):
    """SASRec without dropout draws nothing: the same parameters behind an epoch. BERT4Rec has other
    masks."""
    trained = []
    for patched in (False, True):
        trainer, train, _ = build(name)
        if patched:
            fastrec.patch("recbole")
        torch.manual_seed(1)
        trainer.fit(train, saved=False, verbose=False)
        trained.append((trainer.model.state_dict(), trainer.train_loss_dict[0] / len(train)))
    (expected, loss), (found, other) = trained
    assert other == pytest.approx(loss, rel=1e-5 if name == "SASRec" else 0.1)
    if name == "SASRec":
        for name, value in expected.items():
            if "key.bias" not in name:  # its gradient is the rounding of 0, which Adam scales up
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_drawn_by_the_seed_and_off_in_evaluation(build, name):
    trainer, train, _ = build(name, hidden_dropout_prob=0.5, attn_dropout_prob=0.5)
    model, batch = trainer.model, next(iter(train))
    with fastrec.patch("recbole"):
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(float(model.calculate_loss(batch)))
        assert losses[0] == losses[1] != losses[2]
        patched = [float(model.calculate_loss(batch)) for _ in range(200)]
        still = model.eval().calculate_loss(batch)
    torch.testing.assert_close(still, model.calculate_loss(batch), rtol=1e-5, atol=1e-6)
    model.train()
    plain = [float(model.calculate_loss(batch)) for _ in range(200)]
    a, b = torch.tensor(patched), torch.tensor(plain)
    assert abs(a.mean() - b.mean()) < 5 * (a.var() / 200 + b.var() / 200).sqrt()
    assert 0.7 < a.std() / b.std() < 1.4


def test_autocast(build):
    trainer, train, _ = build("SASRec")
    batch = next(iter(train))
    loss = trainer.model.calculate_loss(batch)
    with fastrec.patch("recbole"), torch.autocast("cpu", torch.bfloat16):
        found, gradients = step(trainer.model, batch)
    torch.testing.assert_close(found, loss, rtol=2e-2, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_no_scored_mask_is_a_loss_of_0(build):
    trainer, train, _ = build("BERT4Rec")
    batch = next(iter(train))
    batch["MASK_INDEX"] = torch.zeros_like(batch["MASK_INDEX"])
    assert trainer.model.calculate_loss(batch).isnan()
    with fastrec.patch("recbole"):
        loss, gradients = step(trainer.model, batch)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())


def test_the_mask_behind_the_last_item(build):
    model = build("BERT4Rec")[0].model
    items = torch.tensor([[4, 0, 0], [4, 5, 0], [4, 5, 6]])
    lengths = torch.tensor([1, 2, 3])
    expected = model.reconstruct_test_data(items, lengths)
    with fastrec.patch("recbole"):
        assert torch.equal(model.reconstruct_test_data(items, lengths), expected)
    assert items[0, 1] == 0  # the input is left alone


def slowly_masked(items, masked, kept, num_items):
    """What RecBole's loops make of the masks."""
    sequences, positives, places = [], [], []
    for sequence, hidden in zip(items.tolist(), masked.tolist(), strict=True):
        at = [place for place, hide in enumerate(hidden) if hide]
        sequences.append(
            [num_items if hide else x for x, hide in zip(sequence, hidden, strict=True)]
        )
        positives.append(([0] * kept + [sequence[place] for place in at])[-kept:])
        places.append(([0] * kept + at)[-kept:])
    return sequences, positives, places


@pytest.mark.parametrize("kept", [1, 3, LENGTH])
def test_masks_are_laid_out_as_by_recbole(kept):
    items = torch.randint(1, ITEMS, (40, LENGTH))
    items *= torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (40, 1))
    masked = (torch.rand(items.shape) < 0.4) & (items != 0)
    found = mask_items(items, masked, kept, ITEMS)
    sequences, positives, places = slowly_masked(items, masked, kept, ITEMS)
    assert [found[i].tolist() for i in (0, 1, 3)] == [sequences, positives, places]
    for sequence, negatives, kinds in zip(
        items.tolist(), found[2].tolist(), positives, strict=True
    ):
        for negative, positive in zip(negatives, kinds, strict=True):
            assert (negative == 0) if positive == 0 else negative not in sequence
            assert 0 <= negative < ITEMS


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masked_share_and_the_coin(build, ratio):
    _, train, _ = build("BERT4Rec", ft_ratio=ratio)
    with fastrec.patch("recbole"):
        batches = [batch for _ in range(20) for batch in train]
    items = torch.cat([batch["item_id_list"] for batch in batches])
    masked = torch.cat([batch["Mask_item_id_list"] for batch in batches]) == train.dataset.item_num
    assert not masked[items == 0].any()
    if ratio:
        last = torch.cat([batch["item_length"] for batch in batches]) - 1
        assert torch.equal(masked.nonzero()[:, 1], last)
    else:
        assert masked[items != 0].float().mean() == pytest.approx(0.3, abs=0.015)


def test_others_keep_their_code_and_say_so(build):
    trainer, train, test = build("SASRec", loss_type="BPR", train_neg_sample_args={
        "distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False,
        "candidate_num": 0})  # fmt: skip
    batch = next(iter(train))
    fastrec.patch("recbole")
    with pytest.warns(UserWarning, match=r"SASRec\.calculate_loss as it is: loss_type is BPR"):
        assert trainer.model.calculate_loss(batch).isfinite()
    trainer.evaluate(test, load_best_model=False)  # is served, whatever the loss
    for settings, why in (
        (dict(metrics=["GAUC"], valid_metric="GAUC"), "a metric needs rec.meanrank"),
        (dict(topk=[41]), "topk is 41 of 41 items"),
    ):
        trainer, _, test = build("SASRec", **settings)
        with pytest.warns(UserWarning, match=f"ranking of SASRec as it is: {why}"):
            assert trainer.evaluate(test, load_best_model=False)
    model, batch = trainer.model, next(iter(build("SASRec")[1]))
    hook = model.trm_encoder.layer[0].feed_forward.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"hooks wait for calls of trm_encoder\.layer\.0\.feed"):
        model.calculate_loss(batch)
    hook.remove()
    model.LayerNorm = torch.nn.RMSNorm(16)
    with pytest.warns(UserWarning, match="LayerNorm is a RMSNorm"):
        model.calculate_loss(batch)


def test_a_subclass_with_a_forward_of_its_own(build):
    class Mine(sequential_recommender.SASRec):
        def forward(self, item_seq, item_seq_len):
            return 2 * super().forward(item_seq, item_seq_len)

    trainer, train, _ = build("SASRec")
    model, batch = trainer.model, next(iter(train))
    model.__class__ = Mine
    expected = model.calculate_loss(batch)
    with (
        fastrec.patch("recbole"),
        pytest.warns(UserWarning, match=r"Mine\.calculate_loss as it is: it has a forward of its"),
    ):
        assert torch.equal(model.calculate_loss(batch), expected)


def test_a_loss_with_settings_and_functions_that_are_set_on_an_object(build):
    trainer, train, test = build("SASRec")
    model, batch = trainer.model, next(iter(train))

    def kept(why, run):
        expected = run()
        with fastrec.patch("recbole"), pytest.warns(UserWarning, match=why):
            assert run() == expected

    model.loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    kept("its loss_fct is no plain Cross", lambda: float(model.calculate_loss(batch)))
    model.loss_fct, forward = torch.nn.CrossEntropyLoss(), model.forward
    model.forward = lambda *args: 2 * forward(*args)
    kept("it has a forward of its own", lambda: float(model.calculate_loss(batch)))
    del model.forward
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **more: evaluate(*args, **more)
    kept("its trainer or collector", lambda: trainer.evaluate(test, load_best_model=False))


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_both_ways(build, name, tmp_path):
    states = []
    for patched in (False, True):
        trainer, train, _ = build(name, checkpoint_dir=str(tmp_path / str(patched)))
        if patched:
            fastrec.patch("recbole")
        trainer.fit(train, saved=False, verbose=False)
        trainer._save_checkpoint(0, verbose=False)
        states.append(torch.load(trainer.saved_model_file, weights_only=False))
        fastrec.unpatch()
    plain, fused = states
    assert list(plain["state_dict"]) == list(fused["state_dict"])
    for patched, state in ((True, plain), (False, fused)):
        trainer, _, test = build(name)
        results = []
        for now in (patched, not patched):
            if now:
                fastrec.patch("recbole")
            trainer.model.load_state_dict(state["state_dict"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            results.append(trainer.evaluate(test, load_best_model=False))
            fastrec.unpatch()
        assert results[0] == results[1]


def test_parity_and_undo(build, capsys):
    owners = (sequential_recommender.SASRec, sequential_recommender.BERT4Rec, Trainer, Collector)
    before = [dict(owner.__dict__) for owner in (*owners, MaskItemSequence)]
    handle = fastrec.patch("recbole", parity=True)
    for name in MODELS:
        trainer, train, _ = build(name, hidden_dropout_prob=0.5)
        batch = next(iter(train))
        trainer.model.calculate_loss(batch)
        trainer.model.calculate_loss(batch)
    assert [report.model for report in handle.reports] == list(MODELS)
    assert all(report.loss_difference < 1e-5 for report in handle.reports)
    assert capsys.readouterr().out.count("fastrec, parity of") == 2
    assert len(handle.replaced) == 6
    handle.undo()
    after = [dict(owner.__dict__) for owner in (*owners, MaskItemSequence)]
    assert after == before


def test_metrics_of_rows_with_several_targets(build):
    """The collector counts them by row, as the original does in a matrix [B, V]."""
    trainer, _, _ = build("SASRec", metrics=("Recall", "ShannonEntropy"))
    collector, other = trainer.eval_collector, Collector(trainer.config)
    scores = torch.randn(3, 41)
    pairs = torch.tensor([0, 0, 2, 2, 1]), torch.tensor([5, 6, 7, 8, 9])
    other.eval_batch_collect(scores, Interaction({}), *pairs)
    with fastrec.patch("recbole"):
        best = TopItems(scores.topk(7).indices)
        collector.eval_batch_collect(best, Interaction({}), *pairs)
    for name in ("rec.items", "rec.topk"):
        torch.testing.assert_close(collector.data_struct.get(name), other.data_struct.get(name))
