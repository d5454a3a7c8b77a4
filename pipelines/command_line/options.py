"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator; help lists them in this order."""

    def give(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def cache_named(command: Callable[..., Any]) -> Callable[..., Any]:
    """The cache as ``url``: in its place (``kdcli cache status CACHE``), or by ``--cache`` as the other commands have it."""

    @click.argument("url", metavar="[CACHE]", required=False)
    @click.option("--cache", "cache_url", help="The cache, instead of CACHE.")
    @wraps(command)
    def named(url: str | None, cache_url: str | None, **others: Any) -> Any:
        if url and cache_url:
            raise click.UsageError("name the cache once: CACHE or --cache")
        return command(url=url or cache_url, **others)

    return named


def column_named(name: str, default: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``cache_named`` and behind it one word more as ``name``, a column of the cache; ``default`` where it is left out."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.argument("url", metavar="[CACHE]", required=False)
        @click.argument(name, metavar=f"[{name.upper()}]" if default else name.upper(), required=False)
        @click.option("--cache", "cache_url", help="The cache, instead of CACHE.")
        @wraps(command)
        def named(url: str | None, cache_url: str | None, **others: Any) -> Any:
            words = [word for word in (cache_url, url, others.pop(name)) if word]
            if len(words) > 2 or not (default or len(words) == 2):
                raise click.UsageError(f"name one cache (CACHE or --cache) and one {name.upper()}")
            return command(
                url=words[0] if words else None, **{name: words[1] if len(words) == 2 else default}, **others
            )

        return named

    return give


class LocalPath(click.Path):
    """A path of this machine, read as everywhere else (``teacher_cache.shards.places``)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from teacher_cache.errors import KdcliError
        from teacher_cache.shards.places import local_path

        flag = param.opts[0] if isinstance(param, click.Option) else ""
        if not self.dir_okay and str(value).endswith("/"):
            raise KdcliError(f"{f'{flag} {value}'.strip()}: this names a folder, a file is needed")
        return super().convert(str(local_path(value, flag)), param, ctx)


A_FILE, A_FOLDER, A_PATH = LocalPath(dir_okay=False), LocalPath(file_okay=False), LocalPath()
config_option = click.option("--config", type=A_FILE, help="Settings file; default: ./kd.toml if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
device_option = click.option("--device", default=None, help="cpu, cuda, cuda:1; default: a GPU if there is one.")
backend_options = several(
    click.option(
        "--backend", type=click.Choice(["transformers", "vllm"]), help="Library that runs the teacher (docs/models.md)."
    ),
    click.option(
        "--vllm-route",
        type=click.Choice(["hidden", "logprobs"]),
        help="Output taken from vLLM; logprobs gives top-k only, with an inexact tail.",
    ),
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    default=None,
    help="Run program code in model folders (docs/security.md); off by default.",
)
links_option = click.option(
    "--follow-links",
    is_flag=True,
    default=None,
    help="Follow links below an image root that lead out of it (docs/security.md).",
)
teacher_options = several(backend_options, trust_option, device_option)
over_length_option = click.option(
    "--over-length", type=click.Choice(["skip", "cut"]), help="Skip longer rows, or cut them at a turn."
)
stored_options = several(
    click.option("--store", help="compact (top-k), standard (head + sketch + affinity) or exact (bf16 hidden states)."),
    click.option("--fields", help="Fields to store instead of a profile, comma-separated (see `kdcli methods`)."),
    click.option("--k", "k", type=int, help="k of the top-k fields."),
    click.option("--codec", help="Codec of the hidden fields: sketch, bf16, int8, int4 or fp32."),
    click.option("--parts-without-fields", help="Parts stored without fields, samples only; comma-separated."),
    click.option("--max-length", type=int, help="Maximum length of a row in tokens."),
    over_length_option,
)
data_options = several(
    click.option(
        "--data", multiple=True, help="A part of the mixture: file, glob or brace URL. Repeat for more parts."
    ),
    click.option(
        "--part",
        multiple=True,
        help="Part name per --data, in order (default: caption with --template plain, else sft).",
    ),
    click.option(
        "--image-root", multiple=True, help="Folder that relative image paths start from; once, or once per --data."
    ),
    links_option,
    click.option(
        "--template", multiple=True, help="chat, plain, v1 or qwen_1_5; once, or once per --data (default chat)."
    ),
    click.option("--limit", multiple=True, type=int, help="Use only the first N rows; once, or once per --data."),
)


budget_options = several(
    click.option(
        "--fidelity",
        type=float,
        help="Budget: maximum angle to the live gradient in degrees, with the fewest bytes.",
    ),
    click.option("--bytes-per-token", type=float, help="Budget: bytes of all fields per vision or response token."),
)
