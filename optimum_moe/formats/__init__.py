"""Formats: the ways in which an expert, or a part of one of its matrices, can be stored. One file a format."""

# Importing a format registers it.
from optimum_moe.formats import (  # noqa: F401
    affine,
    constant,
    dense,
    empty,
    low_rank,
    narrow,
    rounded,
    shared_base,
    sparse_rows,
)
from optimum_moe.formats.base import (
    JOINT,
    PROJECTIONS,
    AddedFormat,
    BodyFormat,
    ExpertFormat,
    Format,
    MatrixFormat,
    StoredPart,
    TensorSpec,
    register_format,
)
from optimum_moe.formats.budget import build_expert, candidates, choose
from optimum_moe.formats.budget_format import BudgetFormat, budget_formats
from optimum_moe.formats.refit import is_worth_refitting, refit_block
from optimum_moe.formats.specification import ExpertsSpec
from optimum_moe.formats.stored import StoredExpert, StoredExperts, StoredMatrix

__all__ = [
    "JOINT",
    "PROJECTIONS",
    "AddedFormat",
    "BodyFormat",
    "BudgetFormat",
    "ExpertFormat",
    "ExpertsSpec",
    "Format",
    "MatrixFormat",
    "StoredExpert",
    "StoredExperts",
    "StoredMatrix",
    "StoredPart",
    "TensorSpec",
    "budget_formats",
    "build_expert",
    "candidates",
    "choose",
    "is_worth_refitting",
    "refit_block",
    "register_format",
]
