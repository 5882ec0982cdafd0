"""`recover`: train a compressed model on the predictions of its original."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from optimum_moe.calibration.observe import running_part
from optimum_moe.checkpoint.destination import check_destination, owned, remove, training_folder, written_beside
from optimum_moe.checkpoint.source import ModelSource, load_tokenizer
from optimum_moe.checkpoint.system import readable_path
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.evaluation.models import find_tokenizer
from optimum_moe.nn import SwappedModule
from optimum_moe.ranks import current_ranks
from optimum_moe.records import digest
from optimum_moe.recovery.adapters import Adapters
from optimum_moe.recovery.data import DataSettings, RecoveryData, read_data
from optimum_moe.recovery.objective import Objective
from optimum_moe.recovery.row_pruning import RowPruning
from optimum_moe.recovery.student import Student, narrowed, open_student, write_student
from optimum_moe.recovery.teacher import ModelTeacher, StoredTeacher, Teacher, is_stored
from optimum_moe.recovery.trainable import trained_names
from optimum_moe.recovery.trainer import (
    WEIGHTS,
    RecoveryTrainer,
    curve,
    has_diverged,
    load_trained,
    losses,
    quiet_trainer,
    save_trained,
)
from optimum_moe.recovery_settings import LEARNING_RATES, Recovery
from optimum_moe.reporting.page.words import nats
from optimum_moe.reporting.recovery import describe_recovery
from optimum_moe.reporting.versions import versions
from optimum_moe.settings import check_seed

_FAR = 0.35
"""KL in nats below which the default rate is in proportion to it: steps that bring a distant student closer throw a
near one back."""
_NEAREST = 0.001
_MEASUREMENTS = 10
"""Measurements on held-out text in a training."""
_PATIENCE = 5
"""Measurements without a better one after which a training stops."""
_WARMUP = 0.05
_IDENTITY = "identity.json"
_START = "start"
_BEFORE = "kl.json"


@dataclass(frozen=True)
class Recovered:
    """The result of a recovery.

    Args:
        model: The trained model in eval mode.
        record: What was trained, and how it went.
        folder: Its checkpoint, None if none was written.
    """

    model: PreTrainedModel
    record: TrainingRecord
    folder: Path | None = None


def recover(
    model: str | Path | PreTrainedModel,
    *,
    teacher: str | Path | PreTrainedModel,
    data: Any,
    train: str = "router",
    max_tokens: int = 300_000,
    output_dir: str | Path | None = None,
    held_out: Any = None,
    held_out_share: float = 0.1,
    learning_rate: float | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    task_weight: float = 0.0,
    hidden_weight: float = 0.0,
    final_density: float | None = None,
    lora_rank: int = 8,
    reconstruct: float = 0.0,
    tokenizer: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Recovered:
    """Train a compressed model so that it predicts what its original does (knowledge distillation).

    The loss is `task_weight * CE + alpha * temperature**2 * KL(teacher || student) + hidden_weight * MSE`; by default
    the divergence alone, which needs no labels. Whole documents of the data are held out; the divergence on them is
    measured ten times, training stops when it no longer falls, and the best state is kept. It runs in float32 (on a GPU
    with bfloat16 arithmetic), and what is written has the dtypes of before. With `output_dir` a killed run goes on when
    the same call is repeated.

    Args:
        model: The compressed model: a folder, a Hub id, or a model in memory, which is then trained in place.
        teacher: The original: a folder, a Hub id, a model in memory, or a folder of `store_teacher_logits`.
        data: Text to train on: whatever `calibration=` of `MoECompressor.from_pretrained` takes. Rows have 512 tokens,
            or as many as the model has positions, and steps 4 rows, unless a `CalibrationConfig` says otherwise.
        train: `"router"` (routers and norms), `"experts"` (also everything that is stored of the experts), `"lora"`
            (adapters of linear layers, routers and stacks of experts, merged at the end; needs PEFT), or `"full"`.
        max_tokens: Tokens to train on, such as 300_000 (the default) or "300k"; a shorter text is read several times.
        output_dir: Folder of the result: the files of the student, with other values of what was trained.
        held_out: Other text to measure on; by default documents of `data`.
        held_out_share: Share of the documents of `data` that are held out, default 0.1, at least one.
        learning_rate: Of AdamW, after a warm-up and falling to 0. By default at most 0.01 for `"router"`, 0.002 for
            `"experts"` and `"lora"` and 0.001 for `"full"`, and less in proportion for a student whose held-out KL is
            below 0.35 nats.
        alpha: Weight of the divergence; 0.2 in MC-SMoE.
        temperature: At which the distributions are compared; 2 in MC-SMoE.
        task_weight: Weight of the cross-entropy of the text; 1 in MC-SMoE.
        hidden_weight: Weight of the mean squared difference of hidden states, for a teacher in memory.
        final_density: Prune sparse rows during the training down to this density (`RowPruning`); the last state is then
            kept, whatever was better before.
        lora_rank: Rank of the adapters.
        reconstruct: Share of `max_tokens` on which each MoE block is first fitted to the outputs of the original's
            block, for a teacher that is a model; the rest is for the training. Default 0.
        tokenizer: Tokenizer, or its path; by default that of the first folder among `model` and `teacher`.
        seed: Seed of all random choices.
        overwrite: Replace the content of `output_dir`, and start again.
        progress: Show a progress bar.

    Returns:
        The trained model, and the record of its training.

    Raises:
        ValueError: If a setting is invalid, nothing can be trained, the vocabularies differ, the data are too little or
            held-out text is trained on, training diverges before any improvement, or several processes were started.
    """
    current_ranks().check_single("Training")
    check_seed(seed)
    recovery = Recovery(
        train=train,
        max_tokens=max_tokens,
        data=data,
        held_out=held_out,
        held_out_share=held_out_share,
        learning_rate=learning_rate,
        alpha=alpha,
        temperature=temperature,
        task_weight=task_weight,
        hidden_weight=hidden_weight,
        final_density=final_density,
        lora_rank=lora_rank,
        reconstruct=reconstruct,
    )
    directory = None if output_dir is None else check_destination(output_dir, overwrite)
    student = open_student(model)
    _refuse_own_folder(directory, student, teacher)
    _check_vocabularies(student, teacher)
    names = trained_names(student.skeleton, train)
    tokenizer = _tokenizer(tokenizer, student, teacher)
    read = training_data(student.skeleton, tokenizer, recovery, seed)
    with owned(directory, overwrite), training_states(directory, overwrite) as states:
        run = _Run(student, teacher, _title(teacher), names, read, recovery, states, seed, progress)
        trained, record = run.train()
        if directory is not None:
            with written_beside(directory, overwrite) as beside:
                write_student(trained, student, record.names, beside)
                if student.folder is None and hasattr(tokenizer, "save_pretrained"):
                    tokenizer.save_pretrained(beside)
                describe_recovery(beside, readable_path(directory.name), record)
        narrowed(trained, run.runs_in)
    return Recovered(trained, record, directory)


def training_data(model: PreTrainedModel, tokenizer: Any, recovery: Recovery, seed: int) -> RecoveryData:
    """The text of a training, read and split.

    Args:
        model: The model; may be on the meta device.
        tokenizer: Its tokenizer or processor, None if it has none.
        recovery: The settings.
        seed: Seed of the choice and order of documents, unless the data have one of their own.

    Raises:
        ValueError: If there is too little text, some is on both sides, or the model has no forward pass of its own.
    """
    part = running_part(model)
    if part is not model:
        raise ValueError(
            f"{type(model).__name__} has no forward pass of its own, so there are no predictions to learn. Train "
            f"{type(part).__name__} by itself, `model.thinker`, with the thinker of the original as teacher=."
        )
    amount = DataSettings(recovery.max_tokens, recovery.held_out, recovery.held_out_share, seed)
    return read_data(model, tokenizer, recovery.data, amount)


def train_in_place(
    model: PreTrainedModel,
    original: ModelSource,
    recovery: Recovery,
    data: RecoveryData,
    states: Path,
    seed: int,
    progress: bool = True,
) -> TrainingRecord:
    """Train a compressed model in memory, which keeps its dtypes, on the predictions of its original.

    Args:
        model: The compressed model; it is trained in place.
        original: Where the original is, or a copy of it in memory.
        recovery: The settings.
        data: What `training_data` read.
        states: Folder of the states of `training_states`.
        seed: Seed of all random choices.
        progress: Show a progress bar.

    Raises:
        ValueError: If nothing can be trained, or training diverges before any improvement.
    """
    student = open_student(model)
    names = trained_names(model, recovery.train)
    dtype = "float32" if PartialState().device.type == "cpu" else "auto"
    teacher = original.read_in(dtype).load()
    return _Run(student, teacher, original.title, names, data, recovery, states, seed, progress).train()[1]


def default_rate(train: str, kl: float) -> float:
    """The learning rate for what trains and a student with this held-out KL to its teacher."""
    return LEARNING_RATES[train] * min(1.0, max(kl, _NEAREST) / _FAR)


class _Run:
    """One training, from the loaded student to its best state."""

    def __init__(
        self,
        student: Student,
        teacher: Any,
        title: str,
        names: Sequence[str],
        data: RecoveryData,
        settings: Recovery,
        states: Path,
        seed: int,
        progress: bool,
    ) -> None:
        self.student, self.given_teacher, self.title, self.names = student, teacher, title, list(names)
        self.data, self.settings, self.states = data, settings, states
        self.seed, self.progress = seed, progress
        self.objective = Objective(settings.alpha, settings.temperature, settings.task_weight, settings.hidden_weight)
        self.rate = settings.learning_rate or LEARNING_RATES[settings.train]
        self.stored = student.stored_dtypes(names)
        self.runs_in = student.running_dtypes()

    def train(self) -> tuple[PreTrainedModel, TrainingRecord]:
        """The trained student with its stored bits, and the record."""
        model = self.student.load()
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.requires_grad_(False)
        try:
            return model.eval(), self._trained(model)
        finally:
            # A checkpoint may store more bits of what was trained than its model runs with.
            narrowed(model, self.runs_in | self.stored)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in learned)

    def _trained(self, model: PreTrainedModel) -> TrainingRecord:
        adapters = None
        if self.settings.train == "lora":
            adapters = Adapters(model, self.names, self.settings.lora_rank)
            self.names = adapters.names
        else:
            for name in self.names:
                model.get_parameter(name).requires_grad_(True)
        resumed = self._resumed(model)
        trainer = self._trainer(model, resumed)
        try:
            before = self._started(trainer, resumed)
        except AttributeError as error:
            if adapters is None:
                raise
            raise ValueError(
                f"PEFT cannot adapt {type(model).__name__}, which reads weights of its experts from outside of their "
                f"module ({error}). Pass train='experts' or train='full'."
            ) from error
        with quiet_trainer():
            trainer.train(resume_from_checkpoint=resumed)
        best_step, stopped = self._restore(trainer)
        if adapters is not None:
            adapters.merge()
        # Where the schedule left no sparse row, there is nothing to store.
        there = dict(model.named_parameters())
        self.names = [name for name in self.names if name in there]
        # What is measured at the end is what is written: rounded.
        for name in self.names:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(self.stored[name]).to(parameter.dtype)
        kl, start = trainer.held_out_kl(), curve(trainer.state)[0][1]
        if kl > start and self.settings.final_density is None and adapters is None:
            load_trained(model, self.states / _START / WEIGHTS)
            kl, best_step = start, 0
        return self._record(trainer, before, kl, best_step, stopped)

    def _started(self, trainer: RecoveryTrainer, resumed: str | None) -> float:
        """Choose the learning rate and reconstruct, unless an interrupted run did; returns the KL from before."""
        file = self.states / _START / _BEFORE
        if resumed is not None:
            # The student that was loaded is the one from before the reconstruction.
            before = float(json.loads(file.read_text(encoding="utf-8")))
            self._choose_rate(trainer, before)
            return before
        before = trainer.held_out_kl()
        self._choose_rate(trainer, before)
        steps = self._steps() - trainer.args.max_steps
        if steps:
            training = self.data.training
            batches = [training[step % len(training)] for step in range(steps)]
            trainer.reconstruct(batches)
            start = self.states / _START / WEIGHTS
            if trainer.held_out_kl() < before:
                save_trained(trainer.model, start)
            else:
                load_trained(trainer.model, start)
        file.write_text(json.dumps(before), encoding="utf-8")
        return before

    def _choose_rate(self, trainer: RecoveryTrainer, kl: float) -> None:
        if self.settings.learning_rate is None:
            trainer.args.learning_rate = default_rate(self.settings.train, kl)
        self.rate = trainer.args.learning_rate

    def _steps(self) -> int:
        """Steps in which about `max_tokens` are trained on."""
        batches, tokens = len(self.data.training), self.data.training.num_tokens
        return max(1, round(self.settings.max_tokens / max(tokens, 1) * batches))

    def _trainer(self, model: PreTrainedModel, resumed: str | None) -> RecoveryTrainer:
        settings = self.settings
        steps = max(1, round((1 - settings.reconstruct) * self._steps()))
        every = max(1, steps // _MEASUREMENTS)
        prunes = settings.final_density is not None
        arguments = TrainingArguments(
            output_dir=str(self.states),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=self.rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(_WARMUP * steps),
            weight_decay=0.0,
            logging_steps=every,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=resumed is None,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=not prunes,
            metric_for_best_model="kl",
            greater_is_better=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            dataloader_pin_memory=torch.cuda.is_available(),
            # The Trainer writes it into the model's config.
            use_cache=getattr(model.config, "use_cache", False),
            remove_unused_columns=False,
            label_names=[],
            report_to=[],
            disable_tqdm=True,
            seed=self.seed,
        )
        callbacks: list[TrainerCallback] = []
        if settings.final_density is not None:
            callbacks.append(RowPruning(settings.final_density))
        else:
            callbacks.append(EarlyStoppingCallback(_PATIENCE))
        teacher = _teacher(self.given_teacher, model, self.data, self.objective, arguments.device)
        if settings.reconstruct and not isinstance(teacher, ModelTeacher):
            raise ValueError(
                f"reconstruct={settings.reconstruct:g} compares MoE blocks, and {self.given_teacher} holds logits "
                "only. Pass the original as teacher=, or reconstruct=0."
            )
        return RecoveryTrainer(model, arguments, self.data, teacher, self.objective, self.progress, callbacks)

    def _resumed(self, model: PreTrainedModel) -> str | None:
        """The last state of an interrupted run; without one the state at the start is written.

        Raises:
            ValueError: If the interrupted run was another one.
        """
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        identity = {
            "student": digest({}, trained),
            "teacher": self.title,
            "data": {name: batches.hash for name, batches in self.data.splits.items()},
            "settings": {**self.settings.told(), "train": self.settings.train, "seed": self.seed},
            "versions": versions(),
        }
        file = self.states / _IDENTITY
        if not file.is_file():
            (self.states / _START).mkdir()
            save_trained(model, self.states / _START / WEIGHTS)
            file.write_text(json.dumps(identity), encoding="utf-8")
            return None
        here: dict[str, Any] = json.loads(json.dumps(identity))
        there = json.loads(file.read_text(encoding="utf-8"))
        for name, value in here.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{self.states} holds an unfinished training with another {name}: {_short(there.get(name))} there, "
                    f"{_short(value)} now. Repeat that call, choose another folder, or pass overwrite=True "
                    "(--overwrite) to start again."
                )
        return get_last_checkpoint(str(self.states))

    def _restore(self, trainer: RecoveryTrainer) -> tuple[int, str]:
        """Give the model its best state; returns the step of it, and why training ended.

        Raises:
            ValueError: If it diverged before it got better.
        """
        state: TrainerState = trainer.state
        points = curve(state)
        (first_step, first), (_, last) = points[0], points[-1]
        stopped = "at its last step" if state.global_step >= state.max_steps else "when the held-out KL fell no more"
        bad_loss = any(not math.isfinite(loss) for _, loss in losses(state))
        if self.settings.final_density is not None and not bad_loss:
            return state.global_step, stopped
        best_step, _ = min(points, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
        if bad_loss or has_diverged(points):
            stopped = (
                f"after it diverged at step {state.global_step} (held-out KL {nats(last)}, {nats(first)} at the start)"
            )
            if best_step == first_step:
                load_trained(trainer.model, self.states / _START / WEIGHTS)
                remove(self.states)
                raise ValueError(
                    f"Training ended {stopped}, without a better state before. Nothing is changed or written. Lower "
                    f"learning_rate={self.rate:g}."
                )
            warnings.warn(f"Training ended {stopped}. The state of step {best_step} is kept.", stacklevel=4)
        if best_step == first_step:
            load_trained(trainer.model, self.states / _START / WEIGHTS)
            warnings.warn(
                f"Training never lowered the held-out KL of {nats(first)}, so the weights stay as they were. Give more "
                f"text, or lower learning_rate={self.rate:g}.",
                stacklevel=4,
            )
        elif bad_loss or best_step != state.global_step:
            load_trained(trainer.model, self.states / f"checkpoint-{best_step}" / WEIGHTS)
        return best_step, stopped

    def _record(
        self, trainer: RecoveryTrainer, before: float, kl: float, best_step: int, stopped: str
    ) -> TrainingRecord:
        state, training = trainer.state, self.data.training
        points = curve(state)
        steps = state.global_step + self._steps() - state.max_steps
        return TrainingRecord(
            train=self.settings.train,
            names=tuple(self.names),
            teacher=self.title,
            settings={**self.settings.told(), "learning_rate": self.rate},
            data=training.description,
            held_out=self.data.held_out.description,
            kl_before=before,
            kl_after=kl,
            best_step=best_step,
            steps=state.global_step,
            tokens=round(steps * training.num_tokens / len(training)),
            curve=tuple(points),
            losses=tuple(losses(state)),
            seed=self.seed,
            stopped=stopped,
        )


@contextmanager
def training_states(directory: Path | None, overwrite: bool) -> Iterator[Path]:
    """The folder of the states of a training, which is kept until the result is written.

    Args:
        directory: Where the result is written; None for a training whose states are not kept.
        overwrite: Start again.
    """
    if directory is None:
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = training_folder(directory)
    if overwrite:
        remove(folder)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
        remove(folder)
    finally:
        if not (folder / _IDENTITY).is_file():
            remove(folder)


def _teacher(
    teacher: Any, student: PreTrainedModel, data: RecoveryData, objective: Objective, device: torch.device
) -> Teacher:
    if is_stored(teacher):
        if objective.hidden_weight:
            raise ValueError(
                f"hidden_weight={objective.hidden_weight} compares hidden states, and {teacher} holds logits only. "
                "Pass the original as teacher=, or hidden_weight=0."
            )
        return StoredTeacher(Path(teacher), data, objective.temperature)
    if not isinstance(teacher, PreTrainedModel):
        cls: Any = _teacher_class(student, teacher)
        teacher = cls.from_pretrained(teacher, dtype=torch.float32 if device.type == "cpu" else "auto")
    return ModelTeacher(teacher.to(device), bool(objective.hidden_weight))


def _teacher_class(student: PreTrainedModel, teacher: str | Path) -> type:
    """The class of the student, where the teacher has a config of the same class."""
    if type(AutoConfig.from_pretrained(teacher)) is not type(student.config):
        return AutoModelForCausalLM
    return student.original_class if isinstance(student, SwappedModule) else type(student)


def _tokenizer(given: Any, student: Student, teacher: Any) -> Any:
    """The given tokenizer, else that of the student, else that of the teacher, else None."""
    if given is not None:
        return find_tokenizer(given, [])
    folders = [student.folder, Path(teacher) if isinstance(teacher, str | Path) else None]
    found = (load_tokenizer(folder) for folder in folders if folder is not None and folder.is_dir())
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


def _check_vocabularies(student: Student, teacher: Any) -> None:
    """Refuse a teacher whose predictions are about other tokens."""
    own = student.skeleton.config.get_text_config().vocab_size
    if is_stored(teacher):
        other = json.loads((Path(teacher) / "teacher_logits.json").read_text(encoding="utf-8"))["vocabulary"]
    else:
        config = teacher.config if isinstance(teacher, PreTrainedModel) else AutoConfig.from_pretrained(teacher)
        other = config.get_text_config().vocab_size
    if own != other:
        raise ValueError(
            f"The teacher {_title(teacher)} has a vocabulary of {other} and the student {own}: their predictions "
            "cannot be compared. Pass the original of the compressed model as teacher=."
        )


def _refuse_own_folder(directory: Path | None, student: Student, teacher: Any) -> None:
    folders = {"the student": student.folder}
    if isinstance(teacher, str | Path) and Path(teacher).is_dir():
        folders["the teacher"] = Path(teacher).expanduser().resolve()
    for what, folder in folders.items():
        if directory is not None and folder is not None and (directory == folder or directory in folder.parents):
            raise ValueError(f"output_dir={directory} holds {what}, which would be replaced. Choose another folder.")


def _title(teacher: Any) -> str:
    """A name to publish: a Hub id, the name of a folder without its path, or a class."""
    if isinstance(teacher, PreTrainedModel):
        return type(teacher).__name__
    return readable_path(Path(teacher).resolve().name) if Path(teacher).is_dir() else str(teacher)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
