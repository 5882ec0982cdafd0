"""`LowRankSparseLinear` against the dense layer that it stands for."""

import copy
import io
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.algorithms.low_rank import decompose
from optimum_moe.algorithms.structured_sparse import add_rows, residual, row_energy
from optimum_moe.nn import HasSparseRows, LowRankSparseLinear, SparsePart, keep_rows

INPUTS, OUTPUTS = 24, 40


def layer(rank=8, num_rows=5, bias=True, dtype=torch.float32) -> LowRankSparseLinear:
    matrix_OX = torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5
    factors = decompose(matrix_OX).truncated(rank)
    if num_rows:
        factors = add_rows(matrix_OX, factors, row_energy(residual(matrix_OX, factors)), num_rows)
    return LowRankSparseLinear.from_factors(factors, torch.randn(OUTPUTS) if bias else None).to(dtype)


@pytest.mark.parametrize("rank", [0, 8, 24])
@pytest.mark.parametrize("num_rows", [0, 5, OUTPUTS])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_its_dense_layer(rank, num_rows, bias):
    compressed = layer(rank, num_rows, bias)
    dense = compressed.densify()
    assert isinstance(dense, nn.Linear)
    for leading in ((), (1,), (3,), (2, 3, 4), (0,)):
        x = torch.randn(*leading, INPUTS)
        torch.testing.assert_close(compressed(x), dense(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rank", "num_rows"), [(INPUTS, 0), (8, OUTPUTS), (0, OUTPUTS)])
def test_full_rank_or_density_one_reproduces_the_matrix(rank, num_rows):
    matrix_OX, x = torch.randn(OUTPUTS, INPUTS), torch.randn(7, INPUTS)
    factors = decompose(matrix_OX).truncated(rank)
    if num_rows:
        factors = add_rows(matrix_OX, factors, torch.ones(OUTPUTS), num_rows)
    torch.testing.assert_close(LowRankSparseLinear.from_factors(factors)(x), x @ matrix_OX.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_every_float_dtype(dtype, tolerance):
    compressed = layer(dtype=dtype)
    x = torch.randn(6, INPUTS, dtype=dtype)
    output = compressed(x)
    assert output.dtype == compressed.densify().weight.dtype == dtype
    torch.testing.assert_close(output, compressed.densify()(x), rtol=0, atol=tolerance)
    assert compressed.row_index.dtype == torch.int64


@pytest.mark.parametrize("num_rows", [0, 5])
def test_autocast_gives_the_dtype_of_a_linear_layer(num_rows):
    compressed, x = layer(num_rows=num_rows), torch.randn(6, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        output = compressed(x)
        assert output.dtype == compressed.densify()(x).dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), compressed(x), rtol=0, atol=5e-2)
    output.float().sum().backward()
    assert {p.grad.dtype for p in compressed.parameters() if p.numel()} == {torch.float32}


def test_gradients_reach_every_parameter_and_the_input():
    compressed = layer(dtype=torch.float64)
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, u, v, rows, bias: torch.func.functional_call(
            compressed, {"u": u, "v": v, "rows": rows, "bias": bias}, (x,)
        ),
        (x, *(getattr(compressed, name) for name in ("u", "v", "rows", "bias"))),
    )


def test_stores_the_kept_rows_only(tmp_path):
    compressed = layer(rank=8, num_rows=5)
    assert {name: tuple(t.shape) for name, t in compressed.state_dict().items()} == {
        "u": (8, 40),
        "v": (8, 24),
        "rows": (5, 24),
        "row_index": (5,),
        "bias": (40,),
    }
    save_file(compressed.state_dict(), tmp_path / "layer.safetensors")
    stored = load_file(tmp_path / "layer.safetensors")
    assert sum(t.nbytes for t in stored.values()) == 4 * (8 * 64 + 5 * 24 + 40) + 8 * 5
    assert compressed.factors().numbers == 8 * 64 + 5 * 25
    # A module built from its sizes alone takes them in.
    empty = LowRankSparseLinear(INPUTS, OUTPUTS, 8, 5, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(stored, strict=True, assign=True)
    x = torch.randn(3, INPUTS)
    assert torch.equal(empty(x), compressed(x))
    assert repr(empty) == "LowRankSparseLinear(in_features=24, out_features=40, rank=8, num_rows=5, bias=True)"


def test_a_fresh_layer_has_the_variance_of_a_linear_layer():
    fresh, plain = LowRankSparseLinear(256, 512, 64, 10, dtype=torch.float64), nn.Linear(256, 512, dtype=torch.float64)
    x = torch.randn(200, 256, dtype=torch.float64)
    assert float(fresh(x).detach().std() / plain(x).detach().std()) == pytest.approx(1, abs=0.1)
    assert fresh.row_index.tolist() == list(range(10))


def test_copies():
    compressed, x = layer(), torch.randn(3, INPUTS)
    expected = compressed(x)
    memory = io.BytesIO()
    torch.save(compressed, memory)
    memory.seek(0)
    copies = (
        copy.deepcopy(compressed),
        pickle.loads(pickle.dumps(compressed)),
        torch.load(memory, weights_only=False),
        torch.compile(compressed, backend="aot_eager", fullgraph=True),
    )
    for other in copies:
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
    # The compiled one shares its parameters.
    compressed.u.data.zero_()
    assert torch.equal(copies[0](x), expected)


def test_fewer_rows_are_really_fewer():
    compressed, x = layer(num_rows=5), torch.randn(3, INPUTS)
    parameter, index = compressed.rows, compressed.row_index.tolist()
    masked = copy.deepcopy(compressed)
    masked.rows.data[[0, 3]] = 0
    compressed(x).sum().backward()
    compressed.keep_rows(torch.tensor([False, True, True, False, True]))
    assert compressed.rows is parameter
    assert compressed.rows.grad is None
    assert compressed.rows.untyped_storage().nbytes() == 3 * INPUTS * 4
    assert compressed.row_index.tolist() == [index[1], index[2], index[4]]
    torch.testing.assert_close(compressed(x), masked(x), rtol=0, atol=1e-6)
    compressed(x).sum().backward()
    assert compressed.rows.grad.shape == (3, INPUTS)
    compressed.keep_rows(torch.zeros(3, dtype=torch.bool))
    assert compressed.num_rows == 0
    assert compressed.sparse_parts() == {}
    masked.rows.data.zero_()
    torch.testing.assert_close(compressed(x), masked(x), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) and there are \(0,\) rows"):
        compressed.keep_rows(torch.ones(3, dtype=torch.bool))


def test_a_stack_keeps_equally_many_rows_and_its_function():
    rows = nn.Parameter(torch.randn(3, 4, 6))
    index = torch.tensor([[0, 2, 5, 7], [1, 2, 3, 4], [0, 1, 6, 7]])
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()

    def scattered(rows, index):
        return torch.zeros(3, 8, 6).scatter_add_(1, index.unsqueeze(-1).expand(*index.shape, 6), rows)

    expected = scattered(rows.detach() * mask.unsqueeze(-1), index)
    kept = keep_rows(SparsePart(rows, index, 8), mask)
    assert kept.tolist() == [[0, 2], [2, 4], [0, 1]]
    assert rows.shape == (3, 2, 6)
    assert torch.equal(scattered(rows.detach(), kept), expected)


def test_follows_the_protocol():
    compressed = layer(num_rows=5)
    assert isinstance(compressed, HasSparseRows)
    part = compressed.sparse_parts()["rows"]
    assert part.rows is compressed.rows
    assert part.num_outputs == OUTPUTS
    assert not isinstance(nn.Linear(2, 2), HasSparseRows)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"rank=25 must be in 0\.\.24 and num_rows=0 in 0\.\.40"):
        LowRankSparseLinear(INPUTS, OUTPUTS, 25)
    with pytest.raises(ValueError, match=r"num_rows=41 in 0\.\.40"):
        LowRankSparseLinear(INPUTS, OUTPUTS, 8, 41)
    for index in ([1, 0], [0, 0], [0, 4], [-1, 0]):
        factors = MatrixFactors(
            u_RO=torch.ones(1, 4), v_RX=torch.ones(1, 3), row_index_M=torch.tensor(index), rows_MX=torch.ones(2, 3)
        )
        with pytest.raises(ValueError, match=r"must ascend within 0\.\.3"):
            LowRankSparseLinear.from_factors(factors)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = layer()
        self.head = nn.Linear(OUTPUTS, 2)

    def forward(self, x):
        return self.head(self.proj(x).relu())


def test_peft_adapts_it(tmp_path):
    model, x, target = Model(), torch.randn(32, INPUTS), torch.randn(32, 2)
    original, before = copy.deepcopy(model), model(x).detach()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["proj.u", "proj.v"])
    adapted = peft.get_peft_model(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (8 + 40) + 4 * (8 + 24)
    assert torch.equal(adapted(x), before)
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(adapted(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    trained = adapted(x).detach()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    torch.testing.assert_close(loaded(x), trained, rtol=0, atol=1e-6)
    merged = adapted.merge_and_unload()
    assert type(merged.proj) is LowRankSparseLinear
    torch.testing.assert_close(merged(x), trained, rtol=0, atol=1e-5)
    assert torch.equal(merged.proj.rows, original.proj.rows)
    assert not torch.equal(merged.proj.u, original.proj.u)
