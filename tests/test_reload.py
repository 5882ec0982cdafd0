"""Saved and loaded again, every tensor and the logits are equal bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_moe import CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor, MSMoE
from tests.tiny_models import OTHERS, TARGETS, Target, build, by_name, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

METHODS = {
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "adaptive": MSMoE(num_experts=4, allocation="adaptive"),
    "protected": MSMoE(num_experts=4, routing="reduce", layers=[0]),
    "prune": ExpertPruning(num_experts=4, saliency="reap"),
}


def compress(target: Target, method: str, directory: Path, dtype: torch.dtype = torch.float32, **kwargs):
    data = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(3)]
    compressor = MoECompressor.from_pretrained(
        build(target, dtype=dtype), METHODS[method], CalibrationConfig(data), progress=False
    )
    model = compressor.apply()
    compressor.save_pretrained(directory, **kwargs)
    return compressor, model


def assert_same_tensors(loaded: torch.nn.Module, saved: torch.nn.Module) -> None:
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def move_out_of_the_file(model: torch.nn.Module) -> None:
    """Copy the parameters: at the addresses that they have in the mapped file some kernels round in another way."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", every_target())
def test_reload_is_bit_equal(target: Target, method: str, tmp_path: Path) -> None:
    if target.refuses(method):
        pytest.skip(target.refuses(method))
    compressor, model = compress(target, method, tmp_path / "out")
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs_for(target)), logits_of(model, inputs_for(target)))
    # Other tools take every such file for weights.
    assert all(path.name.startswith("model") for path in (tmp_path / "out").glob("*.safetensors"))
    is_plain = "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert is_plain == compressor.plan.is_plain == (method in ("reduce", "prune"))
    again = CompressionPlan.from_pretrained(tmp_path / "out")
    assert {n: b.labels_E for n, b in again.blocks.items()} == {
        n: b.labels_E for n, b in compressor.plan.blocks.items()
    }


@pytest.mark.parametrize("method", ["map", "reduce"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_reload_in_bfloat16_and_shards(name: str, method: str, tmp_path: Path) -> None:
    target = by_name(name)
    _, model = compress(target, method, tmp_path / "out", dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)


def test_second_generation_of_saving_keeps_everything(tmp_path: Path) -> None:
    target = by_name("qwen3_moe")
    _, model = compress(target, "adaptive", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_tensors(again, model)
    half = loaded.half()
    assert next(half.parameters()).dtype == torch.float16


def test_the_base_model_of_a_checkpoint_loads(tmp_path: Path) -> None:
    target = by_name("olmoe")
    _, model = compress(target, "map", tmp_path / "out")
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert_same_tensors(base, model.model)


def run_python(code: str, *arguments: str, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; `isolated` leaves out whatever makes this package importable."""
    if isolated:
        site = sysconfig.get_paths()["purelib"]
        code = f"import sys; sys.path.append({site!r})\n{code}"
        flags = ["-I", "-S"]
    else:
        flags = []
    # The package that the entry point of torch names cannot be imported where it is left out.
    environment = os.environ | ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if isolated else {})
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


LOAD_ALL = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)  # As here: another number splits sums differently.
for folder in map(Path, sys.argv[1:]):
    cls = getattr(transformers, (folder / "class.txt").read_text())
    model = cls.from_pretrained(folder)
    for parameter in model.parameters():  # see move_out_of_the_file
        parameter.data = parameter.data.clone()
    inputs = load_file(folder / "test_inputs.safetensors")
    with torch.no_grad():
        output = model(**inputs)
    given = [output[name] for name in ("heatmaps", "feature_maps", "logits", "last_hidden_state") if name in output]
    logits = given[0][-1] if "feature_maps" in output and "heatmaps" not in output else given[0]
    save_file({"logits": logits.contiguous()}, folder / "test_logits.safetensors")
"""

TARGET_SETS = [pytest.param(TARGETS, id="families"), pytest.param(OTHERS, id="others", marks=pytest.mark.full)]


def saved_for_subprocess(
    targets: tuple[Target, ...], tmp_path: Path, methods: list[str]
) -> list[tuple[Path, torch.Tensor]]:
    saved = []
    for target in targets:
        for method in methods:
            if target.refuses(method):
                continue
            folder = tmp_path / f"{target.name}-{method}"
            _, model = compress(target, method, folder)
            save_file(inputs_for(target), folder / "test_inputs.safetensors")
            (folder / "class.txt").write_text(target.architecture, encoding="utf-8")
            saved.append((folder, logits_of(model, inputs_for(target))))
    return saved


@pytest.mark.parametrize("targets", TARGET_SETS)
def test_fresh_process_gives_the_same_logits(targets: tuple[Target, ...], tmp_path: Path) -> None:
    saved = saved_for_subprocess(targets, tmp_path, ["map", "adaptive"])
    done = run_python("import optimum_moe\n" + LOAD_ALL, *(str(folder) for folder, _ in saved))
    assert done.returncode == 0, done.stderr
    for folder, logits in saved:
        assert torch.equal(load_file(folder / "test_logits.safetensors")["logits"], logits), folder.name


@pytest.mark.parametrize("targets", TARGET_SETS)
def test_plain_checkpoints_load_without_this_package(targets: tuple[Target, ...], tmp_path: Path) -> None:
    saved = saved_for_subprocess(targets, tmp_path, ["reduce", "prune"])
    check = "import importlib.util\nassert importlib.util.find_spec('optimum_moe') is None\n"
    done = run_python(check + LOAD_ALL, *(str(folder) for folder, _ in saved), isolated=True)
    assert done.returncode == 0, done.stderr
    for folder, logits in saved:
        assert torch.equal(load_file(folder / "test_logits.safetensors")["logits"], logits), folder.name


@pytest.mark.parametrize("method", ["map", "adaptive", "protected"])
@pytest.mark.parametrize("target", every_target())
def test_structured_checkpoints_raise_without_this_package(target: Target, method: str, tmp_path: Path, stock) -> None:
    """Stock transformers must not fill in random weights; `stock` forgets that our method was registered."""
    if target.refuses(method):
        pytest.skip(target.refuses(method))
    compress(target, method, tmp_path / "out")
    stock()
    with pytest.raises(
        ValueError, match="Unknown fusion type: a compressed checkpoint: pip install optimum-moe, or pass trust"
    ):
        getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")


@pytest.fixture
def stock(monkeypatch):
    from transformers.quantizers import auto

    def forget() -> None:
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "optimum_moe")
        monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "optimum_moe")

    return forget


def drop_tensor(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if part in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["expert_map", "experts"])
def test_a_missing_tensor_of_a_compressed_block_is_an_error(part: str, tmp_path: Path) -> None:
    target = by_name("gpt_oss")
    compress(target, "map", tmp_path / "out")
    drop_tensor(tmp_path / "out", part)
    with pytest.raises(ValueError, match="The checkpoint lacks 1 tensors"):
        transformers.GptOssForCausalLM.from_pretrained(tmp_path / "out")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    block = next(iter(config["quantization_config"]["blocks"]))
    config["quantization_config"]["blocks"][block].update(changes)
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 0}, "num_groups=0"),
        ({"num_groups": 9}, "num_groups=9"),
        ({"num_experts": 16}, "8 experts by config.json, and 16"),
        ({"routing": "mapp"}, "routing='mapp'"),
        ({"ratio": 0.5}, "must have the fields"),
    ],
)
def test_an_edited_structure_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    compress(by_name("mixtral"), "map", tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_wrong_size_in_the_structure_does_not_load(tmp_path: Path) -> None:
    compress(by_name("mixtral"), "map", tmp_path / "out")
    edit_config(tmp_path / "out", num_groups=3)
    with pytest.raises(
        ValueError, match=r"of compressed blocks \(.*\) are not what config.json says of their number or"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_config_has_every_spelling_of_the_expert_count(tmp_path: Path) -> None:
    compress(by_name("qwen3_moe"), "reduce", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_importing_the_package_imports_the_standard_library_only() -> None:
    code = """
import sys
before = set(sys.modules)
import optimum_moe
heavy = {"torch", "transformers", "numpy", "scipy", "safetensors", "optimum"} & set(sys.modules)
assert not heavy, heavy
import transformers.quantizers.auto as auto
assert "optimum_moe" in auto.AUTO_QUANTIZER_MAPPING
optimum_moe.install_import_hook()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_import_hook_registers_at_once_after_transformers() -> None:
    code = """
import os
os.environ["OPTIMUM_MOE_AUTOLOAD"] = "0"
import transformers.quantizers.auto as auto
assert "optimum_moe" not in auto.AUTO_QUANTIZER_MAPPING
import optimum_moe
assert "optimum_moe" in auto.AUTO_QUANTIZER_MAPPING
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
