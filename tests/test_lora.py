"""LoRA: an adapter trains, saves, loads merged, and merges to a plain model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import run_grpo
from test_shared_prompt import naive_logprobs, tiny_lm
from transformers import AutoModelForCausalLM

import grpo
import lora
from rearank import AgentSettings, load_agent, load_lm, rerank
from shared_prompt import Group, Policy, pack_row, response_logprobs

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def adapter(small, tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    settings = grpo.Settings(
        model=str(tiny), candidates=str(small[0]), qrels=str(small[1]), size=4, draws=2, steps=2,
        batch_size=2, group_size=6, max_new_tokens=50, lora_rank=4, lora_alpha=8,
        learning_rate=1e-2, output_dir=str(out),
    )  # fmt: skip
    grpo.train(settings)
    return out


def test_only_the_adapter_is_saved_and_it_moved(adapter):
    assert not (adapter / "model.safetensors").exists()
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in weights)
    assert any(w.abs().max() > 1e-3 for name, w in weights.items() if "lora_B" in name)


def test_two_processes_train_the_same_adapter(adapter, small, tiny, tmp_path):
    done = run_grpo(
        "--model", tiny, "--candidates", small[0], "--qrels", small[1], "--size", 4, "--draws", 2,
        "--steps", 2, "--batch_size", 2, "--group_size", 6, "--max_new_tokens", 50, "--lora_rank",
        4, "--lora_alpha", 8, "--learning_rate", 1e-2, "--output_dir", tmp_path, processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (load_file(out / "adapter_model.safetensors") for out in (adapter, tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-4)  # 2 steps of 1e-2


def test_a_loaded_adapter_is_its_base_plus_the_product(adapter, tiny):
    lm, _ = load_lm(str(adapter), torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    weights = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, module in base.named_modules():
        prefix = next((k.split(".lora_A")[0] for k in weights if f".{name}.lora_A" in k), None)
        if name and prefix:
            a, b = weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"]
            expected = module.weight + 8 / 4 * b @ a
            torch.testing.assert_close(lm.get_submodule(name).weight, expected)
            changed += 1
    assert changed == 2 * 7  # two layers, each with q k v o gate up down
    torch.testing.assert_close(lm.lm_head.weight, base.lm_head.weight)


def test_merging_writes_a_plain_model(adapter, tmp_path):
    done = subprocess.run(
        [sys.executable, "lora.py", adapter, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded, _ = load_lm(str(adapter), torch.float32)
    for a, b in zip(merged.parameters(), loaded.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # written in bfloat16


def test_an_adapter_reranks(adapter, small):
    import data

    agent = load_agent(AgentSettings(model=str(adapter), window_size=4, step_size=2))
    candidates = data.read_candidates(small[0])[:1]
    (ranked,) = rerank(agent, candidates)
    assert set(ranked.passages) == set(candidates[0].passages)


def test_a_fresh_adapter_changes_nothing_and_then_shares_prompts_exactly():
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9, 10, 11]])]
    lm = tiny_lm()
    expected = naive_logprobs(tiny_lm(), groups, 1.0)
    lora.add_adapter(lm, 4, 8, seed=0)
    policy = Policy(lm)
    torch.testing.assert_close(policy(response_logprobs, pack_row(groups)), expected)
    for name, parameter in lm.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = policy(response_logprobs, pack_row(groups))
    assert (ours - expected).abs().max() > 0.01
    lm.config._attn_implementation = "sdpa"
    torch.testing.assert_close(ours, naive_logprobs(lm, groups, 1.0), rtol=1e-5, atol=1e-5)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="pip install peft"):
        lora.add_adapter(tiny_lm(), 4, 8, 0)


def test_merging_no_adapter_is_an_error(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "lora.py", tiny, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no adapter" in done.stderr
