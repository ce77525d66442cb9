"""What the papers report, to set a run beside: nDCG@10 in points, with the digits printed there."""

from sources.registry import BEIR, BRIGHT

AVERAGED = {"dl": ["dl19", "dl20"], "beir": BEIR[:7], "bright": BRIGHT}  # in them, by suite
SOURCES = {
    "1": "REARANK's paper (arXiv 2505.20046)",
    "2": "Rank-R1 (arXiv 2503.06034) as a benchmark page lists it, size of the model not said",
    "3": "checkpoints in the development repository of REARANK's authors (lezhang7/DeepRerank)",
}

# By columns: lines of SYSTEM [SOURCE]: figures. An average stands under the name of its suite.
TABLES = {
    "dl19 dl20 covid nfcorpus dbpedia scifact signal news robust04 beir bright": """
        BM25 [1]:                 50.58 47.96 59.47 30.75 31.80 67.89 33.05 39.52 40.70 43.31 13.7
        Qwen2.5-7B zero-shot [1]: 68.25 62.73 77.74 37.40 39.83 70.83 31.73 43.24 49.95 50.10 15.0
        GPT-4 zero-shot [1]:      75.59 70.56 85.51 38.47 47.12 74.95 34.40 52.89 57.55 55.84 16.8
        RankZephyr-7B [1]:        73.90 70.60 83.54 38.38 44.34 75.18 31.44 52.35 54.19 54.20 13.0
        Rank-R1-7B [1]:           72.70 68.50 83.12 35.97 43.43 74.47 32.16 48.43 55.17 53.25 16.4
        REARANK-7B [1]:           74.16 70.00 81.28 35.20 45.23 75.02 36.00 51.88 57.49 54.59 17.7
    """,
    " ".join(BRIGHT): """
        BM25 [1]:       18.2 27.9 16.4 13.4 10.9 16.3 16.1 4.3 24.7 6.5 2.1 7.3
        REARANK-7B [1]: 23.4 27.4 18.5 24.2 17.4 16.3 25.1 8.0 27.0 7.4 9.5 7.9
    """,
    "dl beir bright": """
        only prompted to reason [1]:  65.9 51.4 15.4
        SFT on the best orders [1]:   66.7 50.7 14.7
        GRPO, no data filter [1]:     71.3 53.6 16.9
        GRPO, absolute reward [1]:    70.9 53.2 16.7
        GRPO, difference reward [1]:  71.5 54.0 17.2
        REARANK-7B [1]:               72.0 54.6 17.7
    """,
    "dl19 dl20 covid bright": """
        Rank-R1 [2]: 72.7 69.1 84.63 24.2
    """,
    "dl19 dl20": """
        REARANK, step 200 of a run [3]: 72.9 69.4
    """,
    "dl19 dl20 covid nfcorpus touche dbpedia scifact signal news robust04": """
        REARANK, step 140 of another [3]: 74.1 69.0 83.4 35.3 32.4 45.1 75.3 33.5 52.3 57.1
    """,
}
TWO_TRAININGS = (
    "The intervals are about the queries: what another training with another seed would give, they "
    "do not tell. Two checkpoints of REARANK's authors have 72.9 and 74.1 on dl19, and 69.4 and "
    "69.0 on dl20."
)


def reported() -> dict[str, dict[str, str]]:
    """The figures by "SYSTEM [SOURCE]", then by dataset or suite. What is given with more digits
    stands first, and stays."""
    systems: dict[str, dict[str, str]] = {}
    for columns, table in TABLES.items():
        for line in table.strip().splitlines():
            name, figures = line.strip().split(": ", 1)
            values = dict(zip(columns.split(), figures.split(), strict=True))
            systems[name] = values | systems.get(name, {})
    return systems
