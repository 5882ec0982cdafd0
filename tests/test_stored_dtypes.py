"""Tensors that a checkpoint stores in another dtype than the rest keep it, with all their bits, in both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    CompressionPlan,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    verify,
)
from optimum_moe.checkpoint.source import open_source
from optimum_moe.stages import Stage
from tests.tiny_checkpoints import documents, save_checkpoint, tensors_in
from tests.tiny_models import OTHERS, TARGETS, Target, build, by_name, in_full, inputs_for, logits_of

TEXTS = documents(4)
ENGINES = pytest.mark.parametrize("engine", ["memory", "streaming"])
Wide = Callable[[str], bool]
Tensors = dict[str, torch.Tensor]


def is_beside(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a map or a guard, which no cost counts."""
    return name.endswith("expert_map") or (".experts" in name and tensor.shape == (1,))


def bytes_of(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if not is_beside(name, t))


def mixed_checkpoint(folder: Path, wide: Wide, target: str = "qwen3_moe", **config: Any) -> Path:
    """A bfloat16 checkpoint, some of whose tensors are float32 with bits that bfloat16 does not hold."""
    save_checkpoint(folder, target, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    tensors = tensors_in(folder)
    for name in filter(wide, tensors):
        tensors[name] = tensors[name].float() + 1e-4 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    known = {key: value for key, value in record.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def compressed(source: Path, out: Path, method: Stage, engine: str = "memory", **settings: Any) -> tuple[Tensors, int]:
    """What is stored, and the bytes that were foretold."""
    compressor = MoECompressor.from_pretrained(
        source, method, TEXTS, engine=engine, output_dir=out, progress=False, **settings
    )
    foretold = compressor.preview().after.bytes
    compressor.apply()
    return tensors_in(out), foretold


def assert_same(one: torch.Tensor, other: torch.Tensor, name: str = "") -> None:
    assert one.dtype == other.dtype, name
    assert torch.equal(one, other), name


def is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


@ENGINES
@pytest.mark.parametrize(
    "method",
    [
        ExpertPruning(num_experts=4, saliency="aimer"),
        MSMoE(num_experts=4),
        MSMoE(num_experts=4, routing="reduce", router_rows="dominant"),
        MSMoE(num_experts=4, routing="reduce", router_rows="mean"),
        MSMoE(num_experts=4, routing="reduce", router_rows="fit"),
        LowRankSparse(rank=8),
    ],
    ids=["prune", "map", "dominant", "mean", "fit", "rank"],
)
def test_float32_routers_and_norms_keep_their_bits(tmp_path: Path, method: Stage, engine: str) -> None:
    source = mixed_checkpoint(tmp_path / "source", lambda name: is_router(name) or "norm" in name)
    before = tensors_in(source)
    after, foretold = compressed(source, tmp_path / "out", method, engine)
    assert foretold == bytes_of(after)
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert report["after"]["bytes"] == bytes_of(after)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    for name, tensor in before.items():
        if ".experts." not in name and not is_router(name):
            assert_same(after[name], tensor, name)
    for name, plan in CompressionPlan.from_pretrained(tmp_path / "out").blocks.items():
        rows, old = after[f"{name}.gate.weight"], before[f"{name}.gate.weight"]
        if plan.routing == "map" or plan.keeps_all:
            wanted = old
        elif plan.router_fit is not None:
            wanted = plan.router_fit.rows_GX.float()
            assert not torch.equal(wanted, wanted.bfloat16().float())
        else:
            assert plan.router_weights_E is not None
            weights_E = plan.router_weights_E
            groups = [plan.members(group) for group in range(plan.num_groups)]
            wanted = torch.stack([sum(weights_E[e].float() * old[e] for e in members) for members in groups])  # type: ignore[misc]
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-7)
    assert verify(tmp_path / "out", against=source).passed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=torch.arange(5, 15)[None])


@ENGINES
@pytest.mark.parametrize(
    ("target", "wide"),
    [
        ("deepseek_v3", "e_score_correction_bias"),
        ("deepseek_v3", "nothing"),
        ("gpt_oss", "_proj_bias"),
        ("gpt_oss", "router.bias"),
        ("switch_transformers", "router.classifier"),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        ExpertPruning(num_experts=4, saliency="aimer"),
        MSMoE(num_experts=4, routing="reduce", router_rows="mean"),
        LowRankSparse(rank=8),
    ],
    ids=["prune", "merge", "rank"],
)
def test_biases_and_corrections_keep_their_dtype(
    tmp_path: Path, target: str, wide: str, method: Stage, engine: str
) -> None:
    """Also where the class holds them in float32, and the checkpoint in bfloat16."""
    source = mixed_checkpoint(tmp_path / "source", lambda name: wide in name, target)
    before = tensors_in(source)
    after, foretold = compressed(source, tmp_path / "out", method, engine)
    buffers = sum(t.numel() * t.element_size() for name, t in after.items() if name.endswith("correction_bias"))
    assert abs(foretold - bytes_of(after)) <= buffers
    assert {t.dtype for name, t in after.items() if wide in name} <= {torch.float32}
    for name in set(after) & set(before):
        assert after[name].dtype == before[name].dtype, name
        if ".experts" not in name and "router" not in name and "gate" not in name:
            assert_same(after[name], before[name], name)
    plan = next(iter(CompressionPlan.from_pretrained(tmp_path / "out").blocks.values()))
    router = f"{plan.name}.router.classifier.weight"
    if wide == "router.classifier" and plan.keeps_experts:
        assert_same(after[router], before[router][list(plan.dominants_G)])
    assert verify(tmp_path / "out", against=source).passed


@ENGINES
@pytest.mark.parametrize(
    "config",
    [{"dtype": "float32"}, {"dtype": None, "torch_dtype": "float32"}, {"dtype": "float16"}, {"dtype": None}],
    ids=["dtype", "torch_dtype", "float16", "none"],
)
def test_what_is_stored_decides_and_not_what_the_config_says(tmp_path: Path, config: Any, engine: str) -> None:
    source = mixed_checkpoint(tmp_path / "source", is_router, **config)
    target = bytes_of(tensors_in(source)) * 3 // 4
    for number, method in enumerate(
        (ExpertPruning(target_size=target, saliency="aimer"), ByteBudget(runs_in="transformers", share=0.5))
    ):
        after, foretold = compressed(source, tmp_path / f"out {number}", method, engine)
        assert {name: t.dtype for name, t in after.items() if t.is_floating_point()} == {
            name: torch.float32 if is_router(name) else torch.bfloat16
            for name, t in after.items()
            if t.is_floating_point()
        }
        assert bytes_of(after) <= foretold
        assert number or target * 0.8 < bytes_of(after) == foretold <= target
        assert (
            json.loads((tmp_path / f"out {number}" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
        )


@ENGINES
@pytest.mark.parametrize("routing", ["reduce", "map"])
def test_experts_of_several_dtypes(tmp_path: Path, routing: str, engine: str) -> None:
    """Each that remains is stored as it was, a merged one as its dominant expert was."""
    source = mixed_checkpoint(tmp_path / "source", lambda name: ".experts.3." in name or "experts.5.up_proj" in name)
    before = tensors_in(source)
    merge = MSMoE(num_experts=4, align=False)
    method = merge if routing == "map" else ExpertPruning(num_experts=4, saliency="aimer")
    after, foretold = compressed(source, tmp_path / "out", method, engine)
    assert bytes_of(after) <= foretold
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert report["after"]["bytes"] == bytes_of(after)
    dtypes = set()
    for plan in CompressionPlan.from_pretrained(tmp_path / "out").blocks.values():
        for group, dominant in enumerate(plan.dominants_G):
            for part in ("gate_proj", "up_proj", "down_proj"):
                old = {e: before[f"{plan.name}.experts.{e}.{part}.weight"] for e in plan.members(group)}
                merged = sum(plan.merge_weights_E[e].float() * t.float() for e, t in old.items())
                new = after[f"{plan.name}.experts.{group}.{part}.weight"]
                dtypes.add(new.dtype)
                assert new.dtype == old[dominant].dtype
                if len(old) == 1:
                    assert_same(new, old[dominant])
                torch.testing.assert_close(new.float(), merged, rtol=1e-2, atol=1e-6)  # type: ignore[arg-type]
    assert dtypes == {torch.float32, torch.bfloat16} or routing == "map"
    assert verify(tmp_path / "out", against=source).passed


def test_experts_of_several_dtypes_have_no_factors(tmp_path: Path) -> None:
    source = mixed_checkpoint(tmp_path / "source", lambda name: ".experts.3." in name)
    with pytest.raises(
        ValueError, match=r'stored in several dtypes, but factors have one; dtype="bfloat16" or another'
    ):
        MoECompressor.from_pretrained(source, ByteBudget(runs_in="transformers", share=0.5), TEXTS)
    after, _ = compressed(source, tmp_path / "out", LowRankSparse(rank=8), dtype="bfloat16")
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.bfloat16}
    assert verify(tmp_path / "out", against=source).passed


@ENGINES
def test_a_budget_counts_each_block_in_its_own_dtype(tmp_path: Path, engine: str) -> None:
    source = mixed_checkpoint(tmp_path / "source", lambda name: "layers.1.mlp.experts." in name)
    before = tensors_in(source)
    experts = bytes_of({name: t for name, t in before.items() if ".experts." in name})
    for number, method in enumerate(
        (
            ByteBudget(runs_in="transformers", share=0.5),
            ByteBudget(runs_in="transformers", target_size=int(bytes_of(before) * 0.7)),
        )
    ):
        out = tmp_path / f"out {number}"
        after, _ = compressed(source, out, method, engine)
        kinds = {name.split(".mlp.")[0][-1]: t.dtype for name, t in after.items() if ".experts." in name}
        wide = {name for name, t in after.items() if t.dtype == torch.float32}
        assert wide
        assert all(name.startswith("model.layers.1.mlp.experts.") for name in wide)
        assert kinds["0"] == torch.bfloat16
        kept = bytes_of({name: t for name, t in after.items() if ".experts." in name and t.is_floating_point()})
        if number:
            assert 0.6 * bytes_of(before) < bytes_of(after) <= 0.7 * bytes_of(before)
        else:
            assert 0.4 * experts < kept <= 0.5 * experts
        assert verify(out, against=source).passed


def test_a_trained_tensor_is_saved_as_it_is_now(tmp_path: Path) -> None:
    """What was lost in loading comes back only where nobody changed the tensor since."""
    source = mixed_checkpoint(tmp_path / "source", is_router)
    compressor = MoECompressor.from_pretrained(source, ExpertPruning(num_experts=4, saliency="aimer"), progress=False)
    model: PreTrainedModel = compressor.apply()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate.weight").add_(1)
    compressor.save_pretrained(tmp_path / "out")
    after, before, plan = tensors_in(tmp_path / "out"), tensors_in(source), compressor.plan
    assert plan is not None
    for layer in (0, 1, 2):
        name = f"model.layers.{layer}.mlp"
        wanted = before[f"{name}.gate.weight"][list(plan.blocks[name].dominants_G)]
        if layer == 1:
            wanted = (wanted.bfloat16() + 1).float()
        assert_same(after[f"{name}.gate.weight"], wanted)


def test_a_model_in_memory_keeps_the_dtypes_that_it_has(tmp_path: Path) -> None:
    model = build("mixtral", dtype=torch.bfloat16)
    router = model.get_parameter("model.layers.0.mlp.gate.weight")
    router.data = router.data.float() + 1e-4
    before = router.detach().clone()
    compressor = MoECompressor.from_pretrained(model, ExpertPruning(num_experts=4, saliency="aimer"), progress=False)
    foretold = compressor.preview().after.bytes
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    assert compressor.plan is not None
    after = tensors_in(tmp_path / "out")
    assert foretold == bytes_of(after)
    kept = list(compressor.plan.blocks["model.layers.0.mlp"].dominants_G)
    assert_same(
        next(t for name, t in after.items() if "layers.0" in name and name.endswith("gate.weight")), before[kept]
    )


def test_a_dtype_that_was_asked_for_is_what_all_tensors_get(tmp_path: Path) -> None:
    source = mixed_checkpoint(tmp_path / "source", is_router)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        after, foretold = compressed(source, out, ExpertPruning(num_experts=4, saliency="aimer"), dtype=dtype)
        assert {t.dtype for t in after.values()} == {getattr(torch, dtype)}
        assert foretold == bytes_of(after)
        assert verify(out, against=source).passed
    assert open_source(source).as_stored


ALONE = by_name("deepseek_v3")


@pytest.mark.filterwarnings("ignore:Calibration gave no token")
@pytest.mark.parametrize("name", ["rank", "budget"])
@pytest.mark.parametrize(
    "target",
    [ALONE, *in_full(*[t for t in (*TARGETS, *OTHERS) if t is not ALONE and t.inputs == "input_ids"])],
    ids=lambda target: target.name,
)
def test_new_tensors_run_as_those_that_they_replace(target: Target, name: str, tmp_path: Path) -> None:
    """Where the class runs the router in float32, whatever it is stored in, the experts beside it do not."""
    model_class = getattr(transformers, target.architecture)
    budget = ByteBudget(share=0.5, runs_in="transformers", curvature=target.curvature)
    method: Stage = LowRankSparse(rank=8) if name == "rank" else budget
    build(target, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    data = CalibrationConfig([inputs_for(target, rows=4, length=32, seed=seed) for seed in range(2)])
    compressor = MoECompressor.from_pretrained(tmp_path / "model", method, data, progress=False)
    cut = compressor.apply()
    inputs = inputs_for(target)
    logits = logits_of(cut, inputs)
    compressor.save_pretrained(tmp_path / "out")
    again = model_class.from_pretrained(tmp_path / "out")
    # Some routers change their dtype when they run.
    assert torch.equal(logits, logits_of(again, inputs))
    assert {n: t.dtype for n, t in cut.state_dict().items()} == {n: t.dtype for n, t in again.state_dict().items()}


def test_experts_that_replace_others_run_beside_float32_routers_while_later_layers_are_observed(tmp_path: Path) -> None:
    build(ALONE, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    data = CalibrationConfig([inputs_for(ALONE, rows=4, length=32, seed=seed) for seed in range(2)])
    found = []
    for engine in ("memory", "streaming"):
        compressor = MoECompressor.from_pretrained(
            tmp_path / "model",
            LowRankSparse(rank=8),
            data,
            engine=engine,
            error_propagation=True,
            output_dir=tmp_path / engine,
            progress=False,
        )
        found.append(tensors_in(compressor.apply()))
    one, other = found
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_same(tensor, other[name], name)
