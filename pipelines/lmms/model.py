"""A kdcli student (or teacher) as a model of lmms-eval 0.7: ``python -P -m lmms_eval --model kdcli --model_args pretrained=FOLDER …``.

Answers are those of ``kdcli eval``: the same prompts, batches padded on the left, greedy, in the order of the requests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm

from pipelines.judge.evaluation.answers import Compression, answers_or_skips, check_asking, expected
from pipelines.judge.evaluation.run import load_answering
from pipelines.lmms.requests import UNASKED, UNLIKELY, Generation, generation, lost_note, model_arguments, prompt, row
from student_train.student import RowForward
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.sources import DataSpec


class Kdcli(lmms):
    """See ``ModelArguments`` for what ``--model_args`` may say. One process a GPU under ``accelerate launch``, each with its share."""

    is_simple = True

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.arguments = arguments = model_arguments(given)
        self._template = arguments.asking_template()
        self.accelerator = accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._device = torch.device(arguments.device or accelerator.device)
        dtype = arguments.torch_dtype(self._device.type)
        self.model, self.processor = load_answering(
            arguments.pretrained,
            arguments.pruning,
            arguments.vision_tokens,
            str(self._device),
            arguments.trust_remote_code,
            dtype,
        )
        check_asking(self.processor, self._template)
        self.model.eval()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Kdcli:
        """``--model_args`` win over flags of lmms-eval, one of which (``--batch_size``) has a default."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **simple_parse_args_string(arg_string)})

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A question that cannot be asked is answered with nothing; how many were, and why, is said at the end."""
        asked = [one.args for one in requests]
        # All of them before the first answer: a task that cannot be answered is known at once.
        ways = [generation(options, task) for _, options, _, _, task, _ in asked]
        compression, said, lost = self._compression(), list[str](), list[tuple[str, str]]()
        with self._bar(len(asked)) as bar:
            for way, batch in _batches(asked, self.batch_size, ways):
                prompts = [
                    prompt(text, self._visuals(look, number, task, split), task)
                    for text, _, look, number, task, split in batch
                ]
                given = answers_or_skips(
                    self.model,
                    self.processor,
                    prompts,
                    way.max_new_tokens,
                    compression,
                    way.stop,
                    self._template,
                )
                for (text, options, _, _, task, _), one in zip(batch, given):
                    lost += [(task, one.reason)] if isinstance(one, SkipSample) else []
                    said.append("" if isinstance(one, SkipSample) else one)
                    self.cache_hook.add_partial("generate_until", (text, options), said[-1])
                bar.update(len(batch))
        if lost:
            tqdm.write(lost_note(lost, len(asked), UNASKED), file=sys.stderr)
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean nats a token, greedy) of each continuation, its end of turn included; lmms-eval's tasks take the smallest.

        A continuation that cannot be rendered (it holds a token that the tokenizer reserves) is infinitely unlikely; how many were, and
        why, is said at the end.
        """
        student = RowForward(self.model)
        preparer = Preparer(self.processor, self.model.config, Limits(max_length=1 << 60))
        spec = DataSpec("lmms", "requests", template=self._template)
        compression, found, lost = self._compression(), list[GenerationResult](), list[tuple[str, str]]()
        asked = [one.args for one in requests]
        if any(len(one) != 6 for one in asked):
            raise KdcliError("model kdcli has no likelihoods without a question (metric acc_mutual_info): leave it out")
        with self._bar(len(asked)) as bar:
            for _, batch in _batches(asked, self.batch_size):
                rows = []
                for text, target, look, number, task, split in batch:
                    wanted = target if isinstance(target, str) else target(self.task_dict[task][split][number])
                    rows.append(row(prompt(text, self._visuals(look, number, task, split), task), str(wanted)))
                for one, request in zip(expected(student, preparer, rows, spec, compression), batch):
                    said = float("inf") if one.skip else float(one.nats.mean()), one.greedy
                    # A bare pair lmms-eval 0.7.3 turns into text, which no task can compare.
                    found.append(GenerationResult(said))
                    lost += [(request[4], one.skip.reason)] if one.skip else []
                bar.update(len(batch))
        if lost:
            tqdm.write(lost_note(lost, len(asked), UNLIKELY), file=sys.stderr)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise KdcliError(
            "model kdcli answers single questions: tasks of several rounds (generate_until_multi_round) are not supported"
        )

    def _visuals(self, look: Callable[[Any], Any], number: int, task: str, split: str) -> Any:
        return look(self.task_dict[task][split][number])

    def _compression(self) -> Compression | None:
        pruning = self.arguments.pruning
        return Compression(pruning, torch.Generator().manual_seed(0)) if pruning else None

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="asking")


def _batches(
    asked: Sequence[Any], size: int, ways: Sequence[Generation] | None = None
) -> Iterator[tuple[Any, list[Any]]]:
    """(way, requests) in order; a batch ends where the way to generate or the task changes."""
    keyed = [((ways[number] if ways else None, one[-2]), one) for number, one in enumerate(asked)]
    for (way, _), group in groupby(keyed, key=lambda pair: pair[0]):
        members = [one for _, one in group]
        for start in range(0, len(members), size):
            yield way, members[start : start + size]
