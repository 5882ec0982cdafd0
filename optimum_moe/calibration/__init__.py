"""Calibration data, and the collection of statistics on it."""

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig, build_batches
from optimum_moe.calibration.fitting import batches_for
from optimum_moe.calibration.observe import observe

__all__ = ["CalibrationBatches", "CalibrationConfig", "batches_for", "build_batches", "observe"]
