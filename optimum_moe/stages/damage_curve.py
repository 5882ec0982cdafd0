"""What a block loses by the number of experts that it keeps, and how blocks share one number of experts by it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from optimum_moe.algorithms.count_allocation import allocate_counts


@dataclass(frozen=True)
class DamageCurve:
    """The damage of one block by the number of experts that it keeps.

    Args:
        damages: By the numbers that it can keep.
        whole: Damage of keeping none.
        in_loss: Whether damages are rises of the loss; else only their shares of `whole` can be compared with those of
            other blocks.
    """

    damages: Mapping[int, float]
    whole: float
    in_loss: bool

    @classmethod
    def of_saliencies(
        cls,
        saliency_E: torch.Tensor,
        rank_E: torch.Tensor,
        fewest: int,
        router_groups: int,
        in_loss: bool,
    ) -> DamageCurve:
        """The sum of the saliencies of those that go, the lowest ranked of each router group first.

        Args:
            saliency_E: (E,) saliencies; where some are negative, the lowest counts as 0.
            rank_E: (E,) values by which they go.
            fewest: Least number that can stay, a multiple of the router groups.
            router_groups: Router groups, which keep equal numbers.
            in_loss: As above.
        """
        damage_GE = (saliency_E - saliency_E.min().clamp(max=0.0)).unflatten(0, (router_groups, -1))
        order_GE = rank_E.unflatten(0, (router_groups, -1)).sort(dim=-1, stable=True).indices
        removed_E = damage_GE.gather(1, order_GE).cumsum(-1).sum(0)
        size = len(removed_E)
        gone = {size - kept: kept * router_groups for kept in range(fewest // router_groups, size + 1)}
        damages = {kept: float(removed_E[number - 1]) if number else 0.0 for number, kept in gone.items()}
        return cls(damages, float(removed_E[-1]), in_loss)


def share_counts(curves: Mapping[str, DamageCurve], total: int) -> dict[str, int]:
    """How many experts each block keeps, so that together they lose the least.

    The unit is the loss where all blocks have it. The scale of any other criterion differs from block to block with the
    size of the activations, so there each curve is divided by the damage of keeping no expert: every block counts the
    same, and how unequal its experts are decides what it keeps.

    Args:
        curves: By block.
        total: Experts of all of them together.
    """
    in_loss = [name for name, curve in curves.items() if curve.in_loss]
    if 0 < len(in_loss) < len(curves):
        other = next(name for name in curves if name not in in_loss)
        warnings.warn(
            f"No gradient of the loss was observed at {len(curves) - len(in_loss)} of {len(curves)} blocks ({other}, "
            "...), so all blocks have the same weight.",
            stacklevel=2,
        )
    unit = {name: 1.0 if len(in_loss) == len(curves) else curve.whole or 1.0 for name, curve in curves.items()}
    scaled = [{kept: d / unit[name] for kept, d in curve.damages.items()} for name, curve in curves.items()]
    return dict(zip(curves, allocate_counts(scaled, total), strict=True))
