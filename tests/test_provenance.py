"""What is said of a result's origin: the code, the versions, the files."""

import hashlib
import json
import shutil
import subprocess

import pytest

from engine import provenance
from engine.provenance import git_state, hash_files, hash_model
from settings import UserError


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_files_are_known_by_all_they_hold(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 3_000_000)
    two.write_bytes(b"")
    assert hash_files([one]) == sha256(b"a" * 3_000_000)
    both = f"{hash_files([one])}  one\n{sha256(b'')}  two\n"
    assert hash_files([one, two]) == sha256(both.encode()) != hash_files([two, one])
    one.write_bytes(b"a" * 2_999_999 + b"b")  # as long, and possibly as old
    assert hash_files([one, two]) != sha256(both.encode())
    with pytest.raises(FileNotFoundError):
        hash_files([tmp_path / "none"])


def test_a_model_is_known_by_the_files_that_decide(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
                 "settings.json", "metrics.jsonl", "README.md"):  # fmt: skip
        (tmp_path / name).write_text(name)
    expected = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert hash_model(str(tmp_path)) == {name: sha256(name.encode()) for name in expected}
    for absent in (str(tmp_path / "none"), "never/downloaded", "a b"):
        assert hash_model(absent) == {}


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"peft_type": "X"}', '{"peft_type": "LORA"}'])
def test_a_damaged_adapter_is_named(tmp_path, config):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=r"adapter_config\.json: damaged"):
        hash_model(str(tmp_path))


def test_an_adapter_is_known_by_its_base_too(tmp_path):
    pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model.safetensors").write_text("base")
    (adapter / "adapter_model.safetensors").write_text("adapter")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    hashes = hash_model(str(adapter))
    assert hashes["base/model.safetensors"] == sha256(b"base")
    assert hashes["adapter_model.safetensors"] == sha256(b"adapter")


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("weights")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    look_up = provenance.try_to_load_from_cache
    monkeypatch.setattr(
        provenance, "try_to_load_from_cache", lambda *args: look_up(*args, cache_dir=tmp_path)
    )
    assert hash_model("some/model")["model.safetensors"] == sha256(b"weights")


def test_git_is_asked_for_this_project_alone(tmp_path, monkeypatch):
    def git(*args) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
                       cwd=tmp_path, check=True, capture_output=True)  # fmt: skip

    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert git_state() is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert git_state()["clean"] and len(git_state()["revision"]) == 40
    (tmp_path / "new.py").write_text("1")
    assert not git_state()["clean"]
    monkeypatch.setattr(provenance, "ROOT", inner)  # a copy inside another project
    assert git_state() is None
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(inner))
    assert shutil.which("git") is None and git_state() is None


def test_provenance_says_what_ran():
    said = provenance.provenance()
    assert set(said) == {"git", "source", "versions"} and len(said["source"]) == 64
    assert {"python", "torch", "transformers"} <= set(said["versions"])
    json.dumps(said)
