"""Verification of a compressed checkpoint: its consistency, and its tensors against its plan and the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from optimum_moe.calibration.observe import running_part
from optimum_moe.checkpoint.checkpoint_tensors import CheckpointTensors, built
from optimum_moe.checkpoint.checksums import side_file_failures
from optimum_moe.checkpoint.comparison import Comparison
from optimum_moe.checkpoint.config_checks import config_failures
from optimum_moe.checkpoint.factor_comparison import compare_factors
from optimum_moe.checkpoint.headers import Headers, read_headers
from optimum_moe.checkpoint.identity import first_difference, identity
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.checkpoint.mtp import COUNT_FIELDS, MTPLayers, MTPOption, block_with, is_benign, is_mtp
from optimum_moe.checkpoint.reader import CheckpointReader, ShardReader, take_dtypes
from optimum_moe.checkpoint.source import ModelSource, open_source
from optimum_moe.checkpoint.stored import rounded
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.formats import ExpertsSpec
from optimum_moe.hf.structure import METHOD
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.reporting.verification import SHOWN, Check, VerificationReport
from optimum_moe.surgeons import FoundBlock, block_names, owning_configs, stock_block


@dataclass
class _Work:
    """State of a verification, shared by its checks."""

    directory: Path
    headers: Headers
    config: Mapping[str, Any]
    plan: CompressionPlan
    model: PreTrainedModel
    blocks: list[FoundBlock]
    checkpoint_tensors: CheckpointTensors
    source: ModelSource | None = None
    original: CheckpointTensors | None = None
    inputs: Mapping[str, torch.Tensor] | None = None
    trained: bool = False
    record: TrainingRecord | None = None

    @cached_property
    def in_files(self) -> dict[str, str]:
        """Prefix in the files of each block, by its module path."""
        return {found.info.name: block_names(self.model, found).block for found in self.blocks}


def verify(
    out: str | Path,
    against: str | Path | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    trained: bool | None = None,
) -> VerificationReport:
    """Check a compressed checkpoint tensor by tensor, with one block in memory at a time; then load and run it.

    Args:
        out: Folder of the checkpoint.
        against: The original, a folder or a Hub id, to compare every tensor with the result of the plan.
        inputs: Inputs to run the model on; by default a few token ids.
        trained: Whether weights may differ from the result of the plan, because they were trained since; the report
            then lists those that differ. By default this is detected for a checkpoint that needs this package; of one
            that `recover` wrote, the parameters that its record names may differ, and no others.

    Raises:
        ValueError: If `out` is not a folder, or `against` is not a checkpoint that can be compressed.
    """
    directory = Path(out)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder. Give the folder of a compressed checkpoint.")
    source = None if against is None else open_source(against, dequantize=_is_quantized(against))
    names = ["files", "side files", "plan", "config", "keys", "counts", "shapes"]
    names += ["experts", "routers", "other tensors", "mtp layers"] if source is not None else []
    names.append("reload")
    checks = _run(directory, source, inputs, trained)
    order = {name: i for i, name in enumerate(names)}
    missing = [Check(name, note="needs a check that failed", ran=False) for name in names if name not in checks]
    ordered = sorted([*checks.values(), *missing], key=lambda check: order[check.name])
    return VerificationReport(str(directory), tuple(ordered), None if against is None else str(against))


def _run(
    directory: Path,
    source: ModelSource | None,
    inputs: Mapping[str, torch.Tensor] | None,
    trained: bool | None,
) -> dict[str, Check]:
    checks: dict[str, Check] = {}

    def add(name: str, failures: Iterable[str] = (), note: str = "", trained: Iterable[str] = ()) -> None:
        checks[name] = Check(name, tuple(failures), note, trained=tuple(trained))

    headers = _attempt(add, "files", lambda: read_headers(directory))
    if headers is not None:
        add("files", note=f"{len(headers.files)} shards, {len(headers.tensors)} tensors, {headers.bytes:,} bytes")
    raw = _attempt(add, "config", lambda: raw_config(directory))
    if raw is None:
        return checks
    if trained is None:
        trained = bool((raw.get("quantization_config") or {}).get("saved_again"))
    if headers is not None:
        add("side files", *side_file_failures(directory, trained))
    plan = _attempt(add, "plan", lambda: CompressionPlan.from_pretrained(directory))
    record = _attempt(add, "side files", lambda: TrainingRecord.load(directory))
    model = _attempt(add, "config", lambda: built(directory, headers))
    if headers is None or plan is None or model is None:
        return checks
    skeleton, blocks = model
    source = None if source is None else source.read_in(plan.source.get("dtype", "auto"))
    with ShardReader(headers.homes) as get, ExitStack() as originals:
        reader = CheckpointReader(skeleton, headers.tensors, cast=False)
        checkpoint_tensors = CheckpointTensors(reader, headers, get)
        work = _Work(
            directory,
            headers,
            raw,
            plan,
            skeleton,
            blocks,
            checkpoint_tensors,
            source,
            inputs=inputs,
            trained=trained,
            record=record,
        )
        since = "" if record is None else f", then trained ({record.train}) on {record.tokens:,} tokens"
        add("plan", _plan_failures(work), f"{len(plan.blocks)} blocks{since}")
        if source is not None and plan.dropped:
            source = work.source = _attempt(add, "plan", partial(source.without_layers, plan.dropped))
        original = None if source is None else source.config
        failures = config_failures(
            raw,
            skeleton.config,
            blocks,
            plan,
            original,
            tensors=checkpoint_tensors.tensors,
            saved_again=trained,
            in_files=work.in_files,
        )
        add("config", failures)
        add("keys", _key_failures(work))
        add("counts", _count_failures(work))
        add("shapes", _shape_failures(work), f"{len(checkpoint_tensors.tensors)} tensors of the model")
        if source is not None and _can_be_cut(source, plan):
            wrong = [*checks["shapes"].failures, *_dtype_failures(work, source)]
            add("shapes", wrong, checks["shapes"].note)
            dtypes = {name: tensor.dtype for name, tensor in checkpoint_tensors.tensors.items()}
            take_dtypes(source.skeleton, dtypes)
            take_dtypes(skeleton, dtypes)
            work.original = source.checkpoint_tensors(originals.enter_context(source.shards()))
            for name, found in _compared(work).items():
                add(name, found.failures, f"{found.count} tensors", found.trained)
            add("mtp layers", *_mtp_failures(work))
        add("reload", *_reload_failures(work))
    return checks


def _can_be_cut(source: ModelSource, plan: CompressionPlan) -> bool:
    """Whether the plan fits the blocks of the original, so that tensors can be compared."""
    experts = {name: block.num_experts for name, block in plan.blocks.items()}
    return experts == {found.info.name: found.info.num_experts for found in source.blocks}


def _attempt(add: Callable[..., None], name: str, action: Callable[[], Any]) -> Any:
    """The result of an action; None and a failed check if it raises an error."""
    try:
        return action()
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        add(name, [str(error).split("\n")[0]])
        return None


def _is_quantized(against: str | Path) -> bool:
    try:
        config = AutoConfig.from_pretrained(against)
    except (OSError, ValueError):
        return False
    records = [getattr(owner, "quantization_config", None) for owner in owning_configs(config)]
    return any(record is not None and METHOD not in str(record) for record in records)


def _plan_failures(work: _Work) -> list[str]:
    """Check that the plan belongs to the blocks, the original, and the stored maps."""
    names = [found.info.name for found in work.blocks]
    if set(names) != set(work.plan.blocks):
        odd = sorted(set(names) ^ set(work.plan.blocks))
        return [f"plan and model have different MoE blocks: {', '.join(odd[:SHOWN])}"]
    failures = []
    for name, block in work.plan.blocks.items():
        maps = [key for key in work.checkpoint_tensors.inside(name) if key.endswith("expert_map")]
        mapped = block.routing == "map" and not block.keeps_all
        if bool(maps) != mapped:
            failures.append(f"{name}: {'no' if mapped else 'an'} expert_map is stored, but routing={block.routing!r}")
        for key, tensor in work.checkpoint_tensors.read(maps).items():
            if tensor[: block.num_experts].tolist() != list(block.labels_E):
                failures.append(f"{key} says {tensor.tolist()}, the plan's labels are {list(block.labels_E)}")
    if work.source is not None:
        difference = first_difference(work.plan.source, identity(work.source))
        if difference is not None:
            failures.append(f"the plan was made for another model, whose {difference} differs from the original's")
    return failures


def _key_failures(work: _Work) -> list[str]:
    """Check that the checkpoint has every tensor of the model, and no other."""
    given = set(work.checkpoint_tensors.tensors)
    tied: dict[str, str] = getattr(work.model, "all_tied_weights_keys", {})
    incomplete = work.checkpoint_tensors.reader.incomplete
    failures = [f"{name} is missing" for names in incomplete.values() for name in names]
    groups = [{target, other} for target, other in tied.items()]
    for key in sorted(set(work.model.state_dict()) - given):
        linked, seen = {key}, 0
        while len(linked) > seen:
            seen = len(linked)
            linked |= {name for group in groups if group & linked for name in group}
        if not linked & given and key not in work.checkpoint_tensors.broken:
            failures.append(f"{key} is missing")
    unloaded = work.checkpoint_tensors.reader.unloaded
    strange = [name for name in unloaded if not is_benign(name) and not is_mtp(name, work.model.config)]
    return failures + [f"{name} belongs to no tensor of the model" for name in strange]


def _count_failures(work: _Work) -> list[str]:
    """Check that plan, config and tensors have the same number of experts for each block."""
    failures = []
    for found in work.blocks:
        plan = work.plan.blocks.get(found.info.name)
        if plan is None:
            continue
        block = found.module(work.model)
        held = found.surgeon.factors(block)
        built_count = len(found.surgeon.experts(block).up) if held is None else held.num_experts
        counts = {"plan": plan.num_groups, "config": built_count}
        for name in _expert_names(found, block):
            stored = work.checkpoint_tensors.tensors.get(name)
            if stored is not None:
                rows = len(work.model.get_parameter(name))
                counts[name.removeprefix(f"{found.info.name}.")] = len(stored) * built_count // rows
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} by {what}" for what, count in counts.items())
            failures.append(f"{found.info.name} has {shown}")
    return failures


def _shape_failures(work: _Work) -> list[str]:
    """Check that every tensor has the shape that the model needs."""
    state = work.model.state_dict()
    broken, incomplete = work.checkpoint_tensors.broken, work.checkpoint_tensors.reader.incomplete
    wrong = [f"{name} cannot be read: {reason}" for name, reason in broken.items() if name not in incomplete]
    return wrong + [
        f"{name} has shape {tuple(tensor.shape)}, the model needs {tuple(state[name].shape)}"
        for name, tensor in work.checkpoint_tensors.tensors.items()
        if name in state and tensor.shape != state[name].shape
    ]


def _dtype_failures(work: _Work, source: ModelSource) -> list[str]:
    """Check that floating-point tensors have the dtype of the original, or the one that they were loaded in."""
    if source.quantization is not None:
        return []
    assert source.headers is not None
    names = source.headers.tensors
    with source.shards() as get:
        stored = CheckpointTensors(CheckpointReader(source.skeleton, names, cast=False), source.headers, get).tensors
    asked = work.plan.source.get("dtype", "auto")
    loaded = {str(source.config.dtype if asked == "auto" else asked).removeprefix("torch.")}
    every = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}
    failures = []
    for name, tensor in work.checkpoint_tensors.tensors.items():
        here = str(tensor.dtype).removeprefix("torch.")
        before = {str(stored[name].dtype).removeprefix("torch.")} if name in stored else every
        if tensor.is_floating_point() and here not in before | loaded:
            failures.append(f"{name} is stored in {here}, the original in {', '.join(sorted(before))}")
    return failures


def _compared(work: _Work) -> dict[str, Comparison]:
    """Compare every tensor with the result of the plan on the original, one block or conversion at a time."""
    assert work.original is not None
    assert work.source is not None
    names = frozenset(() if work.record is None else work.record.names)
    results = {name: Comparison(work.trained, names) for name in ("experts", "routers", "other tensors")}
    done: set[str] = set()
    for found in work.source.blocks:
        plan = work.plan.blocks[found.info.name]
        expected, kinds = _expected_block(work, found, plan, results["experts"])
        actual = work.checkpoint_tensors.read(expected)
        for name, tensor in expected.items():
            result = results[kinds[name]]
            result.compare(name, actual.get(name), tensor, plan if kinds[name] == "experts" else None)
        done |= {*expected, *work.original.inside(found.info.name)}
    for name in work.original.tensors:
        if name in done:
            continue
        together = [other for other in work.original.beside(name) if other not in done]
        actual = work.checkpoint_tensors.read(together)
        for other, tensor in work.original.read(together).items():
            results["other tensors"].compare(other, actual.get(other), tensor)
        done |= set(together)
    return results


def _expected_block(
    work: _Work, found: FoundBlock, plan: BlockPlan, factors: Comparison
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The expected tensors of a block, and the check that each belongs to; also compares its factors."""
    assert work.original is not None
    assert work.source is not None
    name = found.info.name
    state = work.original.read(work.original.inside(name))
    block = block_with(found, work.source.skeleton, state)
    experts, router = set(_expert_names(found, block)), _router_prefix(found, block)
    if not plan.keeps_all:
        found.surgeon.cut(block, plan)
    after = {f"{name}.{key}": tensor.detach() for key, tensor in block.state_dict().items()}
    if plan.sizes is not None:
        stored = work.checkpoint_tensors.read(work.checkpoint_tensors.inside(name))
        sizes = plan.sizes
        if work.trained and not plan.is_stock:
            sizes = ExpertsSpec.from_dict(work.config["quantization_config"]["blocks"][work.in_files[name]]["factors"])
        stock = stock_block(work.source.skeleton, work.source.blocks, plan)
        compare_factors(found, block, plan, stored, factors, sizes, stock)
        left = {f"{name}.{key}" for key in block.state_dict()} - {f"{name}.{key}" for key in plan.digest or ()}
        after = {key: tensor for key, tensor in after.items() if key in left}
    after = rounded(after, work.original.mixed(), plan)
    kinds = {}
    for key, tensor in after.items():
        changed = key not in state or state[key].shape != tensor.shape
        part = "routers" if key.startswith(router) or changed else "other tensors"
        kinds[key] = "experts" if key in experts else part
    return after, kinds


def _expert_names(found: FoundBlock, block: Any) -> list[str]:
    inside = {id(parameter) for parameter in found.surgeon.expert_parameters(block)}
    return [f"{found.info.name}.{name}" for name, p in block.named_parameters() if id(p) in inside]


def _router_prefix(found: FoundBlock, block: Any) -> str:
    """Name prefix of the block's child that contains the router's rows and other router tensors."""
    storage = found.surgeon.router_rows(block).untyped_storage().data_ptr()
    names = [name for name, p in block.named_parameters() if p.untyped_storage().data_ptr() == storage]
    # Experts that are selected by an input of the model have no router.
    return f"{found.info.name}.{names[0].partition('.')[0]}." if names else "no router"


def _mtp_failures(work: _Work) -> tuple[list[str], str]:
    """Check that multi-token-prediction layers were copied, cut or dropped completely."""
    assert work.original is not None
    assert work.source is not None
    names = [n for n in work.original.reader.unloaded if is_mtp(n, work.source.config)]
    stored = [n for n in work.checkpoint_tensors.reader.unloaded if is_mtp(n, work.model.config)]
    if not names:
        return [f"{name} is not in the original" for name in stored], "none in the original"
    if not stored:
        fields = {f: getattr(o, f, 0) for o in owning_configs(work.model.config) for f in COUNT_FIELDS}
        said = [f"{key} is {value}, but no tensor of such layers is stored" for key, value in fields.items() if value]
        return said, f"{len(names)} tensors, dropped"
    option, expected = _nearest_option(work, work.source, names, set(stored))
    odd = sorted(set(expected) ^ set(stored))
    result = Comparison(failures=[f"{name} is {'missing' if name in expected else 'not expected'}" for name in odd])
    for name in stored:
        if name in expected:
            result.compare(name, work.checkpoint_tensors.get(name), expected[name])
    return result.failures, f"{len(stored)} tensors, {'copied' if option == 'copy' else 'cut'}"


def _nearest_option(
    work: _Work, source: ModelSource, names: list[str], stored: set[str]
) -> tuple[MTPOption, dict[str, torch.Tensor]]:
    """The option that the layers were handled with, derived from the stored names, and the expected tensors."""
    copied = MTPLayers(source, "copy", tuple(names)).tensors(work.model, work.plan)
    if set(copied) == stored:
        return "copy", copied
    try:
        cut = MTPLayers(source, "cut", tuple(names)).tensors(work.model, work.plan)
    except ValueError:
        return "copy", copied
    return ("cut", cut) if len(set(cut) ^ stored) < len(set(copied) ^ stored) else ("copy", copied)


@torch.no_grad()
def _reload_failures(work: _Work) -> tuple[list[str], str]:
    """Check that the checkpoint loads twice, with the same finite outputs."""
    outputs = []
    try:
        for _ in range(2):
            cls: Any = type(work.model)
            model, report = cls.from_pretrained(work.directory, dtype="auto", output_loading_info=True)
            if report["missing_keys"]:
                return [f"{name} was missing, and is random" for name in sorted(report["missing_keys"])], ""
            for parameter in model.parameters():
                # Some kernels round differently at the unaligned addresses of a mapped file.
                parameter.data = parameter.data.clone()
            part = running_part(model.eval())
            result = part(**(work.inputs or _inputs(part)))
            outputs.append(_first_tensor(result))
            del model
    except Exception as error:
        return [f"it does not run: {type(error).__name__}: {str(error).strip()[:300]}"], ""
    failures = [] if bool(outputs[0].isfinite().all()) else ["its outputs are not finite"]
    if not failures and not torch.equal(outputs[0], outputs[1]):
        failures = ["two loads give different outputs"]
    return failures, f"outputs {tuple(outputs[0].shape)}"


def _first_tensor(output: Any) -> torch.Tensor:
    """Logits, or the first output of a model without a text head: hidden states, feature maps, heatmaps."""
    if "logits" in output:
        return output.logits
    found = next(value for value in output.values() if isinstance(value, torch.Tensor | tuple))
    return found[-1] if isinstance(found, tuple) else found


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    inputs = {"input_ids": (torch.arange(3, 19) % size)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
