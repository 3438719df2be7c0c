"""fastrec: fused, exact kernels and objectives for recommender user models."""

from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy
from fastrec.ops.in_batch_hardest import in_batch_hardest
from fastrec.ops.linear_cross_entropy import linear_cross_entropy

__version__ = "0.1.0"
__all__ = ["in_batch_cross_entropy", "in_batch_hardest", "linear_cross_entropy"]
