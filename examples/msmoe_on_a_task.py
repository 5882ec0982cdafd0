"""Merge, then compress on a task of your own, as the scripts of the paper's repository do it.

    python examples/msmoe_on_a_task.py google/switch-base-32 --train train.jsonl --dev dev.jsonl --test test.jsonl \\
        --output out

Each line of the files is {"input": ..., "target": ...}. The steps, each in a folder of its own under --output, so that
an interrupted run goes on:
    original    the model, fine-tuned on the task (--tuned where it is already)
    m-smoe      a quarter of the experts, merged by routing policy, then trained with the original as teacher
    mc-smoe     those in low rank and sparse rows, which are pruned while it trains with the same teacher
    baselines   as many experts by frequency pruning, by random pruning and by plain averages, trained like m-smoe
Then it prints for each the share of test examples answered exactly, McNemar's test against the original, the stored
bytes, FLOPs a token and seconds for the test. Works for encoder-decoder and for decoder-only models.

Hyper-parameters are those of the public scripts of "Merge, Then Compress" (arXiv:2310.01334); they tune the learning
rate by task. Where ours differ: AdamW has no weight decay (theirs 0.01) and the learning rate falls along a cosine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from optimum_moe import ExpertPruning, LowRankSparse, MoECompressor, MSMoE, recover
from optimum_moe.evaluation import EvaluationResult, LabeledExamples, check_splits, mcnemar, score_examples
from optimum_moe.stages import Stage

SCORE = "exact_match"
MERGED, SPARSE = "m-smoe", "mc-smoe"
BASELINES: dict[str, Stage] = {
    "frequency-pruning": ExpertPruning(keep_ratio=0.25, saliency="frequency"),
    "random-pruning": ExpertPruning(keep_ratio=0.25, saliency="random"),
    "plain-average": MSMoE(keep_ratio=0.25, weighting="uniform"),
}
CALIBRATION_EXAMPLES = 256
DISTILLATION: dict[str, Any] = {"task_weight": 1.0, "alpha": 0.2, "temperature": 2.0}
"""The loss of the paper: cross-entropy, and a fifth of the divergence from the original at temperature 2."""


@dataclass(frozen=True)
class Training:
    """How long and how fast a model trains.

    Args:
        epochs: Times that every example is seen.
        learning_rate: Of AdamW.
        batch_size: Examples of a step.
        embedding_factor: Times the learning rate for input embeddings; more than 1 for a training from scratch.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    embedding_factor: float = 1.0


PAPER = {
    "original": Training(epochs=20, learning_rate=3e-5, batch_size=8),
    MERGED: Training(epochs=10, learning_rate=2e-4, batch_size=16),
    SPARSE: Training(epochs=50, learning_rate=3e-5, batch_size=8),
}
"""The settings of `finetune-switch.sh`, `merge-by-usage-frequency-weighted.sh` and `post-merging-losparse.sh`."""


class TaskTrainer(Trainer):
    """Trains on labels, and measures on the dev split what counts: the targets that the model writes itself.

    Args:
        model: The model.
        arguments: Of the Trainer.
        train: Examples to train on.
        dev: Examples to choose the best epoch by.
        tokenizer: The tokenizer of the model.
        embedding_factor: As in `Training`.
        balance: Added to the loss, from the output and the inputs; for models that do not balance their routers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        train: LabeledExamples,
        dev: LabeledExamples,
        tokenizer: Any,
        embedding_factor: float = 1.0,
        balance: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None,
    ) -> None:
        rows = [{k: v[0].tolist() for k, v in row.items()} for row in train.batches(model, tokenizer, batch_size=1)]
        super().__init__(
            model,
            arguments,
            # Without the model: the collator would add decoder inputs, which the models make of the labels themselves.
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows,
            eval_dataset=rows[:1],
            processing_class=tokenizer,
        )
        self.dev, self.balance, self.embedding_factor = dev, balance, embedding_factor

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        assert isinstance(self.model, PreTrainedModel)
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        words = self.model.config.get_text_config().vocab_size
        embeddings = list({id(m.weight): m.weight for m in tables if m.num_embeddings == words}.values())
        rest = [p for p in self.model.parameters() if not any(p is table for table in embeddings)]
        rate = self.args.learning_rate
        groups = [{"params": rest}, {"params": embeddings, "lr": rate * self.embedding_factor}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        output = model(**inputs, output_router_logits=True)
        loss = output.loss if self.balance is None else output.loss + self.balance(output, inputs)
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the share of the dev split that is answered exactly."""
        assert isinstance(self.model, PreTrainedModel)
        result = score_examples(self.model, self.processing_class, self.dev, progress=False)
        metrics = {f"eval_{SCORE}": result.scores[SCORE].value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    train: LabeledExamples,
    dev: LabeledExamples,
    training: Training,
    balance: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Train a model on a task in place; the epoch that is best on the dev split is kept."""
    with TemporaryDirectory() as states:
        arguments = TrainingArguments(
            output_dir=states,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            per_device_train_batch_size=training.batch_size,
            train_sampling_strategy="group_by_length",
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="best",
            save_only_model=True,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=SCORE,
            label_names=["labels"],
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        TaskTrainer(model, arguments, train, dev, tokenizer, training.embedding_factor, balance).train()
    return model.eval()


def compress(original: Path, stages: list[Stage], data: list[dict[str, Any]], folder: Path) -> Path:
    """Observe a few training examples, cut, and write; nothing if the folder is there."""
    if not folder.is_dir():
        compressor = MoECompressor.from_pretrained(original, stages, data)
        compressor.apply()
        compressor.save_pretrained(folder)
    return folder


def load(folder: str | Path) -> PreTrainedModel:
    """An encoder-decoder or a decoder-only model."""
    auto: Any = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder)


@torch.no_grad()
def flops_of(model: PreTrainedModel, batch: dict[str, Any]) -> int:
    """What torch counts for a batch with its labels."""
    # It counts no grouped matrix products.
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.eval().requires_grad_(False)(**batch)
    return counter.get_total_flops()


def report(folder: Path, tokenizer: Any, test: LabeledExamples, original: EvaluationResult | None) -> EvaluationResult:
    """Score a checkpoint, and print a line of what it costs."""
    model = load(folder)
    started = time.perf_counter()
    result = score_examples(model, tokenizer, test, progress=False)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    flops = flops_of(model, test.batches(model, tokenizer)[0])
    lost, won, p = mcnemar(original or result, result, SCORE)
    print(
        f"{folder.name:<28} {result.scores[SCORE].value:.3f} right, {lost} lost and {won} won (p = {p:.2g}), "
        f"{size:,} bytes, {flops:.3g} FLOPs a batch, {seconds:.1f} s"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    for split in ("train", "dev", "test"):
        parser.add_argument(f"--{split}", required=True, help='.jsonl with "input" and "target"')
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tuned", action="store_true", help="the model is fine-tuned on the task already")
    parser.add_argument("--rank", type=int, default=32, help="of MC-SMoE")
    parser.add_argument("--epochs-share", type=float, default=1.0, help="of the paper's epochs, for a trial")
    arguments = parser.parse_args()
    splits = {name: LabeledExamples.load(getattr(arguments, name)) for name in ("train", "dev", "test")}
    check_splits(splits)
    tokenizer, original = AutoTokenizer.from_pretrained(arguments.model), arguments.output / "original"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not original.is_dir():
        model = load(arguments.model)
        if not arguments.tuned:
            training = PAPER["original"]
            training = replace(training, epochs=training.epochs * arguments.epochs_share)
            model = finetune(model, tokenizer, splits["train"], splits["dev"], training)
        model.save_pretrained(original)
        tokenizer.save_pretrained(original)
    teacher = load(original)
    few = splits["train"].batches(teacher, tokenizer)[: CALIBRATION_EXAMPLES // 32]
    merged = MSMoE(keep_ratio=0.25, allocation="adaptive")
    recipes: dict[str, list[Stage]] = {
        MERGED: [merged],
        SPARSE: [merged, LowRankSparse(rank=arguments.rank, density=1.0, whiten=False)],
        **{name: [stage] for name, stage in BASELINES.items()},
    }
    first = report(original, tokenizer, splits["test"], None)
    for name, stages in recipes.items():
        small = compress(original, stages, few, arguments.output / name)
        report(small, tokenizer, splits["test"], first)
        training, trained = PAPER.get(name, PAPER[MERGED]), arguments.output / f"{name}-trained"
        if not trained.is_dir():
            data = splits["train"].batches(teacher, tokenizer, training.batch_size)
            tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
            recover(
                small,
                teacher=teacher,
                data=data,
                held_out=splits["dev"].batches(teacher, tokenizer),
                train="full",
                max_tokens=max(2, round(tokens * training.epochs * arguments.epochs_share)),
                learning_rate=training.learning_rate,
                final_density=0.1 if name == SPARSE else None,
                output_dir=trained,
                **DISTILLATION,
            )
        report(trained, tokenizer, splits["test"], first)


if __name__ == "__main__":
    main()
