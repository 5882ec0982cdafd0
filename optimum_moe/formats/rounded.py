"""The formats of eight and four bits: matrices as whole numbers with a scale for each group of weights in a row.

A byte budget may take them at any number of neurons. Four bits of gate and up are chosen so that their outputs on the
expert's tokens stay (GPTQ); the down projection is refitted to the neurons that they then give, and rounded likewise.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), N kept neurons, H hidden, P tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from optimum_moe.algorithms import rounding
from optimum_moe.algorithms.byte_budget import Candidate
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.algorithms.expert_fitter import ExpertFitter, NarrowExpert
from optimum_moe.algorithms.neurons import gram, refitted
from optimum_moe.formats.base import (
    PROJECTIONS,
    BodyFormat,
    Layout,
    Opened,
    Stacks,
    StoredPart,
    TensorSpec,
    register_format,
)
from optimum_moe.formats.budget_format import BudgetFormat, Trial
from optimum_moe.formats.stored import StoredExpert, StoredMatrix


class Rounded(BodyFormat, BudgetFormat):
    """`packed` (1, O, W) int32 words and `scale` (1, O, G) of size 1, both with the number of bits in their names."""

    by_default = False
    bits: ClassVar[int]
    group: ClassVar[int]
    is_fitted: ClassVar[bool]
    """Whether rounding looks at the tokens; else each weight becomes the nearest number."""

    def __init__(self) -> None:
        self._whole: WeakKeyDictionary[ExpertFitter, StoredPart] = WeakKeyDictionary()

    def tensors(self, size: int, outputs: int, inputs: int) -> dict[str, TensorSpec]:
        """The words of each row, and the scales of its groups in the dtype of the weights."""
        return {
            f"packed{self.bits}": TensorSpec((1, outputs, inputs * self.bits // 32), torch.int32),
            f"scale{self.bits}": TensorSpec((1, outputs, rounding.num_groups(inputs, self.group))),
        }

    def fits(self, size: int, outputs: int, inputs: int) -> bool:
        """Rows fill whole words."""
        return inputs % (32 // self.bits) == 0

    def multiply_adds(self, size: int, outputs: int, inputs: int) -> int:
        """O X multiply-adds for each token."""
        return outputs * inputs

    def forward(
        self,
        stacks: Stacks,
        expert: int,
        size: int,
        input_PX: torch.Tensor,
        bias_O: torch.Tensor | None,
        opened: Opened | None,
    ) -> torch.Tensor:
        """W x + b, with W unpacked for this call."""
        names = self.tensors(size, stacks.outputs, stacks.inputs)
        return nn.functional.linear(
            input_PX, self.densified({name: stacks.piece(name, expert, opened) for name in names}, None), bias_O
        )

    def densified(self, part: Mapping[str, torch.Tensor], matrix_OX: torch.Tensor | None) -> torch.Tensor:
        """The matrix (O, X) that the numbers stand for, in the dtype of the scales."""
        scale_OG = part[f"scale{self.bits}"][0]
        number_OX = rounding.unpacked(part[f"packed{self.bits}"][0], self.bits)
        return number_OX.to(scale_OG.dtype) * rounding.by_column(scale_OG, number_OX.shape[1], self.group)

    def describe(self, sizes: Sequence[int]) -> str:
        """The number of bits."""
        return f"of {self.bits} bits"

    def encode(self, matrix_OX: torch.Tensor) -> StoredPart:
        """Each weight as the nearest number."""
        return self._part(matrix_OX, None)

    def _part(self, matrix_OX: torch.Tensor, gram_XX: torch.Tensor | None) -> StoredPart:
        wide_OX = matrix_OX.float()
        scale_OG = rounding.group_scales(wide_OX, self.bits, self.group, matrix_OX.dtype)
        if gram_XX is None or not self.is_fitted:
            number_OX = rounding.nearest(wide_OX, scale_OG, self.bits, self.group)
        else:
            number_OX = rounding.fitted(wide_OX, scale_OG, self.bits, self.group, gram_XX)
        words_OW = rounding.packed(number_OX, self.bits)
        return StoredPart(
            self.name, 1, {f"packed{self.bits}": words_OW[None], f"scale{self.bits}": scale_OG[None].contiguous()}
        )

    def joined(self, gate: StoredPart, up: StoredPart) -> StoredPart:
        """Gate and up concatenated by rows."""
        return StoredPart(
            self.name, 1, {name: torch.cat([gate.tensors[name], up.tensors[name]], 1) for name in gate.tensors}
        )

    def candidates(self, trial: Trial, narrow: NarrowExpert) -> Iterator[tuple[Candidate, float]]:
        """The expert at this width, as it would be stored."""
        neurons, hidden = len(narrow.kept_N), trial.expert.up_IH.shape[1]
        if self.fits(1, neurons, hidden) and self.fits(1, hidden, neurons):
            stored = self._stored(trial.fitter, narrow, trial.expert.up_IH.dtype)
            damage = trial.estimate.of_outputs(lambda input_PH: stored.run(trial.fitter.expert, input_PH))
            yield Candidate(self.name, neurons, 1), damage

    def layout(self, candidate: Candidate, gated: bool) -> Layout:
        """Every matrix in this format."""
        return {name: {self.name: 1} for name in PROJECTIONS if gated or name != "gate"}

    def build(self, expert: Expert, fitter: ExpertFitter, candidate: Candidate) -> StoredExpert:
        """Rounded gate and up, and a down projection that is refitted to them and rounded."""
        return self._stored(fitter, fitter.narrowed(candidate.neurons), expert.up_IH.dtype)

    def rounded(self, expert: Expert, tokens: ExpertTokens | None) -> StoredExpert:
        """All of an expert in this format.

        Args:
            expert: The expert.
            tokens: Those that numbers are fitted to; None, or no token, for the nearest numbers.
        """
        matrices = {"gate": expert.gate_IH, "up": expert.up_IH, "down": expert.down_HI}
        grams: dict[str, torch.Tensor] = {}
        if tokens is not None and len(tokens):
            wide, weight_P1 = expert.float(), tokens.weight_P.float()[:, None]
            input_PH = tokens.input_PH.float()
            grams = dict.fromkeys(("gate", "up"), gram(input_PH * weight_P1))
            grams["down"] = gram(wide.activated(wide.preactivations(input_PH)) * weight_P1)
        made = {
            name: StoredMatrix((matrix.shape[0], matrix.shape[1]), (self._part(matrix, grams.get(name)),))
            for name, matrix in matrices.items()
            if matrix is not None
        }
        return StoredExpert(made["up"], made["down"], made.get("gate"))

    def _stored(self, fitter: ExpertFitter, narrow: NarrowExpert, dtype: torch.dtype) -> StoredExpert:
        loss, own, whole = fitter.loss, narrow.expert, self._entering(fitter, dtype)
        rows = {"up": narrow.kept_N} if own.gate_IH is None else {"gate": narrow.kept_N}
        if own.gate_IH is not None:
            rows["up"] = narrow.kept_N + fitter.expert.inner
        parts = {
            name: StoredPart(self.name, 1, {key: tensor[:, own_N] for key, tensor in whole.tensors.items()})
            for name, own_N in rows.items()
        }
        entering = {name: StoredMatrix((own.inner, own.up_IH.shape[1]), (part,)) for name, part in parts.items()}
        stacked_OH = torch.cat([matrix.densified() for matrix in entering.values()]).to(loss.input_PH.dtype)
        hidden_PN = own.activated(loss.input_PH @ stacked_OH.T) * loss.root_P1
        moments = loss.moments(hidden_PN)
        made_SN = refitted(moments.cross_SN, moments.gram_NN, narrow.made_SN, fitter.damping)
        down_HN = loss.outputs.down(made_SN).to(dtype)
        down = StoredMatrix((down_HN.shape[0], down_HN.shape[1]), (self._part(down_HN, moments.gram_NN),))
        return StoredExpert(entering["up"], down, entering.get("gate"), narrow.kept_N)

    def _entering(self, fitter: ExpertFitter, dtype: torch.dtype) -> StoredPart:
        """Gate above up with all neurons: rows are rounded one by one, so that fewer neurons have some of these."""
        if fitter not in self._whole:
            loss = fitter.loss
            gram_HH = gram(loss.input_PH * loss.root_P1) if self.is_fitted else None
            self._whole[fitter] = self._part(fitter.expert.stacked.to(dtype), gram_HH)
        return self._whole[fitter]


@register_format
class EightBits(Rounded):
    """Eight bits in groups of 128."""

    name = "int8"
    bits, group, is_fitted = 8, 128, False


@register_format
class FourBits(Rounded):
    """Four bits in groups of 64."""

    name = "int4"
    bits, group, is_fitted = 4, 64, True


ROUNDED = {kind.bits: kind.name for kind in (EightBits, FourBits)}
"""Names of the formats by their number of bits."""
