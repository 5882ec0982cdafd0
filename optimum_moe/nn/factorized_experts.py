"""Experts in compressed forms: fewer neurons, and matrices that are dense or U V + S, each with sizes of its own.

Experts of one width lie in one `WidthClass`; in it the factors of a projection lie below each other in one tensor,
those of one rank as a regular stack, so that a few grouped matmuls serve any mixture, and every size is known before a
weight is read.

Shape letters: C experts of a class, O outputs and X inputs of a projection, R rank, M sparse rows, n neurons kept,
P tokens of one expert, T all of them by expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from optimum_moe.algorithms.experts import PerExpert
from optimum_moe.algorithms.factors import JOINT, BlockFactors, FactorSizes
from optimum_moe.nn.expert_projection import ExpertProjection, Opened


class WidthClass(nn.Module):
    """Experts with equally many neurons.

    Args:
        members: Their numbers in the block.
        width: n.
        hidden_size: H.
        sizes: Of all experts of the block.
        biases: Projections that have biases.
        factory: Device and dtype.
    """

    def __init__(
        self,
        members: Sequence[int],
        width: int,
        hidden_size: int,
        sizes: FactorSizes,
        biases: Sequence[str],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.members, self.width = tuple(members), width
        base_C = None if sizes.base is None else [sizes.base[e] for e in members]
        num_bases = 0 if sizes.base is None else max(sizes.base) + 1
        for name, ranks in sizes.ranks.items():
            outputs, inputs = sizes.shape(name, width, hidden_size)
            rows_C = [sizes.rows[name][e] if name in sizes.rows else 0 for e in members]
            ranks_C, bias = [ranks[e] for e in members], (name if name != JOINT else "up") in biases
            projection = ExpertProjection(outputs, inputs, ranks_C, rows_C, bias, base_C, num_bases, **factory)
            # Short names such as `gate` are patterns that some architectures rename on loading.
            self.add_module(f"{name}_stacks", projection)

    def projection(self, name: str) -> ExpertProjection:
        """Gate, up or down to be called, which may be an adapter (PEFT) around it."""
        return cast(ExpertProjection, getattr(self, f"{name}_stacks"))

    def stored(self, name: str) -> ExpertProjection:
        """Gate, up or down inside of all adapters."""
        found: Any = getattr(self, f"{name}_stacks")
        while not isinstance(found, ExpertProjection):
            found = found.base_layer
        return found


class EmptyExperts(nn.Module):
    """What experts without neurons give: their down bias.

    Args:
        members: Their numbers in the block.
        hidden_size: H.
        factory: Device and dtype.
    """

    def __init__(self, members: Sequence[int], hidden_size: int, **factory: Any) -> None:
        super().__init__()
        self.members = tuple(members)
        self.bias = nn.Parameter(torch.empty(len(members), hidden_size, **factory))

    def forward(self, expert: int) -> torch.Tensor:
        """(H,) output of one of them."""
        return self.bias[self.members.index(expert)]


class FactorizedExperts(nn.Module):
    """All routed experts of one block in compressed forms.

    Args:
        sizes: Of the experts.
        hidden_size: H.
        biases: Projections that have biases; an empty expert keeps its down bias.
        factory: Device and dtype.
    """

    def __init__(self, sizes: FactorSizes, hidden_size: int, biases: Sequence[str] = (), **factory: Any) -> None:
        super().__init__()
        self._sizes, self.hidden_size = sizes, hidden_size
        by_width: dict[int, list[int]] = {}
        for expert, width in enumerate(sizes.widths):
            by_width.setdefault(width, []).append(expert)
        empty = by_width.pop(0, [])
        self.classes = nn.ModuleList(
            WidthClass(members, width, hidden_size, sizes, biases, **factory)
            for width, members in sorted(by_width.items())
        )
        self.empty = EmptyExperts(empty, hidden_size, **factory) if empty and "down" in biases else None
        ordered = [members for _, members in sorted(by_width.items())]
        self._home_E = {e: (str(n), slot) for n, members in enumerate(ordered) for slot, e in enumerate(members)}

    @property
    def sizes(self) -> FactorSizes:
        """The sizes of the experts, as many sparse rows as there are now."""
        rows = {name: [0] * len(counts) for name, counts in self._sizes.rows.items()}
        for expert in self._home_E:
            home = self.home(expert)
            assert home is not None
            found, slot = home
            for name in rows:
                rows[name][expert] = found.stored(name).rows_C[slot]
        return replace(self._sizes, rows={name: tuple(counts) for name, counts in rows.items() if any(counts)})

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
        return JOINT in self._sizes.ranks

    @property
    def shares_bases(self) -> bool:
        """Whether experts are differences to bases that they share."""
        return self._sizes.base is not None

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

    def project_out(self, expert: int, hidden_Pn: torch.Tensor, opened: Opened | None = None) -> torch.Tensor:
        """(P, H) output of an expert from its hidden neurons; `opened` as in `ExpertProjection.forward`."""
        home = self.home(expert)
        if home is not None:
            return home[0].projection("down")(hidden_Pn, expert=home[1], opened=opened)
        output_PH = hidden_Pn.new_zeros(hidden_Pn.shape[0], self.hidden_size)
        return output_PH if self.empty is None else output_PH + self.empty(expert)

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

    def fill(self, factors: BlockFactors, biases: Mapping[str, PerExpert]) -> None:
        """Take over the forms of all experts.

        Args:
            factors: The forms.
            biases: By projection the bias of each expert, before neurons were dropped.
        """
        for expert, form in enumerate(factors.experts):
            home = self.home(expert)
            if home is None:
                if self.empty is not None:
                    with torch.no_grad():
                        self.empty.bias[self.empty.members.index(expert)] = biases["down"][expert]
                continue
            own = {name: values[expert] for name, values in biases.items()}
            if form.neurons is not None:
                own = {n: b if n == "down" else b[form.neurons.to(b.device)] for n, b in own.items()}
            if factors.joint and "up" in own:
                own[JOINT] = torch.cat([own["gate"], own["up"]])
            for name, matrix in factors.matrices(expert).items():
                home[0].stored(name).fill(home[1], matrix, own.get(name))
        with torch.no_grad():
            for name, base in factors.bases.items():
                for module in self.classes:
                    assert isinstance(module, WidthClass)
                    module.stored(name).base.copy_(base)

    def densified(self, expert: int) -> dict[str, torch.Tensor]:
        """The matrices of one expert by projection, of the neurons that are kept; `{}` for an empty one."""
        home = self.home(expert)
        if home is None:
            return {}
        dense = {name: home[0].stored(name).densified(home[1]) for name in self._sizes.ranks}
        if JOINT in dense:
            dense["gate"], dense["up"] = dense.pop(JOINT).chunk(2)
        return dense
