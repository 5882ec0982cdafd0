"""The compressed blocks of a checkpoint, and the names that their tensors have in the files and in vLLM.

In vLLM every tensor of a block's own formats is one parameter of the experts, so that it is loaded by name in all model
files, those with hand-written loaders included. Tensors under stock names stay with the stock loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optimum_moe.formats import JOINT, ExpertsSpec
from optimum_moe.formats.base import DEFAULT, ExpertFormat, get_format

GUARD = "optimum_moe_guard"
MAP = "routing_map"
"""The parameter for the tensor `expert_map` of a router; `expert_map` is taken in vLLM."""
CONSTANT = "approx_value"

_STEMS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": JOINT,
}
_MATRIX_FORMATS = (DEFAULT, "low_rank", "sparse_rows")
_TENSORS_INSTEAD = {"bias", CONSTANT}


@dataclass(frozen=True)
class CompressedBlock:
    """One block of `quantization_config`.

    Args:
        name: Its prefix in the files.
        num_experts: Rows of the router.
        num_groups: Experts that are stored.
        spec: The formats that they are stored in; None for stock experts.

    Raises:
        ValueError: If the block needs something that the plugin does not run.
    """

    name: str
    num_experts: int
    num_groups: int
    spec: ExpertsSpec | None

    def __post_init__(self) -> None:
        if self.spec is None:
            return
        odd = sorted(set(self.spec.parts) - set(_MATRIX_FORMATS))
        for name in self.spec.instead:
            tensors = get_format(name, ExpertFormat).tensors(1, 1, True)
            odd += [] if set(tensors) <= _TENSORS_INSTEAD else [name]
        if odd:
            raise ValueError(
                f"{self.name} stores experts in the format {odd[0]!r}, which the vLLM plugin does not run; it runs "
                f"{', '.join(_MATRIX_FORMATS)}, narrow, empty and constant experts. Serve it with transformers, or "
                'compress again without this format: a byte budget with runs_in="vllm+optimum_moe".'
            )
        for expert in range(self.num_groups):
            for projection, parts in self.spec.layout(expert).items():
                if DEFAULT in parts and len(parts) > 1:
                    raise ValueError(
                        f"{self.name} adds sparse rows to the dense {projection} matrix of expert {expert}, which the "
                        "vLLM plugin does not run. Serve it with transformers, or compress again with a rank for it."
                    )

    @classmethod
    def of_entry(cls, name: str, entry: Mapping[str, Any]) -> CompressedBlock:
        """From an entry of `MoEStructureConfig.blocks`."""
        experts, groups = entry["num_experts"], entry["num_groups"]
        if entry["routing"] == "reduce" and groups != experts:
            raise ValueError(
                f"{name} has a router of {groups} rows where config.json says {experts} experts (routing 'reduce'), "
                "which vLLM cannot build. Serve it with transformers, or compress again with routing='map'."
            )
        if "skipping" in entry:
            raise ValueError(
                f"Tokens of {name} skip experts with small routing weights, which the vLLM plugin does not do. Serve "
                "it with transformers, or compress without expert-skipping."
            )
        return cls(name, experts, groups, ExpertsSpec.from_dict(entry["factors"]) if "factors" in entry else None)

    @property
    def has_map(self) -> bool:
        """Whether several rows of the router lead to one expert."""
        return self.num_groups < self.num_experts

    @cached_property
    def tensors(self) -> dict[str, tuple[int, str, str]]:
        """Expert, projection and tensor of each parameter that stored matrices and constants become, without biases."""
        found: dict[str, tuple[int, str, str]] = {}
        for expert in range(self.num_groups if self.spec is not None else 0):
            assert self.spec is not None
            for projection, parts in self.spec.layout(expert).items() if self.spec.widths[expert] else ():
                for tensor in _tensors_of(parts):
                    found[parameter_name(expert, projection, tensor)] = expert, projection, tensor
            instead = self.spec.in_place_of(expert)
            if instead is not None and CONSTANT in get_format(instead[0], ExpertFormat).tensors(instead[1], 1, False):
                found[parameter_name(expert, CONSTANT, "")] = expert, CONSTANT, ""
        return found

    def renamed(self, name: str) -> str | None:
        """The parameter of the experts that a tensor becomes, by its name in the files without that of the block.

        None for tensors that the stock loaders take. Whatever the block should not have becomes `GUARD`, which takes
        nothing but the tensors of one element that keep other loaders from guessing.
        """
        if name.endswith(".expert_map"):
            return MAP
        module, _, rest = name.partition(".")
        if module != "experts":
            return None
        expert, _, tail = rest.partition(".")
        if expert == "routed_experts":
            # Renamed already, by the loader of an outer model.
            return None
        if not expert.isdecimal():
            return GUARD if self.spec is not None else None
        if int(expert) >= self.num_groups:
            return GUARD
        if self.spec is None:
            return None
        stem, _, tensor = tail.partition(".")
        if stem == CONSTANT:
            parameter = parameter_name(int(expert), CONSTANT, "")
        elif stem in _STEMS:
            parameter = parameter_name(int(expert), _STEMS[stem], tensor)
        else:
            return GUARD
        return parameter if parameter in self.tensors or tensor == "bias" else GUARD


def parameter_name(expert: int, projection: str, tensor: str) -> str:
    """The name of a parameter that holds one tensor of one expert.

    It has none of the words that loaders of vLLM look for in a name (`gate_proj`, `w13_`, ...).
    """
    return f"expert_{expert}_{projection}_{tensor}".rstrip("_")


def _tensors_of(parts: Mapping[str, int]) -> list[str]:
    """Names of the tensors of one matrix; those without any number are not stored."""
    found = ["weight"] if DEFAULT in parts else []
    if parts.get("low_rank"):
        found += ["weight_u", "weight_v"]
    if parts.get("sparse_rows"):
        found += ["weight_rows", "weight_row_index"]
    return found
