"""Checkpoints, which a run goes on from, and the export of the trained model.

    checkpoints/step-000040/
        shard-00001-....safetensors   what process 1 holds: weights in float32, AdamW's moments
        checkpoint.json               the step, the run's settings, each shard's SHA-256, its own

The batch of a step, and every random number of its sampling, follow from the seed and the step
alone, and the learning rate is constant: so weights, moments and the step are the whole state.
A checkpoint is written by torch.distributed.checkpoint, in its safetensors form (the default form
holds a pickle, which could run code when it is read), under a temporary name that is taken away
when all of it is on disk. Any number of processes can read it, whatever number wrote it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.files import read_json
from engine.parallel import all_gather, non_finite, reshard, together
from engine.policy import Policy
from settings import UserError

FACTS = "checkpoint.json"


# --------------------------------------------------------------------------------- the checkpoint


def training_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and the optimizer's state of each, by name; the tensors themselves."""
    state = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            state[f"policy.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                state[f"adamw.{key}.{name}"] = value
    return state


def make_moments(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that its first step would make, to be read into."""
    for parameter in policy.parameters():
        if parameter.requires_grad and not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    keep: int,
) -> None:
    """Write folder/step-N for facts["step"] = N, by all processes together; then only the newest
    `keep` stay. facts: what else must be known to go on, as JSON.

    OSError on all processes where any cannot write; what was there before is then untouched.
    """
    whole = folder / folder_name(facts["step"])
    building = whole.with_suffix(".tmp")

    def begin() -> None:
        if dist.get_rank() == 0:
            for left_over in folder.glob("*.tmp"):
                shutil.rmtree(left_over)
            building.mkdir(parents=True)

    def finish() -> None:
        if dist.get_rank() == 0:
            record = facts | {"adamw": any(k.startswith("adamw") for k in state), "sha256": sums}
            record["own_sha256"] = hash_record(record)
            (building / FACTS).write_text(json.dumps(record, indent=2))
            shutil.rmtree(whole, ignore_errors=True)  # one that was damaged, and is made anew
            building.rename(whole)
            for old in whole_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)

    reshard(policy)  # a pass without a gradient may have left some weights gathered
    if bad := [name for part in all_gather(non_finite(policy)) for name in part]:
        raise UserError(f"{whole} is not written: {bad[0]} holds values that are not finite")
    state = training_state(policy, optimizer)
    try:
        together(begin)
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(building, save_distributed=True))
        mine = building.glob(f"shard-{dist.get_rank() + 1:05}-*")
        sums = {k: v for part in all_gather(together(lambda: checksums(mine))) for k, v in part}
        together(finish)
    except (OSError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise OSError(f"{whole} could not be written: {first_cause(error)}") from error


def resume(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole and of this run into the policy and the optimizer;
    its facts, or None where there is none. Each that is not is named, and renamed."""
    for path in reversed(all_gather(whole_checkpoints(folder))[0]):
        try:
            facts = together(lambda path=path: check(path, settings))
            if facts["adamw"]:
                make_moments(policy, optimizer)
            state = training_state(policy, optimizer)
            check_tensors(path, state)
            dcp.load(state, storage_reader=HuggingFaceStorageReader(path))
        except (OSError, ValueError) as error:
            if dist.get_rank() == 0:
                bad = path.with_suffix(".unusable")
                shutil.rmtree(bad, ignore_errors=True)
                path.rename(bad)
                print(f"{path}: not used, now {bad.name}: {error}", flush=True)
            dist.barrier()
        else:
            return facts
    return None


def first_difference(settings: dict[str, Any], others: dict[str, Any]) -> str | None:
    return next((k for k, value in settings.items() if others.get(k) != value), None)


def folder_name(step: int) -> str:
    return f"step-{step:06}"


def whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    named = {path: re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*")}
    return sorted((path for path in named if named[path]), key=lambda path: int(named[path][1]))


def check(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The facts of a checkpoint. UserError where it is damaged or another run's; each process
    looks at its share of the files."""
    try:
        facts = read_json(path / FACTS)
        own = facts.pop("own_sha256")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no checkpoint ({FACTS}: {error!r})") from None
    if own != hash_record(facts):
        raise UserError(f"damaged: {FACTS} is not what was written")
    if path.name != folder_name(facts["step"]):
        raise UserError(f"its name is not that of its step, {facts['step']}")
    others, expected = facts["settings"], facts["sha256"]
    if name := first_difference(settings, others):
        raise UserError(f"of another run ({name} is {others.get(name)!r} there)")
    # All that lie there would be read, whatever they are.
    if odd := expected.keys() ^ {file.name for file in path.glob("*.safetensors")}:
        what = "is missing" if min(odd) in expected else "does not belong to it"
        raise UserError(f"damaged: {min(odd)} {what}")
    for name in sorted(expected)[dist.get_rank() :: dist.get_world_size()]:
        if checksums([path / name]) != [(name, expected[name])]:
            raise UserError(f"damaged: {name} is not what was written")
    return facts


def check_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """UserError where the checkpoint holds other tensors than this model and optimizer have."""
    stored = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
    for name in state.keys() ^ stored.keys():
        raise UserError(f"of another model ({name} is only {'here' if name in state else 'there'})")
    for name, tensor in state.items():
        if stored[name].size != tensor.shape:
            raise UserError(f"of another model ({name} is {list(stored[name].size)} there)")


def checksums(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """(name, SHA-256) of each file."""
    sums = []
    for path in paths:
        with open(path, "rb") as file:
            sums.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return sums


def hash_record(record: dict[str, Any]) -> str:
    """The SHA-256 of what a checkpoint's facts say, however they are laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def first_cause(error: BaseException) -> str:
    """What went wrong on the first process where it did; dcp wraps it with its traceback."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return str(error)


# --------------------------------------------------------------------------------- the export


def export(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    output_dir: Path,
    card: str,
) -> None:
    """Write the trained model (or adapter) in Hugging Face form, with its tokenizer, chat template,
    prompt and model card, in the precision it computes with. By all processes together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)  # whole, on process 0
    once = dict(policy.named_parameters()) | dict(policy.named_buffers())  # tied ones, too

    def write() -> None:
        if dist.get_rank() > 0:
            return
        named = {
            k.removeprefix("lm."): w.to(policy.computing) for k, w in weights.items() if k in once
        }
        beside = {"prompt.toml": prompt, "README.md": card}
        write_model(policy.lm, tokenizer, output_dir, beside, state_dict=named)

    together(write)


def write_model(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    beside: dict[str, str],
    **how: Any,
) -> None:
    """Write a model in Hugging Face form, its tokenizer, and texts `beside` it by their names: in a
    folder of another name, until all of them are on disk. how: for `save_pretrained`."""
    building = output_dir / "export.tmp"
    shutil.rmtree(building, ignore_errors=True)
    try:
        lm.save_pretrained(building, **how)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(str(error)) from None
    tokenizer.save_pretrained(building)
    for name, text in beside.items():
        (building / name).write_bytes(text.encode())
    for path in building.iterdir():
        os.replace(path, output_dir / path.name)
    building.rmdir()
