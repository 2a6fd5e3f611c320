"""Results as lines: tab-separated, or a JSON object each; numbers as Python writes them, so that none is rounded."""

import json
import sys
from collections.abc import Iterable, Sequence


def _json(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def recall_lines(kind: str, query: str, documents: Sequence[str], scores: Sequence[float],
                 measure: str = "cosine") -> str:
    """What was recalled for a query, best first: "tsv" is a line a document, "jsonl" a line a query, in which a
    document's score has the name `measure`: "cosine", or "score" where rankings were fused."""
    if kind == "tsv":
        return "".join(f"{query}\t{document}\t{score}\n" for document, score in zip(documents, scores))
    return _json(query=query, results=[{"rank": rank, "document": document, measure: score}
                                       for rank, (document, score) in enumerate(zip(documents, scores), 1)])


def embedding_line(kind: str, text: str, embedding: Sequence[float]) -> str:
    """A text and its embedding: "tsv" has the numbers, separated by blanks, after the tab."""
    if kind == "tsv":
        return f"{text}\t{' '.join(map(str, embedding))}\n"
    return _json(text=text, embedding=embedding)


def pair_line(kind: str | None, query: str, title: str, cosine: float) -> str:
    """A pair and its cosine; None: the cosine alone."""
    if kind == "jsonl":
        return _json(query=query, title=title, cosine=cosine)
    return f"{query}\t{title}\t{cosine}\n" if kind else f"{cosine}\n"


def write(lines: Iterable[str]) -> None:
    """Print `lines` to stdout, where they are at once."""
    sys.stdout.writelines(lines)
    sys.stdout.flush()
