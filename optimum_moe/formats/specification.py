"""The specification of a block's experts: widths and sizes of all parts, from which their empty tensors are made.

It stands in config.json and in the plan. Formats are asked for what they store; a format's name is the key of its
sizes. Matrices of which nothing is said are dense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optimum_moe.formats.base import (
    DEFAULT,
    JOINT,
    PROJECTIONS,
    ExpertFormat,
    Layout,
    MatrixFormat,
    all_formats,
    get_format,
)

Sizes = tuple[int | None, ...]

_PROJECTIONS = (("up", "down"), PROJECTIONS, (JOINT, "down"))
_FIELDS = ("widths", "projections", "checksum")


def matrix_shape(projection: str, width: int, hidden_size: int) -> tuple[int, int]:
    """(O, X) of a projection of experts with that many neurons."""
    if projection == "down":
        return hidden_size, width
    return (2 * width if projection == JOINT else width), hidden_size


def layout_numbers(layout: Layout, width: int, hidden_size: int) -> int:
    """Numbers that an expert's matrices store, indices included, shared tensors and biases excluded."""
    return sum(spec.numbers for spec in _tensors(layout, width, hidden_size))


def layout_bytes(layout: Layout, width: int, hidden_size: int, itemsize: float) -> float:
    """Bytes that an expert's matrices store, shared tensors and biases excluded.

    Args:
        layout: By projection the sizes of its parts, by format.
        width: Its neurons.
        hidden_size: H.
        itemsize: Bytes of one weight.
    """
    return sum(spec.bytes(itemsize) for spec in _tensors(layout, width, hidden_size))


def _tensors(layout: Layout, width: int, hidden_size: int) -> Iterator[Any]:
    for projection, parts in layout.items():
        shape = matrix_shape(projection, width, hidden_size)
        for name, size in parts.items():
            form = get_format(name, MatrixFormat)
            if not form.is_shared:
                yield from form.tensors(size, *shape).values()


@dataclass(frozen=True)
class ExpertsSpec:
    """What is stored of each of a block's G experts.

    Args:
        widths: Neurons of each expert; 0 for one without any.
        projections: The matrices that experts have: gate, up and down, up and down, or gate_up and down.
        parts: By format and projection the size of each expert's part, None (or what the format's `absent` says) for
            none. Formats and projections without any part may be left out; matrices without another body are dense.
        instead: By format the size of what stands in the place of an expert without neurons, None for none.

    Raises:
        ValueError: If lengths disagree, a format is unknown, or a number is impossible.
    """

    widths: tuple[int, ...]
    projections: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Sizes]] = field(default_factory=dict)
    instead: Mapping[str, Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self._is_possible():
            raise ValueError(
                "Sizes of experts must give each expert a width, for gate, up and down, or gate_up and down, the sizes "
                "of their parts (null for none), one body at most, all whole numbers from 0, no more bases than "
                f"experts, and nothing in the place of an expert that has neurons; got {self._record()!r:.200}. "
                "Restore the saved config.json."
            )

    def _is_possible(self) -> bool:
        tables = [sizes for by_projection in self.parts.values() for sizes in by_projection.values()]
        tables += list(self.instead.values())
        numbers = [*self.widths, *(size for sizes in tables for size in sizes if size is not None)]
        if (
            tuple(self.projections) not in _PROJECTIONS
            or DEFAULT in self.parts
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers)
            or any(len(sizes) != len(self.widths) for sizes in tables)
        ):
            return False
        for name, by_projection in self.parts.items():
            form = get_format(name, MatrixFormat)
            if not set(by_projection) <= set(self.projections):
                return False
            if form.absent is not None and any(None in sizes for sizes in by_projection.values()):
                return False
            if not all(form.check(sizes) for sizes in by_projection.values()):
                return False
        bodies = [name for name in self.parts if get_format(name, MatrixFormat).order == 0]
        for projection in self.projections:
            found = [self.parts[name].get(projection, ()) for name in bodies]
            if any(sum(size is not None for size in sizes) > 1 for sizes in zip(*filter(None, found), strict=True)):
                return False
        for name in self.instead:
            get_format(name, ExpertFormat)
        for width, sizes in zip(self.widths, zip(*self.instead.values(), strict=True), strict=False):
            if sum(size is not None for size in sizes) > (width == 0):
                return False
        return True

    @classmethod
    def of_layouts(
        cls,
        widths: Sequence[int],
        layouts: Sequence[Layout],
        instead: Sequence[tuple[str, int] | None] | None = None,
    ) -> ExpertsSpec:
        """From the layout of each expert, and format and size of what stands in its place."""
        projections = tuple(layouts[0])
        parts: dict[str, dict[str, Sizes]] = {}
        for form in all_formats(MatrixFormat):
            if form.name == DEFAULT:
                continue
            found = {p: tuple(layout[p].get(form.name, form.absent) for layout in layouts) for p in projections}
            found = {p: sizes for p, sizes in found.items() if any(size != form.absent for size in sizes)}
            if found:
                parts[form.name] = found
        named = [None if each is None else each[0] for each in instead or ()]
        whole = {
            name: tuple(each[1] if each is not None and each[0] == name else None for each in instead or ())
            for name in sorted({name for name in named if name is not None})
        }
        return cls(tuple(widths), projections, parts, whole)

    @property
    def has_gate(self) -> bool:
        """Whether the experts are gated."""
        return self.projections != ("up", "down")

    @property
    def is_joint(self) -> bool:
        """Whether gate and up are one matrix."""
        return JOINT in self.projections

    @property
    def shares_tensors(self) -> bool:
        """Whether experts share tensors with each other."""
        return any(get_format(name).is_shared for name in self.parts)

    def table(self, format: str) -> dict[str, Sizes]:
        """By projection the size that every expert's part in a format has."""
        absent = (get_format(format, MatrixFormat).absent,) * len(self.widths)
        return {name: self.parts.get(format, {}).get(name, absent) for name in self.projections}

    def layout(self, expert: int) -> dict[str, dict[str, int]]:
        """By projection the sizes of an expert's parts, in the order in which they are added."""
        return {projection: self.sizes_of(projection, expert) for projection in self.projections}

    def sizes_of(self, projection: str, expert: int) -> dict[str, int]:
        """By format the sizes of the parts of an expert's gate, up or down."""
        projection = projection if projection in self.projections else JOINT
        found: dict[str, int] = {}
        for form in all_formats(MatrixFormat):
            sizes = self.parts.get(form.name, {}).get(projection)
            if sizes is not None and sizes[expert] != form.absent:
                size = sizes[expert]
                assert size is not None
                found[form.name] = size
        has_body = any(get_format(name).order == 0 for name in found)
        return found if has_body else {DEFAULT: 1, **found}

    def in_place_of(self, expert: int) -> tuple[str, int] | None:
        """Format and size of what stands in the place of an expert, None for nothing."""
        return next(((n, size) for n, sizes in self.instead.items() if (size := sizes[expert]) is not None), None)

    def numbers(self, expert: int, hidden_size: int) -> int:
        """Numbers that one expert stores, indices included, shared tensors and biases excluded."""
        return layout_numbers(self.layout(expert), self.widths[expert], hidden_size) + sum(
            spec.numbers for spec in self._instead_tensors(expert, hidden_size)
        )

    def bytes(self, expert: int, hidden_size: int, itemsize: float) -> float:
        """Bytes that one expert stores, shared tensors and biases excluded, where a weight has `itemsize` of them."""
        return layout_bytes(self.layout(expert), self.widths[expert], hidden_size, itemsize) + sum(
            spec.bytes(itemsize) for spec in self._instead_tensors(expert, hidden_size)
        )

    def _instead_tensors(self, expert: int, hidden_size: int) -> list[Any]:
        found = self.in_place_of(expert)
        if found is None:
            return []
        return list(get_format(found[0], ExpertFormat).tensors(found[1], hidden_size, False).values())

    def multiply_adds(self, expert: int, hidden_size: int) -> int:
        """Multiply-adds of one expert for a token, without those of what it shares."""
        found = self.in_place_of(expert)
        if found is not None:
            return int(get_format(found[0], ExpertFormat).multiply_adds(found[1], hidden_size))
        return sum(
            form.multiply_adds(size, *matrix_shape(projection, self.widths[expert], hidden_size))
            for projection, parts in self.layout(expert).items()
            for name, size in parts.items()
            if not (form := get_format(name, MatrixFormat)).is_shared
        )

    def shared_multiply_adds(self, hidden_size: int) -> dict[tuple[int, ...], list[float]]:
        """What runs once for several experts: by the labels of the experts, the multiply-adds of each label."""
        found: dict[tuple[int, ...], list[float]] = {}
        for name, by_projection in self.parts.items():
            form = get_format(name, MatrixFormat)
            for projection, sizes in by_projection.items() if form.is_shared else ():
                labels = tuple(-1 if size is None else size for size in sizes)
                each = form.multiply_adds(0, *matrix_shape(projection, max(self.widths), hidden_size))
                total = found.setdefault(labels, [0.0] * (max(labels) + 1))
                found[labels] = [before + each for before in total]
        return found

    def check(self, name: str, hidden_size: int, intermediate_size: int) -> None:
        """Refuse what no compression gives, before tensors of such sizes are made.

        Args:
            name: Of the block, for the message.
            hidden_size: H.
            intermediate_size: I.

        Raises:
            ValueError: If an expert has more neurons, or a part is larger, than the original allows.
        """
        if max(self.widths) > intermediate_size:
            raise ValueError(
                f"{name} has {intermediate_size} neurons by config.json, and an expert of {max(self.widths)} by its "
                "quantization_config. Restore the saved config.json."
            )
        for format_name, by_projection in self.parts.items():
            form = get_format(format_name, MatrixFormat)
            for projection, sizes in by_projection.items():
                outputs, inputs = matrix_shape(projection, intermediate_size, hidden_size)
                largest = max((size for size in sizes if size is not None), default=None)
                if largest is not None and not form.fits(largest, outputs, inputs):
                    raise ValueError(
                        f"{projection} matrices of {name} have {outputs} rows and {inputs} columns by config.json, and "
                        f"there is one {form.describe([largest])} by its quantization_config. Restore the saved "
                        "config.json."
                    )

    def describe(self) -> str:
        """What is stored in a few words, from the least to the most."""
        said = [f"{span(self.widths)} neurons"]
        for name, by_projection in self.parts.items():
            form = get_format(name, MatrixFormat)
            for projection, sizes in by_projection.items():
                found = [size for size in sizes if size is not None and size != form.absent]
                said.append(f"{projection} {form.describe(found)} in {len(found)}")
        for name, sizes in self.instead.items():
            said.append(get_format(name, ExpertFormat).describe([size for size in sizes if size is not None]))
        return ", ".join(said)

    def with_sizes(self, parts: Mapping[str, Mapping[str, Sizes]]) -> ExpertsSpec:
        """With other sizes of some formats' parts; those without any part are left out."""
        changed: dict[str, Mapping[str, Sizes]] = {}
        for name, by_projection in {**self.parts, **parts}.items():
            absent = get_format(name, MatrixFormat).absent
            left = {p: sizes for p, sizes in by_projection.items() if any(size != absent for size in sizes)}
            if left:
                changed[name] = left
        return replace(self, parts=changed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record, with a checksum: sizes of other experts may fit the same tensors.

        The numbers of all experts are one text ("64 48 - 0", with "-" for None): transformers writes a list in
        config.json with one line for each number.
        """
        record = self._record()
        return record | {"checksum": _checksum(record)}

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"widths": _text(self.widths), "projections": " ".join(self.projections)}
        for name, by_projection in self.parts.items():
            record[name] = {projection: _text(sizes) for projection, sizes in by_projection.items()}
        return record | {name: _text(sizes) for name, sizes in self.instead.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ExpertsSpec:
        """Read `to_dict` back.

        Raises:
            ValueError: If it is broken, or was changed since it was made.
        """
        try:
            record = dict(record)
            known = {form.name for form in (*all_formats(MatrixFormat), *all_formats(ExpertFormat))}
            unknown = sorted(set(record) - known - set(_FIELDS))
            if unknown:
                raise ValueError(
                    f"Sizes of experts have unknown fields {unknown}. Restore the saved config.json; a format of your "
                    "own has to be registered before its checkpoints are loaded."
                )
            parts: dict[str, dict[str, Sizes]] = {}
            instead: dict[str, Sizes] = {}
            for name in (name for name in record if name not in _FIELDS):
                if isinstance(record[name], str):
                    get_format(name, ExpertFormat)
                    instead[name] = _numbers(record[name])
                else:
                    get_format(name, MatrixFormat)
                    parts[name] = {key: _numbers(sizes) for key, sizes in record[name].items()}
            found = cls(_numbers(record["widths"]), tuple(record["projections"].split(" ")), parts, instead)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Sizes of experts cannot be read ({error!r}). Restore the saved config.json.") from error
        if record.get("checksum") != _checksum(found._record()):
            raise ValueError(
                "Sizes of experts are not those that their checksum was made of: tensors would go to other experts. "
                "Restore the saved config.json."
            )
        return found


def span(numbers: Sequence[int]) -> str:
    """The least and the most of some numbers, such as "8 to 16"."""
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _text(numbers: Sequence[int | None]) -> str:
    return " ".join("-" if number is None else str(number) for number in numbers)


def _numbers(table: str) -> tuple[Any, ...]:
    """What `_text` was made of.

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
