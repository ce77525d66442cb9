"""The dry run against the bytes that small models really take, and at a 7B model's true size."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile
from transformers import Qwen2Config, Qwen2ForCausalLM

import dry_run
import grpo
from engine.parallel import explained, gathered, is_out_of_memory, shard
from engine.policy import Policy
from engine.sampler import Request, Sample, Sampler
from rollout import Rollout, windows_at_once
from settings import DryRunSettings, TrainSettings, UserError


def config(layers: int = 3, **changes) -> Qwen2Config:
    sizes = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen2Config(num_hidden_layers=layers, attn_implementation="sdpa", **sizes | changes)


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


def phases(config: Qwen2Config, folder, settings: TrainSettings, how: DryRunSettings) -> dict:
    config.save_pretrained(folder)
    settings.model = str(folder)
    return dry_run.run_phases(settings, how, grpo.add_gradient, gpu=False)


def made(phase: dry_run.Phase) -> int:
    """What a phase makes beyond what is kept all the time."""
    kept = {"weights", "reference", "gradients", "Adam's moments"}
    return sum(size for kind, size in phase.peak.items() if kind not in kept)


UPDATES = [
    ({"max_tokens_per_micro_batch": 1200}, {}),
    ({"max_tokens_per_micro_batch": 1200}, {"vocab_size": 8000}),
    ({"max_tokens_per_micro_batch": 700}, {"hidden_size": 256}),
    ({"max_tokens_per_micro_batch": 700, "activation_checkpointing": False}, {}),
    ({"max_tokens_per_micro_batch": 700, "dtype": "bfloat16", "beta": 0.1}, {}),
]


@pytest.mark.parametrize("changes, sizes", UPDATES)
def test_the_peak_of_an_update(tmp_path, changes, sizes):
    length = (changes["max_tokens_per_micro_batch"] - 200) // 8
    settings = TrainSettings(**{"beta": 0.0, "group_size": 8, "max_new_tokens": length} | changes)
    how = DryRunSettings(processes=1, prompt_tokens=200)
    expected = phases(config(4, **sizes), tmp_path, settings, how)["update"]
    expected = made(expected) + expected.peak["gradients"]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        computing = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        lm = Qwen2ForCausalLM(config(4, **sizes))
        if settings.activation_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy = shard(Policy(lm), torch.device("cpu"), computing)
        frozen = Qwen2ForCausalLM(config(4, **sizes)).requires_grad_(False).to(computing)
        reference = shard(Policy(frozen), torch.device("cpu"), computing) if settings.beta else None
        optimizer = torch.optim.SGD(policy.parameters(), 0.0)
        samples = [Sample([7] * length, [-1.0] * length) for _ in range(8)]
        advantages = torch.linspace(-1, 1, 8)
        batch = [Rollout(i, None, [5] * 200, samples, [], None, advantages) for i in range(2)]
        measured = highest(lambda: grpo.update(policy, reference, optimizer, batch, settings))
    finally:
        dist.destroy_process_group()
    assert measured == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 256}, {"vocab_size": 8000}])
def test_the_peak_of_sampling(tmp_path, sizes):
    settings = TrainSettings(
        group_size=4, max_in_flight=8, max_new_tokens=40, beta=0.0, max_tokens_per_micro_batch=400
    )
    how = DryRunSettings(processes=1, prompt_tokens=200)
    expected = made(phases(config(2, **sizes), tmp_path, settings, how)["sampling"])

    def sample() -> None:
        with gathered(policy):
            sampler = Sampler(policy, [], 40, max_in_flight=8)
            for i in range(2):
                sampler.submit(Request(i, [5] * 200, 4, seed=(i,)))
            while sampler.collect():
                pass

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = shard(Policy(Qwen2ForCausalLM(config(2, **sizes)).eval()), torch.device("cpu"))
        measured = highest(sample)
    finally:
        dist.destroy_process_group()
    # The dry run reads one more prompt while all others are at their longest.
    assert 0.9 * expected < measured < 1.02 * expected


def test_the_keys_and_values_in_the_cache_are_counted_exactly(tmp_path):
    settings = TrainSettings(
        group_size=4, max_in_flight=10, max_new_tokens=300, beta=0.0, max_tokens_per_micro_batch=400
    )
    how = DryRunSettings(processes=1, prompt_tokens=37)
    peak = phases(config(), tmp_path, settings, how)["sampling"].peak
    # 10 responses share 3 prompts; room for responses grows in steps, but never past their limit.
    exact = 3 * 2 * (2 * 16) * 4 * (3 * 37 + 10 * 300)
    assert exact <= peak["keys and values"] < exact + 20_000  # and some indexes


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_kept_is_counted_exactly(tmp_path, tied):
    settings = TrainSettings(
        beta=0.1, max_new_tokens=20, group_size=2, max_in_flight=2, max_tokens_per_micro_batch=400
    )
    found = phases(
        config(tie_word_embeddings=tied), tmp_path, settings, DryRunSettings(processes=2)
    )
    lm = Qwen2ForCausalLM(config(tie_word_embeddings=tied))
    # Each tensor is cut along its first dimension, into equal parts here.
    half = sum(p.numel() for p in lm.parameters()) // 2
    assert found["loading"].peak["weights"] == found["loading"].peak["reference"] == 4 * half
    assert found["update"].peak["gradients"] == 4 * half
    moments = found["optimizer"].peak["Adam's moments"]
    assert 8 * half <= moments < 8 * half + 1000  # and how many steps were made


def test_an_adapters_parameters_are_counted_exactly(tmp_path):
    pytest.importorskip("peft")
    settings = TrainSettings(
        lora_rank=2, max_new_tokens=20, group_size=2, max_in_flight=2,
        max_tokens_per_micro_batch=400,
    )  # fmt: skip
    found = phases(config(), tmp_path, settings, DryRunSettings(processes=1))
    lm = Qwen2ForCausalLM(config())
    linear = [m for m in lm.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    adapter = 2 * sum(sum(module.weight.shape) for module in linear)
    assert found["update"].peak["gradients"] == 4 * adapter


def test_operations_and_bytes_received_are_counted(tmp_path):
    settings = TrainSettings(
        beta=0.0, max_new_tokens=50, group_size=4, max_in_flight=4,
        activation_checkpointing=False, max_tokens_per_micro_batch=230,
    )  # fmt: skip
    found = phases(config(), tmp_path, settings, DryRunSettings(processes=4, prompt_tokens=30))
    lm = Qwen2ForCausalLM(config())
    layers = sum(p.numel() for p in lm.model.layers.parameters() if p.dim() > 1)
    head = lm.lm_head.weight.numel()
    # Forward, and twice that backward; of the responses alone the logits, computed once more. The
    # last MLP leaves out all of the prompt but a token, and the last token of each response.
    spared = sum(p.numel() for p in lm.model.layers[-1].mlp.parameters()) * (29 + 4)
    assert found["update"].flops == 6 * (layers * 230 - spared) + 8 * head * 200
    everything = sum(p.numel() for p in lm.parameters())
    # Three quarters of the weights for each layer's pass forward and backward, the root's once, and
    # three quarters of all gradients.
    inner = sum(p.numel() for p in lm.model.layers.parameters())
    assert found["update"].received == 3 * (everything + inner + everything)


def test_a_gpus_norm_keeps_what_it_was_given_and_a_number_a_token():
    with dry_run.machine(1, gpu=True) as ledger:
        x = torch.empty(1000, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(64, dtype=torch.bfloat16, requires_grad=True)
        with ledger:
            out = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
        assert ledger.now.total() == 1000 * 64 * 2 + 1000 * 4
        out.sum().backward()
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


# ------------------------------------------------------------------------------------ at true size


def test_a_7b_step_on_8_gpus(tmp_path):
    """Qwen2.5-7B's shape, REARANK's settings, by the GPU's kernels in bfloat16."""
    seven = config(
        28, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    seven.save_pretrained(tmp_path)
    settings = TrainSettings(model=str(tmp_path), eval_candidates="some")
    found = dry_run.run_phases(settings, DryRunSettings(), grpo.add_gradient)
    parameters = 7_615_616_512
    assert found["loading"].peak["weights"] == 4 * parameters / 8
    assert found["sampling"].peak["gathered weights"] == 2 * parameters
    caches = 28 * 2 * 4 * 128 * 2 * (256 * 2048 + 8 * 3000)
    assert caches <= found["sampling"].peak["keys and values"] < 1.001 * caches
    assert sum(found["held-out"].peak.values()) <= sum(found["sampling"].peak.values())
    assert sum(found["sampling"].peak.values()) < 64e9
    assert sum(found["update"].peak.values()) < 64e9


def test_the_report_fits_a_terminal(tmp_path, monkeypatch, capsys):
    config().save_pretrained(tmp_path)
    flags = (
        "--dry_run True --processes 4 --max_new_tokens 50 --max_in_flight 64 --eval_candidates x"
    )
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", str(tmp_path), *flags.split()])
    grpo.main()
    told = capsys.readouterr().out
    assert max(len(line) for line in told.split("\n")) <= 80
    assert "32 prompts of 3000 tokens, 32 responses of 50 to each" in told
    assert f"{32 * (3000 + 32 * 50):,} distinct tokens" in told
    assert not dist.is_initialized()


def test_windows_with_a_prompt_each_take_no_more_room():
    settings = TrainSettings()
    n = windows_at_once(settings, 3000)
    assert n * (3000 + 2048) <= 256 * 2048 + 8 * 3000 < (n + 1) * (3000 + 2048)
    assert windows_at_once(TrainSettings(max_in_flight=1, group_size=1), 3000) == 1


# ---------------------------------------------------------------------------- where memory runs out


@pytest.mark.parametrize(
    "phase, where, error",
    [
        ("sampling", "sample_batch", torch.OutOfMemoryError("CUDA out of memory")),
        ("update", "update", RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")),
        ("loading", "load_policy", MemoryError()),
    ],
)
def test_running_out_names_the_setting(monkeypatch, small, tiny, tmp_path, phase, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(grpo, where, fail)
    settings = TrainSettings(
        model=str(tiny), candidates=str(small[0]), qrels=str(small[1]), window_size=4,
        output_dir=str(tmp_path), batch_size=2, group_size=2, max_new_tokens=30,
    )  # fmt: skip
    named = {"sampling": "--max_in_flight", "update": "--max_tokens_per_micro_batch",
             "loading": "--lora_rank 16"}  # fmt: skip
    with pytest.raises(UserError, match=f"out of memory .{phase}.: .*{named[phase]}.*--dry_run"):
        grpo.train(settings)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), explained("update"):
        raise RuntimeError("shape mismatch")


def test_memory_that_really_runs_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "toy"}, "--preset toy makes its own model when it trains: give --model"),
        (
            {"group_size": 65_536, "max_new_tokens": 10**6},
            r"65536 responses of 1,000,000 tokens to",
        ),
    ],
)
def test_what_has_no_cost_to_tell_is_refused(tmp_path, changes, message):
    config().save_pretrained(tmp_path)
    settings = TrainSettings(
        **({"model": str(tmp_path)} if "preset" not in changes else {}) | changes
    )
    with pytest.raises(UserError, match=message):
        dry_run.table(settings, DryRunSettings(), grpo.add_gradient)
