"""The written world has exactly the shapes of the real datasets, and its defects are where it says."""

import io
import json
import subprocess
import sys
from glob import glob

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.defects import DEFECTS
from pipelines.demo.write_world import write_world

COUNTS = {"captions": 12, "train": 60, "heldout": 21, "seed": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), **COUNTS)


def parquet_rows(paths):
    return [row for path in sorted(glob(paths.train)) for row in pq.read_table(path).to_pylist()]


def test_llava_json(world):
    for path, count in ((world.captions, 12), (world.heldout, 21)):
        rows = json.loads(path.read_text())
        assert isinstance(rows, list) and len(rows) == count
        for row in rows:
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"]
            assert set(row) <= {"id", "image", "conversations", "family"}
            assert turns[0]["value"].startswith("<image>\n") == ("image" in row)
            if "image" in row:
                with Image.open(world.images / row["image"]) as image:
                    assert image.size == (96, 96) and image.mode == "RGB" and image.format == "PNG"
    assert all("family" in row for row in json.loads(world.heldout.read_text()))


def test_llava_next_parquet(world):
    files = sorted(glob(world.train))
    assert len(files) == 2 and all(pq.ParquetFile(path).num_row_groups > 1 for path in files)
    schema = pq.read_schema(files[0])
    assert schema.names == ["id", "conversations", "data_source", "image"]
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = parquet_rows(world)
    assert len(rows) == 60
    assert any(row["image"] is None for row in rows)
    for row in rows:
        text = row["conversations"][0]["value"]
        assert text.count("<image>") == (row["image"] is not None)
        if row["image"]:
            Image.open(io.BytesIO(row["image"]["bytes"])).load()


def test_equal_arguments_give_equal_bytes(world, tmp_path):
    again = write_world(tmp_path, **COUNTS)
    for name in ("captions.json", "heldout.json", *(f"train/train-0000{i}-of-00002.parquet" for i in range(2))):
        assert (world.folder / name).read_bytes() == (again.folder / name).read_bytes()


@pytest.mark.parametrize("train_format", ["parquet", "llava-json"])
def test_defects_are_where_it_says(tmp_path, train_format):
    paths = write_world(tmp_path, **COUNTS, train_format=train_format, defects=15)
    assert set(paths.defects) == set(DEFECTS) and sum(map(len, paths.defects.values())) == 15
    json_form = train_format == "llava-json"
    rows = json.loads((tmp_path / "train.json").read_text()) if json_form else parquet_rows(paths)

    def picture(row):
        if not json_form:
            return row["image"] and row["image"]["bytes"]
        path = paths.images / row["image"]
        return path.read_bytes() if path.exists() else None

    for index in paths.defects["truncated_image"]:
        with pytest.raises(OSError):
            Image.open(io.BytesIO(picture(rows[index]))).load()
    assert all(picture(rows[i]) is None for i in paths.defects["missing_image"])
    assert all(rows[i]["conversations"][-1]["value"] == "" for i in paths.defects["empty_answer"])
    assert all(
        rows[i]["conversations"][0]["value"].count("<image>") == 2 for i in paths.defects["placeholder_mismatch"]
    )
    assert all(rows[i]["id"] == rows[0]["id"] for i in paths.defects["duplicate_id"])


def test_two_image_rows_need_the_format_that_can_hold_them(tmp_path):
    with pytest.raises(ValueError, match="llava-json"):
        write_world(tmp_path, **COUNTS, two_image_share=0.1)
    write_world(tmp_path, **COUNTS, two_image_share=0.3, train_format="llava-json")
    pairs = [row for row in json.loads((tmp_path / "train.json").read_text()) if isinstance(row.get("image"), list)]
    assert pairs and all(len(row["image"]) == 2 for row in pairs)
    assert all(row["conversations"][0]["value"].startswith("<image>\n<image>\n") for row in pairs)


def test_command_writes_a_world(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipelines.demo.write_world",
        str(tmp_path / "w"),
        "--captions",
        "2",
        "--train",
        "4",
    ]
    shown = subprocess.run([*command, "--heldout", "7"], check=True, capture_output=True, text=True).stdout
    assert "train/*.parquet" in shown and (tmp_path / "w" / "heldout.json").exists()
