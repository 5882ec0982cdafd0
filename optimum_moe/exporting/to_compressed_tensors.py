"""Export with the experts in four or eight bits as compressed-tensors stores them, which vLLM serves by itself.

The layout is `pack-quantized`: for each matrix `weight_packed` (O, X * bits / 32) int32 words, `weight_scale` (O, X /
group) in the dtype of the weights, and `weight_shape`, the numbers O and X. What is not a routed expert stays as it is,
and `quantization_config.ignore` lists it.

Shape letters: O rows of a matrix (its outputs), X columns (its inputs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_moe.algorithms import rounding
from optimum_moe.checkpoint.checkpoint_tensors import compressed_config
from optimum_moe.checkpoint.writer import spell_out
from optimum_moe.exporting.exported import Exported
from optimum_moe.exporting.staging import stage_beside_weights
from optimum_moe.formats import ExpertsSpec
from optimum_moe.formats.base import get_format
from optimum_moe.formats.rounded import ROUNDED, Rounded
from optimum_moe.hf.compat import model_from_config
from optimum_moe.runtimes import PER_EXPERT
from optimum_moe.surgeons import FoundBlock, block_names, find_blocks
from optimum_moe.surgeons.stock import stock_model

BITS = {"w4a16": 4, "w8a16": 8}
"""Bits of a weight by the name of the scheme; activations keep 16 bits."""
GROUPS = (128, 64, 32)
"""Numbers of weights that may have a scale in common, where nothing is rounded yet: the largest that fits is taken."""


@dataclass(frozen=True)
class PackedExport:
    """A checked export as a folder with packed experts.

    Args:
        checkpoint: The checkpoint.
        config: The new config.
        bits: Of a weight.
        group: Weights of a row that have a scale in common.
        modules: Names in the files of the matrices to pack.
        rounded: Whether the checkpoint holds them in words and scales already, which are then taken as they are.
        dropped: Names of tensors that belong to no model.
    """

    checkpoint: Exported
    config: Mapping[str, Any]
    bits: int
    group: int
    modules: frozenset[str]
    rounded: bool
    dropped: frozenset[str]

    def write(self, output: Path) -> None:
        """Write the folder, one file of weights at a time."""
        output.mkdir()
        stage_beside_weights(self.checkpoint, output, self.config)
        homes: dict[str, str] = {}
        size = 0
        for file in self.checkpoint.headers.files:
            tensors = dict(self._packed(file))
            save_file(tensors, output / file.name, metadata={"format": "pt"})
            homes |= dict.fromkeys(tensors, file.name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(self.checkpoint.headers.files) > 1:
            record = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
            (output / "model.safetensors.index.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _packed(self, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The new tensors of a file."""
        with safe_open(file, framework="pt") as stored:
            for name in (name for name, home in self.checkpoint.headers.homes.items() if home == file):
                module, _, last = name.rpartition(".")
                if name in self.dropped:
                    continue
                if module not in self.modules:
                    yield name, stored.get_tensor(name)
                elif not self.rounded:
                    yield from self._rounded(module, stored.get_tensor(name))
                elif last == f"weight_packed{self.bits}":
                    words = stored.get_tensor(name)
                    yield f"{module}.weight_packed", words
                    yield f"{module}.weight_shape", torch.tensor([len(words), words.shape[1] * 32 // self.bits])
                else:
                    yield f"{module}.weight_scale", stored.get_tensor(name)

    def _rounded(self, module: str, matrix_OX: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The three tensors of a matrix, each weight as the nearest number."""
        wide_OX = matrix_OX.float()
        scale_OG = rounding.group_scales(wide_OX, self.bits, self.group, matrix_OX.dtype)
        number_OX = rounding.nearest(wide_OX, scale_OG, self.bits, self.group)
        yield f"{module}.weight_packed", rounding.packed(number_OX, self.bits)
        yield f"{module}.weight_scale", scale_OG.contiguous()
        yield f"{module}.weight_shape", torch.tensor(matrix_OX.shape)


@dataclass(frozen=True)
class _Sizes:
    """The experts of a block as they are stored.

    Args:
        count: Their number.
        width: Neurons of each.
        bits: Of a weight; 0 for matrices that are not rounded.
    """

    count: int
    width: int
    bits: int


def plan_packed(checkpoint: Exported, quantize: str | None) -> PackedExport:
    """Check an export with packed experts, before any tensor is read.

    Args:
        checkpoint: A plain checkpoint, or one whose experts were all stored in 4 or 8 bits by the stage `Rounding`.
        quantize: "w4a16" or "w8a16"; None for the bits that the checkpoint has.

    Raises:
        ValueError: If vLLM reads the experts of this architecture in another way, blocks differ, the checkpoint has
            other formats or bits, or no group of weights divides the rows.
    """
    model_type = str(checkpoint.config.get("model_type", ""))
    if model_type not in PER_EXPERT:
        raise ValueError(
            f"Packed experts are read one by one, which is known of {', '.join(PER_EXPERT)}, not of "
            f"{model_type or 'a model without a type'}. Quantize with the tools of the runtime (llm-compressor)."
        )
    model = _stock_skeleton(checkpoint.directory)
    blocks = find_blocks(model)
    stored = _sizes_of(checkpoint, blocks)
    bits = _bits(checkpoint, stored, quantize)
    info = blocks[0].info
    group = _group(checkpoint, bits, stored, (info.hidden_size, stored.width))
    settings = stock_model(model, blocks, stored.count, stored.width).settings
    modules, dropped = _rounded_modules(checkpoint, [block_names(model, found).block for found in blocks], stored)
    gated = round(info.expert_multiply_adds / (info.intermediate_size * info.hidden_size))
    if len(modules) != len(blocks) * stored.count * gated:
        raise ValueError(
            f"{checkpoint.directory} stores {len(modules)} matrices of single experts, but {len(blocks)} blocks of "
            f"{stored.count} experts have {len(blocks) * stored.count * gated}. Save it again with "
            "model.save_pretrained(folder, save_original_format=True)."
        )
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "fusion_config")}
    for path, value in settings.items():
        config[path] = value
    config = spell_out(config, {found.surgeon.count_fields for found in blocks})
    config["quantization_config"] = _quantization_config(bits, group, _ignored(checkpoint, modules | dropped))
    return PackedExport(checkpoint, config, bits, group, modules, bool(stored.bits), dropped)


def _stock_skeleton(directory: Path) -> Any:
    """The model of a folder's config before it was compressed, on the meta device."""
    config, _ = compressed_config(directory)
    names = getattr(config, "architectures", None) or []
    cls: Any = getattr(transformers, names[0], AutoModelForCausalLM) if names else AutoModelForCausalLM
    with torch.device("meta"):
        return model_from_config(cls, config)


def _sizes_of(checkpoint: Exported, blocks: list[FoundBlock]) -> _Sizes:
    """What all blocks of a checkpoint have alike.

    Raises:
        ValueError: If they differ, or experts are in other formats than those of `Rounding`.
    """
    entries, sizes = checkpoint.record.get("blocks", {}), set()
    for found in blocks:
        info = found.info
        entry = entries.get(info.name)
        if entry is None:
            sizes.add(_Sizes(info.num_experts, info.intermediate_size, 0))
            continue
        if entry["routing"] == "map" and entry["num_groups"] < entry["num_experts"]:
            raise ValueError(
                f"{checkpoint.directory} has a map of the router's experts to merged ones, which vLLM runs with this "
                'package only. Merge with routing="reduce", or prune.'
            )
        spec = ExpertsSpec.from_dict(entry["factors"]) if "factors" in entry else None
        if spec is None or len(set(spec.widths)) > 1 or set(spec.instead) or len(_bits_of(spec)) > 1:
            raise ValueError(
                f"{checkpoint.directory} has experts of unlike forms in {info.name}, which compressed-tensors cannot "
                "express. Compress the original again with --runs-in any or pruning, and Rounding as the last stage."
            )
        sizes.add(_Sizes(entry["num_groups"], spec.widths[0], next(iter(_bits_of(spec)))))
    if len(sizes) > 1:
        shown = ", ".join(sorted(f"{s.count} of {s.width} neurons in {s.bits or 'all'} bits" for s in sizes))
        raise ValueError(
            f"The blocks of {checkpoint.directory} store experts of unlike sizes ({shown}), which one config.json "
            "cannot say. Compress all blocks alike."
        )
    return sizes.pop()


def _bits_of(spec: ExpertsSpec) -> set[int]:
    """The bits of all matrices of a block; 0 for a matrix in any other format."""
    bits = {name: number for number, name in ROUNDED.items()}
    layouts = [tuple(parts) for e in range(len(spec.widths)) for parts in spec.layout(e).values()]
    return {bits.get(parts[0], 0) if len(parts) == 1 else 0 for parts in layouts}


def _bits(checkpoint: Exported, stored: _Sizes, quantize: str | None) -> int:
    """Bits of the export.

    Raises:
        ValueError: If none are given for a plain checkpoint, or others than those of a rounded one.
    """
    wanted = None if quantize is None else BITS[quantize.lower()]
    if not stored.bits:
        if checkpoint.is_structured:
            raise ValueError(
                f"{checkpoint.directory} has dense experts that this package reads only. Put Rounding at the end of "
                "the recipe, or compress for stock classes (--runs-in any)."
            )
        if wanted is None:
            raise ValueError("The checkpoint has no bits yet. Pass quantize= (--quantize) w4a16 or w8a16.")
        return wanted
    if wanted not in (None, stored.bits):
        raise ValueError(
            f"{checkpoint.directory} has experts of {stored.bits} bits, which quantize={quantize!r} would round again. "
            f"Leave it out, or pass w{stored.bits}a16."
        )
    return stored.bits


def _group(checkpoint: Exported, bits: int, stored: _Sizes, rows: tuple[int, int]) -> int:
    """Weights with a common scale.

    Raises:
        ValueError: If rows do not consist of whole groups.
    """
    offered = (get_format(ROUNDED[bits], Rounded).group,) if stored.bits else GROUPS
    for group in offered:
        if all(size % group == 0 for size in rows):
            return group
    raise ValueError(
        f"vLLM needs rows of whole groups of {' or '.join(map(str, offered))} weights, but matrices of the experts of "
        f"{checkpoint.directory} have {rows[0]} and {rows[1]} columns. Compress to such a width: "
        f"NeuronPruning or ByteBudget with quantize='w{bits}a16'."
    )


def _rounded_modules(
    checkpoint: Exported, prefixes: list[str], stored: _Sizes
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the experts' matrices, and of the tensors of one element that guard a checkpoint of this package."""
    ending = f"weight_packed{stored.bits}" if stored.bits else "weight"
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})\.experts\.\d+\.\w+")
    modules, guards = set(), set()
    for name, (_, shape, _) in checkpoint.headers.tensors.items():
        module, _, last = name.rpartition(".")
        if not pattern.fullmatch(module):
            continue
        if last == ending and len(shape) == 2:
            modules.add(module)
        elif last == "weight" and shape == (1,):
            guards.add(name)
    return frozenset(modules), frozenset(guards)


def _ignored(checkpoint: Exported, packed: frozenset[str]) -> list[str]:
    """Names of all modules with a matrix that is not packed, and of the output layer, which may be tied."""
    others = {
        module
        for name, (_, shape, _) in checkpoint.headers.tensors.items()
        if len(shape) == 2 and (module := name.rpartition(".")[0]) not in packed
    }
    return sorted(others | {"lm_head"})


def _quantization_config(bits: int, group: int, ignored: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ignored,
    }
