"""Calibration data as one model takes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from optimum_moe.calibration.config import CalibrationConfig
from optimum_moe.calibration.data import CalibrationBatches, build_batches


def batches_for(model: PreTrainedModel, config: CalibrationConfig, tokenizer: Any) -> CalibrationBatches:
    """The batches that a model is observed on.

    Args:
        model: The model; may be on the meta device.
        config: What to read, and how much of it.
        tokenizer: The model's tokenizer or processor, None where it has none.

    Raises:
        ValueError: See `build_batches`.
    """
    return build_batches(
        config,
        tokenizer,
        is_encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
