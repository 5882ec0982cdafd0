"""Train the two small MoE language models that the tests, the demo and the quality tables run on.

    python benchmarks/train_reference.py --output tests/data/reference
    python benchmarks/train_reference.py --model deepseek_v3 --documents-of tests/data/reference \\
        --output tests/data/reference_deepseek --threads 1

Both are trained from scratch on the text of `reference_text.py` with the documents of `HELD_OUT` left out, with one
4,096-token byte-level BPE. They route differently:

    qwen3_moe     4 blocks of 32 experts, top-4 of a softmax, balanced by a loss. `--balance` says whether over the
                  whole model, which is the loss that comes with transformers and leaves blocks with frequent and rare
                  experts, or in every block.
    deepseek_v3   3 blocks of 24 experts and a shared one behind a dense layer, top-4 of the better of two groups by
                  sigmoid scores, balanced without a loss by the correction bias (`--bias-rate`).

Deterministic given `--seed` on one machine. Interrupt it at will: it continues from the last of its own checkpoints
(`--work`). Writes `model/` (bfloat16) and `training.json` (last loss, seconds, settings) and, unless `--documents-of`
names a folder that has them, `calibration.jsonl` and `held_out.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reference_text import CACHE, Document, load_documents, split_documents
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.utils import ModelOutput

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which serves as beginning, end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def qwen3_moe_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def deepseek_v3_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=24,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=2,
        # With both groups selected they would have no effect.
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def wide_config() -> Qwen3MoeConfig:
    """Not bundled: with rows that llama.cpp's K-quants divide, super-blocks of 256."""
    config = qwen3_moe_config()
    config.update(
        {
            "hidden_size": 256,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    return config


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": qwen3_moe_config,
    "deepseek_v3": deepseek_v3_config,
    "qwen3_moe_wide": wide_config,
}


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """All documents as one row of token ids, each behind an end-of-text token."""
    ids: list[int] = []
    for document in documents:
        ids.append(tokenizer.eos_token_id)
        for line in document.text.splitlines(keepends=True):
            ids.extend(tokenizer(line)["input_ids"])
    return torch.tensor(ids, dtype=torch.int32)


def batch_at(stream_T: torch.Tensor, step: int, arguments: argparse.Namespace) -> torch.Tensor:
    """The batch of one step, a function of the step alone, so that a resumed run sees the same data."""
    rows = (len(stream_T) - 1) // arguments.length
    order = [*range(rows)]
    first = step * arguments.batch
    epoch = first // rows
    random.Random(arguments.seed * 1000 + epoch).shuffle(order)
    picked = [order[(first + i) % rows] for i in range(arguments.batch)]
    return torch.stack([stream_T[r * arguments.length : (r + 1) * arguments.length] for r in picked]).long()


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    if step < arguments.warmup:
        return arguments.learning_rate * (step + 1) / arguments.warmup
    progress = (step - arguments.warmup) / max(1, arguments.steps - arguments.warmup)
    return arguments.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformers' balancing loss, block by block; the one that comes with transformers pools all blocks."""
    losses = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        selected_TE = torch.zeros_like(probability_TE).scatter_(1, probability_TE.topk(top_k).indices, 1.0)
        losses.append(logits_TE.shape[1] / top_k * (selected_TE.mean(0) * probability_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def auxiliary_loss(out: ModelOutput, config: PreTrainedConfig, arguments: argparse.Namespace) -> torch.Tensor | float:
    """What is added to the cross entropy; 0 for an architecture that is balanced by its correction bias."""
    if config.model_type == "deepseek_v3":
        return 0.0
    if arguments.balance == "block":
        return arguments.balance_weight * balancing_loss(out.router_logits, config.num_experts_per_tok)
    return arguments.balance_weight * out.aux_loss


class BiasBalancer:
    """Balances routers with a correction bias as DeepSeek-V3 does: overloaded experts down, underloaded ones up.

    Args:
        model: Its routers without `e_score_correction_bias` are left alone.
        rate: What is added to or taken from a bias after each step.
    """

    def __init__(self, model: PreTrainedModel, rate: float) -> None:
        self.rate = rate
        self.routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.loads: dict[torch.nn.Module, torch.Tensor] = {}
        for router in self.routers:
            router.register_forward_hook(self._count)

    def _count(self, router: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        *_, selected_TK = output
        self.loads[router] = torch.bincount(selected_TK.flatten(), minlength=len(router.e_score_correction_bias))

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the loads of the last forward pass."""
        for router in self.routers:
            load_E = self.loads[router].float()
            router.e_score_correction_bias += self.rate * torch.sign(load_E.mean() - load_E)


def trained_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and the correction biases, which are buffers."""
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {**{name: p.detach() for name, p in model.named_parameters()}, **biases}


def save_state(path: Path, step: int, seconds: float, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    beside = path.with_suffix(".writing")
    save_file({k: v.contiguous() for k, v in tensors.items()}, beside)
    beside.rename(path)
    path.with_suffix(".json").write_text(json.dumps({"step": step, "seconds": seconds}), encoding="utf-8")


def load_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not path.with_suffix(".json").exists():
        return 0, 0.0
    tensors = load_file(path)
    for name, tensor in trained_tensors(model).items():
        tensor.copy_(tensors[f"model.{name}"])
    for name, p in model.named_parameters():
        optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    state = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return state["step"], state["seconds"]


def train(stream_T: torch.Tensor, arguments: argparse.Namespace) -> tuple[PreTrainedModel, list[float], float]:
    """Train for `arguments.steps` steps; returns the float32 model, the loss of each step of this run, seconds."""
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[arguments.model]())
    model.set_experts_implementation("grouped_mm")
    balancer = BiasBalancer(model, arguments.bias_rate)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.95)
    )
    state = arguments.work / f"{arguments.model}.safetensors"
    first, seconds = load_state(state, model, optimizer)
    losses = []
    progress = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, mininterval=10)
    for step in progress:
        started = time.perf_counter()
        ids = batch_at(stream_T, step, arguments)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        out = model(input_ids=ids, output_router_logits=True, use_cache=False)
        logits = out.logits[:, :-1].reshape(-1, VOCABULARY).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
        (loss + auxiliary_loss(out, model.config, arguments)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balancer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if (step + 1) % arguments.save_every == 0:
            save_state(state, step + 1, seconds, model, optimizer)
    return model, losses, seconds


def check_same_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Raise a ValueError unless `folder / "model"` has this very tokenizer."""
    bundled = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    if bundled.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise ValueError(
            f"--documents-of wants a folder that was made from the same text, but the tokenizer in {folder / 'model'} "
            "is not the one that was trained just now. Train that model again, or leave --documents-of out."
        )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """In bfloat16, but for correction biases, which transformers loads in float32 whatever the dtype."""
    biases = {name: b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    model.to(torch.bfloat16)
    for name, bias in biases.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, bias)
    model.save_pretrained(folder)


def write_documents(path: Path, documents: list[Document]) -> None:
    lines = [json.dumps({"title": d.title, "text": d.text}, ensure_ascii=False) for d in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="qwen3_moe")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents-of", type=Path, help="folder of a model whose documents and tokenizer serve both")
    parser.add_argument("--work", type=Path, default=CACHE.parent / "train_reference")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    # Another number of threads gives other bits: sums are split differently.
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--balance", choices=("model", "block"), default="model")
    parser.add_argument("--balance-weight", type=float, default=0.01)
    parser.add_argument("--bias-rate", type=float, default=1e-3, help="of deepseek_v3, which has no balancing loss")
    parser.add_argument("--stream-only", action="store_true", help="only write tokens, for gpu_study.py")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written, and filling it takes a sixth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)

    training, calibration, held_out = split_documents(load_documents())
    tokenizer = train_tokenizer(training)
    stream_T = token_stream(tokenizer, training)
    print(f"{len(training)} training documents, {len(stream_T):,} tokens", flush=True)
    if arguments.stream_only:
        streams = {"training": stream_T, "held_out": token_stream(tokenizer, held_out)}
        save_file({n: s.to(torch.int16) for n, s in streams.items()}, arguments.output / "stream.safetensors")
        return
    if arguments.documents_of:
        check_same_tokenizer(tokenizer, arguments.documents_of)
    model, losses, seconds = train(stream_T, arguments)

    save_model(model, arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    if not arguments.documents_of:
        write_documents(arguments.output / "calibration.jsonl", calibration)
        write_documents(arguments.output / "held_out.jsonl", held_out)
    unused = {"stream_only", *(("balance", "balance_weight") if arguments.model == "deepseek_v3" else ("bias_rate",))}
    settings = {name: v for name, v in vars(arguments).items() if isinstance(v, (int, float, str))}
    record = {
        "settings": {name: value for name, value in settings.items() if name not in unused},
        "training_tokens": len(stream_T),
        "seen_tokens": arguments.steps * arguments.batch * arguments.length,
        "seconds": round(seconds),
        "last_loss": sum(losses[-50:]) / max(1, len(losses[-50:])),
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
