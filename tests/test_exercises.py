"""The checks of docs/exercises.md fail with the bodies removed, and pass with the repository's."""
import contextlib
import os
import re
import subprocess
import sys
from functools import partial

import open_clip  # noqa: F401  (imported before the forks, since it takes seconds)
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, end_of, fork

import lora
import losses
import sampler
import train
from support import fast

sys.path[:0] = [str(ROOT / "docs")]

import exercise  # noqa: E402
import exercise_checks  # noqa: E402

PAGE = (ROOT / "docs" / "exercises.md").read_text()


def lines_of(number, capsys):
    """The checker's lines for the modules of this process, the repository's."""
    exercise.report(number)
    return capsys.readouterr().out.splitlines()


def report_on(folder, number):
    """Forget the repository's modules, and print the checker's lines for those of a folder."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(str(ROOT)) and "site-packages" not in path and name != "exercise":
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    with open("lines.txt", "w", buffering=1) as out, contextlib.redirect_stdout(out):
        exercise.report(number)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A function that makes the copy of an exercise in a temporary folder, and returns it."""
    monkeypatch.setattr(exercise, "folder_of", lambda number: tmp_path / f"{number:02d}")
    return lambda number: exercise.copy(number) or tmp_path / f"{number:02d}"


@pytest.mark.parametrize("number", range(1, 12))
def test_every_check_fails_with_the_bodies_removed(number, copied):
    folder = copied(number)
    assert end_of(fork(lambda: report_on(folder, number), folder / "errors.txt")) == 0
    lines = (folder / "lines.txt").read_text().splitlines()
    removed = r"NotImplementedError: Fill me in: \S+$" if number != 7 else r"expected \d+, found 0$"
    assert lines and all(re.match(f"not yet  .*: {removed}", line) for line in lines), lines
    assert not (folder / "errors.txt").read_text()


@pytest.mark.parametrize("number", range(1, 11))
def test_every_check_passes_with_the_repositorys_code(number, capsys):
    lines = lines_of(number, capsys)
    assert lines and all(line.startswith("right    ") for line in lines), lines


def one_vector(pred, target, *, stride=1):
    """Residuals of all clips in one vector."""
    flat = lambda x: losses.residual(x, stride).transpose(0, 2).flatten(1)
    return (1 - F.cosine_similarity(flat(pred), flat(target), dim=-1)).mean()


def per_pair(pred, target, *, stride=1):
    """No average."""
    flat = lambda x: losses.residual(x, stride).transpose(1, 2).flatten(2)
    return 1 - F.cosine_similarity(flat(pred), flat(target), dim=-1)


def latents_twice(network, text, empty=None, scale=1.0):
    """As many latents as texts."""
    if empty is None or scale == 1.0:
        return lambda x, t: network(x, t, text)

    def predict(x, t):
        u, c = network(torch.cat([x, x]), t, torch.cat([empty, text])).chunk(2)
        return u + scale * (c - u)

    return predict


def wrong_for_convolutions(function):
    """A hook that is right for linear layers."""
    right = lora.LoRA.hook

    def hook(self, A, B, layer, inputs, out):
        if A.dim() == 2 or not self.active:
            return right(self, A, B, layer, inputs, out)
        return function(self, A, B, layer, inputs[0], out)

    return hook


@wrong_for_convolutions
def mixed_pixels(self, A, B, layer, x, out):
    """A convolution over frames and pixels in one axis."""
    low = F.conv1d(F.conv1d(x.flatten(2), A.flatten(2), padding=1), B.flatten(2))
    return out + self.scale * fast.dropout(low.view_as(out), self.dropout, layer.training)


@wrong_for_convolutions
def no_scale(self, A, B, layer, x, out):
    """No scale and no dropout."""
    return out + F.conv2d(F.conv2d(x, A[..., 0], padding=(1, 0)), B[..., 0])


@wrong_for_convolutions
def extra_axis(self, A, B, layer, x, out):
    """The axis added for the kernels is not removed."""
    low = F.conv3d(F.conv3d(x[..., None], A, padding=(1, 0, 0)), B)
    return out[..., None] + self.scale * fast.dropout(low, self.dropout, layer.training)


def three_losses(ex, beta=1.0, spatial_prob=0.8, frozen=("appearance",)):
    """The two terms of Eq. 7 in two losses."""
    z = ex.add_noise(ex.next_clip())
    spatial = "appearance" in ex.trainables and (
        ex.rand() < spatial_prob or "motion" not in ex.trainables)
    if spatial:
        ex.train("appearance")
        yield losses.mse(*ex.predict(ex.single_frame(z)))
    if "motion" in ex.trainables:
        ex.train("motion", frozen=frozen if spatial else ())
        pred, target = ex.predict(z)
        yield losses.mse(pred, target)
        yield losses.appearance_debiased(pred, target, ex.random_frame(z), beta)


@pytest.mark.parametrize("number, owner, name, wrong, message", [
    (1, losses, "residual", lambda x, stride=1: x[:, :, 1:] - x[:, :, :-1],
     "stride 2: expected shape (1, 2, 1, 1, 1), found (1, 2, 2, 1, 1)"),
    (1, losses, "residual", lambda x, c=1: x[:, :, c:] - x[:, :, : x.shape[2] // c * c - c],
     "found [ZeroDivisionError, shape (1, 2, 0, 1, 1)]"),
    (1, losses, "residual_cosine", one_vector, "two clips: expected 0.26, found 0.012"),
    (1, losses, "residual_cosine", per_pair, "two frame pairs: expected shape (), found (1, 2)"),
    (4, sampler, "classifier_free_guidance", latents_twice, "[18, 24, one call with 2 latents "
     "and 4 texts], found [18, 24, one call with 4 latents and 4 texts]"),
    (6, lora.LoRA, "hook", mixed_pixels, "h·w = 2: expected ["),
    (6, lora.LoRA, "hook", no_scale, "expected [2100, 3210, 320], found [1050, 1605, 160]"),
    (6, lora.LoRA, "hook", no_scale, "expected [0.5, 0.5, 0, 0], found [0.5, 0, 0, 0]"),
    (6, lora.LoRA, "hook", extra_axis, "expected shape (1, 1, 3, 1), found (1, 1, 3, 1, 1)"),
    (9, train, "motiondirector", three_losses, "expected [2, 2, 2, 2, 1], found [3, 3, 3, 3, 2]"),
    (9, train, "motiondirector", partial(three_losses, frozen="appearance"),
     "BadInput: train: frozen='appearance'; expected a tuple, ('appearance',)."),
])
def test_wrong_solutions_are_found(number, owner, name, wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(owner, name, wrong)
    assert any(line.startswith("not yet") and message in line for line in lines_of(number, capsys))


def heun(schedule, predict, x, steps, seeds=None, on_step=None):
    """The solution of exercise 11."""
    S = schedule
    for t in S.timesteps(steps):
        s = t - S.num_train_timesteps // steps
        a, b = S.alpha_bar[t].item(), S.alpha_bar_prev(s)
        x0, eps = S.to_x0_eps(predict(x, t), x, a)
        euler = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        if s >= 0:
            _, end = S.to_x0_eps(predict(euler, s), euler, b)
            step = ((1 - b) / b) ** 0.5 - ((1 - a) / a) ** 0.5
            euler = b**0.5 * (x / a**0.5 + step * (eps + end) / 2)
        x = euler
    return x


def test_heun_passes_and_ddim_does_not(monkeypatch, capsys):
    monkeypatch.setattr(sampler, "heun", heun, raising=False)
    assert all(line.startswith("right") for line in lines_of(11, capsys))
    monkeypatch.setattr(sampler, "heun", sampler.ddim)
    lines = lines_of(11, capsys)
    assert lines[0].endswith("found [0.19216, 0.10597, 0.05672, 70]")


def test_resume_is_broken_by_a_generator_that_lives_as_long_as_the_process(monkeypatch, capsys):
    """A key without the step breaks training, not --resume."""
    words = lambda: [line.partition("  ")[0] for line in lines_of(12, capsys)]
    assert words() == ["right", "right", "not yet"]
    start = train.Example.__init__

    def replace(key):
        monkeypatch.setattr(train.Example, "__init__", lambda self, run, step, number: (
            start(self, run, step, number), vars(self).update(g=key(run)))[0])

    replace(lambda run: sampler.generator(run.flags.seed))
    title, expected, find = next(exercise_checks.break_resume())
    assert (title, expected, find()) == ("the noise of two steps differs", True, False)
    replace(lambda run: vars(run).setdefault("stream", sampler.generator(run.flags.seed)))
    assert words() == ["right"] * 3


def test_wrong_calls_and_files_are_refused_in_one_line(copied, capfd):
    for number in ("0", "13"):
        result = subprocess.run([sys.executable, ROOT / "docs" / "exercise.py", number],
                                capture_output=True, text=True)
        expected = f"error: {number}: expected the number of an exercise, 1 to 12.\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)
    with pytest.raises(SystemExit, match=r"01 does not exist; python docs/exercise.py 1 makes it"):
        exercise.check(1)
    work = copied(1) / "losses.py"
    work.write_text("def residual(:\n")
    with pytest.raises(SystemExit, match="01 exists and may hold your work"):
        copied(1)
    assert work.read_text() == "def residual(:\n"
    assert exercise.check(1) == 1
    line = "not yet  SyntaxError: invalid syntax (losses.py, line 1)"
    assert capfd.readouterr().out.splitlines()[-1] == line


def test_the_page_has_every_exercise_and_its_check():
    for number, (title, file, _) in exercise.EXERCISES.items():
        assert f"## {number}. {title}" in PAGE
        assert f"python docs/exercise.py {number} --check" in PAGE
        assert file in PAGE.split(f"## {number}. ")[1].split("\n## ")[0]
