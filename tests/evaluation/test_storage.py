"""What ``test_report.py`` does not reach through the methods of a report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmfusion.evaluation import Condition, MissingnessReport
from mmfusion.evaluation.storage import decode, encode

CONDITION = {"kind": "subset", "name": "a", "rate": None, "pattern": [True], "train_rate": None}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), 0.10000000149011612),
        (np.array([0.1, 1 / 3], np.float32), [0.1, 0.33333334]),
        (np.array([0.1, math.nan]), [0.1, None]),
        (np.array([[True], [False]]), [[True], [False]]),
        (np.int64(3), 3),
        (Path("runs/a"), "runs/a"),
        ((1, math.inf, "x", None), [1, None, "x", None]),
        ({3: Condition("subset", "a", pattern=(True,))}, {"3": CONDITION}),
    ],
)
def test_what_json_holds(value, plain):
    report = MissingnessReport("CMML", ("a",), ("x",), "regression", ("mae",), [], {"it": value})
    text = encode(report)
    assert json.loads(text)["about"]["it"] == plain
    assert decode(text, "metrics.json")["about"]["it"] == plain


def test_every_float32_is_read_as_it_was():
    draw = np.random.default_rng(0)
    bits = draw.integers(2**31 - 2**24, size=2000, dtype=np.int64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    report = MissingnessReport("CMML", (), (), "binary", (), [], {"it": values})
    read = decode(encode(report), "metrics.json")["about"]["it"]
    assert np.array_equal(np.array(read, np.float32), values)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\xff\x00", "UnicodeDecodeError"),
        (
            b'{"format": 1, "method": "x", "names": ["a"], "classes": [], "target": "binary", '
            b'"metrics": "auc", "scores": [], "about": {}, "diagnostics": {}}',
            "metrics is 'auc'",
        ),
    ],
)
def test_what_is_no_report_is_refused_by_name(content, why, tmp_path):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"metrics.json cannot be read .*{why}.*Restore it"):
        MissingnessReport.from_json(tmp_path / "metrics.json")


def test_what_a_later_version_adds_within_a_format_is_passed_over():
    report = MissingnessReport("CMML", ("a",), ("x",), "regression", ("mae",), [])
    content = json.loads(encode(report)) | {"more": 1}
    assert MissingnessReport(**decode(json.dumps(content), "metrics.json")).names == ("a",)
