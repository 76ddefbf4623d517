"""Both pages, the chat and the arena, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("fastapi")
selenium = pytest.importorskip("selenium")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "\n\n```html\n<b onmouseover=alert(1)>&amp;</b>\n```\nand `<i>code</i>` **<u>bold</u>**"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver_path = shutil.which("chromedriver")
    if CHROMIUM is None or driver_path is None:
        pytest.skip("no chromium with its chromedriver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(driver_path, log_output=os.devnull)
    )
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


class Page:
    """What a test does in a page."""

    def __init__(self, driver, url):
        self.driver = driver
        self.size(1280, 800)
        driver.get(url)

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script, *words):
        return self.driver.execute_script(f"return ({script})", *words)

    def until(self, script, seconds=20.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.03)
        raise AssertionError(f"not within {seconds} s: {script}; the page: {self.text('body')}")

    def text(self, selector):
        return self.run("document.querySelector(arguments[0]).innerText", selector)

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def fits(self):
        """Nothing is wider than the screen."""
        return self.run("document.documentElement.scrollWidth <= innerWidth")

    def errors(self):
        return [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]


@pytest.fixture
def chat(browser, live, idle):
    page = Page(browser, live.url)
    page.run("localStorage.clear(), sessionStorage.clear()")
    browser.get(live.url)
    page.errors()
    page.until("document.querySelectorAll('#models button').length === 3")
    page.run("Object.assign(state.settings, {max_tokens: 12, temperature: 0}) && 1")
    return page


def test_a_question_is_answered_and_asked_again(chat, idle):
    from selenium.webdriver import Keys

    chat.keys("hello", Keys.ENTER)
    chat.until("document.querySelector('.again')")
    (said,) = chat.run("state.turns[0].replies.map(r => r.text)")
    assert said and chat.run("state.turns[0].asked") == "hello"
    assert chat.run("document.querySelector('.said').textContent").strip() in said
    assert "12 tokens" in chat.text(".foot")
    chat.run("(state.settings.temperature = 2, state.settings.seed = '5')")
    chat.click(".again")
    chat.until(f"!busy() && state.turns[0].replies[0].text !== {json.dumps(said)}")
    # The next question carries what was said before.
    chat.run("ask('and now?')")
    history = chat.run("history('two.b', 1).map(m => m.role)")
    assert history == ["user", "assistant", "user"]
    chat.until("!busy()")
    assert not chat.errors()


def test_adapters_are_switched_and_compared(chat, idle):
    from selenium.webdriver import Keys

    assert chat.run("state.chosen") == "two.b"
    chat.click("#models button")
    assert chat.run("state.chosen") == "tiny" and chat.text("#models [aria-checked=true]") == "tiny"
    chat.run("document.querySelector('#models [aria-checked=true]').focus()")
    chat.keys(Keys.ARROW_RIGHT)
    assert chat.run("state.chosen") == "one"
    chat.keys("c")  # no field has the focus
    assert chat.run("state.compare") is True
    chat.run("ask('hello')")
    chat.until("!busy() && document.querySelectorAll('.replies.two .reply').length === 2")
    assert chat.run("state.turns[0].replies.map(r => r.model)") == ["tiny", "one"]
    one, two = chat.run("state.turns[0].replies.map(r => r.text)")
    assert one and two and one != two
    boxes = chat.run(
        "[...document.querySelectorAll('.reply')].map(r => r.getBoundingClientRect().top)"
    )
    assert boxes[0] == boxes[1], "side by side"
    chat.size(390, 844)
    boxes = chat.run(
        "[...document.querySelectorAll('.reply')].map(r => r.getBoundingClientRect().top)"
    )
    assert boxes[0] < boxes[1] and chat.fits(), "one under the other on a phone"
    assert not chat.errors()


@pytest.mark.full
def test_stop(chat, live, idle, slow):
    from selenium.webdriver import Keys

    before = idle()["cancelled"]
    chat.run("(state.settings.max_tokens = 200, ask('go on'))")
    chat.until("state.turns[0].replies[0].text.length > 3")
    assert chat.run("document.getElementById('send').getAttribute('aria-label')") == "Stop"
    chat.keys(Keys.ESCAPE)
    chat.until("!busy() && document.querySelector('.count').textContent.includes('stopped')")
    assert idle()["cancelled"] == before + 1


def test_markup_in_a_reply_is_text(chat):
    chat.run(
        "(state.turns.push({asked: arguments[0], replies: [{model: 'one', text: arguments[0],"
        " state: 'done'}]}), drawTurns())",
        HOSTILE,
    )
    shown = chat.run("document.querySelector('.said').textContent")
    assert "<script>document.title='owned'</script><img" in shown and "&amp;" in shown
    tags = chat.run("[...new Set([...document.querySelectorAll('.said *')].map(e => e.tagName))]")
    assert set(tags) <= {"P", "DIV", "HEADER", "SPAN", "BUTTON", "PRE", "CODE", "STRONG"}
    assert chat.run("document.title") == "Chat · qlora"
    # Were it markup, the policy would not let it run.
    chat.run("(document.body.insertAdjacentHTML('beforeend', arguments[0]), 1)", HOSTILE)
    time.sleep(0.3)
    assert chat.run("document.title") == "Chat · qlora"


@pytest.mark.full
def test_errors_settings_and_theme(chat, live, idle, monkeypatch):
    chat.run("(state.settings.max_tokens = 900, ask('hello'))")
    chat.until("document.querySelector('.wrong')")
    assert "the context holds 256 tokens" in chat.text(".wrong")
    chat.run("(state.settings.max_tokens = 4)")
    monkeypatch.setattr(live.engine, "max_queue", -live.engine.max_batch)
    chat.click(".again")
    chat.until("document.querySelector('.wrong')?.textContent.startsWith('Busy just now')")
    monkeypatch.undo()
    chat.click(".again")
    chat.until("!busy() && state.turns[0].replies[0].text && !document.querySelector('.wrong')")
    before = chat.run("document.documentElement.dataset.theme")
    chat.click("#theme")
    after = chat.run("document.documentElement.dataset.theme")
    assert {before, after} == {"dark", "light"}
    chat.click("#settings")
    chat.run("(document.getElementById('system').value = 'Be brief.', 1)")
    chat.click("#panel .tool")
    assert chat.run("history('one', 0)[0]") == {"role": "system", "content": "Be brief."}
    chat.driver.refresh()
    chat.until("state.models.length === 3")
    assert chat.run("[state.settings.system, document.documentElement.dataset.theme]") == [
        "Be brief.",
        after,
    ]


@pytest.mark.full
def test_a_key_is_asked_for(browser, live, run_app):
    from qlora_kernels.serve.app import create_app
    from qlora_kernels.serve.guard import Guard

    app = create_app(live.app)

    @asynccontextmanager
    async def nothing(app):  # the engine is another server's
        yield

    app.router.lifespan_context = nothing
    with run_app(Guard(app, api_key="secret", local=False)) as url:
        page = Page(browser, url)
        page.until("document.getElementById('panel').open")
        page.run("(document.getElementById('key').value = 'secret', 1)")
        page.click("#panel .tool")
        page.until("state.models.length === 3")
        page.run("sessionStorage.clear()")


# --- the arena ----------------------------------------------------------------------------------


@pytest.fixture
def arena(browser, tmp_path, run_app):
    pytest.importorskip("scipy")
    from qlora_kernels.arena.app import create_app
    from qlora_kernels.arena.store import Store
    from qlora_kernels.evaluate.records import Reply
    from qlora_kernels.serve.guard import Guard

    store = Store(tmp_path / "votes.sqlite", create=True)
    replies = {"ChatGPT": HOSTILE, "secret-model": "plain words " * 80}
    store.add([Reply(q, m, f"question {q}?", r) for q in (1, 2) for m, r in replies.items()])
    with run_app(Guard(create_app(store, "ChatGPT"))) as url:
        page = Page(browser, url)
        page.errors()
        browser.delete_all_cookies()
        browser.get(url)
        page.until("state.step === 'better'")
        yield page
    browser.delete_all_cookies()


def test_a_vote_by_keys(arena):
    from selenium.webdriver import Keys

    source = arena.run("document.documentElement.outerHTML + JSON.stringify(state)")
    assert "secret-model" not in source and "question " in source
    arena.keys("1")
    arena.until("state.step === 'guess'")
    assert "ChatGPT’s" in arena.text("#ask")
    source = arena.run("document.documentElement.outerHTML")
    assert "secret-model" not in source
    arena.keys("2")
    arena.until("state.step === 'told'")
    names = arena.run("['left', 'right'].map(s => document.getElementById(s + '-who').textContent)")
    assert sorted(names) == ["ChatGPT", "secret-model"]
    right = names[1] == "ChatGPT"
    assert arena.text("#ask").endswith("You could tell." if right else "Not this time.")
    assert arena.text("#count") == "1 of 2"
    first = arena.text("#question")
    arena.keys(Keys.ENTER)
    arena.until("state.step === 'better'")
    assert arena.text("#question") != first
    assert "secret-model" not in arena.run("document.documentElement.outerHTML")
    arena.keys("0")
    arena.until("state.step === 'guess'")
    arena.keys(Keys.ESCAPE)
    assert arena.run("state.step") == "better"
    arena.keys("s")
    arena.until("state.step === 'end'")
    assert "Thank you for 1 vote." in arena.text("#end")
    assert not arena.errors()


@pytest.mark.full
def test_markup_in_the_arena_is_text_and_a_phone_is_wide_enough(arena):
    arena.size(390, 844)
    arena.driver.refresh()  # the same pair again
    arena.until("state.step === 'better'")
    said = arena.run("[...document.querySelectorAll('.said')].map(s => s.textContent).join()")
    assert "<script>document.title='owned'</script>" in said
    assert arena.run("document.title").startswith("Which reply") and arena.fits()
    arena.click("#choices button:nth-child(2)")
    arena.click("#choices button:nth-child(4)")
    arena.until("state.step === 'told'")
    assert not arena.errors()
