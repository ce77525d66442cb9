"""The texts of a collection by docid, from files: BEIR's corpus.jsonl, TSV, pyserini's JSON.

    {"_id": "7", "title": "Tides", "text": "..."}     BEIR
    {"id": "7", "contents": "..."}                    pyserini
    {"pid": "7", "passage": "..."}                    MS MARCO v2
    7<TAB>...                                         MS MARCO v1, and files of one's own

A collection is one such file or a folder of them, packed (.gz) or not.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from settings import UserError
from sources.formats import document_text
from sources.text import check_docid, docid_field, json_records, read_lines

ID_FIELDS = ("_id", "id", "pid", "docid")  # MS MARCO v2 has a docid of the page, too
SUFFIXES = (".jsonl", ".json", ".tsv", ".txt")


def read_documents(path: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where it stands, docid, the document as a record with the fields of `document_text`)."""
    for file in collection_files(Path(path)):
        _, first = next(read_lines(file))
        if first.lstrip().startswith(("{", "[")):
            for where, record in json_records(file):
                keys = record if isinstance(record, dict) else {}
                yield where, docid_field(where, record, id_field_of(keys)), record
        else:
            for where, line in read_lines(file):
                docid, tab, text = line.partition("\t")
                if not tab:
                    raise UserError(f"{where}: expected 'docid<TAB>text', found {line!r:.60}")
                yield where, check_docid(where, "docid", docid.strip()), {"text": text.strip()}


def id_field_of(record: Collection[str]) -> str:
    return next((name for name in ID_FIELDS if name in record), ID_FIELDS[0])


def collection_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [f for f in sorted(path.iterdir()) if f.name.removesuffix(".gz").endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{path}: no collection in this folder (expected {', '.join(SUFFIXES)})")
    return files


def collection_texts(path: str | Path, docids: Collection[str]) -> dict[str, str]:
    """The text of each docid, as the reranker reads it. UserError where some are not there, or are
    met a second time with another text."""
    wanted, texts = set(docids), {}
    with tqdm(desc=f"texts of {Path(path).name}", unit=" documents", ncols=80, leave=False) as bar:
        for where, docid, record in read_documents(path):
            bar.update()
            if docid in wanted:
                text = document_text(where, record)
                if texts.setdefault(docid, text) != text:
                    raise UserError(f"{where}: docid {docid} had another text before")
                if len(texts) == len(wanted):
                    break
    return all_there(texts, docids, path)


def all_there(texts: dict[str, str], docids: Collection[str], source: str | Path) -> dict[str, str]:
    """`texts`, if it has every docid."""
    if missing := [docid for docid in docids if docid not in texts]:
        raise UserError(
            f"{source}: {len(missing)} of {len(docids)} passages are not in it (the first: docid "
            f"{missing[0]})"
        )
    return texts
