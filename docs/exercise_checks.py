"""The checks of docs/exercises.md: one function per exercise, which yields (title, expected value,
function that returns the value found). Values are worked by hand unless the docstring names their
source. `python docs/exercise.py 3 --check` imports the modules of exercises/03 here.
"""
import contextlib
import functools
import io
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import lora
import losses
import model
import sampler
import train
from sampler import NoiseSchedule
from support import adapters, fast

VIDEO = str(Path(train.__file__).parent / "assets" / "eight.mp4")
SHORT = ["--video", VIDEO, "--frames", "4", "--preview-every", "0"]


def clip(*frames):
    """A clip (1, C, F, 1, 1) from one tuple of channel values per frame."""
    return torch.tensor(frames, dtype=torch.float64).T[None, :, :, None, None]


def pixels(*values):
    """Latents (B, 1, 1, 1, 1) from one number per clip."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


def randn(*shape, seed=0):
    """Standard normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def error_of(function, *args):
    """The name of the error that a call raises, or the shape of its result."""
    try:
        return f"shape {tuple(function(*args).shape)}"
    except NotImplementedError:
        raise
    except Exception as error:
        return type(error).__name__


def residual():
    """Residuals of the target: (3, 4), (1, 0); of the prediction: (4, 3), (0, 2)."""
    target, pred = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
    x, cosine = randn(1, 4, 5, 6, 6), losses.residual_cosine
    both = lambda first: torch.cat([first, 10 * target])
    yield ("residuals of three frames, two channels", clip((3, 4), (1, 0)),
           lambda: losses.residual(target))
    yield "stride 2", clip((4, 5)), lambda: losses.residual(pred, 2)
    yield ("a ValueError for stride 0 and for stride F", ["ValueError"] * 2,
           lambda: [error_of(losses.residual, target, stride) for stride in (0, 3)])
    yield "1 − cos, averaged over two frame pairs", 0.52, lambda: cosine(pred, target)
    yield "1 − cos of one frame pair, stride 2", 0.006116, lambda: cosine(pred, target, stride=2)
    yield ("1 − cos, averaged over the four frame pairs of two clips", 0.26,
           lambda: cosine(both(pred), both(target)))
    yield ("loss of 0.5·x + 3 and of −x against x", [0, 2],
           lambda: [cosine(0.5 * x + 3, x), cosine(-x, x)])


def prediction_types():
    """Two clips with x0 = 1 and ε = 2 at ᾱ = 0.64 and 0.36, so that x_t = 2 and 2.2."""
    alpha_bar = torch.tensor([0.64, 0.36], dtype=torch.float64)
    x0, noise, v_target, t = pixels(1, 1), pixels(2, 2), pixels(1, 0.4), torch.tensor([0, 1])
    v, eps = (NoiseSchedule(2, prediction_type=kind, alpha_bar=alpha_bar)
              for kind in ("v_prediction", "epsilon"))
    x, levels = v.add_noise(x0, noise, t), v.alpha_bar_at(t, x0)
    yield "the target v", v_target, lambda: v.target(x0, noise, t)
    yield "the target ε", noise, lambda: eps.target(x0, noise, t)
    yield "x̂0 and ε̂ from v̂", [x0, noise], lambda: [*v.to_x0_eps(v_target, x, levels)]
    yield ("x̂0 and ε̂ from ε̂ = 0", [pixels(2.5, 2.2 / 0.6), pixels(0, 0)],
           lambda: [*eps.to_x0_eps(0 * x, x, levels)])
    yield ("an int t, for which ᾱ is a number", [v_target[:1], x0[:1], noise[:1]],
           lambda: [v.target(x0[:1], noise[:1], 0),
                    *v.to_x0_eps(v_target[:1], x[:1], v.alpha_bar_at(0, x))])


def ddim():
    """Five steps with a smooth function as the network. Numbers: DDIMScheduler and
    DDIMInverseScheduler of diffusers 0.42.1, on ZeroScope's schedule."""
    start = clip((-1,), (-1 / 3,), (1 / 3,), (1,))
    network = lambda x, t: torch.sin(3 * x + t / 100) * 0.9 + 0.1 * x
    ones, S = lambda x, t: torch.ones_like(x), NoiseSchedule()
    yield ("DDIM, four numbers", clip((-1.93987,), (-4.14447,), (0.78785,), (6.11671,)),
           lambda: sampler.ddim(S, network, start, 5))
    yield ("inversion, four numbers", clip((-0.45089,), (-0.20306,), (0.34841,), (0.44741,)),
           lambda: sampler.ddim_inversion(S, network, start, 5))
    yield ("inversion and back, with ε̂ = 1 everywhere", start,
           lambda: sampler.ddim(S, ones, sampler.ddim_inversion(S, ones, start, 50), 50))


def guidance():
    """The network multiplies x = 3 and 4 by the mean of its text: 1 for the empty prompt, 2 for the
    prompt."""
    text, x = torch.full((2, 3, 4), 2.0), pixels(3, 4)

    def guided(empty, scale):
        """The prediction, and each call in words."""
        calls = []

        def network(x, t, text):
            calls.append(f"one call with {len(x)} latents and {len(text)} texts")
            x = x.repeat(len(text) // len(x), 1, 1, 1, 1)  # as the UNet does
            return x * text.mean((1, 2)).view(-1, 1, 1, 1, 1)

        return [sampler.classifier_free_guidance(network, text, empty, scale)(x, 0), *calls]

    conditional = [pixels(6, 8), "one call with 2 latents and 2 texts"]
    yield ("scale 5: predictions for two clips, and calls",
           [pixels(18, 24), "one call with 2 latents and 4 texts"], lambda: guided(text / 2, 5.0))
    yield "scale 1 computes the conditional half only", conditional, lambda: guided(text / 2, 1)
    yield ("a missing empty prompt computes the conditional half only", conditional,
           lambda: guided(None, 5.0))


def attention_over_time():
    """Two clips of three frames. Numbers: TransformerTemporalModel of diffusers 0.42.1, with the
    weights of the tiny model's transformer_in."""
    waves = lambda C: torch.sin(0.7 * torch.arange(6 * C * 4)).view(6, C, 2, 2)
    first = model.load_unet(model.TINY).transformer_in
    yield ("the tiny model's first one: four outputs",
           torch.tensor([[0.071316, 0.363986], [1.079893, -0.847513]]),
           lambda: first(waves(64), 3)[[0, 4], :2, [0, 1], 0])
    layer, x, changed = model.TemporalTransformer(8, 2, 4, 2), waves(8), waves(8)
    layer.norm, changed[4, :, 0, 1] = torch.nn.Identity(), 0
    reached = lambda: ((layer(x, 3) - layer(changed, 3)).abs().amax(1) > 1e-6).nonzero()
    yield ("a pixel (frame, y, x) reaches itself in all frames of its clip, if there is no norm",
           ["(3, 0, 1)", "(4, 0, 1)", "(5, 0, 1)"],
           lambda: [str(tuple(pixel)) for pixel in reached().tolist()])


def lora_hook():
    """Two layers with W = 0, whose output is that of the LoRA, and a random one."""
    linear, conv = torch.nn.Linear(2, 2, bias=False), fast.TemporalConv1d(1)
    for weight in (linear.weight, conv.weight, conv.bias):
        torch.nn.init.zeros_(weight)
    one = lora.LoRA(torch.nn.Sequential(linear, conv), "all", 1, scale=2.0)
    for number, a, b in ("0", [3.0, 4], [5.0, 6]), ("1", [1.0, 10, 100], [5.0]):
        A, B = one.pairs[number]
        A.data, B.data = torch.tensor(a).view_as(A), torch.tensor(b).view_as(B)
    x, frames = torch.tensor([[1.0, 2]]), torch.tensor([1.0, 2, 3]).view(1, 1, 3, 1)
    yield ("linear layer, x = (1, 2), A = (3, 4), B = (5, 6), s = 2", torch.tensor([[110, 132]]),
           lambda: linear(x))
    yield ("temporal convolution, x = (1, 2, 3) over time, A = (1, 10, 100), B = 5, s = 2",
           torch.tensor([2100, 3210, 320]).view_as(frames), lambda: conv(frames))
    one.active = False
    yield "not active: both layers", [0 * x, 0 * frames], lambda: [linear(x), conv(frames)]
    one.active, one.dropout = True, 0.5
    zeros = lambda out: round((out == 0).double().mean().item(), 1)
    both = lambda linear, conv: [zeros(linear(x.expand(1000, 2))),
                                 zeros(conv(frames.repeat(1000, 1, 1, 1)))]
    yield ("share of zeros with a dropout of 0.5: both layers in train mode, both in eval mode",
           [0.5, 0.5, 0, 0], lambda: both(linear.train(), conv.train())
           + both(linear.eval(), conv.eval()))
    torch.manual_seed(0)
    conv, x = fast.TemporalConv1d(3), torch.randn(2, 3, 4, 2)
    (A, B), = lora.LoRA(torch.nn.Sequential(conv), "all", 2, scale=2.0).pairs.values()
    A.data, B.data = torch.randn(A.shape), torch.randn(B.shape)
    merged = conv.weight + 2 * adapters.lora_delta(A, B, conv.weight)
    expected = torch.nn.functional.conv3d(x[..., None], merged, conv.bias, padding=(1, 0, 0))
    yield ("the convolution with W + s·B·A: two clips, four frames, h·w = 2", expected[..., 0],
           lambda: conv(x))


def layer_sets():
    """Parameters of ZeroScope's UNet on the meta device: names and shapes without numbers."""
    with torch.device("meta"):
        unet = model.UNet(model.UNetConfig(
            block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=1024,
            down_block_types=["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
            up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3))

    def count(layers):
        matches = lora.pattern_of(layers).fullmatch
        return sum(p.numel() for name, p in unet.named_parameters() if matches(name))

    yield "temporal-attention-qkv (VMC)", 74_342_400, lambda: count("temporal-attention-qkv")
    yield "cross-attention-kv", 25_559_040, lambda: count("cross-attention-kv")
    yield ("temporal-and-cross-kv (NewMove)", 570_882_176,
           lambda: count("temporal-and-cross-kv"))


def debias():
    """φ by hand and on noise of 6 frames."""
    root, own, shared = 3**0.5, randn(1, 3, 6, 64, 64, seed=1), randn(1, 3, 1, 64, 64, seed=2)
    mixed = (2 * shared + own) / 5**0.5
    mixed[:, :, :1] = shared
    variance = lambda eps: losses.debias(eps, 0, 2)[:, :, 1:].var().item()
    yield ("frames 1, 2, 4; anchor: frame 1; β = √3",
           clip((2 - 2 * root,), (4 - 2 * root,), (8 - 2 * root,)),
           lambda: losses.debias(clip((1,), (2,), (4,)), 1, root))
    yield "variance of (β·ε^anchor + η)/√(β² + 1), β = 2", 1, lambda: round(variance(mixed), 1)
    yield "variance of independent frames, 2β² + 1, β = 2", 9, lambda: round(variance(own))


@contextlib.contextmanager
def quiet():
    """No output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
@quiet()
def motiondirector_run():
    """A run of MotionDirector on the tiny model that is ready for its first step."""
    return train.prepare(*train.parse(["--method", "motiondirector", *SHORT]))


def motiondirector_losses(number=0.5, parts=("appearance", "motion"), **settings):
    """One row per loss of a step: the loss, the noisy sample, and the state of the LoRAs. Random
    predictions; frame 1 and the given number instead of random ones."""
    run, rows, seen = motiondirector_run(), [], []
    ex = train.Example(run, 0, 0)
    ex.trainables = {name: run.trainables[name] for name in parts}
    ex.random_frame, ex.rand = lambda z: 1, lambda: number
    ex.predict = lambda z: seen.append(z) or randn(2, *z.x.shape).unbind()
    for loss in train.motiondirector(ex, **settings):
        state = []
        for name, (one, *_) in ex.trainables.items():
            trained = any(p.requires_grad for p in one.parameters().values())
            state.append(f"{name} {'trained' if trained else 'frozen' if one.active else 'off'}")
        rows.append((loss.item(), seen[-1], ", ".join(state)))
    return rows


def motiondirector():
    """Steps with and without the spatial path."""
    both = functools.partial(motiondirector_losses, beta=2.0, spatial_prob=1.0)
    frame, whole = (pred - target for pred, target in (randn(2, 1, 8, 1, 8, 8),
                                                       randn(2, 1, 8, 4, 8, 8)))
    square = lambda x: x.square().mean().item()
    debiased = 5**0.5 * whole - 2 * whole[:, :, 1:2]

    def shared():
        (_, frame, _), *_, (_, whole, _) = both()
        return [frame.t == whole.t, not frame.temporal, whole.temporal,
                torch.equal(frame.x, whole.x[:, :, 1:2])]

    states = lambda rows: [state for _, _, state in rows]
    equations = [square(frame), square(whole) + square(debiased)]
    yield ("number of losses, one per path, if ex.rand() returns 0, 0.2, 0.4, 0.6 and 0.8",
           [2, 2, 2, 2, 1], lambda: [len(motiondirector_losses(n / 5)) for n in range(5)])
    yield "the losses of Eq. 4 and Eq. 7, β = 2", equations, lambda: [row[0] for row in both()]
    yield ("the LoRAs in both losses",
           ["appearance trained, motion off", "appearance frozen, motion trained"],
           lambda: states(both()))
    yield ("the LoRAs without the spatial path", ["appearance off, motion trained"],
           lambda: states(motiondirector_losses(spatial_prob=0.0)))
    yield ("the LoRAs, if the run has only one of them", ["appearance trained", "motion trained"],
           lambda: states(motiondirector_losses(0.9, ["appearance"]))
           + states(motiondirector_losses(0.0, ["motion"])))
    yield ("same timestep, frame without temporal layers, clip with them, same noise", [True] * 4,
           shared)


def timesteps():
    """f(t) for T = 1000. Its mean is T/2 + 2αT/π²."""
    weights = lambda alpha: sampler.timestep_weights(1000, alpha)
    mean = lambda f: (f * torch.arange(1000)).sum().item()
    yield ("T·f(t) at t = 0, 500, 999, for α = 0.5", torch.tensor([0.5, 1, 1.5]),
           lambda: 1000 * weights(0.5)[[0, 500, 999]])
    yield ("the sum of f is 1, exactly", True,
           lambda: abs(weights(0.5).sum().item() - 1) < 1e-9)
    yield ("the mean timestep for α = 0, 0.5, 1", [499.5, 600.9, 702.2],
           lambda: [mean(weights(alpha)) for alpha in (0, 0.5, 1)])


def heun():
    """Data from N(0, s²), s = 0.5, on ZeroScope's schedule. The best prediction is
    ε = √(1−ᾱ)·x/(ᾱs² + 1 − ᾱ), and x/√(ᾱs² + 1 − ᾱ) is constant along the exact path."""
    S, calls = NoiseSchedule(), []
    level = lambda t: S.alpha_bar[t].item()
    variance = lambda t: level(t) * 0.25 + 1 - level(t)
    network = lambda x, t: calls.append(t) or (1 - level(t)) ** 0.5 * x / variance(t)

    def error(steps):
        """The relative error."""
        exact = (variance(0) / variance(S.timesteps(steps)[0])) ** 0.5
        return abs(sampler.heun(S, network, clip((1,)), steps).item() / exact - 1)

    yield ("relative errors of 10, 20, 40 steps (DDIM: 0.192, 0.106, 0.0567), and all predictions",
           [0.0371, 0.00968, 0.002378, 19 + 39 + 79],
           lambda: [error(10), error(20), error(40), len(calls)])


def break_resume():
    """VMC for two steps: at once, at once again, and stopped after the first step and resumed."""
    @quiet()
    def weights(*steps):
        with tempfile.TemporaryDirectory() as folder:
            for number, n in enumerate(steps):
                train.main(["--method", "vmc", *SHORT, "--steps", str(n), "--out", folder,
                            *["--resume"] * (number > 0)])
            return load_file(Path(folder) / "vmc.safetensors")

    at_once = functools.cache(lambda: weights(2))
    equal = lambda other: all(torch.equal(x, other[name]) for name, x in at_once().items())

    def noise(step):
        ex = train.Example(motiondirector_run(), step, 0)
        return ex.add_noise(ex.next_clip()).noise

    yield "the noise of two steps differs", True, lambda: not torch.equal(noise(0), noise(1))
    yield "two steps, repeated: equal weights", True, lambda: equal(weights(2))
    yield "one step, --resume, one step: equal weights", False, lambda: equal(weights(1, 2))


CHECKS = [residual, prediction_types, ddim, guidance, attention_over_time, lora_hook, layer_sets,
          debias, motiondirector, timesteps, heun, break_resume]
