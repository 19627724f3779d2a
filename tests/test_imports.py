"""Import rules between packages, checked in the source so that lazy imports inside functions count as well."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"vlpet_lightning", "data_modules", "callbacks"}
# parts of transformers that may be imported outside the backbones: containers and types
NEUTRAL = {
    "transformers.PretrainedConfig",
    "transformers.PreTrainedTokenizerBase",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(path: Path, *, typing: bool = True) -> set[str]:
    """Return the dotted names that a file imports (``from a.b import c`` is ``a.b.c``).

    Args:
        path: A Python file.
        typing: Whether to include imports under ``if TYPE_CHECKING``.
    """
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if _typing_only(node) and not typing:
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def files(where: str) -> list[Path]:
    """Return the Python files of a package, or one file."""
    path = ROOT / where
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def offences(where: str, forbidden, *, typing: bool = True, besides: tuple[str, ...] = ()) -> list[str]:
    """Return ``file: import`` for every forbidden import in a package or file."""
    skipped = {path for other in besides for path in files(other)}
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(where)
        if path not in skipped
        for name in sorted(imported(path, typing=typing))
        if forbidden(name)
    ]


def below(*packages: str):
    return lambda name: any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_reader_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = """
import a.b
from c import d as e
from . import sibling
from ..upper import thing
if TYPE_CHECKING:
    from typed import T
def lazy():
    import late
    from late.inner import more
"""
    (tmp_path / "pack" / "sub").mkdir(parents=True)
    file = tmp_path / "pack" / "sub" / "one.py"
    file.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    always = {"a.b", "c.d", "pack.sub.sibling", "pack.upper.thing", "late", "late.inner.more"}
    assert imported(file, typing=False) == always
    assert imported(file) == always | {"typed.T"}
    (tmp_path / "pack" / "__init__.py").write_text("from . import sub")
    assert imported(tmp_path / "pack" / "__init__.py") == {"pack.sub"}


@pytest.mark.parametrize("package", sorted(OURS))
def test_there_is_something_to_read(package):
    assert len(files(package)) > 5
    assert any(name.startswith("vlpet_lightning") for path in files(package) for name in imported(path))


def test_pet_imports_torch_the_standard_library_and_itself():
    allowed = {"torch", *sys.stdlib_module_names}
    own = below("vlpet_lightning.pet", "vlpet_lightning.checks", "vlpet_lightning.checksums")  # the lowest level
    assert offences("vlpet_lightning/pet", lambda name: name.split(".")[0] not in allowed and not own(name)) == []


def test_a_method_of_pet_knows_no_backbone_and_not_how_it_is_injected():
    forbidden = below("vlpet_lightning.pet.inject", "vlpet_lightning.pet.placement")
    besides = tuple(f"vlpet_lightning/pet/{name}.py" for name in ("__init__", "granularity", "inject", "serialization"))
    assert offences("vlpet_lightning/pet", forbidden, besides=besides) == []


def test_only_backbones_know_models_of_transformers():
    def knows(name: str) -> bool:
        return below("transformers")(name) and name not in NEUTRAL

    for package in OURS | {"experiments"}:
        assert offences(package, knows, besides=("vlpet_lightning/backbones",)) == []
    assert offences("vlpet_lightning/backbones", knows) != []


def test_the_library_imports_neither_data_modules_nor_callbacks():
    assert offences("vlpet_lightning", below("data_modules", "callbacks")) == []


def test_data_modules_and_callbacks_do_not_know_each_other():
    assert offences("data_modules", below("callbacks")) == []
    assert offences("callbacks", below("data_modules")) == []


def test_data_modules_know_tasks_and_batches_and_no_model():
    allowed = below(
        "vlpet_lightning.tasks",
        "vlpet_lightning.batch",
        "vlpet_lightning.checks",
        "vlpet_lightning.version",
        "vlpet_lightning.atomic_file",
        "vlpet_lightning.checksums",
        "vlpet_lightning.metrics",  # for `score`
        "vlpet_lightning.prediction_files",
        "vlpet_lightning.submissions",
        "vlpet_lightning.vision",  # encoders of images, which `ask` uses, too
        "vlpet_lightning.folder_lock",  # one process writes a store at a time
        "vlpet_lightning.cli.data_from_config",  # `data check` reads configs of `fit`
        "vlpet_lightning.backbones.load_tokenizer",
        "vlpet_lightning.run.signals.leave_it_to_the_run",  # for worker processes
        "vlpet_lightning.run.signals.end_workers_at_exit",
        "vlpet_lightning.backbones.damaged_weights",  # reads file headers: `data check` checks the backbone
        "vlpet_lightning.backbones.pool_grid",  # without parameters, applied once when a store is written
        "vlpet_lightning.backbones.visual.pool_grid",
    )
    assert offences("data_modules", lambda name: name.startswith("vlpet_lightning.") and not allowed(name)) == []


def test_callbacks_know_metrics_and_no_layer():
    forbidden = below("vlpet_lightning.pet", "vlpet_lightning.backbones", "vlpet_lightning.commands", "transformers")
    assert offences("callbacks", forbidden) == []


def test_metrics_know_neither_lightning_nor_the_rest_of_the_library():
    def forbidden(name: str) -> bool:
        rest = name.startswith("vlpet_lightning.") and not below("vlpet_lightning.metrics")(name)
        return rest or below("lightning", "pytorch_lightning", "transformers", "data_modules", "callbacks")(name)

    assert offences("vlpet_lightning/metrics", forbidden) == []


# each may import only those below it in this list
CHAIN = [
    "vlpet_lightning.commands",
    "vlpet_lightning.api",
    "vlpet_lightning.cli",
    "vlpet_lightning.module",
    "vlpet_lightning.interop",
    "vlpet_lightning.parameters",
    "vlpet_lightning.model",
    "vlpet_lightning.trainable",
    "vlpet_lightning.backbones",
    "vlpet_lightning.pet",
    "vlpet_lightning.batch",
]


@pytest.mark.parametrize("index", range(1, len(CHAIN)), ids=lambda index: CHAIN[index].rpartition(".")[2])
def test_a_layer_of_the_library_knows_only_those_below_it(index):
    path = CHAIN[index].replace(".", "/")
    where = path if (ROOT / path).is_dir() else f"{path}.py"
    assert offences(where, below(*CHAIN[:index]), typing=False) == []


# in data_modules, a package may import only itself and packages of lower levels
LEVELS = {
    "store": 1,
    "annotations": 2,
    "extraction": 2,
    "scoring": 3,
    "world": 3,
    "convert": 3,
    "streaming": 4,
    "batches": 5,
    "provenance": 6,
    "benchmark": 7,
    "check": 8,
    "image_text": 8,
    "video_text": 8,
}


@pytest.mark.parametrize("room", LEVELS)
def test_a_room_of_data_modules_imports_only_lower_levels(room):
    path = f"data_modules/{room}"
    allowed = below(
        *(f"data_modules.{other}" for other, level in LEVELS.items() if level < LEVELS[room] or other == room)
    )
    where = path if (ROOT / path).is_dir() else f"{path}.py"
    assert offences(where, lambda name: name.startswith("data_modules.") and not allowed(name)) == []


def test_every_file_of_data_modules_has_a_level():
    rooms = {path.relative_to(ROOT / "data_modules").parts[0] for path in files("data_modules")}
    assert {name.removesuffix(".py") for name in rooms} - {"__init__"} == set(LEVELS)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import themselves through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        pending = list(graph[start])
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending.extend(graph[name])
        return seen

    return sorted(name for name in graph if name in reachable(name))


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_no_module_imports_one_that_imports_it():
    """Imports under TYPE_CHECKING and inside functions count as well."""
    modules = {module_name(path): path for package in OURS for path in files(package)}
    graph = {
        name: {
            next((known for known in (found, found.rpartition(".")[0]) if known in modules), name)
            for found in imported(path)
        }
        - {name}
        for name, path in modules.items()
    }
    assert circles(graph) == []


PLAIN = ["model.py", "batch.py", "trainable.py", "tasks.py", "optim.py", "parameters.py", "backbones", "interop", "pet"]


def test_checks_import_the_standard_library_alone():
    assert offences("vlpet_lightning/checks.py", lambda name: name.split(".")[0] not in sys.stdlib_module_names) == []


@pytest.mark.parametrize("name", PLAIN)
def test_what_makes_a_model_needs_no_lightning(name):
    assert offences(f"vlpet_lightning/{name}", below("lightning", "pytorch_lightning", "jsonargparse")) == []


def test_who_imports_lightning_has_imported_the_cure_before():
    """The fix for torchvision runs in ``vlpet_lightning/__init__.py``, which other packages must import first."""
    for package in ("data_modules", "callbacks"):
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert isinstance(first, ast.Import), package
        assert first.names[0].name == "vlpet_lightning", package
    tree = ast.parse((ROOT / "vlpet_lightning" / "__init__.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert "torchvision_compat" in ast.unparse(first)


def test_the_cure_itself_imports_nothing_that_needs_it():
    allowed = {"torch", *sys.stdlib_module_names}
    cure = "vlpet_lightning/torchvision_compat.py"
    assert offences(cure, lambda name: name.split(".")[0] not in allowed) == []
