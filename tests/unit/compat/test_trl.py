"""What philora does to libraries when it imports them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")

TRAINER = """
import sys
{before}
import philora
philora.SFTTrainer
from trl.trainer import base_trainer
"""


def in_a_process(code, tmp_path, before=""):
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    code = TRAINER.format(before=before) + code + "\nimport os; os._exit(7)"  # as a killed process: nothing is tidied
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    return sorted(path.name for path in folder.iterdir() if "wandb" in path.name)


@pytest.mark.slow
def test_the_trainer_does_not_import_wandb(tmp_path):
    code = "assert 'wandb' not in sys.modules\nassert not base_trainer.is_wandb_available()"
    assert in_a_process(code, tmp_path) == []


@pytest.mark.slow
def test_trl_imports_wandb_and_leaves_folders(tmp_path):
    assert in_a_process("", tmp_path, before="import trl; trl.SFTTrainer"), "the test above can fail"


@pytest.mark.slow
def test_wandb_is_there_for_a_run_that_reports_to_it(tmp_path):
    code = """
import transformers, transformers.integrations, accelerate.utils
from transformers.integrations import get_reporting_integration_callbacks
assert transformers.is_wandb_available is transformers.integrations.is_wandb_available
(tracker,) = get_reporting_integration_callbacks(["wandb"])
assert tracker.__name__ == "WandbCallback" and tracker()._wandb is sys.modules["wandb"]
assert base_trainer.is_wandb_available() and base_trainer.wandb.run is None
run = sys.modules["wandb"].init(mode="disabled")
assert base_trainer.wandb.run is run
"""
    assert in_a_process(code, tmp_path)
