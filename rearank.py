"""Rerank passages of your own.

python rearank.py "how do tides work" passages.txt          # one passage a line
python rearank.py "how do tides work" passages.txt --model OUT --prompt my_prompt.toml
"""

import textwrap
from pathlib import Path

from agent import Answer, load_agent, rank_batch
from flags import parse_settings, program
from settings import AgentSettings, UserError
from sources.formats import Candidates, Passage


@program
def main() -> None:
    passages = {"type": Path, "help": "a text file, one passage a line"}
    settings, inputs = parse_settings(
        __doc__, AgentSettings, positional={"query": {}, "passages": passages}
    )
    try:
        lines = [line for line in inputs.passages.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{inputs.passages}: cannot read passages: {error}") from None
    if not lines:
        raise UserError(f"{inputs.passages}: no passage in it (expected one a line)")

    def show(answer: Answer) -> None:
        print(f"\nWindow of passages {', '.join(answer.given)}:", end="")
        print(" NO ANSWER COULD BE READ, its order is kept" if answer.malformed else "")
        print(textwrap.fill(answer.reasoning or "(no reasoning)", 80))

    passages = tuple(Passage(str(i), line, 0.0) for i, line in enumerate(lines, start=1))
    query = Candidates("1", inputs.query, passages)
    (ranked,) = rank_batch(load_agent(settings), settings, [query], show)
    print("\nRanking:")
    for rank, passage in enumerate(ranked.passages, start=1):
        print(f"{rank:4}. [{passage.docid}] " + textwrap.shorten(passage.text, 70))


if __name__ == "__main__":
    main()
