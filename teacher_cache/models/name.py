"""What the name of a model can be, looked at before transformers is asked: an existing folder, or a model of the hub.

transformers asks the hub for half a dozen files, each six times with growing pauses: minutes and dozens of lines for one wrong letter.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from teacher_cache.errors import KdcliError

HUB_TIMEOUT = 10.0
"""Seconds that the hub has for its one answer."""
HUB_ID = re.compile(r"(?:[\w][\w.-]{0,95}/)?[\w][\w.-]{0,95}", re.ASCII)
"""``owner/name``, or a name without an owner as the first models had it."""


def check_model_name(what: str, name: str, revision: str | None = None) -> None:
    """KdcliError of one line where ``name`` is no model folder and no model that the hub has; it is asked once, and quickly.

    Args:
        what: names the model in the line, e.g. ``student 'runs/01-SFT/model'``.
    """
    if reason := _reason(name, revision):
        raise KdcliError(f"{what} cannot be loaded ({reason}): give a model folder or a hub id")


def _reason(name: str, revision: str | None) -> str:
    """What is wrong with the name, "" for nothing."""
    folder = Path(name)
    if found := gguf_file(folder):
        return f"{found.name} is a GGUF file, and kdcli reads safetensors: convert it (docs/text.md)"
    if folder.is_dir():
        return "" if (folder / "config.json").is_file() else _no_model(folder)
    if folder.exists():
        return "it is a file, and a model is a folder"
    if name.startswith("~"):
        return f"no such folder; ~ is not expanded here, write {folder.expanduser()}"
    if not HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        return "no such folder"
    reason = _asked_hub(name, revision)
    return f"no such folder, and {reason}" if reason else ""


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that somebody means by this path: the file itself, or one in a folder without other weights."""
    if path.suffix.lower() == ".gguf":
        return path if path.is_file() else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    return min((one for one in path.iterdir() if one.suffix.lower() == ".gguf"), default=None)


def _no_model(folder: Path) -> str:
    inner = folder / "model"
    if (inner / "config.json").is_file():
        return f"no config.json in that folder; its model is {inner}"
    return "no config.json in that folder"


@cache
def _asked_hub(name: str, revision: str | None) -> str:
    """What keeps this model of the hub from being loaded, "" for nothing; a copy in the local cache serves without a network."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    copied = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    if constants.is_offline_mode():
        return "" if copied else "HF_HUB_OFFLINE blocks access to the hub"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT)
    except errors.GatedRepoError:
        return "the model is gated: request access on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        return "the hub has no such model, or a private one (`hf auth login`)"
    except errors.RevisionNotFoundError:
        return f"the hub has no revision {revision!r} of it"
    except errors.EntryNotFoundError:
        return "the hub has no config.json for it: it is not a model for transformers"
    except errors.HfHubHTTPError:
        return ""  # the hub is busy, or has more to say: transformers asks again and says it
    except Exception as error:  # of the network, in the types of whatever library the hub's client uses
        if not copied:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"the hub does not answer ({said})"
        _stay_offline(constants)
    return ""


def _stay_offline(constants: Any) -> None:
    """This process and those that it starts take what the local cache has: without a network each file would be asked for in vain."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
