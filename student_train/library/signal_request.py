"""Which of the teacher's signals are asked for: of which parts, by a method or need by need, and the fields that serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student_train.methods import DEFAULT, Method, create_method, hook
from student_train.needs import Need, Served, serve, whats
from student_train.token_ids import check_head, check_vocabulary
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.complete_fields import complete_fields


@dataclass(frozen=True)
class SignalRequest:
    """Decided before any row is read. method: None where single needs were asked for. besides: fields that are read for their records."""

    parts: tuple[str, ...]
    name: str
    method: Method | None
    served: Served
    besides: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every field that is read."""
        return sorted({*self.served.names, *self.besides})

    def check_student(self, cache: TeacherCache, processor: Any, config: Any) -> None:
        """CompatibilityError where these fields' teachers and this student cannot go together, before its weights are looked at."""
        fields = {name: cache.fields[name] for name in self.names}
        if self.method:
            hook(self.method, "check_student")(config, fields)
        check_head(config, fields, "the student")
        check_vocabulary(cache, set(fields), processor)


def request_signals(
    cache: TeacherCache,
    parts: Sequence[str] | None,
    method: str | Method | None,
    needs: Iterable[str | Need] | str | None,
    preset: str = DEFAULT,
    knobs: Mapping[str, Any] | None = None,
    fields: Sequence[str] = (),
) -> SignalRequest:
    """Either a method (its name, or an object with ``needs`` and ``terms``), or needs (``Need``, or a name of one).

    Args:
        fields: names of fields that are read besides, for their records.

    Raises:
        KdcliError: both, or neither; an unknown method, knob or need. CompatibilityError: the cache does not serve it.
    """
    chosen = tuple(cache.parts() if parts is None else parts)
    cache.shards(chosen)  # refuses a part that is not there
    if fields and method is None and needs is None:
        needs = ()
    if (method is None) == (needs is None):
        raise KdcliError("say what is asked of the teacher: a method, or needs (a list of them, [] for none), not both")
    if method is None:
        given = [needs] if isinstance(needs, str) else list(needs or ())
        wanted, name, made = {_need(one) for one in given}, "of your own", None
    elif isinstance(method, str):
        made, name = create_method(method, preset, knobs), method
        wanted = set(made.needs())
    else:
        if knobs or preset != DEFAULT:
            raise KdcliError(
                "presets and knobs belong to a method's name: a method that is given as an object has its own"
            )
        made, name = method, type(method).__name__
        wanted = set(made.needs())
    params = {one: cache.fields[one]["params"] for one in complete_fields(cache, chosen)}
    if missing := [one for one in fields if one not in params]:
        raise CompatibilityError(
            f"{cache.storage}: no field {missing[0]} in part {', '.join(chosen)}; it has {', '.join(sorted(params))}: "
            f"add it with `kdcli cache add-field`"
        )
    return SignalRequest(chosen, name, made, serve(wanted, params, name, str(cache.storage)), tuple(fields))


def _need(one: str | Need) -> Need:
    if isinstance(one, Need):
        return one
    if one not in whats():
        raise KdcliError(f"no need {one!r}: choose from {', '.join(whats())}, or give a student_train.needs.Need")
    return Need(one)
