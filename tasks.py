"""The tasks a reranker can be trained for. A new one is a file of its own and a line here."""

from reward import listwise_reward
from window import LISTWISE_PROMPT, Task, parse_ranking, slide

TASKS = {
    "listwise": Task(
        prompt=LISTWISE_PROMPT,
        parse=parse_ranking,
        reward=listwise_reward,
        ranker=lambda n, settings: slide(n, settings.window_size, settings.step_size),
    ),
}
