"""Warn about the steps of a run before it starts, and judge its results at its end.

Without them a run of a step or two, or one whose answers are no better than the base's, would end like any other.
`notices` checks the plan, `judge` the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from philora.configuration.sections import Config
from philora.evaluation.measures import LOSS, Paired
from philora.planning.plan import Plan
from philora.planning.schedule import FEW_STEPS, check_schedule, few_steps, trains_nothing

STILL_FALLING = 0.1
"""If the second half of the steps has more than this share of the held-out loss's fall, it has not converged.

Under a cosine or linear schedule to 0 the second half has a fifth or a quarter of the summed learning rate. A loss that
falls in proportion to it falls by about twice this share, and one that has converged by far less.
"""


def warmup_steps(config: Config, plan: Plan) -> float:
    """Return the run's `warmup_steps`: 0 if it was not set and the default would be as long as a very short run."""
    given: float = config.training_config["warmup_steps"]
    asked = config.origins.get("training_config.warmup_steps", "default") != "default"
    return 0 if not asked and trains_nothing(config.training_config, plan.steps) else given


def check(config: Config, plan: Plan) -> None:
    """Refuse a run that would train nothing.

    Raises:
        ConfigError: The learning rate is 0 at every step, or its schedule cannot be made.
    """
    chosen = {"learning_rate": plan.learning_rate, "warmup_steps": warmup_steps(config, plan)}
    check_schedule(config.training_config | chosen, plan.steps, f"{config.source}: training_config")


def notices(config: Config, plan: Plan) -> list[str]:
    """Return warnings about the steps of a run before it starts."""
    found = []
    if config.origins.get("model.name_or_path", "default") == "default" and config.model.adapter is None:
        found.append(
            "NO MODEL IS NAMED: this trains the bundled toy, which is only for trying philora. "
            "Name one: --model phi-3-mini, or model.name_or_path in the configuration."
        )
    if plan.steps is not None and plan.steps < FEW_STEPS:
        found.append(few_steps(plan.steps))
    wanted = config.training_config.get("tokens_per_step")
    if isinstance(wanted, int) and plan.step_tokens > 1.1 * wanted and plan.row_tokens > wanted:
        found.append(
            f"training_config.tokens_per_step={wanted:,}, but a step has about {plan.step_tokens:,} tokens: a pack is "
            f"as long as the longest conversation. Set packing to false, or lower max_length, which cuts conversations."
        )
    return found


@dataclass(frozen=True)
class Judgement:
    """The judgement of a run.

    Attributes:
        verdict: `better` or `worse` than the base, or `unclear`, by the 95% interval of the held-out loss's difference;
            `unknown` without held-out data.
        still_falling: Whether the held-out loss still fell in the second half of the steps; None if there are too few
            evaluations.
        sentences: The same as sentences, with advice.
    """

    verdict: str
    still_falling: bool | None
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"verdict": self.verdict, "still_falling": self.still_falling, "sentences": list(self.sentences)}


def judge(
    comparison: Sequence[Paired], log: Sequence[Mapping[str, Any]], *, steps: int, updates: Sequence[Mapping[str, Any]]
) -> Judgement:
    """Judge a finished run: the interval against the base, and the second half's share of the fall in loss.

    Args:
        comparison: Figures of base and adapter.
        log: Entries of the trainer's log, with `step` and, for evaluations, `eval_loss`.
        steps: Optimizer steps of the run.
        updates: Norms of the adapter's update of every module.
    """
    loss = next((entry for entry in comparison if entry.field == LOSS.field), None)
    verdict = "unknown" if loss is None else loss.verdict
    falling = None if loss is None else _still_falling(loss.before, log, steps)
    sentences = []
    if updates and not any(float(update.get("norm") or 0.0) for update in updates):
        sentences.append("the adapter is still at its start: every B is 0, so nothing was trained.")
    if loss is not None and verdict == "worse":
        sentences.append(
            f"worse than the base on held-out data: the loss rose by {_ends(loss)} (95% interval). "
            f"Lower the learning rate, train for fewer epochs, or look at the data."
        )
    elif loss is not None and verdict == "unclear":
        sentences.append(
            f"no better than the base on held-out data: the loss changed by {_ends(loss)} (95% interval). "
            f"Train for more steps, raise the learning rate, or hold out more rows."
        )
    if falling:
        sentences.append(
            f"the held-out loss still fell in the second half of the {steps} steps: more steps (num_train_epochs) or a "
            f"higher learning rate would bring it lower."
        )
    return Judgement(verdict, falling, tuple(sentences))


def _ends(loss: Paired) -> str:
    """Return the interval of the loss's difference as text."""
    if loss.low is None or loss.high is None:
        return f"{loss.after - loss.before:+.3f}, one row, without an interval"
    return f"{loss.low:+.3f} to {loss.high:+.3f}"


def _still_falling(before: float, log: Sequence[Mapping[str, Any]], steps: int) -> bool | None:
    """Return whether the second half of the steps has more than `STILL_FALLING` of the loss's fall."""
    losses = {int(entry["step"]): float(entry["eval_loss"]) for entry in log if "eval_loss" in entry}
    early = [step for step in losses if 0.4 * steps <= step <= 0.6 * steps]
    late = [step for step in losses if step > 0.8 * steps]
    if not early or not late:
        return None
    middle, end = losses[min(early, key=lambda step: abs(step - steps / 2))], losses[max(late)]
    fall = before - end
    return fall > 0 and middle - end > STILL_FALLING * fall
