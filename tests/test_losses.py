"""losses.py: values worked by hand, and values measured on both forms of VMC's loss."""
import pytest
import torch

import losses
from sampler import NoiseSchedule


def noise(frames, channels=3, seed=0, side=64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, frames, side, side, generator=g, dtype=torch.float64)


def clip(*frames):
    """A clip (1, C, F, 1, 1) from one tuple of channel values per frame."""
    return torch.tensor(frames, dtype=torch.float64).T[None, :, :, None, None]


def test_residual_by_hand():
    x = clip((1, 0), (3, 1), (6, 1))
    assert losses.residual(x).squeeze().tolist() == [[2, 3], [1, 0]]
    assert losses.residual(x, 2).squeeze().tolist() == [5, 1]


@pytest.mark.parametrize("x,stride", [
    (clip((1,), (2,), (3,)), 0), (clip((1,), (2,), (3,)), 3), (torch.zeros(6, 4, 8, 8), 1)])
def test_residual_refuses_wrong_strides_and_folded_frames(x, stride):
    with pytest.raises(ValueError, match="frame stride"):
        losses.residual(x, stride)


# Residuals (3, 4), (1, 0) of the target and (4, 3), (0, 2) of the prediction.
TARGET, PRED = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
STRIDE_2 = 1 - 36 / (32 * 41) ** 0.5  # residuals (4, 4) and (4, 5)


@pytest.mark.parametrize("name,inputs,value", [
    ("mse", {}, 3 / 6),  # the predictions differ by (1, −1) and (0, 1)
    ("residual-cosine", {}, 1 - (24 / 25 + 0) / 2),
    ("residual-cosine", {"stride": 2}, STRIDE_2),
    ("residual-cosine-mse", {}, 13 / 25 + 3 / 6),
    ("residual-cosine-mse", {"stride": 2}, STRIDE_2 + 3 / 6),
    ("residual-l2", {}, 7 / 4),  # residuals differ by (1, −1) and (−1, 2)
    ("residual-l2", {"stride": 2}, 1 / 2),
    ("residual-l2-weighted", {"alpha_bar": 0.2}, 4 * 7 / 4),  # weight (1 − 0.2)/0.2
])
def test_losses_by_hand(name, inputs, value):
    assert losses.LOSSES[name](PRED, TARGET, **inputs).item() == pytest.approx(value)


def test_the_official_cosine_by_hand():
    """One channel; absolute residuals (3, 4) and (4, 3) along time, whatever their signs."""
    target, pred = clip((0,), (3,), (-1,)), clip((0,), (-4,), (-7,))
    assert losses.residual_cosine_official(pred, target).item() == pytest.approx(1 / 25)


def test_motiondirectors_loss_by_hand():
    """ε̂ − ε is 1, 2, 0 over frames: mean square 5/3. Debiased with β = 2 and frame 1, √5·x − 4:
    ‖·‖² is 5·5 − 8√5·3 + 48 over 3."""
    pred, target = clip((2,), (4,), (3,)), clip((1,), (2,), (3,))
    debiased = (25 - 24 * 5**0.5 + 48) / 3
    assert losses.appearance_debiased(pred, target, 1, 2).item() == pytest.approx(debiased)
    assert losses.motiondirector(pred, target, 1, 2).item() == pytest.approx(5 / 3 + debiased)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_accepts_known_keywords_and_refuses_others(name):
    """All losses accept the keywords of all. A misspelled one would otherwise have no effect."""
    loss = losses.LOSSES[name]
    assert loss.__name__ == name.replace("-", "_")
    inputs = {"stride": 1, "anchor": 0, "beta": 1.0, "alpha_bar": 0.5}
    assert loss(PRED, TARGET, **inputs).isfinite()
    with pytest.raises(TypeError, match="strde"):
        loss(PRED, TARGET, **inputs, strde=2)
    with pytest.raises(TypeError, match="strde"):
        getattr(losses, loss.__name__)(PRED, TARGET, strde=2)


def test_weighted_l2_is_the_plain_error_of_the_residuals_of_x0():
    """Eq. 16 is Eq. 15 with the l2 distance, through Tweedie's formula (Eq. 13, 14)."""
    S, x0, eps, pred = NoiseSchedule(), noise(5, seed=1), noise(5, seed=2), noise(5, seed=3)
    x = S.add_noise(x0, eps, 620)
    a = S.alpha_bar_at(620, x)
    guess, _ = S.to_x0_eps(pred, x, a)
    want = losses.residual_l2(guess, x0).item()
    got = losses.residual_l2_weighted(pred, eps, alpha_bar=a).item()
    assert got == pytest.approx(want, rel=1e-9)


def test_the_l2_weight_on_zeroscopes_schedule():
    a = NoiseSchedule().alpha_bar
    w = (1 - a) / a
    assert w.max().item() == pytest.approx(214, abs=1)
    assert (w[900:].sum() / w.sum()).item() == pytest.approx(0.63, abs=0.005)


FORMS = {"paper": losses.residual_cosine, "official": losses.residual_cosine_official}


@pytest.mark.parametrize("frames,channels,prediction,paper,official,within", [
    (8, 3, lambda e: e, 0, 0, 1e-6),
    (8, 3, lambda e: 0.5 * e, 0, 0, 1e-6),
    (8, 3, lambda e: e + noise(1, seed=9), 0, 0, 1e-6),  # constant in time
    (8, 3, lambda e: -e, 2, 0, 1e-6),  # absolute values are blind to the sign
    (8, 3, lambda e: noise(8, seed=7), 1, 0.299, 0.004),
    (16, 4, lambda e: noise(16, 4, seed=7), 1, 0.334, 0.004),
    (8, 3, lambda e: e + 0.3 * noise(8, seed=7), 0.043, 0.043, 0.002),
])
def test_both_forms_of_vmcs_cosine(frames, channels, prediction, paper, official, within):
    eps = noise(frames, channels)
    for form, want in (("paper", paper), ("official", official)):
        assert FORMS[form](prediction(eps), eps).item() == pytest.approx(want, abs=within)


def test_the_official_form_of_independent_noise_tends_to_one_minus_two_over_pi():
    got = losses.residual_cosine_official(noise(400, 1, 1, 16), noise(400, 1, 2, 16)).item()
    assert got == pytest.approx(1 - 2 / torch.pi, abs=0.005)


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_debiasing_removes_the_noise_that_frames_share(beta):
    """φ returns each frame's own noise. For independent frames the variance becomes 2β² + 1."""
    own, anchor = noise(6, seed=1), noise(1, seed=2)
    shared = (beta * anchor + own) / (beta**2 + 1) ** 0.5
    shared[:, :, 2:3] = anchor
    debiased = losses.debias(shared, 2, beta)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(debiased[:, :, others], own[:, :, others])
    variance = losses.debias(own, 2, beta)[:, :, others].var().item()
    assert variance == pytest.approx(2 * beta**2 + 1, rel=0.05)
    want = (losses.debias(own, 2, beta) - debiased).square().mean().item()
    assert losses.appearance_debiased(own, shared, 2, beta).item() == pytest.approx(want)


def test_the_scale_and_the_offset_that_the_cosine_cannot_see_are_measured():
    """The offset counts per pixel: an image of +1 and −1 has mean 0 and changes no residual."""
    eps = noise(8)
    seen = losses.unseen_by_cosine(0.5 * eps + 3, eps)
    assert seen["scale"] == pytest.approx(0.5, abs=1e-6)
    assert seen["offset"] == pytest.approx(3, abs=0.05)
    eps = noise(4, channels=1, side=2)
    still = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64).view(1, 1, 1, 2, 2)
    assert losses.residual_cosine(eps + still, eps).abs() < 1e-12
    assert losses.unseen_by_cosine(eps + still, eps)["offset"].item() == pytest.approx(1)
