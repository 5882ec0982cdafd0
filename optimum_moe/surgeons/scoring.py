"""How the routers of the architectures turn logits into scores; see `Architecture.scoring`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Scoring: TypeAlias = Callable[[Any, torch.Tensor], torch.Tensor]
"""From a router and its (S, N) logits, before any scoring, to (S, N) scores."""


def softmax(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Shares among all logits."""
    return logits_SN.softmax(-1)


def sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Each logit by itself."""
    return logits_SN.sigmoid()


def activation(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """The function that the config names."""
    return router.score_fn(logits_SN)


def softmax_or_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Cohere2: what `expert_selection_fn` says."""
    return logits_SN.softmax(-1) if router.expert_selection_fn == "softmax" else logits_SN.sigmoid()


def softcapped_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Laguna: logits are bounded smoothly where the config sets a cap."""
    cap = router.router_logit_softcapping
    return (cap * torch.tanh(logits_SN / cap) if cap > 0 else logits_SN).sigmoid()


def multiplied_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """MuseSpark: a constant factor on the logits."""
    return (logits_SN * router.output_multiplier).sigmoid()
