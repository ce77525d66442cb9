"""Keep a training run: its folder, its logs, what it goes on from, and the model it ends in.

OUTPUT_DIR/
    settings.json, provenance.json    what it is and was made from (folder.py)
    metrics.jsonl      a line of figures a step
    responses.jsonl    some windows of each step and responses to them, to read
    skipped.jsonl      the prompts of updates that were not finite
    held_out.jsonl     a line of held-out figures every --eval_every steps (held_out.py)
    report.html        all of that as a page (pages/run.py)
    events.out.*       the figures for TensorBoard, with --tensorboard
    checkpoints/       what a run that died goes on from (checkpoint.py)
    model.safetensors, config.json, tokenizer.json, prompt.toml, README.md, ...    at the end
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from engine import checkpoint, folder
from engine.events import write_events
from engine.files import append_lines, write_whole
from engine.parallel import Interrupted, StopSignal, if_first, say, together
from engine.policy import Policy
from settings import RunSettings, UserError


def in_folder(
    settings: RunSettings, prompt_file: str | Path, train: Callable[[Path, dict], None]
) -> Path:
    """Train in the run's folder, claimed, unless nothing is left to do; the folder.

    train: is given the folder and what the run's files are (`folder.hash_inputs`)."""
    with folder.claimed(settings) as output_dir:
        inputs = if_first(lambda: folder.hash_inputs(settings, prompt_file))
        if_first(lambda: folder.changed_inputs(output_dir, inputs, settings))
        if together(lambda: folder.is_finished(output_dir, settings.steps)):
            say(f"nothing is left to do: {output_dir} holds the model of {settings.steps} steps")
        else:
            train(output_dir, inputs)
            say(f"saved to {output_dir}")
    return output_dir


class Run:
    """One run, held by all processes together: a new one, or one that was interrupted.

    A context for the loop over `steps()`: inside, a signal is heard only where all processes can
    save, and where it ends the loop a checkpoint is written. `first` is the step it begins at.
    """

    def __init__(
        self,
        settings: RunSettings,
        output_dir: Path,
        inputs: dict,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        stop: StopSignal,
    ):
        """output_dir: claimed (folder.py); inputs: its `hash_inputs`, on process 0."""
        self.settings, self.policy, self.optimizer, self.stop = settings, policy, optimizer, stop
        self.output_dir, self.checkpoints = output_dir, output_dir / "checkpoints"
        self.bound = folder.bound_settings(settings)
        facts = checkpoint.resume(self.checkpoints, policy, optimizer, self.bound)
        self.first, self.skipped = (facts["step"], facts["skipped"]) if facts else (0, 0)
        self.step = self.saved = self.first
        self.seconds: dict[str, float] = {}
        if_first(lambda: folder.begin(output_dir, settings, inputs, self.first))
        say(f"{dist.get_world_size()} process(es), writing to {self.output_dir}")
        if self.first:
            say(f"going on from step {self.first}, checkpointed there")

    def __enter__(self) -> "Run":
        # From here on the state is worth keeping.
        self.stop.at_once = False
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        self.stop.at_once = True
        if kind is Interrupted:
            self.bar.close()
            if self.step > self.saved:
                self.save(self.step)
            say(f"the same command with --output_dir {self.output_dir} goes on at step {self.step}")

    def steps(self) -> Iterator[int]:
        """The steps still to do; after each, what was logged is looked at and a checkpoint written
        where one is due. UserError where too many updates were skipped."""
        settings = self.settings
        self.bar = tqdm(
            range(self.first, settings.steps),
            desc="steps",
            initial=self.first,
            total=settings.steps,
            disable=dist.get_rank() > 0,
            dynamic_ncols=True,
        )
        for step in self.bar:
            self.step = step
            yield step
            if self.skipped > settings.max_skipped:
                raise UserError(
                    f"{self.skipped} updates were not finite and skipped (--max_skipped "
                    f"{settings.max_skipped}); their prompts are in "
                    f"{self.output_dir / 'skipped.jsonl'}"
                )
            done = self.step + 1
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                try:
                    self.save(done)
                except OSError as error:
                    # The weights are only here now: better to train on, and save them later.
                    say(f"\n{error}\ntraining goes on without", file=sys.stderr)

    def save(self, step: int) -> None:
        facts = {"step": step, "skipped": self.skipped, "settings": self.bound}
        keep = self.settings.keep_checkpoints
        checkpoint.save(self.checkpoints, self.policy, self.optimizer, facts, keep)
        self.saved = step

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds spent inside, which become one of the step's figures."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    def log(self, figures: dict, shown: str, responses: list[dict], skipped: list[dict]) -> None:
        """A line of figures, responses to read, and the prompts of skipped updates; `shown`: the
        figures to see beside the progress bar."""
        self.skipped += figures["skipped_updates"]
        if dist.get_rank() > 0:
            return
        self.bar.set_postfix({name: f"{figures[name]:.3g}" for name in shown.split()})
        figures = figures | self.seconds
        if "sample_seconds" in figures:
            # Of the responses that are kept; what --resample throws away takes its time, too.
            per_second = figures["tokens"] / max(figures["sample_seconds"], 0.01)
            figures["tokens_per_second"] = round(per_second, 1)
        if self.settings.tensorboard:
            write_events(self.output_dir, self.first, self.step, figures)
        for name, records in zip(folder.LOGS[:3], ([figures], responses, skipped)):
            records = [{"step": self.step} | record for record in records]
            try:
                if records:
                    append_lines(self.output_dir / name, records)
            except OSError as error:
                # Neither the training nor these lines shall be lost to a full disk.
                print(f"\n{error}\n{json.dumps(records)}", file=sys.stderr)

    def export(self, tokenizer: PreTrainedTokenizerBase, prompt: str, card: str) -> None:
        """Write the trained model beside the logs."""
        try:
            checkpoint.export(self.policy, tokenizer, prompt, self.output_dir, card)
        except OSError as error:
            raise UserError(
                f"the trained model could not be written: {error}\nonce it can be, the same "
                f"command with --output_dir {self.output_dir} goes on from the last checkpoint"
            ) from None

    def write_card(self, card: str) -> None:
        if_first(lambda: write_whole(self.output_dir / "README.md", card))

    def finish(self) -> None:
        """Write down that nothing is left to do."""
        if_first(lambda: folder.finish(self.output_dir, self.settings.steps))


def model_card(
    settings: RunSettings,
    method: str,
    does: str,
    answers: str,
    windows: int,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
) -> str:
    """The README.md of a trained model: what it is, how it was trained, what was measured.

    does: what it does with the passages it reads; answers: what of each window it was trained on;
    windows: how many there were.
    """
    base = settings.model
    rows = (f"| {name} | {value!r} |" for name, value in asdict(settings).items() if value != "")
    table = "\n".join(rows)
    # YAML takes a JSON string as it is, and only a name on the hub may stand as the base model.
    hub = f"base_model: {json.dumps(base)}\n" if not os.path.exists(base) else ""
    card = f"""---
library_name: transformers
{hub}tags: [reranking, information-retrieval, {method.lower()}]
---

# A reranker trained with {method}

A language model that reads a query and {settings.window_size} passages, {does}. Trained from
`{base}` for {settings.steps} steps of {settings.batch_size} windows with {answers}
each, from {windows} training windows. It wants the conversation it was trained with:
`prompt.toml` beside this file.

| setting | value |
|---|---|
{table}
"""
    if before and after:
        card += f"""
Measured on {settings.eval_candidates}, greedy: nDCG@10 {after["first_stage"]:.4f} of the first
stage, {before["ndcg@10"]:.4f} reranked by the model before training, {after["ndcg@10"]:.4f} after.
"""
    return card
