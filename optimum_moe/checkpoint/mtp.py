"""Multi-token-prediction layers, whose tensors the model does not load, so that saving would lose them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from optimum_moe.checkpoint.quantized import quantizer_of, read_dequantized, unpacked
from optimum_moe.checkpoint.reader import CheckpointReader, Get, take_dtypes
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.hf.compat import revert_weight_conversion
from optimum_moe.plan import BlockPlan, CompressionPlan, Routing
from optimum_moe.recipe import Recipe
from optimum_moe.settings import choose_one
from optimum_moe.surgeons import FoundBlock, owning_configs

MTPOption = Literal["error", "copy", "cut", "drop"]
COUNT_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
MTP_FILE = "model-mtp.safetensors"

_NAMED = re.compile(r"(^|\.)mtp[^.]*\.")
_LAYER = re.compile(r"^.*?\blayers\.(\d+)\.")
# Buffers that transformers computes, and scales of a quantized KV cache, which are not needed with bf16 values.
_BENIGN = re.compile(r"(rotary_emb\.(original_)?inv_freq|(^|\.)position_ids|\.[kv]_scale|\.input_scale)$")


@dataclass(frozen=True)
class MTPLayers:
    """The multi-token-prediction (MTP) layers of a checkpoint, and the option that handles them.

    Args:
        source: The checkpoint.
        option: `"copy"`, `"cut"` (like the last MoE block) or `"drop"`.
        names: Names of their stored tensors; empty if the checkpoint has no such layers.
    """

    source: ModelSource
    option: MTPOption
    names: tuple[str, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether the layers have routed experts."""
        return any(".experts." in name for name in self.names)

    def check_plan(self, plan: CompressionPlan) -> None:
        """Call `check_counts` with the counts of a plan."""
        counts = {name: block.num_groups for name, block in plan.blocks.items()}
        self.check_counts(counts, "reduce" if plan.is_plain else "map")

    def check_counts(self, counts: Mapping[str, int], routing: Routing) -> None:
        """Raise a `ValueError` if copied layers would contradict the expert count in the config."""
        before = {found.info.name: found.info.num_experts for found in self.source.blocks}
        plain = routing == "reduce" and len(set(counts.values())) == 1 and counts != before
        if self.option == "copy" and plain and self.has_experts:
            raise ValueError(
                f'mtp="copy" would keep {max(before.values())} experts in the multi-token-prediction layers, but the '
                f'config would have {max(counts.values())} for the whole model. Pass mtp="cut" to cut them too, or '
                'mtp="drop".'
            )

    def check_drop(self, recipe: Recipe) -> None:
        """Raise a `ValueError` if there are such layers, which follow on the last layer, and a recipe drops layers."""
        if self.names and self.option != "drop":
            raise ValueError(
                f"{recipe.name} drops layers, and the multi-token-prediction layers of {self.source.name} predict from "
                f'all of them; mtp={self.option!r} would keep them. Pass mtp="drop".'
            )

    def check_recipe(self, recipe: Recipe, remaining: ModelSource) -> None:
        """Raise a `ValueError` if the layers cannot have the experts that a recipe leaves.

        Args:
            recipe: The recipe.
            remaining: What is left of the model for the stages that change blocks.
        """
        info = remaining.info
        if self.option in ("copy", "cut") and self.has_experts and any(s.stores_stock_experts for s in recipe.stages):
            raise ValueError(
                f"mtp={self.option!r} keeps experts of the original width in the multi-token-prediction layers, but "
                f"{recipe.name} for stock classes changes the width that the config gives for the whole model. Pass "
                'mtp="drop", or runs_in="transformers".'
            )
        costs = recipe.costs(info)
        if not recipe.is_adaptive:
            # For an adaptive allocation this is the average; `check_plan` checks the final counts.
            self.check_counts({name: cost.experts for name, cost in costs.items()}, recipe.routing)
        last = info.blocks[-1].name
        if self.option == "cut" and self.names and not costs[last].stock:
            raise ValueError(
                f'mtp="cut" merges or removes experts, and {recipe.name} keeps those of {last} in factors, which '
                'multi-token-prediction layers cannot hold. Pass mtp="copy" or mtp="drop".'
            )

    def size(self, counts: Mapping[str, int], routing: Routing) -> tuple[int, int]:
        """Parameters and bytes of the written layers if the blocks keep `counts` experts."""
        if self.option == "drop":
            return 0, 0
        before, gone = self._stored_size(), self.removed(counts, routing)
        return before[0] - gone[0], before[1] - gone[1]

    def removed(self, counts: Mapping[str, int], routing: Routing) -> tuple[int, int]:
        """Parameters and bytes removed from the layers if the blocks keep `counts` experts."""
        if self.option == "drop":
            return self._stored_size()
        if self.option != "cut" or not self.names:
            return 0, 0
        info = self.source.blocks[-1].info
        number = (info.num_experts - counts[info.name]) * len(self._prefixes(self.source.reader()))
        each, size = info.expert_parameters, info.bytes_of_experts(1, info.expert_parameters)
        if routing == "reduce":
            each, size = each + info.router_parameters, size + info.router_parameters * info.router_itemsize
        return number * each, int(number * size)

    def _stored_size(self) -> tuple[int, int]:
        if not self.names:
            return 0, 0
        assert self.source.headers is not None
        plain = self.source.headers if self.source.quantization is None else unpacked(self.source.headers)
        found = [plain.tensors[name] for name in self.names if name in plain.tensors]
        numbers = sum(prod(shape) for _, shape, _ in found)
        if not self.source.as_stored:
            return numbers, int(numbers * self.source.blocks[-1].info.expert_itemsize)
        return numbers, sum(size for _, _, size in found)

    def update_config(self, config: PreTrainedConfig) -> None:
        """Set the number of such layers in the config to zero, if they are dropped."""
        if self.option != "drop" or not self.names:
            return
        for owner in owning_configs(config):
            for field in COUNT_FIELDS:
                if getattr(owner, field, None):
                    setattr(owner, field, 0)

    def write(self, directory: Path, model: PreTrainedModel, plan: CompressionPlan) -> None:
        """Add the layers to a written checkpoint as another shard of its index.

        Raises:
            ValueError: If they are to be cut and their experts differ from those of the last MoE block.
        """
        if self.option == "drop" or not self.names:
            return
        tensors = self.tensors(model, plan)
        index = directory / INDEX_FILE
        if index.is_file():
            record = json.loads(index.read_text(encoding="utf-8"))
        else:
            headers = read_headers(directory)
            file = (directory / SINGLE_FILE).rename(directory / "model-00001-of-00001.safetensors")
            weight_map = dict.fromkeys(headers.tensors, file.name)
            record = {"metadata": {"total_size": headers.bytes}, "weight_map": weight_map}
        save_file(tensors, directory / MTP_FILE, metadata={"format": "pt"})
        record["weight_map"] |= dict.fromkeys(sorted(tensors), MTP_FILE)
        record["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in tensors.values())
        index.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def tensors(self, model: PreTrainedModel, plan: CompressionPlan) -> dict[str, torch.Tensor]:
        """The tensors to write: copied (dequantized if the checkpoint is quantized) or cut.

        Args:
            model: The compressed model, for the dtypes and the saved names.
            plan: How its blocks were cut.
        """
        found = self.source.blocks[-1]
        block_plan = plan.blocks[found.info.name]
        take_dtypes(self.source.skeleton, {name: t.dtype for name, t in model.state_dict().items()})
        reader = self.source.reader(cast=False)
        with self.source.shards() as get:
            if self.option == "copy" or block_plan.is_identity:
                return self._copied(self.names, get)
            cut: dict[str, torch.Tensor] = {}
            inside: set[str] = set()
            for prefix in self._prefixes(reader):
                cut |= self._cut(prefix, block_plan, reader, get, model)
                inside |= {prefix + name for name in self._relative(reader)}
            return self._copied(set(self.names) - inside, get) | cut

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors that are copied or cut."""
        if self.names and self.option in ("copy", "cut"):
            with self.source.shards() as get:
                for name in self.names:
                    yield name, get(name)

    def _copied(self, names: Iterable[str], get: Get) -> dict[str, torch.Tensor]:
        quantization = self.source.quantization
        if quantization is None:
            return {name: get(name) for name in names}
        dtype = getattr(torch, str(self.source.config.dtype).removeprefix("torch."))
        return read_dequantized(names, get, quantizer_of(quantization), dtype)

    def _relative(self, reader: CheckpointReader) -> list[str]:
        """Names of the last block's tensors without the prefix of their layer."""
        return [_layer(name)[1] for name in reader.names(self.source.blocks[-1].info.name)]

    def _prefixes(self, reader: CheckpointReader) -> list[str]:
        """Prefixes of the MTP layers that have a block like the last one."""
        relative = self._relative(reader)
        known = set(self.names)
        ends = [name[: -len(relative[0])] for name in self.names if name.endswith(f".{relative[0]}")]
        prefixes = sorted(end for end in ends if known.issuperset(end + name for name in relative))
        found = {name for prefix in prefixes for name in known if name.startswith(prefix)}
        strange = [name for name in self.names if ".experts." in name and name not in found]
        assert self.source.headers is not None
        sizes = self.source.headers.tensors
        layer = _layer(reader.names(self.source.blocks[-1].info.name)[0])[0]
        strange += [p + n for p in prefixes for n in relative if sizes[p + n][1] != sizes[layer + n][1]]
        # With individual tensors per expert, one expert more than the block has would be a separate tensor.
        strange += [n for n in found if re.search(rf"\.experts\.{self.source.blocks[-1].info.num_experts}\.", n)]
        if strange:
            raise ValueError(
                f'mtp="cut" needs layers whose experts are like those of {self.source.blocks[-1].info.name}, but '
                f'{strange[0]} is not. Pass mtp="copy" or mtp="drop".'
            )
        return prefixes

    def _cut(
        self, prefix: str, plan: BlockPlan, reader: CheckpointReader, get: Get, model: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        found = self.source.blocks[-1]
        state = reader.read(found.info.name, lambda name: get(prefix + _layer(name)[1]))
        block = block_with(found, self.source.skeleton, state)
        # Groups and weights come from the last block; neuron alignment and router rows from these layers. Neurons of
        # the last block say nothing of theirs, which are averaged.
        aligned = plan.permutations_EI is not None or plan.sources_GI is not None
        plan = replace(plan, router_fit=None, sources_GI=None)
        if aligned:
            labels_E = torch.tensor(plan.labels_E)
            aligned_EI = align_experts(found.surgeon.experts(block), labels_E, plan.references_G)
            plan = replace(plan, permutations_EI=aligned_EI)
        found.surgeon.cut(block, plan)
        saved = {f"{found.info.name}.{name}": tensor.detach() for name, tensor in block.state_dict().items()}
        reverted = revert_weight_conversion(model, saved)
        return {prefix + _layer(name)[1]: tensor.contiguous().clone() for name, tensor in reverted.items()}


def find_mtp(source: ModelSource, option: MTPOption = "error") -> MTPLayers:
    """Find the tensors of a checkpoint that the model does not load.

    Args:
        source: The checkpoint.
        option: Handling of multi-token-prediction layers; `"error"` refuses a checkpoint that has some.

    Raises:
        ValueError: If there are MTP layers and the option is `"error"`, or other tensors that are not loaded.
    """
    choose_one("mtp", option, ("error", "copy", "cut", "drop"))
    if source.headers is None:
        if option != "error":
            raise ValueError(f"mtp={option!r} needs a checkpoint, but this model is in memory. Pass its path instead.")
        return MTPLayers(source, option)
    unloaded = [name for name in source.reader().unloaded if not is_benign(name)]
    names = [name for name in unloaded if is_mtp(name, source.config)]
    others = sorted(set(unloaded) - set(names))
    if others:
        raise ValueError(
            f"{source.name} has {len(others)} tensors that {type(source.skeleton).__name__} does not load "
            f"({', '.join(others[:3])}), and the compressed checkpoint would lack them. Pass auto_class= with "
            "the class that has them, or remove them from the checkpoint."
        )
    if names and option == "error":
        kinds = sorted({_kind(name) for name in names})
        raise ValueError(
            f"This checkpoint has {len(names)} tensors of multi-token-prediction layers that transformers does not "
            f'load ({", ".join(kinds)}). Pass mtp="copy" to copy them, mtp="cut" to cut their experts like the last '
            'MoE block, or mtp="drop" to leave them out.'
        )
    layers = MTPLayers(source, option, tuple(names))
    if option == "cut" and names:
        layers.removed({found.info.name: found.info.num_experts for found in source.blocks}, "map")
    return layers


def is_mtp(name: str, config: PreTrainedConfig) -> bool:
    """Whether a tensor that the model does not load belongs to a multi-token-prediction layer."""
    layer = _LAYER.match(name)
    beyond = layer is not None and int(layer[1]) >= getattr(config.get_text_config(), "num_hidden_layers", 1 << 30)
    return beyond or _NAMED.search(name) is not None


def is_benign(name: str) -> bool:
    """Whether a tensor that the model does not load can be dropped without loss."""
    return _BENIGN.search(name) is not None


def block_with(found: FoundBlock, skeleton: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Any:
    """A copy of a single block with given tensors.

    Args:
        found: The block.
        skeleton: Its model on the meta device, which is not changed.
        state: The tensors by their names in the model.
    """
    block = deepcopy(found.module(skeleton))
    prefix = f"{found.info.name}."
    block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()}, assign=True)
    return block


def _layer(name: str) -> tuple[str, str]:
    """Split a tensor name after its layer index."""
    found = _LAYER.match(name)
    assert found is not None, name
    return found[0], name[found.end() :]


def _kind(name: str) -> str:
    layer = _LAYER.match(name)
    if _NAMED.search(name) is None and layer is not None:
        return f"{layer[0]}*"
    return f"{name[: _NAMED.search(name).end()]}*"  # type: ignore[union-attr]
