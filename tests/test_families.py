"""Model families: each named as supported computes what its plain model does, in every type; what
would go wrong is refused at loading, in one sentence."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed import collect_all, naive_logprobs
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from engine.model import load_config, load_lm, load_whole, non_finite
from engine.packed import Group, pack_row, response_logprobs
from engine.policy import Policy
from engine.probe import check_dropout, check_family, differences, probe
from engine.sampler import Request, Sampler
from settings import UserError

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}

# The README's list; a name may carry what sets it apart.
SUPPORTED = {
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "mistral window": {"sliding_window": 6, "head_dim": 8},
    "gemma3_text": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    # whose logits are scaled, capped, or whose layers differ
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6},
    "nanochat": {},
    "olmo3": {"sliding_window": 6},
}


def model(name: str, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    kind, sizes = name.split()[0], SIZES | SUPPORTED.get(name, {}) | changes
    config = AutoConfig.for_model(kind, **sizes)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return lm.to(dtype)


GROUPS = [
    Group(list(range(5, 25)), [[7, 8, 9, 10, 11, 12, 13, 14, 15], [4, 5], [30] * 12]),
    Group([9, 8], [[1] * 10]),
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_family_is_exact(name):
    plain, ours = model(name), Policy(model(name))
    expected = naive_logprobs(plain, GROUPS, 0.8)
    got = ours(response_logprobs, pack_row(GROUPS), 0.8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for logprobs in (expected, got):
        (logprobs * weights).sum().backward()
    for (parameter, p), o in zip(plain.named_parameters(), ours.lm.parameters(), strict=True):
        if p.grad is not None:
            assert (o.grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, parameter

    sampler = Sampler(ours, [3], 12, temperature=0)
    prompts = [list(range(5, 25)), [9, 8], [7, 7, 7, 8, 9, 10, 12]]
    for i, prompt in enumerate(prompts):
        sampler.submit(Request(i, prompt, 2))
    done = collect_all(sampler)
    for i, prompt in enumerate(prompts):
        out = plain.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12, do_sample=False, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        assert [s.tokens for s in done[i]] == [out[0, len(prompt) :].tolist()] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_family_passes_the_probe(name, dtype):
    policy = Policy(model(name, dtype))
    with torch.no_grad():
        packed, sampled, itself = policy(differences)
    assert max(packed, sampled) <= 1e-5 + 6 * torch.finfo(dtype).eps + 2 * itself
    probe(policy, name)


@pytest.mark.parametrize("name", SUPPORTED)
def test_fused_norms_compute_what_the_models_own_do(name):
    plain, ours = model(name), Policy(model(name)).lm
    fused = 0
    for own, norm in zip(plain.modules(), ours.modules(), strict=True):
        if "forward" not in vars(norm) or not hasattr(norm, "variance_epsilon"):
            continue
        fused += 1
        x = torch.randn(9, len(norm.weight)) * torch.logspace(-4, 4, 9)[:, None]
        norm.weight.data = own.weight.data = torch.randn_like(own.weight)
        assert torch.equal(norm(x), own(x))
        x = x.bfloat16()
        got, rounded = norm.bfloat16()(x), own.bfloat16()(x)
        exact = own.float()(x.float())
        assert (got - exact).norm() <= (rounded - exact).norm()
    assert (fused == 0) == name.startswith(("gemma3", "cohere", "nanochat")), fused


def test_a_copied_policy_has_weights_of_its_own():
    policy = Policy(Policy(model("qwen2")).lm)  # twice is as once
    copied = copy.deepcopy(policy)
    for parameter in policy.parameters():
        parameter.data.zero_()
    row = pack_row(GROUPS)
    expected = naive_logprobs(model("qwen2"), GROUPS, 1.0)
    torch.testing.assert_close(copied(response_logprobs, row), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------- key biases as large as Qwen2.5's


def biased(dtype: torch.dtype, seed: int) -> Qwen2ForCausalLM:
    """Key biases with norms of 750 in the first and the last layer."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=200, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.03,
        attn_implementation="sdpa",
    )  # fmt: skip
    lm = Qwen2ForCausalLM(config).eval()
    for layer in (lm.model.layers[0], lm.model.layers[-1]):
        bias = torch.randn(layer.self_attn.k_proj.bias.shape)
        layer.self_attn.k_proj.bias.data = bias * (750 / bias.norm())
    torch.nn.init.normal_(lm.lm_head.weight, std=0.3)
    return lm.bfloat16().to(dtype)  # so that all types hold the same weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampling_with_huge_key_biases_is_as_exact_as_the_plain_model(dtype):
    apart, errors, plain_errors = [], [], []
    for seed in range(3):
        prompt = torch.randint(200, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
        policy = Policy(biased(dtype, seed))
        sampler = Sampler(policy, [], 60)
        sampler.submit(Request(0, prompt, 6, seed=(seed,)))
        (samples,) = collect_all(sampler).values()
        groups = [Group(prompt, [sample.tokens for sample in samples])]
        row = pack_row(groups)
        sampled = torch.cat([torch.tensor(sample.logprobs) for sample in samples])
        with torch.no_grad():
            update = policy(response_logprobs, row)[row.mask]
            exact, plain = (
                naive_logprobs(biased(kind, seed), groups, 1.0)[row.mask]
                for kind in (torch.float32, dtype)
            )
        apart.append((update - sampled).exp() - 1)
        errors.append((sampled - exact).abs())
        plain_errors.append((plain - exact).abs())
    assert torch.cat(errors).mean() <= 1.2 * torch.cat(plain_errors).mean()
    assert (torch.cat(apart).abs() > 0.2).float().mean() <= 0.005


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["gpt2", "stablelm", "deepseek_v3"])
def test_what_the_engine_would_get_wrong_is_refused_in_one_sentence(kind):
    changes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {"head_dim": 8}
    with pytest.raises(UserError, match=f"--model it: {kind} models (cannot be used|go wrong)"):
        probe(Policy(model(kind, **changes)), "it")


@pytest.mark.parametrize(
    "kind, layers",
    [
        ("jamba", "linear_attention"),
        ("qwen3_next", "linear_attention"),
        ("llama4_text", "chunked_attention"),
        ("deepseek_v32", "indexed_attention"),
        ("lfm3", "conv"),
    ],
)
def test_layers_that_are_not_plain_attention_are_refused_by_name(kind, layers):
    """Chunks and indexes of thousands of tokens, which no short probe can see, among them."""
    with pytest.raises(UserError, match=f"{kind} has layers of type {layers}: only full att"):
        check_family(AutoConfig.for_model(kind))


def test_a_head_that_the_engine_would_skip_is_found(monkeypatch):
    """The probe itself: were the scaling after the head left out, it would say so."""
    monkeypatch.setattr(
        "engine.packed.logits_of", lambda lm, hidden: lm.get_output_embeddings()(hidden)
    )
    with pytest.raises(UserError, match="granite models go wrong here: the update's log-prob"):
        probe(Policy(model("granite")), "it")


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_look_at_the_whole_row_are_refused_by_name(rope):
    config = AutoConfig.for_model("phi3", **SIZES)
    config.rope_parameters = {"full_attention": {"rope_type": rope}}
    with pytest.raises(UserError, match=f"rope of type {rope} depends on the longest sequence"):
        check_family(config)


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "hidden_dropout"])
def test_any_dropout_is_named(name):
    config = AutoConfig.for_model("qwen2", **SIZES)
    check_dropout(config)
    setattr(config, name, 0.1)
    with pytest.raises(UserError, match=f"{name} is 0.1 in its config.json: set it to 0"):
        check_dropout(config)


def changed(tiny, folder, change):
    """A copy of a model's folder with its weights changed."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"lack model\.layers\.1\.mlp\.up_p"),
        (lambda w: w.clear(), r"asks for [\d,]+ weights, which [\d,]+ bytes in its files cannot"),
        (
            lambda w: w.update({"model.layers.0.old.weight": w.pop("model.norm.weight")}),
            r"its files lack model\.norm\.weight",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(128)}),
            r"tensors that this kind of model has no place for: model\.layers\.0\.mlp\.up_proj\.b",
        ),
        (
            lambda w: w["model.norm.weight"].__setitem__(3, float("nan")),
            r"not finite: model\.norm\.weight",
        ),
    ],
)
def test_weights_that_are_not_all_there_are_named(tiny, tmp_path, change, message):
    name = changed(tiny, tmp_path / "model", change)
    with pytest.raises(UserError, match=message) as error:
        load_lm(name, torch.float32)
    assert str(error.value).startswith(f"--model {name}: ")


def test_another_familys_name_over_the_weights_is_refused(tiny, tmp_path):
    """Llama has no biases: Qwen2's would be left out without a word."""
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no place for: .*bias"):
        load_lm(str(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize(
    "name, value", [("num_hidden_layers", 10**9), ("vocab_size", 10**15), ("hidden_size", -1)]
)
def test_absurd_sizes_end_at_once(tiny, tmp_path, name, value):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=f"cannot be loaded: .*{name}"):
        load_config(str(tmp_path / "model"))


def test_non_finite_weights_are_found_in_every_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lm = model("qwen2", dtype)
        assert non_finite(lm) == []
        lm.model.norm.weight.data[0] = float("-inf")
        lm.lm_head.weight.data[1, 2] = float("nan")
        assert non_finite(lm) == ["model.norm.weight", "lm_head.weight"]


def test_a_loaded_model_has_passed_the_probe(tiny, monkeypatch):
    probed = []
    monkeypatch.setattr("engine.model.probe", lambda policy, name: probed.append(name))
    load_whole(str(tiny), torch.float32, torch.device("cpu"))
    assert probed == [str(tiny)]
