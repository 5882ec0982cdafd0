"""The block loop and its sources."""

from optimum_moe.engine.memory import BlockSource, MemorySource, carry_out, decide_and_cut

__all__ = ["BlockSource", "MemorySource", "carry_out", "decide_and_cut"]
