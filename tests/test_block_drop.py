"""Block drop: whole layers go, the config says so, and what is left is what it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import BlockDrop, CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor, MSMoE, verify
from optimum_moe.algorithms.layer_similarity import importance_of_run
from optimum_moe.surgeons import find_blocks, shallow_model
from tests.dropping import WARNINGS, data_for, write_with_both_engines
from tests.expert_order import edited
from tests.mtp_checkpoints import save_with_mtp
from tests.quantized_checkpoints import edit_config
from tests.test_streaming import tensors
from tests.tiny_checkpoints import save_checkpoint
from tests.tiny_models import Target, build, every_target, in_full, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

STATES = re.compile(
    r"o_proj|out_proj|down_proj|output_linear|dense\.|w2|\.wo\.|fc2|v_proj\.bias|experts.*bias|shared_output"
)
"""Parameters whose output goes to the residual stream, as most architectures call them."""


def layers_of(model: PreTrainedModel) -> list[str]:
    return list(dict.fromkeys(found.info.layer for found in find_blocks(model)))


@torch.no_grad()
def make_identity(model: PreTrainedModel, layer: str) -> None:
    """Let a layer add nothing to the residual stream."""
    for name, parameter in model.get_submodule(layer).named_parameters():
        if STATES.search(name):
            parameter.zero_()


def is_identity(model: PreTrainedModel, layer: str, inputs: dict[str, torch.Tensor]) -> bool:
    seen: list[bool] = []

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen.append(torch.equal(before, output[0] if isinstance(output, tuple) else output))

    handle = model.get_submodule(layer).register_forward_hook(after, with_kwargs=True)
    logits_of(model, inputs)
    handle.remove()
    return all(seen)


def droppable(model: PreTrainedModel) -> list[str]:
    blocks = find_blocks(model)
    return [layer for layer in layers_of(model) if not isinstance(shallow_model(model, blocks, [layer]), str)]


@pytest.mark.parametrize("target", every_target())
def test_dropping_an_identity_layer_changes_no_bit(target: Target) -> None:
    model = build(target)
    possible = droppable(model)
    if not possible:
        with pytest.raises(ValueError, match="can only be built without"):
            MoECompressor.from_pretrained(model, BlockDrop(num_blocks=1), data_for(target), progress=False)
        return
    layer, inputs = possible[0], inputs_for(target)
    make_identity(model, layer)
    if not is_identity(model, layer, inputs):
        pytest.skip("its layers scale or mix the residual stream itself, and none can be the identity")
    expected, before = logits_of(model, inputs), len(layers_of(model))
    protect = [f.info.name for f in find_blocks(model) if f.info.layer != layer]
    compressor = MoECompressor.from_pretrained(
        model, BlockDrop(num_blocks=1, protect=protect), data_for(target), progress=False
    )
    observed = compressor.calibrate().blocks[next(f.info.name for f in find_blocks(model) if f.info.layer == layer)]
    assert observed.layer_cosine_sum.item() == pytest.approx(observed.layer_tokens.item(), abs=1e-6)
    after = compressor.apply()
    assert torch.equal(logits_of(after, inputs), expected)
    assert len(layers_of(after)) == before - 1
    assert compressor.plan.dropped == (layer,)
    assert compressor.plan.is_plain
    # What the config says is the model that is left.
    again = type(after)(type(after.config).from_dict(after.config.to_dict())).eval()
    again.load_state_dict(after.state_dict())
    assert torch.equal(logits_of(again, inputs), expected)


FAMILIES = (
    "qwen3_moe",
    "deepseek_v3-groups",
    "gpt_oss",
    "nemotron_h",
    "qwen3_vl_moe",
    "longcat_flash",
    "dbrx",
    "llama4",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_equals_memory_and_verifies(name: str, tmp_path: Path) -> None:
    written = write_with_both_engines(name, BlockDrop(num_blocks=1), tmp_path)
    expected = written.compressor.preview()
    assert expected.after.parameters == sum(t.numel() for t in tensors(written.folder).values())
    assert expected.layers is not None
    assert expected.layers[1] == expected.layers[0] - 1
    plan = CompressionPlan.from_pretrained(written.folder)
    assert len(plan.dropped) == 1
    assert plan.source["name"] == "original"


@pytest.mark.parametrize("name", ["qwen3_moe", *in_full("gpt_oss", "llama4")])
def test_the_result_loads_and_generates_without_the_package(name: str, tmp_path: Path) -> None:
    model = build(name)
    compressor = MoECompressor.from_pretrained(model, BlockDrop(num_blocks=1), data_for(name), progress=False)
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    inputs = inputs_for(name, rows=1, length=8)
    cached = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=True)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    torch.save((inputs, cached, logits_of(model, inputs)), tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['optimum_moe'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "inputs, cached, logits = torch.load(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad(): assert torch.equal(model(**inputs).logits, logits)\n"
        "assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), cached)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "expected.pt")]
    # The same bits come from as many threads.
    settings = {"OPTIMUM_MOE_AUTOLOAD": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_least_important_layers_go() -> None:
    """The importance is 1 minus the mean cosine of a layer's input and output, worked out again here."""
    model = build("qwen3_moe", num_hidden_layers=6)
    inputs = [inputs_for("qwen3_moe", seed=seed) for seed in range(2)]
    streams: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for batch in inputs:
            states: dict[int, torch.Tensor] = {}
            handles = [
                layer.register_forward_hook(
                    lambda m, args, out, n=n, states=states: states.update({n: args[0], n + 1: out})
                )
                for n, layer in enumerate(model.model.layers)
            ]
            model(**batch)
            for handle in handles:
                handle.remove()
            streams.append([states[n].flatten(0, 1).double() for n in range(7)])
    stream = [torch.cat([own[n] for own in streams]) for n in range(7)]

    def importance(first: int, last: int) -> float:
        return 1 - torch.nn.functional.cosine_similarity(stream[first], stream[last + 1], dim=-1).mean().item()

    singles = [importance(n, n) for n in range(6)]
    runs = [importance(n, n + 1) for n in range(5)]
    for stage, chosen in (
        (BlockDrop(num_blocks=2), sorted(sorted(range(6), key=singles.__getitem__)[:2])),
        (BlockDrop(keep_ratio=0.65), sorted(sorted(range(6), key=singles.__getitem__)[:2])),
        (BlockDrop(num_blocks=2, consecutive=True), [runs.index(min(runs)), runs.index(min(runs)) + 1]),
    ):
        own = build("qwen3_moe", num_hidden_layers=6)
        compressor = MoECompressor.from_pretrained(own, stage, CalibrationConfig(inputs), progress=False)
        statistics = compressor.calibrate()
        for n, found in enumerate(find_blocks(own)):
            block = statistics.blocks[found.info.name]
            if not stage.consecutive:
                mean = block.layer_cosine_sum.item() / block.layer_tokens.item()
                assert 1 - mean == pytest.approx(singles[n], abs=1e-7)
        assert compressor.apply() is own
        assert compressor.plan.dropped == tuple(f"model.layers.{n}" for n in chosen)
        assert [layer.self_attn.layer_idx for layer in own.model.layers] == [0, 1, 2, 3]
        assert own.config.num_hidden_layers == 4


def test_layers_are_those_of_the_public_implementation_but_for_its_defect() -> None:
    """With its eight states of the residual stream (here in float16) around seven layers.

    Of two neighboring layers its code drops those after the ones that its own similarities name.
    """
    given = load_file(Path(__file__).parent / "data" / "parity_criteria.safetensors")
    given = {key.removeprefix("unified_blockdrop/"): t for key, t in given.items() if "unified_blockdrop/" in key}
    streams, similarities = given["in/hidden"].float(), given["in/sim"]
    for first, row in enumerate(similarities):
        for gap, similarity in enumerate(row[: 7 - first].tolist(), start=1):
            change = importance_of_run(streams[first], streams[first + gap])
            assert 1 - change == pytest.approx(similarity, abs=1e-5)
    cosine_S = torch.nn.functional.cosine_similarity(streams[:-1].double(), streams[1:].double(), dim=-1).sum(-1)
    chosen, names = {}, [f"model.layers.{n}.mlp" for n in range(7)]
    for consecutive in (False, True):
        stage = BlockDrop(num_blocks=2, consecutive=consecutive)
        model = build("qwen3_moe", num_hidden_layers=7)
        compressor = MoECompressor.from_pretrained(model, stage, data_for("qwen3_moe"), progress=False)
        statistics = compressor.calibrate()
        compressor.apply(
            edited(
                statistics,
                layer_tokens=torch.tensor(400.0),
                layer_cosine_sum=lambda name: cosine_S[names.index(name)],
                residual_before_SH=lambda name: streams[names.index(name)],
                residual_after_SH=lambda name: streams[names.index(name) + 1],
            )
        )
        chosen[consecutive] = [int(layer.rpartition(".")[2]) for layer in compressor.plan.dropped]
    assert chosen[False] == given["out/discrete"].tolist() == [1, 2]
    assert chosen[True] == given["chk/consecutive_gap_n"].tolist() == [1, 2]
    assert given["out/consecutive"].tolist() == [4, 5]


@pytest.mark.parametrize("following", [ExpertPruning(num_experts=4, saliency="reap"), MSMoE(num_experts=4)])
@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_stages_after_it_see_what_is_left(following: Any, engine: str, tmp_path: Path) -> None:
    """One recipe gives the same bits as two runs, the second on the checkpoint of the first."""
    save_checkpoint(tmp_path / "original", num_hidden_layers=4)
    settings = {"engine": engine, "progress": False}
    together = MoECompressor.from_pretrained(
        tmp_path / "original",
        [BlockDrop(num_blocks=2), following],
        data_for("qwen3_moe"),
        output_dir=tmp_path / "together",
        **settings,
    ).apply()
    source = tmp_path / "original"
    for number, stage in enumerate((BlockDrop(num_blocks=2), following)):
        out = tmp_path / f"step {number}"
        source = MoECompressor.from_pretrained(source, stage, data_for("qwen3_moe"), output_dir=out, **settings).apply()
    assert_same_tensors(together, source)
    report = verify(together, tmp_path / "original")
    assert report.passed, str(report)
    loaded = AutoModelForCausalLM.from_pretrained(together)
    assert len(loaded.model.layers) == 2


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_plan_is_carried_out_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "original", num_hidden_layers=4)
    stage = BlockDrop(num_blocks=2)
    first = MoECompressor.from_pretrained(
        tmp_path / "original", stage, data_for("qwen3_moe"), output_dir=tmp_path / "first", progress=False
    ).apply()
    plan = CompressionPlan.from_pretrained(first)
    again = MoECompressor.from_pretrained(
        tmp_path / "original", stage, output_dir=tmp_path / "again", progress=False
    ).apply(plan=plan)
    assert_same_tensors(first, again)


def test_a_changed_config_is_found(tmp_path: Path) -> None:
    build("gpt_oss", num_hidden_layers=4).save_pretrained(tmp_path / "original")
    out = MoECompressor.from_pretrained(
        tmp_path / "original", BlockDrop(num_blocks=2), data_for("gpt_oss"), output_dir=tmp_path / "out", progress=False
    ).apply()
    assert verify(out, tmp_path / "original").passed
    edit_config(out, layer_types=["full_attention", "full_attention"])
    assert not verify(out, tmp_path / "original")["config"].passed


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        (BlockDrop(num_blocks=3), "qwen3_moe", "num_blocks=3 drops all 3 layers"),
        (BlockDrop(num_blocks=1, protect=["*"]), "qwen3_moe", "select none"),
        (BlockDrop(num_blocks=2, layers=[0]), "qwen3_moe", "not so many"),
        (BlockDrop(num_blocks=2, layers=[0, 2], consecutive=True), "qwen3_moe", "not so many"),
        (BlockDrop(num_blocks=1), "switch_transformers", "encoder-decoder"),
        (BlockDrop(num_blocks=1), "gemma4", "embed_tokens_per_layer"),
        (BlockDrop(num_blocks=1), "zaya", "each layer uses what the one before it computed"),
    ],
)
def test_what_cannot_be_dropped_is_refused_at_once(stage: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoECompressor.from_pretrained(build(name), stage, data_for(name), progress=False)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Give exactly one of num_blocks, keep_ratio"):
        BlockDrop()
    with pytest.raises(ValueError, match="num_blocks=0 is out of range"):
        BlockDrop(num_blocks=0)
    with pytest.raises(ValueError, match="block-drop cannot follow expert-pruning"):
        MoECompressor.from_pretrained(build("qwen3_moe"), [ExpertPruning(num_experts=4), BlockDrop(num_blocks=1)])


def test_layers_that_predict_more_tokens_are_refused_or_dropped(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "original", "deepseek_v3")
    arguments = {"output_dir": tmp_path / "out", "progress": False}
    with pytest.raises(ValueError, match='Pass mtp="drop"'):
        MoECompressor.from_pretrained(
            tmp_path / "original", BlockDrop(num_blocks=1), data_for("deepseek_v3"), mtp="copy", **arguments
        )
    for engine in ("memory", "streaming"):
        out = MoECompressor.from_pretrained(
            tmp_path / "original",
            BlockDrop(num_blocks=1),
            data_for("deepseek_v3"),
            mtp="drop",
            engine=engine,
            output_dir=tmp_path / engine,
            progress=False,
        ).apply()
        report = verify(out, tmp_path / "original")
        assert report.passed, str(report)
        assert not any(name.startswith("model.layers.2.") for name in tensors(out))
