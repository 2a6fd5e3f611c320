// Which characters of a document stand in the query.

// What is highlighted: a Chinese or Japanese character or a symbol by itself, of other scripts a word.
const ALONE = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{S}";
const UNITS = new RegExp(`[${ALONE}]|[^${ALONE}\\p{P}\\p{Z}\\p{C}]+`, "gu");

/** The ranges [start, end) of a text that are the query's characters, its words, or words that those begin. */
export function matches(text, query) {
  const wanted = new Set(query.toLowerCase().match(UNITS));
  const beginnings = [...wanted].filter((unit) => /^[^\d]{2,}$/.test(unit)).sort((a, b) => b.length - a.length);
  const ranges = [];
  for (const { 0: unit, index } of text.matchAll(UNITS)) {
    const lower = unit.toLowerCase();
    const part = wanted.has(lower) ? lower : beginnings.find((beginning) => lower.startsWith(beginning));
    if (!part) continue;
    const last = ranges.at(-1);
    if (last?.[1] === index) last[1] += part.length;
    else ranges.push([index, index + part.length]);
  }
  return ranges;
}
