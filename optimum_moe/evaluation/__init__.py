"""Quality of compressed models: perplexity, agreement with the original, multiple choice, generation, labeled
examples, text overlap."""

from optimum_moe.evaluation.disjoint import check_disjoint
from optimum_moe.evaluation.evaluate import evaluate, evaluate_many
from optimum_moe.evaluation.labeled import LabeledExamples, check_splits, score_examples
from optimum_moe.evaluation.result import EvaluationResult, format_results, mcnemar, paired_difference
from optimum_moe.evaluation.scores import Score

__all__ = [
    "EvaluationResult",
    "LabeledExamples",
    "Score",
    "check_disjoint",
    "check_splits",
    "evaluate",
    "evaluate_many",
    "format_results",
    "mcnemar",
    "paired_difference",
    "score_examples",
]
