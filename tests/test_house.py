"""The house: every module has its place in the contracts on imports, and a circle is found."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from settings import AgentSettings, TrainSettings
from tasks import TASKS

ROOT = Path(__file__).parents[1]


def lint(root: Path) -> subprocess.CompletedProcess:
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    return subprocess.run([root / ".ci" / "imports"], capture_output=True, text=True, env=env)


def test_every_module_has_its_place():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    modules = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    layers = contracts["contracts"][0]["layers"]
    assert {name for layer in layers for name in layer.split(" | ")} == modules
    assert set(contracts["root_packages"]) == modules


@pytest.mark.parametrize("module, planted", [("window.py", "rollout"), ("engine/files.py", "data")])
def test_imports_run_one_way_and_a_planted_circle_is_found(tmp_path, module, planted):
    ignored = shutil.ignore_patterns(".git", "runs", ".cache", "tests", "benchmarks")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(copy / module, "a") as file:
        file.write(f"\nimport {planted}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert f"{module.removesuffix('.py').replace('/', '.')} -> {planted}" in done.stdout


def test_no_module_hides_one_of_pythons_own():
    modules = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    assert not modules & sys.stdlib_module_names


def test_the_tasks_are_those_that_the_settings_offer():
    for settings, own in ((TrainSettings, []), (AgentSettings, [""])):
        choices = settings.__dataclass_fields__["task"].metadata["choices"]
        assert choices == [*own, *TASKS]  # "": the model's own


def test_pip_install_says_that_there_is_nothing_to_install(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path, ROOT]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "no package: pip install -r requirements.txt, and run the programs" in done.stderr
