"""`MoECompressor`: preview, calibrate, apply and save, in four calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import PreTrainedModel

from optimum_moe.calibration import CalibrationConfig, batches_for
from optimum_moe.calibration.data import CalibrationBatches
from optimum_moe.checkpoint.carried_files import carry_files
from optimum_moe.checkpoint.compatibility import check_plan, check_statistics, mark_structure, refuse_original
from optimum_moe.checkpoint.destination import check_destination, check_space, free_space, owned, written_beside
from optimum_moe.checkpoint.identity import identity, same_model
from optimum_moe.checkpoint.mtp import MTPLayers, MTPOption, find_mtp
from optimum_moe.checkpoint.push import push
from optimum_moe.checkpoint.refusals import all_in_memory
from optimum_moe.checkpoint.source import ModelSource, loads_with, open_source
from optimum_moe.checkpoint.stored import StoredModel
from optimum_moe.checkpoint.streamed import align
from optimum_moe.checkpoint.system import readable_path
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.checkpoint.writer import choose_shard_size, describe_model, write_model
from optimum_moe.engine import MemoryStore, Run, Store, check_model, check_together
from optimum_moe.engine.depth import choose_drop, expected_source
from optimum_moe.engine.layerwise import keep_in_memory
from optimum_moe.engine.sample_size import Room, choose_sample_size, free_on, recorded_sample_size
from optimum_moe.engine.streaming import StreamingJob, StreamingSettings, calibration_identity, choose_streaming
from optimum_moe.plan import CompressionPlan, keep_all
from optimum_moe.ranks import SINGLE, Ranks, current_ranks, local_device
from optimum_moe.recipe import Recipe, calibration_config, coerce_recipe, recovery_on, run_seed
from optimum_moe.records import share_as_new
from optimum_moe.recovery_settings import Recovery
from optimum_moe.reporting import description
from optimum_moe.reporting.preview import Cost, Preview
from optimum_moe.reporting.recovery import add_to_card, describe_recovery
from optimum_moe.reporting.versions import versions
from optimum_moe.settings import choose_one
from optimum_moe.stages import Stage
from optimum_moe.statistics import STANDARD, Statistics
from optimum_moe.surgeons import drop_layers

if TYPE_CHECKING:
    from optimum_moe.recovery.after_cut import TrainingAfterCut


class MoECompressor:
    """Compresses one Mixture-of-Experts model; create it with `from_pretrained`.

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
        mtp: MTPLayers | None = None,
        streaming: StreamingSettings | None = None,
        error_propagation: bool = False,
        max_shard_size: str | int = "5GB",
        report: bool = True,
        ranks: Ranks = SINGLE,
    ) -> None:
        if not isinstance(source, ModelSource):
            raise ValueError(
                "MoECompressor(...) takes a model that from_pretrained opened and checked, got "
                f"{type(source).__name__}. Use MoECompressor.from_pretrained(model, recipe, calibration=...)."
            )
        self.source = source
        self.ranks = ranks
        self.streaming = streaming
        self.error_propagation = error_propagation
        self.mtp = mtp or MTPLayers(source, "error")
        self.recipe = recipe
        self.calibration = calibration
        self.seed = seed
        self.output_dir = output_dir
        self.overwrite = overwrite
        self.progress = progress
        self.max_shard_size = max_shard_size
        self.report = report
        self.model: PreTrainedModel | None = None
        self.plan: CompressionPlan | None = None
        self.statistics: Statistics | None = None
        self.training: TrainingRecord | None = None
        self._tokenizer = self._given_tokenizer = tokenizer
        self._written: Path | None = None
        self._before: Cost | None = None
        self._measured: Preview | None = None
        self._remaining, self._deciding = source, recipe
        self._settings: Mapping[str, Any] = {}
        self._seen: Statistics | None = None
        self._partly_cut = False
        self._identity: Mapping[str, Any] = {}
        self._stored: StoredModel | None = None
        self._itemsize: Callable[[str, torch.Tensor], float] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        recipe: Stage | Sequence[Stage] | Recipe | str | Path,
        calibration: Any = None,
        *,
        engine: str = "auto",
        output_dir: str | Path | None = None,
        seed: int | None = None,
        auto_class: type | None = None,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        dequantize: bool = False,
        mtp: MTPOption = "error",
        error_propagation: bool = False,
        max_memory: Any = None,
        max_shard_size: str | int | None = None,
        overwrite: bool = False,
        progress: bool = True,
        report: bool = True,
        recover: Recovery | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> MoECompressor:
        """Open a model and check all settings against its config and headers; no weight is read yet.

        Args:
            model: Hub id, local path, or a `PreTrainedModel` in memory (which is then changed in place).
            recipe: A stage such as `MSMoE(num_experts=8)`, a list of stages, a preset, or the path of a YAML recipe.
            calibration: A `CalibrationConfig`, path of a .txt/.jsonl/.parquet file, list of strings or chats,
                `datasets.Dataset`, or iterable of model inputs; None for data-free recipes.
            engine: `"memory"`, or `"streaming"` for checkpoints larger than memory: layer by layer, interruptible, to
                `output_dir`; `"auto"` (default) streams if `output_dir` is given and the model exceeds the free memory.
            output_dir: Folder that `apply()` writes the checkpoint to; it then returns the path.
            seed: Seed of the calibration sample (unless `calibration` has its own) and of all random choices; default
                the recipe's, else 0.
            auto_class: Auto class or model class; by default the architecture that the config names.
            tokenizer: Tokenizer or processor, or the folder or Hub id of one; by default the checkpoint's.
            dtype: Dtype of the weights; `"auto"` (default) keeps the checkpoint's.
            device_map: As in `from_pretrained`; or `"local"`, its own accelerator for each process.
            dequantize: Compress the bf16 values of an FP8 or MXFP4 checkpoint; the result is not quantized.
            mtp: Handling of multi-token-prediction layers, which transformers does not load: `"copy"`, `"cut"` (their
                experts like those of the last MoE block) or `"drop"`; `"error"` (default) refuses a checkpoint that
                has some.
            error_propagation: Observe each layer on the outputs of the compressed layers before it.
            max_memory: Maximum bytes for tensors with streaming, or a size such as `"20GB"`; else as in
                `from_pretrained`.
            max_shard_size: Maximum size of a file that `apply()` writes, default "5GB"; streaming writes one file per
                layer.
            overwrite: Allow `output_dir` to be replaced; a streaming run starts again.
            progress: Show progress bars.
            report: Write the report of the run beside the weights, as `report.html`.
            recover: A `Recovery`, or a mapping of its settings, to train the compressed model afterwards on the
                predictions of the original, which is then in memory too; default the recipe's. A model in memory is
                copied before it is cut.
            kwargs: Further arguments for `from_pretrained` of the model class.

        Processes that `torchrun` or `accelerate launch` started all make the same calls. They share the work and end
        with the same model, and the first one writes it.

        Raises:
            ValueError: If the model, the settings of a stage, the calibration data or the output folder are invalid, or
                several processes cannot share the work.
        """
        ranks = current_ranks()
        choose_one("engine", engine, ("auto", "memory", "streaming"))
        recipe = coerce_recipe(recipe)
        if recover is not None:
            recipe = replace(recipe, recover=Recovery.coerce(recover))
        config = calibration_config(recipe, calibration, seed)
        if recipe.recover is not None:
            ranks.check_single("Training")
        seed = run_seed(recipe, seed)
        destination = None if output_dir is None else check_destination(output_dir, overwrite)
        device_map = local_device() if device_map == "local" else device_map
        if device_map is not None:
            kwargs["device_map"] = device_map
        source = open_source(model, auto_class, dtype, dequantize, **kwargs)
        if any(stage.stores_stock_experts for stage in recipe.stages):
            source = source.with_widths()
        streaming = choose_streaming(engine, source, destination, device_map, max_memory)
        ranks.check_engine(streams=streaming is not None, propagates=error_propagation)
        if recipe.recover is not None and streaming is not None:
            raise ValueError(
                f"Training holds the original of {source.info.bytes:,} bytes and the compressed model in memory, and "
                'this run streams them. Choose engine="memory" where they fit, or leave out the training and run '
                "`recover` on the result, whose teacher may be stored logits of the original."
            )
        shard_size = choose_shard_size(max_shard_size, streaming is not None)
        tokenizer = source.load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        if max_memory is not None and streaming is None:
            source = replace(source, load_arguments={**source.load_arguments, "max_memory": max_memory})
        if error_propagation and not recipe.needs:
            raise ValueError(
                f"error_propagation=True needs a recipe that observes layers, but {recipe.name} needs no data."
            )
        layers = find_mtp(source, mtp)
        if destination is not None:
            refuse_original(destination, source)
        if recipe.dropping is not None:
            if error_propagation:
                raise ValueError(f"error_propagation=True cuts layers one by one, and {recipe.name} drops some first.")
            layers.check_drop(recipe)
            recipe.dropping.check(source.info)
        remaining = expected_source(source, recipe)
        costs = recipe.costs(remaining.info)
        counts = {name: cost.experts for name, cost in costs.items()}
        check_together(remaining.blocks, counts, {name for name, cost in costs.items() if not cost.stock})
        layers.check_recipe(recipe, remaining)
        compressor = cls(
            source,
            recipe,
            config,
            seed=seed,
            tokenizer=tokenizer,
            output_dir=destination,
            overwrite=overwrite,
            progress=progress,
            mtp=layers,
            streaming=streaming,
            error_propagation=error_propagation,
            max_shard_size=shard_size,
            report=report,
            ranks=ranks,
        )
        compressor.preview().warn_if_nothing_shrinks(recipe)
        return compressor

    def preview(self) -> Preview:
        """Expected parameters, bytes and FLOPs per token before and after, from config and headers."""
        remaining = expected_source(self.source, self.recipe)
        return description.expected_preview(self.source, remaining, self.recipe, self.mtp)

    def calibrate(self, also: Collection[str] = ()) -> Statistics:
        """Collect all statistics on the calibration data, so that they can be reused with other recipes.

        Gradients and the residual stream are only collected if the recipe reads them. `apply()` alone only collects
        what the recipe reads.

        Args:
            also: What other recipes read (`Recipe.needs`), but for gradients.

        Raises:
            ValueError: If there are no calibration data, or they do not fit the model.
        """
        self._begin()
        return self._observe(self._batches(), {*STANDARD, *also})

    def _observe(self, batches: CalibrationBatches, needs: Collection[str]) -> Statistics:
        needs = {*needs, *self.recipe.needs}
        if self.streaming is not None:
            self._settle_sample(batches, needs)
            with StreamingJob(self.source, None, {}, self.streaming) as job:
                run = replace(self._run(job.store, batches, job), propagate=False)
                if run.goes_back:
                    job.check_backward(batches)
                self.statistics = run.observe(needs)
        else:
            store = MemoryStore(self._loaded(), self.source.blocks)
            self._settle_sample(batches, needs)
            self.statistics = replace(self._run(store, batches), propagate=False).observe(needs)
        return self.statistics

    def _choose_drop(self, batches: CalibrationBatches | None) -> tuple[str, ...]:
        """The layers that the recipe drops; the model is observed first, unless there are statistics."""
        stage = self.recipe.dropping
        if stage is None:
            return ()
        if self.statistics is None:
            assert batches is not None
            self._observe(batches, ())
        assert self.statistics is not None
        return choose_drop(self.source, stage, self.statistics)

    def _drop(self, dropped: Sequence[str]) -> None:
        """Go on with what is left of the model without some layers, and of the recipe."""
        self._deciding = self.recipe.after_dropping or self.recipe
        if not dropped:
            return
        shallow = self.source.shallow(dropped)
        self._remaining = self.source.without_layers(dropped)
        if self.model is not None and self.source.live is None:
            drop_layers(self.model, shallow)
        if self.model is not None:
            self._stored = stored = StoredModel(self.model, self._remaining)
            self._itemsize = stored.itemsize
        self._settings = dict(shallow.settings)

    def _untouched(self) -> CompressionPlan | None:
        """The plan that keeps all remaining blocks as they are, if the recipe only drops layers."""
        if self.recipe.after_dropping is not None:
            return None
        return CompressionPlan({b.name: keep_all(b.name, b.num_experts) for b in self._remaining.info.blocks})

    def _with_drop(self, plan: CompressionPlan, dropped: Sequence[str]) -> CompressionPlan:
        """A plan of the remaining blocks as one of the original."""
        if self.recipe.dropping is None:
            return plan
        calibration = plan.calibration or (None if self.statistics is None else self.statistics.calibration)
        return replace(
            plan,
            dropped=tuple(dropped),
            settings={**self._settings, **plan.settings},
            stages=self.recipe.settings(),
            source=self._identity,
            calibration=calibration,
            seed=self.seed,
        )

    def _batches(self) -> CalibrationBatches:
        if self.calibration is None:
            raise ValueError(
                f"{self.recipe.name} needs calibration data. Pass calibration='corpus.txt', or another source."
            )
        batches = batches_for(self.source.skeleton, self.calibration, self.tokenizer)
        self.ranks.check_equal({"calibration data (hash)": batches.hash})
        self.ranks.check_work(len(batches), "batches of calibration data", "Give more data, or a smaller batch_size")
        return batches

    def _settle_sample(
        self, batches: CalibrationBatches | None, needs: Collection[str], streams_to: Path | None = None
    ) -> None:
        """Choose how many tokens are sampled, unless the user did; in memory once the model is loaded."""
        if batches is None or self.calibration is None or self.calibration.reservoir_tokens is not None:
            return
        size = None if streams_to is None or self.overwrite else recorded_sample_size(streams_to)
        if size is None:
            limit = None if self.streaming is None else self.streaming.max_memory
            devices = {p.device for p in self.model.parameters()} if self.model else set()
            room = Room(
                memory=psutil.virtual_memory().available if limit is None else limit,
                disk=None if streams_to is None else free_space(streams_to) - self.preview().after.bytes,
                device=free_on(devices if self.streaming is None else {self.streaming.device}),
            )
            size = choose_sample_size(self.recipe, self.source.info.blocks, batches.num_tokens, room, needs)
            # Processes find different amounts of free memory.
            size = min(self.ranks.gathered(size))
        self.calibration = replace(self.calibration, reservoir_tokens=size)

    def apply(self, statistics: Statistics | None = None, plan: CompressionPlan | None = None) -> Any:
        """Compress the model.

        Args:
            statistics: Statistics of an earlier `calibrate()`; by default they are collected first.
            plan: Carry out this plan instead of deciding one.

        Returns:
            The compressed model in eval mode, or the path of the checkpoint if `output_dir` was given.

        Raises:
            ValueError: If statistics or plan belong to another model, or weights are offloaded.
        """
        self._begin()
        if plan is not None:
            check_plan(plan, self._identity)
            self.mtp.check_plan(plan)
        elif (used := statistics or self.statistics) is not None:
            check_statistics(used, self._identity, self.recipe.observed_first)
            self.statistics = used
        again = self.recipe.after_dropping if self.recipe.dropping is not None else None
        observing = plan is None and bool(self.recipe.needs) and self.statistics is None
        observing = observing or (plan is None and again is not None and bool(again.needs))
        if self.error_propagation and not observing:
            raise ValueError("error_propagation=True observes while it cuts. Leave out statistics= and plan=.")
        batches = self._batches() if observing else None
        if self.streaming is not None:
            return self._stream(batches, plan)
        training = self._before_training()
        writes_to = self.output_dir if self.ranks.writes else None
        with owned(writes_to, self.overwrite):
            if writes_to is not None:
                check_space(writes_to, self.preview().after.bytes)
            model = all_in_memory(self._loaded())
            dropped = self._choose_drop(batches) if plan is None else plan.dropped
            self._drop(dropped)
            self._settle_sample(batches, self._deciding.needs)
            run = self._run(MemoryStore(model, self._remaining.blocks, self._stored), batches)
            try:
                decided, observed = run.decide(self._usable, plan or self._untouched())
                self.plan = decided if plan is not None else self._with_drop(decided, dropped)
            except BaseException:
                # Some blocks may be cut already: a checkpoint can be read again, a model in memory is lost.
                if run.has_cut or dropped:
                    self._partly_cut, self.model = self.source.live is not None, None
                raise
            self._seen = observed or (None if dropped else self.statistics)
            self.statistics = self.statistics or self._seen
            self._mark(model.eval())
            with self._trained(model, training, writes_to):
                if writes_to is not None:
                    self._write(writes_to, self.overwrite, self.max_shard_size)
        self.ranks.wait()
        if self.output_dir is None:
            return model
        self._written = self.output_dir
        return self.output_dir

    def _before_training(self) -> TrainingAfterCut | None:
        """What the training of the recipe needs of the original; None if there is none."""
        if self.recipe.recover is None:
            return None
        # The Trainer takes a second to import, and most runs need none.
        from optimum_moe.recovery.after_cut import TrainingAfterCut

        recovery = recovery_on(self.recipe.recover, self.calibration)
        return TrainingAfterCut.prepare(self.source, recovery, self.tokenizer, self.seed, self.progress)

    @contextmanager
    def _trained(
        self, model: PreTrainedModel, training: TrainingAfterCut | None, writes_to: Path | None
    ) -> Iterator[None]:
        """Train the compressed model; on exit the states of the training are removed, but for an error."""
        if training is None:
            yield
            return
        from optimum_moe.recovery.run import training_states

        with training_states(writes_to, self.overwrite) as states:
            try:
                assert self._stored is not None
                with self._stored.as_stored(""):
                    self.training = training.run(model, states)
            except BaseException:
                # The model may be partly trained.
                self._partly_cut, self.model, self.plan = self.source.live is not None, None, None
                raise
            yield

    def save_pretrained(
        self,
        directory: str | Path,
        overwrite: bool = False,
        max_shard_size: str | int = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool = False,
    ) -> Path:
        """Write weights, config, tokenizer or processor, plan, recipe, report and model card.

        All files are written beside `directory` and renamed at the end.

        Args:
            directory: Output folder; must be empty or new unless `overwrite`.
            overwrite: Replace the content of the folder.
            max_shard_size: As in transformers.
            push_to_hub: Also upload the folder; a checkpoint that `apply()` wrote to `directory` is only uploaded.
                Repeated after an interruption, it sends what is missing.
            repo_id: Hub repository, by default the name of the folder.
            token: Hub token.
            private: Whether the repository is private, if it is created; one that exists has to be.

        Returns:
            The folder.

        Raises:
            ValueError: If `apply()` was not called before, the folder cannot be written, or the Hub refuses.
        """
        if self.model is None or self.plan is None:
            raise ValueError("Nothing to save yet. Call apply() first.")
        if not self.ranks.writes:
            self.ranks.wait()
            return Path(directory)
        if push_to_hub and Path(directory).expanduser().resolve() == self._written:
            directory = self._written
        elif self.streaming is not None:
            raise ValueError(f"apply() wrote the checkpoint to {self.output_dir} already. Copy that folder.")
        else:
            directory = check_destination(directory, overwrite)
            refuse_original(directory, self.source)
            with owned(directory, overwrite):
                self._write(directory, overwrite, max_shard_size)
        if push_to_hub:
            push(directory, repo_id, token, lambda name: self._write_card(directory, name), private)
        self.ranks.wait()
        return directory

    def _write(self, directory: Path, overwrite: bool, max_shard_size: str | int) -> Path:
        """Write the model to a folder that this run has locked."""
        assert self.model is not None
        check_space(directory, sum(p.numel() * p.element_size() for p in self.model.parameters()))
        with written_beside(directory, overwrite) as beside:
            write_model(self.model, beside, self._remaining.blocks, max_shard_size, self._stored)
            self._describe(beside, readable_path(directory.name))
        self._written = directory
        return directory

    def _describe(self, beside: Path, name: str) -> None:
        """Write the files beside the weights of a checkpoint called `name`."""
        assert self.plan is not None
        assert self.model is not None
        if self.streaming is not None:
            describe_model(self.model, beside, self._remaining.blocks)
        self.mtp.write(beside, self.model, self.plan)
        carry_files(self.source.directory, self._given_tokenizer, self.source.load_tokenizer, beside)
        blocks = description.block_facts(self._remaining, self._seen)
        description.write_description(beside, name, self._card_facts(), blocks)
        if self.training is not None:
            describe_recovery(beside, name, self.training)
        share_as_new(beside)

    def _write_card(self, directory: Path, name: str) -> None:
        """Write the card of a finished checkpoint under another name."""
        description.write_card(directory, name, self._card_facts())
        if self.training is not None:
            add_to_card(directory, name, self.training)

    def _card_facts(self) -> description.CardFacts:
        assert self.plan is not None
        assert self.model is not None
        return description.card_facts(
            self.source,
            self.recipe,
            self.plan,
            self.measured(),
            loads_with(self.model),
            page=self.report,
        )

    def _stream(self, batches: CalibrationBatches | None, plan: CompressionPlan | None) -> Path:
        """Run `apply()` layer by layer, and write to the destination."""
        assert self.streaming is not None
        assert self.output_dir is not None
        given = used = self.statistics if self.recipe.needs else None
        dropped = self._choose_drop(batches) if plan is None else plan.dropped
        self._drop(dropped)
        self._settle_sample(batches, self._deciding.needs, self.output_dir)
        made_from = {
            "recipe": {"stages": self.recipe.settings(), "mtp": self.mtp.option},
            "seed": self.seed,
            "dtype": str(self.source.load_arguments.get("dtype")),
            "error propagation": self.error_propagation,
            "dropped": dropped,
            "model": same_model(self._identity),
            **calibration_identity(batches, self.calibration if batches else None, used, plan),
        }
        try:
            with StreamingJob(self._remaining, self.output_dir, made_from, self.streaming, self.overwrite) as job:
                run = self._run(job.store, batches, job)
                if batches is not None and run.goes_back:
                    job.check_backward(batches)
                job.check(self.preview().after.bytes, self.mtp.stored())
                decided, observed = run.decide(self._usable, plan or self._untouched())
                self.plan = decided if plan is not None else self._with_drop(decided, dropped)
                self._seen = observed or self._usable
                self.model, self._itemsize = job.finished_model(), job.store.itemsize
                self._mark(self.model)
                self._measured = self.measured()
                job.complete(self._describe)
            self._written = self.output_dir
        except BaseException:
            # Finished layers are in the working folder, where the next call resumes.
            self.plan, self.model, self._measured = None, None, None
            raise
        finally:
            # Statistics of this run were in the working folder too.
            self._seen = None
            self.statistics = given
        return self.output_dir

    @property
    def _usable(self) -> Statistics | None:
        """Statistics of the blocks that are decided: none if layers were dropped since they were observed."""
        return self.statistics if self.recipe.needs and self.recipe.dropping is None else None

    def _run(self, store: Store, batches: CalibrationBatches | None, job: StreamingJob | None = None) -> Run:
        return Run(
            store,
            self._remaining.info,
            self._deciding,
            self.seed,
            self._identity,
            batches=batches,
            config=self.calibration,
            propagate=self.error_propagation,
            progress=self.progress and self.ranks.writes,
            ranks=self.ranks,
            lines=self.streaming is not None,
            keep=keep_in_memory if job is None else job.keep,
            save=None if job is None else job.save,
        )

    def measured(self) -> Preview:
        """Like `preview()` but after `apply()`: actual counts, and FLOPs with repeated experts counted as observed."""
        if self._measured is not None:
            return self._measured
        assert self.plan is not None
        assert self.model is not None
        return description.measured_preview(
            self._remaining,
            self.recipe,
            self.model,
            self.plan,
            self._seen,
            mtp=self.mtp,
            before=self._before or self.preview().before,
            itemsize=self._itemsize,
        )

    @property
    def tokenizer(self) -> Any:
        """Tokenizer or processor of the checkpoint; None if it has none."""
        if self._tokenizer is None and self.source.directory is not None:
            self._tokenizer = self.source.load_tokenizer(self.source.directory)
        return self._tokenizer

    def _loaded(self) -> PreTrainedModel:
        if self.model is None:
            self._before = self.preview().before
            loaded = check_model(align(self.source.load()), self.source.blocks, self.mtp.stored())
            self._stored = stored = StoredModel(loaded, self.source)
            self.model, self._itemsize = loaded, stored.itemsize
        return self.model

    def _mark(self, model: PreTrainedModel) -> None:
        assert self.plan is not None
        self.mtp.check_plan(self.plan)
        mark_structure(model, self._remaining, self.plan)
        self.mtp.update_config(model.config)

    def _begin(self) -> None:
        if self._partly_cut:
            raise ValueError("An earlier apply() stopped in the middle and left the model partly cut. Load it again.")
        if self.plan is not None:
            raise ValueError("This model was already cut. Make a new MoECompressor from the original checkpoint.")
        self._identity = identity(self.source)
        self.ranks.check_equal(
            {
                "versions": versions(),
                "recipes": self.recipe.settings(),
                "seeds": self.seed,
                "weights (digests)": self._identity["values"],
            }
        )
        blocks = len(self._remaining.blocks)
        self.ranks.check_work(blocks, "MoE blocks", "Start fewer processes")
