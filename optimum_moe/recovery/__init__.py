"""Training to recover the quality of a compressed model, with the `Trainer` of transformers.

`recover` trains a model on the predictions of its original, `store_teacher_logits` stores these once for many models.
`RowPruning` is the trained variant of MC-SMoE: a callback that prunes the sparse rows of low-rank-sparse layers during
training, so that fewer of them are stored at the end.
"""

from optimum_moe.recovery.row_pruning import RowPruning
from optimum_moe.recovery.run import Recovered, recover
from optimum_moe.recovery.teacher import store_teacher_logits

__all__ = ["Recovered", "RowPruning", "recover", "store_teacher_logits"]
