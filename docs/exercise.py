"""Copy the repository with a few functions removed, and check what you write in their place.

    python docs/exercise.py 3             # make exercises/03
    python docs/exercise.py 3 --check     # check exercises/03, one line per check

docs/exercises.md describes the exercises; exercise_checks.py holds the checks.
"""
import argparse
import ast
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "assets", "scores", "support", "tiny"  # copied with the scripts

# {number: (title, file, what is removed from it: functions and entries of dicts)}
EXERCISES = {
    1: ("The residual and its cosine", "losses.py", ["residual", "residual_cosine"]),
    2: ("The target v, and back to x0 and noise", "sampler.py",
        ["NoiseSchedule.target", "NoiseSchedule.to_x0_eps"]),
    3: ("DDIM and its inversion", "sampler.py", ["ddim", "ddim_inversion"]),
    4: ("Classifier-free guidance", "sampler.py", ["classifier_free_guidance"]),
    5: ("Attention over time", "model.py", ["TemporalTransformer.forward"]),
    6: ("LoRA as a hook", "lora.py", ["LoRA.hook"]),
    7: ("Three layer sets", "lora.py", ["LAYERS[temporal-attention-qkv]",
                                        "LAYERS[cross-attention-kv]", "LAYERS[temporal]"]),
    8: ("The debiasing of MotionDirector", "losses.py", ["debias"]),
    9: ("MotionDirector", "train.py", ["motiondirector"]),
    10: ("NewMove's distribution of timesteps", "sampler.py", ["timestep_weights"]),
    11: ("Heun's sampler", "sampler.py", []),
    12: ("Break --resume", "train.py", []),
}

HEUN = '''def heun(schedule, predict, x, steps, seeds=None, on_step=None):
    """Heun's method (Karras et al. 2022, Algorithm 1) along x̄ = x/√ᾱ over σ = √((1−ᾱ)/ᾱ), where
    dx̄/dσ = ε. A DDIM step is the Euler step; the slopes ε̂ at its two ends are averaged. The last
    step has no timestep at its end and stays a DDIM step: 2·steps − 1 predictions."""
    raise NotImplementedError("Fill me in: heun")


'''


def copy(number):
    """Make exercises/<number>. Exits with an error if it exists."""
    folder, (title, file, names) = folder_of(number), EXERCISES[number]
    if folder.exists():
        sys.exit(f"error: {folder} exists and may hold your work; rename or delete it to start "
                 "again.")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "work")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    text = (ROOT / file).read_text(encoding="utf-8")
    for name in names:
        text = remove(text, name)
    if number == 11:
        text = text.replace("\nSAMPLERS = {", f"\n{HEUN}SAMPLERS = {{", 1)
    (folder / file).write_text(text, encoding="utf-8")
    print(f"{title}: edit {os.path.relpath(folder / file)}")
    print(f"then: python docs/exercise.py {number} --check")


def folder_of(number):
    """The folder of an exercise."""
    return ROOT / "exercises" / f"{number:02d}"


def remove(text, name):
    """Python source without the body of a function, or without the entry of a dict. Signature and
    docstring remain."""
    if entry := re.fullmatch(r"LAYERS\[(.*)\]", name):
        pattern = re.compile(rf'^    ("{entry[1]}"): .*$', re.MULTILINE)
        return pattern.sub(rf'    \1: "Fill me in: {entry[1]}",', text)
    node = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    docstring, lines = node.body[0], text.splitlines(keepends=True)
    indent = " " * docstring.col_offset
    lines[docstring.end_lineno : node.end_lineno] = [
        f'{indent}raise NotImplementedError("Fill me in: {name}")\n']
    return "".join(lines)


def check(number):
    """Run `report` in a process whose modules are those of exercises/<number>. Returns its exit
    status, 1 if a check is not right yet."""
    folder = folder_of(number)
    if not folder.exists():
        sys.exit(f"error: {folder} does not exist; python docs/exercise.py {number} makes it.")
    code = f"import exercise, sys; sys.exit(not exercise.report({number}))"
    # The current folder comes first on the path of -c.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "docs"), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment).returncode


def report(number):
    """Print one line per check. Returns True if all are right."""
    right = True
    try:
        checks = importlib.import_module("exercise_checks").CHECKS[number - 1]
        for title, expected, find in checks():
            line = line_of(title, expected, find)
            print(line, flush=True)
            right &= line.startswith("right")
    except Exception as error:  # an import failed, mostly
        print(f"not yet  {describe(error)}")
        return False
    return right


def line_of(title, expected, find):
    """The line of one check."""
    try:
        found = find()
    except Exception as error:
        return f"not yet  {title}: {describe(error)}"
    if shapes(expected) != shapes(found):
        return f"not yet  {title}: expected shape {shapes(expected)}, found {shapes(found)}"
    expected, found = elements(expected), elements(found)
    if len(expected) == len(found) and all(map(equal, expected, found)):
        return f"right    {title}"
    return f"not yet  {title}: expected {show(expected)}, found {show(found)}"


def shapes(value):
    """The shape of a tensor, or the shapes of the tensors in a list; () for numbers."""
    values = value if isinstance(value, list) else [value]
    found = [str(tuple(x.shape)) for x in values if getattr(x, "shape", ())]
    return " and ".join(found) or "()"


def elements(value):
    """The numbers of a tensor, or of the tensors in a list, in one list."""
    if isinstance(value, list):
        return sum(map(elements, value), [])
    return value.flatten().tolist() if hasattr(value, "tolist") else [value]


def equal(expected, found):
    """True for equal values, if floats are equal to a thousandth."""
    if isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-3, abs_tol=1e-6)
    return expected == found


def show(values):
    """The first eight values, with five digits for numbers."""
    shown = [f"{v:.5g}" if isinstance(v, float) else str(v) for v in values[:8]]
    text = ", ".join(shown + ["…"] * (len(values) > 8))
    return text if len(values) == 1 else f"[{text}]"


def describe(error):
    """An error in one line, with the last line of the exercise that led to it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    inside = [f for f in traceback.extract_tb(error.__traceback__)
              if Path(f.filename).is_relative_to(Path.cwd())]
    if isinstance(error, NotImplementedError) or not inside:
        return text
    return f"{text} ({Path(inside[-1].filename).name}, line {inside[-1].lineno})"


def main():
    """Make or check an exercise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int, help="1 to 12")
    parser.add_argument("--check", action="store_true", help="check the exercise")
    args = parser.parse_args()
    if args.number not in EXERCISES:
        sys.exit(f"error: {args.number}: expected the number of an exercise, 1 to 12.")
    sys.exit((check if args.check else copy)(args.number))


if __name__ == "__main__":
    main()
