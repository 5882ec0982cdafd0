"""Experts of any width and rank, as the vLLM plugin runs them, beside the original ones as transformers runs them.

    python benchmarks/ragged_experts.py

One layer of 128 experts of 2048 x 768, top-8, bfloat16, without its router, and two mixtures that keep half of its
bytes: `mixture` has whole, empty and narrow experts and such whose gate and up share a right factor, as a byte budget
chooses them; `narrow` has nothing but narrow ones. Each runs expert by expert in torch (`PackedExperts`) and in Triton
launches (`RaggedExperts`). Beside them dense experts of the full width through `grouped_mm` in transformers, which the
ratios refer to, and for few tokens through `batched_mm`, which can be the faster one.

Tokens a second of the layer alone are medians of single runs, each waited for, and of replays of a CUDA graph; above 1
the ratios are faster. Runs take turns among eight inputs with experts of their own, chosen uniformly: one input after
itself would find the weights of few tokens in the cache. The error is that of the norm against float64.

Needs Triton. Without a GPU it runs a tiny layer in float32 in Triton's interpreter (TRITON_INTERPRET=1) and shows the
errors alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeAlias

import torch
import transformers
import triton
from gpu_timing import captured, milliseconds
from torch.nn import functional
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_moe.formats import JOINT, ExpertsSpec
from optimum_moe.vllm_plugin.activations import SWISH, Activation
from optimum_moe.vllm_plugin.packed_experts import PackedExperts, Shard
from optimum_moe.vllm_plugin.ragged_experts import RaggedExperts

INPUTS, SHARE, STEP, SCALE = 8, 0.5, 8, 0.03
"""Inputs that take turns, share of the bytes, divisor of widths and ranks, deviation of the random weights."""
BATCHED_TOKENS = 8
"""Most tokens for `batched_mm`, which gathers the weights of every pair."""

Routed: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(T, H) inputs, (T, K) routing weights, (T, K) experts."""
Run: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Weights: TypeAlias = list[dict[tuple[str, str], torch.Tensor]]
"""Of each expert by projection and tensor, as a checkpoint has them."""


@dataclass(frozen=True)
class Layer:
    """The original layer, and the tokens of a forward pass."""

    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Of all experts."""
        return 3 * self.hidden * self.width * self.experts

    def rounded(self, share: float) -> int:
        """Multiple of STEP near a share of the width, none above it."""
        return min(self.width, max(STEP, int(share * self.width) // STEP * STEP))


FULL = Layer(hidden=2048, width=768, experts=128, top_k=8, tokens=(1, 8, 64, 2048))
TINY = Layer(hidden=64, width=48, experts=16, top_k=2, tokens=(1, 5))


@dataclass(frozen=True)
class Case:
    """Experts with one way to run them.

    Args:
        experts: Their name.
        path: What runs them.
        share: Of the original's bytes.
        run: Runs them.
        reference: The same in float64.
        most_tokens: Of a forward pass, None for any.
        is_static: Whether shapes are known without reading on the host, so that a CUDA graph can capture the run.
    """

    experts: str
    path: str
    share: float
    run: Run
    reference: Run
    most_tokens: int | None = None
    is_static: bool = True


def narrow(layer: Layer) -> ExpertsSpec:
    """Narrow experts of many widths."""
    draw = random.Random(0)
    shares = [draw.uniform(0.1, 1.0) for _ in range(layer.experts)]

    def scaled(scale: float) -> ExpertsSpec:
        return ExpertsSpec(tuple(layer.rounded(scale * share) for share in shares), (JOINT, "down"))

    return largest(layer, scaled)


def mixture(layer: Layer) -> ExpertsSpec:
    """One whole, one empty, three narrow experts and three with a common right factor of gate and up in every eight."""
    draw = random.Random(0)
    kinds = ["whole", "empty", *["narrow"] * 3, *["joint"] * 3] * (layer.experts // 8)
    draw.shuffle(kinds)
    shares = [draw.uniform(0.2, 1.0) for _ in kinds]
    joint_widths = [layer.rounded(draw.uniform(0.5, 1.0)) for _ in kinds]

    def scaled(scale: float) -> ExpertsSpec:
        widths: list[int] = []
        ranks: list[int | None] = []
        for kind, share, joint_width in zip(kinds, shares, joint_widths, strict=True):
            size = layer.rounded(scale * share)
            widths.append({"whole": layer.width, "empty": 0, "narrow": size, "joint": joint_width}[kind])
            ranks.append(min(size, joint_width) if kind == "joint" else None)
        return ExpertsSpec(tuple(widths), (JOINT, "down"), {"low_rank": {JOINT: tuple(ranks)}})

    return largest(layer, scaled)


def largest(layer: Layer, scaled: Callable[[float], ExpertsSpec]) -> ExpertsSpec:
    """The sizes at the largest scale that keeps to the share of the bytes."""
    found = (scaled(step / 100) for step in range(300, 0, -1))
    return next(spec for spec in found if numbers_of(spec, layer) <= SHARE * layer.numbers)


def numbers_of(spec: ExpertsSpec, layer: Layer) -> int:
    """Stored numbers of all experts."""
    total = 0
    for expert, width in enumerate(spec.widths):
        rank = spec.sizes_of(JOINT, expert).get("low_rank")
        total += layer.hidden * width
        total += 2 * width * layer.hidden if rank is None else rank * (2 * width + layer.hidden)
    return total


def random_packed(
    spec: ExpertsSpec, layer: Layer, device: torch.device, dtype: torch.dtype
) -> tuple[PackedExperts, Weights]:
    """Random experts and the tensors that they were loaded from."""
    packed = PackedExperts(
        spec,
        hidden_size=layer.hidden,
        biases=(),
        constants=(),
        activation=Activation(SWISH, is_gated=True),
        shard=Shard(),
        dtype=dtype,
        device=device,
    )
    weights: Weights = [{} for _ in spec.widths]
    for expert, projection, name, shape, take in packed.tensors():
        tensor = torch.empty(shape, dtype=dtype, device=device).normal_(0, SCALE)
        weights[expert][projection, name] = tensor
        take(tensor)
    return packed, weights


def reference_of(weights: Weights) -> Run:
    """What the experts of a checkpoint give, in float64, from the tensors and not from their places in a buffer."""

    def product(own: dict[tuple[str, str], torch.Tensor], projection: str, input_PX: torch.Tensor) -> torch.Tensor:
        if (projection, "weight") in own:
            return functional.linear(input_PX, own[projection, "weight"].double())
        inner_PR = functional.linear(input_PX, own[projection, "weight_v"].double())
        return inner_PR @ own[projection, "weight_u"].double()

    def run(input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        output_TH = torch.zeros_like(input_TH, dtype=torch.float64)
        for expert, own in enumerate(weights):
            token_P, slot_P = (index_TK == expert).nonzero(as_tuple=True)
            if not own or not len(token_P):
                continue
            gate_Pn, up_Pn = product(own, JOINT, input_TH[token_P].double()).chunk(2, -1)
            output_PH = product(own, "down", functional.silu(gate_Pn) * up_Pn)
            output_TH.index_add_(0, token_P, output_PH * weights_TK[token_P, slot_P, None].double())
        return output_TH

    return run


def original_cases(layer: Layer, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Dense experts of the full width, as transformers runs them; `grouped_mm` first."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.width,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )
    with device:
        experts: Any = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    experts.gate_up_proj.normal_(0, SCALE)
    experts.down_proj.normal_(0, SCALE)
    pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
    reference = reference_of([{(JOINT, "weight"): joint, ("down", "weight"): down} for joint, down in pairs])

    def through(implementation: str) -> Run:
        def run(input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
            config._experts_implementation = implementation
            return experts(input_TH, index_TK, weights_TK)

        return run

    yield Case("original", "transformers, grouped_mm", 1.0, through("grouped_mm"), reference)
    yield Case("original", "transformers, batched_mm", 1.0, through("batched_mm"), reference, BATCHED_TOKENS)


def cases(layer: Layer, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All rows of the table for one number of tokens, the original first."""
    yield from original_cases(layer, device, dtype)
    for name, spec in (("mixture", mixture(layer)), ("narrow", narrow(layer))):
        packed, weights = random_packed(spec, layer, device, dtype)
        reference, share = reference_of(weights), packed.flat.numel() / layer.numbers
        yield Case(name, "PackedExperts, torch", share, packed, reference, is_static=False)
        yield Case(name, "RaggedExperts, Triton", share, RaggedExperts(packed), reference)


def routed(layer: Layer, tokens: int, device: torch.device, dtype: torch.dtype) -> Routed:
    """Random tokens, each with other experts; weights of a token add up to one."""
    index_TK = torch.rand(tokens, layer.experts, device=device).argsort(-1)[:, : layer.top_k]
    weights_TK = torch.rand(tokens, layer.top_k, device=device).softmax(-1).to(dtype)
    return torch.randn(tokens, layer.hidden, device=device, dtype=dtype), weights_TK, index_TK


def error_of(case: Case, inputs: list[Routed]) -> float:
    """Norm of the difference from float64 by the norm in float64, over all inputs."""
    expected = torch.cat([case.reference(*given) for given in inputs])
    found = torch.cat([case.run(*given) for given in inputs])
    return float((found.double() - expected).norm() / expected.norm())


def speeds(case: Case, inputs: list[Routed], device: torch.device) -> tuple[float, float | str]:
    """Tokens a second in single runs, and in replays of a CUDA graph or why there are none."""
    tokens = len(inputs[0][0])

    def a_second(runs: list[Callable[[], Any]]) -> float:
        turns = cycle(runs)
        return 1e3 * tokens / milliseconds(lambda: next(turns)(), device, least=2 * INPUTS)

    runs: list[Callable[[], Any]] = [lambda given=given: case.run(*given) for given in inputs]
    alone = a_second(runs)
    if not case.is_static:
        return alone, "reads on the host"
    graphs = [captured(run) for run in runs]
    failed = [graph for graph in graphs if isinstance(graph, str)]
    return alone, failed[0] if failed else a_second([graph for graph in graphs if callable(graph)])


@torch.no_grad()
def lines(layer: Layer, device: torch.device) -> Iterator[str]:
    """Heading and rows of the table, each as soon as it is measured."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    card = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    yield f"{card}, torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
    yield (
        f"{layer.experts} experts of {layer.hidden} x {layer.width} ({layer.numbers * dtype.itemsize / 1e6:.0f} MB), "
        f"top-{layer.top_k}, {str(dtype).removeprefix('torch.')}"
    )
    yield ""
    yield "| tokens | experts | bytes | path | tokens/s | ratio | tokens/s, CUDA graph | ratio | error |"
    yield "|---" * 9 + "|"
    torch.manual_seed(0)
    made = list(cases(layer, device, dtype))
    for tokens in layer.tokens:
        inputs = [routed(layer, tokens, device, dtype) for _ in range(INPUTS)]
        original: tuple[float, float | str] | None = None
        for case in made:
            if case.most_tokens is not None and tokens > case.most_tokens:
                continue
            head = f"| {tokens:,} | {case.experts} | {case.share:.1%} | {case.path} |"
            try:
                error = error_of(case, inputs)
                found = speeds(case, inputs, device) if on_gpu else None
            except Exception as failure:
                yield f"{head} {type(failure).__name__}: {' '.join(str(failure).split())[:120]} | | | | |"
                continue
            original = original or (found if case is made[0] else None)
            yield f"{head}{cells(found, original)} {error:.1e} |"


def cells(found: tuple[float, float | str] | None, original: tuple[float, float | str] | None) -> str:
    """Speed and ratio of single runs and of replays."""
    text = ""
    for own, base in zip(found or ("not timed",) * 2, original or ("not timed",) * 2, strict=True):
        text += f" {own} |" if isinstance(own, str) else f" {own:,.0f} |"
        text += " - |" if isinstance(own, str) or isinstance(base, str) else f" {own / base:.2f} |"
    return text


def main() -> None:
    on_gpu = torch.cuda.is_available()
    for line in lines(FULL if on_gpu else TINY, torch.device("cuda" if on_gpu else "cpu")):
        print(line, flush=True)


if __name__ == "__main__":
    main()
