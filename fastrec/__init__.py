"""fastrec: fused, exact kernels and objectives for recommender user models."""

from fastrec import threads

if threads.is_command():
    threads.prepare_command()  # before torch is imported

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
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy

__version__ = "0.1.0"
__all__ = [
    "bias_gelu_dropout",
    "dropout_add_layer_norm",
    "gelu_ffn",
    "in_batch_cross_entropy",
    "in_batch_hardest",
    "jagged_attention",
    "jagged_embedding",
    "jagged_gru",
    "jagged_max_pool",
    "linear",
    "linear_cross_entropy",
    "linear_rank",
    "linear_topk",
    "sampled_linear_cross_entropy",
]
