"""Encode texts by sentence-transformers, in an environment that has it: python THIS.py jobs.json.

A job names a folder, texts, and the file for their vectors. Beside them come the vectors of the texts as queries and
as documents, and their token ids. Prints nothing.
"""

import json
import sys

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
for job in jobs:
    model = SentenceTransformer(job["folder"], device="cpu")
    texts = job["texts"]
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    ids = tokenizer(texts, truncation=True)["input_ids"]  # to the length that the folder names
    np.savez(job["output"], plain=model.encode(texts), query=model.encode_query(texts),
             document=model.encode_document(texts), flat_ids=np.concatenate(ids), lengths=list(map(len, ids)),
             cosines=model.similarity(model.encode(texts[:2]), model.encode(texts[:3])))
