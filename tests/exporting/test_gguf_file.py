"""GGUF files that this package writes, read back, and what their types store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optimum_moe.exporting.gguf_file import read_gguf, write_gguf
from optimum_moe.exporting.gguf_types import FILE_TYPES, TENSOR_TYPES, file_type, stored_as


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"blk.0.w.in_sum2": np.arange(12.0).reshape(3, 4), "blk.0.w.counts": np.array([[1.0], [2.0], [3.0]])}
    write_gguf(tmp_path / "a.gguf", {"general.type": "imatrix", "count": 7, "texts": ["a", "ü"]}, tensors)
    header = read_gguf(tmp_path / "a.gguf")
    assert header.metadata == {"general.type": "imatrix", "count": 7, "texts": ["a", "ü"]}
    assert {name: (t.type, t.shape) for name, t in header.tensors.items()} == {
        "blk.0.w.in_sum2": ("F32", (3, 4)),
        "blk.0.w.counts": ("F32", (3, 1)),
    }
    data = (tmp_path / "a.gguf").read_bytes()
    assert len(data) % 32 == 0
    # Tensors begin at multiples of 32 after the header: 48 bytes of sums in 64, 12 bytes of counts in 32.
    assert np.frombuffer(data[-96:-48], np.float32).tolist() == list(np.arange(12.0))
    assert np.frombuffer(data[-32:-20], np.float32).tolist() == [1.0, 2.0, 3.0]


def test_against_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "a.gguf", {"general.type": "imatrix"}, {"t": np.arange(6.0).reshape(2, 3)})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.tensors[0].name == "t"
    assert reader.tensors[0].data.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    for name, kind in TENSOR_TYPES.items():
        member = gguf.GGMLQuantizationType[name]
        assert (member.value, gguf.GGML_QUANT_SIZES[member]) == (kind.number, (kind.block, kind.bytes)), name


@pytest.mark.parametrize("damage", ["cut", "magic", "empty"])
def test_a_broken_file(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, {"general.type": "imatrix"}, {"t": np.zeros((2, 3))})
    data = file.read_bytes()
    file.write_bytes({"cut": data[:40], "magic": b"ABCD" + data[4:], "empty": b""}[damage])
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("main", "row", "stored"),
    [
        ("Q4_K", 256, "Q4_K"),
        # A width of 264 fits no block at all, and is stored larger than one of 384.
        ("Q4_K", 264, "F16"),
        ("Q4_K", 384, "Q5_0"),
        ("Q6_K", 96, "Q8_0"),
        ("Q4_0", 96, "Q4_0"),
        ("Q8_0", 80, "F16"),
        ("IQ3_XXS", 96, "IQ4_NL"),
        ("F16", 7, "F16"),
    ],
)
def test_rows_that_do_not_fit_the_blocks(main: str, row: int, stored: str) -> None:
    assert stored_as(main, row) == stored


def test_every_file_type_has_its_tensor_type() -> None:
    assert all(kind.main in TENSOR_TYPES for kind in FILE_TYPES)
    assert all(kind.fallback in TENSOR_TYPES for kind in TENSOR_TYPES.values())
    assert file_type("Q4_K_M").number == 15
    with pytest.raises(ValueError, match="did you mean 'q4_k_m'"):
        file_type("q4_km")
