"""What the plugin refuses, by name."""

from __future__ import annotations

from typing import Any

from optimum_moe.vllm_plugin.blocks import CompressedBlock


def refuse_parallelism(block: str, moe: Any) -> None:
    """Refuse what splits or copies experts by their number.

    Args:
        block: Its name, for the message.
        moe: vLLM's `FusedMoEConfig`.

    Raises:
        ValueError: If the engine does so.
    """
    parallel = moe.moe_parallel_config
    found = {
        "expert-parallel load balancing (enable_eplb)": parallel.enable_eplb,
        "expert parallelism (enable_expert_parallel)": parallel.use_ep,
        "data parallelism (data_parallel_size)": parallel.dp_size > 1,
        "prefill context parallelism (prefill_context_parallel_size)": parallel.pcp_size > 1,
        "sequence parallelism of experts": parallel.is_sequence_parallel,
        "LoRA (enable_lora)": moe.is_lora_enabled,
        "shared experts that are fused with the routed ones": moe.aiter_fmoe_shared_expert_enabled,
    }
    for what, is_on in found.items():
        if is_on:
            raise ValueError(
                f"{block} is compressed by optimum_moe, whose vLLM plugin does not run {what}. Switch it off; tensor "
                "and pipeline parallelism are supported."
            )


def refuse_other_count(block: CompressedBlock, num_experts: int) -> None:
    """Refuse experts that are not those of the block.

    Raises:
        ValueError: If vLLM builds another number of experts than the block has.
    """
    if num_experts != block.num_experts:
        raise ValueError(
            f"{block.name} has {num_experts} experts by config.json and {block.num_experts} by its "
            "quantization_config. Restore the saved config.json."
        )
