"""The search page as tests drive it, in the browser of conftest.py."""

import json

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
  const hits = documents.map((found, i) => ({ rank: i + 1, cosine: 0.9 - i / 10,
    ...(typeof found === "string" ? { document: found } : found) }));
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
        """From now on the page's requests are answered here, with these documents, or objects of all that a hit has."""
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
        self.find("#query").click()
        self.browser.execute_cdp_cmd("Input.insertText", {"text": query})  # send_keys knows none beyond U+FFFF
        self.wait(lambda: self.browser.title.startswith(f"{query} ·"))

    def focused(self):
        """Where the keyboard is: the rank of a result, or an element's id."""
        return self.run("const node = document.activeElement;"
                        "return node.tagName === 'LI' ? node.querySelector('.rank').textContent : node.id")

    def requests(self):
        """Addresses that were asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def speak(browser, language):
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {
        "userAgent": browser.execute_script("return navigator.userAgent"), "acceptLanguage": language})
