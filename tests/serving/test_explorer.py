"""The page in a real browser, on a real server of the tiny model: what is typed and moved, and what is asked and shown for it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest

from equipoise.serving.command import Served, service_of
from equipoise.serving.service import Service
from serving.conftest import LIMITS, serving
from small_pipeline import REWARDS

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tried with Playwright: pip install playwright")
expect, Page = sync_api.expect, sync_api.Page

PATIENCE = 120_000  # ms; a machine may be busy with other things
QUESTION = "how do i make bread ?"
VOICES = ("kind=be good and help", "safe=no bad car", "plain=yes or no")
AXES = dict(zip(REWARDS, "xy", strict=True))


@pytest.fixture(scope="module")
def service(settings) -> Service:
    """All kinds of methods: values, best-of-n, targets, and three objectives that need no training."""
    limits = replace(LIMITS, prompt_tokens=200, body_s=60.0)
    return service_of(replace(settings, methods={"voices": Served(messages=VOICES)}, limits=limits))[0]


@pytest.fixture(scope="module")
def url(settings, service) -> Iterator[str]:
    with serving(service, service_of(settings)[1]) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the page is tried in Chromium: none of chromium, chromium-browser and google-chrome is on the PATH")
    expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield found
        found.close()


@pytest.fixture
def tab(browser) -> Iterator[Page]:
    """A tab that has met no server; nothing may be written to its console but what the browser says of refused requests."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page, problems = context.new_page(), []
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert [text for text in problems if "status of 40" not in text] == []


@pytest.fixture
def page(tab, url) -> Page:
    """The page, and `bodies`, the requests that it makes, as they come."""
    tab.bodies = []
    tab.on("request", lambda request: tab.bodies.append(request.post_data_json) if request.method == "POST" else None)
    tab.goto(url)
    tab.locator("#page").wait_for()
    tab.fill("#length", "8")
    return tab


def ask(page: Page, text: str = QUESTION) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def answer(page: Page, side: str = "A"):
    """The last answer of a side, once it is finished."""
    found = page.locator(f".turn:last-child .answer.{side}")
    expect(found).to_have_attribute("aria-busy", "false")
    return found


def told(url: str, body: dict) -> dict:
    """The server's answer to the same body, not streamed."""
    data = json.dumps(body | {"stream": False}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def signed(value: float) -> str:
    """+0.42, as the page writes it."""
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def asked(page: Page, count: int) -> list[dict]:
    """The bodies, once there are so many."""
    until(lambda: page.wait_for_timeout(20) or len(page.bodies) == count)
    return page.bodies


def until(holds, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it didn't come to hold"
        time.sleep(0.02)


@contextlib.contextmanager
def held(service: Service, monkeypatch, turns: int) -> Iterator[threading.Event]:
    """An engine that stops after so many tokens until the event is set."""
    real, count, go_on = service.engine._turn, itertools.count(), threading.Event()

    def turn(key):
        if not go_on.is_set() and next(count) >= turns:
            go_on.wait(0.02)
            return []
        return real(key)

    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "_turn", turn)
        try:
            yield go_on
        finally:
            go_on.set()
            until(lambda: service.engine.running == 0)


@pytest.fixture(scope="module")
def long_seed(url) -> int:
    """A seed whose first answer doesn't end before its eighth token, and can be scored."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "weights": [0.5, 0.5], "kl_budget": 1}
    for seed in range(100):
        facts = told(url, body | {"seed": seed})["choices"][0]["equipoise"]
        if facts["tokens"] == 8 and None not in facts["scores"].values():
            return seed
    raise AssertionError("the tiny model ends all its answers early")


# --- what is asked and what is shown


def test_an_answer_streams_and_has_the_servers_numbers(page, url, service, long_seed, monkeypatch):
    page.fill("#seed", str(long_seed))
    with held(service, monkeypatch, 3) as go_on:
        ask(page)
        prose = page.locator(".answer.A .prose")
        expect(prose).not_to_be_empty()
        expect(page.locator(".answer.A")).to_have_attribute("aria-busy", "true")
        begun = prose.inner_text()
        go_on.set()
        done = answer(page)
    (body,) = page.bodies
    assert body["messages"] == [{"role": "user", "content": QUESTION}]
    assert (body["seed"], body["max_tokens"], body["weights"]) == (long_seed, 8, {"brief": 0.5, "diverse": 0.5})
    (choice,) = told(url, body)["choices"]
    assert prose.inner_text() == choice["message"]["content"]
    assert begun
    assert choice["message"]["content"].startswith(begun)
    assert len(begun) < len(choice["message"]["content"])
    facts = choice["equipoise"]
    assert done.locator(".scores .value").all_inner_texts() == [f"{signed(facts['scores'][name])} sd" for name in REWARDS]
    numbers = dict(zip(done.locator("dt").all_inner_texts(), done.locator("dd").all_inner_texts(), strict=True))
    assert numbers["KL"] == f"{facts['kl']:.2f} nats"
    assert numbers["tokens"] == "8"
    expect(page.locator("#news")).to_contain_text("Answer A is there: brief")
    point = page.locator(".mark.scored.A")
    assert [float(point.get_attribute(f"data-{AXES[name]}")) for name in REWARDS] == pytest.approx([facts["scores"][n] for n in REWARDS])


def test_a_weight_moved_by_keyboard_moves_the_numbers_and_the_live_point(page, url):
    with urllib.request.urlopen(f"{url}/v1/equipoise", timeout=60) as response:
        fronts = json.load(response)["fronts"]
    (front,) = [front for front in fronts if front["method"] == "single-pass"]
    at = {tuple(point["weights"]): point["reward"] for point in front["points"]}
    slider, live = page.get_by_role("slider", name="Weights of A"), page.locator(".mark.live.A")

    def shown() -> list[float]:
        return [float(live.get_attribute(f"data-{AXES[name]}")) for name in REWARDS]

    expect(page.locator("#readout")).to_contain_text("measured at (0.50, 0.50) on single-pass")
    assert shown() == pytest.approx([at[0.5, 0.5][k]["mean"] for k in (0, 1)])
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.locator(".ends output").first.inner_text() == "0.40"
    assert page.locator(".ends output").nth(1).inner_text() == "0.60"
    assert slider.get_attribute("aria-valuetext") == "brief 0.40, diverse 0.60"
    # (0.4, 0.6) = 0.8 (0.5, 0.5) + 0.2 (0, 1)
    mixed = [{end: 0.8 * at[0.5, 0.5][k][end] + 0.2 * at[0.0, 1.0][k][end] for end in ("mean", "lo", "hi")} for k in (0, 1)]
    assert shown() == pytest.approx([one["mean"] for one in mixed])
    for name, one in zip(REWARDS, mixed, strict=True):
        expect(page.locator("#readout")).to_contain_text(f"{name} {signed(one['mean'])} [{signed(one['lo'])}, {signed(one['hi'])}]")
    expect(page.locator("#readout")).to_contain_text("interpolated between (0.50, 0.50) and (0.00, 1.00)")
    ask(page)
    answer(page)
    slider.press("End")
    page.click("#again")
    asked(page, 2)
    answer(page)
    assert [body["weights"] for body in page.bodies] == [{"brief": 0.4, "diverse": 0.6}, {"brief": 0, "diverse": 1}]
    assert page.bodies[0] | {"weights": 0} == page.bodies[1] | {"weights": 0}


def test_two_sides_answer_beside_each_other_and_each_goes_on_from_its_own(page, long_seed):
    page.fill("#seed", str(long_seed))
    page.check("#compare")
    page.get_by_role("slider", name="Weights of B").press("End")
    page.get_by_label("Strength of B", exact=True).fill("3")
    ask(page)
    texts = {side: answer(page, side).locator(".prose").inner_text() for side in "AB"}
    first = {("A" if body["kl_budget"] == 1 else "B"): body for body in page.bodies}
    assert first["A"]["weights"] == {"brief": 0.5, "diverse": 0.5}
    assert first["B"]["weights"] == {"brief": 0, "diverse": 1}
    assert [first[side][field] for side in "AB" for field in ("seed", "messages")] == 2 * [
        long_seed,
        [{"role": "user", "content": QUESTION}],
    ]
    boxes = [page.locator(f".answer.{side}").bounding_box() for side in "AB"]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert page.locator(".mark.live").count() == 2
    ask(page, "what is good ?")
    for side in "AB":
        answer(page, side)
    for body in asked(page, 4)[2:]:
        own = texts["A" if body["kl_budget"] == 1 else "B"]
        assert own
        turns = [("user", QUESTION), ("assistant", own), ("user", "what is good ?")]
        assert [(turn["role"], turn["content"]) for turn in body["messages"]] == turns
    page.uncheck("#compare")
    assert page.locator(".answer").count() == page.locator(".answer.A").count() == 2


def test_targets_are_typed_and_what_is_wrong_with_them_is_said(page, url):
    page.locator("#method-A").select_option("palette")
    field = page.get_by_label("Targets of A")
    assert field.input_value() == "brief>=+0.2sd diverse>=keep"
    field.fill("nonsense")
    ask(page)
    alert = page.locator("#problem-A")
    expect(alert).to_contain_text("can't read 'nonsense' in the ask")
    assert field.get_attribute("aria-invalid") == "true"
    expect(answer(page).locator(".state")).to_contain_text("can't read 'nonsense'")
    field.fill("brief>=+9sd")
    page.click("#again")
    expect(alert).to_contain_text("the nearest levels are brief")
    field.fill("brief>=keep diverse>=keep-1")
    expect(alert).to_be_empty()
    page.click("#again")
    answer(page).locator(".scores").wait_for()
    assert [body["targets"] for body in page.bodies] == ["nonsense", "brief>=+9sd", "brief>=keep diverse>=keep-1"]
    assert "weights" not in page.bodies[-1]
    facts = told(url, page.bodies[-1])["equipoise"]
    hoped = {name: (facts["levels"][name] - facts["base"][name]) / facts["sd"][name] for name in REWARDS}
    promise = ", ".join(f"{name} {signed(hoped[name])} sd" for name in REWARDS)
    expect(answer(page)).to_contain_text(promise)
    assert page.locator("path.promised").count() == 1
    page.check("#push")
    expect(page.locator("#legend")).to_have_text("This method doesn't say what pushed its words.")


def test_words_show_what_pushed_them(page, url, long_seed):
    page.fill("#seed", str(long_seed))
    page.get_by_label("Strength of A", exact=True).fill("6")
    ask(page)
    done = answer(page)
    assert done.locator(".word").count() == 0
    page.check("#push")
    (body,) = page.bodies
    (choice,) = told(url, body)["choices"]
    push = choice["equipoise"]["push"]
    words = done.locator(".word:not(.mark)")
    assert "".join(words.all_text_contents()) == "".join(choice["message"]["content"].split())
    shown = done.locator(".word").evaluate_all("nodes => nodes.map(node => [node.title, [...node.classList]])")
    assert len(shown) == len(push) > 1
    coloured = 0
    for (title, classes), one in zip(shown, push, strict=True):
        assert title == ", ".join(f"{name} {signed(value)}" for name, value in one["nats"].items()) + " nats"
        name = max(one["nats"], key=lambda name: abs(one["nats"][name]))
        if abs(one["nats"][name]) >= 0.05:
            coloured += 1
            assert f"o{REWARDS.index(name)}" in classes
            assert ("for" if one["nats"][name] > 0 else "against") in classes
        else:
            assert classes[:1] == ["word"]
            assert not {"for", "against"} & set(classes)
    assert coloured > 0
    # Objectives differ by more than hue.
    strokes = page.locator("#legend .word").evaluate_all("nodes => nodes.map(node => getComputedStyle(node).textDecorationStyle)")
    assert len(set(strokes)) == len(strokes) == 2
    assert page.locator("#legend .word").all_inner_texts() == list(REWARDS)
    reader = done.get_by_role("slider", name="Word of answer A")
    reader.focus()
    page.keyboard.press("ArrowRight")
    first, second = [f"{signed(push[i]['nats']['brief'])}" for i in (0, 1)]
    assert f"brief {second}" in reader.get_attribute("aria-valuetext")
    assert done.locator(".word.picked").get_attribute("data-at") == "1"
    page.keyboard.press("Home")
    assert f"brief {first}" in done.locator(".scrub output").inner_text()


def test_stop_ends_the_work_at_the_server(page, service, long_seed, monkeypatch):
    page.fill("#seed", str(long_seed))
    page.check("#compare")
    with held(service, monkeypatch, 2):
        ask(page)
        expect(page.locator(".answer.A .prose")).not_to_be_empty()
        until(lambda: service.engine.running == 2)
        page.click("#stop")
        until(lambda: service.engine.running == 0)
    expect(answer(page).locator(".state")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()


def test_live_asks_again_after_a_pause(page):
    ask(page)
    answer(page)
    page.check("#live")
    page.get_by_role("slider", name="Weights of A").press("Home")
    asked(page, 2)
    answer(page)
    assert page.bodies[1]["weights"] == {"brief": 1, "diverse": 0}
    assert page.locator(".turn").count() == 1


def test_three_objectives_are_set_in_a_triangle(page):
    page.locator("#method-A").select_option("voices")
    corner = page.get_by_role("slider", name="Weights of A: up is more kind")
    fields = [page.get_by_label(f"{name} weight of A") for name in ("kind", "safe", "plain")]

    def shown() -> list[int]:
        return [round(100 * float(field.input_value())) for field in fields]

    assert shown() == [34, 33, 33]
    corner.focus()
    page.keyboard.press("PageUp")
    assert shown() == [44, 28, 28]
    page.keyboard.press("ArrowRight")
    assert shown()[2] == 29
    assert sum(shown()) == 100
    box = page.locator(".triangle polygon").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 40, box["y"] + box["height"] + 30, steps=3)  # beyond the left corner
    page.mouse.up()
    assert shown() == [0, 100, 0]
    fields[2].fill("0.25")
    fields[2].press("Enter")
    assert shown() == [0, 75, 25]
    assert corner.get_attribute("aria-valuetext") == "kind 0.00, safe 0.75, plain 0.25"
    ask(page)
    answer(page).locator(".scores").wait_for()
    assert page.bodies[0]["weights"] == {"kind": 0, "safe": 0.75, "plain": 0.25}
    assert "beta" in page.bodies[0]
    assert "kl_budget" not in page.bodies[0]


def test_the_request_as_code_does_what_the_page_does(page, url, tmp_path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#seed", "5")
    ask(page, 'it \'s "bread" and $HOME ?')
    answer(page)
    expected = told(url, page.bodies[0])["choices"][0]["message"]["content"]
    found = {}
    for kind in ("Python", "curl"):
        page.get_by_role("button", name=f"Copy A as {kind}").click()
        expect(page.locator("#code-done")).to_have_text("It is on the clipboard.")
        found[kind] = page.evaluate("navigator.clipboard.readText()")
        assert page.locator("#code-text").text_content() == found[kind]
        page.keyboard.press("Escape")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(found["Python"], "copied", "exec"), {})
    assert said.getvalue().splitlines()[0] == expected
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", found["curl"]], capture_output=True, text=True, check=True, timeout=120)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected


def test_a_key_is_asked_for_and_forgotten_with_the_tab(tab, settings):
    with serving(service_of(settings)[0], {"fronts": []}, "sesame") as locked:
        tab.goto(locked)
        tab.locator("#key-field").fill("wrong")
        tab.get_by_role("button", name="Use it").click()
        expect(tab.locator("#key-why")).to_contain_text("the key is wrong or missing")
        tab.locator("#key-field").fill("sesame")
        tab.get_by_role("button", name="Use it").click()
        tab.locator("#page").wait_for()
        expect(tab.locator("#which")).to_be_hidden()
        expect(tab.locator("#readout")).to_have_text("A no front of values was measured.")
        tab.fill("#length", "4")
        ask(tab)
        answer(tab).locator(".scores").wait_for()
        assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]


# --- who uses it, and where


def test_everything_is_reached_by_keyboard_and_shows_it(page):
    page.check("#compare")
    page.locator("h1").click()
    met, outlines = [], []
    for _ in range(60):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate("document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent.trim()")
        )
        outlines.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
        if met[-1] == "send":
            break
    wanted = {
        "which",
        "others",
        "method-A",
        "method-B",
        "strength-A",
        "seed",
        "new-seed",
        "length",
        "compare",
        "push",
        "live",
        "message",
        "send",
    }
    assert wanted - set(met) == set()
    assert sum(name.startswith("Weights of") for name in met) == 2
    assert set(outlines) == {"solid"}


NAMELESS = """() => [...document.querySelectorAll(
  'input, select, textarea, button, [role=slider], [role=img], [tabindex], dialog, fieldset')]
  .filter(node => {
    const labels = [...(node.labels ?? [])].map(label => label.textContent).join('');
    const by = (node.getAttribute('aria-labelledby') ?? '').split(' ').map(id => document.getElementById(id)?.textContent ?? '').join('');
    const own = node.matches('button, pre') ? node.textContent : node.matches('fieldset') ? node.querySelector('legend')?.textContent : '';
    return !((node.getAttribute('aria-label') ?? '') + labels + by + (own ?? '')).trim() && !node.closest('dialog:not([open])');
  }).map(node => node.outerHTML)"""

CONTRAST = """() => {
  const parse = text => {
    const parts = text.match(/[\\d.e-]+/g).map(Number), unit = text.startsWith('color(') ? 255 : 1;
    return [...parts.slice(0, 3).map(part => part * unit), parts[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map(k => top[k] * top[3] + under[k] * (1 - top[3]));
  const ground = node => {
    const below = node.parentElement ? ground(node.parentElement) : parse(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    return over(parse(getComputedStyle(node).backgroundColor), below);
  };
  const light = rgb => rgb.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [.2126, .7152, .0722][k], 0);
  const found = [];
  for (const node of document.querySelectorAll('body *:not(svg *):not(option):not(:disabled)')) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) || !node.checkVisibility()) continue;
    const [a, b] = [light(over(parse(getComputedStyle(node).color), ground(node))), light(ground(node))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.className + ' ' + node.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""


def test_controls_have_names_and_text_has_contrast_in_light_and_dark(page):
    page.check("#compare")
    page.check("#push")
    page.locator("#method-B").select_option("palette")
    page.get_by_label("Strength of A", exact=True).fill("6")
    page.get_by_label("Targets of B").fill("nonsense")
    ask(page)
    for side in "AB":
        answer(page, side)
    assert page.evaluate(NAMELESS) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(
        "[document.documentElement.lang, document.querySelectorAll('h1').length, document.querySelectorAll('main').length]"
    ) == ["en", 1, 1]
    assert "Live point A, brief 0.50, diverse 0.50" in page.locator("#figure [role=img]").get_attribute("aria-label")
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found = page.evaluate(CONTRAST)
        assert len(found) > 40
        assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []
    assert len(grounds) == 2


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.check("#compare")
    page.check("#push")
    ask(page)
    for side in "AB":
        answer(page, side)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    inside = """() => [...document.querySelectorAll('#page *:not(.unseen)')].filter(node => {
      const box = node.getBoundingClientRect();
      return node.checkVisibility() && !node.closest('.unseen, .scroll, svg') && (box.left < -1 || box.right > 391);
    }).map(node => node.outerHTML.slice(0, 90))"""
    assert page.evaluate(inside) == []
    page.get_by_role("slider", name="Weights of A").scroll_into_view_if_needed()
    expect(page.locator("#again")).to_be_in_viewport()


# --- the page's arithmetic


def test_weights_sum_to_one_whatever_is_moved(page):
    rng = random.Random(0)
    moves = [[rng.randrange(K), rng.choice([rng.uniform(-20, 130), rng.randrange(101)])] for K in (2, 3, 5) for _ in range(100)]
    cases = [[K, moves[at : at + 100]] for K, at in ((2, 0), (3, 100), (5, 200))]
    run = """async cases => {
      const { even, moved } = await import('/static/weights.js');
      return cases.map(([count, moves]) => { let units = even(count); return moves.map(([k, value]) => units = moved(units, k, value)); });
    }"""
    for (K, steps), after in zip(cases, page.evaluate(run, cases), strict=True):
        for (index, value), units in zip(steps, after, strict=True):
            assert len(units) == K
            assert sum(units) == 100
            assert all(isinstance(unit, int) and unit >= 0 for unit in units)
            assert units[index] == min(100, max(0, int(value + 0.5)))


def test_the_triangle_takes_the_nearest_point(page):
    rng = random.Random(1)
    places = [[rng.uniform(-1, 1), rng.uniform(-0.5, 1.5)] for _ in range(40)]
    run = """async places => {
      const { fromPlane, toPlane } = await import('/static/weights.js');
      return places.map(([x, y]) => toPlane(fromPlane(x, y).map(u => u / 100)));
    }"""
    third = 3**-0.5
    grid = [((c - b) / 100 * third, a / 100) for a in range(101) for b in range(101 - a) for c in [100 - a - b]]
    for (x, y), (px, py) in zip(places, page.evaluate(run, places), strict=True):
        nearest = min((gx - x) ** 2 + (gy - y) ** 2 for gx, gy in grid) ** 0.5
        # A point of the grid of hundredths, and at most one step farther than the nearest of all.
        assert ((px - x) ** 2 + (py - y) ** 2) ** 0.5 <= nearest + 0.012


def test_the_front_between_measured_points_by_hand(page):
    def point(weights: list[float], mean: float, kl: float) -> dict:
        return {"weights": weights, "reward": [{"mean": mean, "lo": mean - 1, "hi": mean + k} for k in range(3)], "kl": kl, "cost": 2}

    corners = [point([1, 0, 0], 1, 1), point([0, 1, 0], 2, 2), point([0, 0, 1], 4, 3), point([0.5, 0.5, 0], 8, 4)]
    front = {"method": "m", "candidates": 1, "objectives": ["a", "b", "c"], "points": corners}
    run = """async ([front, asked]) => {
      const { along } = await import('/static/front.js');
      return asked.map(weights => along(front, weights));
    }"""
    asked = [{"c": 0.5, "b": 0.2, "a": 0.3}, {"a": 0, "b": 1, "c": 0}, {"a": 1, "b": 0}]
    # (0.3, 0.2, 0.5) = 0.1 (1, 0, 0) + 0.4 (0.5, 0.5, 0) + 0.5 (0, 0, 1): mean 0.1 + 3.2 + 2, KL 0.1 + 1.6 + 1.5
    between, exact, other = page.evaluate(run, [front, asked])
    assert between["how"] == "interpolated"
    assert [between["reward"]["c"][end] for end in ("mean", "lo", "hi")] == pytest.approx([5.3, 4.3, 7.3])
    assert (between["kl"], between["cost"]) == pytest.approx((3.2, 2))
    assert (exact["how"], exact["reward"]["a"]["mean"], exact["kl"]) == ("measured", 2, 2)
    assert other is None
    front["points"] = corners[:2]
    (lone,) = page.evaluate(run, [front, asked[:1]])
    assert (lone["how"], lone["between"]) == ("nearest", [[1, 0, 0]])


def test_tokens_are_laid_beside_the_text_that_they_make(page):
    def tokens(*texts: str) -> list[dict]:
        return [{"token": text, "nats": {"a": 2.0**k}} for k, text in enumerate(texts)]

    cases = [
        ["to be 😀!", tokens("to", " be", " \ufffd", "\ufffd", "!", "</s>")],  # half characters add up; the end is none of the text
        ["to be.", tokens("to", "be", ".")],  # decoded without their spaces
        ["to be", tokens("to")],  # the text is ahead
        ["", tokens("</s>")],
    ]
    run = "async cases => { const { aligned } = await import('/static/push.js'); return cases.map(([text, push]) => aligned(text, push)); }"
    found = [[(piece["text"], piece["nats"].get("a"), piece.get("mark")) for piece in pieces] for pieces in page.evaluate(run, cases)]
    assert found == [
        [("to", 1, None), (" be", 2, None), (" 😀", 12, None), ("!", 16, None), ("", 32, "</s>")],
        [("to", 1, None), (" be", 2, None), (".", 4, None)],
        [("to", 1, None), (" be", None, None)],
        [("", 1, "</s>")],
    ]
