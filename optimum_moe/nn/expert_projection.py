"""One projection (gate, up or down) of many experts, each with a matrix in a format of its own.

Shape letters: C experts of a class, O outputs and X inputs of a projection, P tokens of one expert, T all of them by
expert, Q those of all experts with equal bodies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import nn

from optimum_moe.formats.base import (
    DEFAULT,
    AddedFormat,
    BodyFormat,
    MatrixFormat,
    Opened,
    Product,
    all_formats,
    get_format,
)
from optimum_moe.formats.stored import StoredMatrix
from optimum_moe.hf.compat import own_parameter
from optimum_moe.nn.sparse_part import SparsePart, keep_rows

_ROWS = "sparse_rows"


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: what one expert, or one group of experts, has in a stacked tensor.

    Args:
        stack: Dotted path of the stacked tensor.
        owner: Number of the expert, or of the group.
        is_shared: Whether the owner is a group.
        projection: `"gate"`, `"up"`, `"down"` or `"gate_up"`; None for what stands in the place of an expert.
        tensor: Its name within the format, `"dense"` for a dense matrix to which others are added, or `"bias"`.
        part: Its part of the first axis of the stack.
        shape: Its own shape.
        is_entry: Whether it is one entry of the stack, without the first axis.
    """

    stack: str
    owner: int
    is_shared: bool
    projection: str | None
    tensor: str
    part: slice
    shape: tuple[int, ...]
    is_entry: bool


class ExpertProjection(nn.Module):
    """One projection (gate, up or down) of all experts of a width class.

    Experts lie in the order of their bodies (dense ones first, then by rank), so that the factors of those of one rank
    are a regular stack. What each format stores of the experts (`MatrixFormat.tensors`) lies stacked in one tensor,
    where there is something to store: `weight`, `u`, `v`, `rows`, `row_index`, ... and `bias` (C, O).

    Args:
        outputs: O.
        inputs: X.
        parts_C: By format the sizes of the parts of each expert's matrix.
        bias: Whether there are biases.
        factory: Device and dtype.
    """

    rows: nn.Parameter
    row_index: torch.Tensor

    def __init__(
        self, outputs: int, inputs: int, parts_C: Sequence[Mapping[str, int]], bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.outputs, self.inputs, self.has_bias = outputs, inputs, bias
        bodies = {form.name: position for position, form in enumerate(all_formats(BodyFormat))}
        self._bodies_C = [next((name, size) for name, size in own.items() if name in bodies) for own in parts_C]
        keys = [(bodies[name], size) for name, size in self._bodies_C]
        self.order_C = sorted(range(len(keys)), key=lambda expert: (keys[expert], expert))
        self.place_C = [self.order_C.index(expert) for expert in range(len(keys))]
        self._arrange(parts_C)
        # Buffers take no gradient, and are never split.
        self._buffer_names: set[str] = set()
        for form in self._formats:
            for name, (shape, dtype) in self._stacked(form).items():
                if dtype is None:
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
                else:
                    self._buffer_names.add(name)
                    self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=factory.get("device")))
        if bias:
            self.bias = nn.Parameter(torch.empty((len(keys), outputs), **factory))

    def _arrange(self, parts_C: Sequence[Mapping[str, int]]) -> None:
        """Where each expert lies in the stacked tensors, given the sizes of its parts."""
        self.parts_C = [dict(own) for own in parts_C]
        self._formats: list[MatrixFormat] = [
            form for form in all_formats(MatrixFormat) if any(form.name in own for own in parts_C)
        ]
        self._added_C: list[list[tuple[AddedFormat, int]]] = [
            [(form, own[form.name]) for form in self._formats if isinstance(form, AddedFormat) and form.name in own]
            for own in parts_C
        ]
        self._body_C: list[tuple[BodyFormat, int]] = [
            (get_format(name, BodyFormat), size) for name, size in self._bodies_C
        ]
        # By tensor the lengths of all pieces, and the number of each expert's own.
        self._lengths: dict[str, list[int]] = {"bias": [1] * len(parts_C)}
        self._places: dict[str, list[int]] = {"bias": list(range(len(parts_C)))}
        for form in self._formats:
            sizes = [own.get(form.name) for own in self.parts_C]
            for name in form.tensors(1, self.outputs, self.inputs):
                if form.is_shared:
                    self._places[name] = [size or 0 for size in sizes]
                    self._lengths[name] = [1] * (max(self._places[name]) + 1)
                else:
                    self._places[name] = self.place_C
                    self._lengths[name] = [self._length(form, name, sizes[expert]) for expert in self.order_C]
        cuts = {name: _slices(lengths) for name, lengths in self._lengths.items()}
        self._slices = {name: [cuts[name][place] for place in places] for name, places in self._places.items()}

    def _length(self, form: MatrixFormat, name: str, size: int | None) -> int:
        return 0 if size is None else form.tensors(size, self.outputs, self.inputs)[name].shape[0]

    def _stacked(self, form: MatrixFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype of the stacked tensors of a format; those without any number are left out."""
        specs = form.tensors(1, self.outputs, self.inputs)
        lengths = {name: sum(self._lengths[name]) for name in specs}
        return {name: ((lengths[name], *s.shape[1:]), s.dtype) for name, s in specs.items() if lengths[name]}

    def pieces(self, members: Sequence[int], path: str, projection: str) -> Iterator[Piece]:
        """The stacked tensors in pieces, each stack in the order in which its pieces lie; pieces without any number are
        left out.

        Args:
            members: Numbers of the experts in their block.
            path: Of this module.
            projection: Its name.
        """
        for form in self._formats:
            specs, others = (form.tensors(size, self.outputs, self.inputs) for size in (1, 2))
            for name in self._stacked(form):
                is_entry = specs[name].shape[0] == others[name].shape[0] == 1
                places = range(len(self._lengths[name])) if form.is_shared else self.order_C
                for owner, part in zip(places, _slices(self._lengths[name]), strict=True):
                    if part.start < part.stop:
                        own = specs[name].shape[1:]
                        # No other runtime may take for the whole matrix what others are added to.
                        is_part = form.name == DEFAULT and len(self.parts_C[owner]) > 1
                        yield Piece(
                            stack=f"{path}.{name}",
                            owner=owner if form.is_shared else members[owner],
                            is_shared=form.is_shared,
                            projection=projection,
                            tensor=DEFAULT if is_part else name,
                            part=part,
                            shape=own if is_entry else (part.stop - part.start, *own),
                            is_entry=is_entry,
                        )
        if self.has_bias:
            for slot, owner in enumerate(members):
                yield Piece(
                    stack=f"{path}.bias",
                    owner=owner,
                    is_shared=False,
                    projection=projection,
                    tensor="bias",
                    part=slice(slot, slot + 1),
                    shape=(self.outputs,),
                    is_entry=True,
                )

    @property
    def labels_C(self) -> list[int]:
        """Number of the group whose tensors each expert shares."""
        (shared,) = (form for form in self._formats if form.is_shared)
        return [own[shared.name] for own in self.parts_C]

    def forward(
        self,
        input_TX: torch.Tensor,
        expert: int | None = None,
        counts_C: Sequence[int] | None = None,
        group: int | None = None,
        with_shared: bool = True,
        opened: Opened | None = None,
    ) -> torch.Tensor:
        """(T, O) outputs of one expert, with or without what it shares; of that alone; or of tokens that lie by expert.

        Args:
            input_TX: (T, X).
            expert: Number in the width class.
            counts_C: Tokens of each expert.
            group: Number of a group, for the output of what its experts share alone.
            with_shared: Whether the output of what the expert shares is added.
            opened: What this forward pass of the experts has split already; it starts with an empty one.
        """
        if group is not None:
            expert = self.labels_C.index(group)
            return next(form for form in self._formats if form.is_shared).shared_product(self, expert, input_TX)
        if expert is not None:
            return self._one(expert, input_TX, with_shared, opened)
        assert counts_C is not None
        return self._grouped(input_TX, counts_C)

    def piece(self, name: str, expert: int, opened: Opened | None = None) -> torch.Tensor:
        """What an expert has in the stacked tensor `name`."""
        stacked = own_parameter(self, name)
        if stacked is not None and not (stacked.requires_grad and torch.is_grad_enabled()):
            return stacked[self._slices[name][expert]]
        if opened is None or name in self._buffer_names:
            return getattr(self, name)[self._slices[name][expert]]
        # The gradient of a split is one stack, that of selections a full-sized tensor for each. A parametrized tensor
        # (an adapter) is computed again at each access.
        key = (id(self), name)
        if key not in opened:
            opened[key] = getattr(self, name).split(self._lengths[name])
        return opened[key][self._places[name][expert]]

    def run_of(self, name: str, first: int, last: int) -> torch.Tensor:
        """What experts that lie beside each other have in the stacked tensor `name`."""
        slices = self._slices[name]
        return getattr(self, name)[slices[first].start : slices[last].stop]

    def _one(self, expert: int, input_PX: torch.Tensor, with_shared: bool, opened: Opened | None) -> torch.Tensor:
        bias_O = self.piece("bias", expert, opened)[0] if self.has_bias else None
        body, size = self._body_C[expert]
        output_PO = body.forward(self, expert, size, input_PX, bias_O, opened)
        for form, size in self._added_C[expert]:
            if with_shared or not form.is_shared:
                output_PO = form.add(self, expert, size, output_PO, input_PX, opened, True)
        return output_PO

    def _grouped(self, input_TX: torch.Tensor, counts_C: Sequence[int]) -> torch.Tensor:
        """Bodies of one size together; what is added to them, and biases, expert by expert."""
        parts = input_TX.split(list(counts_C))
        outputs: dict[int, torch.Tensor] = {}
        for _, run in groupby(self.order_C, key=lambda expert: self._bodies_C[expert]):
            members = list(run)
            counts = [counts_C[expert] for expert in members]
            rows_QX = torch.cat([parts[expert] for expert in members])
            body, size = self._body_C[members[0]]
            output_QO = body.grouped(self, members, size, rows_QX, counts)
            outputs |= zip(members, output_QO.split(counts), strict=True)
        for expert, output_PO in outputs.items():
            for form, size in self._added_C[expert] if len(output_PO) else ():
                output_PO = form.add(self, expert, size, output_PO, parts[expert], None, False)
            outputs[expert] = output_PO + self.bias[expert] if self.has_bias else output_PO
        return torch.cat([outputs[expert] for expert in range(len(outputs))])

    @torch.no_grad()
    def fill(self, expert: int, matrix: StoredMatrix, bias_O: torch.Tensor | None) -> None:
        """Take over one expert's matrix."""
        for name, tensor in matrix.tensors.items():
            if tensor.numel():
                self.piece(name, expert).copy_(tensor)
        if bias_O is not None:
            self.bias[expert] = bias_O

    def densified(self, expert: int) -> torch.Tensor:
        """(O, X) one expert's matrix, what it shares included."""
        matrix_OX: torch.Tensor | None = None
        for form, size in [self._body_C[expert], *self._added_C[expert]]:
            tensors = {
                name: self.piece(name, expert) if hasattr(self, name) else next(self.parameters()).new_zeros(spec.shape)
                for name, spec in form.tensors(size, self.outputs, self.inputs).items()
            }
            matrix_OX = form.densified(tensors, matrix_OX)
        assert matrix_OX is not None
        return matrix_OX

    def products(self, expert: int) -> list[Product] | None:
        """One expert's matrix as a sum of products; None where a format has none."""
        found: list[Product] = []
        for form, size in [self._body_C[expert], *self._added_C[expert]]:
            specs = form.tensors(size, self.outputs, self.inputs)
            if all(spec.numbers == 0 for spec in specs.values()):
                continue
            product = form.product({name: self.piece(name, expert) for name in specs})
            if product is None:
                return None
            found.append(product)
        return found

    def sparse_parts(self) -> dict[str, SparsePart]:
        """The sparse rows of all experts, as those of one tall matrix; see `HasSparseRows`."""
        counts = [own.get(_ROWS, 0) for own in self.parts_C]
        if not sum(counts):
            return {}
        offsets = [self.outputs * self.place_C[expert] for expert in self.order_C for _ in range(counts[expert])]
        tall = self.row_index.long() + torch.tensor(offsets, device=self.row_index.device)
        others = [name for name, _ in self._bodies_C if name != DEFAULT]
        return {"rows": SparsePart(self.rows, tall, self.outputs * len(others))}

    def keep_rows(self, mask: torch.Tensor, name: str = "rows") -> None:
        """Store fewer rows; experts may keep different numbers of them, or none."""
        part = self.sparse_parts()[name]
        row_index = keep_rows(part, mask)
        flat = mask.to(row_index.device, torch.bool)
        self.row_index = (row_index % self.outputs).to(torch.int32)
        counts = [int(flat[part].sum()) for part in self._slices["rows"]]
        without = [{n: size for n, size in own.items() if n != _ROWS} for own in self.parts_C]
        if not sum(counts):
            # What is built from the sizes has neither of the two.
            del self.rows, self.row_index
        self._arrange([own | ({_ROWS: m} if m else {}) for own, m in zip(without, counts, strict=True)])

    def extra_repr(self) -> str:
        """Sizes of the projection and of each expert's parts."""
        return f"{self.inputs} to {self.outputs}, parts={self.parts_C}"


def _slices(lengths: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *accumulate(lengths)])]
