"""What an installation brings and asks for: the licence, and no dependency that nothing a user runs imports."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from setuptools import find_packages

from tests.test_imports import HOUSES, ROOT, files, imported

APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""sha256 of the text that www.apache.org gives out."""
IMPORTED_AS = {"pillow": "PIL", "tensorboard": "torch.utils.tensorboard"}


def test_the_wheel_contains_the_licence_and_the_library(tmp_path: Path) -> None:
    """Of a tree with the project's own files on top and the library alone, which build in a second."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "kdcli", tmp_path / "kdcli", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "dist" / done.stdout.splitlines()[-1]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata.replace("METADATA", "licenses/LICENSE"))
        said = wheel.read(metadata).decode()
        library = {name for name in wheel.namelist() if name.startswith("kdcli/")}
    assert hashlib.sha256(text).hexdigest() == APACHE_2
    assert library == {f"kdcli/{name}" for name in ("__init__.py", "__main__.py", "losses.py", "py.typed")}
    assert "License-Expression: Apache-2.0" in said and "License-File: LICENSE" in said


def test_every_package_is_installed() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent for house in HOUSES for path in files(house)} - {ROOT}
    there = {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders}
    assert set(find_packages(str(ROOT), include=include)) == there


def imports_of_docs() -> set[str]:
    blocks = [
        block
        for page in sorted((ROOT / "docs").glob("*.md"))
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_no_dependency_is_for_the_tests_alone() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[<>=\[]", one)[0] for one in asked]
    used = {name for house in HOUSES for path in files(house) for _, name in imported(path)} | imports_of_docs()
    unused = [
        name for name in names if not any(f"{one}.".startswith(f"{IMPORTED_AS.get(name, name)}.") for one in used)
    ]
    assert not unused, f"nothing that a user runs imports {', '.join(unused)}"
