"""BM25, the first stage."""

import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from settings import UserError
from sources.formats import Candidates, Passage
from sources.lucene import open_index, stored_text

K1, B = 0.9, 0.4  # pyserini's, and the papers'
AT_ONCE = 64  # queries that Java is asked about before their passages are read


def search_bm25(
    index: str | Path,
    topics: dict[str, str],
    k: int = 100,
    k1: float = K1,
    b: float = B,
    left_out: dict[str, set[str]] | None = None,
) -> list[Candidates]:
    """The first stage: each query's BM25 top `k`, in the order of `topics`.

    index: the directory of a Lucene index, or the name of one of pyserini's prebuilt indexes.
    left_out: by qid, docids that are no candidates of it; others move up in their places.
    A query that matches nothing has no passages. UserError for an index that is neither, cannot
    be opened, or stores no texts; NotDownloaded where that fails. Uses every core.
    """
    left_out = left_out or {}
    searcher = open_index(index)
    searcher.set_bm25(k1, b)
    deeper = k + max((len(docids) for docids in left_out.values()), default=0)
    found, qids = [], list(topics)
    with tqdm(desc="BM25", total=len(qids), unit=" queries", ncols=80, leave=False) as bar:
        for start in range(0, len(qids), AT_ONCE):
            some = qids[start : start + AT_ONCE]
            queries = [topics[qid] for qid in some]
            hits = searcher.batch_search(queries, some, k=deeper, threads=os.cpu_count() or 1)
            for qid in some:
                kept = (h for h in hits[qid] if h.docid.strip() not in left_out.get(qid, ()))
                passages = tuple(read_hit(index, hit) for hit, _ in zip(kept, range(k)))
                refuse_twice(index, [passage.docid for passage in passages])
                found.append(Candidates(qid, topics[qid], passages))
            bar.update(len(some))
    return found


def refuse_twice(index: str | Path, docids: list[str]) -> None:
    """UserError where several documents have one docid: neither is the one that was judged."""
    for docid, times in Counter(docids).items():
        if times > 1:
            raise UserError(f"{index}: docid {docid} is that of {times} documents; index each once")


def read_hit(index: str | Path, hit) -> Passage:
    docid = hit.docid.strip()  # a file of columns keeps no whitespace at an id's ends
    return Passage(docid, stored_text(index, docid, hit.lucene_document.get("raw")), hit.score)
