"""LoRA adapters through peft, an optional package that is imported only where one is asked for.

An adapter is loaded by name or folder wherever a model is. It stays beside its base's weights, as
it was trained: added to weights in bfloat16, most of a small update is rounded away.
"""

import re

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from engine.limits import limited
from settings import UserError


def import_peft():
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs peft: pip install peft") from None
    return peft


def base_of(name: str) -> str | None:
    """The base model that an adapter names; None where `name` is no adapter. UserError where its
    adapter_config.json is damaged."""
    if find_adapter_config_file(name) is None:
        return None
    config = import_peft().PeftConfig
    try:
        base = config.from_pretrained(name).base_model_name_or_path
    except Exception as error:  # of what lies in a damaged file, any
        raise UserError(f"{name}/adapter_config.json: damaged: {error!r:.200}") from None
    if not isinstance(base, str):
        raise UserError(f"{name}/adapter_config.json: damaged: it names no base model")
    return base


def add_saved(lm: PreTrainedModel, name: str) -> tuple[set[str], set[str]]:
    """Add a saved adapter to its base model, in the base's type: (the names of tensors that the
    file lacks, of those that no layer has). OSError without safetensors: no pickle is read."""
    check_patterns(import_peft().PeftConfig.from_pretrained(name), lm)
    cached_file(name, "adapter_model.safetensors")
    own_names = getattr(lm, "_weight_conversions", None)
    found = lm.load_adapter(name)
    lm._weight_conversions = own_names  # by which the model is saved, not the adapter
    for parameter_name, parameter in lm.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(lm.dtype)
    return found.missing_keys, found.unexpected_keys


def check_patterns(config, lm: PreTrainedModel) -> None:
    """UserError where an adapter's regular expressions take too long on the names that it is about
    to match them with, or are none; or where it would import a module that its file names."""
    if getattr(config, "megatron_config", None):
        raise UserError("its adapter_config.json has a megatron_config, which is not supported")
    given = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    patterns = [pattern for pattern in given if isinstance(pattern, str)]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += [rf"(.*\.)?({pattern})" for pattern in getattr(config, name, None) or {}]
    with limited("matching the regular expressions in its adapter_config.json"):
        for pattern in patterns:
            for name, _ in lm.named_modules():
                re.fullmatch(pattern, name)


def add_fresh(lm: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Freeze the model and add a fresh adapter, W + alpha / rank * B A, to each of its linear
    layers but the last (B = 0, so that nothing changes yet). The same on every process."""
    torch.manual_seed(seed)
    config = import_peft().LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    lm.add_adapter(config)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge(lm: PreTrainedModel) -> None:
    """Add a model's adapter to its weights, which should be float32, and leave a plain model."""
    layer_type = import_peft().tuners.tuners_utils.BaseTunerLayer
    for name, module in list(lm.named_modules()):
        if isinstance(module, layer_type):
            module.merge()
            lm.set_submodule(name, module.get_base_layer())
    lm._hf_peft_config_loaded = False
    del lm.peft_config
