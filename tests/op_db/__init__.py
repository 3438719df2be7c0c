"""The table of operators that tests/test_ops.py runs: one module per operator, one line each here.

`case.py` says what a sample is; a new case of an operator is one `yield` in its module.
"""

from op_db import in_batch_cross_entropy, in_batch_hardest, linear_cross_entropy

OPS = [linear_cross_entropy.OP, in_batch_cross_entropy.OP, in_batch_hardest.OP]
