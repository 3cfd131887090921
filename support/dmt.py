"""Diffusion Motion Transfer (Yatim et al. 2023): a motion without training.

    python generate.py --dmt clip.mp4 --prompt "a red star"

The clip is inverted; a new video starts from the coarse part of that noise, and while it is sampled
its latents are pulled until features of the network change over time as the clip's do. Settings,
layers and the order of the steps are those of the published code. What differs: fp32 latents; the
anchor frame's difference from itself, which is always zero, is left out of the loss; a step up is
exactly the step down's, where that code's is one timestep off; frames are picked by time, not the
first 24; and no "Amazing quality, masterpiece" is put before prompts.

Axes: B videos, C channels, F frames, h w latent, H W picture.
"""
import re

import torch
import torch.nn.functional as F

import sampler
from support.files import BadInput

NEGATIVE = "bad quality, distortions, unrealistic, distorted image, watermark, signature"


def defaults(timesteps, tiny):
    """Its Sampling, and its shape, for a schedule of so many timesteps; inversion takes nearly each.

    The tiny model has its own shape, knows none of the negative words, is guided as always, and
    inverts in as many steps as it samples in (0): all of its 700 would take a CPU half a minute.
    """
    if tiny:
        return {"guidance": 4.0}, {}
    return {"guidance": 10.0, "inversion_steps": timesteps - 1}, {
        "negative": NEGATIVE, "frames": 24, "size": (320, 576)}


# Of the second upward block: the second resnet before its skip, the temporal convolution after it,
# and the upsampling. In a network where that block is the last there is no upsampling.
LAYERS = r"up_blocks\.1\.(resnets\.1\.conv2|temp_convs\.1|upsamplers\.0)"
SHARE = 0.4  # of the steps, the first, pull
PULLS, RATES = 10, (0.007, 0.004)  # Adam's steps in each, and its rates from the first to the last


class Enough(Exception):
    """All that a forward pass was wanted for is there."""


def frame_features(model, x, t, text):
    """Spatially averaged outputs [(B, F, C)] of LAYERS; what comes after the last of them is
    not computed. Raises BadInput for a network without such layers."""
    layers = [m for name, m in model.unet.named_modules() if re.fullmatch(LAYERS, name)]
    if not layers:
        raise BadInput(f"--dmt reads the layers {LAYERS}, which this model has not.")
    seen = {}

    def keep(layer, inputs, out):  # out (B·F, C, h, w)
        seen[layer] = out.float().mean((2, 3)).unflatten(0, (len(x), -1))
        if len(seen) == len(layers):
            raise Enough

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        model.predict(x, t, text)
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


def pairwise_differences_loss(got, want):
    """1 − cosine of the differences between each frame and every anchor frame, on (B, F, C)
    features: what all frames share cancels."""
    difference = lambda f: f[:, :, None] - f[:, None]  # (B, F, F, C)
    frames = got.shape[1]
    other = 1 - torch.eye(frames, device=got.device)  # to choose by it would wait for a GPU
    cosine = F.cosine_similarity(difference(got), difference(want), dim=-1)
    return ((1 - cosine) * other).sum() / (len(got) * frames * (frames - 1))


def low_frequencies(x, factor=4):
    """(B, C, F, h, w) without spatial detail finer than `factor` latents."""
    h, w = x.shape[-2:]
    resize = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True,
                                           antialias=True)
    small = resize(x.flatten(0, 2)[None], (max(1, h // factor), max(1, w // factor)))
    return resize(small, (h, w)).view(x.shape)


def nearest(times, t):
    """The one of some timesteps that is nearest to t."""
    return min(times, key=lambda other: abs(other - t))


def inversion_levels(s, model):
    """The timesteps at which the inverted clip is needed: its last, and nearest to the pulled ones.
    """
    times = model.schedule.timesteps(s.inversion_steps or s.sampling_steps)
    return {times[0]} | {nearest(times, t) for t in pulled_timesteps(s, model)}


def pulled_timesteps(s, model):
    """Those before whose steps the latents are pulled."""
    return model.schedule.timesteps(s.sampling_steps)[: max(1, int(s.sampling_steps * SHARE))]


def pull(model, x, t, text, want, rate):
    """The latents x after some of Adam's steps towards the features `want`."""
    free = x.detach().clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=rate)
    for _ in range(PULLS):
        with torch.enable_grad():
            got = frame_features(model, free, t, text)
            loss = sum(pairwise_differences_loss(*pair) for pair in zip(got, want))
            free.grad, = torch.autograd.grad(loss, free)
        adam.step()
    return free.detach()


def restart(S, predict, x, t, steps, g):
    """One DDIM step down from t and, with fresh noise of the generator g, up again (Xu et al.
    2023): what the pull has put out of the network's way comes back to it."""
    a, b = S.at(t, x), S.before(t - S.num_train_timesteps // steps)
    x0, eps = S.split(predict(x, t), x, a)
    below = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    noise = sampler.noise_like_shape(x.shape[1:], [g]).to(x)
    return (a / b) ** 0.5 * below + (1 - a / b) ** 0.5 * noise


@torch.no_grad()
def transfer_motion(s, model, clip, path, prompt, seed, caption, negative):
    """A video (3, F, H, W) of the prompt that moves as the clean latents clip (1, C, F, h, w) do;
    path: {timestep: its latents there} of its inversion. s has steps, guidance, negative,
    inversion_steps and inversion_prompt."""
    S, times = model.schedule, model.schedule.timesteps(s.sampling_steps)
    pulled = pulled_timesteps(s, model)
    rates = torch.linspace(*RATES, len(pulled)).tolist()
    text, source, empty = (model.read([p]) for p in (prompt, caption, negative))
    predict = sampler.guide(model.predict, text, empty, s.guidance)
    g = sampler.generator(seed, 4)

    def edit(x, t):
        if t in pulled:
            level = nearest(path, t)
            want = frame_features(model, path[level], level, source)
            x = pull(model, x, t, text, want, rates[pulled.index(t)])
        return x if t == times[-1] else restart(S, predict, x, t, s.sampling_steps, g)

    # The noise that the inversion found, at the level of the first step, with new fine detail.
    top, noise = max(path), sampler.noise_like_shape(clip.shape[1:], [seed]).to(clip)
    found = (path[top] - S.at(top, clip) ** 0.5 * clip) / (1 - S.at(top, clip)) ** 0.5
    start = noise + low_frequencies(S.add_noise(clip, found, times[0])) - low_frequencies(noise)
    return sampler.sample(model, [prompt], start, [seed], s.sampling_steps, s.guidance,
                          negative=negative, progress="moving as the clip", edit=edit)[0]
