"""What is stored of the teacher: one file a field kind, found by folder; a reader composes them (student_train.teacher_view).

A field kind module defines ``FIELDS`` (the names it serves) and ``create(name, params, calibration=None) -> Field``; one that reads older
versions too, ``VERSIONS`` and ``described(version, params)``: the parameters of such a description as ``create`` takes them; one that
reads what ``create`` no longer makes, ``reader(name, params) -> Field | None``. A field with
``calibrated`` True is fitted once on a few hundred samples (``fit``), committed, and bound to its calibration (``with_calibration``).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration
from teacher_cache.plugins import with_plugins
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.wants import Wants

DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What torch and numpy raise of tensors that are not what a reader takes them for."""


class Field(Protocol):
    """One column of the cache.

    Attributes:
        name: folder name under ``fields/``.
        version: of the stored layout; an unknown one is refused by name.
        params: JSON-able, complete: with them ``create`` makes the same field again. Bound in ``field.json``.
        wants: what the teacher must compute.
        calibrated: it needs a ``Calibration`` to encode or decode.
        temperatures: at which the stored distributions are valid; None: at all of them.

    A field may have besides, where its records are read by training and its bytes are planned:

    - ``shape``: axes of what ``decode`` gives: kinds of rows (``vision``, ``response``, ``text``), ``width`` (the teacher's hidden states')
      or None for any number. A record of another shape is refused where it is read; without it anything is taken.
    - ``coded_rows(vision, response, text) -> int``: what its bytes are counted by; without it, the rows that it wants.
    - ``guess_bytes(vocabulary, heads) -> float`` of such a row, and, of a calibrated one, ``guess_files(width, vocabulary)``, bytes by
      role: asked by ``kdcli plan`` where shapes do not decide the bytes.
    """

    name: str
    version: int
    params: Mapping[str, Any]
    wants: Wants
    calibrated: bool
    temperatures: tuple[float, ...] | None

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        """The tensors that are stored for one row of the mixture."""
        ...

    def decode(self, stored: dict[str, torch.Tensor]) -> Any:
        """What a reader works with (the field module states its type).

        A field may have ``decode_many`` besides, of a sequence of ``stored``, where several at once are cheaper; or the two halves of it:
        ``read_many``, of ``stored`` to records that are ``Coded``, and ``restore``, of those and a device to what ``decode`` gives, there.
        """
        ...


class CalibratedField(Field, Protocol):
    """A field that is fitted before the job starts.

    Attributes:
        settled_last: parameters on which only the end of a fit depends: fields that differ in these alone share a ground
            (``GroundedField``); none: a fit has no such end.
    """

    settled_last: tuple[str, ...]

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Learn from what the teacher said of the calibration samples; head W ``[V, D]``."""
        ...

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> CalibratedField:
        """The same field, ready to encode and decode."""
        ...


class GroundedField(CalibratedField, Protocol):
    """One whose fit has two halves: ``fit(outputs, head)`` is ``fit_on(ground(outputs, head), head)``."""

    def ground(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Any:
        """The half that does not depend on ``settled_last``."""
        ...

    def fit_on(self, ground: Any, head: torch.Tensor) -> Calibration:
        """The other half."""
        ...


def field_kinds() -> dict[str, ModuleType]:
    """The module that serves each field name, those of installed packages too (``kdcli.fields``)."""
    kinds = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        kinds.update(dict.fromkeys(getattr(module, "FIELDS", ()), module))
    return with_plugins("kdcli.fields", kinds, _names)


def _names(module: ModuleType) -> tuple[str, ...]:
    _ = module.create
    return tuple(module.FIELDS)


def create_field(
    name: str, params: Mapping[str, Any] | None = None, calibration: Mapping[str, torch.Tensor] | None = None
) -> Field:
    """A field by name; KdcliError listing the choices, or naming the unknown parameter."""
    kinds = field_kinds()
    if name not in kinds:
        raise KdcliError(f"unknown field {name!r}: the fields are {', '.join(sorted(kinds))}")
    try:
        field: Field = kinds[name].create(name, dict(params or {}), *([calibration] if calibration is not None else []))
    except TypeError as error:
        raise KdcliError(f"field {name}: {error}") from None
    if not isinstance(wants := getattr(field, "wants", None), Wants):
        raise KdcliError(
            f"field {name} of {kinds[name].__name__}: wants is {wants!r}: declare a teacher_cache.wants.Wants, as "
            'Wants(topk={"response": 1}) for {"topk.response:1"} (docs/add_a_field.md)'
        )
    return field


def shape_of(field: Field) -> tuple[str | None, ...]:
    """Axes of what ``decode`` gives; () where the field says nothing of them."""
    return tuple(getattr(field, "shape", ()))


def wants_of(fields: Iterable[Field]) -> Wants:
    """What the teacher must compute for all of them."""
    return Wants.together(one.wants for one in fields)


def open_field(
    name: str, description: Mapping[str, Any], calibration: Mapping[str, torch.Tensor] | None = None
) -> Field:
    """The field as a cache's ``field.json`` describes it; refuses an unknown version by name."""
    kinds = field_kinds()
    if name not in kinds:
        raise CacheError(f"unknown field {name!r}: this kdcli reads {', '.join(sorted(kinds))}")
    # Asked first: another version may have parameters that this one does not know.
    ours = getattr(kinds[name], "VERSIONS", None) or (create_field(name).version,)
    if (version := description["version"]) not in ours:
        known = ", ".join(map(str, ours))
        raise CacheError(f"field {name} version {version} is not readable: this kdcli reads {known}")
    try:
        params = described_params(name, version, description["params"])
        read_only: Field | None = getattr(kinds[name], "reader", lambda name, params: None)(name, params)
        return read_only or create_field(name, params, calibration)
    except CacheError:
        raise
    except KdcliError as error:
        raise CacheError(f"{error}: its field.json was not written by this kdcli") from None
    except DAMAGE as error:
        raise CacheError(f"field {name}: its parameters or calibration cannot be used ({_said(error)})") from None


def described_params(name: str, version: int, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with which ``create_field`` makes a described field: those of an older version may have lacked some."""
    described = getattr(field_kinds()[name], "described", None)
    return described(version, params) if described else dict(params)


def decode_record(field: Field, data: bytes, place: str, coded: bool = False) -> Any:
    """What a reader works with, from the bytes of a tar member; CacheError naming ``place`` where they are no record of the field.

    Args:
        coded: only read where the field tells reading and restoring apart.
    """
    try:
        stored = container.unpack(data, place)
        if coded and (read := getattr(field, "read_many", None)):
            return read([stored])[0]
        return field.decode(stored)
    except KdcliError as error:
        said = str(error)
        raise CacheError(said if said.startswith(place) else f"{place}: {said}") from None
    except DAMAGE as error:
        raise CacheError(
            f"{place}: no record of field {field.name} ({_said(error)}): run `kdcli cache verify`"
        ) from None


def decode_records(field: Field, records: Sequence[tuple[bytes, str]], coded: bool = False) -> list[Any]:
    """``decode_record`` of several (bytes, place); all at once by a field that has ``decode_many``."""
    if many := (getattr(field, "read_many", None) if coded else None) or getattr(field, "decode_many", None):
        try:
            return list(many([container.unpack(*one) for one in records]))
        except (KdcliError, *DAMAGE):
            pass  # one of them is damaged: which one is found below
    return [decode_record(field, *one, coded=coded) for one in records]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
