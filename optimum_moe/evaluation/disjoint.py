"""Check that calibration text and evaluation text do not overlap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

NGRAM = 13
THRESHOLD = 0.01


def check_disjoint(
    calibration_documents: Iterable[str],
    evaluation_documents: Iterable[str],
    ngram: int = NGRAM,
    threshold: float = THRESHOLD,
) -> float:
    """Share of the evaluation text's word n-grams that occur in the calibration text.

    Words are runs of letters and digits in lower case, so case, punctuation and line breaks do not hide a copy. A
    document of fewer than `ngram` words counts as one n-gram, found only when the other side has the same document.
    Scripts without spaces have few words; compare their texts by other means.

    Args:
        calibration_documents: texts that the model was calibrated or trained on.
        evaluation_documents: held-out texts.
        ngram: words of an n-gram, default 13 (GPT-3, 2005.14165, appendix C).
        threshold: highest share that passes, default 0.01.

    Returns:
        The share, in 0..1; repeated n-grams of the evaluation text count each time.

    Raises:
        ValueError: the share exceeds the threshold (with an example of shared text), `ngram` < 1, threshold outside
            0..1, or an evaluation text without a word.
    """
    if ngram < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"ngram={ngram} must be at least 1 and threshold={threshold} between 0 and 1.")
    share, example = shared_ngrams(calibration_documents, evaluation_documents, ngram)
    if share > threshold:
        raise ValueError(
            f"{share:.1%} of the evaluation text's {ngram}-word sequences occur in the calibration text (at most "
            f"{threshold:.1%} may), for instance {example!r}. Scores on seen text are too good: evaluate on held-out "
            "text, or leave documents that are in both out of one of them."
        )
    return share


def shared_ngrams(
    calibration_documents: Iterable[str], evaluation_documents: Iterable[str], ngram: int = NGRAM
) -> tuple[float, str]:
    """The share of `check_disjoint`, and an example of what both have, empty if they share nothing.

    Raises:
        ValueError: an evaluation text without a word.
    """
    counts: dict[str, int] = {}
    for gram in _ngrams(evaluation_documents, ngram):
        counts[gram] = counts.get(gram, 0) + 1
    total = sum(counts.values())
    if not total:
        raise ValueError("The evaluation text has no words, nothing can be compared. Pass text.")
    shared, example = 0, ""
    for gram in _ngrams(calibration_documents, ngram):
        found = counts.pop(gram, 0)
        if found and not example:
            example = gram
        shared += found
    return shared / total, example


def _ngrams(documents: Iterable[str], ngram: int) -> Iterator[str]:
    for document in documents:
        words = re.findall(r"\w+", document.lower())
        if 0 < len(words) < ngram:
            yield " ".join(words)
        for start in range(len(words) - ngram + 1):
            yield " ".join(words[start : start + ngram])
