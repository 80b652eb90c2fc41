"""Documents and configs of small preparations."""

import json

import pytest
import yaml

from lcm_ds.config import PrepareConfig


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """JSONL of 96 documents; an id comes again later, in another unit."""
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    rows = [
        {"id": f"d{n if n != 70 else 3}", "text": "".join(f"Document {n} has sentence {i}. " for i in range(2 + n % 5))}
        for n in range(96)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(documents, tmp_path):
    """config(output, **changes): a PrepareConfig of these documents, in 12 units; its YAML is at output.yaml."""

    def make(output, **changes):
        mapping = {
            "output": str(tmp_path / output),
            "source": {"name": "huggingface", "paths": [str(documents)]},
            "encoder": {"name": "sentence-transformers", "model": "minilm"},
            "documents_per_shard": 8,
            "validation": 0.2,
            "split_workers": 0,
            **changes,
        }
        (tmp_path / f"{output}.yaml").write_text(yaml.safe_dump(mapping))
        return PrepareConfig(**mapping)

    return make
