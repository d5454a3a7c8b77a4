"""Head sizes that vLLM serves, and the demo's models beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoConfig, LlavaConfig, Qwen2Config, Qwen3Config

import cli
from pipelines.export.served import CPU_HEADS, FLASH_MOST, head_size, serving_notes

ASSETS = Path(__file__).parents[3] / "pipelines" / "demo" / "assets"
PAGE = Path(__file__).parents[3] / "docs" / "export.md"


def sized(width: int, heads: int, head_dim: int | None = None) -> LlavaConfig:
    text = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
    return LlavaConfig(text_config=Qwen3Config(**text, head_dim=head_dim) if head_dim else Qwen2Config(**text))


@pytest.mark.parametrize(
    ("size", "cpu", "flash"), [(64, True, True), (24, False, True), (20, False, False), (512, True, False)]
)
def test_a_note_for_each_machine_that_has_trouble(size: int, cpu: bool, flash: bool) -> None:
    notes = serving_notes(sized(4 * size, 4))
    assert [f"heads of {size} on a CPU" in note for note in notes] == [True] * (not cpu) + [False] * (not flash)
    assert [f"heads of {size} without FlashAttention" in note for note in notes] == [False] * (not cpu) + [True] * (
        not flash
    )


def test_a_head_size_of_its_own_counts() -> None:
    assert head_size(sized(96, 4, head_dim=128)) == 128 and serving_notes(sized(96, 4, head_dim=128)) == []


def test_the_demo_says_which_of_its_models_vllm_serves(tmp_path: Path) -> None:
    assert serving_notes(AutoConfig.from_pretrained(ASSETS / "teacher")) == []
    command = ["export", str(ASSETS / "student_start"), "--out", str(tmp_path / "exported")]
    result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    (note,) = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: vLLM does not serve its attention heads of 24 on a CPU, where it knows 32, 64,")


def test_the_page_has_these_sizes() -> None:
    text = PAGE.read_text()
    assert f"| CPU | {', '.join(map(str, CPU_HEADS))};" in text and f"multiples of 8 up to {FLASH_MOST} |" in text
    assert "**The demo's student has heads of 24**" in text
