"""The `Trainer` of a recovery: it compares with a teacher, measures on held-out text, and stores only what trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from optimum_moe.calibration import CalibrationBatches
from optimum_moe.recovery.data import RecoveryData
from optimum_moe.recovery.objective import Inputs, Objective, mean_divergence, model_inputs
from optimum_moe.recovery.reconstruction import reconstruct
from optimum_moe.recovery.teacher import ModelTeacher, Teacher

KL = "eval_kl"
"""The measure of held-out text in the Trainer's log."""
WEIGHTS = "model.safetensors"
_DIVERGED, _NOISE = 2.0, 0.01
_USUAL = 0.02
"""Root mean square of the weights of usual models, whose steps are those of the learning rate."""


class NumberedBatches(Dataset[dict[str, Any]]):
    """Batches with their numbers, by which a stored teacher finds them."""

    def __init__(self, batches: CalibrationBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._batches[index], "number": index}


class RecoveryTrainer(Trainer):
    """Trains a student on a teacher's predictions.

    Args:
        model: The student; parameters that train require gradients.
        arguments: Of the Trainer; one item of the data is a whole batch.
        data: Batches to train and to measure on.
        teacher: What it is compared with.
        objective: The loss.
        progress: Show a progress bar.
        callbacks: Further callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        data: RecoveryData,
        teacher: Teacher,
        objective: Objective,
        progress: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model,
            arguments,
            data_collator=_one_item,
            train_dataset=NumberedBatches(data.training),
            eval_dataset=NumberedBatches(data.held_out),
            callbacks=[StopWhenDiverged(), *callbacks, *([Shown()] if progress else [])],
        )
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.data, self.teacher, self.shows = data, teacher, progress
        self.objective: Objective = objective

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, with shorter steps for tensors of small numbers such as scales, which one step would replace."""
        groups = self._groups(self.model if model is None else model)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, weight_decay=0.0)
        return self.optimizer

    def _groups(self, model: Any) -> list[dict[str, Any]]:
        return [
            {"params": [parameter], "lr": self.args.learning_rate * step_share(parameter)}
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def reconstruct(self, batches: Sequence[Inputs]) -> None:
        """Fit each MoE block to the teacher's, a model in memory, one step a batch."""
        assert isinstance(self.teacher, ModelTeacher)
        model: Any = self.model
        reconstruct(model, self.teacher.model, batches, self._groups(model), self.shows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`."""
        number = inputs.pop("number")
        said = self.teacher.predict("training", number, inputs)
        output = model(**model_inputs(inputs), use_cache=False, output_hidden_states=bool(self.objective.hidden_weight))
        loss = self.objective.loss(output, said, inputs)
        return (loss, output) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log KL(teacher || student) in nats a token on the held-out text."""
        metrics = {KL: self.held_out_kl()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """KL(teacher || student) in nats a token on the held-out text."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        total, tokens = 0.0, 0
        for number, batch in enumerate(self.data.held_out):
            inputs = {key: value.to(self.args.device) for key, value in batch.items()}
            said = self.teacher.predict("held_out", number, inputs)
            part, count = mean_divergence(said, model(**model_inputs(inputs), use_cache=False).logits, inputs)
            total, tokens = total + part, tokens + count
        model.train(was_training)
        return total / max(tokens, 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write only what trains; the rest of the model does not change."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            save_trained(self.model, folder / WEIGHTS)


class StopWhenDiverged(TrainerCallback):
    """Stops when the loss is not a number, or the held-out KL far above that at the start."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare with the first measurement."""
        if has_diverged(curve(state)):
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the last loss."""
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            control.should_training_stop = True


class Shown(TrainerCallback):
    """A progress bar with the held-out KL."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recover")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        self._bar.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the last measurement."""
        self._bar.set_postfix_str(f"held-out KL {curve(state)[-1][1]:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self._bar.close()


def step_share(parameter: Tensor) -> float:
    """The share of the learning rate for a parameter: its root mean square over 0.02, at most 1, and 1 for zeros."""
    size = float(parameter.detach().float().square().mean().sqrt()) if parameter.numel() else 0.0
    return min(1.0, size / _USUAL) if size > 0 else 1.0


def curve(state: TrainerState) -> list[tuple[int, float]]:
    """(step, held-out KL) of all measurements so far."""
    return [(int(entry["step"]), float(entry[KL])) for entry in state.log_history if KL in entry]


def has_diverged(points: Sequence[tuple[int, float]]) -> bool:
    """Whether the held-out KL is no number, or more than twice (and 0.01 nats above) what it was at the start."""
    return bool(points) and not points[-1][1] <= _DIVERGED * points[0][1] + _NOISE


def losses(state: TrainerState) -> list[tuple[int, float]]:
    """(step, training loss) of all steps that were logged."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry]


def save_trained(model: Any, file: Path) -> None:
    """Write the parameters that require gradients, by name."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, file)


@torch.no_grad()
def load_trained(model: Any, file: Path) -> None:
    """Read what `save_trained` wrote."""
    for name, tensor in load_file(file).items():
        model.get_parameter(name).copy_(tensor)


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Context without warnings of the Trainer, which misses the parameters that do not train in its checkpoints."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_item(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return dict(item)
