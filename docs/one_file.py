"""VMC in one file: train on one clip, invert it, sample a new subject with its motion.

    python docs/one_file.py              # 300 steps on the tiny model, then one video

Networks and video files come from model.py and support/media.py. Everything else is written out in
reading order, with the number that each step prints next to it. The loss and the video equal those
of `python train.py --method vmc --video assets/eight.mp4` and generate.py, bit for bit on one CPU.

Axes: B clips, C channels, F frames, h w latent, N text tokens, D text width.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import model  # noqa: E402
from support import machine, media  # noqa: E402

CLIP, CAPTION = ROOT / "assets" / "eight.mp4", "a circle moving in a figure eight"
PROMPT = "a red star moving in a figure eight on a grey background"
STEPS, RATE, SEED = 300, 1e-3, 0
SAMPLING_STEPS, GUIDANCE = 20, 4.0


def random_stream(*key):
    """A generator for a key of integers: distinct keys give independent streams."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


# --- 1. The noise schedule: the share of signal ᾱ falls from 1 to nearly 0 ----------------------


def make_alpha_bar():
    """ᾱ of the tiny model's linear schedule with T = 700 (Ho et al. 2020, Sec. 2)."""
    beta = torch.linspace(0.0001, 0.014024, 700, dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0)


ALPHA_BAR = make_alpha_bar()
T = len(ALPHA_BAR)  # 700
print(f"ᾱ at t = 0, 350, 699: {ALPHA_BAR[[0, 350, 699]].tolist()}")  # 0.9999, 0.2832, 0.0070


def sampling_timesteps(steps):
    """Trailing spacing: 699, 664, …, 34 for 20 steps."""
    return (np.arange(T, 0, -T / steps).round() - 1).astype(int).tolist()


def alpha_bar_prev(t):
    """ᾱ one sampling step earlier; at the end it is ᾱ_0, as in diffusers."""
    return ALPHA_BAR[max(t, 0)].item()


# --- 2. Forward process and training target -----------------------------------------------------


def add_noise(x0, eps, t):
    """x_t = √ᾱ·x0 + √(1−ᾱ)·ε (Ho et al. 2020, Eq. 4)."""
    a = ALPHA_BAR[t].item()
    return a**0.5 * x0 + (1 - a) ** 0.5 * eps


def v_target(x0, eps, t):
    """v = √ᾱ·ε − √(1−ᾱ)·x0, which the tiny model predicts (Salimans & Ho 2022, App. D)."""
    a = ALPHA_BAR[t].item()
    return a**0.5 * eps - (1 - a) ** 0.5 * x0


def to_x0_eps(v, x, a):
    """x̂0 = √ᾱ·x − √(1−ᾱ)·v and ε̂ = √ᾱ·v + √(1−ᾱ)·x: the two equations above, solved."""
    return a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x


# --- 3. The loss --------------------------------------------------------------------------------


def residual(x):
    """δxⁿ = xⁿ⁺¹ − xⁿ (VMC Eq. 9): (B, C, F, h, w) -> (B, C, F − 1, h, w)."""
    return x[:, :, 1:] - x[:, :, :-1]


def vmc_loss(pred, target):
    """1 − cos(δε, δε̂), averaged over frame pairs (VMC Eq. 17). Appearance shared by all frames is
    not in the residuals, so it cannot be learned."""
    per_frame = lambda x: residual(x).transpose(1, 2).flatten(2)  # (B, F − 1, C·h·w)
    return (1 - F.cosine_similarity(per_frame(pred), per_frame(target), dim=-1)).mean()


x = torch.randn(1, 4, 8, 4, 4, generator=random_stream(1))
print(f"loss of x against 0.5·x + 3, −x: {vmc_loss(0.5 * x + 3, x):.3f}, {vmc_loss(-x, x):.3f}")
# 0.000: neither scale nor offset costs anything. 2.000: the sign does.


# --- 4. Model, clip and trainable layers --------------------------------------------------------


def load_model():
    """The tiny model, in bf16 where the CPU multiplies it fast, and its trainable parameters: q, k
    and v of the temporal attentions (VMC App. D)."""
    pattern = re.compile(r".*temp_attentions\..*\.attn[12]\.to_[qkv]\.weight")
    names = {n for n, _ in model.load_unet(model.TINY).named_parameters() if pattern.fullmatch(n)}
    pipe = model.load(None, "cpu", machine.default_precision("cpu"), keep=names)
    trainable = [p for n, p in pipe.unet.named_parameters() if n in names]
    for p in trainable:
        p.requires_grad_(True)
    return pipe, trainable


def encode_clip(pipe):
    """The clip's latents (1, 8, 16, 8, 8), a sample of the VAE's posterior."""
    video = media.read_video(CLIP, 16, (64, 64), 8.0)  # (3, F, H, W) in [-1, 1]
    return pipe.encode(video[None], random_stream(SEED, 0, 0, 7))


# --- 5. Training (VMC Algorithm 1) --------------------------------------------------------------


def training_loss(pipe, x0, step):
    """The loss of one step. All its random draws depend on (seed, step) alone."""
    g = random_stream(SEED, step, 0)
    t = int(torch.multinomial(torch.ones(T, dtype=torch.float64) / T, 1, True, generator=g))
    eps = torch.randn(x0.shape, generator=g)
    torch.manual_seed(int(torch.randint(2**62, (), generator=g)))  # dropout of the UNet
    text = pipe.encode_text([CAPTION])
    pred = pipe.predict(add_noise(x0, eps, t), torch.tensor([t]), text)
    return vmc_loss(pred, v_target(x0, eps, t))


def train(pipe, trainable, x0, steps):
    """AdamW with a constant rate and gradient clipping at 1. Returns the losses."""
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01, fused=True)
    losses = []
    pipe.unet.train()
    for step in range(steps):
        loss = training_loss(pipe, x0, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    pipe.unet.eval()
    for p in trainable:
        p.requires_grad_(False)
    return losses


# --- 6. Inversion and sampling ------------------------------------------------------------------


@torch.no_grad()
def invert(pipe, x0, steps):
    """DDIM inversion with an empty prompt (Song et al. 2021, Sec. 4.3): from the clip to noise,
    with the trained model."""
    x, text = x0, pipe.encode_text([""])
    for t in reversed(sampling_timesteps(steps)):
        below, a = alpha_bar_prev(t - T // steps), ALPHA_BAR[t].item()
        x0_hat, eps_hat = to_x0_eps(pipe.predict(x, t, text), x, below)
        x = a**0.5 * x0_hat + (1 - a) ** 0.5 * eps_hat
    return x


@torch.no_grad()
def sample(pipe, start, prompt, steps, guidance):
    """Ancestral sampling (Ho et al. 2020, Eq. 6 and 7) with classifier-free guidance
    u + g·(c − u) (Ho & Salimans 2022, Eq. 6). Returns a video (3, F, H, W)."""
    g = random_stream(SEED, 1)
    texts = torch.cat([pipe.encode_text([""]), pipe.encode_text([prompt])])
    x = start
    for t in sampling_timesteps(steps):
        uncond, cond = pipe.predict(x, t, texts).chunk(2)
        s, a = t - T // steps, ALPHA_BAR[t].item()
        b = ALPHA_BAR[s].item() if s >= 0 else 1.0
        x0_hat, _ = to_x0_eps(uncond + guidance * (cond - uncond), x, a)
        alpha = a / b  # of this step
        mean = (b**0.5 * (1 - alpha) * x0_hat + alpha**0.5 * (1 - b) * x) / (1 - a)
        variance = (1 - b) / (1 - a) * (1 - alpha)
        x = mean + variance**0.5 * torch.stack([torch.randn(x.shape[1:], generator=g)])
    return pipe.decode(x)[0]


def main():
    """Train, invert, sample, write out/one_file.mp4."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("out/one_file.mp4"),
                        help="the video (default: out/one_file.mp4)")
    flags = parser.parse_args()
    machine.tune_malloc()
    pipe, trainable = load_model()
    count = sum(p.numel() for p in trainable)
    print(f"trainable: {count:,} parameters in {len(trainable)} tensors")  # 172,032 in 24
    x0 = encode_clip(pipe)
    losses = train(pipe, trainable, x0, flags.steps)
    print(f"mean loss of the last tenth: {np.mean(losses[-max(1, len(losses) // 10):]):.4f}")
    # To sample as generate.py does: the frozen weights are in bf16, the trained ones in fp32.
    inverted = invert(pipe, x0, SAMPLING_STEPS)
    print(f"mean and deviation of the inverted clip: {inverted.mean():.3f}, {inverted.std():.3f}")
    video = sample(pipe, inverted, PROMPT, SAMPLING_STEPS, GUIDANCE)
    media.write_video(flags.out, video, 8.0)
    print(f"written: {flags.out}")


if __name__ == "__main__":
    main()
