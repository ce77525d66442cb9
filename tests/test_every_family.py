"""Every kind of causal language model that transformers knows, small and random: what the probe
lets pass on a few tokens must be right on rows longer than any window, too.

Slow: python -m pytest tests/test_every_family.py -m slow -n0 -s
"""

from collections import defaultdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine import probe
from engine.policy import Policy
from settings import UserError

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "n_layer": 4, "n_head": 4,
    "n_embd": 32, "max_position_embeddings": 2048, "n_positions": 2048, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 3, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 24, "num_shared_experts": 1,
    "n_shared_experts": 1, "mlp_only_layers": [], "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "sliding_window": 64, "attention_chunk_size": 64, "index_topk": 64,
}  # fmt: skip
LARGEST = 3e7  # parameters


def build(kind: str) -> PreTrainedModel:
    usual = AutoConfig.for_model(kind)
    sizes = {name: size for name, size in SMALL.items() if hasattr(usual, name)}
    if kinds := list(dict.fromkeys(getattr(usual, "layer_types", None) or ())):
        sizes["layer_types"] = (kinds * 4)[:4]
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        asked = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if sum(parameter.numel() for parameter in asked.parameters()) > LARGEST:
        raise ValueError("not small")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm


@pytest.mark.slow
def test_every_norm_that_is_fused_is_a_plain_rms_norm():
    seen, fused = set(), 0
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            lm = build(kind)
        except Exception:  # as below
            continue
        policy = Policy(lm)
        for norm in policy.lm.modules():
            fused_one = "forward" in vars(norm) and hasattr(norm, "variance_epsilon")
            if not fused_one or type(norm) in seen:
                continue
            seen.add(type(norm))
            norm.weight.data.normal_()
            x = torch.randn(5, len(norm.weight)) * 1e-3
            fused_out = norm(x)
            del norm.forward
            torch.testing.assert_close(fused_out, norm(x), rtol=1e-6, atol=1e-7)
            fused += 1
    print(f"{fused} kinds of norm")
    assert fused > 30


@pytest.mark.slow
def test_what_passes_the_probe_is_right_on_long_rows(monkeypatch):
    came_to = defaultdict(list)
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            lm = build(kind)
        except Exception:  # what its configuration makes of our sizes
            came_to["not built small"].append(kind)
            continue
        with monkeypatch.context() as long:
            try:
                probe.check_family(lm.config)
                policy = Policy(lm)
                probe.probe(policy, kind)
            except UserError:
                came_to["refused"].append(kind)
                continue
            long.setattr(probe, "PROMPTS", (300, 120))
            long.setattr(probe, "RESPONSES", ((40, 9), (25,)))
            with torch.no_grad():
                packed, sampled, itself = probe.differences(policy)
        right = max(packed, sampled) <= 1e-5 + 5 * itself
        came_to["right" if right else "wrong"].append(kind)
    for what, kinds in came_to.items():
        print(f"\n{what}, {len(kinds)}: {', '.join(kinds)}")
    assert not came_to["wrong"]
    assert {"qwen2", "llama", "gemma3_text"} <= set(came_to["right"])
