# SPDX-License-Identifier: Apache-2.0
"""Weights in the layouts of others: state dicts of `torch.nn.TransformerEncoder` and of the
`BertModel` of Hugging Face (names and shapes alone, nothing of `transformers` is imported).

Loading copies all or nothing: every entry is used, returned or named in an error.
Legend: V items, P positions, D width, F inner width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastrec.nn.encoders.sublayers import Patch
from fastrec.nn.encoders.transformer import TransformerEncoder, TransformerLayer
from fastrec.nn.items import Items
from fastrec.nn.user_model import UserModel

# Our module in a layer -> theirs, each with a weight and a bias. BERT has three for one of ours.
_TORCH = {
    "attention_output": ("self_attn.out_proj",),
    "attention_norm": ("norm1",),
    "ffn_inner": ("linear1",),
    "ffn_output": ("linear2",),
    "ffn_norm": ("norm2",),
}
_BERT = {
    "query_key_value": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention_output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "ffn_inner": ("intermediate.dense",),
    "ffn_output": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
_WORDS, _PLACES, _TYPES = (
    f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
)

# Our parameter and the names of the entries that, joined along the first dimension, are it.
Entries = list[tuple[Tensor, tuple[str, ...]]]


def _pairs(module: nn.Module, names: tuple[str, ...]) -> Entries:
    return [
        (getattr(module, kind), tuple(f"{name}.{kind}" for name in names))
        for kind in ("weight", "bias")
    ]


def _torch_entries(encoder: TransformerEncoder) -> Entries:
    entries: Entries = []
    for i, layer in enumerate(encoder.layers):
        if not isinstance(layer, TransformerLayer):
            raise ValueError(f"torch.nn.TransformerEncoder has no {type(layer).__name__}")
        packed, prefix = layer.query_key_value, f"layers.{i}"
        entries.append((packed.weight, (f"{prefix}.self_attn.in_proj_weight",)))
        entries.append((packed.bias, (f"{prefix}.self_attn.in_proj_bias",)))
        for ours, theirs in _TORCH.items():
            entries += _pairs(getattr(layer, ours), tuple(f"{prefix}.{name}" for name in theirs))
    if isinstance(encoder.final_norm, nn.LayerNorm):
        entries += _pairs(encoder.final_norm, ("norm",))
    return entries


def _bert_entries(model: UserModel) -> Entries:
    encoder = model.encoder
    transformer = isinstance(encoder, TransformerEncoder)
    if not transformer or not isinstance(encoder.embedding_norm, nn.LayerNorm) or encoder.causal:
        raise ValueError("BertModel is a post-norm, bidirectional encoder; this model is not")
    entries: Entries = [
        (model.item_embedding.weight, (_WORDS,)),
        (encoder.positions.weight, (_PLACES,)),
    ]
    entries += _pairs(encoder.embedding_norm, ("embeddings.LayerNorm",))
    for i, layer in enumerate(encoder.layers):
        for ours, theirs in _BERT.items():
            names = tuple(f"encoder.layer.{i}.{name}" for name in theirs)
            entries += _pairs(getattr(layer, ours), names)
    return entries


def _export(entries: Entries) -> dict[str, Tensor]:
    return {
        name: part.detach().clone()
        for parameter, names in entries
        for name, part in zip(names, parameter.chunk(len(names)), strict=True)
    }


def _check(layout: str, entries: Entries, state: Mapping[str, Tensor], spare: set[str]) -> None:
    """Raises ValueError that names what is missing, unexpected or of another shape."""
    expected = {
        name: [parameter.shape[0] // len(names), *parameter.shape[1:]]
        for parameter, names in entries
        for name in names
    }
    wrong = [f"missing {name} {shape}" for name, shape in expected.items() if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in expected and name not in spare]
    wrong += [
        f"{name} is {list(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and list(state[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"not the weights of such a {layout}: " + "; ".join(wrong))


def _copy(entries: Entries, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for parameter, names in entries:
            parameter.copy_(torch.cat([state[name].to(parameter.device) for name in names]))


def _check_no_patches(layout: str, encoder: TransformerEncoder) -> None:
    if any(isinstance(module, Patch) for module in encoder.modules()):
        raise ValueError(f"{layout} has no model patches: without them it is another encoder")


def torch_encoder_state(encoder: TransformerEncoder) -> dict[str, Tensor]:
    """Copies of the weights, as `torch.nn.TransformerEncoder.load_state_dict` takes them.

    The peer is made of `nn.TransformerEncoderLayer(D, H, F, activation="gelu", batch_first=True,
    norm_first=pre_norm)` with our `norm_eps` as `layer_norm_eps`, and has `norm=nn.LayerNorm(D)`
    where the encoder is pre-norm. It embeds nothing: `encoder.positions` and
    `encoder.embedding_norm` are not in it. Raises ValueError for another layer and for patches.
    """
    _check_no_patches("torch.nn.TransformerEncoder", encoder)
    return _export(_torch_entries(encoder))


def load_torch_encoder(encoder: TransformerEncoder, state: Mapping[str, Tensor]) -> list[str]:
    """Copy the state dict of such a `torch.nn.TransformerEncoder` (`torch_encoder_state`) in.

    Returns the names of the parameters of `encoder` that the layout has no place for, left as they
    were. Raises ValueError that names missing, unexpected and wrongly shaped entries, and then
    changes nothing. A state dict does not tell activation, heads or eps: see `torch_encoder_state`.
    """
    entries = _torch_entries(encoder)
    _check("torch.nn.TransformerEncoder", entries, state, set())
    _copy(entries, state)
    loaded = {id(parameter) for parameter, _ in entries}
    return [name for name, value in encoder.named_parameters() if id(value) not in loaded]


def bert_state(model: UserModel) -> dict[str, Tensor]:
    """Copies of embedding and encoder weights, as `BertModel.load_state_dict` takes them
    (`add_pooling_layer=False`).

    `vocab_size` is V + 4 (items, then the special tokens), `max_position_embeddings` P,
    `hidden_act` "gelu", `layer_norm_eps` the model's `norm_eps`. The two token types are zeros:
    their part is in the positions. The item head, its own table and user vectors included, is not
    in a `BertModel`. Raises ValueError for a model whose input is more than the embeddings of ids,
    and for patches.
    """
    if model.config.items != Items():
        raise ValueError(f"BertModel has no place for model.items: {model.config.items}")
    entries = _bert_entries(model)
    _check_no_patches("BertModel", model.encoder)
    state = _export(entries)
    return state | {_TYPES: state[_WORDS].new_zeros(2, state[_WORDS].shape[1])}


def load_bert(
    model: UserModel, state: Mapping[str, Tensor], *, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Copy the state dict of a `BertModel` into the embedding and the encoder of `model`.

    Names may have the prefix `bert.`. All tokens are of type 0 here: its vector is added to every
    position. The model needs the `norm_eps` of the checkpoint (1e-12 by default there). Its item
    head and its patches stay as they are.

    Args:
        rows: int64 [V + 4], the row of the word embeddings for each item, then for [MASK], [CLS],
            [SEP] and [UR]; None: the rows as they are.

    Returns:
        The entries that the model has no place for: token types, pooler, `position_ids`, what
        stands beside `bert.`, and the word embeddings if `rows` leaves some out.

    Raises:
        ValueError: names missing, unexpected and wrongly shaped entries; nothing was changed.
        IndexError: a value of `rows` is not a row.
    """
    inside = {name.removeprefix("bert."): value for name, value in state.items()}
    rest: dict[str, Tensor] = {}
    if any(name.startswith("bert.") for name in state):
        rest = {name: value for name, value in state.items() if not name.startswith("bert.")}
        inside = {name: value for name, value in inside.items() if name not in rest}
    entries = _bert_entries(model)
    spare = {_TYPES, "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    rest |= {name: value for name, value in inside.items() if name in spare}
    given = dict(inside)
    if rows is not None and _WORDS in given:
        words = given[_WORDS]
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"rows must be int64 [V + 4], got {rows.dtype} {list(rows.shape)}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(words):
            raise IndexError(f"rows must be in [0, {len(words)}), the word embeddings")
        if len(rows.unique()) < len(words):
            rest[_WORDS] = words
        given[_WORDS] = words[rows.to(words.device)]
    _check("BertModel", entries, given, spare)
    if _TYPES in given:
        width = model.item_embedding.embedding_dim
        if given[_TYPES].dim() != 2 or given[_TYPES].shape[1] != width:
            raise ValueError(f"{_TYPES} is {list(given[_TYPES].shape)}, expected [types, {width}]")
        given[_PLACES] = given[_PLACES] + given[_TYPES][0]
    _copy(entries, given)
    return rest
