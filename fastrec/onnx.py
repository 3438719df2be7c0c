# SPDX-License-Identifier: Apache-2.0
"""A trained model for ONNX Runtime: the program of `export_query` in standard operators.

Legend: B histories, T events, H heads, D width.
"""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.data.output import check_absent, new_file
from fastrec.export import export_query
from fastrec.ops.gelu_ffn import gelu_ffn_ref

MOST_BYTES = 2**31 - 2**24  # of weights: protobuf counts its bytes in 31 bits, the program's too


def export_onnx(model, path: Path | str, overwrite: bool = False) -> None:
    """Write the program (values int64 [T], offsets int64 [B + 1]) -> queries float32 [B, D] of a
    model as an ONNX file, for any T and B: what `model.ask(model.inputs_of(histories, ask=True))`
    computes of the values and offsets of that batch. It needs the packages onnx and onnxscript
    (`pip install 'fastrec[onnx]'`), and who runs it neither torch nor fastrec.

    The file says what makes values of item rows, as JSON in its metadata: `num_items`; of a history
    the last `max_items` are read; rows of special tokens `before` and `after` them. A model in 16
    or 64 bits is written in 32.

    The attention of all B histories is one product of T x T with those of others left out: one
    history or a few at a time.

    Raises FileExistsError for a path that exists, ValueError for an encoder with an op that has no
    form in standard operators (`gru`), and for a model of more than `MOST_BYTES`.
    """
    path = Path(path)
    check_absent(path, overwrite)
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder")
    for name in ("onnx", "onnxscript"):  # the second brings onnx_ir, and torch needs both
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"export_onnx needs {name}: pip install 'fastrec[onnx]'")
    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    if size > MOST_BYTES:
        raise ValueError(
            f"the model is {size / 1e9:,.1f} GB, and an ONNX file, one message of protobuf, at most"
            " 2: export_query has no limit"
        )
    forms = {**torch.export.default_decompositions(), **_standard()}
    if model.item_embedding.weight.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    program = export_query(model).run_decompositions(forms)
    left = {str(node.target) for node in program.graph.nodes if "fastrec" in str(node.target)}
    if left:
        raise ValueError(f"{', '.join(sorted(left))}: no form in the standard operators of ONNX")
    made = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["values", "offsets"],
        output_names=["queries"],
    )  # fmt: skip
    assert made is not None
    before, after = model.around(ask=True)
    told = {
        "num_items": model.num_items, "max_items": model.room(ask=True), "before": before,
        "after": after,
    }  # fmt: skip
    made.model.metadata_props.update({name: json.dumps(value) for name, value in told.items()})
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as work:
        # torch's own save would put more than 1.6 GB into a second file, of which nobody is told.
        onnx_ir.save(made.model, work)


def onnx_query(path: Path | str, threads: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """A file of `export_onnx` as a function of tensors on the CPU, run by ONNX Runtime: the
    `program` of a `Recommender`. Several threads may call it, each on `threads` processors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)

    def query(values: Tensor, offsets: Tensor) -> Tensor:
        given = {"values": values.cpu().numpy(), "offsets": offsets.cpu().numpy()}
        return torch.from_numpy(session.run(["queries"], given)[0])

    return query


def _standard() -> dict:
    """The ops that `ask` calls, without dropout, in the functions of torch."""
    ops = torch.ops.fastrec
    return {
        torch.ops.aten.repeat_interleave.Tensor: _repeated,
        torch.ops.aten.segment_reduce.default: _summed,
        torch.ops.aten._embedding_bag.default: _bag,
        ops.linear_fwd.default: F.linear,
        ops.gelu_ffn_fwd.default: gelu_ffn_ref,
        ops.jagged_embedding_fwd.default: _embedding,
        ops.dropout_add_layer_norm_fwd.default: _add_layer_norm,
        ops.jagged_attention_fwd.default: _attention,
    }


def _repeated(repeats: Tensor, *, output_size: int):
    """Which sequence an event is of; the exporter's own does not know `output_size`."""
    return _owners(repeats.cumsum(0), output_size)


def _summed(data: Tensor, reduce: str, *, offsets: Tensor, **_):
    """[B, ..]: the sums of the rows [T, ..] of each sequence."""
    assert reduce == "sum"
    place = torch.arange(data.shape[0], device=data.device)
    inside = (place >= offsets[:-1, None]) & (place < offsets[1:, None])
    rows = data if data.dim() == 2 else data[:, None]
    sums = inside.to(data.dtype) @ rows
    return sums if data.dim() == 2 else sums[:, 0]


def _bag(weight, indices, offsets, scale, mode: int, sparse, weights: Tensor, *_):
    """The exporter's own is a loop over bags, which cannot be none."""
    assert mode == 0
    sums = _summed(F.embedding(indices, weight) * weights[:, None], "sum", offsets=offsets)
    return sums, *(indices.new_empty(0) for _ in range(3))


def _owners(ends: Tensor, events: int) -> Tensor:
    """int64 [T]: how many of the ends of sequences, int64 [B], an event is behind."""
    place = torch.arange(events, device=ends.device)
    return (place[:, None] >= ends[None]).long().sum(1)


def _embedding(values, weight, position_weight, norm_weight, norm_bias, eps, keys, positions, *_):
    z = weight if values is None else F.embedding(values, weight)
    if position_weight is not None:
        z = z + F.embedding(positions, position_weight)
    return _normed(z, norm_weight, norm_bias, eps)


def _add_layer_norm(input, residual, weight, bias, eps, *_):
    z = input if residual is None else residual + input
    output, mean, rstd = _normed(z, weight, bias, eps)
    return output, z, mean, rstd


def _normed(z: Tensor, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output; the statistics, which only a gradient reads, are left empty."""
    none = z.new_empty(0)
    if weight is None:
        return z, none, none
    return F.layer_norm(z, z.shape[1:], weight, bias, eps), none, none


def _attention(query, key, value, offsets, max_seq_len, causal: bool, scale: float, *_):
    """Of [T, H, D] by a T x T mask of those in the same sequence."""
    owner = _owners(offsets[1:], query.shape[0])
    allowed = owner[:, None] == owner[None]
    if causal:
        place = torch.arange(query.shape[0], device=query.device)
        allowed = allowed & (place[None] <= place[:, None])
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale
    scores = torch.where(allowed[None], scores, -torch.inf)
    out = (scores.softmax(-1) @ value.transpose(0, 1)).transpose(0, 1)
    return out, query.new_empty(0)
