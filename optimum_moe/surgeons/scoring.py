"""Scoring functions of routers, which turn logits into scores; see `Architecture.scoring`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Scoring: TypeAlias = Callable[[Any, torch.Tensor], torch.Tensor]
"""Function of a router and its (S, N) logits before scoring; returns (S, N) scores."""


def softmax(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Softmax over all (S, N) logits of a token."""
    return logits_SN.softmax(-1)


def sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Sigmoid of each of the (S, N) logits."""
    return logits_SN.sigmoid()


def activation(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """The activation function that the config names."""
    return router.score_fn(logits_SN)


def softmax_or_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Cohere2: softmax or sigmoid, by the config's `expert_selection_fn`."""
    return logits_SN.softmax(-1) if router.expert_selection_fn == "softmax" else logits_SN.sigmoid()


def softcapped_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """Laguna: sigmoid of logits, with tanh soft-capping if the config sets a cap."""
    cap = router.router_logit_softcapping
    return (cap * torch.tanh(logits_SN / cap) if cap > 0 else logits_SN).sigmoid()


def multiplied_sigmoid(router: Any, logits_SN: torch.Tensor) -> torch.Tensor:
    """MuseSpark: sigmoid of logits times a constant."""
    return (logits_SN * router.output_multiplier).sigmoid()
