"""Install with `pip install -e .[dev]`; on a machine without a GPU install a CPU build of torch first."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="optimum-moe",
    version="0.1.0",
    description="Compress any Mixture-of-Experts model that transformers can load",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
    ],
    packages=[
        *find_packages(include=["optimum_moe", "optimum_moe.*"], exclude=["optimum_moe.autoload"]),
        "optimum_moe_autoload",
        "optimum.commands.register",
    ],
    package_dir={
        "optimum_moe_autoload": "optimum_moe/autoload",
        "optimum.commands.register": "optimum_moe/cli/register",
    },
    entry_points={
        "torch.backends": ["optimum_moe = optimum_moe_autoload:autoload"],
        "vllm.general_plugins": ["optimum_moe = optimum_moe.vllm_plugin:register"],
    },
    package_data={"optimum_moe": ["py.typed", "presets/*.yaml", "reporting/templates/*"]},
    install_requires=[
        "torch>=2.9",
        "transformers>=5.23,<5.25",
        "optimum>=2.3",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "scipy>=1.17",
        "huggingface_hub",
        "jinja2>=3.1",
        "filelock>=3.30",
        "psutil",
        "numpy",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "data": ["pyarrow", "datasets"],
        "images": ["pillow", "torchvision"],
        "recover": ["peft>=0.21"],
        "plots": ["matplotlib"],
        "completion": ["shtab"],
        "eval": ["lm-eval>=0.4.13", "datasets"],
        "bench": ["gguf", "matplotlib"],
        "dev": [
            *("pytest>=9", "pytest-xdist", "hypothesis", "packaging", "ruff", "mypy", "types-PyYAML"),
            *("pyarrow", "datasets", "matplotlib", "peft>=0.21", "shtab"),
        ],
    },
)
