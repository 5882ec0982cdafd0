"""`MoECompressor`: observe, decide, cut and write, behind four calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_moe.calibration import CalibrationConfig, build_batches, observe
from optimum_moe.checkpoint.quantizer import MoEStructureConfig, mark_config
from optimum_moe.checkpoint.source import ModelSource, load_tokenizer, open_source
from optimum_moe.checkpoint.writer import (
    check_destination,
    check_space,
    set_expert_count,
    write_model,
    written_beside,
)
from optimum_moe.engine import MemorySource, carry_out, decide_and_cut
from optimum_moe.methods import Method
from optimum_moe.methods.counts import choose_one
from optimum_moe.plan import CompressionPlan
from optimum_moe.recipes import Recipe, check_fields, load_recipe
from optimum_moe.reporting.card import CardFacts, model_card
from optimum_moe.reporting.preview import Cost, Preview, flops_per_token, preview
from optimum_moe.statistics import Statistics

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "compression_report.json"
_CALIBRATION_SETTINGS = [f for f in CalibrationConfig.__dataclass_fields__ if f != "source"]


class MoECompressor:
    """Compresses one Mixture-of-Experts model. Make it with `from_pretrained`.

    Example:
        ```python
        compressor = MoECompressor.from_pretrained("org/model", MSMoE(num_experts=8), calibration="corpus.txt")
        print(compressor.preview())
        model = compressor.apply()
        compressor.save_pretrained("out")
        ```
    """

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        calibration: CalibrationConfig | None = None,
        seed: int = 0,
        tokenizer: Any = None,
        output_dir: Path | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.calibration = calibration
        self.seed = seed
        self.output_dir = output_dir
        self.overwrite = overwrite
        self.progress = progress
        self.model: PreTrainedModel | None = None
        self.plan: CompressionPlan | None = None
        self.statistics: Statistics | None = None
        self._tokenizer = tokenizer
        self._before: Cost | None = None
        self._partly_cut = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        method: Method | Sequence[Method] | Recipe | str | Path,
        calibration: Any = None,
        *,
        engine: str = "auto",
        output_dir: str | Path | None = None,
        seed: int | None = None,
        auto_class: type | None = None,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        overwrite: bool = False,
        progress: bool = True,
        **kwargs: Any,
    ) -> MoECompressor:
        """Check everything that can be checked from config and headers; no weight is read yet.

        Args:
            model: Hub id, local path, or a `PreTrainedModel` in memory (which is then changed in place).
            method: A method such as `MSMoE(num_experts=8)`, a preset name, or the path of a YAML recipe.
            calibration: A `CalibrationConfig`, path of a .txt/.jsonl/.parquet file, list of strings or chats,
                `datasets.Dataset`, or iterable of model inputs; None for data-free methods.
            engine: `"auto"` or `"memory"`.
            output_dir: Folder that `apply()` writes the checkpoint to; it then returns the path.
            seed: Seed of the calibration sample and of everything random; default the recipe's, else 0.
            auto_class: Auto class or model class; by default the architecture that the config names.
            tokenizer: Tokenizer or processor; by default the checkpoint's.
            dtype: Of the weights; `"auto"` (default) keeps the checkpoint's.
            device_map: As in `from_pretrained`.
            overwrite: Allow `output_dir` to be replaced.
            progress: Show progress bars.
            kwargs: Everything else goes to `from_pretrained` of the model class.

        Raises:
            ValueError: If the model, the method's settings, the calibration data or the output folder do not fit.
        """
        choose_one("engine", engine, ("auto", "memory"))
        recipe = _coerce_method(method)
        seed = next((s for s in (seed, recipe.seed) if s is not None), 0)
        check_fields(recipe.calibration, [*_CALIBRATION_SETTINGS, "source"])
        data = calibration if calibration is not None else recipe.calibration.get("source")
        config = None if data is None else CalibrationConfig.coerce(data)
        if config is not None and not isinstance(data, CalibrationConfig):
            settings = {k: v for k, v in recipe.calibration.items() if k != "source"}
            config = replace(config, **{"seed": seed, **settings})
        destination = None if output_dir is None else check_destination(output_dir, overwrite)
        if device_map is not None:
            kwargs["device_map"] = device_map
        source = open_source(model, auto_class, dtype, **kwargs)
        if destination is not None:
            _refuse_original(destination, source)
        recipe.method.counts(source.info)
        return cls(source, recipe, config, seed, tokenizer, destination, overwrite, progress)

    @property
    def method(self) -> Method:
        """The method."""
        return self.recipe.method

    def preview(self) -> Preview:
        """Parameters, bytes and FLOPs a token before and after, from config and headers."""
        counts = self.method.counts(self.source.info)
        return preview(
            self.source.skeleton, list(self.source.blocks), self.source.info, counts, self.method.block_routing
        )

    def calibrate(self) -> Statistics:
        """Observe the model on the calibration data; the result serves other methods and ratios too.

        Raises:
            ValueError: If there are no calibration data, or they do not fit the model.
        """
        if self.calibration is None:
            raise ValueError(
                f"{self.method.name} needs calibration data. Pass calibration='corpus.txt', or another source."
            )
        self._refuse_second_cut()
        model_config = self.source.config
        batches = build_batches(
            self.calibration,
            self.tokenizer,
            is_encoder_decoder=bool(getattr(model_config, "is_encoder_decoder", False)),
            decoder_start_token_id=getattr(model_config, "decoder_start_token_id", None),
        )
        self.statistics = observe(
            self._loaded(), self.source.blocks, batches, self.calibration, self.source.identity(), self.progress
        )
        return self.statistics

    def apply(self, statistics: Statistics | None = None, plan: CompressionPlan | None = None) -> Any:
        """Decide and cut.

        Args:
            statistics: Of an earlier `calibrate()`; by default this calibrates.
            plan: Carry out this plan instead of deciding one.

        Returns:
            The compressed model in eval mode, or the path of the checkpoint where `output_dir` was given.

        Raises:
            ValueError: If statistics or plan belong to another model.
        """
        self._refuse_second_cut()
        if plan is not None:
            _check_belongs("plan", plan.source, self.source)
        elif statistics is not None:
            _check_belongs("statistics", statistics.source, self.source)
            self.statistics = statistics
        elif self.method.needs_statistics and self.statistics is None:
            self.calibrate()
        if self.output_dir is not None:
            check_space(self.output_dir, self.preview().after.bytes)
        model = self._loaded()
        self.plan = plan = self._cut(MemorySource(model, self.source.blocks), plan)
        _mark_structure(model, self.source, plan)
        model.eval()
        if self.output_dir is None:
            return model
        return self.save_pretrained(self.output_dir, overwrite=self.overwrite)

    def save_pretrained(
        self,
        directory: str | Path,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
    ) -> Path:
        """Write weights, config, tokenizer or processor, plan, recipe, report and model card.

        Everything is written beside `directory` and renamed at the end.

        Args:
            directory: Where to; must be empty or new unless `overwrite`.
            overwrite: Replace what is there.
            max_shard_size: As in transformers.
            push_to_hub: Also upload the folder.
            repo_id: Hub repository, by default the name of the folder.
            token: Hub token.

        Returns:
            The folder.

        Raises:
            ValueError: If `apply()` was not called, or the folder cannot be written.
        """
        if self.model is None or self.plan is None:
            raise ValueError("Nothing to save yet. Call apply() first.")
        directory = check_destination(directory, overwrite)
        _refuse_original(directory, self.source)
        check_space(directory, sum(p.numel() * p.element_size() for p in self.model.parameters()))
        with written_beside(directory) as beside:
            write_model(self.model, beside, self.source.blocks, max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(beside)
            self.plan.save_pretrained(beside)
            recipe = self.recipe.to_yaml()
            (beside / RECIPE_FILE).write_text(recipe)
            cost = self.measured()
            (beside / REPORT_FILE).write_text(json.dumps(cost.to_dict(), indent=1) + "\n")
            facts = CardFacts(self.source.name, type(self.model).__name__, cost, self.plan, recipe)
            (beside / "README.md").write_text(model_card(facts, directory.name))
        if push_to_hub:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            url = api.create_repo(repo_id or directory.name, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=directory)
        return directory

    def measured(self) -> Preview:
        """Like `preview()`, after `apply()`: actual counts, and FLOPs with repeats as they were observed."""
        assert self.plan is not None
        assert self.model is not None
        blocks, plan = list(self.source.blocks), self.plan
        counts = {name: block.num_groups for name, block in plan.blocks.items()}
        cost = preview(self.source.skeleton, blocks, self.source.info, counts, self.method.block_routing)
        if self._before is not None:
            # A model in memory was cut itself: its skeleton no longer tells what it was.
            cost = replace(cost, before=self._before)
        parameters = sum(p.numel() for p in self.model.parameters())
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        active = {found.info.name: float(min(found.info.top_k, counts[found.info.name])) for found in blocks}
        if self.statistics is not None:
            for name, block in plan.blocks.items():
                if (
                    block.routing == "map"
                    and not block.is_identity
                    and len(self.statistics.blocks[name].reservoir.index_SK)
                ):
                    active[name] = self.statistics.blocks[name].mean_distinct(block.labels_E)
        flops = flops_per_token(self.model, blocks, active)
        return replace(cost, after=Cost(parameters, size, flops, flops), plain=plan.is_plain)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer or processor of the checkpoint; None if it has none."""
        if self._tokenizer is None and self.source.directory is not None:
            self._tokenizer = load_tokenizer(
                self.source.directory, bool(self.source.load_arguments.get("trust_remote_code"))
            )
        return self._tokenizer

    def _loaded(self) -> PreTrainedModel:
        if self.model is None:
            self._before = self.preview().before
            self.model = self.source.load()
        return self.model

    def _cut(self, blocks: MemorySource, plan: CompressionPlan | None) -> CompressionPlan:
        try:
            if plan is not None:
                carry_out(blocks, plan)
                return plan
            used = self.statistics if self.method.needs_statistics else None
            identity = self.source.identity()
            return decide_and_cut(blocks, self.source.info, self.method, used, self.seed, identity, self.progress)
        except BaseException:
            # Some blocks may be cut by now: a checkpoint is read again next time, a model in memory is lost.
            self._partly_cut, self.model = self.source.live is not None, None
            raise

    def _refuse_second_cut(self) -> None:
        if self._partly_cut:
            raise ValueError("An earlier apply() stopped in the middle and left the model partly cut. Load it again.")
        if self.plan is not None:
            raise ValueError("This model was already cut. Make a new MoECompressor from the original checkpoint.")


def _coerce_method(method: Any) -> Recipe:
    if isinstance(method, Recipe):
        return method
    if isinstance(method, Method):
        return Recipe(method)
    if isinstance(method, Sequence) and not isinstance(method, str):
        if len(method) != 1 or not isinstance(method[0], Method):
            raise ValueError(
                f"A list of methods may hold one method that merges or prunes experts, got {len(method)} entries. "
                "Pass exactly one."
            )
        return Recipe(method[0])
    if isinstance(method, (str, Path)):
        return load_recipe(method)
    raise ValueError(
        f"method={type(method).__name__} is none. Pass a method such as MSMoE(num_experts=8), the name of a preset, "
        "or the path of a YAML recipe."
    )


def _refuse_original(directory: Path, source: ModelSource) -> None:
    original = None if source.directory is None else source.directory.resolve()
    if original is not None and (original == directory or directory in original.parents):
        raise ValueError(f"{directory} holds the original checkpoint, which would be replaced. Choose another folder.")


def _check_belongs(what: str, made_from: Any, source: ModelSource) -> None:
    here = source.identity()
    for key in ("architecture", "num_experts", "fingerprint"):
        there = made_from.get(key)
        if there is not None and here[key] is not None and there != here[key]:
            raise ValueError(
                f"The {what} passed to apply() belong to {made_from.get('name')} ({made_from.get('architecture')}), "
                f"whose {key} differs from that of {here['name']} ({here['architecture']}). "
                "Use those of this checkpoint."
            )


def _mark_structure(model: PreTrainedModel, source: ModelSource, plan: CompressionPlan) -> None:
    """Make config and model agree, so that `model.save_pretrained` writes what loads again."""
    if plan.is_plain:
        count = next(iter(plan.blocks.values())).num_groups
        set_expert_count(model, source.blocks, count)
    elif plan.structure():
        mark_config(model.config, MoEStructureConfig(plan.structure()))
