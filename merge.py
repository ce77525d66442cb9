"""Merge a LoRA adapter into its base model, for programs that load plain models only.

    python merge.py ADAPTER OUT

OUT is a new folder. It gets the adapter's prompt and task, so that it is asked as the adapter was.
The sum is taken in float32 and written in the base's own type. In bfloat16 that rounds most of a
small update away; how much of it is left is printed. Here an adapter need not be merged to be used.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch

from engine import lora
from engine.checkpoint import write_model
from engine.files import locked, refuse_foreign
from engine.flags import program
from engine.hub import file_beside
from engine.model import load_config, load_lm
from settings import AgentSettings, UserError
from tasks import own_task


def what_it_was_trained_for(adapter: str) -> dict[str, str]:
    """The texts beside an adapter that tell how it is asked, by their names."""
    prompt, task = file_beside(adapter, "prompt.toml"), own_task(AgentSettings(model=adapter))
    texts = {"prompt.toml": prompt.read_bytes().decode()} if prompt else {}
    return texts | ({"settings.json": json.dumps({"task": task}) + "\n"} if task else {})


@program
@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", help="its folder, or its name on the hub")
    parser.add_argument("out", help="a new folder")
    inputs = parser.parse_args()
    adapter, out = inputs.adapter, inputs.out
    base = lora.base_of(adapter)
    if base is None:
        raise UserError(f"{adapter}: no adapter (it has no adapter_config.json)")
    refuse_foreign(out, [])  # such as the base
    dtype = load_config(adapter).dtype or torch.float32
    before, _ = load_lm(base, torch.float32)
    merged, tokenizer = load_lm(adapter, torch.float32, merged=True)
    wanted = kept = 0.0
    for old, new in zip(before.parameters(), merged.parameters()):
        wanted += float((new - old).square().sum())
        kept += float((new.to(dtype).float() - old).mul(new - old).sum())
    with locked(out):
        beside = what_it_was_trained_for(adapter)
        write_model(merged.to(dtype), tokenizer, Path(out), beside)
    share = kept / wanted if wanted else 1.0
    print(f"written to {out} in {dtype}, with {share:.1%} of what the adapter changes")


if __name__ == "__main__":
    main()
