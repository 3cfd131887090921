"""The losses: one function per paper equation.

    python -m pytest tests/test_losses.py

All take a prediction and its target, pred and target (B, C, F, h, w), and return one number. The
target is the noise ε, or v for a network that predicts v, such as the tiny model; VMC's Eq. 15
allows clean latents too. Further inputs are keywords, and each loss declares those it needs:
`alpha_bar` is ᾱ at the clip's timestep, shaped to multiply the target; `stride` is the distance
between the two frames of a residual; `anchor` and `beta` belong to the appearance-debiased loss.
Through LOSSES, a loss also accepts the keywords of the other losses.

Axes: B clips, C channels, F frames, h w latent; n frame index, c frame stride.
"""
import functools
import inspect

import torch
import torch.nn.functional as F


def residual(x, stride=1):
    """δxⁿ = xⁿ⁺ᶜ − xⁿ along time (VMC Eq. 9): (B, C, F, h, w) -> (B, C, F − c, h, w)."""
    if x.dim() != 5 or not 0 < stride < x.shape[2]:
        raise ValueError(f"frame stride {stride} needs (B, C, F, h, w) with more than {stride} "
                         f"frames, got {tuple(x.shape)}")
    return x[:, :, stride:] - x[:, :, :-stride]


def mse(pred, target):
    """‖ε̂ − ε‖² (Ho et al. 2020, Eq. 14; MotionDirector Eq. 1; NewMove Eq. 1 with w_t = 1; without
    the square, VMC Eqs. 2, 7, 8 and Customize-A-Video Eq. 1)."""
    return F.mse_loss(pred, target)


# --- VMC ----------------------------------------------------------------------------------------


def residual_cosine(pred, target, *, stride=1):
    """1 − cos(δε, δε̂) of whole-frame residuals, averaged over frame pairs (VMC Eq. 17)."""
    per_frame = lambda x: residual(x, stride).transpose(1, 2).flatten(2)  # (B, F − c, C·h·w)
    return (1 - F.cosine_similarity(per_frame(pred), per_frame(target), dim=-1)).mean()


def residual_cosine_mse(pred, target, *, stride=1):
    """VMC Eq. 17 + Eq. 8, a combination chosen here. Eq. 8 fixes the scale and the mean over time,
    which drift under Eq. 17 alone (`unseen_by_cosine`)."""
    return residual_cosine(pred, target, stride=stride) + mse(pred, target)


def residual_l2(pred, target, *, stride=1):
    """‖δε − δε̂‖², averaged over elements (VMC Eq. 16 without its weight). Given x̂0 and x0, it is
    Eq. 15 with the residuals of Eqs. 13, 14."""
    return F.mse_loss(residual(pred, stride), residual(target, stride))


def residual_l2_weighted(pred, target, *, alpha_bar, stride=1):
    """(1 − ᾱ)/ᾱ · ‖δε − δε̂‖² (VMC Eq. 16): the residuals of x̂0, by Tweedie's formula. The weight
    holds for ε only; for a network that predicts v, give loss_space=epsilon. On ZeroScope's
    schedule it reaches 214 at t = T − 1.
    """
    error = residual(pred, stride) - residual(target, stride)
    return ((1 - alpha_bar) / alpha_bar * error**2).mean()


def residual_cosine_official(pred, target, *, stride=1):
    """VMC's published code, which differs from Eq. 17: the cosine along time of absolute residuals,
    per channel and pixel. Absolute values are blind to sign: ε̂ = −ε has loss 0."""
    along_time = lambda x: residual(x, stride).abs()
    return (1 - F.cosine_similarity(along_time(pred), along_time(target), dim=2)).mean()


@torch.no_grad()
def unseen_by_cosine(pred, target):
    """Two quantities that the residual cosine ignores, for the log: the prediction's scale
    std(ε̂)/std(ε), and the error of its mean over time, per channel and pixel."""
    scale = pred.std() / target.std()
    offset = (pred.mean(2) - target.mean(2)).square().mean().sqrt()
    return {"scale": scale, "offset": offset}


# --- MotionDirector -----------------------------------------------------------------------------


def debias(eps, anchor=0, beta=1.0):
    """φ(ε)ⁿ = √(β² + 1)·εⁿ − β·ε^anchor (MotionDirector Eq. 5). A component shared by all frames,
    such as appearance, is scaled by √(β² + 1) − β."""
    return (beta**2 + 1) ** 0.5 * eps - beta * eps[:, :, anchor : anchor + 1]


def appearance_debiased(pred, target, anchor=0, beta=1.0):
    """L_ad = ‖φ(ε) − φ(ε̂)‖² (MotionDirector Eq. 6)."""
    return F.mse_loss(debias(pred, anchor, beta), debias(target, anchor, beta))


def motiondirector(pred, target, anchor=0, beta=1.0):
    """L_org + L_ad, the loss of the temporal path (MotionDirector Eq. 7)."""
    return mse(pred, target) + appearance_debiased(pred, target, anchor, beta)


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


def with_all_keywords(loss, known):
    """The loss, which then ignores keywords of other losses. Raises TypeError for a keyword that is
    not in `known`."""
    declared = inspect.signature(loss).parameters

    @functools.wraps(loss)
    def call(pred, target, **inputs):
        if unknown := inputs.keys() - known:
            raise TypeError(f"no loss has the keyword {min(unknown)!r}; known: {sorted(known)}")
        return loss(pred, target, **{k: v for k, v in inputs.items() if k in declared})

    return call


KEYWORDS = {name for loss in LOSSES.values() for name in inspect.signature(loss).parameters}
LOSSES = {name: with_all_keywords(loss, KEYWORDS) for name, loss in LOSSES.items()}
