"""The command line, in this process (fast) or as a real one (signals, disks)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

QUICK = {
    "model": {"name_or_path": "nano", "dtype": "float32"},
    "data": {"train": "helpdesk", "eval": "helpdesk"},
    "evaluation": {"generate": 4, "max_new_tokens": 8, "samples": 1},
    "training_config": {
        "max_steps": 4,
        "max_length": 256,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_steps": 2,
        "learning_rate": 1.0e-3,
        "seed": 7,
    },
    "peft_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
}


@pytest.fixture
def config(tmp_path) -> Callable[..., Path]:
    """Writes a quick run's YAML with changes by dotted key; the run folder is `tmp_path / run`."""

    def write(name: str = "quick.yaml", **changes: object) -> Path:
        settings = json.loads(json.dumps(QUICK))
        settings["data"]["train"] = {"path": "helpdesk", "limit": 60}
        settings["data"]["eval"] = {"path": "helpdesk", "limit": 8}
        settings["training_config"]["output_dir"] = str(tmp_path / "run")
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            if leaf:
                settings[section][leaf] = value
            else:
                settings[section] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A real `philora` process."""
    command = [sys.executable, "-m", "philora", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]
