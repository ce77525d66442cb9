"""Write a first stage as files: candidates, and judgments where there are some.

    python first_stage.py dl19                                         # BM25, through pyserini
    python first_stage.py --index FOLDER --topics queries.tsv          # of an index of one's own
    python first_stage.py --run run.txt --topics queries.tsv --collection corpus.jsonl
    python first_stage.py --table mine.csv                             # query, passage, label
    python first_stage.py --beir FOLDER

Into --output_dir go candidates.jsonl, qrels.txt and manifest.json (what they were made from); of
several datasets, into a folder each.
"""

from pathlib import Path

from engine.flags import parse_settings, program
from engine.streams import make_unbreakable
from settings import FirstStageSettings, SourceSettings, UserError
from sources.load import load, refuse_files_of_many
from sources.naming import folder_name
from sources.registry import GROUPS, expand
from sources.write import sources_of, write_set


def write_first_stages(names: list[str], sources: SourceSettings, output_dir: str) -> None:
    """Load and write one dataset after the other; UserError at the end for those that failed."""
    refuse_files_of_many(names, sources)
    problems = []
    for name in names or [""]:
        named = [name] if name else []
        folder = Path(output_dir or f"runs/first-stage-{folder_name(named, sources)}")
        if output_dir and len(names) > 1:
            folder /= name
        try:
            judged = load(name, sources)
            made_from = sources_of(named, sources)
            paths = write_set(folder, judged.candidates, judged.qrels, made_from)
        except UserError as problem:
            problems.append(str(problem))
            continue
        both = sum(query.qid in judged.qrels for query in judged.candidates)
        counts = f"{len(judged.candidates)} queries, {both or 'none'} of them judged"
        print(f"{name + ': ' if name else ''}{counts}; written {', '.join(map(str, paths))}")
    if problems:
        raise UserError("\n\n".join(problems))


@program
def main() -> None:
    make_unbreakable()
    meaning = f"names of datasets (docs/data.md) or of groups: {', '.join(GROUPS)}"
    sources, settings, inputs = parse_settings(
        *(__doc__, SourceSettings, FirstStageSettings),
        others={"datasets": {"nargs": "*", "help": meaning}},
    )
    write_first_stages(expand(inputs.datasets), sources, settings.output_dir)


if __name__ == "__main__":
    main()
