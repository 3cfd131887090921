"""What the methods minimise: each function is one equation of one paper.

    python -m pytest tests/test_losses.py

All take the predicted and the true noise, pred and eps (B, C, F, h, w), and give one number; of a
network that says v, as the tiny one does, they get v in place of ε. Where the formula is one of
clean clips too (VMC Eq. 15), so may be the denoised and the true clip. What else a formula needs it
takes by name, and leaves the rest: `a` is ᾱ at the clip's timestep, shaped to multiply them;
`stride` the frames between the two of a residual; `anchor` and `beta` are of the
appearance-debiased loss.

Axes: B clips, C channels, F frames, h w latent; n counts frames, c is the frame stride.
"""
import torch
import torch.nn.functional as F


def residual(x, stride=1):
    """δxⁿ = xⁿ⁺ᶜ − xⁿ along time (VMC Eq. 9): (B, C, F, h, w) -> (B, C, F − c, h, w).

    Raises ValueError when the clip is too short for the stride.
    """
    if not 0 < stride < x.shape[2]:
        raise ValueError(f"frame stride {stride} needs more than {stride} frames, got {x.shape[2]}")
    return x[:, :, stride:] - x[:, :, :-stride]


def mse(pred, eps, **_):
    """‖ε̂ − ε‖² (Ho et al. 2020, Eq. 14; MotionDirector Eq. 1; VMC Eq. 8, there with no square)."""
    return F.mse_loss(pred, eps)


# ------------------------------------------------------------------------------------------------
# VMC


def residual_cosine(pred, eps, stride=1, **_):
    """1 − cos(δε, δε̂) of whole-frame residuals, mean over the frame pairs (VMC Eq. 17)."""
    per_frame = lambda x: residual(x, stride).transpose(1, 2).flatten(2)  # (B, F − c, C·h·w)
    return (1 - F.cosine_similarity(per_frame(pred), per_frame(eps), dim=-1)).mean()


def residual_cosine_mse(pred, eps, stride=1, **_):
    """VMC Eq. 17 + Eq. 8, ours: the second holds the scale and the mean over time, which the first
    leaves to drift (`unseen_by_cosine`)."""
    return residual_cosine(pred, eps, stride) + mse(pred, eps)


def residual_l2(pred, eps, stride=1, **_):
    """‖δε − δε̂‖², mean over elements (VMC Eq. 16 without its weight)."""
    return F.mse_loss(residual(pred, stride), residual(eps, stride))


def residual_l2_weighted(pred, eps, a, stride=1, **_):
    """(1 − ᾱ)/ᾱ · ‖δε − δε̂‖² (VMC Eq. 16): the residuals of x̂0, by Tweedie's formula. This is
    so of ε alone: where the network says v, ask for align=epsilon.

    On ZeroScope's schedule the weight reaches 214 and 63 % of it lies at t ≥ 900.
    """
    return ((1 - a) / a * (residual(pred, stride) - residual(eps, stride)) ** 2).mean()


def residual_cosine_official(pred, eps, stride=1, **_):
    """VMC's published code, which is not its Eq. 17: absolute differences, and the cosine along
    time for each channel and pixel. Absolute values are blind to sign: ε̂ = −ε costs nothing."""
    along_time = lambda x: residual(x, stride).abs()
    return (1 - F.cosine_similarity(along_time(pred), along_time(eps), dim=2)).mean()


@torch.no_grad()
def unseen_by_cosine(pred, eps):
    """What no cosine of residuals constrains: the prediction's scale, std(ε̂)/std(ε), and how far
    its mean over time is off, per channel and pixel. A run can drift there at no cost: log both."""
    pred, eps = pred.detach().float(), eps.float()
    scale = pred.std() / eps.std()
    offset = (pred.mean(2) - eps.mean(2)).square().mean().sqrt()
    return {"scale": scale, "offset": offset}


# ------------------------------------------------------------------------------------------------
# MotionDirector


def debias(eps, anchor=0, beta=1.0):
    """φ(ε)ⁿ = √(β² + 1)·εⁿ − β·ε^anchor (MotionDirector Eq. 5): what all frames share, as the look
    of a thing is, is weakened, to √(β² + 1) − β of itself. Where frames share noise as
    ε = (β·ε^anchor + n)/√(β² + 1), the root gives n back; of independent frames the variance
    becomes 2β² + 1."""
    return (beta**2 + 1) ** 0.5 * eps - beta * eps[:, :, anchor : anchor + 1]


def appearance_debiased(pred, eps, anchor=0, beta=1.0, **_):
    """L_ad = ‖φ(ε) − φ(ε̂)‖² (MotionDirector Eq. 6)."""
    return F.mse_loss(debias(pred, anchor, beta), debias(eps, anchor, beta))


def motiondirector(pred, eps, anchor=0, beta=1.0, **_):
    """L_org + L_ad, what the temporal path minimises (MotionDirector Eq. 7)."""
    return mse(pred, eps) + appearance_debiased(pred, eps, anchor, beta)


LOSSES = {
    "mse": mse,
    "residual-cosine": residual_cosine,
    "residual-cosine-mse": residual_cosine_mse,
    "residual-l2": residual_l2,
    "residual-l2-weighted": residual_l2_weighted,
    "residual-cosine-official": residual_cosine_official,
    "appearance-debiased": appearance_debiased,
    "motiondirector": motiondirector,
}
