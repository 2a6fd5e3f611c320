"""The search page in a real browser, headless Chromium, mostly with the real server behind it."""

import json
import re
import urllib.request
from urllib.parse import unquote

import pytest
from page import QUERY, speak


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


def test_the_passage_that_was_found_is_shown(page):
    """And all of its document on demand; a document of one passage is shown as it is."""
    passages = ("甲。", "乙。", "丙。", "甲。乙。丙。")
    page.answer_with(*({"document": "甲。乙。丙。", "passage": passage} for passage in passages))
    page.search("乙")
    assert page.texts("#results .text") == ["甲。…", "…乙。…", "…丙。", "甲。乙。丙。"]
    assert page.texts(".more") == ["Show all"] * 3 and page.texts("mark") == ["乙", "乙"]
    page.find("#results li:nth-child(2) .more").click()
    assert page.texts("#results .text")[1] == "甲。乙。丙。"


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
