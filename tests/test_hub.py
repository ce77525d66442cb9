"""A model by name: the hub is asked once, and what was downloaded before needs none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOAD = """
import sys, time, torch
from engine.model import load_lm
for name in sys.argv[1:]:
    started = time.monotonic()
    try:
        load_lm(name, torch.float32)
        print(name, "is loaded")
    except ValueError as error:
        print(error)
    assert time.monotonic() - started < 30  # seconds; it was 47 with retries
"""


def test_without_a_network_it_takes_seconds(tiny, tmp_path):
    known = tmp_path / "models--some--model"
    shutil.copytree(tiny, known / "snapshots" / "abc")
    (known / "refs").mkdir()
    (known / "refs" / "main").write_text("abc")
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "HTTP_PROXY", "HF_ENDPOINT")}
    names = ["nosuch", "no/such", "some/model", "no/such/folder"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | nowhere | {"HF_HUB_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.pop(2) == "some/model is loaded"
    for name, line in zip(("nosuch", "no/such", "no/such/folder"), said, strict=True):
        assert line.startswith(f"--model {name}: cannot be loaded: no folder has that name")
        assert line.endswith("without a network, one that was downloaded before")
    assert "Retrying" not in done.stderr and "some/model: as it was downloaded" in done.stderr
