"""The task groups that kdcli ships, against the tasks that lmms-eval has. They cannot be run here: their data comes from the hub."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipelines.lmms import TASKS

GROUPS = {"llava-kd-10": 10, "em-kd-11": 11, "epic-10": 10, "quick": 6}


@pytest.fixture(scope="module")
def manager() -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), model_name="kdcli")


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_found_and_name_tasks_that_exist(manager: Any, name: str) -> None:
    assert manager.match_tasks([name]) == [name] and name in manager.all_groups
    config = yaml.safe_load(open(manager.task_index[name]["yaml_path"]))
    assert config["group"] == name and len(set(config["task"])) == GROUPS[name]
    for task in config["task"]:
        assert task in manager.all_subtasks, f"{name} names {task}, which lmms-eval does not have as a single task"


@pytest.mark.parametrize("name", GROUPS)
def test_every_task_of_a_group_is_one_that_the_plugin_can_answer(manager: Any, name: str) -> None:
    """Its way to generate is greedy, and it has one round."""
    from lmms_eval import utils

    from pipelines.lmms.requests import generation

    for task in yaml.safe_load(open(manager.task_index[name]["yaml_path"]))["task"]:
        config = utils.load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        assert config["output_type"] in ("generate_until", "multiple_choice", "loglikelihood"), task
        assert generation(config.get("generation_kwargs") or {}, task).max_new_tokens >= 1
