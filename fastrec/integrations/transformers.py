# SPDX-License-Identifier: Apache-2.0
"""Masked language models of Hugging Face transformers: the loss reads the masked positions alone.

The original computes the head and the scores of the whole vocabulary at every position, [B, L, V],
and ignores most of them. Here the head is computed where a label is, and the scores are stored
nowhere. Legend: B texts, L tokens, D width, V vocabulary, N positions with a label.
"""

import functools
import operator
from collections.abc import Callable

import transformers
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.camembert.modeling_camembert import CamembertLMHead
from transformers.models.electra.modeling_electra import ElectraGeneratorPredictions
from transformers.models.roberta.modeling_roberta import RobertaLMHead
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLMHead

from fastrec.integrations.patching import (
    Replacement,
    check_parity,
    is_default_loss,
    keep_original,
    own_method,
    scored_rows,
)
from fastrec.nn.plain import is_plain
from fastrec.ops.linear_cross_entropy import linear_cross_entropy

NO_LABEL = -100


def _bert_head(model, states):
    return model.cls.predictions.transform(states)


def _roberta_head(model, states):
    head = model.lm_head
    return head.layer_norm(nn.functional.gelu(head.dense(states)))


def _distilbert_head(model, states):
    return model.vocab_layer_norm(model.activation(model.vocab_transform(states)))


def _electra_head(model, states):
    return model.generator_predictions(states)


# What is between the encoder and the output embeddings, and the modules that this passes by, or
# calls with other places than they expect: one of another class is not served.
HEADS: dict[str, tuple[Callable, dict[str, type[nn.Module]]]] = {
    "BertForMaskedLM": (
        _bert_head,
        {
            "cls": bert.BertOnlyMLMHead,
            "cls.predictions": bert.BertLMPredictionHead,
            "cls.predictions.transform": bert.BertPredictionHeadTransform,
        },
    ),
    "RobertaForMaskedLM": (_roberta_head, {"lm_head": RobertaLMHead}),
    "XLMRobertaForMaskedLM": (_roberta_head, {"lm_head": XLMRobertaLMHead}),
    "CamembertForMaskedLM": (_roberta_head, {"lm_head": CamembertLMHead}),
    "DistilBertForMaskedLM": (_distilbert_head, {}),
    "ElectraForMaskedLM": (_electra_head, {"generator_predictions": ElectraGeneratorPredictions}),
}


def replacements() -> list[Replacement]:
    owners = [(getattr(transformers, name), head) for name, head in HEADS.items()]
    return [Replacement(owner, "forward", _forward(owner, *head)) for owner, head in owners]


def _forward(
    owner: type[transformers.PreTrainedModel], head: Callable, parts: dict[str, type[nn.Module]]
) -> Callable:
    original = owner.forward

    # With the signature of the original, which Trainer reads.
    @functools.wraps(original)
    def forward(self, *args, labels=None, **kwargs):
        if labels is None or not self.training:  # who evaluates wants the logits
            return original(self, *args, labels=labels, **kwargs)
        if why := _unserved(self, owner, parts, args):
            keep_original(type(self).__qualname__, why)
            return original(self, *args, labels=labels, **kwargs)
        named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        asked = named.get("return_dict")
        tuples = not (self.config.return_dict if asked is None else asked)
        named["return_dict"] = True
        check_parity(
            "transformers",
            self,
            lambda: original(self, labels=labels, **named).loss,
            lambda: fused_output(self, head, labels, named).loss,
        )
        output = fused_output(self, head, labels, named)
        return output.to_tuple() if tuples else output

    return forward


def _unserved(
    model,
    owner: type[transformers.PreTrainedModel],
    parts: dict[str, type[nn.Module]],
    args: tuple,
) -> str | None:
    if type(model) is not owner:
        return "it is a subclass"
    if len(args) > 2:
        return "more than input_ids and attention_mask are given by position"
    for name, kind in parts.items():
        part = operator.attrgetter(name)(model)
        if type(part) is not kind or own_method(part, kind, ("forward",)):
            return f"its {name} is no plain {kind.__name__}"
    decoder = model.get_output_embeddings()
    if type(decoder) is not nn.Linear:
        return f"its output embeddings are no plain Linear but {type(decoder).__name__}"
    inner = set(model.base_model.modules()) | {model}
    if not all(is_plain(module, type(module)) for module in model.modules() if module not in inner):
        return "hooks wait for calls of its head"
    if decoder.weight.shape[0] != model.config.vocab_size:
        return "its output embeddings and config.vocab_size differ in size"
    if hasattr(model, "mlm_loss_fct") and not is_default_loss(model.mlm_loss_fct):
        return "its mlm_loss_fct is no plain CrossEntropyLoss()"
    return None


def fused_output(model, head: Callable, labels: Tensor, named: dict):
    """MaskedLMOutput with the loss, float32 or float64, and without logits."""
    outputs = model.base_model(**named)
    states = outputs[0].flatten(0, 1)  # [B L, D]
    # Where the host does not know the labelled positions the head is computed everywhere.
    labels, states = scored_rows(labels.to(states.device).flatten(), NO_LABEL, states)
    decoder = model.get_output_embeddings()
    loss = linear_cross_entropy(
        head(model, states), decoder.weight, labels, linear_bias=decoder.bias
    )
    return transformers.modeling_outputs.MaskedLMOutput(
        loss=loss,
        logits=None,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
