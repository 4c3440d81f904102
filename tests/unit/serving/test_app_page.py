"""The page of `philora chat --web` in a real browser."""

from __future__ import annotations

import json

import pytest

from philora.generation.conversation import chat_settings, load_pool
from tests.browser import page_of
from tests.conftest import COLOURS
from tests.served import serve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def voices(colours):
    return load_pool(colours)


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "preferences.jsonl"


@pytest.fixture(scope="module")
def served(voices, votes):
    with serve(voices, votes=votes, defaults=chat_settings(40), questions=["Who are you?"]) as running:
        yield running


@pytest.fixture
def page(served):
    with page_of(served.address) as page:
        yield page


def send(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")


def ask(page, text):
    send(page, text)
    page.wait_for_selector("#send:visible", timeout=60_000)
    return answers(page)


def answers(page):
    """Words on the left and on the right of the last turn, as the models wrote them."""
    return page.evaluate("turns.at(-1).answers.map((each) => each.error ?? each.text)")


def names(page):
    return [each.text_content() for each in page.query_selector_all(".turn:last-child .who b")]


def test_both_answer_and_the_vote_is_stored(page, votes):
    left, right = ask(page, "Who are you?")
    assert names(page) == ["nano", "red"]
    assert right == COLOURS["red"] != left
    page.click(".turn:last-child .answer:nth-child(1) .vote")
    page.wait_for_selector(".voted")
    assert "Stored in" in page.text_content("#status")
    record = json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])
    assert record["prompt"] == [{"role": "user", "content": "Who are you?"}]
    assert record["chosen"] == [{"role": "assistant", "content": left}]
    assert record["rejected"] == [{"role": "assistant", "content": right}]
    assert (record["chosen_model"], record["rejected_model"]) == ("nano", "red")

    ask(page, "And now?")
    page.click(".turn:last-child .answer:nth-child(2) .vote")
    page.wait_for_selector(".turn:last-child.voted")
    record = json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])
    assert [each["content"] for each in record["prompt"]] == ["Who are you?", left, "And now?"], (
        "it continues from the vote"
    )
    assert page.trouble == []


def test_a_vote_holds_the_system_prompt_that_was_answered_to(page, votes):
    page.click("#toggle")
    page.fill("#system", "Be brief.")
    ask(page, "Who are you?")
    page.fill("#system", "Another, for the next turn.")
    page.click(".turn:last-child .answer:nth-child(1) .vote")
    page.wait_for_selector(".voted")
    record = json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])
    assert record["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_an_answer_that_breaks_off_is_said(page):
    start = json.dumps({"choices": [{"index": 0, "delta": {"content": "I am"}, "finish_reason": None}]})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {start}\n\n"))
    assert ask(page, "Who are you?") == ["The answer is incomplete: the server ended it"] * 2


def test_the_text_comes_in_pieces_and_can_be_stopped(page, served):
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            const words = document.querySelectorAll(".words")[1]; if (words) window.seen.add(words.textContent);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    ask(page, "Who are you?")
    assert page.evaluate("window.seen.size") > 4
    page.click("#toggle")
    page.fill("#temperature", "2")
    page.fill("#max_tokens", "1500")
    page.select_option("#right", "nano")
    send(page, "Say something.")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector(".turn:last-child .words:not(:empty)")
    page.click("#stop")
    page.wait_for_selector("#send:visible", timeout=20_000)
    assert "stopped" in page.text_content(".turn:last-child .figures")
    assert page.query_selector(".turn:last-child .vote:visible") is None, "half an answer is not voted on"
    assert served.idle()
    assert page.trouble == []


def test_the_conversation_and_the_settings_are_kept(page, served):
    page.click("#toggle")
    page.fill("#system", "Be brief.")
    page.dispatch_event("#system", "change")
    _, right = ask(page, "Who are you?")
    page.reload()
    page.wait_for_selector(".turn")
    assert answers(page)[1] == right
    assert page.input_value("#system") == "Be brief."
    page.click("#new")
    assert page.query_selector(".turn") is None
    page.reload()
    page.wait_for_selector("#right option", state="attached")
    assert page.query_selector(".turn") is None


def test_what_people_and_models_write_is_text(page):
    evil = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    ask(page, evil)
    assert page.text_content(".said") == evil
    assert page.query_selector(".said img") is None
    assert page.title() == "philora chat"
    assert page.trouble == []


def test_who_is_who_is_hidden_until_the_vote(page):
    page.click("#toggle")
    page.check("#blind")
    texts = ask(page, "Who are you?")
    assert names(page) == ["Answer A", "Answer B"]
    assert page.query_selector(".goes-on") is None
    side = texts.index(COLOURS["red"])
    page.click(f".turn:last-child .answer:nth-child({side + 1}) .vote")
    page.wait_for_selector(".voted")
    assert names(page)[side] == "red"
    assert set(names(page)) == {"red", "nano"}


def test_a_blind_turn_without_a_vote_keeps_its_buttons_and_its_secret(page, votes):
    page.click("#toggle")
    page.check("#blind")
    ask(page, "Who are you?")
    ask(page, "And now?")
    first = ".turn:nth-of-type(1)"
    assert page.locator(f"{first} .vote:visible").count() == 2
    assert page.locator(f"{first} .who b").all_text_contents() == ["Answer A", "Answer B"]
    page.locator(f"{first} .vote:visible").first.click()
    page.wait_for_selector(f"{first}.voted")
    assert json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])["prompt"][-1]["content"] == "Who are you?"
    assert page.locator(".turn:last-child .vote:visible").count() == 2


def test_both_good_and_both_bad_are_ratings_and_the_tally_counts_them(page, votes):
    ratings = votes.with_name("ratings.jsonl")
    before = page.evaluate("call('votes').then((each) => each.json())")
    texts = ask(page, "Who are you?")
    page.get_by_role("button", name="Both bad").click()
    page.wait_for_selector(".voted")
    lines = [json.loads(line) for line in ratings.read_text(encoding="utf-8").splitlines()[-2:]]
    assert [each["completion"][0]["content"] for each in lines] == texts
    assert [(each["label"], each["model"]) for each in lines] == [(False, "nano"), (False, "red")]
    after = page.evaluate("call('votes').then((each) => each.json())")
    assert after["both_bad"] == before["both_bad"] + 1
    page.click("#toggle")
    page.wait_for_selector("#tally:has-text('both bad')")
    with page.expect_download() as started:
        page.click("#download")
    kept = started.value.path().read_text(encoding="utf-8")
    assert json.loads(kept.splitlines()[-1]) == lines[-1]


def test_held_out_questions_begin_a_conversation(page):
    page.click(".chip")
    page.wait_for_selector("#send:visible", timeout=60_000)
    assert page.text_content(".said") == "Who are you?"
    assert answers(page)[1] == COLOURS["red"]


def test_the_system_prompt_is_the_first_bubble(page):
    assert not page.is_visible("#system-bubble")
    page.click("#toggle")
    page.fill("#system", "Be <b>brief</b>.")
    assert page.text_content("#system-bubble span") == "Be <b>brief</b>."
    assert page.is_visible("#system-bubble")


def test_one_column_regenerate_and_edit(page):
    page.click("#toggle")
    page.check("#single")
    assert ask(page, "Who are you?") == [COLOURS["red"]]
    assert page.locator(".vote:visible").count() == 0
    page.evaluate("turns.at(-1).answers[0].text = 'something else'")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector("#send:visible", timeout=60_000)
    assert answers(page) == [COLOURS["red"]]
    ask(page, "And now?")
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#text") == "And now?"
    assert page.locator(".turn").count() == 1


@pytest.mark.parametrize("kept", ["[1, 2]", '{"turns": [{"user": "Hi"}, 3, {"user": "a", "answers": [{}]}]}', "null"])
def test_a_chat_that_another_release_stored_does_not_break_the_page(page, kept):
    page.evaluate("(text) => localStorage.setItem('philora-chat', text)", kept)
    page.reload()
    page.wait_for_selector("#right option", state="attached")
    assert ask(page, "Who are you?")[1] == COLOURS["red"]
    assert page.trouble == []


def test_markdown_is_laid_out_and_nothing_in_it_is_html(page):
    text = "# Title\n\nSome **bold**, `a<b`, *it*.\n- one\n- two\n\n```python\nx = '<img src=x>'\n```\n"
    text += "[ok](https://example.org/) [bad](javascript:alert(1)) <img src=x onerror=\"document.title='broken'\">"
    page.evaluate("(text) => { const box = document.createElement('div'); box.id = 'out'; box.className = 'words';"
                  " document.querySelector('#turns').append(box); markdown(box, text); }", text)  # fmt: skip
    inside = page.locator("#out")
    assert inside.locator("h3").text_content() == "Title"
    assert inside.locator("strong").text_content() == "bold"
    assert inside.locator("p code").text_content() == "a<b"
    assert inside.locator("li").all_text_contents() == ["one", "two"]
    assert inside.locator("pre code").text_content() == "x = '<img src=x>'"
    assert [each.get_attribute("href") for each in inside.locator("a").all()] == ["https://example.org/"]
    assert "[bad](javascript:alert(1))" in inside.text_content()
    assert inside.locator("img").count() == 0
    assert page.title() == "philora chat"
    page.evaluate("(text) => markdown(document.querySelector('#out'), text)", "*" * 3000 + "`" * 3000)
    assert page.trouble == []


def test_errors_are_said_and_the_page_goes_on(page):
    texts = ask(page, "word " * 2100)
    assert all("maximum context length is 2048" in each for each in texts)
    assert ask(page, "Who are you?")[1] == COLOURS["red"]


def test_turns_that_no_longer_fit_are_left_out_and_it_is_said(page):
    ask(page, "word " * 1990)
    assert ask(page, "Who are you? " * 20)[0]
    assert "The first 1 turn(s) no longer fit" in page.text_content(".turn:last-child .left-out")


def test_a_key_in_the_address(voices, votes):
    with serve(voices, votes=votes, key="secret") as served:
        with page_of(f"{served.address}/#key=secret") as page:
            assert ask(page, "Who are you?")[1].startswith("I am red")
        with page_of(served.address, "#status.error") as page:
            assert "You didn't provide an API key" in page.text_content("#status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_overflows_and_text_can_be_read_in_both_themes(served, scheme, width):
    with page_of(served.address, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        page.click("#toggle")
        ask(page, "A_long_word_" * 30)
        wide = page.evaluate(
            "() => [...document.querySelectorAll('body *')].filter(e => e.offsetParent !== null && "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.className || e.tagName)"
        )
        assert wide == []
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 10
        # 4.5 is what WCAG 2 asks of text at level AA.
        assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.offsetParent === null || e.disabled) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
    found[e.id || e.className || e.tagName] = (a + .05) / (b + .05);
  }
  return found;
}"""
