"""A report as headings, paragraphs and tables, written for a terminal, as Markdown or a page."""

import textwrap
from dataclasses import dataclass

WIDTH = 80


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text. The first column names the row, the others are figures."""

    head: list[str]
    rows: list[list[str]]


Block = Heading | Paragraph | Table


def as_text(blocks: list[Block]) -> str:
    """At most WIDTH columns; a table that is wider is continued below."""
    return "\n\n".join(text_of(block) for block in blocks) + "\n"


def text_of(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{block.text}\n{'-' * min(len(block.text), WIDTH)}"
    if isinstance(block, Paragraph):
        return textwrap.fill(block.text, WIDTH)
    return "\n\n".join(part_of_table(block, part) for part in parts_that_fit(block))


def widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.head, *table.rows)]


def parts_that_fit(table: Table) -> list[list[int]]:
    """The columns that stand together, the first with each."""
    width = widths(table)
    parts, room = [[0]], WIDTH - width[0]
    for column in range(1, len(width)):
        if room < width[column] + 2 and len(parts[-1]) > 1:
            parts.append([0])
            room = WIDTH - width[0]
        parts[-1].append(column)
        room -= width[column] + 2
    return parts


def part_of_table(table: Table, columns: list[int]) -> str:
    width = widths(table)
    lines = []
    for row in (table.head, *table.rows):
        name, *figures = (row[i] for i in columns)
        cells = (f"  {figure:>{width[i]}}" for i, figure in zip(columns[1:], figures))
        lines.append((f"{name:<{width[0]}}" + "".join(cells)).rstrip())
    return "\n".join(lines)


def as_markdown(blocks: list[Block]) -> str:
    return "\n\n".join(map(markdown_of, blocks)) + "\n"


def markdown_of(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {escaped(block.text)}"
    if isinstance(block, Paragraph):
        return escaped(block.text)
    rows = [block.head, ["---", *("---:" for _ in block.head[1:])], *block.rows]
    return "\n".join(f"| {' | '.join(map(escaped, row))} |" for row in rows)


def escaped(text: str) -> str:
    """Text in which Markdown finds no markup: names may hold any character."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return text
