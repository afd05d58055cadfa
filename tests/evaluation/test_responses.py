"""The responses that a page carries: which ones stand behind a point, that no text becomes markup, and a click in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.evaluation.report import render_report
from equipoise.evaluation.responses import responses_of
from equipoise.types import Prompt
from evaluation.small_comparison import OBJECTIVES, PROMPTS, scored, summary_of
from evaluation.test_report import Page

HOSTILE = "</script><script>document.title = 'gone'</script><img src=x onerror=\"document.title = 'gone'\"> & ]]> <!-- \x00\ud800\u202e"
NAN = float("nan")
POINTS = [
    scored("reference", None, [(k, 1, 0) for k in (0, 1, 2, 3)], texts=["first", "second", "third", "fourth"]),
    scored("soup", (1, 0, 0), [(1.234, NAN, -0.5), (2, 0, 0), (2, 0, 0), (3, 0, 0)], texts=[f"an answer {HOSTILE}", "", "c", "d"]),
    scored("soup", (0.5, 0.5, 0), [(1, 1, 0), (1, 1, 0)], texts=["half one", "half two"]),
]
ASKED = {p: Prompt(id=p, messages=({"role": "user", "content": f"question {p} {HOSTILE}"},)) for p in PROMPTS}


def evaluation() -> dict[str, Any]:
    summary = summary_of(POINTS[0])
    best = summary.best_of(POINTS[0], (1.0, 0.0, 0.0), 2, "best-of-n")
    points = [summary.reference, *(summary.point(s) for s in POINTS[1:]), best]
    return {"title": "t", "model": "m", "objectives": list(OBJECTIVES), "judges": [], "points": [summary.row(p) for p in points]}


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(evaluation(), responses_of(POINTS, ASKED))


def carried(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script id="responses-data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_carries_every_response_with_its_scores(page: str) -> None:
    found = carried(page)
    assert found["names"] == list(OBJECTIVES)
    assert [p.split(" <")[0] for p in found["prompts"]] == ["question p", "question q"]
    assert found["sources"]["reference/all"] == [
        [0, "first", [0, 1, 0]],
        [0, "second", [1, 1, 0]],
        [1, "third", [2, 1, 0]],
        [1, "fourth", [3, 1, 0]],
    ]
    first, *others = found["sources"]["soup/(1, 0, 0)"]
    assert (first[0], first[2]) == (0, [1.23, None, -0.5])
    assert others == [[0, "", [2, 0, 0]], [1, "c", [2, 0, 0]], [1, "d", [3, 0, 0]]]
    assert first[1] == "an answer " + HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\u202e", "\ufffd")
    # the evaluation itself has none of it
    assert "half one" not in json.dumps(Page(page).data())


def test_a_choice_names_the_responses_that_it_took() -> None:
    """By the first objective the second of p and the second of q: rows 1 and 3."""
    rows = evaluation()["points"]
    assert rows[-1]["chosen"] == [1, 3]
    assert all("chosen" not in row for row in rows[:-1])


def test_texts_stay_data(page: str) -> None:
    found = Page(page)
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert page.count("<script") == page.count("</script") == 3
    assert {tag for tag, _ in found.tags}.isdisjoint({"img", "iframe", "form"})
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    page.encode("utf-8")
    assert not re.search("[\x00\u202e]", page)
    assert "script-src 'sha256-" in page
    assert "unsafe-inline'; script" in page  # styles only
    assert not re.search(r"script-src[^;]*unsafe", page)


def test_every_point_has_a_button_and_its_markers(page: str) -> None:
    found = Page(page)
    buttons = [a for tag, a in found.tags if tag == "button" and a.get("class") == "point"]
    assert [b["data-point"] for b in buttons] == ["0", "1", "2", "3"]
    assert all("disabled" in b for b in buttons)  # until the script wakes them
    marks = [a["data-point"] for tag, a in found.tags if tag == "g" and "data-point" in a]
    # all four on helpful and harmless; on helpful and brief not the half one, which weighs harmless; then only the reference
    assert sorted(marks) == sorted("0123" + "013" + "0")


def test_without_responses_nothing_opens() -> None:
    plain = render_report(evaluation())
    assert "data-point=" not in plain.replace("[data-point]", "")
    assert "<dialog" not in plain
    # a point whose responses aren't there stays as it is
    few = render_report(evaluation(), responses_of(POINTS[:1], ASKED))
    assert [b["data-point"] for tag, b in Page(few).tags if tag == "button" and b.get("class") == "point"] == ["0", "3"]


@pytest.fixture(scope="module")
def opened(page: str, tmp_path_factory) -> Iterator[Any]:
    """The page in Chromium, without a network; nothing may be written to its console."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tried with Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the page is tried in Chromium: none of chromium, chromium-browser and google-chrome is on the PATH")
    file: Path = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page)
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        context = browser.new_context(viewport={"width": 390, "height": 800}, offline=True)
        context.set_default_timeout(120_000)
        tab = context.new_page()
        tab.on("console", lambda said: problems.append(said.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(file.as_uri())
        yield tab
        browser.close()
    assert problems == []


def shown(tab: Any) -> list[str]:
    return tab.locator("#responses .prompt, #responses .response p").all_text_contents()


def test_a_click_on_a_point_shows_what_it_said(opened: Any) -> None:
    opened.get_by_role("button", name="soup").first.click()
    assert opened.locator("#responses-title").text_content() == "soup 1/0/0"
    said = shown(opened)
    assert [s[:10] for s in said] == ["question p", "an answer ", "(empty res", "question q", "c", "d"]
    assert "<img src=x onerror=" in said[1]
    assert opened.locator("#responses .scores").first.text_content() == "helpful 1.23 · harmless – · brief −0.50"
    assert opened.locator("#responses img, #responses script").count() == 0
    assert opened.title() == "t"
    opened.emulate_media(media="print")
    assert not opened.locator("#responses").is_visible()
    opened.emulate_media(media="screen")
    opened.keyboard.press("Escape")
    assert not opened.locator("#responses").is_visible()


def test_the_keyboard_and_a_marker_open_it_too(opened: Any) -> None:
    opened.locator("button.point").nth(3).focus()
    opened.keyboard.press("Enter")
    assert shown(opened)[1::2] == ["second", "fourth"]
    opened.locator("#responses-close").click()
    marker = opened.locator("#front svg").first.locator("[data-point='2']")
    marker.scroll_into_view_if_needed()
    box = marker.bounding_box()
    opened.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown(opened)[1::2] == ["half one", "half two"]
    opened.keyboard.press("Escape")
