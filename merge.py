"""Merge a LoRA adapter into its base model, for programs that load plain models only.

    python merge.py ADAPTER OUT

The sum is taken in float32 and written in the base's own type. In bfloat16 that rounds most of a
small update away; how much of it is left is printed. Here an adapter need not be merged to be used.
"""

import sys

import torch

from engine import lora
from engine.flags import program
from engine.model import load_config, load_lm
from settings import UserError


@program
def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python merge.py ADAPTER OUT")
    adapter, out = sys.argv[1:]
    base = lora.base_of(adapter)
    if base is None:
        raise UserError(f"{adapter}: no adapter (it has no adapter_config.json)")
    dtype = load_config(adapter).dtype or torch.float32
    before, _ = load_lm(base, torch.float32)
    merged, tokenizer = load_lm(adapter, torch.float32, merged=True)
    wanted = kept = 0.0
    for old, new in zip(before.parameters(), merged.parameters()):
        wanted += float((new - old).square().sum())
        kept += float((new.to(dtype).float() - old).mul(new - old).sum())
    merged.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    share = kept / wanted if wanted else 1.0
    print(f"written to {out} in {dtype}, with {share:.1%} of what the adapter changes")


if __name__ == "__main__":
    main()
