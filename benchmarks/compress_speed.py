"""CPU seconds, wall seconds and peak memory of cutting one MoE layer with M-SMoE, beside a plain implementation.

Two layers: 32 non-gated experts (hidden 768, intermediate 3072) to 8 groups, and 64 gated experts (hidden 2048,
intermediate 1024) to 16 groups; each with independent random experts, and with groups of permuted copies under 10%
noise. The plain implementation follows the structure of the public M-SMoE code: for every expert the full cost matrix
and scipy's assignment on it, permuted copies, stacked matrices for the mean. Objectives of both must agree.

    python benchmarks/compress_speed.py [--threads 2] [--layers switch olmoe] [--data independent copies]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.grouping import dominant_experts, join_dominants
from optimum_moe.algorithms.merging import merge_matrices, merge_weights
from optimum_moe.algorithms.similarity import gram_similarity
from optimum_moe.calibration.recorder import BlockRecorder

TOKENS, BATCH, NOISE = 8192, 1024, 0.1
NEURON_AXIS = {"up": 0, "down": 1, "gate": 0}


@dataclass(frozen=True)
class Layer:
    num_experts: int
    num_groups: int
    hidden: int
    intermediate: int
    gated: bool


LAYERS = {"switch": Layer(32, 8, 768, 3072, False), "olmoe": Layer(64, 16, 2048, 1024, True)}


@dataclass
class Measure:
    """Costs of each stage, and the highest resident memory seen while it ran (above the empty process)."""

    base: int
    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Run the work of one stage and note its costs under the name."""
        stop, highest = threading.Event(), [resident()]

        def sample() -> None:
            while not stop.wait(0.005):
                highest[0] = max(highest[0], resident())

        sampler = threading.Thread(target=sample)
        sampler.start()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu[name], self.wall[name] = time.process_time() - cpu, time.perf_counter() - wall
        stop.set()
        sampler.join()
        self.peak[name] = max(highest[0], resident()) - self.base
        return result


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def build_experts(layer: Layer, kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights by projection; experts e, e + G, e + 2G, ... are noisy permuted copies of each other, or nothing is."""
    shapes = {"up": (layer.intermediate, layer.hidden), "down": (layer.hidden, layer.intermediate)}
    if layer.gated:
        shapes["gate"] = shapes["up"]
    weights = {name: torch.empty(layer.num_experts, *shape) for name, shape in shapes.items()}
    for expert in range(layer.num_experts):
        order = torch.randperm(layer.intermediate, generator=generator)
        for name, matrices in weights.items():
            matrices[expert].normal_(generator=generator)
            if kind == "copies" and expert >= layer.num_groups:
                original = matrices[expert % layer.num_groups].index_select(NEURON_AXIS[name], order)
                matrices[expert].mul_(NOISE).add_(original)
    return weights


def build_logits(layer: Layer, generator: torch.Generator) -> torch.Tensor:
    """Router logits that group experts by index modulo G and make the first of each group the most frequent."""
    signal_TG = torch.randn(TOKENS, layer.num_groups, generator=generator)
    logits_TE = signal_TG.repeat(1, layer.num_experts // layer.num_groups)
    logits_TE = logits_TE + 0.3 * torch.randn(TOKENS, layer.num_experts, generator=generator)
    logits_TE[:, : layer.num_groups] += 0.2
    return logits_TE


def measure_statistics(layer: Layer, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the recorder does for M-SMoE: Gram matrix, counts and reservoir; the forward pass is not timed."""
    recorder = BlockRecorder(layer.num_experts, layer.intermediate, layer.hidden)
    hidden_TH = torch.zeros(BATCH, layer.hidden)
    for number, batch_TE in enumerate(logits_TE.split(BATCH)):
        recorder.expect(number, None)
        recorder.router(batch_TE, hidden_TH)
        recorder.begin(hidden_TH, batch_TE.argmax(dim=1, keepdim=True), torch.ones(BATCH, 1))
    statistics = recorder.statistics()
    return statistics.router_gram_EE, statistics.coactivation_EE.diagonal()


def group(similarity_EE: torch.Tensor, count_E: torch.Tensor, num_groups: int) -> tuple[tuple[int, ...], torch.Tensor]:
    dominants_G = dominant_experts(count_E, num_groups)
    return dominants_G, join_dominants(similarity_EE, dominants_G)


def members_of(labels_E: torch.Tensor, label: int) -> list[int]:
    return (labels_E == label).nonzero().flatten().tolist()


def merge(
    weights: dict[str, torch.Tensor],
    count_E: torch.Tensor,
    labels_E: torch.Tensor,
    perm_EI: torch.Tensor,
    dominants_G: tuple[int, ...],
) -> None:
    """Write each merged expert over its dominant expert, as the surgeon of Switch Transformers does."""
    share_E = merge_weights(count_E, labels_E, len(dominants_G)).tolist()
    for label, dominant in enumerate(dominants_G):
        members = members_of(labels_E, label)
        for name, matrices in weights.items():
            merge_matrices(
                [matrices[e] for e in members],
                [share_E[e] for e in members],
                [perm_EI[e] for e in members],
                NEURON_AXIS[name],
                matrices[dominant],
            )


def plain_align(
    weights: dict[str, torch.Tensor], labels_E: torch.Tensor, dominants_G: tuple[int, ...]
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """One expert after the other: full cost matrix, scipy on it, permuted copies."""
    perm_EI = torch.arange(weights["up"].shape[1]).repeat(len(labels_E), 1)
    aligned = []
    for expert, label in enumerate(labels_E.tolist()):
        reference, own = dominants_G[label], {name: matrices[expert] for name, matrices in weights.items()}
        if reference != expert:
            cost = weights["up"][reference] @ own["up"].T + weights["down"][reference].T @ own["down"]
            if "gate" in weights:
                cost = cost + weights["gate"][reference] @ own["gate"].T
            perm_EI[expert] = torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])
            order = perm_EI[expert]
            own = {name: matrix[order] if NEURON_AXIS[name] == 0 else matrix[:, order] for name, matrix in own.items()}
        aligned.append(own)
    return perm_EI, aligned


def plain_merge(
    aligned: list[dict[str, torch.Tensor]], count_E: torch.Tensor, labels_E: torch.Tensor, groups: int
) -> dict[str, torch.Tensor]:
    """Stack a group's matrices and sum them weighted."""
    merged: dict[str, list[torch.Tensor]] = {name: [] for name in aligned[0]}
    for label in range(groups):
        members = members_of(labels_E, label)
        frequency = count_E[members].float()
        for name, matrices in merged.items():
            stacked = torch.stack([aligned[e][name] * f for e, f in zip(members, frequency, strict=True)])
            matrices.append(stacked.sum(dim=0) / frequency.sum())
    return {name: torch.stack(matrices) for name, matrices in merged.items()}


def objective(
    weights: dict[str, torch.Tensor], labels_E: torch.Tensor, dominants_G: tuple[int, ...], perm_EI: torch.Tensor
) -> float:
    total = 0.0
    for expert, label in enumerate(labels_E.tolist()):
        if dominants_G[label] != expert:
            for name, matrices in weights.items():
                moved = matrices[expert].index_select(NEURON_AXIS[name], perm_EI[expert])
                total += float((matrices[dominants_G[label]].double() * moved).sum())
    return total


def run_case(name: str, kind: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    layer, generator = LAYERS[name], torch.Generator().manual_seed(0)
    # Thread pools and libraries take their memory before the baseline is read.
    small = torch.randn(4, 200, 200, generator=generator)
    align_experts(ExpertTensors(small, small.mT), torch.zeros(4, dtype=torch.int64), (0,), threads)
    logits_TE = build_logits(layer, generator)
    base = resident()
    weights = build_experts(layer, kind, generator)
    layer_bytes = sum(matrices.numel() * matrices.element_size() for matrices in weights.values())

    ours = Measure(base)
    gram_EE, count_E = ours.stage("statistics", lambda: measure_statistics(layer, logits_TE))
    similarity_EE = ours.stage("similarity", lambda: gram_similarity(gram_EE))
    dominants_G, labels_E = ours.stage("grouping", lambda: group(similarity_EE, count_E, layer.num_groups))
    perm_EI = ours.stage("alignment", lambda: align_experts(ExpertTensors(**weights), labels_E, dominants_G, threads))
    value = objective(weights, labels_E, dominants_G, perm_EI)
    # The plain implementation needs the dominant experts as they were; the copy is not part of our memory.
    dominants = list(dominants_G)
    kept = {name: matrices[dominants] for name, matrices in weights.items()}
    ours.base += sum(matrices.numel() * matrices.element_size() for matrices in kept.values())
    ours.stage("merge", lambda: merge(weights, count_E, labels_E, perm_EI, dominants_G))
    merged = {name: matrices[dominants] for name, matrices in weights.items()}
    for name, matrices in weights.items():
        matrices[dominants] = kept[name]
    del kept

    plain = Measure(resident() - layer_bytes)
    plain_EI, aligned = plain.stage("alignment", lambda: plain_align(weights, labels_E, dominants_G))
    plain_merged = plain.stage("merge", lambda: plain_merge(aligned, count_E, labels_E, layer.num_groups))
    plain_value = objective(weights, labels_E, dominants_G, plain_EI)
    difference = max(float((merged[key] - plain_merged[key]).abs().max()) for key in merged)
    return {
        "ours": ours,
        "plain": plain,
        "bytes": layer_bytes,
        "objectives": (value, plain_value),
        "same": float((perm_EI == plain_EI).double().mean()),
        "difference": difference,
    }


def print_case(name: str, kind: str, result: dict[str, Any]) -> None:
    ours, plain, size = result["ours"], result["plain"], result["bytes"]
    print(f"\n{name}, {kind} experts: layer of {size / 1e6:.0f} MB (float32)")
    print(
        f"{'stage':<11}{'CPU s':>8}{'wall s':>8}{'peak':>7} |{'plain CPU':>10}{'wall':>8}{'peak':>7} |"
        f"{'CPU ratio':>10}{'wall':>7}"
    )
    for stage in ours.cpu:
        line = f"{stage:<11}{ours.cpu[stage]:>8.3f}{ours.wall[stage]:>8.3f}{ours.peak[stage] / size:>6.2f}x |"
        if stage in plain.cpu:
            line += f"{plain.cpu[stage]:>10.3f}{plain.wall[stage]:>8.3f}{plain.peak[stage] / size:>6.2f}x |"
            line += f"{ours.cpu[stage] / plain.cpu[stage]:>10.3f}{ours.wall[stage] / plain.wall[stage]:>7.3f}"
        print(line)
    value, plain_value = result["objectives"]
    relative = abs(value - plain_value) / abs(plain_value)
    print(f"objective {value:.8g}, plain {plain_value:.8g}, relative difference {relative:.1e}", end="; ")
    print(f"{result['same']:.2%} of neurons at the same place, merged weights differ by {result['difference']:.1e}")
    print(f"whole job: peak {max(ours.peak.values()) / size:.2f}x the layer", flush=True)
    if relative > 1e-6:
        raise SystemExit("The objectives differ: one of the assignments is not optimal.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, and experts aligned at the same time")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--data", nargs="+", choices=["independent", "copies"], default=["independent", "copies"])
    args = parser.parse_args()
    print(f"{args.threads} threads, torch {torch.__version__}")
    for name in args.layers:
        for kind in args.data:
            # A fresh process each time, so that no case inherits another's memory.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print_case(name, kind, pool.apply(run_case, (name, kind, args.threads)))


if __name__ == "__main__":
    main()
