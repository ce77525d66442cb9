"""The tasks a reranker can be trained for. A new one is a file of its own and a line here."""

from functools import partial

import setwise
from data import training_set
from reward import listwise_reward
from window import LISTWISE_PROMPT, Task, parse_ranking, slide

LISTWISE = Task(
    prompt=LISTWISE_PROMPT,
    parse=parse_ranking,
    rewards={
        variant: partial(listwise_reward, variant=variant)
        for variant in ("relative", "absolute", "difference")
    },
    ranker=lambda n, s: slide(n, s.window_size, s.step_size),
    training_set=lambda candidates, qrels, s: training_set(
        candidates, qrels, s.size, s.draws, s.min_ndcg, s.ndcg_filter, s.seed
    ),
)

TASKS = {
    "listwise": LISTWISE,
    "setwise": setwise.TASK,
}
