"""The boundaries between the parts of the project."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

SERVED = {"training", "training.artifact", "training.files", "training.generator_config"}
SERVED |= {"training.machine", "training.session"}
# It is imported on a machine with a GPU, and with it what builds networks of PyTorch.
ON_A_GPU = "service.inference.cuda"

TRAINING_ONLY = ("matplotlib", "pooch", "tensorboard", "tqdm")

TOP_LEVEL = {
    *("pyproject.toml", "Dockerfile", "docker-compose.yml", "README.md"),
    *("service", "training", "tests", "weights", "findings"),
}

# Each part of the service may import those to its right, and nothing of its own column or before.
DIRECTION = (
    "__main__ > commands > server > app > api > middleware, encoding > generation > inference "
    "> telemetry > errors, failure, settings, keys, disconnect, rate_limit"
)
MODULE_LINES, FUNCTION_LINES = 450, 60
DECLARATIVE: set[str] = set()  # functions that are tables of instruments or options
LEAVES = {"errors", "failure", "settings", "keys", "disconnect", "rate_limit"}


def fresh(code: str) -> list[str]:
    """Return the words that a fresh interpreter prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def modules(package: str) -> list[str]:
    paths = sorted((REPOSITORY / package).rglob("*.py"))
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    assert len(names) > 10
    return [name.removesuffix(".__init__") for name in names]


def import_all(names: list[str]) -> str:
    return f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def after_importing(package: str) -> tuple[list[str], list[str]]:
    """Import all of a package; return the loaded modules, and threads and CUDA's state."""
    names = [name for name in modules(package) if name != ON_A_GPU]
    code = import_all(names) + "import threading\nloaded = list(sys.modules)\nimport torch\n"
    code += "print(threading.active_count(), torch.cuda.is_initialized(), *loaded)"
    threads, initialized, *loaded = fresh(code)
    return loaded, [threads, initialized]


def test_training_never_imports_the_service() -> None:
    loaded, _ = after_importing("training")
    assert "training.run" in loaded
    assert [name for name in loaded if name.split(".")[0] == "service"] == []


def test_the_service_knows_of_training_only_what_artifacts_need() -> None:
    loaded, _ = after_importing("service")
    assert "service.app" in loaded
    assert {name for name in loaded if name.split(".")[0] == "training"} == SERVED


def test_a_supervisor_imports_little_before_it_starts_its_workers() -> None:
    loaded = fresh(
        "import sys\n"
        "import service.__main__, service.server.sizing, service.server.supervisor\n"
        "print(*sys.modules)"
    )
    heavy = {"fastapi", "starlette", "uvicorn", "prometheus_client", "numpy", "torch"}
    assert heavy & set(loaded) == set()


def test_the_service_needs_no_pytorch_on_a_cpu() -> None:
    loaded, _ = after_importing("service")
    assert {name.split(".")[0] for name in loaded} & {"torch", "onnx"} == set()
    made = fresh(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from service.inference.repository import load_repository\n"
        "from service.settings import parse_settings\n"
        "models = load_repository(parse_settings(['--device', 'cpu']))\n"
        "row = np.zeros(1, np.uint64), np.zeros(1, np.int64), np.zeros(1, np.int64)\n"
        "print(*(f'{model.name}:{model.engine(*row).shape[1]}' for model in models))"
    )
    assert made == ["fashion-mnist:28", "mnist:28", "mnist-mlp:28"]


def source_of(name: str) -> Path:
    stem = REPOSITORY / name.replace(".", "/")
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def own_imports(package: str) -> dict[str, set[str]]:
    """Return the modules of a package that each of its modules imports, at any place in it."""
    names = set(modules(package))
    packages = {name for name in names if source_of(name).name == "__init__.py"}
    return {name: (imports_of(source_of(name)) & names) - {name} - packages for name in names}


@pytest.mark.parametrize("package", ["service", "training"])
def test_no_imports_form_a_circle(package: str) -> None:
    graph = own_imports(package)
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= graph.keys()
    assert sum(map(len, graph.values())) > 10


def test_imports_of_the_service_run_in_one_direction() -> None:
    levels = [set(column.split(", ")) for column in DIRECTION.split(" > ")]
    level = {part: number for number, parts in enumerate(levels) for part in parts}
    wrong = []
    for name, imported in own_imports("service").items():
        part = name.split(".")[1] if "." in name else "__main__"
        for other in sorted(imported):
            target = other.split(".")[1]
            inside = target == part or {part, target} <= LEAVES
            if not inside and level[target] <= level[part]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("package", ["service", "training"])
def test_modules_and_functions_can_be_read_in_one_go(package: str) -> None:
    long = []
    for name in modules(package):
        path = source_of(name)
        text = path.read_text()
        if len(text.splitlines()) > MODULE_LINES:
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES and f"{name}.{node.name}" not in DECLARATIVE:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []


def test_what_trains_does_not_know_what_watches_it() -> None:
    """Steps know no files, no judge and no terminal; networks and losses know nothing at all."""
    graph = own_imports("training")

    def known(name: str) -> set[str]:
        return graph[name] | {each for below in graph[name] for each in known(below)}

    foundation = {"training.losses", "training.data.augmentation", "training.generator_config"}
    for name in (*foundation, "training.distributed", "training.files", "training.machine"):
        assert graph[name] == set(), name
    foundation |= {"training.networks"}
    assert graph["training.networks"] == {"training.generator_config"}
    stepping = foundation | {"training.config", "training.data.named", "training.distributed"}
    stepping |= {"training.data.cifar", "training.files", "training.state"}
    assert known("training.loop") <= stepping
    stepping |= {"training.loop"}
    assert known("training.cuda_graph") <= stepping
    assert "training.run" not in known("training.gamma_search") | known("training.checkpoint")
    assert not {"training.run", "training.loop"} & known("training.quality.evaluator")


def test_the_service_needs_nothing_that_only_training_is_installed_with() -> None:
    """They are hidden instead of looked for: PyTorch itself takes tqdm where it finds it."""
    hide = f"import sys\nfor name in {TRAINING_ONLY}: sys.modules[name] = None\n"
    fresh(
        hide + import_all([name for name in modules("service") if name != "service.commands.fetch"])
    )
    fresh(hide + "sys.modules['click'] = None\nimport service.app")  # which uvicorn needs, later
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        fresh(hide + "import training.data.named")


@pytest.mark.parametrize("package", ["service", "training"])
def test_importing_does_no_work(package: str) -> None:
    """No thread, no child, no output, no compute device."""
    _, done = after_importing(package)
    assert done == ["1", "False"]


def test_the_service_can_unpickle_nothing() -> None:
    paths = sorted((REPOSITORY / "service").rglob("*.py"))
    paths += [REPOSITORY / f"{name.replace('.', '/')}.py" for name in SERVED - {"training"}]
    assert len(paths) > 10
    for path in paths:
        assert not imports_of(path) & {"pickle", "joblib", "dill", "shelve", "marshal"}, path
        assert not any(is_torch_load(node) for node in ast.walk(ast.parse(path.read_text()))), path


def is_torch_load(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "load"
        and isinstance(node.value, ast.Name)
        and node.value.id in ("torch", "numpy", "np")
    )


def test_the_top_level_holds_the_four_folders_and_what_belongs_to_the_whole() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a clone")
    if not listed:
        pytest.skip("not a clone of its own")
    names = {Path(line).parts[0] for line in listed}
    extra = {name for name in names - TOP_LEVEL if not name.startswith(".")}
    assert {name for name in extra if not name.endswith((".lock", "requirements.txt"))} == set()
    assert {"pyproject.toml", "service", "training", "tests"} <= names


def test_weights_hold_no_code() -> None:
    suffixes = {path.suffix for path in (REPOSITORY / "weights").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".png", ".md"}
