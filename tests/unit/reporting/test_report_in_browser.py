"""The controls of the report in a real browser: log scale, smoothing, zoom, filter, sort, and widths."""

from __future__ import annotations

import json

import pytest

from philora.reporting.report import write_comparison, write_report
from philora.reporting.run_record import ANSWERS_NAME
from tests.browser import page_of
from tests.unit.reporting.test_report import answer, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of a run with a long name, and of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name) for name in ("a_long_name_of_a_run_" * 6, "short")]
    answers = [answer(1, "", "one two three four"), answer(2, "one two three five", "one"), answer(3, "", "six")]
    for run in runs:
        (run / ANSWERS_NAME).write_text("".join(f"{json.dumps(each)}\n" for each in answers), encoding="utf-8")
    return [write_report(runs[0]).as_uri(), write_comparison(runs, folder / "both.html").as_uri()]


def paths(page):
    return page.eval_on_selector_all(".large path", "all => all.map(one => one.getAttribute('d'))")


def test_log_scale_smoothing_and_zoom_draw_the_curves_anew(pages):
    with page_of(pages[0], "[data-chart-tools]:not([hidden])") as page:
        first = paths(page)
        page.check("[data-log]")
        assert paths(page) != first
        page.uncheck("[data-log]")
        page.fill("[data-smoothing]", "0")
        raw, smooth, _ = paths(page)
        assert raw == smooth, "without smoothing the line is that of the values"
        page.fill("[data-smoothing]", "1")
        box = page.locator(".large .plot").bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 50, steps=4)
        page.mouse.up()
        marks = page.eval_on_selector_all(".x-marks", "all => all.map(one => one.textContent)")
        assert "200" in marks[0]
        assert "100" not in marks[0]
        assert len(set(marks)) == 1, "all charts show the same steps"
        page.click("[data-whole]")
        assert "100" in page.text_content(".x-marks")
        assert page.trouble == []


def test_answers_are_filtered_and_sorted(pages):
    with page_of(pages[0], "[data-answer-tools]:not([hidden])") as page:
        seen = "details.sample:not([hidden]) .question"
        page.select_option("[data-filter]", "worse")
        assert page.locator(seen).all_text_contents() == ["Question 2?"]
        page.select_option("[data-filter]", "all")
        page.select_option("[data-sort]", "score")
        assert page.locator(seen).all_text_contents() == ["Question 3?", "Question 2?", "Question 1?"]
        page.select_option("[data-filter]", "matches")
        assert page.locator(seen).all_text_contents() == ["Question 1?"]
        assert page.trouble == []


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_cut_and_headings_keep_their_size(pages, width):
    for address in pages:
        with page_of(address, "h1", viewport={"width": width, "height": 800}) as page:
            wide = page.evaluate(
                "() => [...document.querySelectorAll('main *')].filter(e => e.offsetParent !== null && "
                "!e.closest('.contents, pre') && e.getBoundingClientRect().right > innerWidth + 1)"
                ".map(e => e.className || e.tagName)"
            )
            assert wide == []
            size = page.evaluate("() => parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)")
            assert size == (34 if width > 640 else 28)
