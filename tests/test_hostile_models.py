"""Models of strangers: none runs code, in any process, and what they make last long ends."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_model import learn_tokenizer, tiny_model

from engine import limits
from engine.chat import encode_chat
from engine.lora import check_patterns
from engine.model import empty_lm, load_lm
from settings import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    tokenizer = learn_tokenizer(["tide moon sea"] * 9, vocab_size=400)
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(good, tmp_path):
    """A copy of the good model's folder, to be spoilt."""
    return shutil.copytree(good, tmp_path / "model")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------- one door

DOORS = {"engine/model.py", "engine/lora.py"}
OWN_CODE = re.compile(r"Auto[A-Z]\w+\.from_")  # what would look for code in a model's folder


def test_models_come_through_one_door_that_runs_no_code():
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in IGNORED]
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith((".from_pretrained", ".from_config")):
                found.setdefault(str(path.relative_to(ROOT)), []).append((called, node))
    assert found.keys() == DOORS
    calls = [call for calls in found.values() for call in calls if OWN_CODE.match(call[0])]
    assert len(calls) == 4  # config, tokenizer, model, and a model of shapes
    for _, node in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given["trust_remote_code"] == "False"


IGNORED = {"tests", "benchmarks", "runs", ".venv", ".cache"}
LOAD_ALL = """
import sys
import torch
from engine.model import load_policy
from engine.parallel import processes, say
from settings import TrainSettings, UserError

with processes() as device:
    for model in sys.argv[1:]:
        try:
            load_policy(TrainSettings(model=model), torch.float32, device)
            print("LOADED")
        except UserError as error:
            print("REFUSED", error)
"""


def test_no_process_runs_a_models_code_or_asks_about_it(good, tmp_path):
    """The second of two processes builds its model without reading the weights."""
    ran = tmp_path / "ran"
    config = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    for name, changes in {
        "config": {"model_type": "mine", "auto_map": config},
        "model": {"auto_map": config},  # of a known kind
        "kernel": {"_attn_implementation": f"{tmp_path.name}/kernel"},
        "tokenizer": {},
    }.items():
        folder = shutil.copytree(good, tmp_path / name)
        (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
        change_json(folder / "config.json", **changes)
    own = {"AutoTokenizer": ["mine.Tokenizer", None]}
    change_json(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map=own)
    script = tmp_path / "load_all.py"
    script.write_text(LOAD_ALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script]
    done = subprocess.run(
        [*torchrun, *(tmp_path / name for name in ("config", "kernel", "tokenizer", "model"))],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="y\n" * 20, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Each of two models by each of two processes; the others by the library's own code.
    assert done.stdout.count("contains custom code") == 2
    assert done.stdout.count("asks for code from the hub") == 2
    assert done.stdout.count("LOADED") == 4
    assert not ran.exists() and "[y/N]" not in done.stdout + done.stderr


# ----------------------------------------------------------------------------------- an end

HUGE = {
    "hidden_size": 10**6, "intermediate_size": 10**7, "vocab_size": 10**7, "head_dim": 10**9,
    "num_hidden_layers": 10**6,
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("load", [load_lm, empty_lm])
def test_an_absurd_config_is_named_at_once(name, load, model):
    change_json(model / "config.json", **{name: HUGE[name]})
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"--model {model}: .*(asks for|{name})") as error:
        load(str(model), torch.float32, "sdpa")
    assert time.monotonic() - started < 10 and "\n" not in str(error.value)


def test_a_quantized_model_and_a_kernel_from_the_hub_are_refused(model):
    change_json(model / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match="its weights are quantized, which is not supported"):
        load_lm(str(model), torch.float32)
    spoilt = {"quantization_config": None, "_attn_implementation_internal": "you/kernel"}
    change_json(model / "config.json", **spoilt)  # which is not looked at
    for load in (load_lm, empty_lm):
        assert load(str(model), torch.float32, "sdpa")[0].config._attn_implementation == "sdpa"
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        change_json(model / "config.json", **{name: "you/kernel"})
        with pytest.raises(UserError, match="asks for code from the hub, 'you/kernel': not run"):
            load_lm(str(model), torch.float32)
        change_json(model / "config.json", **{name: None})


@pytest.mark.parametrize("of_words", [True, False])
def test_a_tokenizer_of_another_model_is_refused(model, of_words):
    """On a GPU its tokens would end the process somewhere in the middle."""
    tokenizer = learn_tokenizer(["tide moon sea"] * 9, vocab_size=400)
    if of_words:
        lm = tiny_model(tokenizer, vocab_size=200)
        lm.save_pretrained(model)
    else:  # one more token, which the chat template writes
        tokenizer.add_tokens(["<|turn|>"])
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
        tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=rf"--model {model}: its tokenizer has a token \d+"):
        load_lm(str(model), torch.float32)


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1)


@pytest.mark.parametrize(
    "loop, because",
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "its code took more than 1 seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_chat_template_ends(loop, because, one_second):
    tokenizer = learn_tokenizer(["tide moon"] * 9, vocab_size=400)
    tokenizer.chat_template += loop
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"(?s)chat template refuses .*{because}"):
        encode_chat(tokenizer, [{"role": "user", "content": "tide"}])
    assert time.monotonic() - started < 5


def test_an_adapters_regular_expression_ends(good, one_second):
    peft = pytest.importorskip("peft")
    lm, _ = load_lm(str(good), torch.float32)
    bomb = r"([\w.]+)+X"
    for bad in ({"target_modules": bomb}, {"exclude_modules": bomb}, {"rank_pattern": {bomb: 2}}):
        config = peft.LoraConfig(**{"target_modules": ["q_proj"]} | bad)
        with pytest.raises(UserError, match=r"regular expressions .* took more than 1 seconds"):
            check_patterns(config, lm)
    check_patterns(peft.LoraConfig(target_modules=r".*\.(q_proj|v_proj)"), lm)
    config = peft.LoraConfig(target_modules=["q_proj"], megatron_config={}, megatron_core="os")
    config.megatron_config = {"a": 1}
    with pytest.raises(UserError, match="megatron_config, which is not supported"):
        check_patterns(config, lm)


def test_what_ends_in_time_leaves_no_alarm(one_second):
    with limits.limited("this"):
        pass
    time.sleep(1.2)
