"""The low-rank format: a matrix as the product of two factors; in a byte budget gate and up share the right one.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), R rank, N kept neurons, H hidden, S the smaller
of H and I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.algorithms.fisher_loss import FisherLoss
from optimum_moe.algorithms.low_rank import Spectrum, decompose
from optimum_moe.algorithms.neurons import gram, refitted
from optimum_moe.formats.base import (
    DEFAULT,
    JOINT,
    BodyFormat,
    Layout,
    Opened,
    Product,
    Stacks,
    StoredPart,
    TensorSpec,
    register_format,
)
from optimum_moe.formats.budget_format import BudgetFormat, Trial, rounded
from optimum_moe.formats.grouped import grouped_product
from optimum_moe.formats.specification import span
from optimum_moe.formats.stored import StoredExpert, StoredMatrix, stored_matrix

# Ranks that are tried at a width, as shares of the one that stores as much as dense matrices.
_RANKS = (0.3, 0.4, 0.5, 0.6, 0.75)


@register_format
class LowRank(BodyFormat, BudgetFormat):
    """W = U^T V: `u` (R, O) and `v` (R, X) of size R. Rank 0 is a matrix of zeros, to which others are added."""

    name = "low_rank"
    is_costly = True

    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The factors `u` (R, O) and `v` (R, X)."""
        return {"u": TensorSpec((size, outputs)), "v": TensorSpec((size, inputs))}

    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """R (O + X)."""
        return size * (outputs + inputs)

    def forward(
        self,
        stacks: Stacks,
        expert: int,
        size: int,
        input_PX: torch.Tensor,
        bias_O: torch.Tensor | None,
        opened: Opened | None,
    ) -> torch.Tensor:
        """U^T (V x) + b."""
        if not size:
            output_PO = input_PX.new_zeros(input_PX.shape[0], stacks.outputs)
            return output_PO if bias_O is None else output_PO + bias_O
        hidden_PR = nn.functional.linear(input_PX, stacks.piece("v", expert, opened))
        u_RO = stacks.piece("u", expert, opened)
        return torch.mm(hidden_PR, u_RO) if bias_O is None else torch.addmm(bias_O, hidden_PR, u_RO)

    def grouped(
        self, stacks: Stacks, experts: Sequence[int], size: int, input_QX: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """One grouped matmul for each factor."""
        if not size:
            return input_QX.new_zeros(len(input_QX), stacks.outputs)
        u_CRO, v_CRX = (stacks.run_of(name, experts[0], experts[-1]).unflatten(0, (-1, size)) for name in ("u", "v"))
        return grouped_product(grouped_product(input_QX, v_CRX.transpose(1, 2), counts), u_CRO, counts)

    def product(self, tensors: Mapping[str, torch.Tensor]) -> Product:
        """The two factors."""
        return Product(tensors["v"], left=tensors["u"])

    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """The product U^T V (O, X)."""
        return part["u"].T @ part["v"]

    def describe(self, sizes: Sequence[int]) -> str:
        """The range of ranks."""
        return f"of rank {span(sizes)}"

    def fits(self, size: int, outputs: int, inputs: int) -> bool:
        """Ranks above the longer side store more than the matrix."""
        return size <= max(outputs, inputs)

    def joined(self, gate: StoredPart, up: StoredPart) -> StoredPart | None:
        """[U_gate U_up] and the right factor that they share."""
        if not self.wants_joint(gate, up):
            return None
        u_RO = torch.cat([gate.tensors["u"], up.tensors["u"]], dim=1)
        return StoredPart(self.name, up.size, {"u": u_RO, "v": up.tensors["v"]})

    def wants_joint(self, gate: StoredPart, up: StoredPart) -> bool:
        """Where both have the same right factor (the same tensor)."""
        return gate.tensors["v"] is up.tensors["v"]

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """Several ranks of gate and up at this width."""
        neurons, shape = len(narrow.kept_N), trial.expert.stacked.shape
        ranks = _ranks(shape[0] // trial.expert.inner * neurons, shape[1])
        ranks = [rank for rank in ranks if trial.wants(Candidate(self.name, neurons, rank))]
        for rank, made in zip(ranks, _fits(trial.fitter, narrow, ranks, trial.estimate.held_out), strict=True):
            seen_PN, held_out_PN = made.hidden
            damage = trial.estimate.of_hidden(made.made_SN, seen_PN, held_out_PN)
            yield Candidate(self.name, neurons, rank), damage

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Gate and up as one matrix of low rank, down dense."""
        return {JOINT if gated else "up": {self.name: candidate.size}, "down": {DEFAULT: 1}}

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """Factors of gate and up, and a down projection that is refitted to them."""
        dtype, narrow = expert.up_IH.dtype, fitter.narrowed(candidate.neurons)
        (made,) = _fits(fitter, narrow, [candidate.size])
        stacked = made.spectrum.truncated(candidate.size)
        v_RH = stacked.v_RX.to(dtype)
        lefts = [part.to(dtype).contiguous() for part in stacked.u_RO.split(candidate.neurons, dim=1)]
        return StoredExpert(
            up=low_rank_matrix(MatrixFactors(lefts[-1], v_RH)),
            down=stored_matrix(fitter.loss.outputs.down(made.made_SN).to(dtype)),
            gate=low_rank_matrix(MatrixFactors(lefts[0], v_RH)) if len(lefts) == 2 else None,
            neurons=None if candidate.neurons == expert.inner else narrow.kept_N,
        )


def low_rank_matrix(factors: MatrixFactors, *added: StoredPart) -> StoredMatrix:
    """A matrix of low rank, with or without parts that are added to it; sparse rows of the factors are left out."""
    part = StoredPart(LowRank.name, factors.rank, {"u": factors.u_RO, "v": factors.v_RX})
    return StoredMatrix(factors.shape, (part, *added))


@dataclass(frozen=True, eq=False)
class _Fit:
    """An expert whose gate and up, one above the other, have a low rank.

    Args:
        spectrum: Factors of gate above up, of this rank and higher ones.
        made_SN: (S, N) what its neurons are mapped to.
        hidden: (P, N) its weighted hidden activations on the tokens that it was fitted to, and on any others.
    """

    spectrum: Spectrum
    made_SN: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


def _fits(fitter: ExpertFitter, narrow: NarrowExpert, ranks: Sequence[int], *others: FisherLoss) -> Iterator[_Fit]:
    """A narrowed expert at each rank (ascending), from one decomposition; run on the tokens of other losses too."""
    if not ranks:
        return
    loss = fitter.loss
    weight_P, local_OO = loss.local(narrow.kept_N, narrow.made_SN)
    scale_P1 = weight_P.sqrt().to(loss.input_PH.dtype)[:, None]
    rows_PH = loss.input_PH * scale_P1
    stacked_OH = narrow.expert.stacked
    # The Gram of the shorter side gets a root; the longer side's is not needed.
    transposed = stacked_OH.shape[0] > stacked_OH.shape[1]
    spectrum = decompose(
        stacked_OH,
        input_gram_XX=gram(rows_PH) if transposed else None,
        input_rows_PX=None if transposed else rows_PH,
        product_PO=None if transposed else loss.stacked_PO[:, loss.stacked(narrow.kept_N)] * scale_P1,
        output_gram_OO=local_OO,
        damping=fitter.damping,
        rank=ranks[-1],
        dtype=stacked_OH.dtype,
    )
    left_OR, right_RH = spectrum.left_OD, spectrum.right_DX
    runs = [seen.hidden_at_ranks(narrow.expert, left_OR, right_RH, ranks) for seen in (loss, *others)]
    for hidden in zip(*runs, strict=True):
        moments = loss.moments(hidden[0])
        made_SN = refitted(moments.cross_SN, moments.gram_NN, narrow.made_SN, fitter.damping)
        yield _Fit(spectrum, made_SN, hidden)


def _ranks(rows: int, columns: int) -> list[int]:
    """Ranks worth trying of a matrix: below the one that stores as much as the matrix itself."""
    most = rows * columns / (rows + columns)
    return sorted({rank for rank in map(rounded, (most * share for share in _RANKS)) if rank < most})
