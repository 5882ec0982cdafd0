"""`RowPruning` in a real Trainer: the schedule, what is stored in the end, and resuming."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.structured_sparse import CubicSchedule, add_rows, global_masks
from optimum_moe.nn import LowRankSparseLinear, SparsePart, keep_rows
from optimum_moe.recovery import RowPruning

STEPS, HIDDEN, INNER = 20, 16, 32
WHOLE = 2 * INNER * HIDDEN
LAYERS = ("first", "second")


def compressed(outputs: int, inputs: int, num_rows: int) -> LowRankSparseLinear:
    matrix_OX = torch.randn(outputs, inputs) / inputs**0.5
    factors = add_rows(matrix_OX, decompose(matrix_OX).truncated(4), torch.rand(outputs), num_rows)
    return LowRankSparseLinear.from_factors(factors, torch.zeros(outputs))


class Model(nn.Module):
    def __init__(self, first_rows=INNER, second_rows=HIDDEN) -> None:
        super().__init__()
        self.first = compressed(INNER, HIDDEN, first_rows)
        self.second = compressed(HIDDEN, INNER, second_rows)

    def forward(self, x, labels):
        output = self.second(self.first(x).relu())
        return {"loss": nn.functional.mse_loss(output, labels), "logits": output}

    def stored(self) -> int:
        return sum(getattr(self, name).rows.numel() for name in LAYERS)


class Watch(TrainerCallback):
    """What is not zero after each step, before and after the rows shrink."""

    def __init__(self) -> None:
        self.nonzero, self.masked = [], None

    def on_step_end(self, args, state, control, model, **kwargs):
        self.nonzero.append({name: getattr(model, name).rows.detach().any(1) for name in LAYERS})

    def on_train_end(self, args, state, control, model, **kwargs):
        self.masked = copy.deepcopy(model)

    def shares(self) -> list[float]:
        widths = {"first": HIDDEN, "second": INNER}
        return [sum(int(mask.sum()) * widths[name] for name, mask in step.items()) / WHOLE for step in self.nonzero]


def train(model, directory, *callbacks, resume=None, **overrides):
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(80, HIDDEN, generator=generator), torch.randn(80, HIDDEN, generator=generator)
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(directory), **{**arguments, **overrides}),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_density_follows_the_schedule_and_the_file_shrinks(tmp_path):
    model, watch = Model(), Watch()
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    parameter = model.first.rows
    trainer = train(model, tmp_path, watch, RowPruning(0.25), save_strategy="steps", save_steps=STEPS)
    schedule = CubicSchedule(STEPS, 2, final_ratio=0.25)
    wanted = [schedule.at(step) for step in range(STEPS)]
    assert [masked for _, masked in wanted] == [False] * 3 + [True] * 17
    for (ratio, _), share in zip(wanted, watch.shares(), strict=True):
        # At least the ratio, and less without the row at the threshold (32 numbers at most); numbers are rounded up.
        assert ratio <= share < ratio + (INNER + 1) / WHOLE
    kept = watch.nonzero[-1]
    for name in LAYERS:
        layer = getattr(model, name)
        assert layer.row_index.tolist() == kept[name].nonzero().flatten().tolist()
        assert layer.rows.untyped_storage().nbytes() == layer.rows.numel() * 4
    assert 0.25 * WHOLE <= model.stored() < 0.25 * WHOLE + INNER
    assert model.first.rows is parameter
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(model(x, x)["logits"], watch.masked(x, x)["logits"], rtol=0, atol=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    files = [load_file(tmp_path / place / "model.safetensors") for place in (f"checkpoint-{STEPS}", "final")]
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert sizes[0] == before
    rows_gone = sum(int((~mask).sum()) for mask in kept.values())
    assert sizes[0] - sizes[1] == 4 * (WHOLE - model.stored()) + 8 * rows_gone
    again = Model(len(model.first.rows), len(model.second.rows))
    again.load_state_dict(files[1], strict=True)
    assert torch.equal(again(x, x)["logits"], model(x, x)["logits"])


def test_rows_are_ranked_by_one_threshold_over_both_layers(tmp_path):
    model, recorded = Model(), {}

    class Record(RowPruning):
        def on_optimizer_step(self, args, state, control, **kwargs):
            layers = [getattr(kwargs["model"], name) for name in LAYERS]
            recorded.setdefault("products", []).append(
                [(layer.rows.detach() * layer.rows.grad).abs().mean(1) for layer in layers]
            )
            super().on_optimizer_step(args, state, control, **kwargs)

    watch = Watch()
    train(model, tmp_path, watch, Record(0.25, warmup_steps=1))
    products = recorded["products"]
    for step in range(2, STEPS):
        # The moving average written out, one step behind.
        averages = [sum(0.15 * 0.85 ** (step - 1 - t) * products[t][i] for t in range(step)) for i in range(2)]
        ratio, _ = CubicSchedule(STEPS, 1, final_ratio=0.25).at(step)
        masks, _ = global_masks(averages, [HIDDEN, INNER], ratio)
        for name, mask in zip(LAYERS, masks, strict=True):
            assert torch.equal(watch.nonzero[step][name], mask), (step, name)


def test_a_model_that_stores_few_rows_begins_there(tmp_path):
    model, watch = Model(first_rows=16, second_rows=8), Watch()
    train(model, tmp_path, watch, RowPruning(0.2))
    assert watch.shares()[0] == 0.5
    assert watch.shares()[3] < 0.5
    assert 0.2 * WHOLE <= model.stored() < 0.2 * WHOLE + INNER
    with pytest.raises(ValueError, match=r"falls from 0\.5 to 0\.6"):
        train(Model(first_rows=16, second_rows=8), tmp_path, RowPruning(0.6))


@pytest.mark.parametrize("restore", [False, True])
def test_resumes_exactly(tmp_path, restore):
    start, saving = Model(), {"save_strategy": "steps", "save_steps": 8}
    whole, half = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, tmp_path, RowPruning(0.25), **saving)
    train(
        half,
        tmp_path,
        RowPruning(0.25),
        resume=str(tmp_path / "checkpoint-8"),
        restore_callback_states_from_checkpoint=restore,
        **saving,
    )
    assert whole.state_dict().keys() == half.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor), name


def test_training_goes_on_after_the_rows_shrank(tmp_path):
    model = Model()
    trainer = train(model, tmp_path, RowPruning(0.25))
    stored = model.stored()
    before = model.first.rows.detach().clone()
    trainer.pop_callback(RowPruning)
    trainer.train()
    assert model.stored() == stored
    assert not torch.equal(model.first.rows, before)


def test_stopping_early_keeps_what_was_reached_and_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    model = Model()
    ratio, _ = CubicSchedule(STEPS, 2, final_ratio=0.25).at(5)
    with pytest.warns(UserWarning, match=rf"stopped after 6 of 20 steps: the sparse rows have {ratio:.3f}"):
        train(model, tmp_path, RowPruning(0.25), Stop())
    assert ratio * WHOLE <= model.stored() < ratio * WHOLE + INNER + 1


def test_a_step_that_the_scaler_skipped_does_not_count(tmp_path):
    model, callback = Model(), RowPruning()
    call = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), TrainerState(max_steps=STEPS), TrainerControl()
    callback.on_train_begin(*call, model=model)
    before = callback.state()
    for name in LAYERS:
        rows = getattr(model, name).rows
        rows.grad = torch.full_like(rows, torch.inf)
    callback.on_optimizer_step(*call, model=model, optimizer=SimpleNamespace(step_was_skipped=True))
    assert callback.state() == before
    callback.on_optimizer_step(*call, model=model, optimizer=SimpleNamespace(step_was_skipped=False))
    assert callback.state() != before


def test_a_stack_of_matrices_shrinks_to_its_largest(tmp_path):
    class Stack(nn.Module):
        """Three experts of a rank class, as a stack."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, HIDDEN, HIDDEN))
            self.register_buffer("row_index", torch.arange(HIDDEN).repeat(3, 1))

        def forward(self, x, labels):
            outputs = torch.einsum("bx,cmx->bcm", x, self.rows)
            return {"loss": (outputs.mean(1) - labels).square().mean(), "logits": outputs}

        def sparse_parts(self):
            return {"rows": SparsePart(self.rows, self.row_index, HIDDEN)}

        def keep_rows(self, mask, name="rows"):
            self.kept = mask.sum(1).tolist()
            self.row_index = keep_rows(self.sparse_parts()[name], mask)

    model = Stack()
    train(model, tmp_path, RowPruning(0.25))
    assert sum(model.kept) == 13  # a quarter of 48 rows, and the one at the threshold
    assert model.rows.shape == (3, max(model.kept), HIDDEN)
    assert model.row_index.shape == (3, max(model.kept))
    assert model.rows.detach().any(2).sum(1).tolist() == model.kept


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="keeps nothing"):
        RowPruning(0.0)
    with pytest.raises(ValueError, match=r"beta=1\.0 must be in"):
        RowPruning(beta=1.0)
    with pytest.raises(ValueError, match=r"total_steps=20 the warm-ups \(1 \+ 4\) x warmup_steps=4 leave 0"):
        train(Model(), tmp_path, RowPruning(warmup_steps=4))
    frozen = Model()
    for name in LAYERS:
        getattr(frozen, name).rows.requires_grad_(False)
    with pytest.raises(ValueError, match="Model has 2 sparse parts and none of them is trained"):
        train(frozen, tmp_path, RowPruning())

    class Unused(Model):
        def forward(self, x, labels):
            return {"loss": self.first.bias.square().mean() + (x - labels).mean()}

    with pytest.raises(ValueError, match="No gradient has reached any of the 2 sparse parts"):
        train(Unused(), tmp_path, RowPruning())
