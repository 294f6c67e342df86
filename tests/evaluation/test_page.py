"""The page: what it says, that nothing in it can break it, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from evaluation.made_reports import make_diagnostics, make_report

from mmfusion.evaluation import Condition, merge
from mmfusion.evaluation.page import write_page
from mmfusion.evaluation.summary import miscalibration, summarise
from mmfusion.evaluation.tables import matrices

NASTY = ("<script>alert(1)</script>", "a & \"b' --><style>", "$x^2$ {{ 7 * 7 }}")
MANY = tuple(f"k{i}" for i in range(12))
PAGES = {
    "several methods": lambda: [
        make_report(diagnostics=make_diagnostics()),
        make_report("LateFusion", skill=0.3),
        make_report("A method with a very long name that goes on", skill=0.2),
    ],
    "one modality": lambda: [make_report(names=("derm",), seeds=(0,))],
    "twelve modalities": lambda: [
        make_report(names=MANY, diagnostics=make_diagnostics(MANY)),
        make_report("LateFusion", MANY, skill=0.3),
    ],
    "regression": lambda: [
        make_report(target="regression", train_rates=(0.3, 0.7), synthetic=False)
    ],
    "subsets alone": lambda: [make_report(rates=(), undefined=("meta", "clinic + derm + meta"))],
    "markup": lambda: [
        make_report(NASTY[0], NASTY, undefined=(NASTY[0],), diagnostics=make_diagnostics(NASTY)),
        make_report("_m$", NASTY),
    ],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """All of them, written once."""
    folder = tmp_path_factory.mktemp("pages")
    written = {}
    for name, reports in PAGES.items():
        write_page(reports(), folder / "report.html")
        written[name] = (folder / "report.html").read_text()
    return written


@pytest.fixture(params=PAGES, ids=str)
def page(request, pages):
    return pages[request.param]


class Outline(HTMLParser):
    """Tags, ids, references and text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.used, self.texts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), value
            if name in ("href", "xlink:href", "aria-labelledby"):
                self.used.append(value.removeprefix("#"))
            assert name != "src"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def test_markup_is_whole_and_loads_nothing(page):
    found = Outline(page)
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert set(found.used) <= set(found.ids)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert {"header", "main", "footer", "h1", "h2", "th"} <= set(found.tags)
    assert found.tags.count("h1") == 1
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    outside = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_nothing_undefined_is_printed_as_if_it_were_a_number(page):
    words = " ".join(Outline(page).texts)
    assert not re.search(r"\b(nan|None|inf)\b", words)


def test_names_are_shown_as_they_are(pages):
    found = Outline(pages["markup"])
    for name in NASTY:
        assert any(name in text for text in found.texts)
    assert any(text.strip() == "_m$" for text in found.texts)  # in a legend too
    assert "script" not in found.tags


def small_report(*args, **options):
    """Quick to draw."""
    return make_report(*args, names=("clinic", "derm"), rates=("slot_rate",), **options)


def text_of(reports, tmp_path):
    write_page(reports, tmp_path / "report.html")
    return " ".join(" ".join(Outline((tmp_path / "report.html").read_text()).texts).split())


def test_synthetic_data_are_announced_and_real_ones_are_not(tmp_path):
    assert "SYNTHETIC DATA." in text_of([small_report()], tmp_path)
    assert "SYNTHETIC" not in text_of([small_report(synthetic=False)], tmp_path)


def test_footer_has_versions_seeds_and_hashes(tmp_path):
    report = small_report()
    words = text_of([report], tmp_path)
    assert "mmfusion 0.1.0" in words
    assert "Seeds 0, 1" in words
    drawn = [one for one in report.scores if one.condition.rate is not None]
    assert drawn
    for one in drawn:
        assert one.sha256[:16] in words


def test_every_score_and_reason_is_there(tmp_path):
    report = small_report(undefined=("derm",))
    words = text_of([report], tmp_path)
    for condition in report.conditions():
        if condition.name != "derm":
            found = report.estimate(condition)
            assert f"{found.mean:.3f} {found.low:.3f} to {found.high:.3f}" in words, condition
    assert "CMML, derm, AUC (macro): none of 40 cases is MEL" in words


def test_methods_are_ranked_or_it_says_why_not(tmp_path):
    good, bad = small_report(), small_report("LateFusion", skill=0.3)
    words = text_of([bad, good], tmp_path)
    assert "Of 2 methods it ranks 2; CMML leads LateFusion by" in words
    bad = small_report("LateFusion", skill=0.3, seeds=(5,))
    words = text_of([good, bad], tmp_path)
    assert "The methods are not ranked:" in words
    assert "same conditions. Evaluate" in words


def test_the_summary_says_what_absence_costs():
    report = make_report(seeds=(0,))
    tiles, said = summarise([report], "auc_macro")
    # worth 5/9.5 of the whole, so without it 0.5 + 0.4 * (1 - 1/2.1)
    assert ("Most needed", "clinic", "without it 0.710") in tiles
    assert ("All present", "0.900", "AUC (macro), 0.880 to 0.930") in tiles
    (costs,) = [one for one in said if "absence" in one]
    assert costs.startswith("What the absence of one modality costs: without clinic 0.710, a loss")
    assert "More modalities never did worse." in said


def test_the_summary_admits_that_more_did_worse():
    report = make_report(seeds=(0,), skill=-0.1)
    _, said = summarise([report], "auc_macro")
    (steps,) = [one for one in said if one.startswith("More modalities")]
    assert "did worse 9 times" in steps
    assert "a gain of" in " ".join(said)


def test_a_metric_that_is_better_low_is_read_so():
    report = make_report(seeds=(0,), skill=-0.3)
    tiles, said = summarise([report], "ece")
    assert ("Most needed", "clinic", "without it 0.343") in tiles
    assert "More modalities never did worse." in said


def test_the_summary_of_several_train_rates_speaks_of_the_first_alone():
    good, bad = make_report(seeds=(0,), train_rates=(0.0,)), make_report(skill=-0.1, seeds=(0,))
    scores = [replace(one, condition=replace(one.condition, train_rate=0.5)) for one in bad.scores]
    joined = merge([good, replace(bad, scores=scores)])
    assert "More modalities never did worse." in summarise([joined], "auc_macro")[1]
    other = merge([replace(bad, scores=scores), good])
    (steps,) = [one for one in summarise([other], "auc_macro")[1] if one.startswith("More")]
    assert "did worse 9 times; most from" in steps
    assert "trained" not in steps


def test_rates_in_another_order_stand_below_their_headers():
    report = make_report(rates=("slot_rate",), seeds=(0,), train_rates=(0.0, 0.5))
    rated = [one for one in report.scores if one.condition.kind == "slot_rate"]
    report.scores = [*rated[:3], *rated[:3:-1]]  # of the second, 0.6 and 0.3
    (found,) = matrices([report], "auc_macro")
    assert found["rates"] == [0.0, 0.3, 0.6]
    assert [[text for text, _ in cells] for _, cells in found["rows"]] == [
        ["0.900", "0.780", "0.660"],
        ["-", "0.780", "0.660"],
    ]


def test_what_modalities_add_is_shown_for_each_train_rate(tmp_path):
    report = make_report(rates=(), seeds=(0,), train_rates=(0.0, 0.5))
    for one in report.scores:
        if one.condition.train_rate == 0.5:
            one.values["auc_macro"] = 0.5 + (one.values["auc_macro"] - 0.5) / 2
    words = text_of([report], tmp_path)
    assert "clinic CMML (trained at 0) 0.190 0.190" in words
    assert "clinic CMML (trained at 0.5) 0.095 0.095" in words


def test_nothing_is_claimed_of_scores_that_are_not_known():
    names = [one.name for one in make_report().conditions()]
    for known in (set(), {"clinic"}, {"clinic", "derm"}):
        report = make_report(undefined=[name for name in names if name not in known])
        said = " ".join(summarise([report], "auc_macro")[1])
        assert "With every modality present CMML has no AUC (macro)." in said
        assert "Whether more modalities do worse is not known" in said
        assert "never did worse" not in said
        assert "scores -" not in said


def test_a_page_of_very_many_modalities_is_written(tmp_path):
    made = make_report(rates=(), seeds=(0,))
    patterns = [tuple(k != gone for k in range(40)) for gone in (None, *range(40))]
    conditions = [Condition("subset", str(i), pattern=row) for i, row in enumerate(patterns)]
    scores = [replace(made.scores[0], condition=one) for one in conditions]
    report = replace(made, names=tuple(f"k{i}" for i in range(40)), scores=scores)
    assert "loss without it" in text_of([report], tmp_path)


def test_guesses_are_compared_with_both_rivals():
    _, said = summarise([make_report(diagnostics=make_diagnostics())], "auc_macro")
    found = [one for one in said if one.startswith("Its guesses")]
    assert found == [
        "Its guesses are closer to the hidden truth than the nearest training case for every "
        "modality (cosine).",
        "Its guesses are never closer to the hidden truth than the mean of the true class "
        "(cosine).",
    ]


def test_confidence_is_off_by_the_mean_distance():
    report = make_report()
    error, excess = miscalibration(report, report.conditions("subset")[0])
    assert error == pytest.approx((0.05 * 10 + 0.05 * 20 + 0.1 * 10) / 40)
    assert excess == pytest.approx((-0.05 * 10 + 0.05 * 20 + 0.1 * 10) / 40)


def test_calibration_of_a_label_is_of_its_probability_and_not_of_decisions(tmp_path):
    """A label given 1 % that holds in 30 % of cases: not cautious, but far too low."""
    report = replace(small_report(), target="binary", classes=("no", "yes"))
    scores = [replace(one, calibration=((0.01, 0.3, 40),)) for one in report.scores]
    words = text_of([replace(report, scores=scores)], tmp_path)
    assert "Its probability is off by 29.0 percentage points on average" in words
    assert "on the whole too low by 29.0." in words
    assert "given yes with a probability of 80 %, 80 % are so" in words
    assert "Observed frequency over predicted probability" in words
    assert not re.search("confidence|too sure|too cautious|[Aa]ccuracy over", words)
    assert "80 % confidence, 80 % are right" in text_of([small_report()], tmp_path)


def test_methods_that_cannot_be_tested_are_ranked_and_it_says_why(tmp_path):
    reports = [small_report(), small_report("LateFusion", skill=0.3)]
    for report in reports:
        report.scores = [replace(one, model=0) for one in report.scores]
    words = text_of(reports, tmp_path)
    assert "No test: one model per method, whose patterns are no replicates of it." in words
    assert "adjusted by Holm" not in words


@pytest.mark.parametrize(
    ("reports", "rule"),
    [
        ([], "reports is empty.*one report or more.*Pass"),
        (
            [make_report(), make_report("x", ("a", "b", "c"))],
            r"names of 'x'.*one task.*Write a page",
        ),
        ([make_report(), make_report("x", target="regression")], r"target of 'x'.*one task"),
    ],
)
def test_what_cannot_stand_on_one_page_is_refused(reports, rule, tmp_path):
    with pytest.raises(ValueError, match=rule):
        write_page(reports, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metric='mcc'"):
        write_page([make_report()], tmp_path / "report.html", metric="mcc")


# In a browser -------------------------------------------------------------------------------------

# Looks at the page in frames of two widths, and writes what it finds in place of itself.
INSPECTOR = """
<script>
const found = {};
function rgba(text) {
  const numbers = text.match(/[\\d.]+(e-\\d+)?/g).map(Number);
  const scale = text.startsWith("color(") ? 255 : 1;
  const [r, g, b] = numbers.slice(0, 3).map(value => value * scale);
  return [r, g, b, numbers.length > 3 ? numbers[3] : 1];
}
function luminance([r, g, b]) {
  const [x, y, z] = [r, g, b].map(v => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
function behind(view, element) {
  for (let one = element; one; one = one.parentElement) {
    const colour = rgba(view.getComputedStyle(one).backgroundColor);
    if (colour[3] > 0) return colour;
  }
}
function inspect(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(one => { one.open = true; });
  const visible = one => {
    const box = one.getBoundingClientRect();
    return box.width > 20 && box.height > 20;
  };
  const svgs = [...page.querySelectorAll("svg")];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  let lowest = 21, where = "", texts = 0;
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || parent.closest("style")) continue;
    const style = view.getComputedStyle(parent);
    const front = parent.closest("svg") ? rgba(style.fill) : rgba(style.color);
    const [a, b] = [front, behind(view, parent)].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts += 1;
    if (contrast < lowest) [lowest, where] = [contrast, walker.currentNode.data.trim()];
  }
  return {
    overflow: page.documentElement.scrollWidth - view.innerWidth,
    svgs: svgs.length,
    hidden: svgs.filter(one => !visible(one)).map(one => one.getAttribute("aria-label")),
    nameless: svgs.filter(one => !one.getAttribute("aria-label")).length,
    wide: svgs.filter(one => one.getBoundingClientRect().right > view.innerWidth).length,
    sections: [...page.querySelectorAll("section")].filter(one => !visible(one)).length,
    contrast: lowest, where, texts,
    background: luminance(rgba(view.getComputedStyle(page.body).backgroundColor)),
  };
}
window.onload = () => {
  for (const frame of document.querySelectorAll("iframe")) found[frame.name] = inspect(frame);
  document.body.textContent = "FOUND" + JSON.stringify(found) + "FOUND";
};
</script>
"""


def browse(pages, folder, *, dark=False):
    """What the inspector finds in each page at each width, and what the browser logs."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on PATH: install it to see the page as a browser does")
    frames = [
        f'<iframe name="{name}, {width}" width="{width}" height="800" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (360, 1200)
    ]
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{''.join(frames)}{INSPECTOR}")
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        *("--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(ran.stdout).split("FOUND")[1])
    return found, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_all_of_every_page_at_any_width(pages, dark, tmp_path):
    found, log = browse(pages, tmp_path, dark=dark)
    assert log == []
    assert len(found) == 2 * len(pages)
    for where, seen in found.items():
        assert seen["svgs"] == pages[where.split(", ")[0]].count("<svg ") > 0, where
        assert seen["hidden"] == [], where
        assert seen["nameless"] == seen["wide"] == seen["sections"] == 0, where
        assert seen["overflow"] <= 0, where
        assert seen["texts"] > 50, where
        assert seen["contrast"] >= 4.5, (where, seen["where"])
        assert (seen["background"] < 0.1) == dark, where


def test_the_inspection_sees_what_is_wrong(tmp_path):
    """A page with a fault of each kind, so that the test above can fail."""
    broken = (
        "<body style='background: white'><p style='color: #999; width: 2000px'>pale and wide</p>"
        "<svg width=0 height=0></svg><section></section><script>undefined.x</script></body>"
    )
    found, log = browse({"broken": broken}, tmp_path)
    assert any("Uncaught TypeError" in line for line in log)
    seen = found["broken, 360"]
    assert seen["overflow"] > 0
    assert seen["hidden"] == [None]
    assert seen["nameless"] == seen["sections"] == 1
    assert seen["contrast"] < 4.5
    assert seen["where"] == "pale and wide"
