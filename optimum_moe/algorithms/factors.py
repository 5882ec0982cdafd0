"""The forms in which a compressed expert is kept: fewer neurons, and matrices that are dense or U V + S.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs), R rank, M kept rows of the sparse part,
H hidden, I intermediate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PROJECTIONS = ("gate", "up", "down")
"""The matrices of an expert; experts without a gate have the last two."""
JOINT = "gate_up"
"""Gate above up, where the two are kept as one matrix."""


@dataclass(frozen=True, eq=False)
class MatrixFactors:
    """One (O, X) matrix: either dense, or W = U^T V + S with a low rank and a structured sparse part.

    Args:
        dense_OX: (O, X) the matrix itself; the other fields are None then.
        u_RO: (R, O) left factor, transposed.
        v_RX: (R, X) right factor.
        row_index_M: (M,) int64 ascending rows that S keeps, None where there is no sparse part.
        rows_MX: (M, X) these rows of S.

    Raises:
        ValueError: If neither form is complete, or shapes do not fit.
    """

    dense_OX: torch.Tensor | None = None
    u_RO: torch.Tensor | None = None
    v_RX: torch.Tensor | None = None
    row_index_M: torch.Tensor | None = None
    rows_MX: torch.Tensor | None = None

    def __post_init__(self) -> None:
        factored = self.u_RO is not None and self.v_RX is not None
        if (self.dense_OX is not None) == factored or (self.row_index_M is None) != (self.rows_MX is None):
            raise ValueError(
                "A matrix is dense or has both factors, and its sparse rows have an index. Pass one form completely."
            )
        if self.dense_OX is not None and self.rows_MX is not None:
            raise ValueError("A dense matrix has no sparse part. Add it to the matrix.")
        if self.u_RO is not None and self.v_RX is not None and len(self.u_RO) != len(self.v_RX):
            raise ValueError(
                f"The factors have ranks {len(self.u_RO)} and {len(self.v_RX)}: they must agree. Pass (R, O), (R, X)."
            )

    @property
    def is_dense(self) -> bool:
        """Whether the matrix is kept as it is."""
        return self.dense_OX is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, X)."""
        if self.dense_OX is not None:
            return int(self.dense_OX.shape[0]), int(self.dense_OX.shape[1])
        assert self.u_RO is not None
        assert self.v_RX is not None
        return int(self.u_RO.shape[1]), int(self.v_RX.shape[1])

    @property
    def rank(self) -> int | None:
        """R, None for a dense matrix."""
        return None if self.u_RO is None else len(self.u_RO)

    @property
    def num_rows(self) -> int:
        """M, 0 without a sparse part."""
        return 0 if self.row_index_M is None else len(self.row_index_M)

    @property
    def numbers(self) -> int:
        """Numbers that are stored: R (O + X) + M X + M, or O X."""
        rows, columns = self.shape
        rank = self.rank
        return rows * columns if rank is None else rank * (rows + columns) + self.num_rows * (columns + 1)

    def densified(self) -> torch.Tensor:
        """(O, X) the matrix that the form stands for."""
        if self.dense_OX is not None:
            return self.dense_OX
        assert self.u_RO is not None
        assert self.v_RX is not None
        full_OX = self.u_RO.T @ self.v_RX
        if self.row_index_M is not None and self.rows_MX is not None:
            full_OX = full_OX.index_add(0, self.row_index_M.to(full_OX.device), self.rows_MX.to(full_OX.dtype))
        return full_OX


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """One expert in the form in which it is kept.

    Args:
        up: (n, H) matrix.
        down: (H, n) matrix.
        gate: (n, H) matrix, None for non-gated experts.
        neurons: (n,) int64, the intermediate neurons that are kept, in their order here; None for all as they are. An
            expert with none gives zeros (and its down bias, where it has one).

    Raises:
        ValueError: If the matrices disagree about the number of neurons.
    """

    up: MatrixFactors
    down: MatrixFactors
    gate: MatrixFactors | None = None
    neurons: torch.Tensor | None = None

    def __post_init__(self) -> None:
        widths = {self.up.shape[0], self.down.shape[1]}
        widths |= set() if self.gate is None else {self.gate.shape[0]}
        widths |= set() if self.neurons is None else {len(self.neurons)}
        if len(widths) > 1:
            raise ValueError(f"The matrices of an expert have {sorted(widths)} neurons: they must agree.")

    @property
    def width(self) -> int:
        """Intermediate neurons that are kept (n)."""
        return self.up.shape[0]

    @property
    def matrices(self) -> dict[str, MatrixFactors]:
        """Its matrices by the name of the projection: gate (where there is one), up, down."""
        named = {"up": self.up, "down": self.down}
        return named if self.gate is None else {"gate": self.gate, **named}

    @property
    def numbers(self) -> int:
        """Numbers that are stored, biases excluded; a right factor that gate and up share counts once."""
        total = sum(matrix.numbers for matrix in self.matrices.values())
        return total - (self.up.v_RX.numel() if self.shares_right and self.up.v_RX is not None else 0)

    @property
    def shares_right(self) -> bool:
        """Whether gate and up have one right factor (the same tensor): [gate; up] = [U_gate; U_up] V."""
        return self.gate is not None and self.up.v_RX is not None and self.gate.v_RX is self.up.v_RX

    @property
    def joint(self) -> dict[str, MatrixFactors]:
        """Its matrices with gate above up in one, which both have to be dense or share their right factor."""
        assert self.gate is not None
        if self.gate.dense_OX is not None and self.up.dense_OX is not None:
            stacked = MatrixFactors(dense_OX=torch.cat([self.gate.dense_OX, self.up.dense_OX]))
        else:
            assert self.gate.u_RO is not None
            assert self.up.u_RO is not None
            stacked = MatrixFactors(u_RO=torch.cat([self.gate.u_RO, self.up.u_RO], dim=1), v_RX=self.up.v_RX)
        return {JOINT: stacked, "down": self.down}


@dataclass(frozen=True)
class FactorSizes:
    """The sizes of a block's experts, from which their empty tensors can be made.

    Args:
        widths: Neurons of each of the G experts; 0 for an empty one.
        ranks: By projection (gate, up, down; or gate_up, down) the rank of each expert's matrix, None for a dense one.
        rows: By projection the sparse rows of each expert's matrix; projections without any are left out.
        base: The group whose base each expert's matrices are added to, where experts share bases.

    Raises:
        ValueError: If lengths disagree or a number is impossible.
    """

    widths: tuple[int, ...]
    ranks: Mapping[str, tuple[int | None, ...]]
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lists: list[Sequence[int | None]] = [self.widths, *self.ranks.values(), *self.rows.values()]
        lists += [] if self.base is None else [self.base]
        projections, known = set(self.ranks), ({"up", "down"}, set(PROJECTIONS), {JOINT, "down"})
        numbers = [n for values in lists for n in values]
        if (
            projections not in known
            or not set(self.rows) <= projections
            or {len(values) for values in lists} != {len(self.widths)}
            or any(n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0) for n in numbers)
            or None in [n for values in (self.widths, *self.rows.values(), self.base or ()) for n in values]
            or max(self.base or (0,)) >= max(1, len(self.widths))
        ):
            raise ValueError(
                "Sizes of experts must give each expert a width and, for gate, up and down, or gate_up and down, a "
                "rank (null for dense) and a number of rows, all whole numbers from 0, and no more bases than "
                f"experts; got {self._record()!r:.200}. "
                "Restore the saved config.json."
            )

    @property
    def has_gate(self) -> bool:
        """Whether the experts are gated."""
        return "up" not in self.ranks or "gate" in self.ranks

    def rank_of(self, projection: str, expert: int) -> int | None:
        """Rank of an expert's gate, up or down; None for a dense one."""
        return self.ranks[projection if projection in self.ranks else JOINT][expert]

    def shape(self, projection: str, width: int, hidden_size: int) -> tuple[int, int]:
        """(O, X) of a projection of experts with that many neurons."""
        if projection == "down":
            return hidden_size, width
        return (2 * width if projection == JOINT else width), hidden_size

    def numbers(self, expert: int, hidden_size: int, active: bool = False) -> int:
        """Numbers that one expert stores, biases excluded; `active` leaves out the indices of rows."""
        width, total = self.widths[expert], 0
        for name, ranks in self.ranks.items():
            outputs, inputs = self.shape(name, width, hidden_size)
            rank, rows = ranks[expert], self.rows[name][expert] if name in self.rows else 0
            total += outputs * inputs if rank is None else rank * (outputs + inputs) + rows * (inputs + (not active))
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with a checksum: sizes of other experts may fit the same tensors.

        The numbers of all experts are one text ("64 48 - 0", with "-" for None): transformers writes a list in
        config.json with one line for each number.
        """
        record = self._record()
        return record | {"checksum": _checksum(record)}

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "widths": _table(self.widths),
            "ranks": {name: _table(values) for name, values in self.ranks.items()},
        }
        if self.rows:
            record["rows"] = {name: _table(values) for name, values in self.rows.items()}
        if self.base is not None:
            record["base"] = _table(self.base)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> FactorSizes:
        """Read `to_dict` back.

        Raises:
            ValueError: If it is broken, or was changed since it was made.
        """
        try:
            unknown = set(record) - {"widths", "ranks", "rows", "base", "checksum"}
            base = record.get("base")
            sizes = cls(
                _numbers(record["widths"]),
                {name: _numbers(values) for name, values in record["ranks"].items()},
                {name: _numbers(values) for name, values in record.get("rows", {}).items()},
                None if base is None else _numbers(base),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Sizes of experts cannot be read ({error!r}). Restore the saved config.json.") from error
        if unknown:
            raise ValueError(f"Sizes of experts have unknown fields {sorted(unknown)}. Restore the saved config.json.")
        if record.get("checksum") != _checksum(sizes._record()):
            raise ValueError(
                "Sizes of experts are not those that their checksum was made of: tensors would go to other experts. "
                "Restore the saved config.json."
            )
        return sizes


def _table(numbers: Sequence[int | None]) -> str:
    return " ".join("-" if number is None else str(number) for number in numbers)


def _numbers(table: str) -> tuple[Any, ...]:
    """What `_table` was made of.

    Raises:
        ValueError: If a number is none, or too long for any size.
    """
    parts = table.split(" ")
    odd = [part for part in parts if part != "-" and not (part.isascii() and part.isdigit() and len(part) < 20)]
    if odd:
        raise ValueError(f"Sizes of experts hold {odd[0]!r:.40}, no whole number. Restore the saved config.json.")
    return tuple(None if part == "-" else int(part) for part in parts)


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class BlockFactors:
    """The experts of one block in the forms in which they are kept.

    Args:
        experts: One form for each of the G experts; an expert's matrices are what is added to its base, where experts
            share bases.
        base_labels: (G,) the base of each expert, None where nothing is shared.
        bases: By projection (B, O, X) the shared matrices.
    """

    experts: tuple[ExpertFactors, ...]
    base_labels: tuple[int, ...] | None = None
    bases: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        """Whether gate and up are kept as one matrix: where some share their right factor, and no others have ranks."""
        factored = [e for e in self.experts if e.gate is not None and not (e.gate.is_dense and e.up.is_dense)]
        return bool(factored) and all(expert.shares_right for expert in factored)

    def matrices(self, expert: int) -> dict[str, MatrixFactors]:
        """The matrices of an expert, by the projections that are kept."""
        return self.experts[expert].joint if self.joint else self.experts[expert].matrices

    @property
    def sizes(self) -> FactorSizes:
        """What rebuilds the structure."""
        kept = [expert.joint if self.joint else expert.matrices for expert in self.experts]
        names = list(kept[0])
        ranks = {name: tuple(matrices[name].rank for matrices in kept) for name in names}
        rows = {name: tuple(matrices[name].num_rows for matrices in kept) for name in names}
        return FactorSizes(
            tuple(expert.width for expert in self.experts),
            ranks,
            {name: counts for name, counts in rows.items() if any(counts)},
            self.base_labels,
        )
