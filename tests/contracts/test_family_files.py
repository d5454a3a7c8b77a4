"""Every file of ``teacher_cache/families/`` is found and answers for models that transformers knows; the page on adding one is complete."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import teacher_cache.families as folder
from teacher_cache.families import GENERIC, families, family_named, family_of
from teacher_cache.families.family import Family

NO_FAMILIES = {"family", "decoders"}
PAGE = Path(__file__).parents[2] / "docs" / "add_a_family.md"


def test_every_file_is_a_family() -> None:
    names = {one.name for one in iter_modules(folder.__path__)} - NO_FAMILIES
    found = {import_module(f"{folder.__name__}.{name}").FAMILY for name in names}
    assert found == set(families()) and len(found) == len(names)
    assert {type(one).__module__ for one in found} == {f"{folder.__name__}.{name}" for name in names}


def test_a_model_type_has_one_family_that_transformers_knows() -> None:
    types = [name for one in families() for name in one.model_types]
    assert len(types) == len(set(types)) and set(types) <= set(CONFIG_MAPPING.keys())
    assert all(name in family_named(name).model_types for name in types)


def test_a_model_without_a_file_gets_the_generic_answers() -> None:
    assert family_of(SimpleNamespace(model_type="of_tomorrow")) is GENERIC and family_of(None) is GENERIC


def test_the_page_names_all_that_a_family_answers_and_shows_a_file_as_it_is() -> None:
    text = PAGE.read_text()
    asked = {name for name in vars(Family) if not name.startswith("_")}
    told = set(re.findall(r"^\| `(\w+)", text, flags=re.MULTILINE))
    assert told == asked
    (shown,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert shown == (Path(folder.__file__).parent / "internvl.py").read_text()
