"""What a grid file may say: the product of its axes, and every mistake refused in one line before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.ablate.cells import make_cells
from pipelines.ablate.grid import load_grid
from teacher_cache.errors import KdcliError


def names(grid: Path) -> list[str]:
    return [cell.name for cell in make_cells(load_grid(grid), Path("out"))]


def test_axes_multiply_and_name_the_rows(write_grid: Callable[..., Path]) -> None:
    grid = write_grid(
        '[grid]\nmethod = ["sft", "llava-kd"]\nseed = [3, 4]\nlearning_rate = [1e-3, 2e-3]\nstages = "DFT"\n'
    )
    cells = make_cells(load_grid(grid), Path("out"))
    assert [cell.name for cell in cells][:3] == [
        "sft, learning_rate=0.001/seed-3",
        "sft, learning_rate=0.001/seed-4",
        "sft, learning_rate=0.002/seed-3",
    ]
    assert len(cells) == 8 == len({cell.folder for cell in cells})
    assert {(cell.settings.train.learning_rate, cell.settings.train.seed) for cell in cells} == {
        (rate, seed) for rate in (1e-3, 2e-3) for seed in (3, 4)
    }
    assert all(cell.settings.train.report_to == "none" and cell.stage_names == "DFT" for cell in cells)


def test_knobs_by_run_and_by_stage(write_grid: Callable[..., Path]) -> None:
    """``set`` holds in every stage, ``stage.NAME.set`` in one; a stage whose knobs differ is another stage."""
    varied = """
[grid]
method = "llava-kd"
stages = "DPT,DFT"
set.gamma = [0.0, 0.5]

[[variants]]
name = "all"

[[variants]]
name = "no relation in DPT"
stage.DPT.set = { gamma = 0.0 }
stage.DFT.max_steps = 2
"""
    cells = {cell.row: cell for cell in make_cells(load_grid(write_grid(varied)), Path("out"))}
    assert list(cells) == ["all, gamma=0.0", "all, gamma=0.5", *(f"no relation in DPT, gamma={g}" for g in (0.0, 0.5))]
    shared = {row: [stage.shared for stage in cell.stages] for row, cell in cells.items()}
    assert shared["all, gamma=0.0"][0] == shared["no relation in DPT, gamma=0.5"][0] != shared["all, gamma=0.5"][0]
    assert cells["no relation in DPT, gamma=0.5"].settings.stages["DFT"].max_steps == 2
    assert cells["all, gamma=0.5"].knobs == {"gamma": 0.5}


def test_the_same_student_under_two_names_is_trained_once(write_grid: Callable[..., Path]) -> None:
    varied = '[[variants]]\nname = "a"\nmethod = "sft"\n[[variants]]\nname = "b"\nmethod = "sft"\nstages = "PT,SFT"\n'
    first, second = make_cells(load_grid(write_grid(varied)), Path("out"))
    assert first.stages == second.stages and first.folder.name == second.folder.name


ONE = '[[variants]]\nname = "a"\nmethod = "sft"\n'


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        ("", "empty grid"),
        ('[grid]\nmethod = "sft"\nseed = []\n', "seed has no values"),
        ('[grid]\nmethod = "sft"\nseed = [1, 1]\n', "twice"),
        ('[grid]\nmethod = "sft"\ncolour = ["red"]\n', "unknown key colour; known are .*learning_rate"),
        ('[grid]\nmethod = "sft"\noutput_dir = ["x"]\n', "unknown key output_dir"),
        ('[grid]\nmethod = ["sft", "kdd"]\n', "unknown method 'kdd': choose from"),
        ('[grid]\nmethod = "sft"\nset.gamma = [1.0]\n', "sft has no knob gamma"),
        ('[grid]\nmethod = "llava-kd"\nset.gamma = ["much"]\n', "gamma must be a float"),
        ('[grid]\nmethod = "sft"\nstages = ["PT,XFT"]\n', "unknown stage XFT: choose from"),
        ('[grid]\nmethod = "sft"\nstage.XFT.max_steps = [1]\n', "unknown stage XFT"),
        ('[grid]\nmethod = "sft"\nstage.SFT.steps = [1]\n', "unknown key steps; known are"),
        ('[grid]\nmethod = "sft"\nstage.SFT.parts = [["none"]]\nstages = "SFT"\n', "none"),
        ('[grid]\nmethod = "llava-kd"\nstages = "PT,DFT"\nstage.PT.set.gamma = 0.0\n', "plain SFT: it has no knobs"),
        ('[grid]\nmethod = "kd"\npreset = ["papr"]\n', "no preset 'papr'"),
        ("[grid]\nseed = [0]\n", "no method"),
        ('[grid]\nmethod = "sft"\nlearning_rate = ["fast"]\n', "learning_rate must be a number"),
        (ONE + ONE, "is used twice"),
        (ONE + ONE.replace('"a"', '"a/"'), "the same folder name"),
        (ONE.replace('"a"', '"stages"'), "the same folder name"),
        ('[[variants]]\nmethod = "sft"\n', "a variant is a table with a name"),
        ('[grid]\nmethod = ["sft"]\n' + ONE, "which .grid. also varies"),
        (ONE + "eval = [{temperature = 2}]\n", "unknown option temperature; known are batch_size"),
        (ONE + "eval = [{keep = 4}]\n", "'a' eval: .*need"),
        (ONE + 'eval = [{compress = "fast", keep = 4}]\n', "fast"),
        (ONE + 'eval = [{compress = "fastv", keep = 4, compress_layer = 9}]\n', "a: .*layer"),
        ('[grid]\nmethod = "llava-kd"\ncompressor = ["adaptive_pool"]\n', "em-kd, which matches"),
        ('[grid]\nmethod = "sft"\ncompressor = ["squeeze"]\n', "squeeze"),
        (ONE + 'cache = "nowhere"\n', "nowhere"),
        (ONE + "colour = 1\n", "variant 'a': unknown key colour"),
        ('[[eval]]\nname = "heldout"\npath = "{heldout}"\n' + ONE, "the name heldout is used twice"),
        ('[[eval]]\nname = "more"\npath = "absent.json"\n' + ONE, "absent.json"),
        ('[[eval]]\nname = "more"\n' + ONE, "path is missing"),
        ('[[eval]]\nname = "more"\npath = "{heldout}"\ntemplate = "v2"\n' + ONE, "unknown template 'v2'"),
    ],
)
def test_mistakes_are_refused_before_anything_trains(
    write_grid: Callable[..., Path], world, varied: str, said: str
) -> None:
    with pytest.raises(KdcliError, match=said):
        names(write_grid(varied.replace("{heldout}", str(world.heldout))))


def test_a_baseline_is_a_row_and_the_top_has_known_keys(write_grid: Callable[..., Path]) -> None:
    with pytest.raises(KdcliError, match="baseline 'sfd' is not a row; the rows are a"):
        names(write_grid(ONE, top='baseline = "sfd"\n'))
    with pytest.raises(KdcliError, match="unknown key base_line"):
        names(write_grid(ONE, top='base_line = "a"\n'))
    with pytest.raises(KdcliError, match="keep_models must be true or false"):
        names(write_grid(ONE, top='keep_models = "no"\n'))
    with pytest.raises(KdcliError, match="no such file"):
        load_grid(Path("absent.toml"))


def test_a_need_that_the_cache_cannot_serve_is_refused(
    write_grid: Callable[..., Path], copy_of: Callable[[Path], Path], tiny_cache: Path
) -> None:
    import shutil

    poor = copy_of(tiny_cache)
    for name in ("vision_topk", "vision_hidden"):
        shutil.rmtree(poor / "fields" / name)
    with pytest.raises(KdcliError, match=r"b: .*llava-kd needs vision_logits.*add-field"):
        names(write_grid(ONE + f'[[variants]]\nname = "b"\nmethod = "llava-kd"\ncache = "{poor}"\n'))
