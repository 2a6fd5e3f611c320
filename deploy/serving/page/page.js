// The search page: asks the server while one types and draws what it answers. Documents are only ever set as text.

import { matches } from "./highlight.js";
import { TEXTS } from "./texts.js";

const EXAMPLES = ["糖尿病病人需要怎样的护理", "老年高血压与睡眠质量", "乳腺癌术后的免疫功能"];
const COUNTS = [5, 10, 20, 50];
const TYPING_PAUSE = 150; // milliseconds
const PATIENCE = 60000; // milliseconds
const SHOWN_LENGTH = 400; // of a long document, before "show all"
const KINDS = {
  400: "input", 401: "locked", 408: "slow", 413: "long", 422: "input", 429: "busy", 502: "gone", 503: "busy",
  504: "slow",
};

const $ = (id) => document.getElementById(id);
const box = $("query");
const list = $("results");

// A browser may refuse to keep anything; the page then does without.
function recall(name, storage = "localStorage") {
  try { return window[storage].getItem(name); } catch { return null; }
}

function keep(name, value, storage = "localStorage") {
  try { window[storage].setItem(name, value); } catch { /* refused */ }
}

let language = TEXTS[recall("language")] ? recall("language") : (navigator.language.startsWith("zh") ? "zh" : "en");
let token = recall("token", "sessionStorage");
let health = null; // what GET healthz answered
let answer = null; // what is shown: {query, hits, milliseconds, server}
let failure = null;
let failures = 0; // in a row
let pending = new AbortController(); // the newest search; the earlier ones are dropped
let timer = 0; // of the next search
let settled = false; // the address is one to come back to: the next query gets an entry of its own in the history

class Failure extends Error {
  constructor(kind, detail = "", seconds = 0) {
    super(detail);
    Object.assign(this, { kind, seconds }); // seconds until the next try, 0: none
  }
}

async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (token) headers.Authorization = `Bearer ${token}`;
  let response, content;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
    content = await response.json();
  } catch {
    if (signal.aborted) throw signal.reason;
  }
  if (response?.ok && content) return content;
  let kind = response && !response.ok ? KINDS[response.status] ?? "failed" : "gone";
  if (kind === "locked" && token) kind = "refused";
  const pause = Number(response?.headers.get("Retry-After")) || Math.min(2 ** failures, 30);
  throw new Failure(kind, content?.error, kind === "gone" || kind === "busy" ? Math.ceil(pause) : 0);
}

async function search() {
  clearTimeout(timer);
  pending.abort();
  pending = new AbortController();
  const { signal } = pending;
  const patience = setTimeout((search) => search.abort(new Failure("slow")), PATIENCE, pending);
  const query = box.value.trim();
  writeAddress(query);
  list.ariaBusy = "true";
  $("clear").hidden = !box.value;
  try {
    if (!health) {
      health = await ask("healthz", null, signal);
      offerCounts();
    }
    let found = null;
    if (query) {
      if ([...query].length > health.max_text_length) throw new Failure("long");
      const start = performance.now();
      const mode = $("hybrid").checked ? undefined : "embedding"; // left out: the best that the index has
      const content = await ask("search", { queries: [query], top_k: Number($("count").value), mode }, signal);
      const milliseconds = performance.now() - start;
      found = { query, hits: content.results[0], milliseconds, server: content.milliseconds };
      health.documents = content.documents;
      if (!mode && found.hits.length) offerModes(found.hits[0].score != null);
    }
    if (found?.query !== answer?.query) window.scrollTo(0, 0);
    [answer, failure, failures] = [found, null, 0];
  } catch (error) {
    if (signal.aborted && !(error instanceof Failure)) return; // a newer search goes on in its place
    failure = error instanceof Failure ? error : new Failure("failed", error.message);
    answer = null;
    failures += 1;
  } finally {
    clearTimeout(patience);
  }
  draw();
  if (failure?.seconds) countDown(failure.seconds);
}

function searchSoon() {
  clearTimeout(timer);
  timer = setTimeout(search, TYPING_PAUSE);
}

function countDown(seconds) {
  $("countdown").textContent = TEXTS[language].retry(seconds);
  timer = setTimeout(() => (seconds > 1 ? countDown(seconds - 1) : search()), 1000);
}

const readAddress = () => new URLSearchParams(location.hash.slice(1)).get("q") ?? "";

function followAddress() {
  box.value = readAddress();
  settled = Boolean(box.value);
  search();
}

function writeAddress(query) {
  if (query === readAddress().trim()) return;
  const address = location.pathname + location.search + (query && `#${new URLSearchParams({ q: query })}`);
  history[settled ? "pushState" : "replaceState"](null, "", address);
  settled = false;
}

function offerCounts() {
  const counts = COUNTS.filter((count) => count <= health.max_top_k);
  const options = (counts.length ? counts : [health.max_top_k]).map((count) => new Option(count));
  const chosen = recall("count") ?? "10";
  $("count").replaceChildren(...options);
  (options.find((option) => option.value === chosen) ?? options.at(-1)).selected = true;
  $("hybrid").checked = recall("hybrid") !== "false";
  offerModes(health.modes.includes("hybrid"));
}

// The index may have been replaced by one with BM25, or without.
function offerModes(hybrid) {
  if (!hybrid && document.activeElement === $("hybrid")) box.focus();
  $("modes").hidden = !hybrid;
}

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children); // strings become text, not markup
  return node;
}

function highlight(text, query) {
  const nodes = [];
  let position = 0;
  for (const [start, end] of matches(text, query)) {
    nodes.push(text.slice(position, start), element("mark", "", text.slice(start, end)));
    position = end;
  }
  return [...nodes, text.slice(position)];
}

// The passage that was found, or the beginning of a long document.
function partOf(text, passage) {
  if (passage != null) return `${text.startsWith(passage) ? "" : "…"}${passage}${text.endsWith(passage) ? "" : "…"}`;
  return text.length > SHOWN_LENGTH ? `${text.slice(0, SHOWN_LENGTH).replace(/[\ud800-\udbff]$/, "")}…` : text;
}

// What ranked the hits: the fused score in hybrid mode, the cosine otherwise. The bar is relative to the best hit.
function drawScore({ cosine, score }) {
  const texts = TEXTS[language];
  const fused = score != null;
  const value = fused ? score : cosine;
  const best = fused ? answer.hits[0].score : 1;
  const bar = element("span", "bar", element("span", "fill"));
  bar.firstChild.style.width = `${100 * Math.min(Math.max(value / best, 0), 1)}%`;
  const number = element("span", "score", value.toFixed(4));
  number.title = fused ? texts.fused(number.textContent, cosine.toFixed(4)) : texts.cosine(number.textContent);
  return element("div", "cosine", number, bar);
}

function drawHit(hit, index) {
  const { rank, id, document: text, words, passage } = hit;
  const texts = TEXTS[language];
  const { query } = answer;
  const body = element("p", "text");
  const item = element("li", "", element("span", "rank", String(rank)), body);
  item.tabIndex = index ? -1 : 0;
  const part = partOf(text, passage);
  if (part !== text) {
    const button = element("button", "more");
    const open = (opened) => {
      body.replaceChildren(...highlight(opened ? text : part, query));
      button.textContent = opened ? texts.less : texts.more;
      button.ariaExpanded = String(opened);
      button.onclick = () => open(!opened);
    };
    open(false);
    item.append(button);
  } else {
    body.append(...highlight(text, query));
  }
  item.append(drawScore(hit));
  const notes = [];
  if (id != null) notes.push(texts.id(id));
  if (words) notes.push(words.length ? texts.words(words.join(" · ")) : texts.noWords);
  if (notes.length) item.append(element("p", "notes", notes.join("    ")));
  return item;
}

function explain({ kind, message }) {
  const { tag, errors } = TEXTS[language];
  if (kind === "long" && health) return errors.longer(health.max_text_length.toLocaleString(tag));
  return message && kind !== "locked" && kind !== "refused" ? `${errors[kind]} (${message})` : errors[kind];
}

function draw() {
  const texts = TEXTS[language];
  const number = (value, digits = 0) => value.toLocaleString(texts.tag, { maximumFractionDigits: digits });
  const duration = (value) => number(value, value < 10 ? 1 : 0);
  document.documentElement.lang = texts.tag;
  document.title = answer ? `${answer.query} · ${texts.title}` : texts.title;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = texts[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = texts[node.dataset.label];
  box.placeholder = texts.placeholder;
  Object.assign($("language"), { textContent: texts.other, lang: texts.otherTag });

  const status = health ? [texts.documents(number(health.documents))] : [];
  if (answer) {
    status.push(texts.found(number(answer.hits.length)));
    status.push(texts.time(duration(answer.milliseconds), duration(answer.server)));
  }
  $("bar").hidden = !health;
  $("status").textContent = failure ? "" : status.join(" · ");

  $("error").hidden = !failure;
  $("message").textContent = failure ? explain(failure) : "";
  $("countdown").textContent = "";
  const locked = failure?.kind === "locked" || failure?.kind === "refused";
  $("authorization").hidden = !locked;
  if (locked) $("token").focus();

  $("empty").hidden = Boolean(answer || failure || !health);
  $("about").textContent = health ? texts.about(number(health.documents)) : "";
  $("nothing").hidden = !answer || answer.hits.length > 0;
  list.replaceChildren(...(answer?.hits ?? []).map(drawHit));
  list.ariaBusy = "false";
}

/** To the box (-1) or a result (from 0); the results are one stop of the Tab key. */
function move(to) {
  const items = [...list.children];
  const next = items[Math.min(to, items.length - 1)];
  if (next) for (const item of items) item.tabIndex = item === next ? 0 : -1;
  (next ?? box).focus();
}

function lookFor(query) {
  box.value = query;
  box.focus();
  search();
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.metaKey || event.altKey) return;
  const { activeElement } = document;
  const at = [...list.children].findIndex((item) => item.contains(activeElement));
  const movable = at >= 0 || activeElement === box;
  const actions = {
    Escape: () => lookFor(""),
    "/": !activeElement.matches("input, select") && (() => { box.focus(); box.select(); }),
    ArrowDown: movable && (() => move(at + 1)),
    ArrowUp: movable && (() => move(at - 1)),
    Home: at >= 0 && (() => move(0)),
    End: at >= 0 && (() => move(Infinity)),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
// While an input method composes, the box holds what is typed and not yet what is meant.
box.addEventListener("input", (event) => { if (!event.isComposing) searchSoon(); });
box.addEventListener("compositionstart", () => clearTimeout(timer));
box.addEventListener("compositionend", searchSoon);
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
  settled = true;
});
$("clear").addEventListener("click", () => lookFor(""));
$("count").addEventListener("change", () => {
  keep("count", $("count").value);
  search();
});
$("hybrid").addEventListener("change", () => {
  keep("hybrid", String($("hybrid").checked));
  search();
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  keep("language", language);
  draw();
});
$("authorization").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim().replace(/[^\x21-\x7e]/g, "?"); // a header holds no others
  keep("token", token, "sessionStorage");
  $("token").value = "";
  lookFor(box.value);
});
window.addEventListener("popstate", followAddress);

for (const example of EXAMPLES) {
  const button = element("button", "", example);
  button.addEventListener("click", () => lookFor(example));
  $("examples").append(element("li", "", button));
}
draw();
followAddress();
