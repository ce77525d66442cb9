"""LoRA: an adapter trains, saves, loads merged, and merges to a plain model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_grpo import run_grpo
from test_packed import naive_logprobs, tiny_lm
from transformers import AutoModelForCausalLM

import grpo
import merge
from agent import load_agent, rank_batch
from engine import lora
from engine.model import load_lm, load_policy
from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from settings import AgentSettings, TrainSettings, UserError
from sources.formats import read_candidates
from tasks import settle
from window import PROMPTS

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def adapter(small, tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    settings = TrainSettings(
        model=str(tiny), candidates=str(small[0]), qrels=str(small[1]), window_size=4, draws=2,
        steps=2, batch_size=2, group_size=6, max_new_tokens=50, lora_rank=4, lora_alpha=8,
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
        "--model", tiny, "--candidates", small[0], "--qrels", small[1], "--window_size", 4,
        "--draws", 2, "--steps", 2, "--batch_size", 2, "--group_size", 6, "--max_new_tokens", 50,
        "--lora_rank", 4, "--lora_alpha", 8, "--learning_rate", 1e-2,
        "--output_dir", tmp_path, processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (load_file(out / "adapter_model.safetensors") for out in (adapter, tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-4)  # 2 steps of 1e-2


def test_a_merged_adapter_is_its_base_plus_the_product(adapter, tiny):
    lm, _ = load_lm(str(adapter), torch.float32, merged=True)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_is_what_was_trained_however_small(adapter, tiny, tmp_path, dtype):
    """Beside its base's weights: added to them in bfloat16, most of it would be rounded away."""
    shutil.copytree(adapter, tmp_path / "small")
    weights = load_file(adapter / "adapter_model.safetensors")
    small = {n: w * 1e-3 if "lora_B" in n else w for n, w in weights.items()}
    save_file(small, tmp_path / "small" / "adapter_model.safetensors")
    lm, _ = load_lm(str(tmp_path / "small"), dtype)
    held = dict(lm.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    for name, weight in base.named_parameters():
        found = held.get(
            name,
            held.get(
                name.replace(".weight", ".base_layer.weight"),
                held.get(name.replace(".bias", ".base_layer.bias")),
            ),
        )
        assert torch.equal(found, weight), name
    loras = {n: p for n, p in held.items() if "lora_" in n}
    assert len(loras) == len(small) and all(p.dtype == dtype for p in loras.values())
    for name, weight in small.items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(loras[name], weight.to(dtype)), name


def test_an_adapter_on_an_adapter_is_refused(adapter, small, process_group):
    settings = TrainSettings(model=str(adapter), lora_rank=2)
    with pytest.raises(UserError, match=r"--lora_rank trains an adapter.*python merge\.py"):
        load_policy(settings, torch.float32, torch.device("cpu"))


def test_half_an_adapter_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "half")
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in [n for n in weights if "layers.1." in n]:
        del weights[name]
    save_file(weights, tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"half: its files lack .*layers\.1\..*lora.* more"):
        load_lm(str(tmp_path / "half"), torch.float32)


def test_merging_writes_a_plain_model(adapter, tmp_path):
    done = subprocess.run(
        [sys.executable, "merge.py", adapter, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert f"written to {tmp_path} in torch.float32, with 100.0% of what the adapter" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded, _ = load_lm(str(adapter), torch.float32, merged=True)
    for a, b in zip(merged.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_merged_model_is_asked_as_its_adapter_was(adapter, monkeypatch, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    settings = {"task": "setwise", "steps": 2}
    (other / "settings.json").write_text(json.dumps(settings))
    (other / "prompt.toml").write_bytes(b"# mine\r\n" + (PROMPTS / "setwise.toml").read_bytes())
    monkeypatch.setattr(sys, "argv", ["merge.py", str(other), str(tmp_path / "out")])
    merge.main()
    settled = settle(AgentSettings(model=str(tmp_path / "out")))
    assert settled.task == "setwise"
    assert Path(settled.prompt).parent == tmp_path / "out"
    assert Path(settled.prompt).read_bytes() == (other / "prompt.toml").read_bytes()


@pytest.mark.parametrize("out", ["base", "adapter", "file"])
def test_nothing_is_merged_over_what_is_there(adapter, tiny, monkeypatch, tmp_path, out):
    shutil.copytree(tiny, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "file").write_text("precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(sys, "argv", ["merge.py", str(adapter), str(tmp_path / out)])
    with pytest.raises(SystemExit, match=f"{out} (holds something else|is a file)"):
        merge.main()
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_an_adapter_reranks(adapter, small):
    settings = AgentSettings(model=str(adapter), window_size=4, step_size=2)
    agent = load_agent(settings)
    candidates = read_candidates(small[0])[:1]
    (ranked,) = rank_batch(agent, settings, candidates)
    assert set(ranked.passages) == set(candidates[0].passages)


def test_a_fresh_adapter_changes_nothing_and_then_shares_prompts_exactly():
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9, 10, 11]])]
    lm = tiny_lm()
    expected = naive_logprobs(tiny_lm(), groups, 1.0)
    lora.add_fresh(lm, 4, 8, seed=0)
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
    with pytest.raises(UserError, match="pip install peft"):
        lora.add_fresh(tiny_lm(), 4, 8, 0)


def test_merging_no_adapter_is_an_error(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "merge.py", tiny, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no adapter" in done.stderr
