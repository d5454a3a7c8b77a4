"""``--store``: what each profile stores, and what a student can learn from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.capture.profiles import PROFILES, chosen_fields
from pipelines.inspect.cache import check, inspect, status
from pipelines.inspect.find_sample import Asked
from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.fields import create_field
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.commit import read_commit
from teacher_cache.teachers.transformers import TransformersTeacher


@pytest.fixture(scope="session")
def profile_cache(make_request, standard: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {"standard": standard}

    def cache(store: str) -> Path:
        if store not in made:
            made[store] = tmp_path_factory.mktemp(store) / "cache"
            capture(make_request(made[store], fields=(), store=store))
        return made[store]

    return cache


def settings_of(student: Path | str, output: Path) -> Settings:
    return Settings(
        train=TrainSettings(
            student=str(student),
            output_dir=str(output),
            per_device_train_batch_size=4,
            max_steps=1,
            report_to="none",
        )
    )


def test_every_field_of_every_profile_exists() -> None:
    for store in PROFILES:
        for name, params in chosen_fields(store, (), {}).items():
            create_field(name, params)


def test_parameters_go_over_the_profiles() -> None:
    fields = chosen_fields("standard", (), {"vision_topk": {"k": 4}, "vision_hidden": {"step": 0.3}})
    assert fields["vision_topk"] == {"k": 4}
    assert fields["vision_hidden"] == {"codec": "sketch", "step": 0.3}
    assert fields["response_topk"] == PROFILES["standard"]["response_topk"]
    assert list(fields) == list(PROFILES["standard"]), "in writing order"


def test_another_codec_or_layout_drops_what_belonged_to_the_first() -> None:
    given = {"vision_hidden": {"codec": "int8"}, "affinity": {"layout": "dense"}}
    fields = chosen_fields("standard", (), given)
    assert fields["vision_hidden"] == {"codec": "int8"} and fields["affinity"] == {"layout": "dense"}
    for name in given:
        create_field(name, fields[name])
    same = chosen_fields("standard", (), {"vision_hidden": {"codec": "sketch"}})
    assert same["vision_hidden"] == PROFILES["standard"]["vision_hidden"]


def test_single_fields_take_the_place_of_the_profile() -> None:
    assert chosen_fields("standard", ("relation",), {}) == {"relation": {}}
    one = chosen_fields("compact", ("vision_hidden",), {"vision_hidden": {"codec": "fp32"}})
    assert one == {"vision_hidden": {"codec": "fp32"}}
    assert chosen_fields("none", (), {}) == {}


def test_what_is_not_captured_has_no_parameters() -> None:
    with pytest.raises(
        KdcliError, match=r"parameters for relation, but these fields are not captured: add them to --fields"
    ):
        chosen_fields("standard", (), {"relation": {}})
    with pytest.raises(KdcliError, match=r"--store 'tiny': choose from compact, standard, none, exact"):
        chosen_fields("tiny", (), {})


def test_profiles_are_never_changed_by_their_users() -> None:
    chosen_fields("standard", (), {})["vision_topk"]["k"] = 99
    assert chosen_fields("standard", (), {})["vision_topk"] != {"k": 99}


@pytest.mark.parametrize("store", PROFILES)
def test_every_profile_captures_whole(profile_cache: Callable[[str], Path], store: str) -> None:
    cache = TeacherCache(str(profile_cache(store)))
    assert set(cache.fields) == set(PROFILES[store])
    assert check(cache) == []
    for column in status(cache)["columns"].values():
        assert column["rows"] == column["written"] == 31 and column["skipped"] == {}
    rows = CachedSamples(cache, cache.parts(), sorted(cache.fields))
    row = rows.read(0, 0)
    for name, record in row.fields.items():
        kind = name.split("_")[0]
        expected = len(row.text.response_ids) if kind == "response" else sum(one.tokens() for one in row.layout)
        assert len(record) == expected, name
    if store != "none":
        shown = inspect(cache, Asked())
        assert len(shown.response) == len(row.text.response_ids)


TRAINS = [("standard", {}, []), ("exact", {}, []), ("compact", {"gamma": 0.0}, ["lower bound"])]


@pytest.mark.parametrize(("store", "knobs", "said"), TRAINS)
def test_llava_kd_takes_a_step(
    profile_cache, tiny_student: Path, tmp_path: Path, store: str, knobs: dict[str, Any], said: list[str]
) -> None:
    notes: list[str] = []
    settings = settings_of(tiny_student, tmp_path / "run")
    done = train(str(profile_cache(store)), "llava-kd", settings, "DFT", knobs=knobs, say=notes.append)
    assert done["stages"][0]["steps"] == 1
    assert (Path(done["model"]) / "model.safetensors").is_file()
    assert all(any(words in note for note in notes) for words in said)
    assert bool(notes) == bool(said), notes


def test_samples_alone_train_without_a_teacher(profile_cache, tiny_student: Path, tmp_path: Path) -> None:
    done = train(str(profile_cache("none")), "sft", settings_of(tiny_student, tmp_path / "run"))
    assert done["stages"][0]["steps"] == 1


REFUSED = [
    ("compact", {"temperature": 2.0}, r"needs response_logits \(forward, T=2\).*valid at temperature 1 only"),
    ("compact", {}, r"needs vision_relation, served by vision_hidden or relation"),
    ("none", {}, r"needs \w+.* the cache has no field: add one with `kdcli cache add-field"),
]


@pytest.mark.parametrize(("store", "knobs", "said"), REFUSED)
def test_what_a_profile_cannot_serve_is_refused_before_any_model_loads(
    profile_cache, tiny_student: Path, tmp_path: Path, store: str, knobs: dict[str, Any], said: str
) -> None:
    bare = tmp_path / "student"  # without weights
    bare.mkdir()
    for file in tiny_student.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CompatibilityError, match=said) as caught:
        train(str(profile_cache(store)), "llava-kd", settings_of(bare, tmp_path / "run"), "DFT", knobs=knobs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_standard_at_another_temperature_says_what_is_approximate(
    profile_cache, tiny_student: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    settings = settings_of(tiny_student, tmp_path / "run")
    train(str(profile_cache("standard")), "llava-kd", settings, "DFT", knobs={"temperature": 2.0}, say=notes.append)
    approximate = [note for note in notes if "at T=2 the tail's mass is approximate" in note]
    assert len(approximate) == 2, notes
    assert any("response_topk + response_hidden" in note for note in approximate)


def test_standard_is_smaller_than_exact_even_here(profile_cache) -> None:
    """On a teacher only 48 wide, whose bfloat16 states are as small as they come, and random: no dimension is idle."""

    def size(store: str, *names: str) -> int:
        columns = [TeacherCache(str(profile_cache(store))).column(name) for name in names]
        entries = [entry for column in columns for shard in range(5) for entry in column.entries(shard)]
        return sum(member.size for entry in entries for member in entry.members)

    assert size("standard", "vision_topk", "vision_hidden") < 0.9 * size("exact", "vision_hidden")


def test_a_teacher_that_says_nan_of_some_rows(make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN at one vision row, infinity at one text token: skipped in every field with the reason, never stored, never calibrated on."""
    say = TransformersTeacher.__call__
    bad = {
        ("sft", 3): ("text", torch.inf),
        ("caption", 7): ("vision", torch.nan),
        ("sft", 11): ("response", -torch.inf),
    }

    def broken(self: Any, prepared: Any, wants: Any) -> Any:
        outputs = say(self, prepared, wants)
        for one, output in zip(prepared, outputs):
            kind, value = bad.get((one.part, int(one.key.split("-")[0])), ("", 0.0))
            if kind:
                output.hidden[kind] = output.hidden[kind].clone()
                output.hidden[kind][-1, 0] = value
        return outputs

    monkeypatch.setattr(TransformersTeacher, "__call__", broken)
    out = tmp_path / "c"
    summary = capture(make_request(out, fields=(), store="standard"))
    for name, column in summary["columns"].items():
        assert column["rows"] == 31 == column["written"] + sum(column["skipped"].values())
        assert column["skipped"] == ({} if name == "samples" else {"nonfinite_teacher": 3}), name
    cache = TeacherCache(str(out))
    assert check(cache) == []
    for name in cache.fields:
        commits = [read_commit(cache.storage, f"fields/{name}", shard) for shard in range(5)]
        skips = [skip for commit in commits for skip in commit.skipped]
        assert {(skip.part, skip.ordinal) for skip in skips} == set(bad)
        assert all(skip.place and "NaN or infinity" in skip.detail for skip in skips)
    rows = CachedSamples(cache, cache.parts(), sorted(cache.fields))
    assert sum(rows.counts) == 28
    for position, count in enumerate(rows.counts):
        for row in range(count):
            found = rows.read(position, row)
            vision = sum(image.tokens() for image in found.layout)
            assert rows.tokens([(position, row)]) == [len(found.text.ids) + vision], (
                "of the same row, without reading it"
            )
            found.fields["affinity"] = found.fields["affinity"][:, found.text.response]  # others are not stored
            for record in found.fields.values():
                tensors = [record] if isinstance(record, torch.Tensor) else list(vars(record).values())
                assert not any(torch.isnan(one).any() for one in tensors)
