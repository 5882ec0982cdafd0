"""What the package does on one GPU: right, how fast to compress, how fast to run, and how good.

    python benchmarks/gpu_study.py [--only a b c d e f] [--minutes 5] [--device cuda:0]

Phases, each printed as it ends:

    a   the tests marked `device`
    b   compressing one layer of true shape (2048 x 768 x 128 and 4096 x 1536 x 128): seconds and peak memory of each
        preset, observation apart
    c   prefill and decode of a layer in bfloat16: experts in compressed forms, merged and pruned ones beside the stock
        layer in its fastest implementation, with the ratio that FLOPs and bytes promise
    d   an MoE of about 100M parameters, trained for some minutes on a stream of tokens (`--stream`, made by
        `train_reference.py --stream-only`), and the table of methods at 75, 50 and 25% of the experts' bytes on it
    e   experts of any width and rank in the vLLM plugin's launches, beside the stock layer (`ragged_experts.py`); less
        than a minute, needs Triton
    f   what training wins back on the model of d, which has to be there: routers, then all that is stored of experts,
        of half of the experts pruned by REAP and of the byte budget at a quarter; needs accelerate

Before them the card's own limits: a large copy, and a large matmul in bfloat16. `--small` shrinks every size, so that
the script runs on a CPU within a minute.
"""

from __future__ import annotations

import argparse
import gc
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from factorized_speed import compressed_block, mixed, predicted, random_factors, uniform
from gpu_timing import captured, milliseconds
from layer_speed import Layer, cut_block, random_block
from torch import nn

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.formats import PROJECTIONS, ExpertsSpec

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"30B": (2048, 768, 128), "235B": (4096, 1536, 128)}
"""Hidden size, width and number of experts of the layers of Qwen3-30B-A3B and Qwen3-235B-A22B."""
TOP_K = 8
TRAINED = ROOT / ".cache" / "gpu_study" / "model"
"""The model of phase d."""
LENGTHS = (1, 8, 64, 4096)
"""Tokens of a forward pass; more than 64 are prefill."""


class OutOfTime(Exception):
    """A step took longer than it may."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Study:
    """Where and how large."""

    device: torch.device
    small: bool
    until: float
    stream: Path | None

    @property
    def on_gpu(self) -> bool:
        """Whether times are those of a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.perf_counter()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Median over runs, each waited for."""
        return milliseconds(run, self.device)

    def peak_gib(self) -> float:
        """Most memory since `fresh`."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0

    def fresh(self) -> None:
        """Let go of memory."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def say(line: str = "") -> None:
    print(line, flush=True)


def limits(study: Study) -> tuple[float, float]:
    """(bytes a second of a copy, multiply-adds x 2 a second of a bfloat16 matmul)."""
    count, side = (2**20, 256) if study.small else (2**30, 8192)
    source = torch.randn(count, device=study.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = study.milliseconds(lambda: target.copy_(source))
    left, right = (torch.randn(side, side, device=study.device, dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = study.milliseconds(lambda: left @ right)
    rates = 4 * count / copy_ms * 1e3, 2 * side**3 / matmul_ms * 1e3
    say(f"copy {rates[0] / 1e12:.2f} TB/s, bfloat16 matmul {rates[1] / 1e12:.0f} TFLOP/s")
    return rates


# Phase a


def run_tests(study: Study) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "device",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "tests/test_device.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=max(60, study.left()),
    )
    say(done.stdout[-6000:])
    if done.returncode:
        say(done.stderr[-1500:])


# Phase b


def one_layer(hidden: int, width: int, experts: int, top_k: int, study: Study, layers: int = 1) -> Any:
    """A model of one decoder layer with random weights whose spectra decay, as trained ones do."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        head_dim=min(128, hidden),
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(study.device):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                # Columns of unlike size: what the activations of real models look like.
                parameter.normal_(0, 0.02).mul_(torch.linspace(1.5, 0.1, parameter.shape[-1], device=study.device))
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.02)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def compress_layers(study: Study) -> None:
    presets: dict[str, Any] = {
        "reap, half of the experts": lambda n: ExpertPruning(num_experts=n // 2),
        "m-smoe, half of the experts": lambda n: MSMoE(num_experts=n // 2),
        "whitened low rank, half of the bytes": lambda n: LowRankSparse(rank_ratio=0.5, density=None),
        "byte budget, half of the bytes": lambda n: ByteBudget(runs_in="transformers", share=0.5),
    }
    rows, length = (4, 32) if study.small else (32, 512)
    for label, (hidden, width, experts) in SHAPES.items():
        if study.small:
            hidden, width, experts = 64, 32, 16
        say(f"{label}: one layer {hidden} x {width} x {experts}, top-{TOP_K}, bfloat16, {rows * length:,} tokens")
        head = f"{'preset':<40}{'experts':>8}{'observe s':>11}{'decide and cut s':>18}"
        say(f"{head}{'a layer of all s':>18}{'peak GiB':>10}")
        for name, method in presets.items():
            is_slow = name.startswith(("byte budget", "whitened"))
            count = experts if not is_slow or study.small else 8
            limit = min(study.left(), 60.0)
            if limit < 5:
                say(f"{name:<40} not started: no time left")
                continue
            try:
                with at_most(limit):
                    study.fresh()
                    model = one_layer(hidden, width, count, min(TOP_K, count // 2), study)
                    data = [{"input_ids": torch.randint(0, 2048, (8, length))} for _ in range(rows // 8 or 1)]
                    compressor = MoECompressor.from_pretrained(
                        model, method(count), CalibrationConfig(data, unseen="keep"), progress=False
                    )
                    start = time.perf_counter()
                    seen = compressor.calibrate()
                    study.synchronize()
                    observed = time.perf_counter() - start
                    compressor.apply(statistics=seen)
                    study.synchronize()
                    cut = time.perf_counter() - start - observed
                line = f"{name:<40}{count:>8}{observed:>11.2f}{cut:>18.2f}"
                say(f"{line}{cut * experts / count:>18.1f}{study.peak_gib():>10.2f}")
            except Exception as error:
                say(f"{name:<40}{count:>8} {type(error).__name__}: {str(error)[:300]}")
                if not isinstance(error, OutOfTime):
                    say(traceback.format_exc(limit=-4))
        if study.small:
            break


# Phase c


def narrower(layer: Layer, width: int) -> ExpertsSpec:
    """Every expert with fewer neurons."""
    return ExpertsSpec((width,) * layer.num_experts, PROJECTIONS)


def forms(layer: Layer) -> dict[str, ExpertsSpec]:
    half = int(0.5 * layer.hidden * layer.intermediate / (layer.hidden + layer.intermediate)) // 8 * 8
    draw = random.Random(0)
    widths = tuple(draw.randrange(8, layer.intermediate + 1, 8) for _ in range(layer.num_experts))
    return {
        "half of the neurons, one width": narrower(layer, layer.intermediate // 2),
        "half of the neurons, all widths": ExpertsSpec(widths, PROJECTIONS),
        f"rank {half}": uniform(layer, half, 0.0),
        f"rank {half // 2}, rows 10%": uniform(layer, half // 2, 0.1),
        "mixture of forms": mixed(layer),
    }


def compressed_blocks(
    layer: Layer, stock: Any, surgeon: Any, study: Study
) -> Iterator[tuple[str, nn.Module, ExpertsSpec | None]]:
    """Name, block and sizes of each form; a merged block has no sizes of its own."""
    for name, sizes in forms(layer).items():
        with study.device:
            factors = random_factors(sizes, layer.hidden, torch.bfloat16)
        kept = replace(layer, num_groups=layer.num_experts)
        yield name, compressed_block(stock, surgeon, factors, kept).to(study.device), sizes
    with study.device:
        merged, merging = random_block(layer, torch.bfloat16)
    cut_block(merged, merging, layer)
    yield "merged to half (map)", merged, None


@torch.no_grad()
def layer_speed(study: Study, rates: tuple[float, float]) -> None:
    for label, (hidden, width, experts) in SHAPES.items():
        if study.small:
            hidden, width, experts = 256, 192, 16
        layer = Layer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", experts, TOP_K, experts // 2, hidden, width, ())
        study.fresh()
        with study.device:
            stock, surgeon = random_block(layer, torch.bfloat16)
        say(f"{label}: {experts} experts of {hidden} x {width}, top-{TOP_K}, bfloat16")
        head = f"{'form':<34}{'tokens':>7}{'implementation':>16}{'ms':>10}"
        say(f"{head}{'graph ms':>11}{'ratio':>8}{'promised':>10}{'floor ms':>10}")
        lengths = (1, 128) if study.small else LENGTHS
        inputs = {t: torch.randn(1, t, hidden, device=study.device, dtype=torch.bfloat16) for t in lengths}
        fastest = {
            tokens: measure(study, "stock", stock, inputs[tokens], tokens, 1.0, None, layer, rates) for tokens in inputs
        }

        for name, block, sizes in compressed_blocks(layer, stock, surgeon, study):
            for tokens in inputs:
                if study.left() < 5:
                    say("no time left")
                    return
                promised = 0.0
                if sizes is not None:
                    index_TK = stock.gate(inputs[tokens][0])[2].cpu()
                    promised = predicted(layer, sizes, [index_TK], tokens > 64)
                measure(study, name, block, inputs[tokens], tokens, promised, fastest[tokens], layer, rates)
            del block
            study.fresh()
        if study.small:
            break


def measure(
    study: Study,
    name: str,
    block: Any,
    input_1TH: torch.Tensor,
    tokens: int,
    promised: float,
    below: float | None,
    layer: Layer,
    rates: tuple[float, float],
) -> float:
    """Print a line for each implementation; returns the milliseconds of the fastest."""
    matrix = 3 * layer.hidden * layer.intermediate
    hit = min(layer.num_experts, tokens * TOP_K)
    floor = 1e3 * max(
        2 * matrix * hit * (promised or 1) / rates[0], 2 * matrix * tokens * TOP_K * (promised or 1) / rates[1]
    )
    best = float("inf")
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        is_large = tokens > 64
        if (implementation == "batched_mm" and (hasattr(block.experts, "factors") or is_large)) or (
            implementation == "eager" and tokens > 64 and not hasattr(block.experts, "factors") and not study.small
        ):
            continue
        block.experts.config._experts_implementation = implementation
        try:
            spent = study.milliseconds(lambda: block(input_1TH))
            fits = study.on_gpu and implementation != "eager"
            graph = captured(lambda: block(input_1TH)) if fits else "none"
            replayed = study.milliseconds(graph) if callable(graph) else None
        except Exception as error:
            say(f"{name:<34}{tokens:>7}{implementation:>16} {type(error).__name__}: {str(error)[:160]}")
            continue
        best = min(best, spent)
        shown = f"{replayed:.3f}" if replayed is not None else str(graph)[:10]
        ratio = f"{spent / below:.2f}" if below else ""
        say(
            f"{name:<34}{tokens:>7}{implementation:>16}{spent:>10.3f}{shown:>11}{ratio:>8}"
            f"{promised:>10.2f}{floor:>10.3f}"
        )
    return best


# Phase d


def train_and_compare(study: Study) -> None:
    """Train, then print KL and perplexity of every method on tokens that training did not see."""
    from safetensors.torch import load_file

    assert study.stream is not None
    streams = load_file(study.stream)
    training_T, held_T = streams["training"].long(), streams["held_out"].long()
    small = study.small
    hidden, layers, experts, width, batch, length = (64, 2, 8, 32, 4, 64) if small else (512, 8, 64, 128, 128, 256)
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4 if small else 8,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(study.device)
    model.set_experts_implementation("grouped_mm" if study.on_gpu else "eager")
    held = held_T[: (8 if small else 64) * 256].view(-1, 256)
    seconds = 20.0 if small else min(200.0, study.left() * 0.45)
    train(study, model, training_T.to(study.device), batch, length, seconds)
    model.to(torch.bfloat16).eval()
    model.save_pretrained(TRAINED)
    reference = log_probabilities(study, model, held)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"trained: {parameters:.1f}M parameters, held-out perplexity {perplexity(reference, held):.2f}")
    data = batches(training_T, 2 if small else 16)
    say(f"{'experts’ bytes':<16}{'method':<24}{'perplexity':>12}{'KL':>9}{'top-1':>8}{'seconds':>9}")
    seen = None
    methods: dict[str, Callable[[float], Any]] = {
        "byte budget": lambda share: ByteBudget(runs_in="transformers", share=share),
        "neurons only": lambda share: ByteBudget(runs_in="transformers", share=share, formats=["narrow"]),
        "REAP": lambda share: ExpertPruning(num_experts=int(experts * share)),
        "frequency": lambda share: ExpertPruning(num_experts=int(experts * share), saliency="frequency"),
        "random": lambda share: ExpertPruning(num_experts=int(experts * share), saliency="random"),
        "M-SMoE": lambda share: MSMoE(num_experts=int(experts * share)),
    }
    for share in (0.75, 0.5, 0.25):
        for name, method in methods.items():
            if study.left() < 8:
                say("no time left")
                return
            try:
                with at_most(study.left()):
                    study.fresh()
                    start = time.perf_counter()
                    compressor = MoECompressor.from_pretrained(
                        TRAINED, method(share), CalibrationConfig(data), device_map=str(study.device), progress=False
                    )
                    # The byte budget comes first, because it wants gradients beside what the others observe.
                    seen = seen or compressor.calibrate()
                    made = compressor.apply(statistics=seen)
                    spent = time.perf_counter() - start
                    found = log_probabilities(study, made, held)
                    divergence = float((reference.exp() * (reference - found)).sum(-1).mean())
                    agreement = float((reference.argmax(-1) == found.argmax(-1)).double().mean())
                say(
                    f"{f'{share:.0%}':<16}{name:<24}{perplexity(found, held):>12.2f}{divergence:>9.4f}{agreement:>8.3f}"
                    f"{spent:>9.1f}"
                )
                del made, compressor, found
            except Exception as error:
                say(f"{f'{share:.0%}':<16}{name:<24} {type(error).__name__}: {str(error)[:200]}")
                if not isinstance(error, OutOfTime):
                    say(traceback.format_exc(limit=-4))


def batches(stream_T: torch.Tensor, number: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 8 rows of 512 tokens, from the start of a stream."""
    return [{"input_ids": rows.view(8, 512)} for rows in stream_T[: number * 8 * 512].split(8 * 512)]


def train(study: Study, model: Any, stream_T: torch.Tensor, batch: int, length: int, seconds: float) -> None:
    """AdamW in bfloat16 autocast, with a learning rate that falls to zero at the end of the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    started, step, loss = time.perf_counter(), 0, torch.zeros(())
    while (spent := time.perf_counter() - started) < seconds:
        rate = 2e-3 * min(1.0, (step + 1) / 50) * max(0.02, 1 - spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        first_B = torch.randint(0, len(stream_T) - length - 1, (batch,), generator=generator)
        ids = stream_T[first_B.to(study.device)[:, None] + torch.arange(length, device=study.device)]
        with torch.autocast(study.device.type, torch.bfloat16):
            output = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    say(f"{step} steps of {batch * length:,} tokens in {spent:.0f} s, last loss {float(loss):.3f}")


@torch.no_grad()
def log_probabilities(study: Study, model: Any, held: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) on the CPU, of all but the last position of every row."""
    rows = [model(input_ids=row.to(study.device)).logits[:, :-1].float().log_softmax(-1).cpu() for row in held.split(8)]
    return torch.cat(rows).flatten(0, 1)


def perplexity(found: torch.Tensor, held: torch.Tensor) -> float:
    return float((-found.gather(1, held[:, 1:].reshape(-1, 1))).mean().exp())


# Phase e


def ragged_experts(study: Study) -> None:
    # The other phases run where Triton is not installed.
    from ragged_experts import FULL, TINY, lines

    for line in lines(FULL if study.on_gpu and not study.small else TINY, study.device):
        say(line)


# Phase f


def win_back(study: Study) -> None:
    """Train compressed models on the predictions of the original, and print what that wins back on other tokens."""
    from safetensors.torch import load_file

    from optimum_moe import recover

    assert study.stream is not None
    streams = load_file(study.stream)
    training_T, held_T = streams["training"].long(), streams["held_out"].long()
    tokens = 8_192 if study.small else 1_000_000
    # Not the tokens that are calibrated on.
    text, held_out = batches(training_T.flip(0), tokens // 4096), batches(held_T, 1 if study.small else 4)
    recipes = {
        "REAP, 50%": ExpertPruning(keep_ratio=0.5),
        "byte budget, 25%": ByteBudget(runs_in="transformers", share=0.25),
    }
    say(f"{'compressed':<20}{'trained':<10}{'KL before':>10}{'after':>9}{'won back':>10}{'seconds':>9}")
    for name, recipe in recipes.items():
        for parts in ("router", "experts"):
            if study.left() < 8:
                say("no time left")
                return
            study.fresh()
            calibration = CalibrationConfig(batches(training_T, 2 if study.small else 16))
            compressor = MoECompressor.from_pretrained(
                TRAINED, recipe, calibration, device_map=str(study.device), progress=False
            )
            student = compressor.apply()
            start = time.perf_counter()
            with at_most(study.left()):
                record = recover(
                    student,
                    teacher=TRAINED,
                    data=text,
                    held_out=held_out,
                    train=parts,
                    max_tokens=tokens,
                    progress=False,
                ).record
            say(
                f"{name:<20}{parts:<10}{record.kl_before:>10.4f}{record.kl_after:>9.4f}{record.won_back:>10.0%}"
                f"{time.perf_counter() - start:>9.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["a", "b", "c", "d", "e", "f"], default=["a", "b", "c"])
    parser.add_argument("--minutes", type=float, default=5.0, help="for all phases together")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stream", type=Path, help="safetensors file with int16 `training` and `held_out` token ids")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    study = Study(
        torch.device(arguments.device), arguments.small, time.perf_counter() + 60 * arguments.minutes, arguments.stream
    )
    card = torch.cuda.get_device_name() if study.on_gpu else "CPU"
    say(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}")
    rates = limits(study)
    phases = {
        "a": lambda: run_tests(study),
        "b": lambda: compress_layers(study),
        "c": lambda: layer_speed(study, rates),
        "d": lambda: train_and_compare(study),
        "e": lambda: ragged_experts(study),
        "f": lambda: win_back(study),
    }
    for name in arguments.only:
        say(f"\n## Phase {name}")
        start = time.perf_counter()
        try:
            phases[name]()
        except Exception:
            say(traceback.format_exc(limit=-6))
        say(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
