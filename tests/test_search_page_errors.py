"""The search page in a real browser: what it says and does where the server has gone, refuses or fails."""

import re
import subprocess

import pytest
from conftest import wait_for_answer
from page import QUERY


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
