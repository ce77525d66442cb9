"""Write the page of training runs or evaluations, to look at in a browser.

    python report.py runs/mine                    # rewrites its report.html
    python report.py runs/a runs/b runs/c         # training runs over each other
    python report.py runs/dl19-a runs/dl19-b      # two evaluations side by side

Several go into one page, --output (default: report.html).
"""

from argparse import ArgumentParser
from pathlib import Path

from engine.files import damage_named, write_whole
from engine.flags import program
from pages.curves import RUNS
from pages.reader import read_evaluation, reader_page
from pages.run import read_run, run_page
from settings import UserError


def page_of(folders: list[Path]) -> str:
    """UserError where there is no page of these folders together."""
    evaluations = [(folder / "windows.jsonl").exists() for folder in folders]
    if any(evaluations) and not all(evaluations):
        raise UserError("give training runs or evaluations, not both")
    most, what = (2, "evaluations") if any(evaluations) else (RUNS, "training runs")
    if len(folders) > most:
        raise UserError(f"one page holds at most {most} {what}, not {len(folders)}")
    with damage_named(*folders):
        if any(evaluations):
            return reader_page([read_evaluation(folder) for folder in folders])
        return run_page([read_run(folder) for folder in folders])


@program
def main() -> None:
    parser = ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of grpo.py or of evaluate.py")
    parser.add_argument(
        "--output", type=Path, help="the page; default: in the folder, if it is one"
    )
    inputs = parser.parse_args()
    alone = inputs.runs[0] if len(inputs.runs) == 1 else Path()
    output = inputs.output or alone / "report.html"
    write_whole(output, page_of(inputs.runs))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
