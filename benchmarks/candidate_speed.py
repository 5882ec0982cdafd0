"""CPU seconds of the candidates of one expert, what the byte budget's profile spends its time on, and their accuracy.

Random experts on correlated tokens with gradients of uneven size. Damages are compared with those of the same expert in
float64. With `--against` another checkout of the repository is measured too: the two take turns, each in a process of
its own that draws the same expert, and the ratio of a size is the median over the turns.

    python benchmarks/candidate_speed.py [--against ../before] [--sizes 2048x768x2048 ...] [--turns 3] [--accuracy]
    python benchmarks/candidate_speed.py --formats narrow    # what is tried for any runtime
    python benchmarks/candidate_speed.py --others            # experts of a block after the first eight
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from pathlib import Path

import torch
from checkouts import measured

from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.formats import candidates

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("2048x768x2048", "2048x768x8192", "2048x1408x2048", "4096x1536x2048")
# float64 takes minutes at the sizes above.
SMALL = ("256x96x512", "512x256x2048", "256x512x1024")


def swiglu(gate_PI: torch.Tensor | None, up_PI: torch.Tensor) -> torch.Tensor:
    assert gate_PI is not None
    return torch.nn.functional.silu(gate_PI) * up_PI


def draw_expert(hidden: int, inner: int, tokens: int, seed: int = 0) -> tuple[Expert, ExpertTokens]:
    """An expert whose neurons differ in size, and tokens and gradients with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def uneven(*shape: int) -> torch.Tensor:
        return 0.3 + 2 * torch.rand(shape, generator=generator)

    decay_H = torch.arange(1, hidden + 1).float().rsqrt()
    basis_HH, other_HH = (torch.linalg.qr(draw(hidden, hidden)).Q for _ in range(2))
    input_PH = (draw(tokens, hidden) * decay_H) @ basis_HH
    input_PH /= input_PH.square().mean(1, keepdim=True).sqrt()
    gradient_PH = (draw(tokens, hidden) * decay_H) @ other_HH * 1e-3 * draw(tokens, 1).exp()
    gate_IH, up_IH = (draw(inner, hidden) * hidden**-0.5 * uneven(inner, 1) for _ in range(2))
    down_HI = draw(hidden, inner) * inner**-0.5 * uneven(inner)
    weight_P = 0.05 + 0.4 * torch.rand(tokens, generator=generator)
    return Expert(up_IH, down_HI, swiglu, gate_IH), ExpertTokens(input_PH, weight_P, gradient_PH)


def numbers_of(size: str) -> tuple[int, int, int]:
    hidden, inner, tokens = (int(number) for number in size.split("x"))
    return hidden, inner, tokens


def damages(expert: Expert, tokens: ExpertTokens, formats: list[str] | None = None) -> dict[str, float]:
    found = candidates(expert, tokens, itemsize=2, formats=formats)
    return {f"{p.candidate.format} {p.candidate.neurons} {p.candidate.size}": p.damage for p in found}


def measure(size: str, threads: int, formats: list[str] | None) -> None:
    """Print the seconds and damages of one size; what the other processes do."""
    torch.set_num_threads(threads)
    hidden, inner, tokens = numbers_of(size)
    expert, seen = draw_expert(hidden, inner, tokens)
    candidates(*draw_expert(64, 32, 128))
    start, wall = time.process_time(), time.perf_counter()
    found = damages(expert, seen, formats)
    print(json.dumps([time.process_time() - start, time.perf_counter() - wall, found]))


def run(checkout: Path, size: str, threads: int, formats: list[str] | None) -> tuple[float, float, dict[str, float]]:
    """Measure one size with the package of a checkout."""
    arguments = ["--measure", size, "--threads", str(threads)]
    arguments += [] if formats is None else ["--formats", *formats]
    seconds, wall, found = measured(checkout, __file__, arguments, threads)
    return seconds, wall, found


def print_speed(sizes: list[str], against: Path | None, turns: int, threads: int, formats: list[str] | None) -> None:
    """A table of CPU and wall seconds, with the other checkout's beside them."""
    print("| hidden x intermediate x tokens | CPU s | wall s |", end="")
    print(
        "\n|---|---|---|"
        if against is None
        else " before | before | CPU ratio | damages differ by |\n" + "|---" * 7 + "|"
    )
    for size in sizes:
        own, other = [], []
        for _ in range(turns):
            own.append(run(ROOT, size, threads, formats))
            if against is not None:
                other.append(run(against, size, threads, formats))
        cells = [f"{stats.median(r[0] for r in own):.1f}", f"{stats.median(r[1] for r in own):.1f}"]
        if other:
            cells += [f"{stats.median(r[0] for r in other):.1f}", f"{stats.median(r[1] for r in other):.1f}"]
            cells.append(f"{stats.median(b[0] / a[0] for a, b in zip(own, other, strict=True)):.2f}x")
            cells.append(f"{largest_error(own[0][2], other[0][2])[0]:.1e}")
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


def print_others(sizes: list[str], threads: int) -> None:
    """A table of CPU seconds of the first experts of a block, and of others, which try what the first ones may want."""
    from optimum_moe.formats.budget import worth_trying

    torch.set_num_threads(threads)
    candidates(*draw_expert(64, 32, 128))
    print(
        "| hidden x intermediate x tokens | CPU s, of the first | of others | ranks that they try |\n"
        + "|---" * 4
        + "|"
    )
    for size in sizes:
        expert, seen = draw_expert(*numbers_of(size))
        start = time.process_time()
        among = worth_trying([candidates(expert, seen, itemsize=2)])
        first = time.process_time()
        candidates(expert, seen, itemsize=2, among=among)
        seconds = f"{first - start:.2f} | {time.process_time() - first:.2f}"
        print(f"| {size} | {seconds} | {len(among)} |", flush=True)


def largest_error(found: dict[str, float], expected: dict[str, float], form: str = "") -> tuple[float, float, float]:
    """Of the candidates of a format the largest relative error, the error and the share of the least damage."""
    whole = max(expected.values())
    errors = [
        (v / whole, abs(found[k] / v - 1)) for k, v in expected.items() if v > 1e-9 * whole and k.startswith(form)
    ]
    least, error = min(errors)
    return max(e for _, e in errors), error, least


def print_accuracy(sizes: list[str]) -> None:
    """A table of relative errors of float32 damages."""
    print("| hidden x intermediate x tokens | format | largest relative error | of the least damage | which is |")
    print("|---" * 5 + "|")
    for size in sizes:
        hidden, inner, tokens = numbers_of(size)
        expert, seen = draw_expert(hidden, inner, tokens)
        assert expert.gate_IH is not None
        exact = Expert(expert.up_IH.double(), expert.down_HI.double(), swiglu, expert.gate_IH.double())
        found, expected = damages(expert, seen), damages(exact, seen)
        for form in ("empty", "narrow", "low_rank"):
            largest, error, least = largest_error(found, expected, form)
            print(f"| {size} | {form} | {largest:.1e} | {error:.1e} | {least:.1e} of the empty expert's |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--sizes", nargs="+", help="hidden x intermediate x tokens, as in 2048x768x2048")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", nargs="*", help="what is tried, default all")
    parser.add_argument("--accuracy", action="store_true", help="relative errors of damages instead of seconds")
    parser.add_argument("--others", action="store_true", help="seconds of experts after the first ones of a block")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.threads, arguments.formats)
    elif arguments.others:
        print_others(arguments.sizes or list(SIZES), arguments.threads)
    elif arguments.accuracy:
        print_accuracy(arguments.sizes or list(SMALL))
    else:
        print(f"torch {torch.__version__}, {arguments.threads} thread, median of {arguments.turns}.\n")
        sizes = arguments.sizes or list(SIZES)
        print_speed(sizes, arguments.against, arguments.turns, arguments.threads, arguments.formats)


if __name__ == "__main__":
    main()
