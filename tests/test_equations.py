"""docs/equations.md: every equation of the papers has a row, and docstrings name its number."""
import importlib
import re

import pytest
from conftest import ROOT

# The numbered equations of the four papers, and those that the code uses of other papers.
EQUATIONS = {"VMC": [*range(1, 18), "Algorithm 1"], "MotionDirector": range(1, 8),
             "NewMove": [1, 2, 3, "Sec. 3.2"],
             "Customize-A-Video": [1, 2, 3, 4, 5, "Sec. A.1", "Sec. A.2"],
             "Ho et al. 2020": [2, 4, 6, 7, 11, 14, 15], "Song et al. 2021": [9, 12, 13, 16],
             "Ho & Salimans 2022": [6], "Salimans & Ho 2022": ["App. D"],
             "Lu et al. 2022": ["Algorithm 2"], "Hu et al. 2021": [3], "Vaswani et al. 2017": [1]}
PAGE = (ROOT / "docs" / "equations.md").read_text()
CELL = r" ([^|]+) \|"


def rows(paper):
    """(number, equation, meaning, function) per row of a paper's table."""
    section = PAGE.split(f"\n## {paper}\n")[1].split("\n## ")[0]
    return re.findall(rf"^\|{CELL}{CELL}{CELL}{CELL}$", section, re.MULTILINE)[1:]


def docstring(file, name):
    """The docstring of a function or method in one line."""
    found = importlib.import_module(file)
    for part in name.split("."):
        found = getattr(found, part)
    return " ".join(found.__doc__.split())


def names(text, paper, number):
    """True if a docstring names an equation, or a section or algorithm, after its paper."""
    parts = re.split(f"({'|'.join(map(re.escape, EQUATIONS))})", text)
    own = [after for cited, after in zip(parts[1::2], parts[2::2]) if cited == paper]
    pattern = rf"Eqs?\. (\d+, )*{number}\b" if number.isdigit() else rf"{re.escape(number)}\b"
    return any(re.search(pattern, after) for after in own)


def test_the_check_of_docstrings_by_hand():
    text = "Noise (VMC Eqs. 1, 12; Ho et al. 2020, Eq. 4 and Sec. 3.2)."
    for paper, number in (("VMC", "12"), ("Ho et al. 2020", "4"), ("Ho et al. 2020", "Sec. 3.2")):
        assert names(text, paper, number)
    for paper, number in (("VMC", "2"), ("VMC", "4"), ("Ho et al. 2020", "1")):
        assert not names(text, paper, number)


@pytest.mark.parametrize("paper", EQUATIONS)
def test_equations_have_rows_and_functions_that_name_them(paper):
    table = rows(paper)
    assert [number for number, *_ in table] == [str(n) for n in EQUATIONS[paper]]
    for number, equation, _, function in table:
        assert equation.count("$") % 2 == 0 == equation.count("`") % 2, number
        functions = re.findall(r"`(\w+)\.py: ([\w.]+)`", function)
        assert functions or re.fullmatch(r"No line: .+\.", function), number
        for file, name in functions:
            assert names(docstring(file, name), paper, number), f"{paper} {number}: {name}"
