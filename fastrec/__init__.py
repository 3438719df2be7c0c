"""fastrec: fused, exact kernels and objectives for recommender user models."""

from fastrec.ops.linear_cross_entropy import linear_cross_entropy

__version__ = "0.1.0"
__all__ = ["linear_cross_entropy"]
