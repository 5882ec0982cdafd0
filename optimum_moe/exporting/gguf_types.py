"""The tensor types of GGUF files, and the file types that llama.cpp makes of them, as rows of data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileType:
    """A file type that an export can ask for.

    Args:
        name: As in `quantize`.
        number: llama.cpp's number of it (`llama_ftype`).
        main: Tensor type of most matrices.
        needs_importance: Whether llama.cpp refuses it without an importance matrix.
    """

    name: str
    number: int
    main: str
    needs_importance: bool = False

    @property
    def is_converted(self) -> bool:
        """Whether the converter writes it, so that llama.cpp's quantizer is not needed."""
        return self.name in CONVERTED


CONVERTED = ("f32", "f16", "bf16")
"""Types that hold a checkpoint's own values, which the converter writes."""

FILE_TYPES: tuple[FileType, ...] = (
    FileType("f32", 0, "F32"),
    FileType("f16", 1, "F16"),
    FileType("bf16", 32, "BF16"),
    FileType("q8_0", 7, "Q8_0"),
    FileType("q6_k", 18, "Q6_K"),
    FileType("q5_k_m", 17, "Q5_K"),
    FileType("q5_k_s", 16, "Q5_K"),
    FileType("q5_1", 9, "Q5_1"),
    FileType("q5_0", 8, "Q5_0"),
    FileType("q4_k_m", 15, "Q4_K"),
    FileType("q4_k_s", 14, "Q4_K"),
    FileType("iq4_nl", 25, "IQ4_NL"),
    FileType("iq4_xs", 30, "IQ4_XS"),
    FileType("q4_1", 3, "Q4_1"),
    FileType("q4_0", 2, "Q4_0"),
    FileType("q3_k_l", 13, "Q3_K"),
    FileType("q3_k_m", 12, "Q3_K"),
    FileType("q3_k_s", 11, "Q3_K"),
    FileType("iq3_s", 26, "IQ3_S"),
    FileType("iq3_xxs", 23, "IQ3_XXS", needs_importance=True),
    FileType("q2_k", 10, "Q2_K"),
    FileType("q2_k_s", 21, "Q2_K", needs_importance=True),
    FileType("iq2_s", 28, "IQ2_S", needs_importance=True),
    FileType("iq2_xs", 20, "IQ2_XS", needs_importance=True),
    FileType("iq2_xxs", 19, "IQ2_XXS", needs_importance=True),
)


@dataclass(frozen=True)
class TensorType:
    """How the values of a tensor are stored.

    Args:
        number: Its number in GGUF files (`ggml_type`).
        block: Values of a row that are stored together: row lengths must be multiples of it.
        bytes: Bytes of a block.
        fallback: What llama.cpp stores instead where a row length is not a multiple of `block`; F16 where that does
            not fit either.
    """

    number: int
    block: int
    bytes: int
    fallback: str = "F16"


TENSOR_TYPES: dict[str, TensorType] = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q2_K": TensorType(10, 256, 84, "Q4_0"),
    "Q3_K": TensorType(11, 256, 110, "Q4_0"),
    "Q4_K": TensorType(12, 256, 144, "Q5_0"),
    "Q5_K": TensorType(13, 256, 176, "Q5_1"),
    "Q6_K": TensorType(14, 256, 210, "Q8_0"),
    "IQ2_XXS": TensorType(16, 256, 66, "IQ4_NL"),
    "IQ2_XS": TensorType(17, 256, 74, "IQ4_NL"),
    "IQ3_XXS": TensorType(18, 256, 98, "IQ4_NL"),
    "IQ4_NL": TensorType(20, 32, 18),
    "IQ3_S": TensorType(21, 256, 110, "IQ4_NL"),
    "IQ2_S": TensorType(22, 256, 82, "IQ4_NL"),
    "IQ4_XS": TensorType(23, 256, 136, "IQ4_NL"),
    "I8": TensorType(24, 1, 1),
    "I16": TensorType(25, 1, 2),
    "I32": TensorType(26, 1, 4),
    "I64": TensorType(27, 1, 8),
    "F64": TensorType(28, 1, 8),
    "BF16": TensorType(30, 1, 2),
    "MXFP4": TensorType(39, 32, 17),
}
"""Tensor types by name, with the sizes of `GGML_QUANT_SIZES` in llama.cpp's gguf-py."""


def file_type(name: str) -> FileType:
    """The file type of that name.

    Raises:
        ValueError: If there is none.
    """
    from optimum_moe.settings import choose_one

    choose_one("quantize", name.lower(), [kind.name for kind in FILE_TYPES])
    return next(kind for kind in FILE_TYPES if kind.name == name.lower())


def stored_as(main: str, row: int) -> str:
    """The tensor type that llama.cpp stores rows of `row` values in where a file's main type is `main`."""
    kind = TENSOR_TYPES[main]
    if row % kind.block == 0:
        return main
    return kind.fallback if row % TENSOR_TYPES[kind.fallback].block == 0 else "F16"
