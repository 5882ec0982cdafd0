"""The importance matrix against sums that are computed here, one token and one head at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.calibration.data import build_batches
from optimum_moe.exporting.gguf_file import read_gguf
from optimum_moe.exporting.importance import ImportanceMatrix, importance_of
from tests.tiny_models import build

ROWS = [[(5 + 7 * i * (row + 2)) % 90 + 3 for i in range(16)] for row in range(6)]


def batches():
    return build_batches(CalibrationConfig(ROWS, sequence_length=16, max_tokens=96, batch_size=4))


def eager(target: str, **fields):
    model = build(target, **fields)
    model.set_attn_implementation("eager")
    return model


def seen(model: torch.nn.Module, path: str, place: str) -> list[torch.Tensor]:
    """Inputs or outputs of a module over all rows, one row at a time."""
    found = []

    def hook(module, args, output):
        found.append((args[0] if place == "input" else output).detach())

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]), use_cache=False)
    handle.remove()
    return found


def test_matrices_router_and_experts_of_qwen3_moe() -> None:
    model = eager("qwen3_moe")
    matrix = importance_of(model, batches(), 16)
    inputs = torch.cat([x[0] for x in seen(model, "model.layers.1.self_attn.o_proj", "input")])
    expected = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for token in inputs:
        expected += token.double() ** 2
    torch.testing.assert_close(matrix.sums["blk.1.attn_output.weight"][0], expected, rtol=1e-6, atol=1e-9)
    assert matrix.counts["blk.1.attn_output.weight"].tolist() == [96]

    block = model.model.layers[1].mlp
    hidden = torch.cat([x.reshape(-1, 64) for x in seen(model, "model.layers.1.mlp", "input")])
    with torch.no_grad():
        _, _, chosen = block.gate(hidden)
        gate_up, width = block.experts.gate_up_proj, 24
        sums_in, sums_down = torch.zeros(8, 64).double(), torch.zeros(8, width).double()
        counts = torch.zeros(8)
        for token, experts in zip(hidden, chosen, strict=True):
            for expert in experts.tolist():
                gate, up = (gate_up[expert] @ token).split(width)
                sums_in[expert] += token.double() ** 2
                sums_down[expert] += (torch.nn.functional.silu(gate) * up).double() ** 2
                counts[expert] += 1
    assert matrix.counts["blk.1.ffn_down_exps.weight"].tolist() == counts.tolist()
    assert counts.sum() == 96 * 2
    for name, expected in (("gate", sums_in), ("up", sums_in), ("down", sums_down)):
        torch.testing.assert_close(matrix.sums[f"blk.1.ffn_{name}_exps.weight"], expected, rtol=1e-4, atol=1e-9)
    router = (hidden.double() ** 2).sum(0)
    torch.testing.assert_close(matrix.sums["blk.1.ffn_gate_inp.weight"][0], router, rtol=1e-6, atol=1e-9)


def test_every_matrix_of_the_decoder_has_an_entry() -> None:
    matrix = importance_of(eager("qwen3_moe"), batches(), 16)
    layer = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"}
    layer |= {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert set(matrix.sums) == {f"blk.{i}.{name}.weight" for i in range(3) for name in layer}


def test_dense_layers_shared_experts_and_latent_attention_of_deepseek() -> None:
    model = eager("deepseek_v3")
    matrix = importance_of(model, batches(), 16)
    assert {"blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"} <= set(matrix.sums)
    assert {f"blk.1.ffn_{name}_shexp.weight" for name in ("gate", "up", "down")} <= set(matrix.sums)
    attention = model.model.layers[1].self_attn
    heads, nope = attention.num_heads, attention.qk_nope_head_dim

    queries = seen(model, "model.layers.1.self_attn.q_b_proj", "output")
    expected = torch.zeros(heads, nope).double()
    for row in queries:
        for token in row[0]:
            for head, values in enumerate(token.view(heads, -1)):
                expected[head] += values[:nope].double() ** 2
    torch.testing.assert_close(matrix.sums["blk.1.attn_k_b.weight"], expected, rtol=1e-6, atol=1e-9)

    latents = [x.reshape(16, -1) for x in seen(model, "model.layers.1.self_attn.kv_a_layernorm", "output")]
    expected = torch.zeros(heads, latents[0].shape[1]).double()
    with torch.no_grad():
        for row, latent in zip(ROWS, latents, strict=True):
            weights = model(torch.tensor([row]), output_attentions=True, use_cache=False).attentions[1][0]
            for head in range(heads):
                for token in range(16):
                    averaged = sum(weights[head, token, other] * latent[other] for other in range(token + 1))
                    expected[head] += averaged.double() ** 2
    torch.testing.assert_close(matrix.sums["blk.1.attn_v_b.weight"], expected, rtol=1e-4, atol=1e-9)
    assert matrix.counts["blk.1.attn_v_b.weight"].tolist() == [96]


def test_a_compressed_model_has_entries_of_what_it_keeps(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "original")
    compressor = MoECompressor.from_pretrained(
        str(tmp_path / "original"), ExpertPruning(num_experts=4), CalibrationConfig(ROWS, sequence_length=16)
    )
    matrix = importance_of(compressor.apply(), batches(), 16)
    assert matrix.sums["blk.2.ffn_down_exps.weight"].shape == (4, 24)


def test_means_and_the_file(tmp_path: Path) -> None:
    matrix = ImportanceMatrix(num_tokens=100, sequence_length=16, source="corpus.txt")
    matrix.add("blk.0.a.weight", torch.tensor([[2.0, 4.0]]).double(), torch.tensor([2]))
    matrix.add("blk.0.a.weight", torch.tensor([[4.0, 0.0]]).double(), torch.tensor([1]))
    matrix.add("blk.0.e.weight", torch.tensor([[6.0], [0.0]]).double(), torch.tensor([3, 0]))
    # An expert that no token reached counts as in llama.cpp: all its inputs matter alike.
    means = {name: values.tolist() for name, values in matrix.means().items()}
    assert means == {"blk.0.a.weight": pytest.approx([2.0, 4 / 3]), "blk.0.e.weight": [2.0, 1.0]}
    matrix.save(tmp_path / "imatrix.gguf")
    header = read_gguf(tmp_path / "imatrix.gguf")
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        "blk.0.a.weight.in_sum2": (1, 2),
        "blk.0.a.weight.counts": (1, 1),
        "blk.0.e.weight.in_sum2": (2, 1),
        "blk.0.e.weight.counts": (2, 1),
    }
    assert header.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["corpus.txt"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 16,
    }


def test_padding_is_refused() -> None:
    padded = build_batches(CalibrationConfig([[5, 6, 7], [8, 9, 10, 11]], sequence_length=4, packing=False))
    with pytest.raises(ValueError, match="padding"):
        importance_of(eager("qwen3_moe"), padded, 4)
