"""The layout of the project: names that other files rely on exist, and imports run one way."""

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ministral
from decoder import why_not
from reference import golden, mutants

ROOT = Path(__file__).resolve().parent.parent

# From low to high: a file imports files of lower layers only.
LAYERS = (
    ("checks", "blockwise", "products"),
    ("checkpoint",),
    ("cli",),
    ("outputs",),
    ("trainable",),
    ("pretrained",),
    ("ministral",),
    ("ministral3",),
    ("vision_config",),
    ("vision", "heads", "fast"),
    ("model_types", "recorded_step"),
    ("images",),
    ("tokenizer",),
    ("settings", "decoder"),
    ("generate",),
    ("chat",),
    ("processor", "terminal"),
    ("auto", "command"),
)
LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}
MODELS = {
    "blockwise", "products", "outputs", "trainable", "pretrained", "ministral", "ministral3", "vision_config", "vision",
    "heads", "fast", "recorded_step",
}  # fmt: skip

# Imports against that order: (file, module, whether the import is inside a function).
EXCEPTIONS = {
    ("checkpoint/__main__.py", "cli", False),  # a command
    ("checkpoint/expected.py", "model_types", True),  # builds the model that a configuration describes
    ("command.py", "reference", True),  # the check of a device
    ("generate.py", "command", True),  # `main`, the command line
    ("pretrained.py", "generate", True),  # `model.generate`
    ("pretrained.py", "settings", True),
}


# --------------------------------------------------------------------------------------- names of the known mistakes


@pytest.fixture
def replaced():
    """All (owner, name) that the known mistakes replace."""
    return frozenset().union(*(mutant.replaced for mutant in mutants.MUTANTS.values()))


def test_every_name_that_a_mistake_replaces_is_defined_there(replaced):
    """A function that only is imported, or a method that only is inherited, has callers that use another one."""
    assert len(replaced) >= 15
    for owner, name in replaced:
        assert name in vars(owner), f"reference/mutants replaces {owner.__name__}.{name}, which does not exist"
        value = vars(owner)[name]
        if not isinstance(value, ModuleType):
            module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
            assert value.__module__ == module, f"{owner.__name__}.{name} is defined in {value.__module__}"


def test_the_docstring_of_ministral_lists_the_names_that_mistakes_replace(replaced):
    expected = {"ATTENTION"}  # whose entries are replaced
    for owner, name in replaced:
        if owner is ministral:
            expected.add(name)
        elif getattr(owner, "__module__", "") == "ministral":
            expected |= {owner.__name__, name}
    sentence = re.search(r"`reference/mutants` replaces (.*?);", ministral.__doc__, re.DOTALL)[1]
    names = " ".join(re.findall(r"`([\w.]+)`", sentence))
    assert set(re.split(r"[. ]", names)) == expected


# ------------------------------------------------------------------------------------------------------- fast path


@pytest.mark.parametrize("name", ["ministral", "ministral3", "mistral3"])
def test_the_fast_path_is_taken(name):
    """`why_not` decides by the modules of classes: it must not refuse a model because a class has moved."""
    assert why_not(golden.models()[name]) is None


# --------------------------------------------------------------------------------------------------------- imports


def project_names():
    """The modules and packages of the project."""
    files = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    return files | packages


def layered_files():
    """The files of all layers: path from the root -> module."""
    files = {}
    for name in LEVELS:
        if (ROOT / f"{name}.py").is_file():
            files[f"{name}.py"] = name
        for path in (ROOT / name).glob("*.py"):
            files[path.relative_to(ROOT).as_posix()] = name
    return files


def imports(path):
    """The imports of the project's modules in a file: (module, whether the import is inside a function).

    Imports for type checkers count as imports at module level."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    result = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # relative imports stay in their package
            modules = [node.module]
        result |= {(module.partition(".")[0], id(node) in late) for module in modules}
    return {(module, is_late) for module, is_late in result if module in project_names()}


def test_every_module_has_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} <= LEVELS.keys()
    assert set(LEVELS) == set(layered_files().values())


def test_imports_run_one_way():
    against = set()
    for path, name in layered_files().items():
        for module, is_late in imports(path):
            level = LEVELS.get(module, len(LAYERS))  # reference, training, tests, ... are above all layers
            if level >= LEVELS[name] and module != name:
                against.add((path, module, is_late))
    assert against == EXCEPTIONS


@pytest.mark.parametrize("name", ["images", "tokenizer"])
def test_files_of_images_and_tokens_import_no_model(name):
    for path, module in layered_files().items():
        if module == name:
            assert not MODELS & {imported for imported, _ in imports(path)}, path


def test_checkpoint_imports_no_model_at_module_level():
    above = set(LEVELS) - {"checks", "checkpoint", "cli"}
    for path, module in layered_files().items():
        if module == "checkpoint":
            assert not above & {imported for imported, is_late in imports(path) if not is_late}, path


def test_the_models_read_no_files():
    """They do not import `checkpoint`; `vision.py` takes one function from it, about names."""
    for name in ("ministral", "ministral3", "heads"):
        assert "checkpoint" not in {module for module, _ in imports(f"{name}.py")}, name
    nodes = list(ast.walk(ast.parse((ROOT / "vision.py").read_text(encoding="utf-8"))))
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "checkpoint" for node in nodes)
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    assert {node.attr for node in attributes if node.value.id == "checkpoint"} == {"text_name"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_names_that_notebooks_import_exist(path):
    """Executing the notebooks takes a minute; this finds a name that has moved."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        lines = [line for line in cell["source"] if not line.lstrip().startswith(("%", "!"))]  # IPython's commands
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in project_names():
                names = [alias.name for alias in node.names]
                module = importlib.import_module(node.module)
                for name in names:
                    found += 1
                    is_package = importlib.util.find_spec(node.module).submodule_search_locations is not None
                    if not hasattr(module, name) and is_package:
                        importlib.import_module(f"{node.module}.{name}")  # a file of a package
                    assert hasattr(module, name), f"{node.module} has no {name}"
    assert found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_package_has_every_module_and_its_commands():
    """`pip install .` installs what pyproject.toml lists: every file of the root, the packages, and three commands."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]
    assert listed["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks", "examples", "notebooks"} <= set(listed["packages"])
    for package in listed["packages"]:
        assert (ROOT / package.replace(".", "/")).is_dir()
    for command in project["project"]["scripts"].values():
        module, _, function = command.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
