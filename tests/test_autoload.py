"""Loading without ceremony: with the package, no import of it; without the package, by code in the checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file

import optimum_moe
from optimum_moe import CalibrationConfig, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.hf import quantizer
from optimum_moe.hf.carried_code import carry_code
from optimum_moe.hf.quantizer import SUPPORTED_TRANSFORMERS
from tests.tiny_models import Target, build, by_name, every_target, in_full, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

PACKAGE = Path(optimum_moe.__file__).parent

LOAD = """
import sys, torch, transformers
from safetensors.torch import save_file
folder, auto_class, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
model = getattr(transformers, auto_class).from_pretrained(folder, **arguments)
save_file({k: v.clone() for k, v in model.state_dict().items()}, folder + "/seen.safetensors")
print(type(model).__module__, sys.modules["optimum_moe"].__file__)
"""


def save_structured(target: Target, folder: Path, method: Any = None) -> dict[str, torch.Tensor]:
    """A compressed checkpoint with the code it carries; returns the model's tensors."""
    data = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(2)]
    compressor = MoECompressor.from_pretrained(
        build(target), method or MSMoE(num_experts=4), CalibrationConfig(data), progress=False
    )
    model = compressor.apply()
    compressor.save_pretrained(folder)
    carry_code(folder, model.config)
    return model.state_dict()


def auto_class_of(target: Target) -> str:
    """The Auto class that builds exactly the target's class."""
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")
    for name in (*names, "AutoModelForTokenClassification"):
        found = getattr(transformers, name)._model_mapping.get(getattr(transformers, target.config), None)
        if found is getattr(transformers, target.architecture):
            return name
    pytest.skip(f"no Auto class builds {target.architecture}")


def run_python(
    code: str, *arguments: Any, flags: tuple[str, ...] = (), timeout: float = 300, **environment: Any
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, away from this folder and without a terminal to ask questions on."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd="/",
        stdin=subprocess.DEVNULL,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )


def run_without_package(code: str, *arguments: Any, modules: Path) -> subprocess.CompletedProcess[str]:
    """The same where nothing makes this package importable; its entry point is found all the same, and switched off."""
    site = sysconfig.get_paths()["purelib"]
    code = f"""
import sys, importlib.util
sys.path.append({site!r})
assert importlib.util.find_spec("optimum_moe") is None
{code}"""
    return run_python(code, *arguments, flags=("-I", "-S"), TORCH_DEVICE_BACKEND_AUTOLOAD=0, HF_MODULES_CACHE=modules)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("autoload") / "out"
    return folder, save_structured(by_name("qwen3_moe"), folder)


def assert_seen(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    seen = load_file(folder / "seen.safetensors")
    (folder / "seen.safetensors").unlink()
    assert seen.keys() == tensors.keys()
    assert [name for name in seen if not torch.equal(seen[name], tensors[name])] == []


def test_the_entry_point_is_installed() -> None:
    ours = [point.value for point in entry_points(group="torch.backends") if point.name == "optimum_moe"]
    assert ours == ["optimum_moe_autoload:autoload"]


@pytest.mark.parametrize(
    "before", ["", *in_full("import transformers.quantizers.auto", "import transformers.modeling_utils")]
)
def test_loads_without_an_import_of_ours(saved: Any, before: str) -> None:
    folder, tensors = saved
    done = run_python(f"{before}\n{LOAD}", folder, "AutoModelForCausalLM", "{}")
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stderr
    assert "Unknown quantization" not in done.stderr
    assert done.stdout.split()[-1] == str(PACKAGE / "__init__.py")
    assert_seen(folder, tensors)


@pytest.mark.parametrize("switch", ["OPTIMUM_MOE_AUTOLOAD", *in_full("TORCH_DEVICE_BACKEND_AUTOLOAD")])
def test_switched_off_it_raises_and_an_import_still_loads(saved: Any, switch: str) -> None:
    folder, tensors = saved
    done = run_python(LOAD, folder, "AutoModelForCausalLM", "{}", **{switch: 0})
    assert done.returncode == 1
    assert "ValueError: Unknown fusion type: a compressed checkpoint: pip install optimum-moe" in done.stderr
    done = run_python(f"import optimum_moe\n{LOAD}", folder, "AutoModelForCausalLM", "{}", **{switch: 0})
    assert done.returncode == 0, done.stderr
    assert_seen(folder, tensors)


def test_import_torch_imports_nothing_more_than_the_package() -> None:
    code = "import sys, torch; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    on, off = (run_python(code, OPTIMUM_MOE_AUTOLOAD=flag).stdout.split() for flag in (1, 0))
    assert set(on) - set(off) == {"optimum_moe"}
    assert set(off) & {"transformers", "optimum", "peft", "accelerate"} == set()


POISONS = {
    "raises": ("hf/import_hook.py", "raise RuntimeError('poisoned')"),
    "does not parse": ("hf/import_hook.py", "def"),
    "misses a module": ("hf/import_hook.py", "import no_such_module"),
    "cannot register": ("hf/quantizer.py", "raise RuntimeError('poisoned')"),
}


@pytest.mark.parametrize("poison", ["misses a module", *in_full("raises", "does not parse", "cannot register")])
def test_a_broken_package_breaks_neither_torch_nor_transformers(saved: Any, tmp_path: Path, poison: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "optimum_moe", ignore=shutil.ignore_patterns("__pycache__"))
    name, text = POISONS[poison]
    (tmp_path / "optimum_moe" / name).write_text(text, encoding="utf-8")
    code = "import torch, transformers.modeling_utils\nprint(torch.ones(2).sum().item())"
    # Not even where warnings are errors.
    done = run_python(code, flags=("-W", "error::UserWarning"), PYTHONPATH=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
    assert re.search("optimum_moe is installed but broken|could not register", done.stderr)
    done = run_python(LOAD, saved[0], "AutoModelForCausalLM", "{}", PYTHONPATH=tmp_path)
    assert done.returncode == 1
    assert "Unknown fusion type: a compressed checkpoint" in done.stderr


CARRIED = [
    pytest.param(*p.values, id=p.id, marks=p.marks if p.id in ("qwen3_moe", "switch_transformers") else full)
    for full in [pytest.mark.full]
    for p in every_target()
]


@pytest.mark.parametrize("target", CARRIED)
def test_carried_code_loads_without_the_package_where_it_is_trusted(target: Target, tmp_path: Path) -> None:
    folder, auto_class = tmp_path / "out", auto_class_of(target)
    tensors = save_structured(target, folder, MSMoE(num_experts=4, allocation="adaptive"))
    refused = run_without_package(LOAD, folder, auto_class, "{}", modules=tmp_path / "modules")
    assert refused.returncode == 1
    assert "ValueError: Unknown fusion type: a compressed checkpoint: pip install optimum-moe" in refused.stderr
    assert not (tmp_path / "modules").exists()
    trusted = run_without_package(LOAD, folder, auto_class, "{'trust_remote_code': True}", modules=tmp_path / "modules")
    assert trusted.returncode == 0, trusted.stderr
    assert trusted.stdout.split()[0].startswith("transformers.models.")
    assert trusted.stdout.split()[1].startswith(str(folder / "optimum_moe.zip"))
    assert_seen(folder, tensors)


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", *in_full("jetmoe", "gpt_oss", "switch_transformers")],
)
def test_compressed_experts_load_with_the_package_and_with_carried_code(name: str, tmp_path: Path) -> None:
    folder, auto_class = tmp_path / "out", auto_class_of(by_name(name))
    tensors = save_structured(by_name(name), folder, [MSMoE(num_experts=4), LowRankSparse(rank=8)])
    done = run_python(LOAD, folder, auto_class, "{}")
    assert done.returncode == 0, done.stderr
    assert_seen(folder, tensors)
    refused = run_without_package(LOAD, folder, auto_class, "{}", modules=tmp_path / "modules")
    assert refused.returncode == 1
    assert "ValueError: Unknown fusion type: a compressed checkpoint: pip install optimum-moe" in refused.stderr
    trusted = run_without_package(LOAD, folder, auto_class, "{'trust_remote_code': True}", modules=tmp_path / "modules")
    assert trusted.returncode == 0, trusted.stderr
    assert trusted.stdout.split()[1].startswith(str(folder / "optimum_moe.zip"))
    assert_seen(folder, tensors)


@pytest.mark.parametrize("trust", [True, *in_full(None, False)])
def test_the_installed_package_wins_over_carried_code(saved: Any, tmp_path: Path, trust: bool | None) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "out"))
    # Code in the archive would fail.
    (folder / "optimum_moe.zip").write_bytes(b"broken")
    arguments = {} if trust is None else {"trust_remote_code": trust}
    done = run_python(LOAD, folder, "AutoModelForCausalLM", arguments, HF_MODULES_CACHE=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stderr
    assert done.stdout.split()[1] == str(PACKAGE / "__init__.py")
    assert (tmp_path / "modules").exists() == (trust is True)
    assert_seen(folder, saved[1])


def test_what_a_checkpoint_carries(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_optimum_moe.AutoModelForCausalLM"
    assert all(name.split(".")[1] == key for key, name in config["auto_map"].items())
    with zipfile.ZipFile(folder / "optimum_moe.zip") as archive:
        for name in archive.namelist():
            assert archive.read(name) == (PACKAGE.parent / name).read_bytes()
    assert not any(part in name for name in archive.namelist() for part in ("calibration", "methods", "compressor"))
    # Saved again by anybody it carries the same.
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert again["auto_map"] == config["auto_map"]
    assert again["architectures"] == config["architectures"] == ["Qwen3MoeForCausalLM"]
    for name in ("optimum_moe.zip", "modeling_optimum_moe.py"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


SAVE_AGAIN = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
"""


def test_carried_code_carries_itself_on(saved: Any, tmp_path: Path) -> None:
    folder, tensors = saved
    done = run_without_package(SAVE_AGAIN, folder, tmp_path / "again", modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "optimum_moe.zip").read_bytes() == (folder / "optimum_moe.zip").read_bytes()
    arguments = tmp_path / "again", "AutoModelForCausalLM", "{'trust_remote_code': True}"
    done = run_without_package(LOAD, *arguments, modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert_seen(tmp_path / "again", tensors)


IMPORT = """
import importlib, os, sys
import torch  # Costs most, and is the same for all.
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # What runs in the environment of vLLM, or on a GPU, alone.
            os._exit(0 if error.name.partition(".")[0] in ("vllm", "triton") else 1)
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
        assert name == "optimum_moe.autoload" or "optimum_moe" in AUTO_QUANTIZER_MAPPING
        assert name == "optimum_moe.autoload" or "optimum_moe" in AUTO_QUANTIZATION_CONFIG_MAPPING
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if "register" not in file.parts
)
FEW = ["optimum_moe.hf.quantizer", "optimum_moe.checkpoint.reader", "optimum_moe.surgeons"]


@pytest.mark.parametrize(
    "modules", [pytest.param(FEW, id="few"), pytest.param(MODULES, id="all", marks=pytest.mark.full)]
)
def test_any_module_of_ours_may_be_imported_first(modules: list[str]) -> None:
    done = run_python(IMPORT, *modules, timeout=1200, OPTIMUM_MOE_AUTOLOAD=0)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "could not register" not in done.stderr


def test_the_same_package_carries_the_same_bytes(saved: Any) -> None:
    folder, _ = saved
    before = (folder / "optimum_moe.zip").read_bytes(), (folder / "config.json").read_bytes()
    config = json.loads(before[1])
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    carry_code(folder, transformers.AutoConfig.from_pretrained(folder))
    assert ((folder / "optimum_moe.zip").read_bytes(), (folder / "config.json").read_bytes()) == before


def test_plain_checkpoints_carry_nothing(tmp_path: Path) -> None:
    save_structured(by_name("qwen3_moe"), tmp_path / "out", MSMoE(num_experts=4, routing="reduce"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert {p.name for p in (tmp_path / "out").iterdir()} & {"optimum_moe.zip", "modeling_optimum_moe.py"} == set()


@pytest.mark.parametrize("version", ["4.57.6", "5.22.9", "5.25.0.dev0", "6.0.0"])
def test_other_versions_of_transformers_are_refused(saved: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module that the quantizer saw: transformers puts a lazy one in its own place once it is imported.
    monkeypatch.setattr(quantizer.transformers, "__version__", version)
    with pytest.raises(ValueError, match=rf"transformers >=5.23,<5.25; transformers {version} is installed"):
        transformers.AutoModelForCausalLM.from_pretrained(saved[0])


def test_the_versions_are_those_of_the_requirement() -> None:
    wanted = next(r for r in map(Requirement, requires("optimum-moe") or []) if r.name == "transformers")
    (first, minor), (after, next_minor) = SUPPORTED_TRANSFORMERS
    assert str(wanted.specifier) == f"<{after}.{next_minor},>={first}.{minor}"
    makefile = (PACKAGE.parent / "Makefile").read_text(encoding="utf-8")
    assert f"\nOLDEST := {first}.{minor}.0\n" in makefile
