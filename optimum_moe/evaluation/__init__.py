"""Quality of compressed models: perplexity, agreement with the original, multiple choice, generation, labeled
examples, text overlap."""

from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.evaluate import evaluate, evaluate_many
from optimum_moe.evaluation.labeled import LabeledExamples, check_splits, score_examples
from optimum_moe.evaluation.lm_eval_tasks import evaluate_tasks
from optimum_moe.evaluation.result import (
    EvaluationResult,
    compare_results,
    format_results,
    mcnemar,
    paired_difference,
)
from optimum_moe.evaluation.scores import Score

__all__ = [
    "EvaluationResult",
    "LabeledExamples",
    "Score",
    "check_disjoint",
    "check_splits",
    "compare_results",
    "evaluate",
    "evaluate_many",
    "evaluate_tasks",
    "format_results",
    "mcnemar",
    "paired_difference",
    "score_examples",
]
