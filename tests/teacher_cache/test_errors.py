"""What is shown and written keeps no secrets."""

from __future__ import annotations

import pytest

from teacher_cache.errors import DataError, one_line, out_of_memory, stripped, without_secrets
from teacher_cache.shards.storage import Storage
from teacher_cache.sources.files import expand_paths

SECRET = [
    ("https://me:pw@host/c", "https://***@host/c"),
    ("https://me:p@w:x@host/c", "https://***@host/c"),
    ("HTTP://me:pw@host:80/c", "HTTP://***@host:80/c"),
    ("https://ghp_token@host/c", "https://***@host/c"),
    ("s3://key:secret@bucket/c", "s3://***@bucket/c"),
    ("https://h/c?X-Amz-Signature=ab%20c&X-Amz-Date=1", "https://h/c?X-Amz-Signature=***&X-Amz-Date=1"),
    ("https://h/c?a=1&AWSAccessKeyId=AK&Expires=3", "https://h/c?a=1&AWSAccessKeyId=***&Expires=3"),
    ("https://h/c?token=x#y", "https://h/c?token=***#y"),
    ("https://h/c?sv=1&sig=x%3D", "https://h/c?sv=1&sig=***"),
    ("https://h/c?api_key=x", "https://h/c?api_key=***"),
    ("AWS_SECRET_ACCESS_KEY=abc HF_TOKEN: hf_x", "AWS_SECRET_ACCESS_KEY=*** HF_TOKEN: ***"),
    ("see hf_abcdefghijklmnop.", "see hf_***."),
]
HARMLESS = [
    "s3://bucket/a@b/c",
    "hf://datasets/owner/name@main/x.json",
    "abfss://container@account.dfs.core.windows.net/x",
    "https://host/a?page=2&design=x",
    "/home/me/runs:2024/x@y",
    "max_tokens=3",
    "C:\\models\\x",
    "a: b@c",
]


@pytest.mark.parametrize(("text", "shown"), SECRET)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown and one_line(f"{text}") == shown
    assert stripped({"a": [text, 1]}) == {"a": [shown, 1]}


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_store_is_opened_with_its_password_and_shown_without() -> None:
    pytest.importorskip("aiohttp")
    store = Storage("http://me:pw@127.0.0.1:1/c")
    assert "pw" in store.url and str(store) == "http://***@127.0.0.1:1/c"


def test_a_mixture_is_not_named_with_a_password() -> None:
    with pytest.raises(DataError, match="manifest") as caught:
        expand_paths("https://me:pw@host/x.json")
    assert "pw@" not in str(caught.value)


def test_what_a_lack_of_memory_is() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes")) and not out_of_memory(ValueError("out of memory"))
