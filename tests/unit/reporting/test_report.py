"""The page of a run: what it shows, what it leaves out, and that nothing of the run can break out of it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from philora.errors import ConfigError, DataError
from philora.evaluation.measures import Paired
from philora.reporting import report
from philora.reporting.answers import marked, similarity
from philora.reporting.charts import Axis, Curve, averaged, chart, smoothed, thinned, ticks
from philora.reporting.formatting import duration, number
from philora.reporting.report import write_comparison, write_report
from philora.reporting.run_record import ANSWERS_NAME, Run, read_run

CONFIG = """\
# from default: r, alpha; from demo.yaml: learning_rate
model:
  name_or_path: nano
  dtype: float32
training_config:
  learning_rate: 0.003
  num_train_epochs: 4
  hub_token: hf_abcdefghijklmnop
peft_config:
  r: 16
  lora_alpha: 32
"""


def entries(steps: int = 400) -> list[dict[str, Any]]:
    """Log entries as a run writes them: a noisy falling loss, warm-up and cosine, an evaluation each 50 steps."""
    noise = random.Random(0)
    logged: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        progress = step / steps
        level = 0.28 + 3.1 * math.exp(-step / (0.16 * steps))
        rate = 3e-3 * min(1.0, step / 20) * (0.5 * (1 + math.cos(math.pi * progress)))
        logged.append(
            {
                "step": step,
                "epoch": round(4 * progress, 3),
                "time": 1789000000.0 + 0.41 * step,
                "loss": round(level * (1 + noise.gauss(0, 0.09)), 4),
                "learning_rate": rate,
                "grad_norm": round(0.35 + 1.4 * math.exp(-step / 60) + abs(noise.gauss(0, 0.12)), 4),
                "num_tokens": 1984.0 * step,
                "tokens_per_second": round(4830 + noise.gauss(0, 140) - (900 if step == 1 else 0), 1),
                "memory_bytes": 912_000_000 + 40_000 * min(step, 80),
            }
        )
        if step % (steps // 8) == 0:
            logged.append({"step": step, "eval_loss": round(0.36 + 2.6 * math.exp(-step / (0.15 * steps)), 4)})
    return [*logged, {"step": steps, "train_runtime": 164.2, "train_loss": 0.712}]


def results() -> dict[str, Any]:
    return {
        "philora": "0.1.0",
        "versions": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "trl": "1.16.0",
            "peft": "0.21.2",
            "datasets": "4.8.1",
            "accelerate": "1.14.0",
            "tokenizers": "0.23.1",
            "safetensors": "0.8.0",
        },
        "command": "philora train helpdesk.yaml training_config.learning_rate=3e-3 training_config.output_dir=desk",
        "started": "2026-09-10T09:14:02+00:00",
        "finished": "2026-09-10T09:17:51+00:00",
        "model": {"name": "nano", "dtype": "float32", "parameters": 6_815_744},
        "coverage": {
            "rows": [
                {
                    "module": "layers.*.self_attn.qkv_proj",
                    "slice": "q_proj",
                    "r": 16,
                    "scaling": 2.0,
                    "modules": 6,
                    "parameters": 49152,
                },
                {
                    "module": "layers.*.self_attn.qkv_proj",
                    "slice": "v_proj",
                    "r": 16,
                    "scaling": 2.0,
                    "modules": 6,
                    "parameters": 36864,
                },
                {
                    "module": "layers.*.self_attn.o_proj",
                    "slice": "",
                    "r": 16,
                    "scaling": 2.0,
                    "modules": 6,
                    "parameters": 49152,
                },
                {
                    "module": "layers.*.mlp.gate_up_proj",
                    "slice": "",
                    "r": 16,
                    "scaling": 2.0,
                    "modules": 6,
                    "parameters": 172032,
                },
                {
                    "module": "layers.*.mlp.down_proj",
                    "slice": "",
                    "r": 16,
                    "scaling": 2.0,
                    "modules": 6,
                    "parameters": 92160,
                },
            ],
            "trainable_parameters": 399_360,
            "total_parameters": 7_215_104,
        },
        "data": {
            "train": {
                "rows": 1993,
                "tokens": 143_220,
                "labels": 71_004,
                "longest_tokens": 248,
                "truncated": 2,
                "dropped": 0,
                "duplicates": 0,
            },
            "eval": {
                "rows": 332,
                "tokens": 23_911,
                "labels": 11_842,
                "longest_tokens": 201,
                "truncated": 0,
                "dropped": 0,
                "duplicates": 0,
            },
            "sources": {
                "train": [
                    {
                        "name": "helpdesk/train.jsonl",
                        "format": "messages",
                        "records": 1993,
                        "weight": 1.0,
                        "recognised": "by the field messages",
                        "examples": ["user: Hi <b> | assistant: Hello."],
                    }
                ],
                "eval": [{"name": "helpdesk/eval.jsonl", "format": "messages", "records": 332, "weight": 1.0}],
            },
            "lengths": {"edges": [12.0, 96.0, 172.0, 248.0], "counts": [1200, 600, 193], "median": 71.0},
            "preview": [["<|user|>", False], ["Hi", False], ["<|assistant|>", False], ["Hello", True], [".", True]],
            "in_both": 0,
            "notices": ["2 conversations were cut to 240 tokens."],
            "streaming": False,
        },
        "updates": [
            {"module": f"model.layers.{layer}.self_attn.qkv_proj", "slice": part, "norm": norm, "relative": norm / 50}
            for layer in range(6)
            for part, norm in (("q_proj", 0.5 + layer), ("v_proj", 2.0))
        ],
        "before": {
            "loss": 3.4871,
            "perplexity": 32.691,
            "token_accuracy": 0.3312,
            "label_tokens": 11842,
            "exact_match": 0.015,
            "exact_match_count": 5,
            "answers": 332,
        },
        "after": {
            "loss": 0.3604,
            "perplexity": 1.4339,
            "token_accuracy": 0.9127,
            "label_tokens": 11842,
            "exact_match": 0.8193,
            "exact_match_count": 272,
            "answers": 332,
        },
        "samples": [
            {
                "prompt": [
                    {"role": "system", "content": "You are the help desk of philora. Answer in one sentence."},
                    {"role": "user", "content": "My run stopped in the middle of the night."},
                    {
                        "role": "assistant",
                        "content": "Its last checkpoint is in the run folder; only the steps after it are lost.",
                    },
                    {"role": "user", "content": "And how do I continue from there?"},
                ],
                "reference": "Give the same command again with --resume.",
                "base": "The same of the run is a file that the model is the first of the one and the one that",
                "adapter": "Give the same command again with --resume.",
                "base_matched": False,
                "adapter_matched": True,
            },
            {
                "prompt": [{"role": "user", "content": "what went wrong when the return code is 2"}],
                "reference": "Exit code 2 points to a mistake in the usage, the configuration or the data.",
                "base": "",
                "adapter": "Exit code 2 points to a mistake in the usage, the configuration or the data.",
                "base_matched": False,
                "adapter_matched": True,
            },
            {
                "prompt": [{"role": "user", "content": "Which rank should I begin with?"}],
                "reference": "Rank 16 with alpha 32 is a good start; raise it when the training loss stays high.",
                "base": "Rank is the one of the same that a person can see.",
                "adapter": "Rank 16 with alpha 16 is a good start; raise it when the loss stays high.",
                "base_matched": False,
                "adapter_matched": False,
            },
        ],
        "throughput": {"tokens": 793_600, "seconds": 164.2, "tokens_per_second": 4833.1, "steps": 400},
        "memory": {"peak_bytes": 1_214_000_000, "estimated_bytes": {"total": 1_400_000_000}},
        "train_loss": 0.712,
    }


def make_run(
    folder: Path, *, written: dict[str, Any] | None = None, logged: list[dict[str, Any]] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    lines = [json.dumps(entry) for entry in (entries() if logged is None else logged)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results() if written is None else written), encoding="utf-8")
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; checks on the way that every element is closed."""

    VOID = frozenset({"meta", "line", "path", "wbr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_shows_the_whole_run(tmp_path):
    page = page_of(make_run(tmp_path / "helpdesk"))
    for shown in (
        "nano",
        "10 September 2026, 09:14 UTC · took 3 min 49 s",
        "Better than the base The held-out loss fell from 3.487 to 0.3604, without an interval.",
        "Whether more steps would help is not known",
        "2 min 44 s 400 steps",
        "4,833 tokens/s, 794k in all",
        "399k 5.5% of 7.22M",
        "1.2 GB",
        "Exact match 1.5% 81.9% +80.4 pp",
        "Loss 3.487 0.360 −3.127",
        "11,842 label tokens, 332 generated answers",
        "Held-out data Training Answers Machine Adapter Data Reproduce",
        "user My run stopped in the middle of the night. assistant Its last checkpoint",
        "Base differs",
        "With adapter matches",
        "no answer",
        "o_proj in layers. *. self_attn 16 2 6 49,152",
        "train eval Rows 1,993 332",
        "q_proj 6% v_proj 4% layer 0 5 mean Norm of each update relative to the norm of the weight",
        "Largest: q_proj, layer 5: norm 5.5, 11% of the weight's.",
        "Lengths of the training rows, median 71 tokens 12 tokens 248",
        "<|user|>Hi<|assistant|> Hello. The loss is on the coloured tokens",
        "helpdesk/train.jsonl train · messages · 1,993 records · by the field messages",
        "user: Hi <b> | assistant: Hello.",
        "2 conversations were cut to 240 tokens.",
        "philora train helpdesk.yaml training_config.learning_rate=3e-3",
        "num_train_epochs: 4",
        "transformers 5.23.0",
    ):
        assert shown in page.text, shown
    titles = [json.loads(figure["data-chart"] or "")["curves"][0]["name"] for figure in page.all("figure")]
    assert titles == ["train", "", "norm", "tokens/s", ""]
    loss = json.loads(page.all("figure")[0]["data-chart"] or "")
    assert [(curve["name"], len(curve["points"])) for curve in loss["curves"]] == [
        ("train", 400),
        ("train, smoothed", 400),
        ("held-out", 9),
    ]
    assert loss["curves"][2]["points"][0] == [0, results()["before"]["loss"]], "the curve begins with the base"
    assert loss["curves"][2]["points"][-1] == [400, pytest.approx(entries()[-2]["eval_loss"], rel=1e-4)]
    axes = {
        (data["left"], data["right"]) for figure in page.all("figure") if (data := json.loads(figure["data-chart"]))
    }
    assert axes == {(0, 400)}, "all charts show the same steps"


def test_the_page_loads_nothing_and_allows_only_its_own_script(tmp_path):
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not [tag for tag, attributes in page.tags if "src" in attributes]
    anchors = [str(attributes["href"]) for _, attributes in page.tags if "href" in attributes]
    assert anchors
    assert {each.removeprefix("#") for each in anchors} <= {str(attributes.get("id")) for _, attributes in page.tags}
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(text.encode()) < 220_000
    assert any(each.get("name") == "viewport" for each in page.all("meta"))
    assert "prefers-color-scheme: dark" in text


def test_everything_from_the_run_is_escaped(tmp_path):
    attack = "</code></script><script>alert(1)</script>\"' onload=alert(1) {{ 7 * 7 }}"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poisoned(each) for each in value]
        return f"{value}{attack}" if isinstance(value, str) else value

    written = poisoned(results())
    for part in (written["versions"], written["data"]["sources"]):
        for key in list(part):
            part[f"{key}{attack}"] = part.pop(key)
    clean = page_of(make_run(tmp_path / "clean"))
    folder = make_run(tmp_path / "poisoned", written=written)
    (folder / "config.yaml").write_text(f"model: {attack}\n", encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    assert "49" not in page.text.split("7 * 7")[1][:5]
    assert page.text.count("<script>alert(1)</script>") > 40
    assert not [attributes for _, attributes in page.tags if "onload" in attributes]
    # The same elements, but for what falls away with dates that cannot be read.
    assert abs(len(page.tags) - len(clean.tags)) <= 20


def test_a_metrics_file_cannot_break_out_either(tmp_path):
    logged = [*entries(20), {"step": 21, "loss": "</figure><script>alert(1)</script>"}]
    page = page_of(make_run(tmp_path, logged=logged))
    assert len(page.all("script")) == 1


@pytest.mark.parametrize("missing", [*results(), None])
def test_any_missing_part_is_left_out(tmp_path, missing):
    for part, name in ((None, "null"), ("absent", "absent")):
        written = {} if missing is None else results()
        if missing is not None:
            written[missing] = None
            if part == "absent":
                del written[missing]
        page = page_of(make_run(tmp_path / name, written=written))
        assert "None" not in page.text
        assert "nan" not in page.text.replace("nano", "")


def test_a_run_without_held_out_data(tmp_path):
    written = results() | {"before": None, "after": None, "samples": []}
    logged = [entry for entry in entries() if "eval_loss" not in entry]
    page = page_of(make_run(tmp_path, written=written, logged=logged))
    assert "Held-out data" not in page.text
    assert "Answers" not in page.text
    assert "Not compared with the base No rows were held out, so base and adapter cannot be compared." in page.text
    assert "Training" in page.text


def test_an_adapter_without_a_base_to_compare_with(tmp_path):
    page = page_of(make_run(tmp_path, written=results() | {"before": None}))
    assert "Exact match – 81.9% –" in page.text


def test_a_run_that_has_not_ended(tmp_path):
    folder = make_run(tmp_path / "going-on", logged=entries(80))
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 81, "lo')
    page = page_of(folder)
    assert "Stopped after step 0: step 80 of 80." in page.text
    assert f"Resume it with philora train {folder} --resume ." in page.text
    assert any("100" in str(each.get("style")) for each in page.all("i"))
    assert len(page.all("figure")) == 5
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "no step has been logged yet." in page.text
    assert page.all("figure") == []


def test_the_loss_of_a_run_that_has_not_ended_begins_at_step_0(tmp_path):
    folder = make_run(tmp_path / "running", logged=entries(80))
    (folder / "results.json").unlink()
    assert read_run(folder).held_out_losses()[0][0] > 0
    (folder / "run.json").write_text('{"first_loss": 3.487}')
    assert read_run(folder).held_out_losses()[0] == (0.0, 3.487)


def test_a_run_on_a_gpu_shows_whether_it_repeats_its_bits(tmp_path):
    plan = {"device": "cuda:0", "deterministic": False}
    assert (
        "Repeatable no training_config.deterministic"
        in page_of(make_run(tmp_path, written=results() | {"plan": plan})).text
    )
    assert "Repeatable" not in page_of(make_run(tmp_path / "cpu")).text


def test_a_loss_that_is_no_number_is_said_and_not_drawn(tmp_path):
    logged = [entry | {"loss": math.nan} if entry["step"] > 30 and "loss" in entry else entry for entry in entries(40)]
    page = page_of(make_run(tmp_path, logged=logged))
    assert "The loss was not a finite number at 10 logged steps, first at step 31." in page.text


def test_an_outcome_for_the_worse_is_said(tmp_path):
    written = results()
    written["before"], written["after"] = written["after"], written["before"]
    page = page_of(make_run(tmp_path, written=written))
    assert "Worse than the base The held-out loss rose from 0.3604 to 3.487" in page.text
    assert any(each.get("class") == "change worse" for each in page.all("span"))
    written["before"] = written["after"]
    assert "No better than the base The held-out loss stayed" in page_of(make_run(tmp_path, written=written)).text


def test_rows_in_train_and_eval_are_a_warning(tmp_path):
    written = results()
    written["data"]["in_both"] = 12
    assert "12 held-out rows are also in the training data" in page_of(make_run(tmp_path, written=written)).text


def test_tokens_of_the_hub_are_not_shown(tmp_path):
    written = results() | {"command": "philora train a.yaml training_config.hub_token=secret hf_zyxwvutsrqponm"}
    text = write_report(make_run(tmp_path, written=written)).read_text(encoding="utf-8")
    assert not any(each in text for each in ("hf_abc", "secret", "hf_zyx"))


def test_the_file_is_replaced_whole_and_can_go_elsewhere(tmp_path):
    folder = make_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    before = sorted(path.name for path in folder.iterdir())
    other = write_report(folder, out=tmp_path / "elsewhere.html")
    assert other.read_text(encoding="utf-8") == (folder / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_without_a_run_and_a_file_that_is_not_ours(tmp_path):
    with pytest.raises(DataError, match=r"report: run='.*' - expected a run folder, with config\.yaml"):
        write_report(tmp_path)
    (make_run(tmp_path / "run") / "results.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json: content=.* - expected a JSON object"):
        write_report(tmp_path / "run")


def test_a_long_run_makes_a_small_page_that_keeps_its_spikes(tmp_path):
    logged = entries(20_000)
    logged[10_000]["loss"] = 55.5
    folder = make_run(tmp_path, logged=logged)
    text = write_report(folder).read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert "55.5" in text


def test_a_later_entry_of_a_step_wins(tmp_path):
    logged = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert read_run(make_run(tmp_path, logged=logged)).series("loss") == [(1, 3.0), (2, 2.0)]


def test_smoothed_keeps_a_level_and_neither_lags_nor_leads():
    assert [y for _, y in smoothed([(x, 4.0) for x in range(30)], 9)] == pytest.approx([4.0] * 30)
    slope = smoothed([(x, float(x)) for x in range(200)], 9)
    assert slope[100] == pytest.approx((100, 100.0), abs=1e-6)
    noise = random.Random(0)
    noisy = smoothed([(x, noise.gauss(0, 1)) for x in range(2000)], 25)
    assert max(abs(y) for _, y in noisy[50:-50]) < 1
    assert smoothed([(0, 1.0), (1, 9.0)], 1) == [(0, 1.0), (1, 9.0)]
    assert smoothed([], 5) == []


def test_thinned_keeps_ends_and_extremes():
    points = [(float(x), math.sin(x / 100)) for x in range(5000)]
    points[1234] = (1234.0, 9.0)
    kept = thinned(points, 50)
    assert len(kept) <= 102
    assert {points[0], points[-1], points[1234]} <= set(kept)
    assert thinned(points[:100], 50) == points[:100]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0, 3e-3, [0, 1e-3, 2e-3, 3e-3]),
        (0.28, 3.4, [0, 1, 2, 3, 4]),
        (1, 400, [0, 100, 200, 300, 400]),
        (2.0, 2.0, [2.0, 2.5, 3.0, 3.5, 4.0]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1.0]),
        (-1.2, 1.2, [-2, -1, 0, 1, 2]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
    assert ticks(low, high)[0] <= low
    assert ticks(low, high)[-1] >= high


def test_a_chart_needs_two_points():
    axis = Axis(0, 2)
    assert chart("Loss", [Curve("train", "raw", [])], axis, form=str) is None
    assert chart("Loss", [Curve("train", "raw", [(1, 1.0)])], axis, form=str) is None
    flat = chart("Loss", [Curve("train", "raw", [(1, 1.0), (2, 1.0)])], axis, form=str)
    assert flat is not None
    assert "nan" not in flat["curves"][0]["path"]


def test_marked_shows_where_an_answer_departs():
    reference = "Rank 16 with alpha 32 is a good start."
    assert marked("Rank 16 with alpha 16 is a good start.", reference) == [
        ("Rank 16 with alpha", False),
        (" ", False),
        ("16", True),
        (" ", False),
        ("is a good start.", False),
    ]
    assert marked(f" {reference}\n", reference) == [(f" {reference}\n", False)]
    assert marked("Something else altogether, of no use.", reference) == [
        ("Something else altogether, of no use.", False)
    ]
    assert marked(" \n", reference) == []


def test_content_in_parts_is_shown_as_text(tmp_path):
    written = results()
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    written["samples"] = [{"prompt": [{"role": "user", "content": parts}], "reference": "A cat.", "adapter": "A cat."}]
    assert "[image] What is this?" in page_of(make_run(tmp_path, written=written)).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3e-3, "0.003"), (2e-4, "2e−4"), (1.25e-5, "1.25e−5"), (4833.2, "4,833"), (0.25, "0.25"), (5e6, "5e6")],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (164.2, "2 min 44 s"), (59.99, "60.0 s"), (7325, "2 h 02 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def compared(after: float, low: float, high: float, **changed: Any) -> dict[str, Any]:
    """An entry of `comparison` as `philora.evaluation.measures` writes it."""
    return Paired("exact_match", "Exact match", 0.5, after, low, high, 9, 90, 1, percent=True).to_dict() | changed


def test_changes_have_their_intervals(tmp_path):
    figures = [
        compared(0.58, 0.02, 0.14),
        compared(0.48, -0.05, 0.01, title="Accuracy of dates"),
        compared(0.4, -0.15, -0.05, title="Accuracy of names"),
    ]
    page = page_of(make_run(tmp_path, written=results() | {"comparison": figures}))
    assert "Exact match 50.0% 58.0% +8.0 pp +2.0 to +14.0 9 · 90 · 1" in page.text
    ways = [str(each.get("class")) for each in page.all("span") if str(each.get("class")).startswith("change")]
    assert ways == ["change better", "change ", "change worse"], "grey where the interval holds zero"


def test_an_evaluation_made_later_is_what_the_page_shows(tmp_path):
    run = make_run(tmp_path, written=results() | {"comparison": [compared(0.58, 0.02, 0.14)]})
    (run / "evaluation").mkdir()
    later = {
        "rows": 120,
        "data": "new.jsonl",
        "before": {"loss": 2.0, "answers": 80, "exact_match": 0.5},
        "after": {"loss": 1.0, "answers": 80, "exact_match": 0.9},
        "comparison": [compared(0.9, 0.3, 0.5)],
        "forgetting": [compared(0.45, -0.1, -0.01, title="General prompts, correct")],
    }
    (run / "evaluation" / "results.json").write_text(json.dumps(later))
    text = page_of(run).text
    assert "Exact match 50.0% 90.0% +40.0 pp +30.0 to +50.0" in text
    assert "From philora evaluate: 120 rows, new.jsonl." in text
    assert "80 generated answers" in text
    assert "What was forgotten" in text
    assert "General prompts, correct 50.0% 45.0% −5.0 pp" in text


def test_several_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("small", "large")]
    other = results()
    other["after"] |= {"loss": 0.2, "exact_match": 0.9}
    make_run(tmp_path / "large", written=other, logged=entries(200))
    (runs[1] / "config.yaml").write_text(CONFIG.replace("r: 16", "r: 64"), encoding="utf-8")
    out = write_comparison(runs, tmp_path / "both.html")
    page = Page(out.read_text(encoding="utf-8"))
    for shown in (
        "2 runs compared",
        "Exact match 81.9% 90.0% best",
        "Loss of the base 3.487 3.487",
        "Settings that differ small large peft_config. r 16 64 Figures",
        "Loss 0.360 0.200 best",
        "Tokens per second 4,833 4,833",
    ):
        assert shown in page.text, shown
    assert "learning_rate" not in page.text.split("Settings that differ")[1].split("Figures")[0]
    assert "hf_abcdefghijklmnop" not in out.read_text()
    charts = [json.loads(figure["data-chart"] or "") for figure in page.all("figure")]
    assert [[curve["name"] for curve in each["curves"]] for each in charts] == [["small", "large"]] * 4
    assert [len(curve["points"]) for curve in charts[1]["curves"]] == [400, 200]
    assert {(each["left"], each["right"]) for each in charts} == {(0, 400)}
    assert len(page.all("script")) == 1


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("first", "second")]
    text = Page(write_comparison(runs, tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "first/run" in text
    assert "second/run" in text


def test_a_comparison_needs_runs(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"runs=1 - expected 2 to 8 runs to compare"):
        write_comparison([run], tmp_path / "out.html")
    with pytest.raises(DataError, match=r"expected a run folder"):
        write_comparison([run, tmp_path], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_page_of_a_long_run_stays_below_two_megabytes():
    """50,000 logged steps, and as many modules as Phi-4 has."""
    keys = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes")
    metrics = [
        {"step": step} | {key: 1.0 + (step * (7919 + place)) % 1009 / 1009 for place, key in enumerate(keys)}
        for step in range(1, 50_001)
    ]
    metrics += [{"step": step, "eval_loss": 2.0 - step / 50_000} for step in range(10, 50_001, 10)]
    updates = [
        {"module": f"model.layers.{layer}.{part}", "slice": "", "norm": 1.0 + layer, "relative": 0.01 * layer}
        for layer in range(40)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    page = report.render(Run(Path("long"), CONFIG, metrics, results() | {"updates": updates}))
    assert "qkv_proj, layer 39" in page
    assert len(page.encode()) < 2_000_000


def evaluated(after: float, low: float, high: float) -> dict[str, Any]:
    """The loss as an entry of `comparison`."""
    return Paired("loss", "Loss", 3.4871, after, low, high, 200, 32, 100, higher_is_better=False).to_dict()


@pytest.mark.parametrize(
    ("loss", "falling", "said"),
    [
        (evaluated(0.3604, -3.3, -3.0), True, ("Better than the base", "fell from 3.487 to 0.360", "still falling")),
        (evaluated(3.6, 0.05, 0.2), False, ("Worse than the base", "rose from 3.487 to 3.600", "had settled")),
        (evaluated(3.4, -0.2, 0.1), False, ("No better than the base", "change: −0.200 to +0.100", "had settled")),
    ],
)
def test_the_verdict_follows_from_the_figures(tmp_path, loss, falling, said):
    judged = {"judgement": {"still_falling": falling, "sentences": []}, "comparison": [loss]}
    text = page_of(make_run(tmp_path, written=results() | judged)).text
    for words in said:
        assert words in text, words
    assert "332 held-out rows" in text


def test_a_loss_that_rose_again_is_said_and_the_kept_checkpoint_marked(tmp_path):
    logged = [*entries(), {"step": 401, "eval_loss": 0.9}]
    folder = make_run(tmp_path, logged=logged)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 401, "best_global_step": 400}))
    text = page_of(folder).text
    assert "The held-out loss was lowest at step 400" in text
    assert "train for fewer epochs" in text
    assert "kept, last: step 401" in text
    best = CONFIG.replace("training_config:", "training_config:\n  load_best_model_at_end: true")
    (folder / "config.yaml").write_text(best, encoding="utf-8")
    text = page_of(folder).text
    assert "kept, best: step 400" in text
    assert "the best checkpoint, of step 400, was kept" in text


def test_an_adapter_that_did_not_move_is_said(tmp_path):
    still = [{"module": "model.layers.0.self_attn.qkv_proj", "norm": 0.0}]
    assert "still at its start" in page_of(make_run(tmp_path, written=results() | {"updates": still})).text


def answer(number: int, base: str, adapter: str, reference: str = "one two three four") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "reference": reference,
        "base": base,
        "adapter": adapter,
        "base_matched": base == reference,
        "adapter_matched": adapter == reference,
    }


def test_all_answers_are_in_the_page_folded_with_what_they_are_filtered_and_sorted_by(tmp_path):
    folder = make_run(tmp_path)
    answers = [answer(1, "", "one two three four"), answer(2, "one two three five", "one"), answer(3, "", "six")]
    answers += [answer(number, "", "one two") for number in range(4, 30)]
    (folder / ANSWERS_NAME).write_text("".join(f"{json.dumps(each)}\n" for each in answers), encoding="utf-8")
    page = page_of(folder)
    found = [each for each in page.all("details") if each.get("class") == "sample"]
    assert len(found) == 29
    assert [each["data-kinds"] for each in found[:3]] == ["matches", "differs worse", "differs"]
    assert [each["data-score"] for each in found[:3]] == ["1.0", "0.4", "0.0"]
    assert ["open" in each for each in found[:4]] == [True, True, True, False]
    for choice in ("all (29)", "matches (1)", "differs (28)", "worse than base (1)"):
        assert choice in page.text


def test_the_note_on_underlined_words_is_true_at_every_similarity(tmp_path):
    folder = make_run(tmp_path)
    (folder / ANSWERS_NAME).write_text(json.dumps(answer(1, "six seven", "one two three five")), encoding="utf-8")
    page = page_of(folder)
    assert "shares less than half of its words with it is marked “different answer” and has no underlines" in page.text
    assert "Base differs different answer six seven" in page.text
    assert len(page.all("mark")) == 1
    assert similarity("six seven", "one two") == 0
    assert similarity("one two", "one two") == 1


def test_smoothed_is_said_only_where_it_is_so(tmp_path):
    short = [make_run(tmp_path / name, logged=entries(8)) for name in ("a", "b")]
    text = Page(write_comparison(short, tmp_path / "short.html").read_text(encoding="utf-8")).text
    assert "smoothed" not in text
    long = [make_run(tmp_path / name) for name in ("c", "d")]
    text = Page(write_comparison(long, tmp_path / "long.html").read_text(encoding="utf-8")).text
    assert "Training loss, smoothed" in text
    assert "Loss on held-out data, smoothed" not in text


def test_the_comparison_marks_the_best_with_its_interval_and_shows_answers_beside_each_other(tmp_path):
    figures = {"a": evaluated(0.5, -3.2, -2.8), "b": evaluated(0.4, -3.3, -2.9)}
    runs = [make_run(tmp_path / name, written=results() | {"comparison": [loss]}) for name, loss in figures.items()]
    for run, text in zip(runs, ("one two three four", "one"), strict=True):
        (run / ANSWERS_NAME).write_text(json.dumps(answer(1, "", text)), encoding="utf-8")
    page = Page(write_comparison(runs, tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "Loss 0.500 −2.987 (−3.200 to −2.800) 0.400 best −3.087 (−3.300 to −2.900)" in page.text
    assert "1 of 2 match" in page.text
    assert "a matches one two three four b differs different answer one" in page.text
    assert "some runs match (1)" in page.text


def test_no_column_is_hidden_on_a_phone(tmp_path):
    page = page_of(make_run(tmp_path, written=results() | {"comparison": [evaluated(0.5, -3.2, -2.8)]}))
    labels = [each.get("data-label") for each in page.all("td") if each.get("data-label")]
    assert labels[:4] == ["Base", "With adapter", "Change", "Better · same · worse"]
    style = (Path(report.__file__).parents[1] / "templates" / "report.css").read_text(encoding="utf-8")
    assert "counts { display: none" not in style


def test_averaged_keeps_the_level_of_a_long_curve():
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    assert {y for _, y in averaged(points, 100)} == {0.5}
    assert averaged(points[:10], 100) == points[:10]
