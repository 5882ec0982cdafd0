"""Which weights of a matrix become zero, and how the others make up for them.

- magnitude: the smallest absolute values;
- Wanda (arXiv:2306.11695): in each row the smallest products of an absolute value and the norm of its input;
- SparseGPT (arXiv:2301.00774): column after column, the weights whose loss costs the outputs the least, and the columns
  that are left take over what they lose (optimal brain surgeon).

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), M weights of a group, P tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.neurons import gram, root

Method = Literal["wanda", "sparsegpt", "magnitude"]
CRITERIA: tuple[str, ...] = get_args(Method)

# Columns of SparseGPT between two updates of those after them, and the ridge of a Gram; both are the paper's.
_BLOCK = 128
_DAMPING = 0.01


@dataclass(frozen=True)
class Sparsity:
    """How many weights are zero, and among which the ranking takes place.

    Args:
        zeros: Share of the weights, in [0, 1).
        group: M weights beside each other in a row, `zeros * M` of which are zero in every such group (pattern n:m); 0
            for any place (unstructured).
    """

    zeros: float
    group: int = 0

    def kept(self, score_OX: torch.Tensor) -> torch.Tensor:
        """(O, X) bool, True for the weights that stay; of each row, or of each group, those of the highest scores.

        Every row has `round(zeros * X)` zeros, every group `round(zeros * M)`; ties go to the lower column.
        """
        row_RX = score_OX.reshape(-1, self.group or score_OX.shape[1])
        gone = round(self.zeros * row_RX.shape[1])
        order_RX = row_RX.argsort(dim=1, stable=True)
        kept_RX = torch.ones_like(row_RX, dtype=torch.bool).scatter_(1, order_RX[:, :gone], False)
        return kept_RX.view_as(score_OX)

    def kept_of_all(self, score_OX: torch.Tensor) -> torch.Tensor:
        """The same with all weights of the matrix ranked together, unless the pattern has groups."""
        return self.kept(score_OX) if self.group else self.kept(score_OX.reshape(1, -1)).view_as(score_OX)


def by_magnitude(matrix_OX: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """(O, X) the matrix with its smallest absolute values zeroed, in its own dtype."""
    return matrix_OX.where(sparsity.kept_of_all(matrix_OX.float().abs()), 0)


def by_wanda(matrix_OX: torch.Tensor, input_norm_X: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """(O, X) the matrix with the smallest |w| * norm of each row zeroed, in its own dtype (Wanda, section 3).

    Args:
        matrix_OX: (O, X).
        input_norm_X: (X,) the norm of each input channel over the tokens.
        sparsity: How many weights are zero.
    """
    return matrix_OX.where(sparsity.kept(matrix_OX.float().abs() * input_norm_X), 0)


def inverse_root(gram_XX: torch.Tensor) -> torch.Tensor:
    """(X, X) float32 upper triangular U with U^T U the inverse of the damped Gram of some inputs."""
    inverse_XX = torch.cholesky_inverse(root(gram_XX, _DAMPING))
    return torch.linalg.cholesky(inverse_XX, upper=True).float()


def by_sparsegpt(matrix_OX: torch.Tensor, upper_XX: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """(O, X) the pruned matrix in its own dtype, what is left of it updated (SparseGPT, algorithm 1).

    Without groups, the weights of 128 columns are ranked together.

    Args:
        matrix_OX: (O, X).
        upper_XX: `inverse_root` of the Gram of the inputs.
        sparsity: How many weights are zero.
    """
    columns, group = matrix_OX.shape[1], sparsity.group
    left_OX, diagonal_X = matrix_OX.float().clone(), upper_XX.diagonal()
    # A group lies in one block.
    size = max(_BLOCK // group, 1) * group if group else _BLOCK
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        error_OB = torch.empty_like(left_OX[:, start:stop])
        kept_OB = sparsity.kept_of_all((left_OX[:, start:stop] / diagonal_X[start:stop]).square())
        for column in range(start, stop):
            if group and (column - start) % group == 0:
                # Of the values that the columns before have left.
                own = slice(column, column + group)
                score_OM = (left_OX[:, own] / diagonal_X[own]).square()
                kept_OB[:, column - start : column - start + group] = sparsity.kept(score_OM)
            gone_O = left_OX[:, column].masked_fill(kept_OB[:, column - start], 0)
            error_O = gone_O / upper_XX[column, column]
            left_OX[:, column:stop].addr_(error_O, upper_XX[column, column:stop], alpha=-1)
            left_OX[:, column].masked_fill_(~kept_OB[:, column - start], 0)
            error_OB[:, column - start] = error_O
        left_OX[:, stop:].addmm_(error_OB, upper_XX[start:stop, stop:], alpha=-1)
    return left_OX.to(matrix_OX.dtype)


def pruned_expert(
    expert: Expert, tokens: ExpertTokens | None, method: str, sparsity: Sparsity, knows_hidden: bool = True
) -> Expert:
    """An expert whose matrices have zeros; those of the down projection suit the neurons of pruned gate and up.

    Args:
        expert: The expert.
        tokens: Those that were routed to it, each of which counts once; None, or no token, ranks by magnitude.
        method: One of `CRITERIA`.
        sparsity: How many weights of each matrix are zero.
        knows_hidden: Whether the expert alone says what its down projection reads; else that is ranked by magnitude.
    """
    if method == "magnitude" or tokens is None or not len(tokens):
        gate_IH, down_HI = expert.gate_IH, by_magnitude(expert.down_HI, sparsity)
        return replace(
            expert,
            up_IH=by_magnitude(expert.up_IH, sparsity),
            down_HI=down_HI,
            gate_IH=None if gate_IH is None else by_magnitude(gate_IH, sparsity),
        )
    input_PH = tokens.input_PH.float()
    found = _pruned_together([m for m in (expert.up_IH, expert.gate_IH) if m is not None], input_PH, method, sparsity)
    entering = replace(expert, up_IH=found[0], gate_IH=None if expert.gate_IH is None else found[1])
    if not knows_hidden:
        return replace(entering, down_HI=by_magnitude(expert.down_HI, sparsity))
    wide = entering.float()
    hidden_PI = wide.activated(wide.preactivations(input_PH))
    return replace(entering, down_HI=_pruned_together([expert.down_HI], hidden_PI, method, sparsity)[0])


def _pruned_together(
    matrices: list[torch.Tensor], input_PX: torch.Tensor, method: str, sparsity: Sparsity
) -> list[torch.Tensor]:
    """Matrices that read the same inputs."""
    if method == "wanda":
        norm_X = torch.linalg.vector_norm(input_PX, dim=0)
        return [by_wanda(matrix, norm_X, sparsity) for matrix in matrices]
    upper_XX = inverse_root(gram(input_PX))
    return [by_sparsegpt(matrix, upper_XX, sparsity) for matrix in matrices]
