# SPDX-License-Identifier: Apache-2.0
"""Masked language models of transformers with and without the patch: the original is the oracle."""

import copy
import inspect

import pytest
import torch

import fastrec
from fastrec.integrations.patching import keep_original

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=40,
)  # fmt: skip
DISTIL = dict(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
CONFIGS = {
    "BertForMaskedLM": transformers.BertConfig(**SIZES),
    "RobertaForMaskedLM": transformers.RobertaConfig(**SIZES),
    "XLMRobertaForMaskedLM": transformers.XLMRobertaConfig(**SIZES),
    "CamembertForMaskedLM": transformers.CamembertConfig(**SIZES),
    "DistilBertForMaskedLM": transformers.DistilBertConfig(**DISTIL),
    "ElectraForMaskedLM": transformers.ElectraConfig(**SIZES, embedding_size=8),
}
pytestmark = pytest.mark.filterwarnings("error:fastrec leaves")


def model_of(name="BertForMaskedLM"):
    torch.manual_seed(0)
    model = getattr(transformers, name)(copy.deepcopy(CONFIGS[name])).train()
    for module in model.modules():  # a bias of zeros would not be seen to be missing
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.5)
    return model


def batch(labelled=0.3):
    """Texts of 3 to 12 tokens, padded."""
    lengths = torch.tensor([12, 3, 7])
    mask = torch.arange(12) < lengths[:, None]
    ids = torch.randint(3, VOCABULARY, mask.shape).where(mask, 1)
    labels = torch.randint(0, VOCABULARY, mask.shape)
    labels = labels.where(mask & (torch.rand(mask.shape) < labelled), -100)
    return dict(input_ids=ids, attention_mask=mask.long(), labels=labels)


def step(model, seed=1, **inputs):
    """Loss and gradients, with the dropout of a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_the_original(name):
    model, inputs = model_of(name), batch()
    expected, gradients = step(model, **inputs)
    with fastrec.patch("transformers"):
        output, found = step(model, **inputs)  # the dropout of the encoder is the original's too
    assert output.logits is None and expected.logits is not None
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in found.values())
    undone, _ = step(model, **inputs)
    assert torch.equal(undone.logits, expected.logits)


def test_head_and_scores_are_of_labelled_positions_alone():
    model, inputs = model_of(), batch()
    rows = []
    head = model.cls.predictions.transform
    hook = head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    with fastrec.patch("transformers"):
        with pytest.warns(UserWarning, match="BertForMaskedLM as it is: hooks"):
            model(**inputs)
        hook.remove()
        act = head.transform_act_fn.forward
        head.transform_act_fn.forward = lambda x: rows.append(x.shape[:-1].numel()) or act(x)
        model(**inputs)
    assert rows == [36, int((inputs["labels"] != -100).sum())]


def test_evaluation_and_inference_have_their_logits():
    model, inputs = model_of().eval(), batch()
    expected = model(**inputs)
    with fastrec.patch("transformers"):
        assert torch.equal(model(**inputs).logits, expected.logits)
        del inputs["labels"]
        assert torch.equal(model(**inputs).logits, expected.logits)
        assert model.train()(**inputs).logits.shape == expected.logits.shape


def test_tuples_hidden_states_and_positional_arguments():
    model, inputs = model_of(), batch()
    ids, mask, labels = inputs.values()
    with fastrec.patch("transformers"):
        loss, hidden = model(ids, mask, labels=labels, return_dict=False, output_hidden_states=True)
        output = model(ids, mask, labels=labels, output_hidden_states=True)
        assert loss.shape == () and len(hidden) == len(output.hidden_states) == 3
        with pytest.warns(UserWarning, match="more than input_ids and attention_mask"):
            assert model(ids, mask, torch.zeros_like(ids), labels=labels).logits is not None


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
def test_return_dict_of_none_is_that_of_the_config(asked, config):
    model, inputs = model_of(), batch()
    model.config.return_dict = config
    expected = model(**inputs, return_dict=asked)
    with fastrec.patch("transformers"):
        assert type(model(**inputs, return_dict=asked)) is type(expected)


def test_labels_of_another_number_than_the_tokens_are_refused():
    model, inputs = model_of(), batch()
    wider = torch.nn.functional.pad(inputs["labels"], (0, 8), value=-100)
    for labels, number in ((inputs["labels"][:, :5], 15), (wider, 60)):
        for patched in (False, True):
            if patched:
                fastrec.patch("transformers")
            with pytest.raises(ValueError, match=rf"(?s)36.*{number}"):
                model(**inputs | {"labels": labels.contiguous()})
            fastrec.unpatch()


def test_a_compiled_model():
    model, inputs = model_of(), batch()
    expected, _ = step(model.eval(), **inputs)
    model.train()
    for module in model.modules():
        module.p = 0.0
    with fastrec.patch("transformers"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_has_a_loss_of_0():
    model, inputs = model_of(), batch(labelled=0)
    assert model(**inputs).loss.isnan()
    with fastrec.patch("transformers"):
        output, gradients = step(model, **inputs)
    assert output.loss == 0 and all((g == 0).all() for g in gradients.values())


def test_the_loss_is_that_of_the_device_path(monkeypatch):
    """Where labelled rows cannot be counted without waiting, all rows go into the op."""
    model, inputs = model_of(), batch()
    expected, gradients = step(model, **inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with fastrec.patch("transformers"):
        output, found = step(model, **inputs)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_others_keep_their_code_and_say_so():
    class Mine(transformers.BertForMaskedLM):
        pass

    inputs = batch()
    with fastrec.patch("transformers"):
        with pytest.warns(UserWarning, match="Mine as it is: it is a subclass"):
            assert Mine(CONFIGS["BertForMaskedLM"])(**inputs).logits is not None
        model = model_of("RobertaForMaskedLM")
        decoder = model.lm_head.decoder
        model.lm_head.decoder = torch.nn.utils.parametrizations.weight_norm(decoder)
        with pytest.warns(UserWarning, match="no plain Linear but ParametrizedLinear"):
            assert model(**inputs).logits is not None


def cold(kind):
    """A subclass of a head, with scores of its own."""
    return type("Cold", (kind,), {"forward": lambda self, x: kind.forward(self, x) / 4})


def coldly(head):
    """The same on an object."""
    forward = head.forward
    head.forward = lambda x: forward(x) / 4


@pytest.mark.parametrize(
    "name,part",
    [
        ("BertForMaskedLM", "cls"),
        ("BertForMaskedLM", "cls.predictions"),
        ("BertForMaskedLM", "cls.predictions.transform"),
        ("RobertaForMaskedLM", "lm_head"),
        ("XLMRobertaForMaskedLM", "lm_head"),
        ("CamembertForMaskedLM", "lm_head"),
        ("ElectraForMaskedLM", "generator_predictions"),
    ],
)
def test_heads_with_a_forward_of_their_own_keep_it(name, part):
    def swapped(model):
        head = model.get_submodule(part)
        head.__class__ = cold(type(head))

    def set_on(model):
        coldly(model.get_submodule(part))

    def another(model):
        model.set_submodule(part, torch.nn.Linear(16, out))

    out = {"cls.predictions.transform": 16, "generator_predictions": 8}.get(part, VOCABULARY)
    for change in (swapped, set_on, another):
        model, inputs = model_of(name), batch()
        change(model)
        expected, _ = step(model, **inputs)
        keep_original.cache_clear()
        why = f"{name} as it is: its {part} is no plain"
        with fastrec.patch("transformers"), pytest.warns(UserWarning, match=why):
            output, _ = step(model, **inputs)
        assert torch.equal(output.loss, expected.loss)


@pytest.mark.parametrize(
    "loss",
    [
        torch.nn.CrossEntropyLoss(label_smoothing=0.5),
        torch.nn.CrossEntropyLoss(ignore_index=7),
        torch.nn.CrossEntropyLoss(torch.linspace(0.1, 2, VOCABULARY)),
        torch.nn.CrossEntropyLoss(reduction="sum"),
        torch.nn.NLLLoss(),
    ],
    ids=str,
)
def test_the_loss_of_distilbert_keeps_its_settings(loss):
    model, inputs = model_of("DistilBertForMaskedLM"), batch(labelled=2)
    inputs["labels"][inputs["labels"] == -100] = 7  # which a loss may ignore
    model.mlm_loss_fct = loss
    expected, _ = step(model, **inputs)
    why = "its mlm_loss_fct is no plain CrossEntropyLoss"
    with fastrec.patch("transformers"), pytest.warns(UserWarning, match=why):
        output, _ = step(model, **inputs)
    assert torch.equal(output.loss, expected.loss)


def test_checkpoints_load_both_ways(tmp_path):
    model, inputs = model_of(), batch()
    with fastrec.patch("transformers"):
        step(model, **inputs)
        model.save_pretrained(tmp_path / "patched")
        loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "patched")
    plain = transformers.BertForMaskedLM.from_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    with fastrec.patch("transformers"):
        again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "plain")
    for other in (loaded, plain, again):
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_parity_of_a_frozen_model():
    model, inputs = model_of().requires_grad_(False), batch()
    handle = fastrec.patch("transformers", parity=True)
    model(**inputs)
    (report,) = handle.reports
    assert report.gradients == {} and report.loss_difference < 1e-5


def test_parity_is_printed_once_a_class(capsys):
    model, inputs = model_of(), batch()
    handle = fastrec.patch("transformers", parity=True)
    model(**inputs)
    model(**inputs)
    assert capsys.readouterr().out.count("parity of BertForMaskedLM") == 1
    (report,) = handle.reports
    assert report.loss_difference < 1e-5 and model.training
    assert len(report.gradients) == len(list(model.parameters()))
    for largest, difference in report.gradients.values():
        assert difference <= 1e-5 * max(largest, 1e-1)


def test_the_patch_is_idempotent_and_keeps_signatures():
    before = transformers.BertForMaskedLM.forward
    handle = fastrec.patch("transformers")
    assert fastrec.patch("transformers") is handle and fastrec.patched() == ["transformers"]
    patched = transformers.BertForMaskedLM.forward
    assert patched is not before and inspect.signature(patched) == inspect.signature(before)
    assert len(handle.replaced) == len(CONFIGS)
    handle.undo()
    assert transformers.BertForMaskedLM.forward is before
