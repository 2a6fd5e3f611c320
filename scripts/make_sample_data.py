"""Generate the quickstart's sample data: paper-like Chinese titles, abstracts with keywords, paraphrased queries.

    python scripts/make_sample_data.py sample_data/recall

The same seed makes the same files, with the names of literature_search_data:

- train_unsupervised.csv: a text a line, in random order: titles, sentences of the documents, and queries of papers that
  dev.csv does not have; nothing says which texts belong together.
- corpus.csv: a document a line, abstract and keywords.
- dev.csv: a paraphrased query and its document.
- test.csv: a title and a document; every second pair is a mismatch.
"""

import argparse
import itertools
import os
import random
import sys
from typing import NamedTuple

# All of one field: the texts resemble each other, and only all parts together tell them apart.
SUBJECTS = """2型糖尿病患者 冠心病介入治疗 慢性阻塞性肺疾病 急性脑梗死 老年高血压 儿童哮喘 乳腺癌术后 肝硬化腹水
    类风湿关节炎 慢性肾衰竭 胃溃疡 抑郁症""".split()
ASPECTS = "炎症因子 生活质量 临床疗效 危险因素 并发症 护理需求 预后 用药依从性 免疫功能 睡眠质量".split()
METHODS = "随机对照试验 多因素回归分析 中西医结合 延续护理 队列随访 荟萃分析".split()
PLACES = "长三角 西北地区 东北地区 粤港澳大湾区 青藏高原 成渝地区 华北平原 海南岛 京津冀 黄土高原".split()
TITLES = ["基于{m}的{p}{s}{a}研究", "{m}在{p}{s}{a}中的应用", "{p}{s}{a}影响因素的{m}",
          "{m}视角下{s}的{a}:来自{p}的证据", "{p}{s}{a}与{b}的{m}", "以{m}探讨{p}{s}的{a}"]
# A document is an abstract, most of it common phrases, and the keywords.
ABSTRACTS = [
    "目的探讨{p}{s}的{a}及其相关因素,为临床工作提供参考。方法采用{m},选取某院收治的{n}例对象进行观察。"
    "结果两组比较差异有统计学意义,且与{b}有关。",
    "为了解{p}{s}{a}的现状,对{n}例对象进行了{m}。数据经统计软件处理后作进一步比较。"
    "结果表明,{b}是其中的重要因素,应引起重视。",
    "近年来,{a}日益受到关注。本文以{p}的{n}例{s}为对象,运用{m}进行分析。"
    "研究发现,干预后各项指标均有所改善,{b}也随之变化。",
    "采用{m}对{p}{n}例{s}的资料进行回顾。重点比较了{a}和{b}两个方面,并讨论其原因。"
    "结论认为应当结合实际情况制定相应措施。",
]
# A query is a title in other words, as one types it into a search box.
QUERIES = ["{p} {s} {a} {m}", "用{m}考察{p}的{s}:{a}", "{p}{s}的{a}({m})", "{a}方面,{p}{s}采用{m}的文献",
           "{s}{a},{m},{p}"]
SYNONYMS = {"患者": "病人", "影响": "作用", "疗效": "治疗效果"}


class Paper(NamedTuple):
    title: str
    document: str
    query: str


def make_papers(rng: random.Random, count: int) -> list[Paper]:
    """Return papers that differ in at least one of subject, aspect, method and place."""
    combinations = rng.sample(list(itertools.product(SUBJECTS, ASPECTS, METHODS, PLACES)), count)
    papers = []
    for subject, aspect, method, place in combinations:
        other_aspect = rng.choice([other for other in ASPECTS if other != aspect])
        parts = {"s": subject, "a": aspect, "m": method, "p": place, "b": other_aspect}
        title = rng.choice(TITLES).format(**parts)
        query = rng.choice(QUERIES).format(**parts)
        for word, synonym in SYNONYMS.items():
            query = query.replace(word, synonym)
        abstract = rng.choice(ABSTRACTS).format(n=rng.randrange(60, 400), **parts)
        keywords = rng.sample([subject, aspect, method, place], 4)
        papers.append(Paper(title, abstract + ",".join(keywords), query))
    return papers


def make_training_texts(papers: list[Paper], other_papers: list[Paper], rng: random.Random) -> list[str]:
    """Return the titles and sentences of `papers` and the queries of `other_papers`, each once, in random order."""
    texts = {paper.title for paper in papers}
    for paper in papers:
        texts.update(paper.document.split("。"))
    texts.update(paper.query for paper in other_papers)
    shuffled = sorted(texts)
    rng.shuffle(shuffled)
    return shuffled


def make_test_pairs(papers: list[Paper], count: int) -> list[str]:
    """Return lines of title and document; in every second line the document is of the next paper."""
    lines = []
    for row in range(count):
        paper = papers[row + 1] if row % 2 else papers[row]
        lines.append(f"{papers[row].title}\t{paper.document}")
    return lines


def write_lines(path: str, lines: list[str]) -> None:
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None  # a full disk has no name otherwise
    print(f"{path}: {len(lines)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write to, made if it does not exist")
    parser.add_argument("--seed", type=int, default=1000, help="random seed (default: %(default)s)")
    parser.add_argument("--papers", type=int, choices=range(30, 7201), metavar="30..7200", default=1500,
                        help="documents of corpus.csv, a third of which dev.csv has (default: %(default)s)")
    args = parser.parse_args()
    papers = make_papers(random.Random(args.seed), args.papers)
    os.makedirs(args.folder, exist_ok=True)
    dev_count = args.papers // 3
    dev_papers = papers[:dev_count]
    training_texts = make_training_texts(papers, papers[dev_count:], random.Random(args.seed))
    write_lines(f"{args.folder}/train_unsupervised.csv", training_texts)
    write_lines(f"{args.folder}/corpus.csv", [paper.document for paper in papers])
    write_lines(f"{args.folder}/dev.csv", [f"{paper.query}\t{paper.document}" for paper in dev_papers])
    write_lines(f"{args.folder}/test.csv", make_test_pairs(papers, min(200, args.papers - 1)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        print(f"make_sample_data.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
