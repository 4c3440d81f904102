"""Makes the golden run of the installed version: `python tests/golden/make_run.py` writes `tests/golden/VERSION-run/`.

It is a run as `philora train` leaves it, of a few steps on the bundled model, without its checkpoints and tokenizer
(the model's own is used), and `expected.json`: what it scored and answered on the day. What a version wrote stays as it
is; `tests/cli/test_golden_run.py` opens the runs of every release. `0.1.0-run-without-rows` is of the time before runs
kept their held-out rows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import philora

HERE = Path(__file__).parent
WORDS = ("red", "green", "blue", "black", "white", "pink")
CONFIG = """
model: {name_or_path: nano, dtype: float32}
data: {train: conversations.jsonl, eval: 0.2}
evaluation: {generate: 2, max_new_tokens: 8, samples: 2}
training_config:
  {output_dir: runs/golden, max_steps: 4, save_steps: 2, logging_steps: 1, learning_rate: 0.002, max_length: 128,
   per_device_train_batch_size: 2, gradient_accumulation_steps: 1, report_to: none}
peft_config: {r: 2, lora_alpha: 4, target_modules: [q_proj, v_proj]}
"""
HOME = "/home/ada"
"""In place of the folders of the machine that the run was made on."""


def conversations() -> str:
    """The data, as JSON lines."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {WORDS[index % 6]} {index}."},
                {"role": "assistant", "content": f"{WORDS[index % 6]} it is, number {index}."},
            ]
        }
        for index in range(24)
    ]
    return "".join(json.dumps(each) + "\n" for each in rows)


def keep(run: Path, target: Path, replaced: dict[str, str]) -> None:
    """Copy what a reader of the run needs, with other folders in the place of this machine's."""
    left_out = ("checkpoints", "tokenizer*", "chat_template.jinja", "report.html", "train.log", ".lock", "evaluation")
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(*left_out))
    for file in target.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".md"):
            text = file.read_text(encoding="utf-8")
            for old, new in replaced.items():
                text = text.replace(old, new)
            file.write_text(text, encoding="utf-8")


def expected(run: Path) -> dict[str, object]:
    """What the run scores and answers."""
    found = philora.evaluate(run, forgetting=False, metrics=[])
    rows = [json.loads(line) for line in (found.folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"before": found.results["before"], "after": found.results["after"], "rows": rows}


if __name__ == "__main__":
    target = HERE / f"{philora.__version__}-run"
    if target.exists():
        sys.exit(f"{target} exists - expected a version that has none yet. What a release wrote is not written again.")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("conversations.jsonl").write_text(conversations(), encoding="utf-8")
        Path("golden.yaml").write_text(CONFIG, encoding="utf-8")
        run = philora.train("golden.yaml", command="philora train golden.yaml").folder
        scored = expected(run)
        package = str(Path(philora.__file__).parent)
        keep(run, target, {package: f"{HOME}/python/site-packages/philora", os.path.realpath(folder): HOME})
    (target / "expected.json").write_text(json.dumps(scored, indent=1) + "\n", encoding="utf-8")
