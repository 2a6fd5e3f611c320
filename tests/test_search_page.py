"""The search page in a real browser, headless Chromium, mostly with the real server behind it."""

import json
import re
import subprocess
import urllib.request
from urllib.parse import unquote

import pytest
from conftest import wait_for_answer

QUERY = "2型糖尿病患者的护理需求"
# Stands in for the server: answers by what `answers` has for the query, [status, seconds to retry or "", documents].
FAKE = """
const answers = arguments[0];
window.asked = [];
window.fetch = (path, { body, signal }) => new Promise((resolve, reject) => {
  const query = JSON.parse(body).queries[0];
  const [status, retry, documents] = answers[query] ?? answers["*"];
  const ask = { query, aborted: false };
  window.asked.push(ask);
  signal.addEventListener("abort", () => { ask.aborted = true; reject(signal.reason); });
  if (status === 503) delete answers[query];
  const hits = documents.map((document, i) => ({ rank: i + 1, document, cosine: 0.9 - i / 10 }));
  const content = status === 200 ? { results: [hits], documents: 7, milliseconds: 1 } : { error: "a reason" };
  const answer = new Response(JSON.stringify(content), { status, headers: retry ? { "Retry-After": retry } : {} });
  if (query !== "永") resolve(answer);
});
"""


class Page:
    """The search page as a user has it: what is typed, what is shown."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, query=""):
        self.browser.get("about:blank")  # another query alone would not load the page again
        self.browser.get(f"{self.address}/" + (f"#q={query}" if query else ""))
        self.wait(lambda: self.text("#status, #error"))

    def wait(self, condition, seconds=60):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())

    def run(self, script, *args):
        return self.browser.execute_script(script, *args)

    def answer_with(self, *documents, **answers):
        """From now on the page's requests are answered here, with these documents."""
        self.run(FAKE, {"*": [200, "", documents], **answers})

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility())"
                        ".map((node) => node.textContent).join('')", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector)

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def search(self, query):
        """Type a query, which is not more than that, and wait for what it finds."""
        self.find("#query").clear()
        self.find("#query").send_keys(query)
        self.wait(lambda: self.browser.title.startswith(f"{query} ·"))

    def focused(self):
        """Where the keyboard is: the rank of a result, or an element's id."""
        return self.run("const node = document.activeElement;"
                        "return node.tagName === 'LI' ? node.querySelector('.rank').textContent : node.id")

    def requests(self):
        """Addresses that were asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def visit(browser):
    """Opens the page of a server in English, as if for the first time; whatever a test does there, the browser asks
    no other address, and neither scripts nor the security policy have anything to say."""
    def start(address):
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "all"})
        speak(browser, "en-US")
        visited.append(Page(browser, address))
        visited[-1].open()
        return visited[-1]

    visited = []
    yield start
    for page in visited:
        assert all(url.startswith((f"{page.address}/", "about:")) for url in page.requests())
    said = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("Failed to load resource" in entry["message"] for entry in said), said
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get("about:blank")


@pytest.fixture
def page(visit, service):
    return visit(service.address)


def speak(browser, language):
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {
        "userAgent": browser.execute_script("return navigator.userAgent"), "acceptLanguage": language})


def ask(address, query, top_k=10):
    request = urllib.request.Request(f"{address}/search", json.dumps({"queries": [query], "top_k": top_k}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_results_while_typing_are_those_of_the_server(page, service):
    page.find("#query").send_keys(QUERY)
    page.wait(lambda: page.browser.title.startswith(f"{QUERY} ·"))
    answer = ask(service.address, QUERY)
    (hits,) = answer["results"]
    assert len(hits) == 10
    assert page.texts("#results .text") == [hit["document"] for hit in hits]
    assert page.texts("#results .rank") == [str(hit["rank"]) for hit in hits]
    assert [float(score) for score in page.texts("#results .score")] == pytest.approx(
        [hit["cosine"] for hit in hits], abs=1e-4)
    widths = page.run("return [...document.querySelectorAll('.fill')].map((node) => parseFloat(node.style.width))")
    assert widths == pytest.approx([max(0, 100 * hit["cosine"]) for hit in hits], abs=0.01)
    assert re.fullmatch(rf"{answer['documents']:,} documents · 10 results · [\d.,]+ ms \(server [\d.,]+ ms\)",
                        page.text("#status"))
    asked = page.requests()
    assert {f"{page.address}/{name}" for name in ("", "page/page.js", "healthz", "search")} <= set(asked)
    assert asked.count(f"{page.address}/search") < len(QUERY), "a request for every key"
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_highlighted_is_what_stands_in_the_query(page):
    query = "糖尿病 睡眠的质量。"
    page.search(query)
    characters = set(query) - set(" 。")
    for item in page.browser.find_elements("css selector", "#results .text"):
        pieces = page.run("return [...arguments[0].childNodes].map((node) => [node.nodeName, node.textContent])", item)
        assert all(c in characters for name, text in pieces if name == "MARK" for c in text)
        assert not any(c in characters for name, text in pieces if name == "#text" for c in text)
        assert not any(not text for name, text in pieces[1:-1]), "neighbours are in one mark"


@pytest.mark.parametrize("query,document,marks", [
    ("simcse", "SimCSE and simcses, but no se", ["SimCSE", "simcse"]),
    ("2型 C++ a", "12型, 2型 and a C++;C", ["型", "2型", "a", "C++", "C"]),
    ("?。 ,", "why? 。", []),
    ("𠮷野", "吉野𠮷野", ["野𠮷野"]),
])
def test_words_numbers_and_symbols_are_highlighted_whole(page, query, document, marks):
    page.answer_with(document)
    page.search(query)
    assert page.texts("#results .text") == [document]
    assert page.texts("mark") == marks


def test_markup_is_shown_as_text(page):
    documents = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>&amp;", "a\n  b"]
    page.answer_with(*documents)
    page.search("<b>img")
    assert page.texts("#results .text") == documents
    assert not page.run("return document.querySelectorAll('#results :is(img, script, b)').length")


def test_a_long_document_is_shown_in_full_on_demand(page):
    document = "长文," * 3333
    page.answer_with(document)
    page.search("长")
    (shown,) = page.texts("#results .text")
    assert len(shown) < 1000 and document.startswith(shown.removesuffix("…"))
    button = page.find(".more")
    assert button.text == "Show all" and button.get_attribute("aria-expanded") == "false"
    button.click()
    assert page.texts("#results .text") == [document] and len(page.texts("mark")) == 3333
    assert button.text == "Show less" and button.get_attribute("aria-expanded") == "true"
    button.click()
    assert page.texts("#results .text") == [shown]


def test_no_results_and_no_query(page):
    assert "nearest" in page.text("#empty")
    page.answer_with()
    page.search("anything")
    assert page.text("#nothing") == "Nothing was found." and not page.text("#empty")
    page.find("#clear").click()
    page.wait(lambda: page.text("#empty"))
    assert not page.text("#nothing")
    page.find("#examples button").click()
    page.wait(lambda: page.run("return window.asked.length") == 2)
    assert page.run("return window.asked[1].query") == page.texts("#examples button")[0]


def test_number_of_results(page):
    page.search(QUERY)
    assert page.texts("#count option") == ["5", "10", "20", "50"]
    page.find("#count").send_keys("20")
    page.wait(lambda: len(page.texts("#results li")) == 20)
    page.open(QUERY)
    page.wait(lambda: len(page.texts("#results li")) == 20)


def test_a_later_query_drops_the_earlier_one(page):
    page.answer_with("found")
    page.press("永")  # is never answered
    page.wait(lambda: page.run("return window.asked.length") == 1)
    page.press("远")
    page.wait(lambda: page.texts("#results .text") == ["found"])
    assert page.run("return window.asked") == [{"query": "永", "aborted": True}, {"query": "永远", "aborted": False}]


def test_nothing_is_sent_while_an_input_method_composes(page):
    page.answer_with("found")
    for typed in ("n", "ni", "ni h", "ni hao"):
        page.browser.execute_cdp_cmd("Input.imeSetComposition", {
            "text": typed, "selectionStart": len(typed), "selectionEnd": len(typed)})
    waited = "const done = arguments[0]; setTimeout(() => done(window.asked.length), 600)"
    assert page.browser.execute_async_script(waited) == 0
    page.browser.execute_cdp_cmd("Input.insertText", {"text": "你好"})
    page.wait(lambda: page.texts("#results .text") == ["found"])
    assert page.run("return window.asked.map((ask) => ask.query)") == ["你好"]


def test_by_the_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    assert page.focused() == "query"
    page.press(QUERY, Keys.ENTER)
    page.wait(lambda: page.browser.title.startswith(QUERY))
    seen = []
    for key in (Keys.DOWN, Keys.DOWN, Keys.UP, Keys.END, Keys.DOWN, Keys.HOME, Keys.UP, Keys.DOWN):
        page.press(key)
        seen.append(page.focused())
    assert seen == ["1", "2", "1", "10", "10", "1", "query", "1"]
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.END)
    for rank in range(10, 0, -1):
        box, item = page.run("return [document.getElementById('query'), document.activeElement]"
                             ".map((node) => node.getBoundingClientRect().toJSON())")
        assert page.focused() == str(rank) and item["top"] >= box["bottom"], "the focused result is beneath the box"
        page.press(Keys.UP if rank > 1 else Keys.HOME)
    page.press("/")
    assert page.focused() == "query" and page.run("return getSelection().toString()") == QUERY
    page.press(Keys.TAB, Keys.NULL)
    assert page.focused() == "clear"
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.text("#empty"))
    assert page.focused() == "query" and not page.find("#query").get_attribute("value")
    page.press("/")  # in the box it is a character
    assert page.find("#query").get_attribute("value") == "/"


def test_every_control_has_a_name_and_a_role(page):
    page.search(QUERY)
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]}
    assert {("searchbox", "Search for"), ("button", "Clear"), ("button", "中文"), ("link", "API"), ("search", ""),
            ("combobox", "Results"), ("list", "Results"), ("heading", "Semantic search")} <= named
    assert page.find("#status").get_attribute("aria-live") == "polite"


def test_language_is_the_browsers_then_the_chosen_one(page):
    texts = page.texts("[data-text]")
    assert page.run("return document.documentElement.lang") == "en" and all(texts)
    speak(page.browser, "zh-CN")
    page.open()
    assert page.run("return document.documentElement.lang") == "zh-CN"
    assert "篇文档" in page.text("#status") and page.texts("h1") == ["语义检索"]
    assert all(one and one != other for one, other in zip(page.texts("[data-text]"), texts))
    page.search(QUERY)
    found = page.texts("#results .text")
    page.find("#language").click()
    assert "documents · 10 results" in page.text("#status") and page.texts("#results .text") == found
    page.open()
    assert page.run("return document.documentElement.lang") == "en" and page.texts("[data-text]") == texts


def test_where_the_browser_keeps_nothing(page):
    script = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": """
        for (const name of ["localStorage", "sessionStorage"])
          Object.defineProperty(window, name, { get() { throw new DOMException("refused", "SecurityError"); } });"""})
    try:
        page.open()
        page.find("#language").click()
        assert page.texts("h1") == ["语义检索"]
        page.search(QUERY)
        assert len(page.texts("#results li")) == 10
    finally:
        page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_the_address_leads_to_the_query(page):
    page.open(QUERY)
    page.wait(lambda: page.browser.title.startswith(QUERY))
    assert page.find("#query").get_attribute("value") == QUERY
    page.search("老年高血压 a+b&c")
    address = page.browser.current_url
    page.browser.back()
    page.wait(lambda: page.browser.title.startswith(QUERY))
    assert unquote(page.browser.current_url).endswith(f"#q={QUERY}")
    page.browser.forward()
    page.wait(lambda: page.browser.title.startswith("老年高血压 a+b&c"))
    assert page.browser.current_url == address


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(page, width):
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 700, "deviceScaleFactor": 2, "mobile": True})
    script = """
        const small = [...document.querySelectorAll("a, button, input, select")]
          .filter((node) => node.checkVisibility() && node.getBoundingClientRect().height < 44).map((node) => node.id);
        const font = parseFloat(getComputedStyle(document.getElementById("query")).fontSize);
        return [innerWidth, document.documentElement.scrollWidth <= innerWidth, small, font >= 16]"""
    for query in ("", QUERY):
        page.open(query)
        page.wait(lambda query=query: page.browser.title.startswith(query))
        assert page.run(script) == [width, True, [], True]
    page.run("scrollTo(0, 500)")
    assert page.run("return scrollY > 400 && document.getElementById('query').getBoundingClientRect().top") in range(17)
    page.answer_with("W" * 3000, "https" * 60)
    page.search("W" * 300)
    assert page.run(script) == [width, True, [], True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme):
    """At least 4.5 by WCAG's formula, of every text with what it stands on."""
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.answer_with("糖尿病" * 200, 错=[422, "", []])
    grounds = set()
    for state in (lambda: page.search("糖尿"), lambda: page.press("错"), lambda: page.open()):
        state()
        page.wait(lambda: page.text("#error, #results, #empty"))
        for text, colour, ground in page.run("""
                const solid = (node) => {
                  const colour = getComputedStyle(node).backgroundColor;
                  return colour !== "rgba(0, 0, 0, 0)" || !node.parentElement ? colour : solid(node.parentElement);
                };
                return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
                  && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
                  .map((node) => [node.textContent.slice(0, 20), getComputedStyle(node).color, solid(node)])"""):
            lights = []
            for value in (colour, ground):
                rgb = [int(part) / 255 for part in re.findall(r"\d+", value)[:3]]
                linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
                lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
            assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5, (text, colour, ground)
            grounds.add(lights[1] > 0.5)
    assert grounds == {scheme == "light"}


def test_the_server_goes_and_comes_back(visit, serve):
    running = serve()
    page = visit(running.address)
    page.search("老年高血压")
    running.stop()
    page.press("与睡眠")
    page.wait(lambda: page.text("#error"))
    assert re.fullmatch(r"The server does not answer\. (Trying again in \d+ s\.)?", page.text("#error"))
    assert not page.texts("#results li"), "what belongs to another query"
    page.find("#language").click()
    assert page.text("#message") == "服务器没有应答。"
    process = subprocess.Popen(running.process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_answer(f"{running.address}/healthz")
        page.wait(lambda: page.browser.title.startswith("老年高血压与睡眠 ·"))  # by itself
        assert len(page.texts("#results li")) == 10 and not page.text("#error")
    finally:
        process.kill()
        process.wait()


def test_overloaded_is_tried_again(page):
    page.answer_with("found", 忙=[503, "2", []])
    page.press("忙")
    page.wait(lambda: page.text("#error"))
    assert page.text("#message") == "The server is busy or restarting. (a reason)"
    page.wait(lambda: page.text("#countdown") == "Trying again in 1 s.")
    page.wait(lambda: page.texts("#results .text") == ["found"])
    assert not page.text("#error") and page.run("return window.asked.length") == 2


@pytest.mark.parametrize("status,message", [
    (413, "The text is too long: at most 2,000 characters."), (422, "The server does not accept this text. (a reason)"),
    (500, "The server failed. (a reason)"),
    (504, "The search took too long and was given up. Press Enter to try again. (a reason)")])
def test_errors_are_explained(page, status, message):
    page.answer_with("found", 错=[status, "", []])
    page.press("错")
    page.wait(lambda: page.text("#error"))
    assert page.text("#error").strip() == message
    page.press("误")
    page.wait(lambda: page.texts("#results .text") == ["found"])
    assert not page.text("#error")


def test_too_long_a_query_is_not_sent(page):
    page.requests()
    page.run("document.getElementById('query').value = '长'.repeat(2001)")
    page.press("\n")
    page.wait(lambda: page.text("#error"))
    assert page.text("#error").strip() == "The text is too long: at most 2,000 characters."
    assert f"{page.address}/search" not in page.requests()


def test_a_server_that_asks_for_a_token(visit, serve):
    page = visit(serve(env={"SIMCSE_TOKEN": "open-sesame"}).address)
    page.press(QUERY)
    page.wait(lambda: page.text("#error"))
    assert page.text("#error").strip() == "This server asks for a token."
    assert page.focused() == "token" and page.find("#token").get_attribute("type") == "password"
    for wrong in ("wrong", "错"):
        page.press(wrong, "\n")
        page.wait(lambda: page.text("#error").strip() == "The token was not accepted." and page.focused() == "token")
        page.run("document.getElementById('message').textContent = ''")
    page.press("open-sesame\n")
    page.wait(lambda: len(page.texts("#results li")) == 10)
    assert page.focused() == "query" and not page.text("#authorization")
    page.open(QUERY)  # the token is kept as long as the tab is
    page.wait(lambda: len(page.texts("#results li")) == 10)
