"""Experts in the formats that a plan gives them: fewer neurons, and matrices that are dense, U V + S and so on.

Experts of one width lie in one `WidthClass`; in it what a format stores of a projection lies stacked in one tensor, so
that a few grouped matmuls serve any mixture, and every size is known before a weight is read.

Shape letters: C experts of a class, O outputs and X inputs of a projection, n neurons kept, P tokens of one expert, T
all of them by expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import nn

from optimum_moe.algorithms.experts import PerExpert
from optimum_moe.formats.base import JOINT, ExpertFormat, MatrixFormat, Opened, get_format
from optimum_moe.formats.specification import ExpertsSpec, matrix_shape
from optimum_moe.formats.stored import StoredExperts
from optimum_moe.nn.expert_projection import ExpertProjection, Piece

_EMPTY = "empty"


class WidthClass(nn.Module):
    """Experts with equally many neurons.

    Args:
        members: Their numbers in the block.
        width: n.
        hidden_size: H.
        spec: Of all experts of the block.
        biases: Projections that have biases.
        factory: Device and dtype.
    """

    def __init__(
        self,
        members: Sequence[int],
        width: int,
        hidden_size: int,
        spec: ExpertsSpec,
        biases: Sequence[str],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.members, self.width = tuple(members), width
        for name in spec.projections:
            outputs, inputs = matrix_shape(name, width, hidden_size)
            parts_C, bias = [spec.sizes_of(name, e) for e in members], (name if name != JOINT else "up") in biases
            # Short names such as `gate` are patterns that some architectures rename on loading.
            self.add_module(f"{name}_stacks", ExpertProjection(outputs, inputs, parts_C, bias, **factory))

    def projection(self, name: str) -> ExpertProjection:
        """Gate, up or down to be called, which may be an adapter (PEFT) around it."""
        return cast(ExpertProjection, getattr(self, f"{name}_stacks"))

    def stored(self, name: str) -> ExpertProjection:
        """Gate, up or down inside of all adapters."""
        found: Any = getattr(self, f"{name}_stacks")
        while not isinstance(found, ExpertProjection):
            found = found.base_layer
        return found


class ExpertsWithoutNeurons(nn.Module):
    """Experts in the place of which something else stands, such as their down bias.

    Args:
        format: Name of the format.
        members: Their numbers in the block.
        sizes: Of what stands in their place.
        hidden_size: H.
        has_bias: Whether experts have a down bias.
        factory: Device and dtype.
    """

    def __init__(
        self,
        format: str,
        members: Sequence[int],
        sizes: Sequence[int],
        hidden_size: int,
        has_bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.members, self.hidden_size = tuple(members), hidden_size
        self.format: ExpertFormat = get_format(format, ExpertFormat)
        specs = [self.format.tensors(size, hidden_size, has_bias) for size in sizes]
        self._pieces: dict[str, list[slice]] = {}
        for name, spec in specs[0].items():
            ends = [0, *accumulate(own[name].shape[0] for own in specs)]
            self._pieces[name] = [slice(start, end) for start, end in pairwise(ends)]
            shape = (ends[-1], *spec.shape[1:])
            if spec.dtype is None:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            else:
                self.register_buffer(name, torch.zeros(shape, dtype=spec.dtype, device=factory.get("device")))

    def forward(self, expert: int, input_PH: torch.Tensor) -> torch.Tensor:
        """(P, H) or (1, H) output of one of them, by its number in the block."""
        return self.format.forward(self._tensors_of(expert), input_PH)

    def constant(self, expert: int) -> torch.Tensor | None:
        """(H,) output of one of them whatever the input; None where it depends on the input."""
        return self.format.constant(self._tensors_of(expert))

    def _tensors_of(self, expert: int) -> dict[str, torch.Tensor]:
        slot = self.members.index(expert)
        return {name: getattr(self, name)[parts[slot]] for name, parts in self._pieces.items()}

    @torch.no_grad()
    def fill(self, expert: int, values: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors of one of them, as `ExpertFormat.values` gives them."""
        for name, value in values.items():
            getattr(self, name)[self._pieces[name][self.members.index(expert)]] = value

    def pieces(self) -> Iterator[Piece]:
        """Its tensors in pieces, as `ExpertProjection.pieces`."""
        specs, others = (self.format.tensors(size, self.hidden_size, True) for size in (1, 2))
        for name, parts in self._pieces.items():
            is_entry = specs[name].shape[0] == others[name].shape[0] == 1
            for owner, part in zip(self.members, parts, strict=True):
                if part.start < part.stop:
                    own = specs[name].shape[1:]
                    yield Piece(
                        stack=f"{self.format.name}.{name}",
                        owner=owner,
                        is_shared=False,
                        projection=None,
                        tensor=name,
                        part=part,
                        shape=own if is_entry else (part.stop - part.start, *own),
                        is_entry=is_entry,
                    )


class FactorizedExperts(nn.Module):
    """All routed experts of one block in the formats that they are stored in.

    Args:
        sizes: Of the experts.
        hidden_size: H.
        biases: Projections that have biases; an empty expert keeps its down bias.
        factory: Device and dtype.
    """

    def __init__(self, sizes: ExpertsSpec, hidden_size: int, biases: Sequence[str] = (), **factory: Any) -> None:
        super().__init__()
        # What runs it on a GPU, and the parts that it was made for (`ragged_launches`).
        self.launches: tuple[Any, Any] | None = None
        self._sizes, self.hidden_size = sizes, hidden_size
        by_width: dict[int, list[int]] = {}
        for expert, width in enumerate(sizes.widths):
            by_width.setdefault(width, []).append(expert)
        by_format: dict[str, list[tuple[int, int]]] = {}
        for expert in by_width.pop(0, []):
            name, size = sizes.in_place_of(expert) or (_EMPTY, 1)
            by_format.setdefault(name, []).append((expert, size))
        self.classes = nn.ModuleList(
            WidthClass(members, width, hidden_size, sizes, biases, **factory)
            for width, members in sorted(by_width.items())
        )
        self._instead_E: dict[int, str] = {}
        for name, found in sorted(by_format.items()):
            form, has_bias = get_format(name, ExpertFormat), "down" in biases
            if form.tensors(found[0][1], hidden_size, has_bias):
                experts, own = zip(*found, strict=True)
                self.add_module(name, ExpertsWithoutNeurons(name, experts, own, hidden_size, has_bias, **factory))
                self._instead_E |= dict.fromkeys(experts, name)
        ordered = [members for _, members in sorted(by_width.items())]
        self._home_E = {e: (str(n), slot) for n, members in enumerate(ordered) for slot, e in enumerate(members)}

    def __getstate__(self) -> dict[str, Any]:
        """Without the launches, which hold addresses of this copy."""
        return self.__dict__ | {"launches": None}

    @property
    def sizes(self) -> ExpertsSpec:
        """The sizes of the experts, as many sparse rows as there are now."""
        parts: dict[str, dict[str, tuple[int | None, ...]]] = {}
        for format, by_projection in self._sizes.parts.items():
            absent = get_format(format, MatrixFormat).absent
            for name in by_projection:
                sizes = [absent] * self.num_experts
                for expert in self._home_E:
                    home = self.home(expert)
                    assert home is not None
                    sizes[expert] = home[0].stored(name).parts_C[home[1]].get(format, absent)
                parts.setdefault(format, {})[name] = tuple(sizes)
        return self._sizes.with_sizes(parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return self._sizes.widths

    @property
    def has_gate(self) -> bool:
        """Whether the experts are gated."""
        return self._sizes.has_gate

    @property
    def is_joint(self) -> bool:
        """Whether gate and up are one matrix."""
        return self._sizes.is_joint

    @property
    def shares_tensors(self) -> bool:
        """Whether experts are differences to what they share with their group."""
        return self._sizes.shares_tensors

    @property
    def without_neurons(self) -> list[ExpertsWithoutNeurons]:
        """What stands in the place of experts without neurons, where it is not nothing."""
        return [cast(ExpertsWithoutNeurons, getattr(self, name)) for name in sorted(set(self._instead_E.values()))]

    def pieces(self) -> Iterator[Piece]:
        """All tensors in the pieces that a checkpoint stores; paths are those within this module."""
        for number, found in enumerate(self.classes):
            assert isinstance(found, WidthClass)
            for name in self._sizes.projections:
                yield from found.stored(name).pieces(found.members, f"classes.{number}.{name}_stacks", name)
        for module in self.without_neurons:
            yield from module.pieces()

    @property
    def num_experts(self) -> int:
        """Experts of the block (G)."""
        return len(self.widths)

    def home(self, expert: int) -> tuple[WidthClass, int] | None:
        """The width class of an expert and its slot there; None for an empty expert."""
        if expert not in self._home_E:
            return None
        name, slot = self._home_E[expert]
        # Much faster than asking the list of modules for an entry.
        found = getattr(self.classes, name)
        assert isinstance(found, WidthClass)
        return found, slot

    def project_in(
        self, expert: int, input_PH: torch.Tensor, opened: Opened | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate (P, n), None for experts without one, and up (P, n) of an expert's tokens.

        Args:
            expert: Its number.
            input_PH: (P, H).
            opened: As in `ExpertProjection.forward`.
        """
        home = self.home(expert)
        if home is None:
            nothing = input_PH.new_zeros(input_PH.shape[0], 0)
            return (nothing if self.has_gate else None), nothing
        found, slot = home
        if self.is_joint:
            gate_Pn, up_Pn = found.projection(JOINT)(input_PH, expert=slot, opened=opened).chunk(2, dim=-1)
            return gate_Pn, up_Pn
        gate_Pn = found.projection("gate")(input_PH, expert=slot, opened=opened) if self.has_gate else None
        return gate_Pn, found.projection("up")(input_PH, expert=slot, opened=opened)

    def project_out(
        self,
        expert: int,
        hidden_Pn: torch.Tensor,
        input_PH: torch.Tensor,
        opened: Opened | None = None,
    ) -> torch.Tensor:
        """(P, H) output of an expert.

        Args:
            expert: Its number.
            hidden_Pn: (P, n) its hidden neurons.
            input_PH: (P, H) its tokens, which only what stands in the place of an expert looks at.
            opened: As in `ExpertProjection.forward`.
        """
        home = self.home(expert)
        if home is not None:
            return home[0].projection("down")(hidden_Pn, expert=home[1], opened=opened)
        output_PH = hidden_Pn.new_zeros(hidden_Pn.shape[0], self.hidden_size)
        if expert not in self._instead_E:
            return output_PH
        instead = cast(ExpertsWithoutNeurons, getattr(self, self._instead_E[expert]))
        return output_PH + instead(expert, input_PH)

    def in_step(self, output: torch.Tensor) -> torch.Tensor:
        """The same output, which where processes train together has a gradient (zeros) for every parameter.

        They add up the gradients of all their parameters, and in one of them a stack of experts may get no token.
        """
        if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return output
        for parameter in self.parameters():
            if parameter.requires_grad:
                output = output + parameter.flatten()[:0].sum().to(output.dtype)
        return output

    def fill(self, stored: StoredExperts, biases: Mapping[str, PerExpert]) -> None:
        """Take over the values of all experts.

        Args:
            stored: The experts.
            biases: By projection the bias of each expert, before neurons were dropped.
        """
        for expert, own in enumerate(stored.experts):
            kept = {name: values[expert] for name, values in biases.items()}
            home = self.home(expert)
            if home is None:
                if expert in self._instead_E:
                    module = cast(ExpertsWithoutNeurons, getattr(self, self._instead_E[expert]))
                    module.fill(expert, module.format.values(own.instead, kept.get("down")))
                continue
            if own.neurons is not None:
                kept = {n: b if n == "down" else b[own.neurons.to(b.device)] for n, b in kept.items()}
            if stored.joint and "up" in kept:
                kept[JOINT] = torch.cat([kept["gate"], kept["up"]])
            for name, matrix in stored.matrices(expert).items():
                home[0].stored(name).fill(home[1], matrix, kept.get(name))

    def densified(self, expert: int) -> dict[str, torch.Tensor]:
        """The matrices of one expert by projection, of the neurons that are kept; `{}` for an empty one."""
        home = self.home(expert)
        if home is None:
            return {}
        dense = {name: home[0].stored(name).densified(home[1]) for name in self._sizes.projections}
        if JOINT in dense:
            dense["gate"], dense["up"] = dense.pop(JOINT).chunk(2)
        return dense
