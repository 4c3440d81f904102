"""What a run promises before it starts and what is said of it at its end: steps, rates, verdicts, missing packages."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import Phi3Config

import philora
from philora.configuration.config import load_config
from philora.errors import ConfigError
from philora.evaluation.measures import LOSS, of_means, paired
from philora.evaluation.scores import compare
from philora.planning import outlook, requirements
from philora.planning.batch import step_tokens
from philora.planning.plan import with_learning_rate
from philora.planning.schedule import check_schedule, rates, trains_nothing
from philora.training.readiness import preflight
from philora.training.resume import _with_recorded_rate

ROWS = 60


def row(number: int) -> dict:
    question, answer = f"What is the number after {number}?", f"The number after {number} is {number + 1}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def checked(tmp_path):
    """Plans a run over a few short conversations."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(ROWS)))

    def check(*overrides: str):
        run = {"output_dir": str(tmp_path / "run")}
        return preflight({"data": {"train": str(file), "eval": None}, "training_config": run}, list(overrides))

    return check


# -- the step


@pytest.mark.parametrize(
    ("tokens", "conversation", "device", "expected"),
    [
        (10, 1, "cpu", 1),
        (8_000, 32, "cpu", 80),
        (2_000, 100, "cpu", 100),  # a conversation at least
        (10**9, 100, "cpu", 8192),
        (10**9, 100, "cuda", 16384),
    ],
)
def test_a_step_is_a_hundredth_of_an_epoch(tokens, conversation, device, expected):
    assert step_tokens(tokens, conversation, device) == expected


def test_more_epochs_make_more_steps_and_not_larger_ones(checked):
    one, three, ten = (checked(f"training_config.num_train_epochs={each}").plan for each in (1, 3, 10))
    assert one.step_tokens == three.step_tokens == ten.step_tokens
    assert 2 * one.steps < three.steps < ten.steps / 2


@pytest.mark.parametrize("tokens", [64, 100, 256, 500])
@pytest.mark.parametrize("limit", [None, 1024])
def test_a_smaller_step_makes_smaller_packs(checked, tokens, limit):
    given = [] if limit is None else [f"training_config.max_length={limit}"]
    plan = checked(f"training_config.tokens_per_step={tokens}", *given).plan
    assert plan.step_tokens <= 1.1 * tokens
    assert plan.row_tokens <= tokens


def test_a_step_that_one_conversation_makes_larger_is_told(checked):
    found = checked("training_config.tokens_per_step=8")
    assert found.plan.step_tokens > 8
    assert any("tokens_per_step=8, but a step has about" in each for each in found.notices)


# -- the rate


@pytest.mark.parametrize(("width", "rate"), [(3072, 2e-4), (5120, 1.2e-4), (256, 2.4e-3), (512, 1.2e-3)])
def test_the_rate_follows_from_the_width(width, rate):
    config = with_learning_rate(load_config({"data": {"train": "helpdesk"}}), Phi3Config(hidden_size=width))
    assert config.training_config["learning_rate"] == pytest.approx(rate)
    assert config.origins["training_config.learning_rate"] == f"auto: 0.0002 * 3072 / hidden size {width}"


def test_a_rate_that_is_given_stays(checked):
    plan = checked("training_config.learning_rate=1e-3").plan
    assert (plan.learning_rate, plan.learning_rate_origin) == (1e-3, "command line")
    assert "auto: 0.0002 * 3072 / hidden size 256" in str(checked().plan)


def test_an_earlier_run_goes_on_with_the_rate_of_its_record():
    now = load_config({"data": {"train": "helpdesk"}})
    then = load_config({"data": {"train": "helpdesk"}, "training_config": {"learning_rate": 2e-4}})
    earlier = {"format": 1, "model": {}}  # no word of what was chosen automatically
    assert _with_recorded_rate(now, then, earlier).training_config["learning_rate"] == 2e-4
    other = load_config({"data": {"train": "helpdesk"}, "training_config": {"learning_rate": 5e-4}})
    assert _with_recorded_rate(now, other, earlier).training_config["learning_rate"] == "auto", (
        "a person's own: refused"
    )
    chosen = {"automatic": {"training_config.learning_rate": "auto: a rule"}}
    found = _with_recorded_rate(now, other, chosen)
    assert found.training_config["learning_rate"] == 5e-4
    assert found.origins["training_config.learning_rate"] == "auto: a rule"
    assert _with_recorded_rate(other, other, chosen).origins["training_config.learning_rate"] == "auto: a rule"
    assert _with_recorded_rate(then, other, chosen) is then, "another rate: the difference is refused"


# -- runs that train nothing


def settings(**changes):
    return {"learning_rate": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 0} | changes


def test_rates_are_those_of_the_trainer():
    assert rates(settings(), 4) == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])
    assert rates(settings(warmup_steps=0.5), 4) == pytest.approx([0, 0.5e-4, 1e-4, 0.5e-4])
    assert rates(settings(lr_scheduler_type="reduce_lr_on_plateau"), 4) is None


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_a_run_that_is_all_warm_up_is_refused(scheduler):
    idle = settings(lr_scheduler_type=scheduler, warmup_steps=0.2)
    assert trains_nothing(idle, 1)
    assert not trains_nothing(idle, 2)
    assert not trains_nothing(idle, None)
    with pytest.raises(ConfigError, match=r"warmup_steps=0.2 - expected a learning rate above 0 at some step.*has 1"):
        check_schedule(idle, 1, "x")


def test_a_check_refuses_a_rate_of_nothing_and_names_few_steps(checked):
    one = "training_config.max_steps=1"
    with pytest.raises(ConfigError, match=r"expected a learning rate above 0 at some step"):
        checked(one, "training_config.warmup_steps=0.2")
    for notices in (checked(one).notices, checked("training_config.max_steps=19").notices):
        assert any("below about 20 an adapter learns little or nothing" in each for each in notices)
    assert not any("optimizer steps" in each for each in checked("training_config.max_steps=20").notices)


# -- the verdict


def evaluation(losses):
    rows = [SimpleNamespace(loss=each, correct=0, label_tokens=1) for each in losses]
    return SimpleNamespace(rows=rows, samples=[])


def judged(before, after, log=(), steps=100, norms=(1.0,)):
    figures = compare(evaluation(before), evaluation(after))
    return outlook.judge(figures, list(log), steps=steps, updates=[{"norm": each} for each in norms])


def test_the_verdict_is_the_intervals():
    base = [2.0, 3.0, 4.0, 5.0] * 5
    assert judged(base, [each - 1 - each / 50 for each in base]).sentences == ()
    unclear = judged(base, [each + (0.5 if place % 2 else -0.5) for place, each in enumerate(base)])
    assert unclear.verdict == "unclear"
    assert "no better than the base on held-out data" in unclear.sentences[0]
    worse = judged(base, [each + 1 + each / 50 for each in base])
    assert (worse.verdict, "worse than the base" in worse.sentences[0]) == ("worse", True)
    assert outlook.judge([], [], steps=3, updates=[]).verdict == "unknown"
    same = paired(LOSS, of_means(base), of_means(base))
    assert outlook.judge([same], [], steps=3, updates=[{"norm": 0.0}]).sentences[0].startswith("the adapter is still")


@pytest.mark.parametrize(("middle", "end", "falling"), [(3.4, 3.0, True), (3.05, 3.0, False), (3.0, 3.2, False)])
def test_a_loss_that_still_falls_is_told(middle, end, falling):
    log = [{"step": 50, "eval_loss": middle}, {"step": 100, "eval_loss": end}, {"step": 100, "loss": 1.0}]
    found = judged([5.0] * 8, [end] * 8, log)
    assert found.still_falling is falling
    assert any("still fell in the second half of the 100 steps" in each for each in found.sentences) is falling
    assert judged([5.0] * 8, [end] * 8, log[1:]).still_falling is None


# -- what a run needs


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training_config.report_to=weights", r"report_to='weights' - expected one of"),
        ("training_config.report_to=[neptune]", r"report_to='neptune' - expected a tracker whose package is installed"),
        (
            "model.attn_implementation=flex_attention",
            r"expected an implementation that trains on a CPU.*Set auto",
        ),
        ("model.attn_implementation=flash_attention_2", r"attn_implementation='flash_attention_2'.*need a GPU"),
        ("training_config.tf32=true", r"training_config - --tf32 requires"),
        (
            "training_config.lr_scheduler_kwargs={waves: 1}",
            r"lr_scheduler_kwargs=\{'waves': 1\} - expected what.*cosine",
        ),
    ],
)
def test_what_is_missing_is_told_at_the_start(checked, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        checked(setting, "training_config.use_cpu=true")
    config = load_config({"data": {"train": "helpdesk"}}, [setting, "training_config.use_cpu=true"])
    config.training_config["output_dir"] = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        philora.train(config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_flash_attention_is_told_on_a_gpu(monkeypatch):
    monkeypatch.setattr(requirements.torch.accelerator, "is_available", lambda: True)
    given = {"data": {"train": "helpdesk"}, "model": {"attn_implementation": "flash_attention_2"}}
    (message,) = requirements.faults(load_config(given))
    assert "needs flash-attn" in message
    monkeypatch.setitem(requirements._FLASH, "flash_attention_2", lambda: True)
    assert requirements.faults(load_config(given)) == []


def test_trackers_that_are_there_are_taken():
    for given in ("none", "all", [], None):
        config = load_config({"data": {"train": "helpdesk"}, "training_config": {"report_to": given}})
        assert requirements.faults(config) == []
