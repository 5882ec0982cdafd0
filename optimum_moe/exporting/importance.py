"""The importance matrix of llama.cpp, from one pass of a checkpoint over calibration text.

llama.cpp weights the rounding error of a matrix's column by the mean square of the input that meets it. Its file holds,
for each matrix W, `W.in_sum2`, the sums of squared inputs, and `W.counts`, the number of inputs: one row for a matrix,
one for each expert of stacked experts (with the tokens that were routed to it), one for each head of the matrices of
multi-head latent attention that llama.cpp splits by head.

Shape letters: B rows of text, S tokens of a row, T tokens, P tokens of an expert, E experts, N heads, I inputs, L width
of the latent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_moe.calibration.config import CalibrationConfig
from optimum_moe.calibration.data import CalibrationBatches, build_batches
from optimum_moe.exporting.gguf_file import write_gguf
from optimum_moe.surgeons import find_blocks
from optimum_moe.surgeons.base import hooked

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_MATRICES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "shared_expert_gate": "ffn_gate_inp_shexp",
}
"""llama.cpp's names of matrices, by the names of their modules."""
_SHARED = ("gate_proj", "up_proj", "down_proj")
_SEQUENCE = 512
_TOKENS = 131072


@dataclass
class ImportanceMatrix:
    """Sums of squared inputs by llama.cpp's name of the matrix.

    Args:
        sums: (1, I), (E, I) or (N, I) sums of squares, float64.
        counts: (1,) or (E,) numbers of inputs.
        num_tokens: Tokens of the text.
        sequence_length: Tokens of its rows.
        source: Name of the text.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    sequence_length: int = _SEQUENCE
    source: str = ""

    def add_expert(self, name: str, num_experts: int, expert: int, sums_1I: torch.Tensor, count: torch.Tensor) -> None:
        """Add sums and a count to those of one expert's matrix."""
        if name not in self.sums:
            self.sums[name] = sums_1I.new_zeros(num_experts, sums_1I.shape[1])
            self.counts[name] = count.new_zeros(num_experts)
        self.sums[name][expert] += sums_1I[0]
        self.counts[name][expert] += count[0]

    def add(self, name: str, sums_NI: torch.Tensor, counts: torch.Tensor) -> None:
        """Add sums and counts to those of a matrix."""
        if name in self.sums:
            self.sums[name] += sums_NI
            self.counts[name] += counts
        else:
            self.sums[name], self.counts[name] = sums_NI.clone(), counts.clone()

    def means(self) -> dict[str, np.ndarray[Any, Any]]:
        """Mean squares by matrix, flat as llama.cpp reads them; 1 for an expert that no token reached."""
        flat = {}
        for name, sums_NI in self.sums.items():
            counts = self.counts[name].double().expand(len(sums_NI))[:, None]
            flat[name] = torch.where(counts > 0, sums_NI / counts.clamp(min=1), 1.0).float().flatten().numpy()
        return flat

    def save(self, file: Path) -> None:
        """Write it in llama.cpp's GGUF format of importance matrices."""
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        for name in sorted(self.sums):
            tensors[f"{name}.in_sum2"] = self.sums[name].float().numpy()
            tensors[f"{name}.counts"] = self.counts[name].float()[:, None].numpy()
        metadata: dict[str, int | str | Sequence[str]] = {
            "general.type": "imatrix",
            "imatrix.datasets": [self.source],
            "imatrix.chunk_count": -(-self.num_tokens // self.sequence_length),
            "imatrix.chunk_size": self.sequence_length,
        }
        write_gguf(file, metadata, tensors)


def collect_importance(checkpoint: str | Path, calibration: Any) -> ImportanceMatrix:
    """Run a checkpoint over calibration text and sum the squared inputs of its matrices.

    Args:
        checkpoint: Its folder.
        calibration: A `CalibrationConfig`, or its source.
    """
    config = calibration
    if not isinstance(calibration, CalibrationConfig):
        config = CalibrationConfig(calibration, sequence_length=_SEQUENCE, max_tokens=_TOKENS)
    batches = build_batches(config, AutoTokenizer.from_pretrained(checkpoint))
    # Only eager attention returns its weights, from which the inputs of split matrices are computed.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", attn_implementation="eager").eval()
    return importance_of(model, batches, config.sequence_length)


@torch.no_grad()
def importance_of(model: PreTrainedModel, batches: CalibrationBatches, sequence_length: int) -> ImportanceMatrix:
    """The importance matrix of a model in memory, from batches without padding.

    Raises:
        ValueError: If a row has padding, which would count as text.
    """
    matrix = ImportanceMatrix(sequence_length=sequence_length)
    with ExitStack() as stack:
        for found in find_blocks(model):
            layer = _LAYER.search(f"{found.info.name}.")
            if layer is not None:
                block = found.module(model)
                watcher = _BlockImportance(matrix, f"blk.{layer[1]}", found.info.num_experts)
                stack.enter_context(found.surgeon.watch(block, watcher))
        stack.enter_context(_watched_matrices(model, matrix))
        for batch in tqdm(batches, desc="importance"):
            if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
                raise ValueError("A row of the calibration text has padding. Set packing=True.")
            model(**{name: values.to(model.device) for name, values in batch.items()}, use_cache=False)
    matrix.num_tokens = batches.num_tokens
    matrix.source = ", ".join(str(source.get("name")) for source in batches.description.get("sources", ())) or "text"
    return matrix


class _BlockImportance:
    """Sums the inputs of the routed experts and the router of one block."""

    def __init__(self, matrix: ImportanceMatrix, prefix: str, num_experts: int) -> None:
        self.matrix, self.prefix, self.num_experts = matrix, prefix, num_experts

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        """See `BlockWatcher`."""
        self.matrix.add(f"{self.prefix}.ffn_gate_inp.weight", *_squares(input_TH))

    def begin(self, input_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """See `BlockWatcher`."""

    def expert(
        self,
        expert: int,
        token_P: torch.Tensor,
        weight_P: torch.Tensor,
        input_PH: torch.Tensor,
        hidden_PI: torch.Tensor,
        output_PH: torch.Tensor,
    ) -> None:
        """See `BlockWatcher`."""
        for name, values in (("gate", input_PH), ("up", input_PH), ("down", hidden_PI)):
            matrix = f"{self.prefix}.ffn_{name}_exps.weight"
            self.matrix.add_expert(matrix, self.num_experts, expert, *_squares(values))


def _squares(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, I) sums of squares over all but the last axis, on the CPU, and their (1,) count."""
    flat_TI = values.detach().reshape(-1, values.shape[-1])
    return flat_TI.double().square().sum(0, keepdim=True).cpu(), torch.tensor([len(flat_TI)])


@contextmanager
def _watched_matrices(model: nn.Module, matrix: ImportanceMatrix) -> Iterator[None]:
    """Sum the inputs of all linear layers outside of the routed experts."""
    handles = []
    for path, module in model.named_modules():
        layer = _LAYER.search(path)
        if layer is None:
            continue
        if hasattr(module, "kv_b_proj") and hasattr(module, "qk_nope_head_dim"):
            handles += _latent_attention(module, matrix, f"blk.{layer[1]}")
        name = _name_of(layer[2]) if isinstance(module, nn.Linear) else None
        if name is not None:
            handles.append(module.register_forward_pre_hook(_adding(matrix, f"blk.{layer[1]}.{name}.weight")))
    with hooked(handles):
        yield


def _name_of(path: str) -> str | None:
    """llama.cpp's name of a linear layer by its path in its decoder layer; None for one of another kind."""
    *parents, last = path.split(".")
    if "experts" in parents or last not in _MATRICES:
        return None
    shared = last in _SHARED and any(parent.startswith("shared") for parent in parents)
    return _MATRICES[last] + "_shexp" * shared


def _adding(matrix: ImportanceMatrix, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        matrix.add(name, *_squares(args[0]))

    return before


def _latent_attention(attention: Any, matrix: ImportanceMatrix, prefix: str) -> list[Any]:
    """Hooks for the two halves of `kv_b_proj` that llama.cpp splits by head.

    The first meets the unrotated part of the queries, the second the latents that attention has averaged.
    """
    nope, latents = int(attention.qk_nope_head_dim), {}
    queries = getattr(attention, "q_b_proj", None) or attention.q_proj

    def after_queries(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        heads_BSNI = output.detach().unflatten(-1, (attention.num_heads, -1))[..., :nope]
        sums_NI = heads_BSNI.double().square().flatten(0, 1).sum(0).cpu()
        matrix.add(f"{prefix}.attn_k_b.weight", sums_NI, torch.tensor([heads_BSNI.shape[:2].numel()]))

    def before_latents(module: nn.Module, args: tuple[Any, ...]) -> None:
        latents["BSL"] = args[0].detach()

    def after_attention(module: nn.Module, args: Any, output: Any) -> None:
        weights_BNSS = output[1]
        if weights_BNSS is None:
            return
        latents_BSL = latents.pop("BSL").float()
        # Some modules give them an axis of heads already.
        latents_BSL = latents_BSL.reshape(len(weights_BNSS), -1, latents_BSL.shape[-1])
        averaged_BNSL = weights_BNSS.float() @ latents_BSL[:, None]
        sums_NL = averaged_BNSL.double().square().sum((0, 2)).cpu()
        matrix.add(f"{prefix}.attn_v_b.weight", sums_NL, torch.tensor([len(averaged_BNSL) * averaged_BNSL.shape[2]]))

    return [
        queries.register_forward_hook(after_queries),
        attention.kv_b_proj.register_forward_pre_hook(before_latents),
        attention.register_forward_hook(after_attention),
    ]
