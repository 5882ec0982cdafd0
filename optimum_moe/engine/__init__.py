"""The loop over units and its sources."""

from optimum_moe.engine.cutting import BlockSource, check_together
from optimum_moe.engine.memory import MemorySource, carry_out, decide_and_cut
from optimum_moe.engine.soundness import check_model

__all__ = ["BlockSource", "MemorySource", "carry_out", "check_model", "check_together", "decide_and_cut"]
