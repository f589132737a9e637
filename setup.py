"""Metadata, dependencies and packages of neuron_lens."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "neuron_lens/__init__.py").read_text())[1]

EXTRAS = {
    "hf": ["transformers>=4.51", "tokenizers>=0.21", "huggingface_hub>=0.30", "pyyaml>=6"],
    "explain": ["openai>=1.60"],
    "report": ["pandas>=2.0", "matplotlib>=3.8"],
    "parquet": ["pyarrow>=16"],
    "local": ["llguidance>=1.0", "jinja2>=3.1"],
    "embed": ["sentence-transformers>=3"],
}
EXTRAS["test"] = [
    *EXTRAS["hf"],
    *EXTRAS["explain"],
    *EXTRAS["report"],
    *EXTRAS["parquet"],
    *EXTRAS["local"],
    "pytest>=8",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.13",
    "types-tqdm",
    "types-PyYAML",
    "datasets>=2.20",
    "build>=1.2",
    "setuptools>=69",
]
EXTRAS["all"] = sorted(
    {
        requirement
        for extra in ("hf", "explain", "report", "parquet", "local", "embed")
        for requirement in EXTRAS[extra]
    }
)

setup(
    name="neuron-lens",
    version=VERSION,
    description="Look inside language models, change what happens there, and explain their parts",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # model_defs/ is data at the top level of the repository; in a wheel it travels as neuron_lens.model_defs.
    packages=[*find_packages(include=["neuron_lens", "neuron_lens.*"]), "neuron_lens.model_defs"],
    package_dir={"neuron_lens.model_defs": "model_defs"},
    package_data={
        "neuron_lens": ["py.typed", "**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.txt", "**/*.md"],
        "neuron_lens.model_defs": ["**/*"],
    },
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "tiktoken>=0.7",
        "blobfile>=3.0",
        "pydantic>=2.7",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["neuron-lens=neuron_lens.cli:main"]},
)
