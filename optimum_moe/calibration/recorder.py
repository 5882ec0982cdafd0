"""`BlockRecorder`: turns the calls of one MoE block into `BlockStatistics`; memory does not grow with tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from optimum_moe.calibration.collectors import BlockSizes, Collector, ExpertCall, make_collectors
from optimum_moe.calibration.random_draws import generator_for
from optimum_moe.calibration.residual import ResidualOf
from optimum_moe.calibration.token_sample import TokenSample
from optimum_moe.statistics import STANDARD, BlockStatistics


class BlockRecorder:
    """Accumulates statistics of a block with E routed experts, I neurons each, on a residual stream of width H.

    Args:
        num_experts: Number of routed experts (E).
        intermediate_size: Number of neurons per expert (I).
        hidden_size: Width of the residual stream (H).
        needs: Names of the observations to collect, see `OBSERVATIONS`; default the standard ones.
        reservoir_tokens: Size of the sample in tokens.
        seed: Seed of the sample; equal seeds select the same tokens in every block.
        draws: Backward passes (J) after every forward pass, whose gradients are sampled too.
    """

    def __init__(
        self,
        num_experts: int,
        intermediate_size: int,
        hidden_size: int,
        needs: Collection[str] = STANDARD,
        reservoir_tokens: int = 4096,
        seed: int = 0,
        draws: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.num_tokens = 0
        self._collectors = make_collectors(BlockSizes(num_experts, intermediate_size, hidden_size), needs)
        self._mask_T: torch.Tensor | None = None
        self._modality_T: torch.Tensor | None = None
        self._rows_T: torch.Tensor | None = None
        self._valid_T = torch.empty(0, dtype=torch.bool)
        self._router_input_TH = torch.empty(0)
        self._seed, self._batch = seed, 0
        self._keys = self._layer_keys = torch.Generator()
        self._sample = TokenSample(reservoir_tokens)
        self._draws = draws
        self._waiting: tuple[int, torch.Tensor, tuple[torch.Tensor | None, ...]] | None = None
        self._gradients: list[torch.Tensor] = []
        self._reached = False
        self.residual_of: ResidualOf | None = None
        """Gives the (T, H) residual stream of the inputs of a call, where a stage asked for it."""
        self.needs = frozenset(needs)
        self.paused = False
        """Whether calls of the block are not part of the observed forward pass."""
        self._layer_sums = {name: torch.zeros((), dtype=torch.float64) for name in ("layer", "experts", "tokens")}
        self._residual = TokenSample(reservoir_tokens)

    def expect(
        self,
        batch: int,
        mask_T: torch.Tensor | None,
        modality_T: torch.Tensor | None = None,
        rows_T: torch.Tensor | None = None,
    ) -> None:
        """Say what the tokens of the next forward pass are.

        Args:
            batch: Number of the batch, which with the seed says what tokens are sampled.
            mask_T: (T,) bool, False for padding; None if no token is padding.
            modality_T: (T,) int64 positions in `MODALITIES`; None if they are unknown.
            rows_T: bool, which tokens of the layer are these T tokens; None if the block sees all.
        """
        self._batch, self._mask_T, self._modality_T, self._rows_T = batch, mask_T, modality_T, rows_T
        # Equal seeds select the same tokens in all layers, before and after the layer as in the block.
        self._keys, self._layer_keys = (generator_for("sample", self._seed, batch) for _ in range(2))

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        """Add the router's logits and inputs of one call."""
        if self.paused:
            return
        self._router_input_TH = input_TH.detach()
        collectors = self._that_take("router")
        if collectors:
            logits = logits_TE.detach()[self._valid(len(logits_TE), logits_TE.device)].double().cpu()
            for collector in collectors:
                collector.router(logits)

    def begin(self, input_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Count the selections of one call, and sample its tokens."""
        if self.paused:
            return
        self._valid_T = valid_T = self._valid(len(input_TH), input_TH.device)
        index, weights = index_TK[valid_T].cpu(), weights_TK.detach()[valid_T].cpu()
        self.num_tokens += len(index)
        counts = (index < self.num_experts) & (weights != 0)
        collectors = self._that_take("choices")
        if collectors:
            chosen_TE = torch.zeros(len(index), self.num_experts + 1, dtype=torch.float64)
            chosen_TE.scatter_(1, index.masked_fill(~counts, self.num_experts).long(), 1.0)
            for collector in collectors:
                collector.choices(chosen_TE[:, : self.num_experts])
        router_input_TH = self._router_input_TH
        same = router_input_TH.data_ptr() == input_TH.data_ptr() or torch.equal(router_input_TH, input_TH)
        index = index.masked_fill(~counts, self.num_experts)
        residual_TH = None if self.residual_of is None else self.residual_of(input_TH)
        columns = (
            router_input_TH.detach()[valid_T],
            None if same else input_TH.detach()[valid_T],
            index,
            weights,
            None if residual_TH is None else residual_TH[valid_T],
        )
        keys_T = _draw(len(index), self._keys)
        if self._draws:
            self._sample_waiting()
            self._waiting = self._batch, keys_T, columns
        else:
            self._sample.add(self._batch, keys_T, *columns, None)

    def gradient(self, gradient_TH: torch.Tensor) -> None:
        """Add the gradient of a backward pass with respect to the output of the last call."""
        if self.paused:
            return
        self._reached = True
        self._gradients.append(gradient_TH[self._valid_T.to(gradient_TH.device)])
        if len(self._gradients) == self._draws:
            self._sample_waiting()

    @torch.no_grad()
    def layer(self, before_TH: torch.Tensor, after_TH: torch.Tensor, without_TH: torch.Tensor | None = None) -> None:
        """Add one call of the layer around the block.

        Args:
            before_TH: Residual stream before the layer.
            after_TH: Residual stream after it.
            without_TH: Residual stream after it without the routed experts of the block; None if nothing reads it.
        """
        if self._rows_T is not None:
            rows_T = self._rows_T.to(before_TH.device)
            before_TH, after_TH = before_TH[rows_T], after_TH[rows_T]
            without_TH = None if without_TH is None else without_TH[rows_T]
        valid_T = self._valid(len(before_TH), before_TH.device)
        before_SH, after_SH = before_TH[valid_T], after_TH[valid_T]
        self._layer_sums["layer"] += _cosine_sum(before_SH, after_SH)
        self._layer_sums["tokens"] += len(before_SH)
        if without_TH is not None:
            self._layer_sums["experts"] += _cosine_sum(without_TH[valid_T], after_SH)
        if "residual_stream" in self.needs:
            self._residual.add(self._batch, _draw(len(before_SH), self._layer_keys), before_SH, after_SH)

    def _sample_waiting(self) -> None:
        """Sample the tokens of the last call with their gradients."""
        if self._waiting is not None:
            batch, keys_T, columns = self._waiting
            first_TH = columns[0]
            assert first_TH is not None
            # Autograd gives no gradient if the loss does not depend on the call.
            missing = [torch.zeros_like(first_TH)] * (self._draws - len(self._gradients))
            self._sample.add(batch, keys_T, *columns, torch.stack([*self._gradients, *missing], dim=1))
        self._waiting, self._gradients = None, []

    @torch.no_grad()
    def expert(
        self,
        expert: int,
        token_P: torch.Tensor,
        weight_P: torch.Tensor,
        input_PH: torch.Tensor,
        hidden_PI: torch.Tensor,
        output_PH: torch.Tensor,
    ) -> None:
        """Add one expert's routed tokens to its sums."""
        if self.paused:
            return
        keep_P = self._valid_T[token_P] & (weight_P != 0)
        call = ExpertCall(
            keep_P=keep_P,
            gate_P=weight_P[keep_P].double(),
            norm_P=output_PH[keep_P].float().norm(dim=-1).double(),
            all_input_PH=input_PH,
            all_hidden_PI=hidden_PI,
            modality_P=self._modalities(token_P[keep_P]),
        )
        for collector in self._collectors:
            collector.expert(expert, call)

    def _modalities(self, token_P: torch.Tensor) -> torch.Tensor | None:
        modality_T = self._modality_T
        if modality_T is None:
            return None
        if len(modality_T) != len(self._valid_T):
            raise ValueError(
                f"The block saw {len(self._valid_T)} tokens, but there are {len(modality_T)} token ids. Give inputs "
                "with one id for each token of the block: as many placeholders as an image or clip has tokens."
            )
        return modality_T.to(token_P.device)[token_P]

    def _that_take(self, what: str) -> list[Collector]:
        """The collectors that override a method of `Collector`."""
        return [found for found in self._collectors if getattr(type(found), what) is not getattr(Collector, what)]

    def part(self) -> RecordedPart:
        """What was accumulated so far."""
        self._sample_waiting()
        sums: dict[str, torch.Tensor] = {}
        for collector in self._collectors:
            sums |= collector.fields()
        if "layer_similarity" in self.needs:
            sums["layer_cosine_sum"] = self._layer_sums["layer"]
        if "experts_similarity" in self.needs:
            sums["experts_cosine_sum"] = self._layer_sums["experts"]
        if {"layer_similarity", "experts_similarity"} & set(self.needs):
            sums["layer_tokens"] = self._layer_sums["tokens"]
        residual = self._residual if "residual_stream" in self.needs else None
        return RecordedPart(self.num_tokens, sums, self._sample, residual, self._reached)

    def statistics(self) -> BlockStatistics:
        """The statistics accumulated so far."""
        return joined([self.part()])

    def _valid(self, tokens: int, device: torch.device) -> torch.Tensor:
        if self._mask_T is None:
            return torch.ones(tokens, dtype=torch.bool, device=device)
        if len(self._mask_T) != tokens:
            raise ValueError(
                f"The block saw {tokens} tokens, but the attention mask has {len(self._mask_T)}. Give inputs whose "
                "attention_mask covers exactly the tokens of the block, or pack the data so that no mask is needed."
            )
        return self._mask_T.to(device)


@dataclass(frozen=True)
class RecordedPart:
    """What one recorder found of a block, on all batches or on some of them.

    Args:
        num_tokens: Tokens that reached the block.
        sums: Fields of `BlockStatistics` by name.
        sample: Sampled tokens.
        residual: Sampled tokens before and after the layer around the block; None if no stage reads them.
        has_gradients: Whether a gradient arrived.
    """

    num_tokens: int
    sums: Mapping[str, torch.Tensor]
    sample: TokenSample
    residual: TokenSample | None
    has_gradients: bool


def joined(parts: Sequence[RecordedPart]) -> BlockStatistics:
    """The statistics of a block from parts that saw different batches, in the order of the parts.

    The sample is the one that a single recorder would have taken of all batches.
    """
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in parts[0].sums}
    residuals = [part.residual for part in parts if part.residual is not None]
    if residuals:
        before_SH, after_SH = TokenSample.joined(residuals).columns or (torch.empty(0, 0), torch.empty(0, 0))
        sums |= {"residual_before_SH": before_SH, "residual_after_SH": after_SH}
    # If no gradient ever arrived, store none: zeros would mean that the experts do not matter.
    has_gradients = any(part.has_gradients for part in parts)
    sample = TokenSample.joined([part.sample for part in parts])
    return BlockStatistics(sum(part.num_tokens for part in parts), sample.reservoir(has_gradients), **sums)


def _draw(tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(tokens, dtype=torch.float64, generator=generator)


def _cosine_sum(one_TH: torch.Tensor, other_TH: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cosine, float64 on the CPU."""
    return torch.nn.functional.cosine_similarity(one_TH.double(), other_TH.double(), dim=-1).sum().cpu()
