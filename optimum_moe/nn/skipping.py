"""A router of which tokens skip the selected experts with small routing weights."""

from __future__ import annotations

from typing import Any

from optimum_moe.algorithms.expert_skipping import Skipping, skip
from optimum_moe.nn.class_swap import SwappedModule


class SkippingRouter(SwappedModule):
    """Mixin put in front of a router class: same parameters, logits and ids, weight 0 for skipped experts.

    `skipping` is a plain attribute that is rebuilt from the config.
    """

    skipping: Skipping

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's outputs `(logits, weights, index, ...)` with the weights of skipped experts set to 0."""
        logits, weights_TK, *rest = super().forward(*args, **kwargs)
        return (logits, skip(weights_TK, self.skipping), *rest)
