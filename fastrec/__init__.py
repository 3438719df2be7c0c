# SPDX-License-Identifier: Apache-2.0
"""fastrec: fused, exact kernels and objectives for recommender user models.

The ops are imported here, but for the command line; what is above them, `_LATER`, when it is first
asked for.
"""

import importlib
from typing import TYPE_CHECKING

from fastrec import threads

if threads.is_command():
    threads.prepare_command()  # before torch is imported, which `fastrec --help` does without

if TYPE_CHECKING or not threads.is_command():
    from fastrec.ops.bias_gelu_dropout import bias_gelu_dropout
    from fastrec.ops.dropout_add_layer_norm import dropout_add_layer_norm
    from fastrec.ops.gelu_ffn import gelu_ffn
    from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy
    from fastrec.ops.in_batch_hardest import in_batch_hardest
    from fastrec.ops.jagged_attention import jagged_attention
    from fastrec.ops.jagged_embedding import jagged_embedding
    from fastrec.ops.jagged_gru import jagged_gru
    from fastrec.ops.jagged_max_pool import jagged_max_pool
    from fastrec.ops.linear import linear
    from fastrec.ops.linear_cross_entropy import linear_cross_entropy
    from fastrec.ops.linear_rank import linear_rank
    from fastrec.ops.linear_topk import linear_topk
    from fastrec.ops.multilabel_bce import multilabel_bce
    from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy

if TYPE_CHECKING:
    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.prepare import prepare
    from fastrec.evaluation.next_item import evaluate
    from fastrec.evaluation.protocol import Protocol
    from fastrec.export import export_query
    from fastrec.index import index_queries, index_recall, item_index
    from fastrec.integrations.patching import patch, patched, unpatch
    from fastrec.nn.model_config import ModelConfig
    from fastrec.nn.text_model import TextModel
    from fastrec.nn.user_model import UserModel
    from fastrec.onnx import export_onnx, onnx_query
    from fastrec.random import Rng
    from fastrec.serve import Recommender, recommend
    from fastrec.serve_cold import OtherCatalogue
    from fastrec.training.adapters import save_adapter, with_adapter
    from fastrec.training.config import Recipe
    from fastrec.training.fit import fit
    from fastrec.training.model_folder import load_model
    from fastrec.vectors import item_vectors, user_vectors

__version__ = "0.1.0"
# Their modules import polars, Lightning and others: a program that only wants an op goes without.
_LATER = {
    "ModelConfig": "fastrec.nn.model_config",
    "OtherCatalogue": "fastrec.serve_cold",
    "Protocol": "fastrec.evaluation.protocol",
    "Recipe": "fastrec.training.config",
    "Recommender": "fastrec.serve",
    "Rng": "fastrec.random",
    "SequenceDataset": "fastrec.data.dataset",
    "TextModel": "fastrec.nn.text_model",
    "UserModel": "fastrec.nn.user_model",
    "evaluate": "fastrec.evaluation.next_item",
    "export_onnx": "fastrec.onnx",
    "export_query": "fastrec.export",
    "fit": "fastrec.training.fit",
    "index_queries": "fastrec.index",
    "index_recall": "fastrec.index",
    "item_index": "fastrec.index",
    "item_vectors": "fastrec.vectors",
    "load_model": "fastrec.training.model_folder",
    "onnx_query": "fastrec.onnx",
    "patch": "fastrec.integrations.patching",
    "patched": "fastrec.integrations.patching",
    "prepare": "fastrec.data.prepare",
    "recommend": "fastrec.serve",
    "save_adapter": "fastrec.training.adapters",
    "unpatch": "fastrec.integrations.patching",
    "user_vectors": "fastrec.vectors",
    "with_adapter": "fastrec.training.adapters",
}
__all__ = [
    "ModelConfig",
    "OtherCatalogue",
    "Protocol",
    "Recipe",
    "Recommender",
    "Rng",
    "SequenceDataset",
    "TextModel",
    "UserModel",
    "bias_gelu_dropout",
    "dropout_add_layer_norm",
    "evaluate",
    "export_onnx",
    "export_query",
    "fit",
    "gelu_ffn",
    "in_batch_cross_entropy",
    "in_batch_hardest",
    "index_queries",
    "index_recall",
    "item_index",
    "item_vectors",
    "jagged_attention",
    "jagged_embedding",
    "jagged_gru",
    "jagged_max_pool",
    "linear",
    "linear_cross_entropy",
    "linear_rank",
    "linear_topk",
    "load_model",
    "multilabel_bce",
    "onnx_query",
    "patch",
    "patched",
    "prepare",
    "recommend",
    "sampled_linear_cross_entropy",
    "save_adapter",
    "unpatch",
    "user_vectors",
    "with_adapter",
]


if threads.is_command():
    _LATER |= {name: f"fastrec.ops.{name}" for name in __all__ if name not in _LATER}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'fastrec' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
