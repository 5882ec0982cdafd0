"""Code that a structured checkpoint carries, so that `trust_remote_code=True` loads it without this package.

`auto_map` in config.json names a class of the carried module for each Auto class. transformers reads it only where
the user trusts the checkpoint's code; an installed optimum_moe wins even then.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_moe.hf import modeling_optimum_moe
from optimum_moe.hf.compat import auto_class_knows
from optimum_moe.hf.structure import CARRIED_MODULE, SENTINEL, MoEStructureConfig
from optimum_moe.nn import SwappedModule, swapped_class
from optimum_moe.surgeons.guard import as_stored

CARRIED = (
    *("__init__.py", "memory_errors.py", "model_info.py", "plan.py", "records.py", "settings.py"),
    *("algorithms/*.py", "formats/*.py", "kernels/*.py", "nn/*.py", "surgeons/*.py"),
    *("checkpoint/__init__.py", "checkpoint/missing.py"),
    *(f"hf/{name}.py" for name in ("__init__", "carried_code", "compat", "import_hook", "quantizer", "structure")),
    f"hf/{CARRIED_MODULE}.py",
)
"""What of the package rebuilds a structure and runs it."""


def carry_code(directory: Path, config: PreTrainedConfig) -> None:
    """Add the carried module, an archive of our own sources and `auto_map` to a checkpoint just written.

    Left as they are: plain checkpoints, which stock transformers loads, and models that bring code of their own.

    Args:
        directory: The checkpoint, with its config.json.
        config: The model's config, by whose class transformers chooses the model's.
    """
    path = directory / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" not in saved or "auto_map" in saved:
        return
    saved["auto_map"] = {name: f"{CARRIED_MODULE}.{name}" for name in _auto_classes(config)}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / f"{CARRIED_MODULE}.py").write_text(inspect.getsource(modeling_optimum_moe), encoding="utf-8")
    archive = getattr(__spec__.loader, "archive", None)
    if archive is not None:
        # We are carried code ourselves.
        shutil.copyfile(archive, directory / modeling_optimum_moe.ARCHIVE)
        return
    package = Path(__file__).parents[1]
    with zipfile.ZipFile(directory / modeling_optimum_moe.ARCHIVE, "w") as archive:
        for pattern in CARRIED:
            for source in sorted(package.glob(pattern)):
                # ZipInfo has a fixed date: the same package writes the same bytes.
                entry = zipfile.ZipInfo(f"optimum_moe/{source.relative_to(package).as_posix()}")
                archive.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED)


class SavesWithCode(SwappedModule):
    """Mixin of a structured model: what its `save_pretrained` writes loads elsewhere too.

    The class keeps the name of its architecture, which `save_pretrained` writes into config.json.
    """

    keeps_name = True

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with guards and code."""
        model: Any = self
        stock = model.original_class.save_pretrained
        given = inspect.signature(stock).bind(self, save_directory, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        if not given.get("save_original_format", True):
            given["state_dict"] = as_stored(model, given.get("state_dict") or self.state_dict())
        push = given.pop("push_to_hub", False)
        stock(**given, **({} if push else more))
        writes = model.should_save_on_this_rank(given.get("is_main_process", True))
        # Where adapters are attached, only they are saved.
        if writes and (Path(save_directory) / "config.json").is_file():
            carry_code(Path(save_directory), model.config)
        if push:
            # It saves the model again, with this method, and uploads all files.
            model.push_to_hub(more.pop("repo_id", Path(save_directory).name), token=given.get("token"), **more)


def mark_model(model: Any, structure: MoEStructureConfig) -> None:
    """Have `save_pretrained` of a live model write what the checkpoint needs to load again."""
    model.config.quantization_config = structure
    model.config.fusion_config = dict(SENTINEL)
    save_with_code(model)


def save_with_code(model: PreTrainedModel) -> None:
    """Have a structured model write its code whenever it is saved."""
    if not isinstance(model, SavesWithCode):
        model.__class__ = swapped_class(SavesWithCode, type(model))  # type: ignore[assignment]


def _auto_classes(config: Any) -> list[str]:
    """Names of the Auto classes that load a model of this config."""
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return [name for name in names if auto_class_knows(name, config)]
