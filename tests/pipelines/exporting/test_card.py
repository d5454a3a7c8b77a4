"""What a model card says, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

from pipelines.exporting.card import loading, place, results
from pipelines.exporting.provenance import Provenance


def test_results_of_models_of_one_name_stay_apart() -> None:
    def scores(share: float) -> dict[str, object]:
        tally = {"n": 4, "exact_match": share, "tokens": 4, "nll": 1.0}
        return {**tally, "family_mean": share, "nll_family_mean": 1.0, "families": {"count": tally}}

    names = {
        "/home/a/runs/03-DFT/model": scores(0.25),
        "/home/b/runs/03-DFT/model": scores(0.75),
        "hub/id": scores(0.5),
    }
    text = results(Provenance(Path("model"), None, (), None, names))
    header, _, row, *_ = text.splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-2]] == ["03-DFT/model (1)", "03-DFT/model (2)", "hub/id"]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["count", "25.0", "75.0", "50.0", "4"]
    assert "home" not in text


def test_places_of_a_machine_are_not_told() -> None:
    assert place("/home/a/cache") == "cache" and place("~/student") == "student"
    assert (
        place("s3://bucket/cache") == "s3://bucket/cache"
        and place("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    )


def test_the_prompt_of_a_card_is_that_of_the_training() -> None:
    """In a program that can be run: the chat template, or LLaVA's conversation as it was written for training."""
    chat, v1 = (loading(None, "student", template) for template in ("chat", "v1"))
    assert "apply_chat_template" in chat and "tokenize=True" in chat
    (line,) = [one for one in v1.splitlines() if one.startswith("text = ")]
    assert line.split("  #")[0].endswith(r'questions. USER: <image>\nWhat is in the picture? ASSISTANT:"')
    assert "apply_chat_template" not in v1 and "add_special_tokens" not in v1, (
        "the processor adds the first token by itself"
    )
    for text in (chat, v1):
        compile(text.removeprefix("```python\n").removesuffix("\n```"), "card", "exec")
