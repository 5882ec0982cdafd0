"""What a hypernetwork in the place of removed experts wins back, next to plain parts of as many bytes.

    python benchmarks/hyper_experts.py [--on reference] [--train experts] [--tokens 100000] [--seeds 0 1]

Half of the experts are pruned (REAP), and the model is trained on the original's predictions. HyperMoE (Zhao et al.,
ACL 2024, arXiv:2402.12656) gives every expert an embedding; a hypernetwork turns the embeddings of the experts that a
token does not reach into the weights of a small expert, whose output is added. Here these are the removed experts that
the original's router would have selected, weighted as it weighs them; the hypernetwork is shared by all blocks, as in
the paper. Beside it, with the same tokens and the same training: nothing, a shared expert, one more expert in each
router group, and what `ExpertPruning(leaves=...)` leaves of removed experts. Bytes are those of the whole model at two
bytes a parameter, multiply-adds those that a block does more for each token. KL to the original in nats a token on the
bundled held-out documents, which neither calibration nor training sees.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from recovery import training_text
from reference import CALIBRATION, HELD_OUT, REFERENCES, Reference
from reference_text import CACHE
from torch import Tensor, nn
from torch.nn import functional

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.recovery.run import default_rate
from optimum_moe.recovery.trainable import blocks_of, trained_names
from optimum_moe.recovery.trainer import step_share

LENGTH, ROWS = 256, 4
HELD_OUT_TOKENS = 8192
Lessons: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Batches of tokens, with the logits of the original."""
RATES = {"hyper": 2e-3, "shared": 5e-4}
"""Learning rates of the parts that are added, chosen on seed 2 and 50,000 tokens among 5e-4, 2e-3 and 8e-3."""


class SharedExpert(nn.Module):
    """One more expert for all tokens, which begins without an output."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2 * width, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.zeros(hidden, width))
        self.multiply_adds = 3 * hidden * width

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) what is added."""
        gate_TI, up_TI = functional.linear(x_TH, self.gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate_TI) * up_TI, self.down)


class HyperNetwork(nn.Module):
    """Weights of a small expert from the embedding of what a token misses; shared by all blocks."""

    def __init__(self, hidden: int, blocks: int, rank: int, inner: int, embedding: int) -> None:
        super().__init__()
        self.rank = rank
        self.layers = nn.Parameter(torch.randn(blocks, embedding))
        self.process = nn.Sequential(nn.Linear(2 * embedding, inner), nn.ReLU(), nn.Linear(inner, inner))
        self.down = nn.Parameter(torch.randn(rank * hidden, inner) * (hidden * inner) ** -0.5)
        self.up = nn.Parameter(torch.zeros(rank * hidden, inner))

    def forward(self, x_TH: Tensor, missed_TD: Tensor, block: int) -> Tensor:
        """(T, H) outputs of the experts of these tokens, from (T, D) weighted embeddings."""
        layer_TD = self.layers[block].expand(len(x_TH), -1)
        code_TC = self.process(torch.cat([missed_TD, layer_TD], -1))
        down_TRH = functional.linear(code_TC, self.down).view(len(x_TH), self.rank, -1)
        up_TRH = functional.linear(code_TC, self.up).view(len(x_TH), self.rank, -1)
        inner_TR = functional.relu(torch.einsum("trh,th->tr", down_TRH, x_TH))
        return torch.einsum("tr,trh->th", inner_TR, up_TRH)


class HyperExpert(nn.Module):
    """A block's share of the hypernetwork: the original's router, and embeddings of the removed experts."""

    def __init__(self, network: HyperNetwork, block: int, router: nn.Module, removed: Tensor, embedding: int) -> None:
        super().__init__()
        self.network, self.block = network, block
        self.router = router.requires_grad_(False)
        self.embeddings = nn.Parameter(torch.randn(len(removed), embedding))
        own = 2 * network.rank * router.weight.shape[1]
        generated = sum(p.numel() for p in network.parameters()) - network.layers.numel()
        self.multiply_adds = generated + own + router.weight.numel()
        slots = torch.full((router.weight.shape[0],), -1)
        slots[removed] = torch.arange(len(removed))
        self.register_buffer("slots", slots)

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) what is added."""
        with torch.no_grad():
            _, weights_TK, index_TK = self.router(x_TH)
        slot_TK = self.slots[index_TK]
        weights_TK = weights_TK.to(x_TH.dtype).masked_fill(slot_TK < 0, 0)
        missed_TD = torch.einsum("tk,tkd->td", weights_TK, self.embeddings[slot_TK.clamp(min=0)])
        # A token that misses nothing gets nothing.
        return weights_TK.sum(-1, keepdim=True) * self.network(x_TH, missed_TD, self.block)


@dataclass(frozen=True)
class Variant:
    """A pruned model with something in the place of removed experts.

    Args:
        name: What the table calls it.
        more: Experts that every router group keeps beside half of them.
        leaves: What pruning leaves of a removed expert.
        part: `"shared"` or `"hyper"` for a part that is added to each block.
    """

    name: str
    more: int = 0
    leaves: str = "nothing"
    part: str | None = None


VARIANTS = (
    Variant("nothing"),
    Variant("hypernetwork", part="hyper"),
    Variant("shared expert", part="shared"),
    Variant("low-rank maps, rank 8", leaves="low_rank"),
    Variant("constants", leaves="constant"),
    Variant("one more expert a router group", more=1),
)


def compressed(reference: Reference, variant: Variant, seed: int) -> tuple[Any, MoECompressor]:
    half = reference.experts_at(0.5)
    assert half is not None
    rank = 8 if variant.leaves == "low_rank" else None
    stage = ExpertPruning(
        num_experts=half + variant.more * reference.router_groups, saliency="reap", leaves=variant.leaves, rank=rank
    )
    calibration = CalibrationConfig(str(CALIBRATION), sequence_length=LENGTH, max_tokens=32768, seed=seed)
    compressor = MoECompressor.from_pretrained(reference.model, stage, calibration, progress=False)
    return compressor.apply().float(), compressor


def add_part(model: Any, teacher: Any, compressor: MoECompressor, variant: Variant, width: int) -> list[nn.Module]:
    """Put a part beside the experts of each block; nothing for a variant without one."""
    blocks = blocks_of(model)
    hidden, embedding = blocks[0].info.hidden_size, 32
    network = HyperNetwork(hidden, len(blocks), rank=8, inner=48 - 4 * (len(blocks) == 3), embedding=embedding)
    parts: list[nn.Module] = []
    assert compressor.plan is not None
    for number, found in enumerate(blocks):
        labels = torch.as_tensor(compressor.plan.blocks[found.info.name].labels_E)
        router = teacher.get_submodule(found.info.name).gate
        removed = (labels < 0).nonzero().flatten()
        if variant.part == "shared":
            parts.append(SharedExpert(hidden, width))
        elif variant.part == "hyper":
            copied = type(router)(teacher.config)
            copied.load_state_dict(router.state_dict())
            parts.append(HyperExpert(network, number, copied, removed, embedding))
        else:
            continue
        found.module(model).register_forward_hook(adding(parts[-1]))
    return parts


def adding(part: nn.Module) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        x_BSH = inputs[0]
        extra_BSH = part(x_BSH.flatten(0, -2)).view_as(x_BSH)
        return (output[0] + extra_BSH, *output[1:]) if isinstance(output, tuple) else output + extra_BSH

    return hook


def batches_of(texts: list[tuple[list[str], float]], tokenizer: Any, tokens: int, seed: int) -> list[Tensor]:
    """Batches of rows from the beginning of random documents, as many from each source."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    count = -(-tokens // LENGTH // ROWS) * ROWS
    while len(rows) < count:
        documents, _ = texts[len(rows) % len(texts)]
        text = documents[int(torch.randint(len(documents), (1,), generator=generator))]
        start = int(torch.randint(max(1, len(text) - 8 * LENGTH), (1,), generator=generator))
        ids = tokenizer(text[start : start + 8 * LENGTH])["input_ids"][:LENGTH]
        if len(ids) == LENGTH:
            rows.append(torch.tensor(ids))
    return list(torch.stack(rows).split(ROWS))


def held_out_batches(tokenizer: Any) -> list[Tensor]:
    """As many tokens of each held-out document."""
    texts = [json.loads(line)["text"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    each = HELD_OUT_TOKENS // len(texts) // LENGTH * LENGTH
    ids = [tokenizer(text)["input_ids"][:each] for text in texts]
    return [torch.tensor(row).view(-1, LENGTH) for row in ids]


def divergence(teacher_BSV: Tensor, student_BSV: Tensor) -> Tensor:
    target = functional.log_softmax(teacher_BSV.float(), -1)
    return functional.kl_div(functional.log_softmax(student_BSV, -1), target, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def measured(model: Any, lessons: Lessons) -> float:
    values = [divergence(target, model(ids).logits).flatten() for ids, target in lessons]
    return float(torch.cat(values).mean())


def train(model: Any, parts: list[nn.Module], what: str, lessons: Lessons, rate: float, part_rate: float) -> None:
    """AdamW with a warm-up and a cosine, as `recover` has it; the last state is kept."""
    model.requires_grad_(False)
    groups = []
    for name in trained_names(model, what):
        parameter = model.get_parameter(name).requires_grad_(True)
        groups.append({"params": [parameter], "lr": rate * step_share(parameter)})
    own = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    groups += [{"params": list(own.values()), "lr": part_rate}] if own else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(0.05 * len(lessons)), len(lessons))
    for ids, target in lessons:
        divergence(target, model(ids, use_cache=False).logits).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Outcome:
    """What became of one training.

    Args:
        bytes: Of the whole model, at two bytes a parameter.
        multiply_adds: Of the added part, for each token and block.
        before: KL before the training.
        after: KL after it.
    """

    bytes: int
    multiply_adds: int
    before: float
    after: float


def bytes_of(model: Any, parts: list[nn.Module]) -> int:
    own = {id(p): p.numel() for module in (model, *parts) for p in module.parameters()}
    return 2 * sum(own.values())


def outcomes(reference: Reference, arguments: argparse.Namespace, seed: int) -> Iterator[tuple[Variant, Outcome]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(reference.model, dtype=torch.float32).eval()
    with torch.no_grad():
        batches = batches_of(training_text(arguments.text), tokenizer, arguments.tokens, seed)
        lessons = [(ids, teacher(ids).logits.half()) for ids in batches]
        held_out = [(ids, teacher(ids).logits) for ids in held_out_batches(tokenizer)]
    for variant in VARIANTS:
        if arguments.only and not any(name in variant.name for name in arguments.only):
            continue
        torch.manual_seed(seed)
        model, compressor = compressed(reference, variant, seed)
        parts = add_part(model, teacher, compressor, variant, reference.intermediate_size)
        before = measured(model, held_out)
        rates = default_rate(arguments.train, before), arguments.rate or RATES.get(variant.part or "", 0.0)
        train(model, parts, arguments.train, lessons, *rates)
        added = int(parts[0].multiply_adds) if parts else 0
        yield variant, Outcome(bytes_of(model, parts), added, before, measured(model, held_out))


def row(variant: Variant, found: list[Outcome]) -> str:
    after = [outcome.after for outcome in found]
    cells = [variant.name, f"{found[0].bytes:,}", f"{found[0].multiply_adds:,}"]
    cells += [f"{sum(outcome.before for outcome in found) / len(found):.4f}", f"{sum(after) / len(after):.4f}"]
    return f"| {' | '.join(cells)} | {', '.join(f'{kl:.4f}' for kl in after)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--train", choices=("router", "experts"), default="experts")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of calibration, text and parts")
    parser.add_argument("--rate", type=float, help="learning rate of the added part")
    parser.add_argument("--only", nargs="*", help="variants whose names contain one of these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, default=CACHE, help="where the training text is, or is downloaded to")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    reference = REFERENCES[arguments.on]
    found: dict[Variant, list[Outcome]] = {}
    for seed in arguments.seeds:
        for variant, outcome in outcomes(reference, arguments, seed):
            found.setdefault(variant, []).append(outcome)
            print(arguments.on, arguments.train, seed, variant.name, outcome, flush=True)
    said = f"{arguments.tokens:,} tokens, seeds {', '.join(map(str, arguments.seeds))}; {arguments.train} trained."
    lines = [reference.source_line, "", said, ""]
    lines += [
        "| for removed experts | bytes | added multiply-adds | KL cut | KL trained | each seed |",
        "|---" * 6 + "|",
    ]
    lines += [row(variant, each) for variant, each in found.items()]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
