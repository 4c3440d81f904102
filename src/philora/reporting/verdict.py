"""Judge a run in two sentences that follow from its figures by fixed rules.

The first sentence compares base and adapter on the held-out rows, with the interval. The second states whether longer
training would help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from philora.evaluation.measures import EXACT_MATCH, LOSS, Paired
from philora.evaluation.scores import ends_of, shown_figure
from philora.reporting.formatting import mapping, number, real
from philora.reporting.run_record import Point, Run

ROSE = 0.02
"""Share by which the last held-out loss must exceed the lowest one to count as a rise."""


class Verdict(NamedTuple):
    """The verdict on a run: its kind (`better`, `worse`, `unclear` or `unknown`), that as a title, two sentences."""

    kind: str
    title: str
    sentences: tuple[str, str]


TITLES = {
    "better": "Better than the base",
    "worse": "Worse than the base",
    "unclear": "No better than the base",
    "unknown": "Not compared with the base",
}


def verdict_of(run: Run) -> Verdict | None:
    """Return the verdict on a run; None if it has not ended."""
    if not run.results:
        return None
    figures = run.figures()
    loss = next((figure for figure in figures if figure.field == LOSS.field), None)
    kind = _kind(run, loss)
    first = _outcome(run, figures, loss)
    return Verdict(kind, TITLES[kind], (first, _trend(run)))


def _kind(run: Run, loss: Paired | None) -> str:
    """Return the kind by the interval of the loss, or by the two losses if there is no interval."""
    if loss is not None:
        return loss.verdict
    before, after = (real(mapping(run.results.get(key)).get("loss")) for key in ("before", "after"))
    if before is None or after is None:
        return "unknown"
    return "unclear" if before == after else "better" if after < before else "worse"


def _outcome(run: Run, figures: Sequence[Paired], loss: Paired | None) -> str:
    """Return the sentence on base and adapter."""
    if loss is not None:
        rows = f"on {loss.examples:,} held-out row{'s' if loss.examples != 1 else ''}"
        before, after = shown_figure(loss.before, loss), shown_figure(loss.after, loss)
        text = f"The loss {rows} {_verb(loss.before, loss.after)} from {before} to {after}"
        text += f" ({_interval(loss)})" if loss.low is not None else ", without an interval"
        exact = next((figure for figure in figures if figure.field == EXACT_MATCH.field), None)
        if exact is not None:
            text += f"; answers that equal the reference went from {shown_figure(exact.before, exact)} to "
            text += shown_figure(exact.after, exact)
            text += f" of {exact.examples:,}" + (f" ({_interval(exact)})" if exact.low is not None else "")
        return f"{text}."
    old, new = (real(mapping(run.results.get(key)).get("loss")) for key in ("before", "after"))
    if old is None or new is None:
        return "No rows were held out, so base and adapter cannot be compared."
    return f"The held-out loss {_verb(old, new)} from {number(old)} to {number(new)}, without an interval."


def _verb(before: float, after: float) -> str:
    return "stayed" if before == after else "rose" if after > before else "fell"


def _interval(figure: Paired) -> str:
    return f"95% interval of the change: {ends_of(figure)}{' pp' if figure.percent else ''}"


def _trend(run: Run) -> str:
    """Return the sentence on whether more training would help."""
    norms = [real(mapping(entry).get("norm")) for entry in run.results.get("updates") or []]
    if norms and not any(norms):
        return "The adapter is still at its start: every B is 0, so nothing was trained."
    losses = run.held_out_losses()
    lowest = min(losses, key=lambda point: point[1]) if losses else None
    if lowest is not None and len(losses) > 2 and losses[-1][1] > lowest[1] * (1 + ROSE):
        return _risen(run, lowest, losses[-1])
    falling = mapping(run.results.get("judgement")).get("still_falling")
    if falling is True:
        return (
            "The held-out loss was still falling at the end: more steps (num_train_epochs) or a higher learning rate "
            "would lower it."
        )
    if falling is False:
        return "The held-out loss had settled at the end: more steps of the same would change little."
    return "Whether more steps would help is not known: the held-out loss was not measured often enough (eval_steps)."


def _risen(run: Run, lowest: Point, last: Point) -> str:
    """Return the sentence on a held-out loss that was lower before the end."""
    text = (
        f"The held-out loss was lowest at step {lowest[0]:,.0f} ({number(lowest[1])}) and rose to {number(last[1])} at "
        f"step {last[0]:,.0f}"
    )
    kept = run.kept_step()
    if kept is not None and kept[1] == "best":
        return f"{text}; the best checkpoint, of step {kept[0]:,}, was kept."
    return f"{text}: train for fewer epochs, or keep the best checkpoint (load_best_model_at_end: true)."
