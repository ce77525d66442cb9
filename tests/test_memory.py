"""The memory formula against the bytes that a small model takes."""

import pytest
import torch
from torch.profiler import profile
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
import memory
from grpo import Settings
from parallel import gathered, shard
from rollout import Rollout
from shared_prompt import Group, Policy, Request, Sample, Sampler, pack_row, response_logprobs


def small_lm(layers: int = 3, **changes) -> Qwen2ForCausalLM:
    sizes = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2Config(num_hidden_layers=layers, attn_implementation="sdpa", **sizes | changes)
    return Qwen2ForCausalLM(config)


def job(lm, settings: Settings, prompt: int) -> memory.Job:
    return memory.job_of(lm.config, 1, prompt, settings, c=4)


def nbytes(tensors) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())


def highest(work) -> int:
    """The most bytes that tensors made inside `work` took at once, as the allocator tells."""
    with profile(profile_memory=True) as record:
        work()
    now = most = 0
    events = record.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def rollouts(prompt: int, group: int, length: int) -> list[Rollout]:
    samples = [Sample([7] * length) for _ in range(group)]
    advantages = torch.linspace(-1, 1, group)
    # Two groups, one a micro-batch: at the second, all gradients are there already.
    return [Rollout(i, None, [5] * prompt, samples, [], advantages, advantages) for i in range(2)]


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_kept_is_counted_exactly(process_group, tied):
    lm = small_lm(tie_word_embeddings=tied)
    policy = shard(Policy(lm), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(response_logprobs, pack_row([Group([1, 2], [[3, 4]])])).sum().backward()
    optimizer.step()
    parameters = list(policy.parameters())
    expected = memory.kept(job(lm, Settings(beta=0.1), 10))
    assert expected["weights, float32"] == sum(p.to_local().nbytes for p in parameters)
    moments = [optimizer.state[p][k] for p in parameters for k in ("exp_avg", "exp_avg_sq")]
    assert expected["Adam's moments, float32"] == sum(m.to_local().nbytes for m in moments)
    gradients = memory.updating(job(lm, Settings(), 10))["update: gradients, float32"]
    assert gradients == sum(p.grad.to_local().nbytes for p in parameters)
    assert expected["reference"] == expected["weights, float32"]  # c is 4 here
    halved = memory.kept(memory.replace(job(lm, Settings(), 10), processes=2))
    assert halved["weights, float32"] == expected["weights, float32"] // 2


def test_an_adapters_parameters_are_counted_exactly():
    import lora

    lm = small_lm()
    counted = job(small_lm(), Settings(lora_rank=3), 10).trained
    lora.add_adapter(lm, 3, 6, seed=0)
    assert counted == sum(p.numel() for p in lm.parameters() if p.requires_grad)


@pytest.mark.parametrize("length", [2, 64, 65, 66, 300])
@pytest.mark.parametrize("in_flight", [4, 8])
def test_keys_and_values_are_counted_exactly(length, in_flight):
    lm = small_lm()
    policy, group, prompt = Policy(lm), 4, 37
    sampler = Sampler(policy, [], length, max_in_flight=in_flight)
    batch, most = sampler.batch, 0

    def watch(begin=batch.begin_step):
        nonlocal most
        positions = begin()
        layers = batch.prompt_kv + batch.own_kv
        most = max(most, nbytes(tensor for layer in layers for tensor in layer))
        return positions

    batch.begin_step = watch
    for i in range(3):
        sampler.submit(Request(i, [5] * prompt, group, seed=(i,)))
    while sampler.collect():
        pass
    settings = Settings(group_size=group, max_in_flight=in_flight, max_new_tokens=length)
    expected = memory.sampling(job(lm, settings, prompt))["sampling: keys and values"]
    assert most == expected * 3 // (3 + 1)  # without the layer that is there twice while it grows


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 128}, {"intermediate_size": 600}])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_layers_activations(changes, layers):
    lm = small_lm(layers, **changes)
    policy, row = Policy(lm), pack_row([Group([5] * 400, [[7] * 40] * 8)])
    weights, saved = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(response_logprobs, row)
    tokens = row.tokens.numel()
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    expected = layers * tokens * memory.layer_activations(lm.config, 4)
    # What is not a layer's: the embedding's output, the last norm, hidden states of the responses.
    outside = tokens * lm.config.hidden_size * 4 * 6
    assert expected <= measured * 1.05 and measured <= expected * 1.05 + outside


@pytest.mark.parametrize(
    "settings, changes",
    [
        (Settings(max_tokens_per_micro_batch=2400), {}),
        (Settings(max_tokens_per_micro_batch=2400), {"vocab_size": 8000}),
        (Settings(max_tokens_per_micro_batch=1200), {"hidden_size": 256}),
        (Settings(max_tokens_per_micro_batch=1200, activation_checkpointing=False), {}),
    ],
)
def test_the_peak_of_an_update(process_group, settings, changes):
    lm = small_lm(8, **changes)
    if settings.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = shard(Policy(lm), torch.device("cpu"))
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    batch = rollouts(400, 8, (settings.max_tokens_per_micro_batch - 400) // 8)
    settings.beta = 0.0
    measured = highest(
        lambda: grpo.update(policy, None, optimizer, batch, settings, torch.device("cpu"))
    )
    expected = sum(memory.updating(job(lm, settings, 400)).values())
    assert 0.88 < measured / expected < 1.02


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 256}, {"vocab_size": 8000}])
def test_the_peak_of_sampling(process_group, changes):
    lm = small_lm(8, **changes)
    policy = shard(Policy(lm).eval(), torch.device("cpu"))
    settings = Settings(group_size=8, max_in_flight=32, max_new_tokens=300)

    def sample() -> None:
        with gathered(policy):
            sampler = Sampler(policy, [], 300, max_in_flight=32)
            for i in range(4):
                sampler.submit(Request(i, [5] * 400, 8, seed=(i,)))
            while sampler.collect():
                pass

    measured = highest(sample)
    expected = sum(memory.sampling(job(lm, settings, 400)).values())
    assert 0.88 < measured / expected < 1.02


def test_advice_names_what_fits():
    settings = Settings()
    seven = memory.job_of(memory.QWEN["Qwen2.5-7B"], 8, 3000, settings)
    assert seven.parameters == 7_615_616_512 and memory.peak(seven) < 72 * memory.GB
    fourteen = memory.job_of(memory.QWEN["Qwen2.5-14B"], 8, 3000, settings)
    assert fourteen.parameters == 14_770_033_664
    for phase, part in (("sampling", memory.sampling), ("update", memory.updating)):
        words = memory.advice(phase, fourteen, int(80 * memory.GB)).split()
        changed = memory.replace(fourteen, **{words[0].removeprefix("--"): int(words[1])})
        assert sum((memory.kept(changed) | part(changed)).values()) < 72 * memory.GB
        assert sum((memory.kept(fourteen) | part(fourteen)).values()) > 72 * memory.GB
    assert "--lora_rank" in memory.advice("loading", fourteen, int(10 * memory.GB))
    assert "--lora_rank" in memory.advice("sampling", fourteen, int(30 * memory.GB))


@pytest.mark.parametrize(
    "phase, where, error",
    [
        ("sampling", "sample_batch", torch.OutOfMemoryError("CUDA out of memory")),
        ("update", "update", RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")),
        ("loading", "load_sharded", MemoryError()),
    ],
)
def test_running_out_names_the_setting(monkeypatch, small, tiny, tmp_path, phase, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(grpo, where, fail)
    settings = Settings(
        model=str(tiny), candidates=str(small[0]), qrels=str(small[1]), size=4,
        output_dir=str(tmp_path), batch_size=2, group_size=2, max_new_tokens=30,
    )  # fmt: skip
    named = {"sampling": "--max_in_flight 128", "update": "--max_tokens_per_micro_batch 16384",
             "loading": "--lora_rank 16"}  # fmt: skip
    with pytest.raises(SystemExit, match=f"out of memory.*{phase}.*{named[phase]}"):
        grpo.train(settings)


def test_other_errors_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match="shape"),
        memory.explained("update", "no model", Settings(), 0, torch.device("cpu")),
    ):
        raise RuntimeError("shape mismatch")


def test_memory_that_really_runs_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert memory.is_out_of_memory(raised.value)
