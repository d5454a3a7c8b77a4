"""The transform coder: how far decoded rows are from what was coded, in which metric, at which rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import adaptive, entropy, fitting, spectrum, transform
from teacher_cache.codecs.entropy import Decoder
from teacher_cache.codecs.entropy_tables import fit_table
from teacher_cache.codecs.fitting import LARGEST, fit, head_metric, least_rows, scale_classes
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.codecs.symbol_order import SymbolOrder
from teacher_cache.codecs.transform import Transform
from teacher_cache.errors import KdcliError

D = 24
SPECTRUM = torch.logspace(1, -2, D)


def rows_of(seed: int, count: int, spectrum: torch.Tensor = SPECTRUM, heavy: bool = True) -> torch.Tensor:
    """Rows of a falling spectrum along random axes, around a mean, with tails heavier than normal ones."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=torch.Generator().manual_seed(5))).Q
    tails = torch.randn(count, 1, generator=generator).abs() + 0.5 if heavy else 1.0
    return (torch.randn(count, len(spectrum), generator=generator) * tails * spectrum) @ axes.T + 0.3


def decoded(coder: Transform, rows: torch.Tensor) -> torch.Tensor:
    return coder.restore([coder.read({}, Decoder(encoded(coder, rows)))])[0]


def encoded(coder: Transform, rows: torch.Tensor) -> torch.Tensor:
    return entropy.encode(coder.streams(coder.quantise(rows)), len(rows))


def y_of(coder: Transform, rows: torch.Tensor) -> torch.Tensor:
    return (rows.double() - coder.mean.double()) @ coder.encode.double()


def root_of(seed: int) -> torch.Tensor:
    return head_metric(torch.randn(50, D, generator=torch.Generator().manual_seed(seed)), torch.full((50,), 0.02))[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([1e-3, 0.05, 1.0, 50.0]), st.booleans())
def test_every_coefficient_is_within_half_a_step(seed: int, count: int, step: float, in_metric: bool) -> None:
    """And by the shift of its class nearer to zero, where it is not zero."""
    coder = fit(rows_of(1, 300), root_of(2) if in_metric else None, step)
    rows = rows_of(seed, count)
    values = decoded(coder, rows)
    assert values.shape == (count, coder.rank) and values.dtype == torch.float32
    error = (values.double() - y_of(coder, rows)).abs()
    allowed = step * (0.5 + coder.shrink.max().double())
    rounding = 1e-5 * (y_of(coder, rows).abs() + 1)
    assert (error <= allowed + rounding).all()


def test_symbols_beyond_the_table_come_back_whole() -> None:
    coder = fit(rows_of(1, 300), None, 0.1)
    rows = rows_of(2, 5) * LARGEST
    assert int(coder.quantise(rows).abs().max()) > 10 * LARGEST
    assert ((decoded(coder, rows).double() - y_of(coder, rows)).abs() <= 0.1 + 1e-6 * y_of(coder, rows).abs()).all()


def test_without_a_metric_inner_products_are_those_of_the_rows() -> None:
    rows = rows_of(3, 400)
    coder = fit(rows, None, 1e-4, centre=False)
    assert coder.rank == D
    basis = coder.encode.double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(D, dtype=torch.float64), atol=1e-6, rtol=0)
    values = decoded(coder, rows[:50]).double()
    exact = rows[:50].double() @ rows[:50].double().T
    torch.testing.assert_close(values @ values.T, exact, atol=1e-4 * float(exact.abs().max()), rtol=0)


def test_coefficients_are_independent_and_fall() -> None:
    rows = rows_of(4, 4000)
    y = y_of(fit(rows, root_of(3), 0.01), rows)
    covariance = y.T @ y / len(rows)
    energies = covariance.diagonal()
    assert (energies.diff() <= 1e-6 * energies[0]).all()
    correlation = covariance / torch.outer(energies, energies).sqrt()
    assert (correlation - torch.eye(len(energies), dtype=torch.float64)).abs().max() < 1e-3


def test_the_metric_is_the_weighted_variance_of_logits() -> None:
    generator = torch.Generator().manual_seed(6)
    head = torch.randn(70, D, generator=generator) * torch.logspace(0, -2, D) + 0.4
    probs = torch.rand(70, generator=generator) ** 4
    probs /= probs.sum()
    root, inverse = head_metric(head, probs)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ inverse, torch.eye(D, dtype=torch.float64), atol=1e-8, rtol=0)
    weights = 0.5 * probs.double() + 0.5 / 70
    for error in torch.randn(20, D, generator=generator).double():
        logits = head.double() @ error
        variance = (weights * (logits - weights @ logits).square()).sum()
        assert float((root @ error).square().sum()) == pytest.approx(float(variance), rel=1e-6)  # the head is float32


def test_a_head_in_slices_is_the_head_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.randn(16384 * 2 + 5, 3, generator=torch.Generator().manual_seed(7))
    probs = torch.full((len(head),), 1 / len(head))
    root, _ = head_metric(head, probs)
    centred = head.double() - head.double().mean(dim=0)
    torch.testing.assert_close(root @ root, centred.T @ centred / len(head))


def per_dimension(coder: Transform, rows: torch.Tensor, bits: float) -> float:
    """MSE of the same coefficients with a step for each dimension, all in proportion to their spread, at no fewer bits."""
    y = y_of(coder, rows).numpy()
    spread = y.std(axis=0)
    low, high = 1e-4, 10.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        symbols = np.rint(y / (middle * spread))
        low, high = (middle, high) if empirical_bits(symbols) > bits else (low, middle)
    return float(np.square(y - np.rint(y / (low * spread)) * low * spread).sum(axis=1).mean())


def empirical_bits(symbols: np.ndarray) -> float:
    total = 0.0
    for column in symbols.T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        total -= (share * np.log2(share)).sum() * len(column)
    return total


@pytest.mark.parametrize("step", [0.05, 0.3])
def test_one_step_for_all_beats_a_step_for_each(step: float) -> None:
    """Reverse water-filling: at the same bits, steps in proportion to the spread leave at least a third more error on this spectrum.

    The rival is counted at its own empirical entropy, which needs no tables; the transform at its real bytes.
    """
    train, test = rows_of(8, 20_000), rows_of(9, 4000)
    coder = fit(train, None, step)
    bits = 8 * encoded(coder, test).numel()
    ours = float((decoded(coder, test).double() - y_of(coder, test)).square().sum(dim=1).mean())
    assert per_dimension(coder, test, bits) > 1.33 * ours


@pytest.mark.parametrize("step", [0.05, 0.3, 2.0])
def test_the_rate_is_near_the_entropy(step: float) -> None:
    """Tables that dimensions share cost under 6 % against the empirical entropy of every dimension by itself."""
    coder = fit(rows_of(8, 20_000), None, step)
    symbols = coder.quantise(rows_of(9, 4000))
    spent = 8 * entropy.encode(coder.streams(symbols), 4000).numel()
    assert spent <= 1.06 * empirical_bits(symbols.numpy()) + 200


def test_dimensions_are_left_out_by_use() -> None:
    """A dimension of tiny variance that speaks in one row of a hundred is kept; one that never leaves its middle bin is not."""
    rows = torch.zeros(1000, 3)
    rows[:, 0] = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 5
    rows[::100, 1] = 1.0  # variance 0.01, a tenth of the step's
    rows[:, 2] = torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 0.01
    coder = fit(rows, None, 0.3)
    assert coder.rank == 2
    error = decoded(coder, rows)[:, 1].abs() - rows[:, 1] + rows[:, 1].mean()
    assert float(error.abs().max()) < 0.3


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_rows_have_one_dimension(value: float) -> None:
    rows = torch.full((60, 5), value)
    coder = fit(rows, None, 0.1)
    assert coder.rank == 1
    torch.testing.assert_close(decoded(coder, rows), torch.zeros(60, 1), atol=1e-6, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_shape_and_scale(width: int, count: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * width + 3, width, generator=generator) * scale
    coder = fit(rows, None, 0.05 * scale)
    again = Transform.of(coder.tensors())
    part = rows[:count]
    assert torch.equal(encoded(coder, part), encoded(again, part))
    assert decoded(again, part).shape == (len(part), coder.rank)


@pytest.mark.parametrize(("width", "least"), [(24, 48), (100, 128), (576, 288), (3584, 1792)])
def test_too_few_rows_are_refused(width: int, least: int) -> None:
    assert least_rows(width) == least
    with pytest.raises(KdcliError, match=f"saw {least - 1} rows of width {width}: at least {least} are needed"):
        fit(torch.zeros(least - 1, width), None, 0.1)


@pytest.mark.parametrize(("count", "over"), [(150, 1.25), (400, 1.15)])
def test_a_fit_on_few_rows_knows_how_large_others_are(count: int, over: float) -> None:
    """No dimension that others need is left out, and their bytes are near those of tables and axes that were fitted on them."""
    wide = torch.logspace(1, -1, 300)
    few, others = rows_of(1, count, wide), rows_of(2, 2000, wide)
    basis = fitting.fit_basis(few, None)
    own_rows = ((few.double() - basis.mean) @ basis.encode).float().numpy()
    coder, naive = (fitting.at_step(one, 0.2) for one in (basis, replace(basis, coefficients=own_rows)))
    assert coder.rank == 300 and naive.rank == min(300, count - 1)
    size = len(encoded(coder, others))
    assert size < over * len(encoded(fit(others, None, 0.2), others))
    assert naive.rank < 300 or size < 0.85 * len(encoded(naive, others))


def test_folds_cut_no_grid() -> None:
    grids = [Grid(10, 5, 6, 7), Grid(60, 5, 6, 6)]
    parts = fitting.folds(100, grids)
    assert sorted(torch.cat(parts).tolist()) == list(range(100)) and 1 < len(parts) <= fitting.FOLDS
    for grid in grids:
        assert sum(bool(set(grid.places().flatten().tolist()) & set(part.tolist())) for part in parts) == 1


def test_one_basis_serves_every_step() -> None:
    rows = rows_of(7, 400)
    basis = fitting.fit_basis(rows, root_of(1))
    for step in (0.5, 0.02):
        shared, own = fitting.at_step(basis, step).tensors(), fit(rows, root_of(1), step).tensors()
        assert all(torch.equal(shared[name], own[name]) for name in own)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_rows_that_are_no_numbers_are_never_stored(bad: float) -> None:
    coder = fit(rows_of(1, 300), None, 0.1)
    rows = rows_of(2, 4)
    rows[2, 3] = bad
    with pytest.raises(KdcliError, match="NaN, infinity or values too large"):
        coder.quantise(rows)
    rows = rows_of(1, 300)
    rows[2, 3] = bad
    if bad != 1e30:
        with pytest.raises(KdcliError, match="calibration rows hold NaN"):
            fit(rows, None, 0.1)


def test_classes_are_a_quarter_octave_wide_and_without_gaps() -> None:
    scales = np.array([8.0, 7.9, 4.0, 4.1, 1e-9, 1e-12])
    classes = scale_classes(scales)
    assert classes[0] != classes[1] and classes[2] == classes[3] and classes[4] == classes[5]
    assert set(classes) == set(range(classes.max() + 1))
    assert classes[0] < classes[2] < classes[4], "the widest first"


GRIDS = {"no grid": (), "a grid": (Grid(2, 4, 5, 6),), "two": (Grid(0, 3, 4, 4), Grid(13, 3, 4, 5))}
ROWS = 29


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("large", [False, True], ids=["under tables", "adaptive"])
def test_records_of_both_versions_say_the_same(grids: tuple[Grid, ...], large: bool) -> None:
    """And what a reader makes of them is what a plain loop makes of the symbols."""
    coder, rows = fit(rows_of(1, 300), None, 0.05), rows_of(2, ROWS)
    symbols = coder.quantise(rows * 30 if large else rows, grids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "ALWAYS_ADAPTIVE", 0 if large else 1 << 17)
        patch.setattr(adaptive, "LEAST_GROUP", 64)
        first, second = (coder.record(symbols, grids, version=version) for version in (1, 2))
        read = [coder.read(one, Decoder(one["coded"])) for one in (first, second)]
    assert set(first) == {"coded"} and set(second) == ({"coded", "symbols"} if large else {"coded"})
    assert torch.equal(read[0].symbols.int(), read[1].symbols.int()) and read[0][1:] == read[1][1:]
    expected = plainly_restored(coder, symbols, grids)
    for values in coder.restore(read):
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def plainly_restored(coder: Transform, symbols: torch.Tensor, grids: tuple[Grid, ...]) -> torch.Tensor:
    """float64, number by number."""
    bands, values = spectrum.bands(len(symbols), grids), torch.zeros(symbols.shape, dtype=torch.float64)
    for row in range(len(symbols)):
        for dim in range(coder.rank):
            one, shrink = float(symbols[row, dim]), float(coder.shrink[int(coder.classes[bands[row], dim])])
            values[row, dim] = (one - shrink * (one > 0) + shrink * (one < 0)) * coder.step
    return spectrum.inverse(values, grids)


def test_many_symbols_are_adaptive_and_few_are_what_is_smaller() -> None:
    coder = fit(rows_of(1, 20_000), None, 0.02)
    many, few = (coder.record(coder.quantise(rows_of(2, count))) for count in (transform.ALWAYS_ADAPTIVE // D + 1, 300))
    assert set(many) == {"coded", "symbols"} and set(few) == {"coded"}
    strange = coder.quantise(rows_of(3, 300, SPECTRUM.flip(0)))  # nothing like the calibration rows
    tabled, own = (coder.record(strange, version=version) for version in (1, 2))
    assert set(own) == {"coded", "symbols"} and sum(map(len, own.values())) < 0.9 * len(tabled["coded"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from(list(GRIDS.values())), st.integers(0, 10**6))
def test_the_order_of_symbols_is_a_stable_sort_by_class(
    rank: int, count: int, grids: tuple[Grid, ...], seed: int
) -> None:
    """Made block by block, and by sorting as a GPU does."""
    classes = np.random.default_rng(seed).integers(0, count, (spectrum.BANDS, rank)).astype(np.uint8)
    table = fit_table(np.zeros(1), -1, 1)
    order = SymbolOrder(classes, [table] * count, ROWS, grids)
    flat = classes[spectrum.bands(ROWS, grids)].reshape(-1)
    assert np.array_equal(order.places(), np.argsort(flat, kind="stable"))
    assert np.array_equal(order.sorted_on(torch.device("cpu")).numpy(), order.places())
    assert torch.equal(
        order.places_on(torch.device("cpu"))[order.back_on(torch.device("cpu")).long()], torch.arange(flat.size)
    )
    assert order.counts == np.bincount(flat, minlength=count).tolist() and order.symbols == flat.size
