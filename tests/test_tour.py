"""docs/tour.md: quoted code, numbers and figures are current."""
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "docs")]
import tour  # noqa: E402

from support.files import read_json  # noqa: E402
from support.recipe import METHODS  # noqa: E402

PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
NUMBERS = read_json(ROOT / "docs" / "tour" / "numbers.json")


def test_page_has_the_current_code_and_numbers():
    """If it fails: python docs/tour.py --page; or delete the stop in numbers.json first."""
    assert NUMBERS["made with"] == tour.made_with()
    assert tour.rebuild(PAGE, NUMBERS) == PAGE
    changed = PAGE.replace("def residual_cosine(", "def other(")
    changed = re.sub(r"\d(?=<!--0 vmc-->)", "0", changed)
    assert "def other(" in changed and "0<!--0 vmc-->" in changed
    assert tour.rebuild(changed, NUMBERS) == PAGE


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 17])
def test_numbers_that_need_no_training_are_current(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "FIGURES", tmp_path)
    made, written = tour.STOPS[stop](), NUMBERS[str(stop)]
    floats = lambda result: [float(v) for name in sorted(result) for v in re.findall(
        r"\d+\.?\d*(?:e-\d+)?", str(result[name]))]
    assert made.keys() == written.keys()
    np.testing.assert_allclose(floats(made), floats(written), rtol=0.02, atol=0.002)


def test_figures():
    figures = sorted((ROOT / "docs" / "tour").glob("*.[ps][nv]g"))
    shown = re.findall(r"!\[[^]]+\]\(tour/([^)]+)\)", PAGE)
    assert sorted(f.name for f in figures) == sorted(shown)
    sizes = [f.stat().st_size for f in figures]
    assert max(sizes) <= 300_000 and sum(sizes) <= 3_000_000


def test_stops():
    """There are 18 stops, each with its code or a table; each method's docstring names its stop."""
    titles = re.findall(r"^## (\d+)\. .*\?$", PAGE, re.M)
    assert titles == [str(n) for n in range(18)]
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        assert "<!-- code:" in section or "<!-- table:" in section
    for recipe in METHODS.values():
        stop, = re.findall(r"docs/tour\.md,\s+stop (\d+)", recipe.function.__doc__)
        assert f"`{recipe.name}`" in PAGE.split(f"\n## {stop}. ")[1].split("\n## ")[0], recipe.name
