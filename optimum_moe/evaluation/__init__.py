"""Quality of compressed models: perplexity, agreement with the original, multiple choice, generation, text overlap."""

from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.evaluate import evaluate, evaluate_many
from optimum_moe.evaluation.result import EvaluationResult, format_results, paired_difference
from optimum_moe.evaluation.scores import Score

__all__ = [
    "EvaluationResult",
    "Score",
    "check_disjoint",
    "evaluate",
    "evaluate_many",
    "format_results",
    "paired_difference",
]
