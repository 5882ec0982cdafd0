"""`RowPruning`: pruning of the sparse rows of low-rank-sparse layers during training.

Shape letters: C stacked matrices, M stored rows of each, X columns.
"""

from __future__ import annotations

import base64
import warnings
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from optimum_moe.algorithms.structured_sparse import BETA, CubicSchedule, RowImportance, global_masks
from optimum_moe.checkpoint.compatibility import refresh_structure
from optimum_moe.nn import HasSparseRows, SparsePart
from optimum_moe.settings import percent, plain


class RowPruning(TrainerCallback, ExportableState):
    """Prune the sparse rows of every module that follows `HasSparseRows` during training (LoSparse, MC-SMoE).

    After each optimizer step the importance of a row is the mean of |S grad S| over it, as a moving average that lags
    one step. One threshold over all matrices of the model zeroes the least important rows, so that the remaining rows
    have the share of all elements that a cubic schedule sets: from the stored share at the start (1.0 for all of
    W - U V) down to `final_density`. A zeroed row keeps its gradient and may be restored until the schedule ends. At
    the end of training zeroed rows are removed: parameters and indices shrink in place, their optimizer state is
    dropped, the config of a compressed model gets the new sizes, and checkpoints saved afterwards are smaller.
    Checkpoints of the Trainer contain all rows and the moving averages, so resumed training continues exactly. Frozen
    rows are not changed.

    In a stack of matrices with the same number of rows (a rank class of experts) the number of stored rows is the
    maximum over its matrices; see `optimum_moe.nn.keep_rows`.

    If training stops before its last step, the rows of the step that was reached are kept, with a warning. With
    `load_best_model_at_end` the last step's selection of rows is applied to the loaded weights.

    Args:
        final_density: share of the elements of all matrices in their sparse rows at the end; default the paper's 0.10.
        warmup_steps: unit of the next two; default a tenth of the training.
        initial_warmups: warm-ups at the start without any mask, default 1.
        final_warmups: warm-ups at the end with the final density, default 4.
        beta: weight of the past in the moving average, default 0.85.

    Raises:
        ValueError: If a value is out of range; at the start of training, if the model has no trainable sparse rows or
            the warm-ups leave no steps; when rows are first zeroed, if no gradient has reached any of them.
    """

    def __init__(
        self,
        final_density: float = 0.10,
        warmup_steps: int | None = None,
        initial_warmups: int = 1,
        final_warmups: int = 4,
        beta: float = BETA,
    ) -> None:
        final_density, beta = percent(plain(final_density)), plain(beta)
        warmup_steps, initial_warmups, final_warmups = (
            plain(given) for given in (warmup_steps, initial_warmups, final_warmups)
        )
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be in [0, 1): the weight of the past in a moving average. Use {BETA}.")
        self.settings: dict[str, Any] = {
            "final_density": final_density,
            "warmup_steps": warmup_steps,
            "initial_warmups": initial_warmups,
            "final_warmups": final_warmups,
            "beta": beta,
        }
        # Refuse settings before training that no number of steps could satisfy.
        self._schedule = CubicSchedule(1, 0, initial_warmups, final_warmups, final_ratio=final_density)
        self._importance: dict[str, RowImportance] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self.importance_state: dict[str, list[Any]] = {}

    def _scheduled(self, total_steps: int, initial_ratio: float) -> CubicSchedule:
        settings = self.settings
        unit = settings["warmup_steps"]
        return CubicSchedule(
            total_steps,
            total_steps // 10 if unit is None else unit,
            settings["initial_warmups"],
            settings["final_warmups"],
            initial_ratio,
            settings["final_density"],
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the rows, create the schedule, and restore the moving averages of a resumed training."""
        parts = trainable_parts(kwargs["model"])
        stored, total = _stored_numbers(parts), _all_numbers(parts)
        self._schedule = self._scheduled(state.max_steps, stored / total)
        self._masks = {}
        self.importance_state = self._resumed(state)
        self._importance = {
            name: _decoded(self.importance_state[name], part.rows)
            if name in self.importance_state
            else RowImportance.start(part.rows)
            for name, part in parts.items()
        }

    def _resumed(self, state: TrainerState) -> dict[str, list[Any]]:
        """The moving averages in the checkpoint, empty for a new training."""
        if state.global_step == 0:
            return {}
        states = cast(dict[str, Any], state.stateful_callbacks)
        # The Trainer restores only entries that exist in the state.
        saved = states.setdefault(type(self).__name__, self.state())
        return (saved[-1] if isinstance(saved, list) else saved)["attributes"]["importance_state"]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the importance, and zero the least important rows by the schedule."""
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return
        parts = trainable_parts(kwargs["model"])
        for name, part in parts.items():
            self._importance[name] = self._importance[name].advanced(part.rows, part.rows.grad, self.settings["beta"])
        ratio, masked = self._schedule.at(state.global_step)
        if masked:
            self._mask(parts, ratio)

    def _mask(self, parts: dict[str, SparsePart], ratio: float) -> None:
        averages = [self._importance[name].average for name in parts]
        if not any(bool(average.any()) for average in averages):
            raise ValueError(
                f"No gradient has reached any of the {len(parts)} sparse parts, so their rows cannot be ranked. Train "
                "the modules that contain them, without sharding of parameters (DeepSpeed, FSDP)."
            )
        absent = _all_numbers(parts) - _stored_numbers(parts)
        widths = [part.rows.shape[-1] for part in parts.values()]
        self._masks = dict(zip(parts, global_masks(averages, widths, ratio, absent)[0], strict=True))
        with torch.no_grad():
            for name, part in parts.items():
                part.rows.masked_fill_(~self._masks[name].unsqueeze(-1), 0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the zeroed rows from the model and the optimizer."""
        model = kwargs["model"]
        parts = trainable_parts(model)
        if state.global_step >= state.max_steps:
            self._mask(parts, self._schedule.final_ratio)
        elif self._masks:
            reached = self._schedule.at(state.global_step - 1)[0]
            warnings.warn(
                f"Training stopped after {state.global_step} of {state.max_steps} steps: the sparse rows have "
                f"{reached:.3f} of all elements and not {self._schedule.final_ratio}.",
                stacklevel=2,
            )
        optimizer_state = getattr(kwargs.get("optimizer"), "state", {})
        for module_name, module in sparse_modules(model).items():
            for name, part in module.sparse_parts().items():
                mask = self._masks.get(f"{module_name}.{name}")
                if mask is not None:
                    module.keep_rows(mask, name)
                    optimizer_state.pop(part.rows, None)
        refresh_structure(model)
        self._importance, self._masks = {}, {}

    def state(self) -> dict[str, Any]:
        """State that the Trainer saves with a checkpoint: the settings and the moving averages."""
        encoded = {name: _encoded(importance) for name, importance in self._importance.items()}
        return {"args": self.settings, "attributes": {"importance_state": encoded}}


def sparse_modules(model: nn.Module) -> dict[str, HasSparseRows]:
    """Modules that follow `HasSparseRows`, each once, by their name in the model."""
    # Wrappers (PEFT) forward attributes of the wrapped module, so take the innermost one.
    found: dict[int, tuple[str, HasSparseRows]] = {}
    for name, module in model.named_modules():
        if isinstance(module, HasSparseRows):
            for part in module.sparse_parts().values():
                found[id(part.rows)] = (name, module)
    return dict(found.values())


def trainable_parts(model: nn.Module) -> dict[str, SparsePart]:
    """Sparse parts whose rows are trained, by module and parameter name.

    Raises:
        ValueError: If no sparse part is trained.
    """
    parts = {
        f"{module_name}.{name}": part
        for module_name, module in sparse_modules(model).items()
        for name, part in module.sparse_parts().items()
    }
    trained = {name: part for name, part in parts.items() if part.rows.requires_grad}
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has {len(parts)} sparse parts and none of them is trained. Compress it with a "
            "density first, and keep requires_grad=True for their rows."
        )
    return trained


def _stored_numbers(parts: dict[str, SparsePart]) -> int:
    return sum(part.rows.numel() for part in parts.values())


def _all_numbers(parts: dict[str, SparsePart]) -> int:
    """Number of elements of the whole matrices."""
    return sum(part.num_outputs * part.rows.shape[-1] * part.row_index[..., 0].numel() for part in parts.values())


def _encoded(importance: RowImportance) -> list[Any]:
    """Shape and bytes as text, since the Trainer's state is JSON and resumed training must be exact."""
    both = torch.stack([importance.average, importance.latest]).cpu()
    return [list(both.shape), base64.b64encode(both.numpy().tobytes()).decode()]


def _decoded(saved: list[Any], rows: torch.Tensor) -> RowImportance:
    shape, text = saved
    if tuple(shape[1:]) != tuple(rows.shape[:-1]):
        raise ValueError(
            f"The checkpoint holds the importance of {tuple(shape[1:])} rows, but the model has "
            f"{tuple(rows.shape[:-1])}. Resume with the model that training started with."
        )
    both = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(shape).to(rows.device)
    return RowImportance(both[0], both[1])
