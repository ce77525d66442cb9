"""LoRA adapters through peft, an optional package that is imported only where one is asked for.

    python grpo.py --lora_rank 16 ...           # trains and saves an adapter
    python lora.py ADAPTER OUT                  # merges an adapter into its base model

An adapter is loaded by name or folder wherever a model is, `--model ADAPTER`, and merged into its
base as it is loaded: what then runs is a plain model, and costs what one costs.
"""

import sys

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file


def import_peft():
    try:
        import peft
    except ImportError:
        raise SystemExit("LoRA needs peft: pip install peft") from None
    return peft


def base_of(name: str) -> str | None:
    """The base model that an adapter names; None where `name` is no adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return import_peft().PeftConfig.from_pretrained(name).base_model_name_or_path


def load_merged(name: str, **how) -> PreTrainedModel:
    """An adapter's base model, loaded as `from_pretrained` is told how, with the adapter added to
    its weights. OSError where it has no safetensors: peft would read a pickle instead."""
    cached_file(name, "adapter_model.safetensors")
    adapted = import_peft().AutoPeftModelForCausalLM.from_pretrained(name, **how)
    return adapted.merge_and_unload()


def add_adapter(lm: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Freeze the model and add a fresh adapter, W + alpha / rank * B A, to each of its linear
    layers but the last (B = 0, so that nothing changes yet). The same on every process."""
    torch.manual_seed(seed)
    config = import_peft().LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    lm.add_adapter(config)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)


def main() -> None:
    from rearank import load_lm

    if len(sys.argv) != 3:
        raise SystemExit("usage: python lora.py ADAPTER OUT")
    adapter, out = sys.argv[1:]
    if base_of(adapter) is None:
        raise SystemExit(f"{adapter}: no adapter (it has no adapter_config.json)")
    lm, tokenizer = load_lm(adapter, torch.bfloat16)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
