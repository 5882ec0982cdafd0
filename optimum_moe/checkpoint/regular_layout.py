"""MoE blocks of a checkpoint whose files have a regular layout, read from config and headers alone.

Building a model on the meta device takes seconds, for the import of transformers' model classes. For the architectures
here the names and shapes in the files say as much. What does not fit exactly is left to the model's class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from optimum_moe.checkpoint.headers import Headers
from optimum_moe.model_info import BlockInfo

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_STEPS = ("decoder_sparse_step", "moe_layer_freq")
_DENSE_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_DENSE_LAYER = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
_MATRICES = (_DENSE_LAYER, {"w1.weight", "w2.weight", "w3.weight"})
_STACKS = (
    {"gate_up_proj", "down_proj"},
    {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"},
)
_LAYER = re.compile(r"(\d+)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(.+)")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Layout:
    """Where the blocks of an architecture lie, and the fields of its config.

    Args:
        architecture: Class of the model.
        width: Field with the neurons of an expert.
        top_k: Field with the number of experts that the router selects for a token.
        groups: Field with the number of router groups; empty if there are none.
        in_files: What the files call the `mlp` of a decoder layer, which is a block or a dense layer.
    """

    architecture: str
    width: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    groups: str = ""
    in_files: str = "mlp"


_LAYOUTS = {
    "afmoe": _Layout("AfmoeForCausalLM"),
    "beam": _Layout("BeamForCausalLM", groups="n_group"),
    "deepseek_v2": _Layout("DeepseekV2ForCausalLM", groups="n_group"),
    "deepseek_v3": _Layout("DeepseekV3ForCausalLM", groups="n_group"),
    "deepseek_v32": _Layout("DeepseekV32ForCausalLM", groups="n_group"),
    "dots1": _Layout("Dots1ForCausalLM", groups="n_group"),
    "exaone_moe": _Layout("ExaoneMoeForCausalLM", groups="n_group"),
    "flex_olmo": _Layout("FlexOlmoForCausalLM", width="intermediate_size"),
    "glm4_moe": _Layout("Glm4MoeForCausalLM", groups="n_group"),
    "glm4_moe_lite": _Layout("Glm4MoeLiteForCausalLM", groups="n_group"),
    "glm_moe_dsa": _Layout("GlmMoeDsaForCausalLM", groups="n_group"),
    "gpt_oss": _Layout("GptOssForCausalLM", width="intermediate_size"),
    "hunyuan_v1_moe": _Layout("HunYuanMoEV1ForCausalLM", width="intermediate_size", top_k="moe_topk"),
    "hy_v3": _Layout("HYV3ForCausalLM"),
    "kolibri1": _Layout("Kolibri1ForCausalLM"),
    "mellum": _Layout("MellumForCausalLM"),
    "mimo_v2_flash": _Layout("MiMoV2FlashForCausalLM", groups="n_group"),
    "minimax_m2": _Layout("MiniMaxM2ForCausalLM", width="intermediate_size", in_files="block_sparse_moe"),
    "mistral4": _Layout("Mistral4ForCausalLM", groups="n_group"),
    "mixtral": _Layout("MixtralForCausalLM", width="intermediate_size", in_files="block_sparse_moe"),
    "olmoe": _Layout("OlmoeForCausalLM", width="intermediate_size"),
    "qwen2_moe": _Layout("Qwen2MoeForCausalLM"),
    "qwen3_moe": _Layout("Qwen3MoeForCausalLM"),
    "qwen3_next": _Layout("Qwen3NextForCausalLM"),
    "solar_open": _Layout("SolarOpenForCausalLM", groups="n_group"),
}
"""By `model_type`, which is also the name of the surgeon."""


@dataclass(frozen=True)
class RegularModel:
    """What config and headers tell of a model.

    Args:
        architecture: Class of the model.
        surgeon: Name of the surgeon of its blocks.
        blocks: Its MoE blocks.
        flops_per_token: 2 x multiply-adds of all weight matmuls for one token, as `reporting.preview` counts them.
    """

    architecture: str
    surgeon: str
    blocks: tuple[BlockInfo, ...]
    flops_per_token: float


def regular_model(config: Mapping[str, Any], headers: Headers) -> RegularModel | None:
    """The model of a checkpoint if its layout is regular and agrees with its config; else None.

    Args:
        config: Content of `config.json`.
        headers: Headers of the weights.
    """
    layout = _LAYOUTS.get(str(config.get("model_type")))
    if layout is None or config.get("architectures") != [layout.architecture] or "quantization_config" in config:
        return None
    shapes = {name: shape for name, (_, shape, _) in headers.tensors.items()}
    layers, others = _by_layer(shapes, config.get("num_hidden_layers"))
    if layers is None or not _is_whole(others, config):
        return None
    blocks: list[BlockInfo] = []
    dense = prod(others.get("lm_head.weight", others["model.embed_tokens.weight"]))
    seen: dict[str, Shapes] = {}
    for number, layer in enumerate(layers):
        rest, beside, experts = _parts(layer, f"{layout.in_files}.")
        # Layers of one kind have the same tensors, or the files lack some.
        kinds = {f"type {_type_of(config, number)}": rest, f"block {bool(experts)}": beside}
        if any(seen.setdefault(kind, tensors) != tensors for kind, tensors in kinds.items()):
            return None
        dense += sum(prod(shape) for shape in (*rest.values(), *beside.values()) if len(shape) > 1)
        if experts:
            name = f"model.layers.{number}.mlp"
            info = _block(name, len(blocks), experts, config, layout)
            if info is None:
                return None
            blocks.append(info)
        elif beside.keys() != _DENSE_LAYER or blocks:
            return None
    if not blocks or len(layers) - len(blocks) != _dense_layers(config):
        return None
    routed = sum(info.top_k * info.expert_multiply_adds for info in blocks)
    return RegularModel(layout.architecture, str(config["model_type"]), tuple(blocks), 2.0 * (dense + routed))


def _by_layer(shapes: Shapes, number: Any) -> tuple[list[Shapes] | None, Shapes]:
    """Tensors of each decoder layer and all others, without those for multi-token prediction, which no class loads."""
    layers: dict[int, Shapes] = defaultdict(dict)
    others: Shapes = {}
    for name, shape in shapes.items():
        found = _LAYER.fullmatch(name.removeprefix("model.layers.")) if name.startswith("model.layers.") else None
        if found is not None:
            layers[int(found[1])][found[2]] = shape
        elif not name.startswith("mtp."):
            others[name] = shape
    if not isinstance(number, int) or not set(range(number)) <= layers.keys():
        return None, others
    return [layers[at] for at in range(number)], others


def _parts(layer: Shapes, block: str) -> tuple[Shapes, Shapes, Shapes]:
    """Tensors of a layer outside of its block, beside the experts, and of the experts; the latter without its name."""
    rest = {name: shape for name, shape in layer.items() if not name.startswith(block)}
    inside = {name.removeprefix(block): shape for name, shape in layer.items() if name not in rest}
    experts = {name: shape for name, shape in inside.items() if name.startswith("experts.")}
    return rest, {name: shape for name, shape in inside.items() if name not in experts}, experts


def _is_whole(others: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether exactly embeddings, a norm and a head stand beside the layers, in the sizes of the config."""
    table = (config.get("vocab_size"), config.get("hidden_size"))
    expected = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:], "lm_head.weight": table}
    if "lm_head.weight" not in others and config.get("tie_word_embeddings") is True:
        del expected["lm_head.weight"]
    return others == expected


def _type_of(config: Mapping[str, Any], layer: int) -> str:
    """The type of a layer where an architecture has several; a sliding window changes no tensor."""
    types = config.get("layer_types")
    return str(types[layer]) if isinstance(types, list) and layer < len(types) else ""


def _dense_layers(config: Mapping[str, Any]) -> int:
    """How many layers at the start have no experts; -1 if the config says it in another way than is read here."""
    if config.get("mlp_only_layers") or any(config.get(step, 1) != 1 for step in _STEPS):
        return -1
    types = config.get("mlp_layer_types")
    if isinstance(types, list):
        return types.count("dense")
    return next((int(config[name]) for name in _DENSE_LAYERS if isinstance(config.get(name), int)), 0)


def _block(name: str, index: int, experts: Shapes, config: Mapping[str, Any], layout: _Layout) -> BlockInfo | None:
    """The sizes of a block if its tensors agree with the config; else None."""
    sizes: list[Any] = [config.get(field) for field in (layout.width, "hidden_size", layout.top_k)]
    width, hidden, top_k = sizes
    groups: Any = (config[layout.groups] or 1) if layout.groups in config else None if layout.groups else 1
    counts = [config[field] for field in _COUNTS if field in config]
    known = all(type(size) is int and size > 0 for size in (*sizes, groups, *counts))
    if not known or not counts or len(set(counts)) > 1:
        return None
    expert = _expert(experts, counts[0])
    matrices = [shape for shape in expert.values() if len(shape) == 2]
    multiply_adds = sum(map(prod, matrices))
    # A matrix has the neurons at one side and the residual stream at the other; gate and up may be one.
    if multiply_adds != 3 * width * hidden or any(set(shape) - {width, 2 * width, hidden} for shape in matrices):
        return None
    return BlockInfo(
        name=name,
        index=index,
        num_experts=counts[0],
        top_k=top_k,
        router_groups=groups,
        intermediate_size=width,
        hidden_size=hidden,
        expert_parameters=sum(map(prod, expert.values())),
        expert_multiply_adds=multiply_adds,
        router_parameters=hidden,
    )


def _expert(experts: Shapes, count: int) -> Shapes:
    """Tensors of each of `count` experts, which are stored one by one or in stacks; empty if they are not alike."""
    single: dict[int, Shapes] = defaultdict(dict)
    stacks: Shapes = {}
    for name, shape in experts.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            stacks[name.removeprefix("experts.")] = shape
        else:
            single[int(found[1])][found[2]] = shape
    if not single and stacks.keys() in _STACKS and all(shape[0] == count for shape in stacks.values()):
        return {name: shape[1:] for name, shape in stacks.items()}
    alike = single.keys() == set(range(count)) and all(parts == single[0] for parts in single.values())
    return single[0] if alike and not stacks and single[0].keys() in _MATRICES else {}
