"""The tasks a reranker can be trained for. A new one is a file of its own and an entry here."""

from functools import partial

import data
import reward
import setwise
import window
from window import Task

LISTWISE = Task(
    prompt=window.LISTWISE_PROMPT,
    parse=window.parse_ranking,
    rewards={
        variant: partial(reward.listwise_reward, variant=variant)
        for variant in ("relative", "absolute", "difference")
    },
    ranker=lambda n, s: window.slide(n, s.window_size, s.step_size),
    training_set=lambda candidates, qrels, s: data.training_set(
        candidates, qrels, s.size, s.draws, s.min_ndcg, s.ndcg_filter, s.seed
    ),
)
SETWISE = Task(
    prompt=setwise.SETWISE_PROMPT,
    parse=setwise.parse_choice,
    rewards={"exact": setwise.exact_reward, "graded": setwise.graded_reward},
    ranker=lambda n, s: setwise.SORTS[s.sort](n, s.sort_top, s.window_size - 1),
    training_set=lambda candidates, qrels, s: data.choice_training_set(
        candidates, qrels, s.size, s.draws, s.seed
    ),
)
TASKS = {"listwise": LISTWISE, "setwise": SETWISE}
