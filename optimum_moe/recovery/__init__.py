"""Training that brings a compressed model back towards the original, with the `Trainer` of transformers.

`RowPruning` is the trained variant of MC-SMoE: a callback that prunes the sparse rows of low-rank-sparse layers while
they train and stores fewer of them in the end.
"""

from optimum_moe.recovery.row_pruning import RowPruning

__all__ = ["RowPruning"]
