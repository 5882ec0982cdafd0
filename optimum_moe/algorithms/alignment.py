"""Permutation alignment of experts: an exact assignment of intermediate neurons, made cheap.

Shape letters: E experts, G groups, H hidden, I intermediate, D features of a neuron (its rows of gate and up and its
column of down side by side), S feature segments.

The assignment maximizes sum_i C[i, perm[i]] with C[i, j] = a_i . b_j, a_i and b_j the features of neuron i of the
reference and neuron j of the member. Subtracting any v_j from column j changes the value of every permutation equally.
Two facts follow, which save most of the work without giving up the optimum:

- with v_j = |b_j|^2 / 2 a row's largest entry is the member's nearest neuron, and if these are all different they are
  the optimum. A few features suffice to find them: whatever the missing ones add is at most the product of the norms
  of the missing parts (Cauchy-Schwarz). Near-duplicate experts need a small part of the matrix product this way.
- otherwise the solver starts from duals that a few entropic (Sinkhorn) sweeps made almost optimal, which leaves it
  short augmenting paths only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from optimum_moe.algorithms.experts import ExpertTensors

# Shares of the features after which the certificate is tried again, before the whole product is computed.
_LEVELS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
# The first chunk is a small probe: what it wastes where the certificate cannot hold is negligible.
_PROBE_ROWS, _CHUNK_ROWS = 32, 256
_SWEEP_ROWS = 32
_TEMPERATURES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16)
# The matrix product packs its operands: the larger the product, the larger the copies, one for each thread.
_TILE_ROWS, _TILE_COLUMNS = 256, 1024
# Below this size the plain solver takes a few milliseconds and nothing is worth saving.
_SMALL = 128


Features: TypeAlias = Sequence[torch.Tensor]
"""(I, D) parts of the features of an expert's neurons, side by side."""
FeaturesOf: TypeAlias = Callable[[int, int], Features]
"""From an expert and its group to the features of the expert's neurons."""


@dataclass(frozen=True, eq=False)
class _Neurons:
    """An expert as features: pieces are (I, width) views, segments cut their columns, rest_SI what lies beyond."""

    pieces: tuple[torch.Tensor, ...]
    segments: tuple[tuple[tuple[int, slice], ...], ...]
    rest_SI: torch.Tensor
    squared_I: torch.Tensor

    @property
    def size(self) -> int:
        return self.pieces[0].shape[0]


def _segments(widths: Sequence[int]) -> tuple[tuple[tuple[int, slice], ...], ...]:
    total = sum(widths)
    bounds = [0, *sorted({max(1, int(total * level)) for level in _LEVELS} - {total}), total]
    segments = []
    for low, high in pairwise(bounds):
        parts, offset = [], 0
        for piece, width in enumerate(widths):
            start, stop = max(low - offset, 0), min(high - offset, width)
            if start < stop:
                parts.append((piece, slice(start, stop)))
            offset += width
        segments.append(tuple(parts))
    return tuple(segments)


def _describe(features: Features) -> _Neurons:
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32

    def dense(matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix.detach().to(dtype)
        # The matrix product copies an operand without a unit stride on every call: copy it once.
        return matrix if 1 in matrix.stride() else matrix.contiguous()

    pieces = tuple(dense(matrix) for matrix in features)
    segments = _segments([piece.shape[1] for piece in pieces])
    squared_SI = torch.stack(
        [torch.stack([_squares(pieces[p][:, cols]) for p, cols in segment]).sum(0) for segment in segments]
    )
    rest_SI = squared_SI.flip(0).cumsum(0).flip(0)
    after_SI = torch.cat([rest_SI[1:], torch.zeros_like(rest_SI[:1])])
    return _Neurons(pieces, segments, after_SI.sqrt(), rest_SI[0])


def _squares(piece: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(piece, dim=1).square()


def _accumulate(cost: torch.Tensor, reference: _Neurons, member: _Neurons, rows: slice, segments: range) -> None:
    """Add the product over some feature segments to rows of the cost; segment 0 overwrites what was there."""
    spans: dict[int, slice] = {}
    for segment in segments:
        for piece, columns in reference.segments[segment]:
            spans[piece] = slice(spans[piece].start if piece in spans else columns.start, columns.stop)
    for tile_rows in _steps(rows, _TILE_ROWS):
        for tile_columns in _steps(slice(0, member.size), _TILE_COLUMNS):
            tile, beta = cost[tile_rows, tile_columns], int(segments.start > 0)
            for piece, columns in spans.items():
                left, right = reference.pieces[piece][tile_rows, columns], member.pieces[piece][tile_columns, columns]
                torch.addmm(tile, left, right.T, beta=beta, out=tile)
                beta = 1


def _steps(span: slice, step: int) -> list[slice]:
    return [slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]


def _nearest(cost: torch.Tensor, member: _Neurons, rows: slice) -> torch.Tensor:
    half_I = member.squared_I / 2
    return torch.cat([_row_argmax(chunk - half_I) for chunk in cost[rows].split(_SWEEP_ROWS)])


def _row_argmax(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().argmax(axis=1))
    return values.argmax(dim=1)


def _certify(cost: torch.Tensor, reference: _Neurons, member: _Neurons, rows: slice, level: int) -> torch.Tensor | None:
    """The nearest neurons of some rows if the features up to a level prove them, None if they do not."""
    half_I = member.squared_I / 2
    left = torch.stack([reference.rest_SI[level, rows], torch.ones_like(reference.rest_SI[level, rows])], dim=1)
    upper = torch.addmm(cost[rows], left, torch.stack([member.rest_SI[level], -half_I]))
    nearest = _row_argmax(upper)
    upper.scatter_(1, nearest[:, None], -torch.inf)
    second = _row_argmax(upper)
    runner_up = upper.gather(1, second[:, None])[:, 0]
    exact = -half_I[nearest]
    for ours, theirs in zip(reference.pieces, member.pieces, strict=True):
        if ours.stride(0) == 1 and theirs.stride(0) == 1:
            # Gathering along contiguous memory: the transposed view would be read element by element.
            exact = exact + (ours.T[:, rows] * theirs.T.index_select(1, nearest)).sum(0)
        else:
            exact = exact + (ours[rows] * theirs.index_select(0, nearest)).sum(1)
    # Covers the rounding of the sums, so that the proof is not one of float32 noise.
    margin = 1e-6 * (reference.squared_I[rows] + member.squared_I[second])
    return nearest if bool((exact - runner_up >= margin).all()) else None


def _is_permutation(perm_I: torch.Tensor) -> bool:
    return bool((torch.bincount(perm_I, minlength=perm_I.numel()) == 1).all())


def _row_slices(size: int) -> list[slice]:
    bounds = [0, *range(min(_PROBE_ROWS, size), size, _CHUNK_ROWS), size]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _permutation(reference: _Neurons, member: _Neurons, solvers: threading.Semaphore) -> torch.Tensor:
    size, last = reference.size, len(reference.segments) - 1
    first = reference.pieces[0]
    memory, cost = _cost_memory(size, first)
    perm_I = torch.empty(size, dtype=torch.int64, device=first.device)
    partial: list[tuple[slice, int]] = []
    level = 0 if size > _SMALL else last
    for rows in _row_slices(size):
        if level == last:
            rows = slice(rows.start, size)
        _accumulate(cost, reference, member, rows, range(level + 1))
        nearest = None
        while level < last and nearest is None:
            nearest = _certify(cost, reference, member, rows, level)
            if nearest is None:
                level += 1
                _accumulate(cost, reference, member, rows, range(level, level + 1))
        perm_I[rows] = _nearest(cost, member, rows) if nearest is None else nearest
        partial.append((rows, level))
        if rows.stop == size:
            break
    if not (bool(reference.squared_I.isfinite().all()) and bool(member.squared_I.isfinite().all())):
        raise ValueError("An expert's weights hold NaN or infinity: neurons cannot be compared. Check the checkpoint.")
    if _is_permutation(perm_I):
        return perm_I.cpu()
    for rows, done in partial:
        if done < last:
            _accumulate(cost, reference, member, rows, range(done + 1, last + 1))
    duals = _entropic_duals(cost) if size > _SMALL else (cost.amax(1), torch.zeros_like(cost[0]))
    if memory is None:
        memory = cost.cpu().numpy().ravel().copy()
    # Nothing may refer to the product any more: its memory is about to grow and perhaps move.
    del cost
    with solvers:
        return _assign(memory, size, duals[0].double().cpu().numpy(), duals[1].double().cpu().numpy())


def _cost_memory(size: int, like: torch.Tensor) -> tuple[np.ndarray | None, torch.Tensor]:
    """An (I, I) matrix, on the CPU together with the NumPy array that owns its memory."""
    if like.device.type != "cpu":
        return None, like.new_empty(size, size)
    memory = np.empty(size * size, dtype=np.float64 if like.dtype == torch.float64 else np.float32)
    return memory, torch.from_numpy(memory).view(size, size)


def _assign(memory: np.ndarray, size: int, row_dual_I: np.ndarray, column_dual_I: np.ndarray) -> torch.Tensor:
    """Optimal assignment by scipy on costs reduced by almost optimal duals, widened in the cost's own memory."""
    narrow_type = memory.dtype
    if narrow_type == np.float32:
        # The system extends a block of this size by its page table; a second matrix is never held.
        memory.resize(2 * size * size, refcheck=False)
    narrow = memory[: size * size].reshape(size, size)
    reduced = memory.view(np.float64).reshape(size, size)
    for start in reversed(range(0, size, _SWEEP_ROWS)):
        rows = slice(start, min(size, start + _SWEEP_ROWS))
        # Backwards, wide rows only cover narrow ones that were read before.
        chunk = narrow[rows].astype(np.float64)
        np.subtract(row_dual_I[rows, None], chunk, out=chunk)
        np.add(chunk, column_dual_I, out=reduced[rows])
    return torch.from_numpy(linear_sum_assignment(reduced)[1].astype(np.int64, copy=False))


def _entropic_duals(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Duals of the entropy-regularized assignment after a few sweeps of falling temperature."""
    size = cost.shape[0]
    row_dual_I, column_dual_I = cost.new_zeros(size), cost.new_zeros(size)
    scale = max(float(cost[:: max(1, size // 64)].std()), torch.finfo(torch.float32).tiny * 1e6)
    for temperature in (scale * factor for factor in _TEMPERATURES):
        mass_I = cost.new_zeros(size)
        for start in range(0, size, _SWEEP_ROWS):
            rows = slice(start, min(size, start + _SWEEP_ROWS))
            share = torch.sub(cost[rows], column_dual_I)
            peak = share.amax(1)
            # exp(-80) is still a normal float32: denormal numbers would be a hundred times slower.
            share.sub_(peak[:, None]).mul_(1 / temperature).clamp_(min=-80).exp_()
            total = share.sum(1)
            row_dual_I[rows] = peak + temperature * total.log()
            mass_I.add_(total.reciprocal() @ share)
        column_dual_I += temperature * mass_I.log()
    return row_dual_I, column_dual_I


def alignment_permutation(
    reference_up: torch.Tensor,
    reference_down: torch.Tensor,
    member_up: torch.Tensor,
    member_down: torch.Tensor,
    reference_gate: torch.Tensor | None = None,
    member_gate: torch.Tensor | None = None,
    *,
    solvers: threading.Semaphore | None = None,
) -> torch.Tensor:
    """Order of a member's neurons that matches the reference best (M-SMoE, arXiv 2310.01334).

    Maximizes sum_i C[i, perm[i]], C = Wg_ref Wg^T + Wu_ref Wu^T + Wd_ref^T Wd, exactly (up to the rounding of C, which
    is computed in float32, in float64 for float64 weights). `member_up[perm]` and `member_down[:, perm]` are aligned.

    Args:
        reference_up: (I, H), as `reference_gate`, `member_up` and `member_gate`.
        reference_down: (H, I), as `member_down`.
        member_up: see above.
        member_down: see above.
        reference_gate: gate projection of gated experts, of both experts or of neither.
        member_gate: see above.
        solvers: held while the assignment is solved in float64, which takes twice the memory of what comes before.

    Returns:
        (I,) int64 permutation on the CPU.

    Raises:
        ValueError: if the shapes of the two experts differ, one has a gate, or a weight is NaN or infinite.
    """
    if (reference_gate is None) != (member_gate is None):
        raise ValueError("Either both experts have a gate projection or neither has. Pass both, or none.")
    shapes = [
        (tuple(a.shape), tuple(b.shape))
        for a, b in ((reference_up, member_up), (reference_down.T, member_down.T), (reference_gate, member_gate))
        if a is not None and b is not None
    ]
    if len({shape for pair in shapes for shape in pair}) > 1:
        raise ValueError(f"Experts of one shape can be aligned, got (gate, up, down^T) pairs {shapes}.")
    reference = _describe(_weights(reference_up, reference_down, reference_gate))
    member = _describe(_weights(member_up, member_down, member_gate))
    return _permutation(reference, member, solvers or threading.Semaphore())


def weights_of(experts: ExpertTensors, expert: int) -> Features:
    """The rows of gate and up and the columns of down of one expert, neuron by neuron."""
    gate = None if experts.gate is None else experts.gate[expert]
    return _weights(experts.up[expert], experts.down[expert], gate)


def _weights(up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None) -> Features:
    return (up, down.T) if gate is None else (gate, up, down.T)


def align_experts(
    experts: ExpertTensors,
    labels_E: torch.Tensor,
    dominants_G: Sequence[int],
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    features: FeaturesOf | None = None,
) -> torch.Tensor:
    """Align every expert of a block to its group's dominant expert (M-SMoE, arXiv 2310.01334).

    Neurons are matched so that the sum of the products of their features is the largest. Biases are permuted with
    their neurons when merging, but take no part in it.

    Args:
        experts: the block's routed experts.
        labels_E: (E,) group of each expert, -1 for a pruned one.
        dominants_G: dominant expert of each group.
        num_threads: experts aligned at the same time, each on one thread; default `torch.get_num_threads()`. Each
            holds one (I, I) float32 matrix, half of them a float64 one.
        progress: called in the calling thread with 1 for every expert aligned (fits `tqdm.update`).
        features: what neurons are compared by; default their weights, as in `alignment_permutation`.

    Returns:
        (E, I) int64 permutations on the CPU, the identity for dominant and pruned experts and for fixed neurons.

    Raises:
        ValueError: if labels, dominants and experts do not fit each other, or a weight is NaN or infinite.
    """
    labels = _check_labels(experts, labels_E, dominants_G)
    features = features or (lambda expert, group: weights_of(experts, expert))
    size = experts.intermediate_size
    permutations_EI = torch.arange(size).repeat(experts.num_experts, 1)
    # Members of a group stand together, so that few references are alive at a time.
    pairs = sorted(
        (label, expert)
        for expert, label in enumerate(labels)
        if label >= 0 and dominants_G[label] != expert and not experts.fixed_neurons
    )

    def align(pair: tuple[int, int]) -> torch.Tensor:
        label, expert = pair
        dominant = dominants_G[label]
        try:
            return _permutation(_describe(features(dominant, label)), _describe(features(expert, label)), solvers)
        except ValueError as error:
            raise ValueError(f"Expert {expert} cannot be aligned to expert {dominant}: {error}") from error

    threads = torch.get_num_threads()
    workers = max(1, min(num_threads or threads, len(pairs)))
    # Half of the workers solve while the others multiply, which takes about as long and half the memory.
    solvers = threading.Semaphore(max(1, workers // 2))
    # Parallel over experts: the assignment is serial, and so would leave the other threads idle.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for (_, expert), perm_I in zip(pairs, pool.map(align, pairs), strict=True):
                permutations_EI[expert] = perm_I
                if progress is not None:
                    progress(1)
    finally:
        torch.set_num_threads(threads)
    return permutations_EI


def _check_labels(experts: ExpertTensors, labels_E: torch.Tensor, dominants_G: Sequence[int]) -> list[int]:
    labels = [int(label) for label in labels_E]
    if len(labels) != experts.num_experts or not all(-1 <= label < len(dominants_G) for label in labels):
        raise ValueError(
            f"labels_E must hold {experts.num_experts} labels in -1..{len(dominants_G) - 1}, got {labels}. "
            "Take labels and dominants from the same grouping."
        )
    for group, dominant in enumerate(dominants_G):
        if not 0 <= dominant < len(labels) or labels[dominant] != group:
            raise ValueError(
                f"Expert {dominant} is the dominant of group {group} but not a member of it, labels are {labels}. "
                "Take labels and dominants from the same grouping."
            )
    return labels
