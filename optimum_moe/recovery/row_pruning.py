"""`RowPruning`: the sparse rows of low-rank-sparse layers, pruned while they train.

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
    one step. One threshold over all matrices of the model zeroes the least important rows, so that the rows that remain
    hold the share of all numbers that a cubic schedule asks for: from what is stored in the beginning (all of W - U V:
    1.0) down to `final_density`. A zeroed row keeps its gradient and may come back until the schedule ends. When
    training ends the rows that are zeroed are no longer stored: parameters and indices shrink in place, the state of
    the optimizer for them is dropped, the config of a compressed model says their new number, and what is saved
    afterwards is smaller. Checkpoints of the Trainer hold all
    rows and the moving averages; training resumed from one continues exactly. Frozen rows are left alone.

    In a stack of matrices with equally many rows (a rank class of experts) the number stored is the largest that one
    of them keeps; see `optimum_moe.nn.keep_rows`.

    Where training stops before its last step, the rows kept are those of the step that was reached, with a warning.
    With `load_best_model_at_end` the last step's choice of rows is applied to the weights that are loaded.

    Args:
        final_density: share of the numbers of all matrices that their sparse rows hold in the end; default the
            paper's 0.10.
        warmup_steps: unit of the next two; default a tenth of the training.
        initial_warmups: warm-ups in the beginning without any mask, default 1.
        final_warmups: warm-ups at the end with the final density, default 4.
        beta: share of the past in the moving average, default 0.85.

    Raises:
        ValueError: If a value is out of range; when training begins, if the model has no trainable sparse rows or the
            warm-ups leave no steps; when rows are to be zeroed, if no gradient has reached any of them.
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
            raise ValueError(f"beta={beta} must be in [0, 1): the share of the past in a moving average. Use {BETA}.")
        self.settings: dict[str, Any] = {
            "final_density": final_density,
            "warmup_steps": warmup_steps,
            "initial_warmups": initial_warmups,
            "final_warmups": final_warmups,
            "beta": beta,
        }
        # Refuses what no number of steps could mend before training begins.
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
        """Find the rows, lay out the schedule, and take up the moving averages of a resumed training."""
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
        """The moving averages that the checkpoint holds, empty for a training that begins."""
        if state.global_step == 0:
            return {}
        states = cast(dict[str, Any], state.stateful_callbacks)
        # The Trainer writes only into entries that a checkpoint had already.
        saved = states.setdefault(type(self).__name__, self.state())
        return (saved[-1] if isinstance(saved, list) else saved)["attributes"]["importance_state"]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the importance and zero the rows that the schedule has no room for."""
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
                f"No gradient has reached any of the {len(parts)} sparse parts, so that their rows cannot be ranked. "
                "Train the modules that hold them, without sharding of parameters (DeepSpeed, FSDP)."
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
        """Store the rows that are kept, and no others."""
        model = kwargs["model"]
        parts = trainable_parts(model)
        if state.global_step >= state.max_steps:
            self._mask(parts, self._schedule.final_ratio)
        elif self._masks:
            reached = self._schedule.at(state.global_step - 1)[0]
            warnings.warn(
                f"Training stopped after {state.global_step} of {state.max_steps} steps: the sparse rows hold "
                f"{reached:.3f} of all numbers and not {self._schedule.final_ratio}.",
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
        """What the Trainer writes beside a checkpoint: the settings and the moving averages."""
        encoded = {name: _encoded(importance) for name, importance in self._importance.items()}
        return {"args": self.settings, "attributes": {"importance_state": encoded}}


def sparse_modules(model: nn.Module) -> dict[str, HasSparseRows]:
    """Modules that follow `HasSparseRows` by their name in the model, each once."""
    # Wrappers (PEFT) answer for the module that they wrap: the innermost one is the module itself.
    found: dict[int, tuple[str, HasSparseRows]] = {}
    for name, module in model.named_modules():
        if isinstance(module, HasSparseRows):
            for part in module.sparse_parts().values():
                found[id(part.rows)] = (name, module)
    return dict(found.values())


def trainable_parts(model: nn.Module) -> dict[str, SparsePart]:
    """Sparse parts whose rows are trained, by module and parameter name.

    Raises:
        ValueError: If there are none.
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
            "density first, and leave requires_grad of their rows on."
        )
    return trained


def _stored_numbers(parts: dict[str, SparsePart]) -> int:
    return sum(part.rows.numel() for part in parts.values())


def _all_numbers(parts: dict[str, SparsePart]) -> int:
    """Numbers of the whole matrices."""
    return sum(part.num_outputs * part.rows.shape[-1] * part.row_index[..., 0].numel() for part in parts.values())


def _encoded(importance: RowImportance) -> list[Any]:
    """Shape and bytes as text: a checkpoint's state is JSON, and training resumed from it must not drift."""
    both = torch.stack([importance.average, importance.latest]).cpu()
    return [list(both.shape), base64.b64encode(both.numpy().tobytes()).decode()]


def _decoded(saved: list[Any], rows: torch.Tensor) -> RowImportance:
    shape, text = saved
    if tuple(shape[1:]) != tuple(rows.shape[:-1]):
        raise ValueError(
            f"The checkpoint holds the importance of {tuple(shape[1:])} rows and the model has "
            f"{tuple(rows.shape[:-1])}. Resume with the model that training began with."
        )
    both = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(shape).to(rows.device)
    return RowImportance(both[0], both[1])
