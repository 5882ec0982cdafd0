"""One pass over the layers of a model: observe, decide, cut, write."""

from optimum_moe.engine.decision import check_together
from optimum_moe.engine.memory_store import MemoryStore
from optimum_moe.engine.run import Run
from optimum_moe.engine.store import Store
from optimum_moe.engine.weight_checks import check_model

__all__ = ["MemoryStore", "Run", "Store", "check_model", "check_together"]
