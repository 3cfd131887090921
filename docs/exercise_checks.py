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


def randn(*shape, seed=0):
    """Standard normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def numbers(*tensors):
    """The elements of tensors, in one list."""
    return [number for x in tensors for number in x.detach().flatten().tolist()]


def residual():
    """Residuals of the target: (3, 4), (1, 0); of the prediction: (4, 3), (0, 2)."""
    target, pred = clip((0, 0), (3, 4), (4, 4)), clip((0, 0), (4, 3), (4, 5))
    x, cosine = randn(1, 4, 5, 6, 6), losses.residual_cosine
    yield ("residuals of three frames, two channels", [3, 1, 4, 0],
           lambda: numbers(losses.residual(target)))
    yield "stride 2", [4, 5], lambda: numbers(losses.residual(pred, 2))
    yield "an error for stride 0", "ValueError", lambda: losses.residual(target, 0).shape
    yield ("1 − cos, averaged over two pairs; of the one pair with stride 2", [0.52, 0.006116],
           lambda: numbers(cosine(pred, target), cosine(pred, target, stride=2)))
    yield ("loss of 0.5·x + 3 and of −x against x", [0, 2],
           lambda: numbers(cosine(0.5 * x + 3, x), cosine(-x, x)))


def prediction_types():
    """Two clips with x0 = 1 and ε = 2 at ᾱ = 0.64 and 0.36, so that x_t = 2 and 2.2."""
    alpha_bar = torch.tensor([0.64, 0.36], dtype=torch.float64)
    x0, t = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64), torch.tensor([0, 1])
    v, eps = (NoiseSchedule(2, prediction_type=kind, alpha_bar=alpha_bar)
              for kind in ("v_prediction", "epsilon"))
    x, levels = v.add_noise(x0, 2 * x0, t), v.alpha_bar_at(t, x0)
    v_hat = torch.tensor([1.0, 0.4], dtype=torch.float64).view_as(x0)
    yield "the target v", [1.0, 0.4], lambda: numbers(v.target(x0, 2 * x0, t))
    yield "the target ε", [2, 2], lambda: numbers(eps.target(x0, 2 * x0, t))
    yield ("x̂0 and ε̂ from v̂", [1, 1, 2, 2],
           lambda: numbers(*v.to_x0_eps(v_hat, x, levels)))
    yield ("x̂0 and ε̂ from ε̂ = 0", [2.5, 2.2 / 0.6, 0, 0],
           lambda: numbers(*eps.to_x0_eps(0 * x, x, levels)))
    yield ("an int t, for which ᾱ is a number", [1, 1, 2],
           lambda: numbers(v.target(x0[:1], 2 * x0[:1], 0),
                           *v.to_x0_eps(v_hat[:1], x[:1], v.alpha_bar_at(0, x))))


def ddim():
    """Five steps with a smooth function as the network. Numbers: DDIMScheduler and
    DDIMInverseScheduler of diffusers 0.42.1, on ZeroScope's schedule."""
    start = clip((-1,), (-1 / 3,), (1 / 3,), (1,))
    network = lambda x, t: torch.sin(3 * x + t / 100) * 0.9 + 0.1 * x
    constant, S = lambda x, t: torch.ones_like(x), NoiseSchedule()
    inverted = lambda: sampler.ddim_inversion(S, constant, start, 50)
    yield ("DDIM, four numbers", [-1.93987, -4.14447, 0.78785, 6.11671],
           lambda: numbers(sampler.ddim(S, network, start, 5)))
    yield ("inversion, four numbers", [-0.45089, -0.20306, 0.34841, 0.44741],
           lambda: numbers(sampler.ddim_inversion(S, network, start, 5)))
    yield ("inversion and back, with ε̂ = 1 everywhere", numbers(start),
           lambda: numbers(sampler.ddim(S, constant, inverted(), 50)))


def guidance():
    """The network multiplies x = 3 by the mean of its text: 1 without the prompt, 2 with it."""
    text, x = torch.full((2, 3, 4), 2.0), torch.full((2, 1, 1, 1, 1), 3.0)

    def guided(empty, scale):
        """The prediction, and the number of texts in each call."""
        calls = []

        def network(x, t, text):
            calls.append(len(text))
            x = x.repeat(len(text) // len(x), 1, 1, 1, 1)  # as the UNet does
            return x * text.mean((1, 2)).view(-1, 1, 1, 1, 1)

        return numbers(sampler.classifier_free_guidance(network, text, empty, scale)(x, 0)) + calls

    yield ("scale 5, two clips: predictions, and four texts in one call", [18, 18, 4],
           lambda: guided(text / 2, 5.0))
    yield "scale 1 computes the conditional half only", [6, 6, 2], lambda: guided(text / 2, 1)
    yield "so does a missing empty prompt", [6, 6, 2], lambda: guided(None, 5.0)


def attention_over_time():
    """Two clips of three frames. Numbers: TransformerTemporalModel of diffusers 0.42.1, with the
    weights of the tiny model's transformer_in."""
    waves = lambda C: torch.sin(0.7 * torch.arange(6 * C * 4)).view(6, C, 2, 2)
    first = model.load_unet(model.TINY).transformer_in
    yield ("the tiny model's first one: four outputs", [0.071316, 0.363986, 1.079893, -0.847513],
           lambda: numbers(first(waves(64), 3)[[0, 4], :2, [0, 1], 0]))
    layer, x, changed = model.TemporalTransformer(8, 2, 4, 2), waves(8), waves(8)
    layer.norm, changed[4, :, 0, 1] = torch.nn.Identity(), 0
    reached = lambda: ((layer(x, 3) - layer(changed, 3)).abs().amax(1) > 1e-6).nonzero()
    yield ("a pixel (frame, y, x) reaches itself in all frames of its clip, if there is no norm",
           [[3, 0, 1], [4, 0, 1], [5, 0, 1]], lambda: reached().tolist())


def lora_hook():
    """One layer with W = 0, so that its output is the LoRA's."""
    linear, conv = torch.nn.Linear(2, 2, bias=False), fast.TemporalConv1d(1)
    for layer in (linear, conv):
        torch.nn.init.zeros_(layer.weight)
    one = lora.LoRA(torch.nn.Sequential(linear), "all", 1, scale=2.0)
    A, B = one.pairs["0"]
    A.data, B.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    x = torch.tensor([[1.0, 2.0]])
    yield ("linear layer, x = (1, 2), A = (3, 4), B = (5, 6), s = 2", [110, 132],
           lambda: numbers(linear(x)))
    one.active = False
    yield "not active", [0, 0], lambda: numbers(linear(x))
    one.active, one.dropout, many = True, 0.5, x.expand(1000, 2)
    zeros = lambda layer: round((layer(many) == 0).double().mean().item(), 1)
    yield ("share of zeros with a dropout of 0.5, in train and eval mode", [0.5, 0],
           lambda: [zeros(linear.train()), zeros(linear.eval())])
    (A, B), = lora.LoRA(torch.nn.Sequential(conv), "0.weight", 1).pairs.values()
    A.data, B.data = torch.tensor([1.0, 10, 100]).view_as(A), torch.full_like(B, 5)
    frames = torch.tensor([1.0, 2, 3]).view(1, 1, 3, 1)
    hooked = lambda: conv(frames) - conv.bias
    yield ("temporal convolution, x = (1, 2, 3) over time, A = (1, 10, 100), B = 5, s = 1",
           [1050, 1605, 160], lambda: numbers(hooked()))
    merged = torch.nn.functional.conv3d(frames[..., None], adapters.lora_delta(A, B, conv.weight),
                                        padding=(1, 0, 0))
    yield "equal to the convolution with W + B·A", numbers(merged), lambda: numbers(hooked())


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
    yield ("frames 1, 2, 4; anchor: frame 1; β = √3", [2 - 2 * root, 4 - 2 * root, 8 - 2 * root],
           lambda: numbers(losses.debias(clip((1,), (2,), (4,)), 1, root)))
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
        (_, frame, _), (_, whole, _) = both()
        return [frame.t == whole.t, not frame.temporal, whole.temporal,
                torch.equal(frame.x, whole.x[:, :, 1:2])]

    states = lambda rows: [state for _, _, state in rows]
    equations = [square(frame), square(whole) + square(debiased)]
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
    yield ("number of losses, if ex.rand() returns 0, 0.2, 0.4, 0.6 and 0.8", [2, 2, 2, 2, 1],
           lambda: [len(motiondirector_losses(n / 5)) for n in range(5)])


def timesteps():
    """f(t) for T = 1000. Its mean is T/2 + 2αT/π²."""
    weights = lambda alpha: sampler.timestep_weights(1000, alpha)
    mean = lambda f: (f * torch.arange(1000)).sum().item()
    yield ("T·f(t) at t = 0, 500, 999, for α = 0.5", [0.5, 1, 1.5],
           lambda: numbers(1000 * weights(0.5)[[0, 500, 999]]))
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
