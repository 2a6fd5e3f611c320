// All that the page says, in its two languages.

export const TEXTS = {
  zh: {
    tag: "zh-CN", other: "English", otherTag: "en", title: "语义检索", docs: "接口文档", label: "检索内容",
    placeholder: "输入一句话或几个词", clear: "清空", count: "结果数", results: "检索结果", more: "显示全文", less: "收起",
    token: "访问令牌", go: "继续", nothing: "没有找到结果。", example: "例如",
    keys: "↑ ↓ 浏览结果 · Esc 清空 · / 回到检索框",
    about: (n) => `按意思检索,不要求字面相同:从 ${n} 篇文档中找出与输入最相近的。`,
    documents: (n) => `${n} 篇文档`,
    found: (n) => `${n} 条结果`,
    time: (whole, server) => `${whole} 毫秒(服务器 ${server} 毫秒)`,
    cosine: (value) => `余弦相似度 ${value}`,
    fused: (value, cosine) => `融合得分 ${value}（余弦相似度 ${cosine}）`,
    hybrid: "混合检索", id: (id) => `编号 ${id}`, words: (words) => `字面相同:${words}`, noWords: "没有相同的词",
    retry: (n) => `${n} 秒后自动重试。`,
    errors: {
      gone: "服务器没有应答。", busy: "服务器繁忙或正在重启。", slow: "检索超时,已放弃。按回车键再试一次。",
      input: "服务器不接受这一检索内容。", failed: "服务器出错。", locked: "此服务器需要访问令牌。", refused: "访问令牌不正确。",
      long: "检索内容太长。", longer: (n) => `检索内容太长,最多 ${n} 个字符。`,
    },
  },
  en: {
    tag: "en", other: "中文", otherTag: "zh-CN", title: "Semantic search", docs: "API", label: "Search for",
    placeholder: "A sentence, or a few words", clear: "Clear", count: "Results", results: "Results", more: "Show all",
    less: "Show less", token: "Access token", go: "Continue", nothing: "Nothing was found.", example: "For example",
    keys: "↑ ↓ through the results · Esc clears · / to the box",
    about: (n) => `Search by meaning, not by wording: what is nearest to your text among ${n} documents.`,
    documents: (n) => `${n} ${n === "1" ? "document" : "documents"}`,
    found: (n) => `${n} ${n === "1" ? "result" : "results"}`,
    time: (whole, server) => `${whole} ms (server ${server} ms)`,
    cosine: (value) => `cosine similarity ${value}`,
    fused: (value, cosine) => `fused score ${value} (cosine similarity ${cosine})`,
    hybrid: "Hybrid (BM25)", id: (id) => `Id ${id}`, words: (words) => `Words found: ${words}`, noWords: "None of the words",
    retry: (n) => `Trying again in ${n} s.`,
    errors: {
      gone: "The server does not answer.", busy: "The server is busy or restarting.",
      slow: "The search took too long and was given up. Press Enter to try again.",
      input: "The server does not accept this text.", failed: "The server failed.",
      locked: "This server asks for a token.", refused: "The token was not accepted.",
      long: "The text is too long.", longer: (n) => `The text is too long: at most ${n} characters.`,
    },
  },
};
