"""`TokenSample`: the sample of tokens of one block; memory does not grow with the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimum_moe.statistics import Reservoir, no_sample


class TokenSample:
    """Reservoir sampling: every token has a random key, and the tokens with the smallest keys are kept.

    Args:
        capacity: Number of tokens that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys_S = torch.empty(0, dtype=torch.float64)
        self.batch_S = torch.empty(0, dtype=torch.int64)
        self._columns: list[torch.Tensor | None] = []

    def add(self, batch: int, keys_T: torch.Tensor, *columns: torch.Tensor | None) -> None:
        """Add tokens of a batch of this number, with their keys and what is kept of them."""
        old = self._columns or [None if c is None else c[:0].cpu() for c in columns]
        keys = torch.cat([self.keys_S, keys_T])
        kept = torch.arange(len(keys))
        if len(keys) > self.capacity:
            kept = keys.topk(self.capacity, largest=False).indices.sort().values
        before = len(self.keys_S)
        keep_old, keep_new = kept[kept < before], kept[kept >= before] - before
        self.keys_S = keys[kept]
        self.batch_S = torch.cat([self.batch_S, torch.full((len(keys_T),), batch)])[kept]
        self._columns = [
            None
            if new is None or was is None
            else torch.cat([was[keep_old], new.detach()[keep_new.to(new.device)].cpu()])
            for was, new in zip(old, columns, strict=True)
        ]

    @property
    def columns(self) -> list[torch.Tensor]:
        """The kept rows of each column; empty if there was no call."""
        return [column for column in self._columns if column is not None]

    def reservoir(self, with_gradients: bool) -> Reservoir:
        """The kept tokens as statistics have them."""
        if not self._columns:
            return no_sample()
        router_input_SH, experts_input_SH, index_SK, weights_SK, residual_SH, gradient_SJH = self._columns
        assert router_input_SH is not None
        assert index_SK is not None
        assert weights_SK is not None
        shared = router_input_SH if experts_input_SH is None else experts_input_SH
        gradient_SJH = gradient_SJH if with_gradients else None
        return Reservoir(router_input_SH, shared, index_SK, weights_SK, gradient_SJH, residual_SH)

    @classmethod
    def joined(cls, samples: Sequence[TokenSample]) -> TokenSample:
        """The sample of all batches from samples that saw different ones, as if one had seen all of them in order."""
        filled = [sample for sample in samples if sample._columns]
        if len(filled) < 2:
            return (filled or samples)[0]
        whole = cls(samples[0].capacity)
        keys, batch = (torch.cat([getattr(s, name) for s in filled]) for name in ("keys_S", "batch_S"))
        kept = keys.topk(min(whole.capacity, len(keys)), largest=False).indices.sort().values
        kept = kept[batch[kept].argsort(stable=True)]
        whole.keys_S, whole.batch_S = keys[kept], batch[kept]
        columns = [
            [column for column in each if column is not None]
            for each in zip(*(s._columns for s in filled), strict=True)
        ]
        whole._columns = [torch.cat(each)[kept] if len(each) == len(filled) else None for each in columns]
        return whole
