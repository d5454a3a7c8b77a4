"""The program code of a package is the project's own source, definition by definition, and needs nothing of the project."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipelines.export.flatten import OWN, flatten
from pipelines.export.package import MODELING, modeling_source, processing_source
from student_train.compressors import compressor_modules
from teacher_cache.errors import KdcliError

NAMES = sorted(compressor_modules())
ROOT = Path(__file__).parents[3]
HOUSE = ROOT / "student_train"


def definitions(source: str) -> dict[str, str]:
    """Classes, functions and constants of a file, as the parser sees them."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.dump(node.value)
    return found


def imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in names} | {
        (node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
    }


SHARED = {
    name: text
    for file in ("compression.py", "compressors/__init__.py", "compressors/windows.py", "compressors/attention.py")
    for name, text in definitions((HOUSE / file).read_text()).items()
} | definitions((ROOT / "teacher_cache" / "errors.py").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_package_holds_the_compressors_own_source(name: str) -> None:
    source = modeling_source(name)
    shipped, own = definitions(source), definitions(Path(compressor_modules()[name].__file__ or "").read_text())
    module_class = next(one for one in own if one.lower() == name.replace("_", ""))
    assert shipped[module_class] == own[module_class] and shipped["build"] == own["build"]
    templates = definitions((ROOT / "pipelines" / "export" / "modeling.py").read_text())
    assert all(text in (own.get(one), SHARED.get(one), templates.get(one)) for one, text in shipped.items())
    assert imported(source) <= {
        "__future__",
        "collections",
        "dataclasses",
        "typing",
        "math",
        "torch",
        "transformers",
        "numpy",
    }
    compile(source, f"{MODELING}.py", "exec")


def test_the_processor_needs_transformers_alone() -> None:
    assert imported(processing_source()) == {"__future__", "typing", "transformers"}
    assert not imported(processing_source()) & set(OWN)


def test_two_things_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from student_train.compression import site_of_config\n\nSite = 1\n\n\ndef look(config):\n    return site_of_config(config)\n"
    (tmp_path / "clashing.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KdcliError, match="Site is defined twice"):
        flatten("clashing")
