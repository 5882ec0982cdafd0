"""Tiny random models of every supported architecture, built in process, with routers that are really exercised."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.architectures_table import DEFAULTS, FAMILIES, OTHERS, Target

__all__ = ["OTHERS", "TARGETS", "Target", "build", "by_name", "every_target", "in_full", "inputs_for", "logits_of"]

TARGETS = FAMILIES
"""What the tests build by default."""


def every_target() -> list[Any]:
    """All targets as parameters of a test; those of no family belong to the full matrix."""
    full = [pytest.param(target, id=target.name, marks=pytest.mark.full) for target in OTHERS]
    return [pytest.param(target, id=target.name) for target in TARGETS] + full


def in_full(*values: Any) -> list[Any]:
    """Parameters of a test that belong to the full matrix."""
    sets = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=pytest.mark.full) for each in sets]


def by_name(name: str) -> Target:
    return next(target for target in (*TARGETS, *OTHERS) if target.name == name)


def with_defaults(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of a config, completed by the defaults that its class knows; sub configs likewise."""
    known = {f.name for f in dataclasses.fields(config_class)}
    subs = {
        k: with_defaults(config_class.sub_configs[k], v)
        for k, v in fields.items()
        # Some name no class, but AutoConfig.
        if isinstance(v, dict) and dataclasses.is_dataclass(config_class.sub_configs.get(k))
    }
    return {k: v for k, v in DEFAULTS.items() if k in known} | fields | subs


def build(target: Target | str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A random model in eval mode; matrices from N(0, 0.08), what biases or scales single experts from N(0, 0.1)."""
    if isinstance(target, str):
        target = by_name(target)
    config_class = getattr(transformers, target.config)
    torch.manual_seed(seed)
    model = getattr(transformers, target.architecture)(
        config_class(**with_defaults(config_class, target.fields | fields))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("correction_bias", "router.bias", "_proj_bias", "expert_bias")):
                tensor.normal_(0, 0.1)
            elif "router_mlp" in name and tensor.dim() == 2:
                # Through three small layers all tokens would look the same.
                tensor.normal_(0, 0.5)
            elif name.endswith("balancing_biases"):
                # Loading resets the last one, that of the class that skips the experts, to its initial value.
                tensor[:-1].normal_(0, 0.1)
            elif name.endswith("per_expert_scale"):
                tensor.normal_(1, 0.1)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.rand(len(tensor), 8).argsort(-1)[:, : tensor.shape[1]])
    # `to` would drop the imaginary part of complex buffers.
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def inputs_for(target: Target | str, rows: int = 2, length: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids (without the padding id), with decoder ids where there is a decoder; or images."""
    if isinstance(target, str):
        target = by_name(target)
    generator = torch.Generator().manual_seed(seed)
    if target.inputs == "inputs_embeds":
        return {"inputs_embeds": torch.randn(rows, length, 64, generator=generator)}
    if target.inputs == "pixel_values":
        pixels = torch.randn(rows, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.randint(0, 8, (rows,), generator=generator)}
    inputs = {"input_ids": torch.randint(3, 99, (rows, length), generator=generator)}
    if target.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 99, (rows, length), generator=generator)
    if target.name == "ernie4_5_vl_moe":
        # Tokens of images run through experts of their own.
        inputs["moe_mm_token_type_ids"] = inputs["input_ids"] % 2
    return inputs


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head, or the last feature map of a backbone."""
    output = model(**inputs)
    if "heatmaps" in output:
        return output.heatmaps
    if "feature_maps" in output:
        return output.feature_maps[-1]
    return output.logits if "logits" in output else output.last_hidden_state
