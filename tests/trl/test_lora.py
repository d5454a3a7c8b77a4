"""LoRA adapters of PEFT in ``DistillTrainer``: their gradients follow from those of the weights, which ``kdcli train-student`` has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcli
from teacher_cache.errors import KdcliError
from tests.kdcli.conftest import Gradients, as_in_stage_dft, far, here, processor, train_student  # noqa: F401

peft = pytest.importorskip("peft", reason="no peft: run this by `make test-trl`")

CLOSE = 2e-5


@pytest.fixture
def make(tiny_student: Path, tiny_cache: Path, processor: Any, tmp_path: Path) -> Callable[..., Any]:  # noqa: F811
    from transformers import TrainingArguments

    def one(target: Any = r".*language_model.*(q_proj|v_proj|up_proj)", **settings: Any) -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(as_in_stage_dft(tiny_student), peft.LoraConfig(target_modules=target, r=2))
        given = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": "none", "seed": 0, "logging_steps": 1}
        arguments = TrainingArguments(
            str(tmp_path / "hf"), use_cpu=True, disable_tqdm=True, save_steps=2, **{**given, **settings}
        )
        return kdcli.DistillTrainer(
            model, arguments, cache=str(tiny_cache), parts=["sft"], method="llava-kd", processing_class=processor
        )

    return one


def test_gradients_of_adapters_follow_from_those_of_the_weights(
    make: Callable[..., Any],
    train_student: Callable[..., list[Gradients]],  # noqa: F811
) -> None:
    """W + s·B·A with B = 0: the gradient of B is s·(that of W)·Aᵀ, that of A is 0. Both sides up to their clipped length."""
    trainer = make()
    (batches, _) = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batches[0]).backward()
    weights = train_student("--method", "llava-kd", "--per-device-train-batch-size", "4")[0]
    ours, theirs = {}, {}
    for name, layer in trainer.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.grad is None or not a.grad.any()
            ours[name] = b.grad
            theirs[name] = weights[f"model.{name}.weight"] @ a.detach().T
    assert len(ours) == 6
    assert far(*(unit(one) for one in (ours, theirs))) < CLOSE


def test_adapters_are_saved_and_a_run_goes_on(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(learning_rate=1e-3)
    trainer.train()
    assert (tmp_path / "hf" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    again = make(learning_rate=1e-3)
    again.train(resume_from_checkpoint=str(tmp_path / "hf" / "checkpoint-2"))
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_adapter_of_the_head_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(KdcliError, match="leave lm_head out of target_modules"):
        make(["lm_head"]).train()


def unit(gradients: Gradients) -> Gradients:
    norm = torch.stack([one.square().sum() for one in gradients.values()]).sum().sqrt()
    return {name: one / norm for name, one in gradients.items()}
