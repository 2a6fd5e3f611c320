"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50

Encodes the corpus, builds an hnswlib index, and writes `query \\t document \\t cosine`, `recall_num` lines a query,
best first, to <recall_result_dir>/<recall_result_file>.
"""

import argparse
import os

import data


def parse_args() -> argparse.Namespace:
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--corpus_file", type=data.readable_file, required=True, help="documents to search, one a line")
    group.add_argument("--similar_text_pair", "--similar_text_pair_file", type=data.readable_file, required=True,
                       help="query and target, tab-separated, a pair a line; only the queries are used")
    group.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if need be")
    group.add_argument("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    group = parser.add_argument_group("model")
    data.add_model_arguments(group)
    data.add_encode_arguments(group)
    data.add_device_argument(group)
    group = parser.add_argument_group("index")
    group.add_argument("--recall_num", type=data.positive_int, default=10, help="documents recalled for each query")
    group.add_argument("--hnsw_m", type=data.hnsw_links, default=100, help="links a node of the hnsw graph")
    group.add_argument("--hnsw_ef", type=data.positive_int, default=100,
                       help="candidates kept while building and searching the hnsw graph")
    group.add_argument("--hnsw_max_elements", type=data.positive_int, default=None,
                       help="documents the index can hold; None: as many as the corpus has")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    corpus = data.read_texts(args.corpus_file, "--corpus_file", args.strict_data)
    queries = [query for query, _ in data.read_text_pairs(args.similar_text_pair, "--similar_text_pair",
                                                          args.strict_data)]
    capacity = args.hnsw_max_elements or len(corpus)
    if capacity < len(corpus):
        raise data.InputError(f"--hnsw_max_elements {capacity}: the corpus has {len(corpus)} documents")
    result_path = os.path.join(args.recall_result_dir, args.recall_result_file)
    os.makedirs(os.path.dirname(result_path) or ".", exist_ok=True)

    from ann_util import HnswIndex
    from model import encode, is_first_rank, load_model, set_device

    if not is_first_rank():
        data.log("recall.py encodes on one process; this one has nothing to do")
        return
    set_device(args.device)
    model, tokenizer, _ = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    data.log(f"encoding {len(corpus)} documents and {len(queries)} queries")

    def embed(texts: list[str]):
        return encode(model, tokenizer, texts, args.max_seq_length, args.batch_size)

    index = HnswIndex(model.embedding_size, capacity, args.hnsw_m, args.hnsw_ef)
    index.add(embed(corpus))
    asked = data.distinct(queries)  # a query on several lines is encoded and searched once
    rows, cosines = index.search(embed(asked), args.recall_num)
    if args.recall_num > len(corpus):
        data.log(f"--recall_num {args.recall_num}: the corpus has only {len(corpus)} documents")

    found = {query: (row.tolist(), cosine.tolist()) for query, row, cosine in zip(asked, rows, cosines)}
    with data.new_file(result_path) as file:
        for query in queries:
            file.writelines(f"{query}\t{corpus[row]}\t{cosine}\n" for row, cosine in zip(*found[query]))
    data.log(f"wrote {len(queries)} queries x {rows.shape[1]} documents to {result_path}")


if __name__ == "__main__":
    data.run(main)
