"""Figures: what they show, in the colours of each method, and what they leave alone."""

import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from evaluation.made_reports import make_diagnostics, make_report
from PIL import Image

from mmfusion.evaluation.contributions import contributions
from mmfusion.evaluation.figures import (
    calibration_figure,
    contributions_figure,
    projection_figure,
    rate_figure,
    subset_figure,
    write_figure,
)
from mmfusion.evaluation.lines import COLOURS, lines, reliability

MANY = tuple(f"k{i}" for i in range(12))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend_of(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_the_map_shows_every_subset_with_its_value():
    reports = [make_report(undefined=("derm",)), make_report("LateFusion", skill=0.3)]
    left, right = subset_figure(reports).axes
    wanted = [
        "-" if i == 0 and one.name == "derm" else f"{report.estimate(one).mean:.3f}"
        for one in reports[0].conditions("subset")
        for i, report in enumerate(reports)
    ]
    assert texts(right) == wanted
    filled, empty = (points.get_offsets() for points in left.collections)
    patterns = np.array([one.pattern for one in reports[0].conditions("subset")])
    assert {(x, y) for x, y in filled.tolist()} == {(c, r) for r, c in np.argwhere(patterns)}
    assert len(filled) + len(empty) == patterns.size


def test_a_curve_goes_through_the_means_with_its_interval():
    reports = [make_report(), make_report("_LateFusion", skill=0.3)]
    figure = rate_figure(reports, kind="slot_rate")
    (axes,) = figure.axes
    for report, bars in zip(reports, axes.containers, strict=True):
        found = [report.estimate(one) for one in report.conditions("slot_rate")]
        line, _, (whiskers,) = bars.lines
        assert line.get_ydata() == pytest.approx([one.mean for one in found])
        ends = np.array([segment[:, 1] for segment in whiskers.get_segments()])
        assert ends == pytest.approx(np.array([(one.low, one.high) for one in found]))
    assert texts(axes) == ["chance"]
    assert legend_of(figure) == ["CMML", "_LateFusion"]


def test_a_method_without_a_kind_of_rates_has_no_points_there():
    reports = [make_report(rates=("slot_rate",)), make_report("LateFusion", rates=("sample_rate",))]
    (axes,) = rate_figure(reports, kind="slot_rate").axes
    assert [len(bars.lines[0].get_xdata()) for bars in axes.containers] == [3, 0]


def test_deeper_is_better_whichever_way_a_metric_goes():
    for metric, skill in (("auc_macro", 0.4), ("ece", -0.4)):
        _, axes = subset_figure([make_report(skill=skill)], metric).axes
        (image,) = axes.images
        assert image.get_array().argmax() == 6  # everything present


def test_train_rates_are_curves_of_their_own():
    figure = rate_figure([make_report(train_rates=(0.3, 0.7))])
    assert legend_of(figure) == ["CMML (trained at 0.3)", "CMML (trained at 0.7)"]


def test_calibration_has_a_panel_for_each_subset_up_to_nine():
    assert len(calibration_figure([make_report()]).axes) == 7
    figure = calibration_figure([make_report(names=MANY)])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["all 12", "all but k0"]
    assert len(figure.axes) == 9


def test_bins_are_joined_over_seeds():
    report = make_report(seeds=(0, 1, 2))
    bins = reliability(report, report.conditions("subset")[0])
    assert bins == pytest.approx(np.array([[0.3, 0.35, 30], [0.75, 0.7, 60], [0.9, 0.8, 30]]))


def test_bins_of_few_cases_are_joined_with_their_neighbours():
    report = make_report(seeds=(0,))
    rows = ((0.1, 0.0, 1), (0.3, 0.5, 19), (0.5, 0.5, 60), (0.7, 0.9, 19), (0.9, 1.0, 1))
    report.scores = [replace(one, calibration=rows) for one in report.scores]
    bins = reliability(report, report.conditions("subset")[0])
    wanted = [[0.29, 0.475, 20], [0.5, 0.5, 60], [0.71, 0.905, 20]]
    assert bins == pytest.approx(np.array(wanted))


def test_chance_far_below_is_a_word_and_squeezes_nothing():
    report = make_report(skill=0.02)
    for one in report.scores:
        one.values["auc_macro"] += 0.4
        one.intervals["auc_macro"] = (one.values["auc_macro"] - 0.01, one.values["auc_macro"])
    (axes,) = rate_figure([report]).axes
    assert texts(axes) == ["chance is at 0.5, far below"]
    assert axes.get_ylim()[0] > 0.85


def test_contributions_are_shapley_values_where_all_subsets_have_a_score():
    report = make_report()
    (axes,) = contributions_figure([report]).axes
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == pytest.approx([one["shapley"] for one in contributions(report).values()])
    assert axes.get_xlabel() == "Shapley value, AUC (macro)"


def test_contributions_are_what_is_lost_where_not_all_subsets_have_a_score():
    (axes,) = contributions_figure([make_report(names=MANY)]).axes
    worth = np.linspace(1, 0.4, 12) / np.linspace(1, 0.4, 12).sum()
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(0.4 * worth)
    assert axes.get_xlabel() == "loss without it, AUC (macro)"


def test_a_loss_of_a_metric_that_is_better_low_is_above_zero():
    (axes,) = contributions_figure([make_report(skill=-0.3)], "ece").axes
    assert all(bar.get_width() > 0 for bar in axes.patches)


def test_the_projection_has_both_kinds_of_points():
    part = make_diagnostics()["projection"]
    figure = projection_figure(part)
    assert [axes.get_title() for axes in figure.axes] == list(part)
    seen, guessed = figure.axes[0].lines
    assert seen.get_xydata() == pytest.approx(np.array(part["clinic"]["observed"]))
    assert guessed.get_xydata() == pytest.approx(np.array(part["clinic"]["synthesised"]))
    assert legend_of(figure) == ["observed", "synthesised"]


def test_a_method_keeps_its_colour():
    reports = [make_report(str(i)) for i in range(3)]
    (rates,) = rate_figure(reports).axes
    for line, bars in zip(lines(reports), rates.containers, strict=True):
        assert bars.lines[0].get_color() == line.colour
    (bars,) = contributions_figure(reports).axes
    faces = {matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars.patches}
    assert faces == set(COLOURS[:3])


def test_the_colours_differ_from_white_and_black_even_without_hue():
    for colour in COLOURS:
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 3, colour


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    def settings():  # the backend is chosen whenever somebody looks at it
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = settings()
    write_figure([make_report()], tmp_path / "report.png")
    assert settings() == before


@pytest.mark.parametrize("names", [("derm",), ("clinic", "derm", "meta"), MANY])
@pytest.mark.parametrize("target", ["multiclass", "regression"])
def test_an_image_is_written(names, target, tmp_path):
    write_figure([make_report(names=names, target=target)], tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert min(image.size) > 400
        assert len(set(image.convert("L").resize((50, 50)).tobytes())) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_more_methods_than_colours_are_still_told_apart():
    reports = [make_report(str(i), seeds=(0,)) for i in range(14)]
    (curves,) = rate_figure(reports).axes
    drawn = [bars.lines[0] for bars in curves.containers]
    assert len({(one.get_color(), one.get_linestyle(), one.get_marker()) for one in drawn}) == 14
    (bars,) = contributions_figure(reports).axes
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars.patches}) == 14


def test_curves_of_many_methods_stay_at_their_rate():
    reports = [make_report(str(i), seeds=(0,)) for i in range(14)]
    (axes,) = rate_figure(reports).axes
    places = np.array([bars.lines[0].get_xdata() for bars in axes.containers])
    assert np.abs(places - [0.0, 0.3, 0.6]).max() <= 0.15 * 0.3 + 1e-9


def test_an_image_grows_with_the_number_of_methods(tmp_path):
    few, many = ([make_report(str(i), seeds=(0,)) for i in range(count)] for count in (2, 14))
    for name, reports in (("few", few), ("many", many)):
        write_figure(reports, tmp_path / f"{name}.svg")
    sizes = [
        [float(size) for size in re.findall(r'<svg[^>]* width="([\d.]+)pt"', text)]
        for text in ((tmp_path / f"{name}.svg").read_text() for name in ("few", "many"))
    ]
    assert sizes[1][0] - sizes[0][0] >= 72 * 0.9 * 10


def test_an_interval_beside_its_mean_has_no_whisker_on_the_far_side():
    report = make_report(seeds=(0,))
    for one in report.scores:
        mean = one.values["auc_macro"]
        one.intervals["auc_macro"] = (mean + 0.01, mean + 0.02)
    (axes,) = rate_figure([report]).axes
    line, _, (whiskers,) = axes.containers[0].lines
    lows = [segment[0, 1] for segment in whiskers.get_segments()]
    assert lows == pytest.approx(line.get_ydata())


def test_the_suffix_is_the_format(tmp_path):
    write_figure([make_report()], tmp_path / "report.svg")
    assert "<svg" in (tmp_path / "report.svg").read_text()


@pytest.mark.parametrize(
    ("draw", "rule"),
    [
        (lambda report: rate_figure([report]), "CMML has nothing to draw of kind 'per_modality'"),
        (lambda report: subset_figure([report]), "nothing to draw of kind 'subset'.*Evaluate"),
        (lambda report: calibration_figure([report]), "nothing to draw of kind 'subset'.*Evaluate"),
        (lambda report: write_figure([report], "x.png"), "neither subsets nor rates.*Evaluate"),
    ],
)
def test_nothing_to_draw_is_said(draw, rule):
    report = make_report(rates=())
    report.scores = [one for one in report.scores if one.condition.kind == "always_missing"]
    with pytest.raises(ValueError, match=rule):
        draw(report)
