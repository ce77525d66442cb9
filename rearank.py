"""Rerank passages of your own.

python rearank.py "how do tides work" passages.txt          # one passage a line
python rearank.py "how do tides work" passages.txt --model OUT --prompt my_prompt.toml
"""

import textwrap
from pathlib import Path

from transformers import HfArgumentParser

from agent import Answer, load_agent, rank_batch
from settings import AgentSettings, parse_settings, program
from sources.formats import Candidates, Passage


@program
def main() -> None:
    parser = HfArgumentParser(AgentSettings, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("query")
    parser.add_argument("passages", type=Path, help="a text file, one passage a line")
    settings, inputs = parse_settings(parser)
    try:
        lines = [line for line in inputs.passages.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{inputs.passages}: cannot read passages: {error}")
    if not lines:
        parser.error(f"{inputs.passages}: no passage in it (expected one a line)")

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
