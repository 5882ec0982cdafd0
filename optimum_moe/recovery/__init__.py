"""Training to recover the quality of a compressed model, with the `Trainer` of transformers.

`RowPruning` is the trained variant of MC-SMoE: a callback that prunes the sparse rows of low-rank-sparse layers during
training, so that fewer of them are stored at the end.
"""

from optimum_moe.recovery.row_pruning import RowPruning

__all__ = ["RowPruning"]
