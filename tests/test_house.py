"""The house: every module has its place in the contracts on imports, a circle is found, and what
the documents name is there."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import settings
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
    for kind, own in ((TrainSettings, []), (AgentSettings, [""])):
        choices = kind.__dataclass_fields__["task"].metadata["choices"]
        assert choices == [*own, *TASKS]  # "": the model's own


# -------------------------------------------------------------------------------- the documents

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.py")),  # their docstrings
]
OF_OTHERS = set("no-build-isolation port model-path nproc_per_node nnodes rdzv_backend".split())
OF_OTHERS |= {"rdzv_endpoint", "check", "help"}
YOURS = {"pairwise.py", "prompts/pairwise.toml", "prompt.toml"}


def text_of(document: Path) -> str:
    text = document.read_text()
    return text if document.suffix == ".md" else ast.get_docstring(ast.parse(text))


def flags_of(program: Path) -> set[str]:
    """The fields of the settings that a program names, and the flags that it spells out."""
    text = program.read_text()
    kinds = (getattr(settings, kind, None) for kind in re.findall(r"\b\w+Settings\b", text))
    own = re.findall(r"""--(\w[\w-]*)""", re.sub(r'""".*?"""', "", text, flags=re.DOTALL))
    return {name for kind in kinds if kind for name in kind.__dataclass_fields__} | set(own)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_programs_flags_and_files_that_are_there(document):
    text = text_of(document).replace("\\\n", " ")
    known = set(OF_OTHERS)
    for program in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.*"), ROOT / "tests" / "faults.py"]:
        known |= flags_of(program) if program.suffix in (".py", ".sh") else set()
    assert set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text)) <= known
    for program, rest in re.findall(r"(?:python|torchrun.*?) ([\w/]+\.py)([^\n|`#]*)", text):
        named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", rest))
        assert named <= flags_of(ROOT / program) | OF_OTHERS, program
    for file in set(re.findall(r"`([\w/]+\.(?:py|sh|toml))`", text)) - YOURS:
        folders = (ROOT, document.parent, ROOT / "sources")
        assert any((folder / file).exists() for folder in folders), file
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1400


def test_a_function_is_in_the_file_that_the_documents_name():
    text = "\n".join(map(text_of, DOCUMENTS))
    named = [(file, name) for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)]
    named += re.findall(r"^ *([\w/]+\.py) +(\w+) {2,}", text, re.MULTILINE)  # README's call traces
    assert len(named) > 20
    for file, name in named:
        defined = rf"^(def|class) {name}\b|^{name}\b.*="
        assert re.search(defined, (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("name", [p.stem for p in ROOT.glob("*.py") if "@program" in p.read_text()])
def test_a_program_says_what_it_does(name, monkeypatch, capsys):
    module = import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert module.__doc__.split("\n")[0] in " ".join(capsys.readouterr().out.split())


def test_pip_install_says_that_there_is_nothing_to_install(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path, ROOT]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "no package: pip install -r requirements.txt, and run the programs" in done.stderr
