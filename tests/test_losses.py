"""losses.py: known answers worked by hand, and the values measured on both forms of VMC's loss."""
import pytest
import torch

import losses


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


@pytest.mark.parametrize("stride", (0, 3))
def test_a_stride_longer_than_the_clip_is_refused(stride):
    with pytest.raises(ValueError, match="needs more than"):
        losses.residual(clip((1,), (2,), (3,)), stride)


def test_residual_cosine_by_hand():
    """Residuals (3, 4), (1, 0) against (4, 3), (0, 2): cosines 24/25 and 0, so 1 − 12/25. At a
    stride of two (4, 4) against (4, 5): cosine 36/√(32·41)."""
    eps, pred = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
    assert losses.residual_cosine(pred, eps).item() == pytest.approx(13 / 25)
    want = 1 - 36 / (32 * 41) ** 0.5
    assert losses.residual_cosine(pred, eps, stride=2).item() == pytest.approx(want)
    assert losses.residual_l2(pred, eps, stride=2).item() == pytest.approx(1 / 2)
    both = losses.residual_cosine_mse(pred, eps, stride=2).item()  # the mean square is 3/6
    assert both == pytest.approx(want + 1 / 2)


def test_the_official_cosine_by_hand():
    """One channel; absolute residuals (3, 4) against (4, 3) along time, whatever their signs."""
    eps, pred = clip((0,), (3,), (-1,)), clip((0,), (-4,), (-7,))
    assert losses.residual_cosine_official(pred, eps).item() == pytest.approx(1 / 25)


def test_motiondirectors_loss_by_hand():
    """ε̂ − ε is 1, 2, 0 over frames: mean square 5/3. Debiased with β = 2 and frame 1, √5·x − 4:
    ‖·‖² is 5·5 − 8√5·3 + 48 over 3."""
    pred, eps = clip((2,), (4,), (3,)), clip((1,), (2,), (3,))
    debiased = (25 - 24 * 5**0.5 + 48) / 3
    assert losses.appearance_debiased(pred, eps, 1, 2).item() == pytest.approx(debiased)
    assert losses.motiondirector(pred, eps, 1, 2).item() == pytest.approx(5 / 3 + debiased)


def test_residual_l2_by_hand():
    """Residuals differ by (1, −1) and (−1, 2): mean square 7/4; weight (1 − 0.2)/0.2 = 4."""
    eps, pred = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
    assert losses.residual_l2(pred, eps).item() == pytest.approx(7 / 4)
    a = torch.full((1, 1, 1, 1, 1), 0.2, dtype=torch.float64)
    assert losses.residual_l2_weighted(pred, eps, a).item() == pytest.approx(7)


def test_cosine_and_mse_by_hand():
    """The cosine as above; the predictions differ by (1, −1) and (0, 1): mean square 3/6."""
    eps, pred = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
    assert losses.residual_cosine_mse(pred, eps).item() == pytest.approx(13 / 25 + 3 / 6)


def test_weighted_l2_is_the_plain_error_of_the_residuals_of_x0():
    """Eq. 16 is Eq. 15 with the l2 distance, through Tweedie's formula (Eq. 13, 14)."""
    from sampler import Schedule

    S, x0, eps, pred = Schedule(), noise(5, seed=1), noise(5, seed=2), noise(5, seed=3)
    t = torch.tensor([620])
    x = S.add_noise(x0, eps, t)
    a = S.at(t, x)
    guess, _ = S.split(pred, x, a)
    want = losses.residual_l2(guess, x0)
    assert losses.residual_l2_weighted(pred, eps, a).item() == pytest.approx(want.item(), rel=1e-9)


def test_the_l2_weight_on_zeroscopes_schedule():
    from sampler import Schedule

    w = (1 - Schedule().alpha_bar) / Schedule().alpha_bar
    assert w.max().item() == pytest.approx(214, abs=1)
    assert (w[900:].sum() / w.sum()).item() == pytest.approx(0.63, abs=0.005)


FORMS = {"paper": losses.residual_cosine, "official": losses.residual_cosine_official}
SAME = 1e-6


@pytest.mark.parametrize("form,prediction,frames,channels,want,within", [
    ("paper", lambda e: e, 8, 3, 0, SAME),
    ("official", lambda e: e, 8, 3, 0, SAME),
    ("paper", lambda e: 0.5 * e, 8, 3, 0, SAME),
    ("official", lambda e: 0.5 * e, 8, 3, 0, SAME),
    ("paper", lambda e: e + noise(1, seed=9), 8, 3, 0, SAME),  # constant in time
    ("official", lambda e: e + noise(1, seed=9), 8, 3, 0, SAME),
    ("paper", lambda e: -e, 8, 3, 2, SAME),
    ("official", lambda e: -e, 8, 3, 0, SAME),  # the absolute value's blind spot
    ("paper", lambda e: noise(8, seed=7), 8, 3, 1, 0.01),
    ("official", lambda e: noise(8, seed=7), 8, 3, 0.299, 0.004),
    ("paper", lambda e: noise(16, 4, seed=7), 16, 4, 1, 0.01),
    ("official", lambda e: noise(16, 4, seed=7), 16, 4, 0.334, 0.004),
    ("paper", lambda e: e + 0.3 * noise(8, seed=7), 8, 3, 0.043, 0.002),
    ("official", lambda e: e + 0.3 * noise(8, seed=7), 8, 3, 0.043, 0.002),
])
def test_both_forms_of_vmcs_cosine(form, prediction, frames, channels, want, within):
    eps = noise(frames, channels)
    assert FORMS[form](prediction(eps), eps).item() == pytest.approx(want, abs=within)


def test_official_form_tends_to_one_minus_two_over_pi():
    got = losses.residual_cosine_official(noise(400, 1, 1, 16), noise(400, 1, 2, 16)).item()
    assert got == pytest.approx(1 - 2 / torch.pi, abs=0.005)


def test_what_the_cosine_does_not_see_is_logged():
    eps = noise(8)
    seen = losses.unseen_by_cosine(0.5 * eps + 3, eps)
    assert seen["scale"] == pytest.approx(0.5, abs=1e-6)
    assert seen["offset"] == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("beta", (0.5, 1.0, 2.0))
def test_debiasing_gives_back_what_frames_do_not_share(beta):
    """Noise that shares its anchor's, debiased, is what is its own; independent frames' variance
    grows to 2β² + 1."""
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


def test_what_the_cosine_does_not_see_is_counted_at_every_pixel():
    """A still picture of +1 and −1 leaves all residuals as they are."""
    eps = noise(4, channels=1, side=2)
    still = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64).view(1, 1, 1, 2, 2)
    seen = losses.unseen_by_cosine(eps + still, eps)
    assert losses.residual_cosine(eps + still, eps).abs() < 1e-12
    assert seen["offset"].item() == pytest.approx(1)
