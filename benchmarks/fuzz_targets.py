"""What is fuzzed: every reader of bytes that another person may have written, with whole documents to begin from.

A target reads bytes and may raise its own kind of error only. Inputs are random bytes, a whole document with bytes changed, and, where the
document has parts, one with a part exchanged and every checksum made right again, so that what comes behind the checksums is reached.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st

from pipelines.capture import canaries, heartbeat
from pipelines.settings import FILE, load_settings, write_template
from pipelines.terminal.tables import work_lines
from teacher_cache.codecs import adaptive, container, frame
from teacher_cache.errors import CacheError, DataError, KdcliError, SkipSample
from teacher_cache.fields import create_field, decode_record, open_field
from teacher_cache.models.head import topk_rows
from teacher_cache.planning.plan import Part, Plan, Slice
from teacher_cache.planning.plan_file import parse_plan
from teacher_cache.reading import verify
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Image, Prepared, RowGroup, Sample, SkipRecord, TeacherOutput, TextTokens, Turn
from teacher_cache.samples import decode_sample, encode_sample
from teacher_cache.shards.commit import Commit, parse_commit
from teacher_cache.shards.index import SCHEMA, dump_index, parse_index
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.usable_samples import check_sample, decode_image
from teacher_cache.teachers.sampling import sample_batch
from teacher_cache.wants import NOTHING, Wants

Build = Callable[[Any], bytes]
"""Draws (``hypothesis.data``) → an input."""
V, D, VISION, RESPONSE, TEXT = 40, 6, 6, 5, 9
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("vision_topk", {"k": 4}),
    *(("vision_hidden", {"codec": codec}) for codec in ("bf16", "fp32", "int8", "int4", "sketch")),
    *(("vision_sampled", {"sampler": sampler}) for sampler in ("threshold", "random")),
    ("vision_hidden", {"codec": "sketch", "codec_version": 1}),
    *(("affinity", {"layout": layout}) for layout in ("dense", "factored")),
    ("affinity", {"layout": "factored", "text": "all", "codec_version": 1}),
    *(("attention", {}), ("relation", {}), ("vision_features", {"codec": "int8"})),
]
WIDE = 64
WIDE_FIELDS = (("vision_hidden", (("codec", "sketch"),)), ("affinity", (("layout", "factored"),)))
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 255, 65535, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, 2**63, 10**30])
FLOATS = st.floats() | st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 5e-324])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "..", "../../etc/passwd", "/", "\0", "a\\b", "\x1b[2J", "\u202e", "x" * 5000]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Target:
    """read: what is tried. allowed: the errors that may come out of it. inputs: ways to make one, each as likely."""

    name: str
    read: Callable[[bytes], Any]
    allowed: tuple[type[Exception], ...]
    inputs: tuple[Build, ...]

    def try_one(self, data: bytes) -> bool:
        """Whether it was taken; raises what must not come out."""
        try:
            self.read(data)
        except self.allowed:
            return False
        return True


# Ways to make an input


def random_bytes(draw: Any) -> bytes:
    return draw(st.binary(max_size=200))


def changed(whole: bytes, draw: Any) -> bytes:
    """Some bytes exchanged, and the end cut off or grown."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)))
    return draw(st.sampled_from([bytes(data), bytes(data), bytes(data[:cut]), bytes(data) + b"\0" * 9]))


def exchanged(value: Any, draw: Any) -> Any:
    """A JSON value with one of the values in it another one, dropped, or doubled."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: exchanged(value[key], draw)}
    at = draw(st.integers(0, len(value) - 1))
    if draw(st.integers(0, 9)) == 0:
        return value[:at] + value[at:] * 2
    return [*value[:at], exchanged(value[at], draw), *value[at + 1 :]]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def resealed(whole: bytes, draw: Any) -> bytes:
    body = exchanged(unseal(whole, ""), draw)
    try:
        return seal(body if isinstance(body, dict) else {"": body})
    except (
        UnicodeEncodeError,
        TypeError,
    ):  # half a surrogate pair can be read and not be written; keys that are no text
        return as_json(body)


def repacked(whole: bytes, draw: Any) -> bytes:
    """Tensors of another type, shape or content under right names."""
    tensors = container.unpack(whole)
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.integers(0, 3))
    if how == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        wide = torch.tensor(draw(st.lists(FLOATS, min_size=8, max_size=8)))
        dtype = draw(st.sampled_from(DTYPES))
        flat = wide.repeat(16)[: int(np.prod(shape))] if shape else wide[:1]
        tensors[name] = (
            flat.reshape(shape).nan_to_num().to(dtype) if not dtype.is_floating_point else flat.reshape(shape)
        )
    elif how == 1:
        del tensors[name]
    elif how == 2:
        tensors[draw(st.text(max_size=4))] = tensors[name].clone()
    elif tensors[name].numel():
        raw = bytearray(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        for _ in range(draw(st.integers(1, 5))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        same = torch.frombuffer(raw, dtype=torch.uint8)
        tensors[name] = same.view(tensors[name].dtype).reshape(tensors[name].shape)
    return container.pack(tensors)


# Whole documents


def prepared() -> Prepared:
    ids = torch.arange(TEXT)
    response = ids >= TEXT - RESPONSE
    text = TextTokens(ids.to(torch.uint32), (ids % 3).to(torch.uint8), (ids // 5).to(torch.uint16), response, ())
    none = torch.zeros(0, dtype=torch.int64)
    return Prepared("000000000-00000000", "sft", none, ids[:VISION], none, ids[:RESPONSE], none, text, (), {})


def teacher_output(seed: int, wants: Wants = NOTHING) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    counts = {"vision": VISION, "response": RESPONSE, "text": TEXT}
    hidden = {name: torch.randn(rows, D, generator=generator) for name, rows in counts.items()}
    head = head_matrix()
    logits = hidden["vision"] @ head.T
    found = sample_batch(hidden, head, ["k"], {name: (rows,) for name, rows in counts.items()}, wants)
    attention = torch.rand(2, TEXT, VISION, generator=generator) / VISION
    return TeacherOutput(
        hidden,
        {name: topk_rows(hidden[name], head, 8) for name in ("vision", "response")},
        logits @ logits.T,
        sampled={name: one for name, (one,) in found.items()},
        attention={0: attention},
        features=hidden["vision"],
    )


def head_matrix() -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


@cache
def made_field(number: int) -> tuple[Any, bytes, bytes]:
    """(field, a whole record of it, its calibration or nothing)"""
    name, params = FIELDS[number]
    one, calibration = create_field(name, params), b""
    if one.calibrated:
        fitted: Any = one
        tensors = fitted.fit([teacher_output(seed) for seed in range(8)], head_matrix()).tensors
        one, calibration = fitted.with_calibration(tensors), container.pack(tensors)
    record = container.pack(one.encode(prepared(), teacher_output(9, one.wants)))
    return one, record, calibration


@cache
def made_wide(name: str, params: tuple[tuple[str, Any], ...]) -> tuple[Any, bytes]:
    """(coded field, a whole record of it that has frequencies of its own: other dimensions are large than in the calibration's rows)"""

    def said(seed: int, each: torch.Tensor) -> TeacherOutput:
        generator = torch.Generator().manual_seed(seed)
        counts = {"vision": 192, "response": RESPONSE, "text": TEXT}
        return TeacherOutput(
            {kind: each * torch.randn(rows, WIDE, generator=generator) for kind, rows in counts.items()}
        )

    one: Any = create_field(name, dict(params))
    head, falling = torch.randn(V, WIDE, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 0.01, WIDE) ** 2
    one = one.with_calibration(one.fit([said(seed, falling) for seed in range(8)], head).tensors)
    stored = one.encode(prepared(), said(9, falling.flip(0)))
    assert "symbols" in stored, name
    return one, container.pack(stored)


def scaled_symbols() -> tuple[bytes, list[int]]:
    """A member ``symbols`` with groups of every mode, and the symbols of each class."""
    counts, rng = [4100, 4200, 4097, 4099, 5000, 33], np.random.default_rng(0)
    parts = [rng.laplace(scale=scale, size=n) for scale, n in zip((300, 9, 1.2, 0.4, 0.1, 0.1), counts)]
    return adaptive.encode(np.rint(np.concatenate(parts)).astype(np.int16), counts).numpy().tobytes(), counts


def sample() -> Sample:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A square."))
    return Sample("sft", 3, "id 3", "rows.json row 3", turns, (Image("a.png", png()),), {"family": "shape"})


def png(kind: str = "PNG", size: tuple[int, int] = (9, 7), **how: Any) -> bytes:
    stream = io.BytesIO()
    PIL.Image.linear_gradient("L").resize(size).convert("RGB").save(stream, kind, **how)
    return stream.getvalue()


def sample_members() -> dict[str, bytes]:
    from teacher_cache.records import ImageLayout, View

    text = replace(prepared().text, image_at=(2,))
    layout = (ImageLayout((9, 7), (View((0, 0, 9, 7), (2, 3)),)),)
    return encode_sample(sample(), replace(prepared(), text=text, layout=layout, turns=2))


@cache
def small_cache() -> dict[str, bytes]:
    """Every file of a cache of one shard of two rows, by its path."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        group = RowGroup(0, 2, {"file": 0}, 10, 1)
        part = Part(DataSpec("sft", "rows.json"), {"format": "llava-json", "files": []}, 2)
        plan = Plan((part,), (Slice("sft", (group,)),), {"max_length": 99, "over_length": "skip"}, 0)
        storage.put_new("manifest.json", plan.to_bytes())
        write_shard(storage, "samples", plan.plan_hash, "", sample_members())
        numbers = [i for i, (name, _) in enumerate(FIELDS) if name in ("affinity", "vision_hidden", "vision_topk")]
        for number in {FIELDS[i][0]: i for i in numbers}.values():
            one, record, calibration = made_field(number)
            path = f"teacher/0/calibration/{one.name}.safetensors"
            body = {
                "field": one.name,
                "version": one.version,
                "params": dict(one.params),
                "temperatures": list(one.temperatures) if one.temperatures else None,
                "plan_hash": plan.plan_hash,
                "teacher": {},
                "teacher_folder": "teacher/0",
                "head_sha256": None,
            }
            if calibration:
                storage.put_bytes(calibration, path)
                body["calibration"] = {"path": path, "sha256": hashlib.sha256(calibration).hexdigest(), "rows": 9}
            data = seal(body)
            storage.put_new(f"fields/{one.name}/field.json", data)
            digest = hashlib.sha256(data).hexdigest()
            write_shard(storage, f"fields/{one.name}", plan.plan_hash, digest, {container.EXTENSION: record})
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write_shard(storage: Storage, column: str, plan_hash: str, digest: str, members: Mapping[str, bytes]) -> None:
    writer = ShardWriter(storage, column, 0, plan_hash, digest)
    writer.add(prepared(), dict(members))
    writer.skip(SkipRecord("sft", 1, "id 1", "rows.json row 1", "no_answer", "none"))
    writer.commit()


class Folder:
    """A cache on disk in which one shard at a time is another one, with checksums that are right."""

    def __init__(self) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="kdcli-fuzz-")
        self.path = Path(self._kept.name)
        for name, data in small_cache().items():
            self.write(name, data)

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)

    def read_all(self) -> None:
        """As training does."""
        opened = TeacherCache(str(self.path))
        fields = list(opened.fields)
        rows = CachedSamples(opened, opened.parts(), fields)
        for position, count in enumerate(rows.counts):
            for row in range(count):
                rows.read(position, row)

    def read_with(self, name: str, data: bytes) -> None:
        """With one file exchanged."""
        self.write(name, data)
        try:
            self.read_all()
        finally:
            self.write(name, small_cache()[name])

    def read_shard(self, column: str, data: bytes) -> None:
        """``write_shard``, then what ``verify`` and training do."""
        self.write_shard(column, data)
        storage = Storage(str(self.path))
        list(verify.shard_problems(storage, parse_plan(small_cache()["manifest.json"], ""), column, "", 0))
        self.read_all()

    def write_shard(self, column: str, data: bytes) -> None:
        """A shard of these files. data: length of the tar (4 bytes), the tar, the index."""
        size = int.from_bytes(data[:4], "big")
        tar, index = data[4 : 4 + size], data[4 + size :]
        name = f"{column}/commits/000000.json"
        commit = parse_commit(small_cache()[name], name)
        sums = {"tar_sha256": hashlib.sha256(tar).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
        self.write(f"{column}/data/{commit.tar}", tar)
        self.write(f"{column}/index/{commit.index}", index)
        self.write(name, replace(commit, tar_bytes=len(tar), **sums).to_bytes())


def shard_of(column: str) -> tuple[Commit, bytes, bytes]:
    commit = parse_commit(small_cache()[f"{column}/commits/000000.json"], "")
    return commit, small_cache()[f"{column}/data/{commit.tar}"], small_cache()[f"{column}/index/{commit.index}"]


def joined(tar: bytes, index: bytes) -> bytes:
    return len(tar).to_bytes(4, "big") + tar + index


def other_shard(column: str, draw: Any) -> bytes:
    """The tar's bytes changed, its members' checksums in the index right; or the index's rows changed; or both."""
    commit, tar, index = shard_of(column)
    entries = parse_index(index, "", commit.tar_bytes, commit.written)
    if draw(st.booleans()):
        tar = changed(tar, draw)
        import zlib

        entries = [
            replace(
                e, members=tuple(replace(m, crc32=zlib.crc32(tar[m.offset : m.offset + m.size])) for m in e.members)
            )
            for e in entries
        ]
        index = dump_index(entries)
    return joined(tar, other_index(index, draw) if draw(st.booleans()) else index)


def other_index(whole: bytes, draw: Any) -> bytes:
    """Valid parquet of the right columns with values that no index has; now and then of other columns."""
    table = pq.read_table(io.BytesIO(whole))
    rows = table.to_pylist()
    at = draw(st.integers(0, len(rows) - 1))
    numbers = st.none() | st.sampled_from([0, 1, -1, 511, 2**31 - 1, -(2**31)])
    wide = numbers | st.sampled_from([2**62, 2**63 - 1, -(2**63)])
    key = draw(st.sampled_from(["key", "ordinal", "vision_rows", "members", "members", "members", "drop", "twice"]))
    if key == "members":
        members = [dict(one) for one in rows[at]["members"]]
        name = draw(st.sampled_from(["ext", "offset", "size", "none"]))
        if name != "none":
            members[draw(st.integers(0, len(members) - 1))][name] = draw(st.none() | TEXTS if name == "ext" else wide)
        rows[at]["members"] = draw(st.sampled_from([members, members, [], None, members * 2]))
    elif key == "twice":
        rows = rows * 2
    elif key == "drop":
        table = table.drop_columns([draw(st.sampled_from(table.column_names))])
    else:
        rows[at][key] = draw(st.none() | TEXTS if key == "key" else numbers if key == "vision_rows" else wide)
    stream = io.BytesIO()
    pq.write_table(table if key == "drop" else pa.Table.from_pylist(rows, schema=SCHEMA), stream)
    return stream.getvalue()


# Readers


def read_sample(data: bytes) -> None:
    """data: length of the JSON member (4 bytes), it, the tokens."""
    size = int.from_bytes(data[:4], "big")
    members = {**sample_members(), "json": data[4 : 4 + size], "tokens.safetensors": data[4 + size :]}
    decode_sample(members, "here")


def other_sample(draw: Any) -> bytes:
    members = sample_members()
    body, tokens = members["json"], members["tokens.safetensors"]
    if draw(st.booleans()):
        body = as_json(exchanged(json.loads(body), draw))
    else:
        tokens = repacked(tokens, draw)
    return len(body).to_bytes(4, "big") + body + tokens


def read_calibration(number: int, data: bytes) -> None:
    """Opened, and used for a record that was written with the right one."""
    one, record, _ = made_field(number)
    opened = open_field(one.name, {"version": one.version, "params": dict(one.params)}, container.unpack(data, "here"))
    decode_record(opened, record, "here")


def read_words(data: bytes) -> str:
    word = heartbeat.parse_word(data)
    return work_lines(heartbeat.summary([word] if word else [], 100, now=2.0))


def read_mixture(folder: Path, data: bytes, format_name: str = "llava-json") -> int:
    """Scanned, read and checked row by row; rows = read + skipped."""
    path = folder / "rows"
    path.write_bytes(data)
    source = open_source(DataSpec("sft", str(path), image_root=str(folder), format=format_name))
    usable = 0
    for group in source.scan(2):
        rows = list(source.read(group))
        assert len(rows) == group.rows
        for row in rows:
            try:
                if isinstance(row, Sample):
                    check_sample(row, 1000)
                    usable += 1
            except SkipSample:
                continue
    return usable


def read_toml_file(folder: Path, data: bytes) -> None:
    (folder / FILE).write_bytes(data)
    load_settings(folder / FILE)


def other_toml(whole: bytes, draw: Any) -> bytes:
    """Values of the shipped template exchanged."""
    lines = whole.decode().splitlines()
    at = draw(st.sampled_from([i for i, line in enumerate(lines) if " = " in line]))
    value = draw(
        st.sampled_from(
            ["nan", "inf", "-1", "9" * 5000, "0x" + "f" * 40, "[]", "{}", '"\\u202e"', "[" * 3000, "1979-05-27"]
        )
        | st.integers().map(str)
        | st.floats().map(str)
        | st.text(max_size=6).map(json.dumps)
    )
    lines[at] = f"{lines[at].split(' = ')[0].lstrip('# ')} = {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mixture_rows() -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    return [{"id": f"row {i}", "image": "a.png", "conversations": turns, "family": "x", "n": i} for i in range(3)]


def other_mixture(draw: Any) -> bytes:
    """A row exchanged; now and then numbers and depths that Python does not take."""
    data = as_json(exchanged(mixture_rows(), draw))
    odd = draw(
        st.sampled_from([b"1e999", b"9" * 5000, b"NaN", b"[" * 2000 + b"]" * 2000, b'"\\ud800"', b'{"a":1,"a":2}'])
    )
    return data.replace(b'"x"', odd, 1) if draw(st.booleans()) else data


def message_rows() -> list[dict[str, Any]]:
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    part, text, said = (
        {"type": "image"},
        {"type": "text", "text": "What?"},
        {"role": "assistant", "content": "A square."},
    )
    return [
        {"id": "a", "messages": [{"role": "user", "content": [part, text]}, said], "images": ["a.png"], "n": 1},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}, said],
            "image": uri,
        },
        {"prompt": "Hi", "completion": "Ho", "family": "x"},
        {
            "conversations": [
                {"from": "Human", "value": "Hi", "weight": 0},
                {"from": "bot", "value": "Ho", "loss": True},
            ],
            **{"system": "Be brief.", "tools": [], "videos": [], "weight": 1.0},
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, text]}, said]},
    ]


def other_lines(draw: Any) -> bytes:
    """A row exchanged; now and then a line that is none, or a file that ends early."""
    rows = message_rows()
    at = draw(st.integers(0, len(rows) - 1))
    rows[at] = exchanged(rows[at], draw)
    odd = draw(st.sampled_from([b"", b"\r", b"[" * 2000, b"9" * 5000, b'"\\ud800"', b"\xff"]))
    return odd + b"\n" + b"\n".join(map(as_json, rows)) + draw(st.sampled_from([b"\n", b"", b"\n{"]))


def sample_tar(row: Any = None, kind: int = tarfile.PAX_FORMAT, name: str = "b") -> bytes:
    """Four samples: LLaVA's turns with an image, a caption, messages with two images, a row without image."""
    first, _, _ = mixture_rows()
    two = {"messages": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "no"}]}
    text = {"prompt": "Hi", "completion": "Ho"}
    members = [
        ("a.png", png()),
        ("a.json", as_json(first if row is None else row)),
        (f"{name}.jpg", png("JPEG")),
        (f"{name}.txt", b"A cat"),
    ]
    members += [("c.0.png", png()), ("c.1.png", png()), ("c.json", as_json(two)), ("d.json", as_json(text))]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def other_tar(draw: Any) -> bytes:
    """A row or a name exchanged; or a header with another field and its checksum made right again."""
    kind = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    if draw(st.booleans()):
        name = draw(st.sampled_from(["b", "a", "../b", "é" * 200, ".b", "b\n"]))
        return sample_tar(exchanged(draw(st.sampled_from([*mixture_rows(), *message_rows()])), draw), kind, name)
    data = bytearray(sample_tar(kind=kind, name="é" * 200))
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw(st.sampled_from(heads))
    begin, end = draw(st.sampled_from([(0, 100), (124, 136), (156, 157), (345, 500), (482, 483)]))
    field = draw(
        st.binary(min_size=1, max_size=end - begin)
        | st.sampled_from([b"0777777777\0", b"\x80" + b"\xff" * 11, b"-1", b"x", b"S", b"L"])
    )
    data[at + begin : at + begin + min(len(field), end - begin)] = field[: end - begin]
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def images() -> list[bytes]:
    return [
        png(),
        png("JPEG"),
        png("JPEG", progressive=True),
        png("GIF"),
        png("WEBP"),
        png("BMP"),
        png("TIFF"),
        png("TIFF", compression="tiff_lzw"),
        png("GIF", save_all=True, append_images=[PIL.Image.new("RGB", (5, 5))]),
        png("WEBP", save_all=True, append_images=[PIL.Image.new("RGB", (9, 7), "red")]),
    ]


def receipt() -> bytes:
    body = {"keys": [["sft", "000000000-00000000"]], "input_ids": ["ab"], "sha256_of_states": "ab", "dtype": "float32"}
    return seal({**body, "floor": 0.0, "floor_logit": 0.1})


def read_receipt(folder: Path, data: bytes) -> None:
    storage = Storage(str(folder))
    (folder / "teacher").mkdir(exist_ok=True)
    (folder / "teacher" / canaries.RECEIPT).write_bytes(data)
    canaries.problems(storage, "teacher")
    canaries.receipt(storage, "teacher")


# All of them


def targets(scratch: Path) -> list[Target]:
    """scratch: a folder for files that a reader opens by name."""
    return [*document_targets(scratch), *record_targets(), *shard_targets(), *data_targets(scratch)]


def document_targets(scratch: Path) -> Iterator[Target]:
    files = small_cache()
    folder = Folder()

    def documents(name: str, read: Callable[[bytes], Any], whole: bytes) -> Target:
        return Target(
            name, read, (CacheError,), (random_bytes, partial(changed, whole), *[partial(resealed, whole)] * 3)
        )

    plan, commit = files["manifest.json"], files["samples/commits/000000.json"]
    yield documents("manifest", lambda data: parse_plan(data, "here"), plan)
    yield documents("manifest, read through", partial(folder.read_with, "manifest.json"), plan)
    yield documents("commit", lambda data: parse_commit(data, "here"), commit)
    yield documents("commit, read through", partial(folder.read_with, "samples/commits/000000.json"), commit)
    for name in ("affinity", "vision_hidden", "vision_topk"):
        path = f"fields/{name}/field.json"
        yield documents(f"field.json of {name}, read through", partial(folder.read_with, path), files[path])
    yield documents("canaries' receipt", partial(read_receipt, scratch), receipt())
    word = as_json(asdict(heartbeat.Word("run-1", "host:1", 1.0, 2.0, 3, 4, 5, "no")))
    others = (random_bytes, partial(changed, word), lambda draw: as_json(exchanged(json.loads(word), draw)))
    yield Target("worker's word", read_words, (), others)


def read_coded(one: Any, data: bytes) -> None:
    """As training does: symbols alone, then numbers where the student is."""
    one.restore([decode_record(one, data, "here", coded=True)], torch.device("cpu"))


def record_targets() -> Iterator[Target]:
    for number, (name, params) in enumerate(FIELDS):
        one, record, calibration = made_field(number)
        kind = f"{name} {next((str(value) for value in params.values() if isinstance(value, str)), '')}".strip()
        kind += f", version {params['codec_version']}" if "codec_version" in params else ""
        read = lambda data, one=one: decode_record(one, data, "here")  # noqa: E731
        inputs = (random_bytes, partial(changed, record), *[partial(repacked, record)] * 3)
        yield Target(f"record of {kind}", read, (CacheError,), inputs)
        if calibration:
            inputs = (partial(changed, calibration), *[partial(repacked, calibration)] * 3)
            yield Target(f"calibration of {kind}", partial(read_calibration, number), (CacheError,), inputs)
    for name, params in WIDE_FIELDS:
        one, record = made_wide(name, params)
        inputs = (random_bytes, partial(changed, record), *[partial(repacked, record)] * 3)
        yield Target(
            f"record of {name} with symbols of its own, restored", partial(read_coded, one), (CacheError,), inputs
        )
    tensors = made_field(0)[1]
    yield Target("container", container.unpack, (CacheError,), (random_bytes, partial(changed, tensors)))
    framed = frame.compress(b"a" * 300)
    read_frame = lambda data: frame.decompress(data, "here", 1000)  # noqa: E731
    yield Target("zstd frame", read_frame, (CacheError,), (random_bytes, partial(changed, framed)))
    symbols, counts = scaled_symbols()
    read_symbols = lambda data: adaptive.decode(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8), counts)  # noqa: E731
    plain = frame.decompress(symbols, "here")
    inputs = (random_bytes, partial(changed, symbols), *[lambda draw: frame.compress(changed(plain, draw))] * 4)
    yield Target("symbols of a sketch", read_symbols, (CacheError,), inputs)
    yield Target("sample record", read_sample, (CacheError,), (random_bytes, *[other_sample] * 4))


def shard_targets() -> Iterator[Target]:
    commit, tar, index = shard_of("samples")
    read_index = lambda data: parse_index(data, "here", commit.tar_bytes, commit.written)  # noqa: E731
    inputs = (random_bytes, partial(changed, index), *[partial(other_index, index)] * 2)
    yield Target("index", read_index, (CacheError,), inputs)
    for column in ("samples", "fields/vision_topk"):
        whole = joined(*shard_of(column)[1:])
        inputs = (partial(changed, whole), *[partial(other_shard, column)] * 3)
        yield Target(f"shard of {column}", partial(Folder().read_shard, column), (CacheError,), inputs)
    read_tar = lambda data: verify._members(io.BytesIO(data))  # noqa: E731
    yield Target("tar headers", read_tar, (), (random_bytes, partial(changed, tar)))


def data_targets(scratch: Path) -> Iterator[Target]:
    (scratch / "a.png").write_bytes(png())
    rows = as_json(mixture_rows())
    inputs = (random_bytes, partial(changed, rows), *[other_mixture] * 3)
    yield Target("mixture json", partial(read_mixture, scratch), (DataError,), inputs)
    lines = b"\n".join(map(as_json, message_rows()))
    read_lines = partial(read_mixture, scratch, format_name="messages-jsonl")
    yield Target("mixture jsonl", read_lines, (DataError,), (random_bytes, partial(changed, lines), *[other_lines] * 3))
    read_tar = partial(read_mixture, scratch, format_name="webdataset")
    yield Target(
        "mixture tar", read_tar, (DataError,), (random_bytes, partial(changed, sample_tar()), *[other_tar] * 3)
    )
    settings = scratch / "settings"
    settings.mkdir(exist_ok=True)
    (settings / FILE).unlink(missing_ok=True)
    template = write_template(settings).read_bytes()
    inputs = (random_bytes, partial(changed, template), *[partial(other_toml, template)] * 3)
    yield Target("kd.toml", partial(read_toml_file, settings), (KdcliError,), inputs)
    whole = images()
    change = lambda draw: changed(draw(st.sampled_from(whole)), draw)  # noqa: E731
    read_image = lambda data: decode_image(Image("a", data), 10_000)  # noqa: E731
    yield Target("image", read_image, (SkipSample,), (random_bytes, *[change] * 4))
