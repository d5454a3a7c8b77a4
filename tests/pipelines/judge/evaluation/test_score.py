"""Figures of answers: the calibration error against values by hand and bounds that any binning keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.judge.evaluation.score import calibration_error


@pytest.mark.parametrize(
    ("tops", "error"),
    [
        ([], None),
        ([(1.0, True)] * 4, 0.0),
        ([(1.0, False)] * 3, 1.0),
        ([(0.75, True)] * 3 + [(0.75, False)], 0.0),
        ([(0.9, False), (0.9, True), (0.3, False), (0.3, False)], 0.5 * 0.4 + 0.5 * 0.3),
    ],
)
def test_calibration_error_by_hand(tops, error):
    assert calibration_error(tops) == (error if error is None else pytest.approx(error, abs=1e-12))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_at_most_the_mean_of_single_gaps_and_at_least_the_gap_of_the_means(tops):
    found = calibration_error(tops)
    gaps = [right - sure for sure, right in tops]
    assert abs(sum(gaps)) / len(tops) - 1e-9 <= found <= sum(map(abs, gaps)) / len(tops) + 1e-9
