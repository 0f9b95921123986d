"""The measurement of learned classes: its figures and its table."""

import numpy as np

from benchmarks.digits_judge import DigitsJudge
from benchmarks.personal import SCALES, measure, table


def test_real_digits_have_figures_of_one():
    judge = DigitsJudge()
    real = np.rint((judge.real[judge.labels == 8] + 1) * 127.5).astype(np.uint8)
    few, rest = real[:16], real[16:]
    found = measure(rest[..., None] / 255, 8, few, rest, judge)
    assert found.accuracy > 0.97 and abs(found.spread - 1) < 0.1 and abs(found.distance - 1) < 1e-6
    copies = measure(np.repeat(few, 4, 0)[..., None] / 255, 8, few, rest, judge)
    assert copies.distance < 0.01
    wrong = judge.real[judge.labels == 1][:40, ..., None] / 2 + 0.5
    assert measure(wrong, 8, few, rest, judge).accuracy < 0.1


def test_table_has_mean_and_worst():
    rows = [
        {
            "digit": digit,
            "draw": draw,
            "depth": "sites",
            "bytes": 5000,
            "learned": {"seconds": 60.0},
            "figures": {f"{s:g}": {"accuracy": value, "spread": 0.8, "distance": 0.9} for s in SCALES},
        }
        for digit, draw, value in ((0, 0, 0.8), (0, 1, 0.9), (5, 0, 1.0))
    ]
    text = table(rows)
    assert "| sites | 1 | 90.0% | 80.0% | 0.80 | 0.80 | 0.90 | 0.90 | 5,000 | 60 |" in text
    assert "| 0 | sites | 2 | 80.0%, 90.0% |" in text and "vector" not in text
