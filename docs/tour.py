"""Make the figures, numbers and quoted code of docs/tour.md.

    python docs/tour.py            # all stops; continues where it stopped
    python docs/tour.py 9          # stop 9 again
    python docs/tour.py --page     # the page alone, after a change of code

One function per stop draws images and charts to docs/tour/ and returns numbers, which
docs/tour/numbers.json keeps. The page is written by hand, except for three kinds of places:
`0.86<!--9 mse-->` is a number of stop 9, the block after `<!-- code: losses.mse -->` is that
function's body, and the one after `<!-- table: 3 -->` is the table of stop 3. Trained models and
samples are kept in out/tour.

Axes: N videos, C channels, F frames, h w latent, H W pixels.
"""
import argparse
import ast
import functools
import importlib
import inspect
import json
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import draw  # noqa: E402

import generate  # noqa: E402
import lora  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from scores import clip as scores  # noqa: E402
from support import media  # noqa: E402
from support.adapters import apply_adapters, read_adapter  # noqa: E402
from support.files import read_json, write_json, write_text  # noqa: E402
from support.machine import default_precision, tune_malloc  # noqa: E402
from support.recipe import METHODS  # noqa: E402
from tiny import benchmark, measurements, world  # noqa: E402
from tiny.benchmark import Trial  # noqa: E402

PAGE, FIGURES, OUT = ROOT / "docs" / "tour.md", ROOT / "docs" / "tour", ROOT / "out" / "tour"
NUMBERS = FIGURES / "numbers.json"
MOTION = "moving in a figure eight"
STEPS = (50, 100, 200, 0)  # adapters that are sampled; 0 is the last
VMC = Trial("vmc", MOTION, save_every=50)
NAIVE = replace(VMC, settings=("loss=mse", "motion.layers=all", "motion.lr=3e-4"))
TEMPORAL = replace(VMC, settings=("loss=mse", "motion.layers=temporal"))
BY_LOSS = {"residual cosine": VMC}
for name in ("mse", "residual-l2", "residual-cosine-official"):
    BY_LOSS[name] = replace(VMC, settings=(f"loss={name}",))
MD = Trial("motiondirector", MOTION)
PATCHES = Trial("customize-a-video", MOTION)
WHOLE = replace(PATCHES, patch=(1.0, 1.0))
NEWMOVE = Trial("newmove", MOTION)
FORGETFUL = replace(NEWMOVE, prior="none")
SHAPE = 8, 16, 8, 8  # of the tiny model's latents: C, F, h, w
SWAP = ("a red star moving right on a blue striped background",
        "a cyan square moving up on a brown dotted background")
LEVELS = (10, 150, 350, 550, 690)  # timesteps shown, of 0 to 699


# ------------------------------------------------------------------------------------------------
# Shared by the stops


def load(precision="fp32"):
    """The tiny model. fp32 gives the same numbers on every machine, up to rounding."""
    return model.load(precision=precision)


def one_clip(motion=MOTION, color="green", shape="triangle", background="green checkered"):
    """A centered scene with this motion and appearance, and its video (1, 3, F, H, W)."""
    scene = world.scenes_of(motion, 1, torch.Generator().manual_seed(0))
    index = lambda table, name: torch.tensor([list(table).index(name)])
    middle = torch.tensor([world.SIZE / 2])
    scene = replace(scene, color=index(world.COLORS, color), shape=index(world.SHAPES, shape),
                    background=index(world.BACKGROUNDS, background), x=middle, y=middle,
                    angle=0 * middle)
    return scene, world.render(scene)


def scenes_and_clip():
    """The prompts' scenes of all trials, the training scene and its video (3, F, H, W)."""
    training, tests = benchmark.scenes_of(VMC)
    return tests, training, world.render(training)[0]


def draw_samples(jobs, trial=None, step=0, scales=(1.0,), parts=("",), change=None, frames=16,
                 **settings):
    """Videos (N, 3, F, H, W) of jobs [(prompt, seed)] from a trained trial or the base model.
    scales, parts: of its adapter files; change(pipe) may modify the model; settings: Sampling's."""
    pipe = load(default_precision("cpu"))
    adapters, latents = [], None
    if trial:
        benchmark.train_trial(trial, OUT)
        files = [benchmark.adapter_of(trial, OUT, part, step) for part in parts]
        adapters = [read_adapter(file, pipe) for file in files]
        latents = adapters[0].latents
    if change:
        change(pipe)
    clip = None if latents is None else latents[None]
    s = sampler.Sampling(**{"sampling_steps": 20, "guidance": 4.0} | settings)
    shape = SHAPE[0], frames, *SHAPE[2:]
    videos = sampler.sample_videos(pipe, adapters, scales, jobs, s, shape, clip, batch=8,
                                   progress=None)
    return torch.stack([video for _, video in videos])


def test_jobs(trial, full=True):
    """The eight test prompts of a trial, with seeds. Unless `full`, they name only the shape."""
    tests, words = benchmark.scenes_of(trial)[1], benchmark.words_of(trial)
    return [(benchmark.describe(tests, i, words, full), i) for i in range(benchmark.PROMPTS)]


def caption_of(trial):
    """The training caption of a trial."""
    return benchmark.describe(benchmark.scenes_of(trial)[0], 0, benchmark.words_of(trial), False)


def measure(videos, trial=VMC):
    """Means of agreement, appearance and leak of samples of `test_jobs`."""
    values = benchmark.score(videos, trial, benchmark.scenes_of(trial)[1])
    return {name: sum(values[name]) / len(values[name])
            for name in ("agreement", "appearance", "leak")}


@functools.cache
def of_base():
    """Measures of the base model's samples from noise."""
    return measure(draw_samples(test_jobs(VMC)))


def over_steps(trial):
    """[(step, measures)] of a trial, from the base model to the last step."""
    last = METHODS[trial.method].override(train.TINY[trial.method]).steps
    results, cells = benchmark.Results(OUT), [benchmark.Cell(step=step) for step in STEPS]
    results.measure(trial, cells)
    return [(0, of_base())] + [
        (cell.step or last, results.cells(trial)[cell.name]) for cell in cells]


def curve(rows, name):
    """([x], [measure]) of rows [(x, measures)]."""
    return [x for x, _ in rows], [m[name] for _, m in rows]


def read_path(video):
    """The measured path ([x], [y upward]) of a video (3, F, H, W)."""
    reading = measurements.read(video[None])
    return reading.x[0].tolist(), (world.SIZE - reading.y[0]).tolist()


def psnr(a, b):
    """Peak signal-to-noise ratio, in dB, of videos in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().mean()).item()


def markdown(head, rows):
    """A table in Markdown."""
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)]) + "\n"


# ------------------------------------------------------------------------------------------------
# The stops


def zeroscope(device="meta"):
    """ZeroScope's UNet, without weights."""
    kinds = ["CrossAttn{}Block3D"] * 3
    config = model.UNetConfig(
        block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=1024,
        down_block_types=[k.format("Down") for k in kinds] + ["DownBlock3D"],
        up_block_types=["UpBlock3D"] + [k.format("Up") for k in kinds])
    with torch.device(device):
        return model.UNet(config)


def stop_0():
    tests, training, clip = scenes_and_clip()
    base = draw_samples(test_jobs(VMC))
    tuned = draw_samples(test_jobs(VMC), VMC, noise_prior=1.0, sampler="ddpm")
    draw.strip(FIGURES / "0.png",
               {"training clip": clip, "base model": base[0], "after VMC": tuned[0]})
    exact = world.trajectory(training)
    paths = {"training clip, exact": (exact.x[0].tolist(), (world.SIZE - exact.y[0]).tolist()),
             "base model, measured": read_path(base[0]), "after VMC, measured": read_path(tuned[0])}
    draw.charts(FIGURES / "0.svg", *(
        dict(title=title, x="position, pixels", lines={"": line}, xlim=(0, 64), ylim=(0, 64))
        for title, line in paths.items()))
    return {"base": measure(base)["agreement"], "vmc": measure(tuned)["agreement"],
            "appearance": 100 * measure(tuned)["appearance"]}


def forward_shapes(unet, frames, h, w, channels):
    """{module: output shape} of one forward pass."""
    levels = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(len(unet.down_blocks))]
    names = ["conv_in", "transformer_in", *levels[: len(levels) // 2], "mid_block",
             *levels[len(levels) // 2 :], "conv_out"]
    shapes = {}

    def hook(name, module, inputs, out):
        shapes[name] = tuple((out[0] if isinstance(out, tuple) else out).shape)

    hooks = [unet.get_submodule(n).register_forward_hook(functools.partial(hook, n)) for n in names]
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        unet(torch.zeros(1, channels, frames, h, w), torch.zeros(1, dtype=torch.long), text)
    for one in hooks:
        one.remove()
    return shapes


def stop_1():
    pipe, (_, video) = load(), one_clip()
    latents = pipe.encode(video)
    back = pipe.decode(latents)
    draw.strip(FIGURES / "1.png", {"frames": video[0], "3 of 8 latent\nchannels": enlarged(latents),
                                   "decoded": back[0]})
    ours = forward_shapes(pipe.unet, 16, 8, 8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        theirs = forward_shapes(zeroscope("cpu"), 16, 40, 72, 4)
    rows = [[f"`{name}`", str(ours.get(name, "–")), str(shape)] for name, shape in theirs.items()]
    head = ["module", "tiny, 16 frames of 64×64", "ZeroScope, 16 of 576×320"]
    return {"ratio": video.numel() / latents.numel(), "psnr": psnr(video, back),
            "table": markdown(head, rows)}


def stop_2():
    pipe, (_, video) = load(), one_clip()
    latents, g = pipe.encode(video), sampler.generator(0)
    noise = torch.randn(latents.shape, generator=g)
    rows = {f"t = {t}": pipe.decode(pipe.schedule.add_noise(latents, noise, t))[0] for t in LEVELS}
    draw.strip(FIGURES / "2.png", rows)
    schedules = {"tiny": pipe.schedule, "ZeroScope": sampler.NoiseSchedule()}
    share = lambda S: [t / S.num_train_timesteps for t in range(S.num_train_timesteps)]
    snr = lambda a: (a / (1 - a)).log10().tolist()
    draw.charts(FIGURES / "2.svg", *(
        dict(title=title, x="t / T", lines={
            n: (share(S), value(S.alpha_bar)) for n, S in schedules.items()})
        for title, value in (("ᾱ, the share of signal power", torch.Tensor.tolist),
                             ("log₁₀ of the signal-to-noise ratio ᾱ/(1 − ᾱ)", snr))))
    even = lambda S: int((S.alpha_bar < 0.5).nonzero()[0]) / S.num_train_timesteps
    numbers = {f"{n} end": S.alpha_bar[-1].item() for n, S in schedules.items()}
    return numbers | {f"{n} even": even(S) for n, S in schedules.items()}


@torch.no_grad()
def stop_3():
    pipe, (_, video) = load(), one_clip("moving right")
    S, x0 = pipe.schedule, pipe.encode(video)
    noise = torch.randn(x0.shape, generator=sampler.generator(0))
    text = pipe.encode_text(["a green triangle moving right on a green checkered background"])
    rms = lambda a, b: (a - b).square().mean().sqrt().item()
    frames, rows, worst = {}, [], 0.0
    for t in LEVELS:
        a, x = S.alpha_bar[t].item(), S.add_noise(x0, noise, t)
        v, target = pipe.predict(x, t, text), S.target(x0, noise, t)
        clean, eps = S.to_x0_eps(v, x, a)
        worst = max(worst, ((eps - noise) - a**0.5 * (v - target)).abs().max().item())
        frames[f"x0 predicted\nat t = {t}"] = pipe.decode(clean)[0]
        cosines = [losses.residual_cosine(*pair).item() for pair in ((v, target), (eps, noise))]
        rows.append([t, *(f"{e:.3f}" for e in (rms(v, target), rms(eps, noise), rms(clean, x0))),
                     *(f"{c:.4f}" for c in cosines)])
    draw.strip(FIGURES / "3.png", frames)
    head = ["t", "error of v̂", "of ε̂", "of x̂0", "residual cosine of v", "of ε"]
    return {"identity": worst, "table": markdown(head, rows)}


def bypass(pipe):
    """Skip all temporal layers of a model."""
    unet = pipe.unet.forward
    pipe.unet.forward = lambda x, t, text, temporal=True: unet(x, t, text, temporal=False)


def stop_4():
    jobs = [(f"a {color} star moving {way} on a blue striped background", 3)
            for color, way in (("red", "right"), ("yellow", "down"))]
    full, spatial = draw_samples(jobs), draw_samples(jobs, change=bypass)
    draw.strip(FIGURES / "4.png", {"all layers": full[0], "temporal layers\nbypassed": spatial[0]})
    bend = [benchmark.jitter(measurements.read(v)).mean().item() for v in (full, spatial)]
    return {"with": bend[0], "without": bend[1]}


@torch.no_grad()
def stop_5():
    pipe, (_, video) = load(), one_clip()
    found, hooks = {}, []

    def keep(name, layer, inputs, out):
        found[name] = layer.maps(*inputs).mean((0, 1))

    for name, module in pipe.unet.named_modules():
        if re.fullmatch(r"(.*temp_attentions|transformer_in)\..*attn1", name):
            label = name.split(".transformer_blocks")[0].replace("temp_attentions", "attention")
            hooks.append(module.register_forward_hook(functools.partial(keep, label)))
    x0 = pipe.encode(video)
    noise = torch.randn(x0.shape, generator=sampler.generator(0))
    pipe.predict(pipe.schedule.add_noise(x0, noise, 550), 550, pipe.encode_text([""]))
    for one in hooks:
        one.remove()
    draw.matrices(FIGURES / "5.png", found, per_row=5)
    block, x = pipe.unet.mid_block, torch.randn(16, 128, 4, 4, generator=sampler.generator(1))
    change = {}
    for name, layer in (("attention", block.temp_attentions[0]),
                        ("convolutions", block.temp_convs[0])):
        backward = layer(x.flip(0), 16).flip(0)
        change[name] = ((backward - layer(x, 16)).norm() / (layer(x, 16) - x).norm()).item()
    own = {n: m.diagonal().mean().item() for n, m in found.items()}
    return {"lowest": min(own.values()), "highest": max(own.values()), "uniform": 1 / 16} | change


def stop_6():
    pipe = load(default_precision("cpu"))
    seen = []
    start = sampler.seeded_randn(SHAPE, [1])
    prompt = "a red star moving in a circle on a purple wavy background"
    sampler.sample(pipe, [prompt], start, [1], 20, 4.0, on_step=lambda t, x0: seen.append((t, x0)))
    shown = [0, 1, 3, 6, 12, 19]
    draw.strip(FIGURES / "6.png", {
        f"step {i + 1}\nt = {seen[i][0]}": pipe.decode(seen[i][1])[0] for i in shown})
    tests = world.sample_scenes(16, torch.Generator().manual_seed(7), speeds=False)
    jobs = list(zip(world.captions(tests), range(16)))
    numbers, rows = {}, {}
    for name, settings in {"g = 1": {"guidance": 1.0}, "g = 4": {}, "g = 9": {"guidance": 9.0},
                           "g = 4, DDPM": {"sampler": "ddpm"}}.items():
        videos = draw_samples(jobs, **settings)
        reading, rows[name] = measurements.read(videos), videos[0]
        names = *benchmark.APPEARANCE, "motion"
        right = [getattr(reading, n) == getattr(tests, n) for n in names]
        numbers[name] = 100 * torch.stack(right).all(0).float().mean().item()
    draw.strip(FIGURES / "6b.png", rows)
    return numbers


def swapped(pipe, k, steps=20, n=8):
    """Videos (N, 3, F, H, W) with the first prompt for k steps and the second one after."""
    texts = [pipe.encode_text([p]).expand(n, -1, -1) for p in SWAP]
    empty = pipe.encode_text([""]).expand(n, -1, -1)
    first, second = (sampler.classifier_free_guidance(pipe.predict, t, empty, 4.0) for t in texts)
    times, start = pipe.schedule.timesteps(steps), sampler.seeded_randn(SHAPE, range(n))
    predict = lambda x, t: (first if times.index(t) < k else second)(x, t)
    with torch.no_grad():
        return pipe.decode(sampler.ddim(pipe.schedule, predict, start, steps))


def stop_7():
    pipe, swaps = load(default_precision("cpu")), range(0, 21, 2)
    motion, appearance, rows = [], [], {}
    first = {"color": (world.COLORS, "red"), "shape": (world.SHAPES, "star"),
             "background": (world.BACKGROUNDS, "blue striped")}
    for k in swaps:
        videos = swapped(pipe, k)
        reading = measurements.read(videos)
        share = lambda hits: hits.float().mean().item()
        motion.append(share(reading.motion == world.MOTIONS.index("moving right")))
        right = [getattr(reading, n) == list(table).index(v) for n, (table, v) in first.items()]
        appearance.append(share(torch.stack(right).all(0)))
        if k in (0, 8, 10, 20):
            rows[f"swap at step {k}"] = videos[0]
    draw.strip(FIGURES / "7.png", rows)
    weights = sampler.timestep_weights(700, 0.5) * 700
    draw.charts(
        FIGURES / "7.svg",
        dict(title="share of videos, first prompt for k of 20 steps", x="k", ylim=(0, 1.05),
             lines={"motion of the first": (swaps, motion),
                    "appearance of the first": (swaps, appearance)}),
        dict(title="NewMove's f(t)·T, α = 0.5", x="t", xlim=(700, 0), ylim=(0, 1.6),
             lines={"": (range(700), weights.tolist())}))
    numbers, times = {}, [*pipe.schedule.timesteps(20), 0]
    for name, values in (("motion", motion), ("appearance", appearance)):
        half = swaps[next(i for i, v in enumerate(values) if v >= 0.5)]
        numbers |= {name: half, f"{name} t": times[half]}
    return numbers


def stop_8():
    numbers, panels, rows = {}, [], {"training clip": scenes_and_clip()[2]}
    at_start = measure(draw_samples(test_jobs(VMC, full=False)))["leak"]
    for name, trial in (("all", NAIVE), ("temporal", TEMPORAL)):
        steps = over_steps(trial)
        short = [draw_samples(test_jobs(trial, full=False), trial, step) for step in STEPS]
        leak = [at_start] + [measure(videos)["leak"] for videos in short]
        panels.append(dict(
            title=f"squared error, {name} layers", x="training step", ylim=(-0.1, 1.05),
            lines={"agreement": curve(steps, "agreement"), "appearance": curve(steps, "appearance"),
                   "leak, short prompt": ([x for x, _ in steps], leak)}))
        rows[f"{name} layers,\nshort prompt"] = short[-1][0]
        last = steps[-1][1]
        numbers |= {f"{name} agreement": last["agreement"], f"{name} leak": 100 * leak[-1],
                    f"{name} appearance": 100 * last["appearance"]}
    draw.strip(FIGURES / "8.png", rows)
    draw.charts(FIGURES / "8.svg", *panels)
    return numbers


def enlarged(z):
    """Three latent channels as a video (3, F, H, W)."""
    shown = z[0, :3] / z[0, :3].abs().max()
    return F.interpolate(shown.transpose(0, 1), scale_factor=8).transpose(0, 1)


def stop_9():
    pipe, other = load(), ("yellow", "circle", "purple wavy")
    videos = one_clip()[1], one_clip(MOTION, *other)[1], one_clip("hopping")[1]
    a, b, c = (pipe.encode(v) for v in videos)
    draw.strip(FIGURES / "9.png", {
        "clip A": videos[0][0], "clip B": videos[1][0],
        "latents of A": enlarged(a), "latents of B": enlarged(b),
        "residuals of A": enlarged(losses.residual(a)),
        "residuals of B": enlarged(losses.residual(b))}, columns=7)
    rows = {name: over_steps(trial) for name, trial in BY_LOSS.items()}
    drift = {name: scale_of(trial) for name, trial in BY_LOSS.items()}
    draw.charts(
        FIGURES / "9.svg",
        dict(title="agreement, by loss", x="training step", ylim=(-0.1, 1),
             lines={n: curve(r, "agreement") for n, r in rows.items()}),
        dict(title="scale of the prediction, std(v̂)/std(v)", x="training step",
             lines={n: (range(len(v)), v) for n, v in drift.items()}))
    cosine = lambda x, y: F.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()
    numbers = {"motion": cosine(a, b), "appearance": cosine(a, c)}
    a, b, c = (losses.residual(x) for x in (a, b, c))
    numbers |= {"residual motion": cosine(a, b), "residual appearance": cosine(a, c)}
    for name, trial in BY_LOSS.items():
        short = measure(draw_samples(test_jobs(trial, full=False), trial))
        numbers |= {name: rows[name][-1][1]["agreement"], f"{name} scale": min(drift[name]),
                    f"{name} leak": 100 * short["leak"]}
    return numbers


def scale_of(trial, width=30):
    """The logged scale of a run's predictions, a moving average over 2 · width + 1 steps."""
    lines = (trial.folder(OUT) / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line]
    values = torch.tensor([record["seen"][0]["scale"] for record in records])
    values = F.pad(values[None, None], (width, width), mode="replicate")
    return F.avg_pool1d(values, 2 * width + 1, 1)[0, 0].tolist()


def truncate(rank):
    """A change of the model: VMC's update, with each matrix reduced to this rank."""
    def change(pipe):
        pipe.store_frozen = lambda keep=(): None
        pipe.precision = "fp32"
        for name, W in updates(pipe).items():
            U, S, V = torch.linalg.svd(W, full_matrices=False)
            pipe.unet.get_parameter(name).data += (U[:, :rank] * S[:rank]) @ V[:rank]
    return change


def updates(pipe):
    """{parameter name: ΔW} of VMC's adapter."""
    benchmark.train_trial(VMC, OUT)
    adapter = read_adapter(benchmark.adapter_of(VMC, OUT), pipe)
    return {n: t.float() - pipe.unet.get_parameter(n).data for n, t in adapter.tensors.items()}


def stop_10():
    deltas = updates(load())
    energy = torch.stack([torch.linalg.svdvals(W)[:64].square().cumsum(0) for W in deltas.values()])
    share = (energy / energy[:, -1:]).mean(0).tolist()
    ranks = (1, 2, 4, 8, 16, 32)
    rows = [(r, measure(draw_samples(test_jobs(VMC), change=truncate(r)))) for r in ranks]
    full = measure(draw_samples(test_jobs(VMC), VMC))
    draw.charts(
        FIGURES / "10.svg",
        dict(title="energy of ΔW in its first r singular values", x="r", ylim=(0, 1.05),
             lines={"mean of 24 matrices": (range(1, len(share) + 1), share)}),
        dict(title="samples with ΔW truncated to rank r", x="r", ylim=(-0.1, 1.05),
             lines={n: curve(rows, n) for n in ("agreement", "appearance")}))
    return {"full": full["agreement"]} | {f"rank {r}": m["agreement"] for r, m in rows} | {
        "energy 4": 100 * share[3], "energy 16": 100 * share[15]}


def distances(change):
    """Distances of changed latents: of two appearances with one motion, of two motions with one
    appearance."""
    pipe, other = load(), ("yellow", "circle", "purple wavy")
    a, b, c = (change(pipe.encode(one_clip(*scene)[1]))
               for scene in ((MOTION,), (MOTION, *other), ("hopping",)))
    return (a - b).norm().item(), (a - c).norm().item()


def stop_11():
    numbers, jobs = {}, test_jobs(MD)
    for name, change in (("before", lambda x: x), ("after", losses.debias)):
        appearance, motion = distances(change)
        numbers |= {f"appearance {name}": appearance, f"motion {name}": motion,
                    f"ratio {name}": appearance / motion}
    short = test_jobs(MD, full=False)
    motion = draw_samples(short, MD)
    both = draw_samples(short, MD, scales=(1.0, 1.0), parts=("", "-appearance"))
    draw.strip(FIGURES / "11.png", {"training clip": scenes_and_clip()[2], "motion LoRA": motion[0],
                                    "both LoRAs": both[0]})
    scales = (0.25, 0.5, 1, 2, 4)
    rows = [(0, of_base()), *(
        (s, measure(draw_samples(jobs, MD, scales=(s,)), MD)) for s in scales)]
    draw.charts(FIGURES / "11.svg", dict(
        title="scale of the motion LoRA", x="scale", ylim=(-0.1, 1.05),
        lines={n: curve(rows, n) for n in ("agreement", "appearance")}))
    for name, videos in (("motion", motion), ("both", both)):
        numbers[f"leak {name}"] = 100 * measure(videos, MD)["leak"]
    for s, m in rows:
        numbers |= {f"agreement {s:g}": m["agreement"], f"appearance {s:g}": 100 * m["appearance"]}
    return numbers


def with_absorber(trial):
    """The model in fp32 without temporal layers, with the absorber of a trial if one is given."""
    pipe = load()
    if trial:
        benchmark.train_trial(trial, OUT)
        absorber = read_adapter(benchmark.adapter_of(trial, OUT, "-appearance"), pipe)
        list(apply_adapters(pipe, [absorber], [1.0]))
    bypass(pipe)
    return pipe


@torch.no_grad()
def frame_loss(pipe, video, caption, draws=8):
    """The mean squared error of v on all frames of a video (1, 3, F, H, W), over timesteps."""
    x0, text, errors = pipe.encode(video), pipe.encode_text([caption]), []
    for i in range(draws):
        g, t = sampler.generator(12, i), 700 * (2 * i + 1) // (2 * draws)
        noise = torch.randn(x0.shape, generator=g)
        v = pipe.predict(pipe.schedule.add_noise(x0, noise, t), t, text)
        errors.append(F.mse_loss(v, pipe.schedule.target(x0, noise, t)))
    return sum(errors).item() / draws


def stop_12():
    rows, numbers, errors = {"training clip": scenes_and_clip()[2]}, {}, {}
    clip, caption = scenes_and_clip()[2][None], caption_of(PATCHES)
    other = one_clip(MOTION, "yellow", "triangle", "purple wavy")[1]
    start = sampler.seeded_randn((8, 8, 8, 8), [0])  # eight frames, which are eight images
    for name, trial in (("base", None), ("patches", PATCHES), ("whole", WHOLE)):
        pipe = with_absorber(trial)
        errors[name] = [frame_loss(pipe, v, caption) for v in (clip, other)]
        label = name if name == "base" else f"absorber,\n{name}"
        rows[label] = sampler.sample(pipe, [caption], start, [0], 20, 4.0)[0]
        if trial:
            found = measure(draw_samples(test_jobs(trial), trial), trial)
            change = [100 * (a / b - 1) for a, b in zip(errors[name], errors["base"])]
            numbers |= {f"{name} agreement": found["agreement"], f"{name} clip": change[0],
                        f"{name} other": change[1]}
    draw.strip(FIGURES / "12.png", rows)
    return numbers


def stop_13():
    tests = world.sample_scenes(32, torch.Generator().manual_seed(11), speeds=False)
    jobs, numbers, videos, right = list(zip(world.captions(tests), range(32))), {}, {}, {}
    for name, trial in (("base", None), ("prior", NEWMOVE), ("no prior", FORGETFUL)):
        videos[name] = draw_samples(jobs, trial)
        reading = measurements.read(videos[name])
        right[name] = reading.motion == tests.motion
        numbers[f"{name} motion"] = 100 * right[name].float().mean().item()
        if trial:
            found = measure(draw_samples(test_jobs(trial), trial), trial)
            numbers[f"{name} agreement"] = found["agreement"]
    shown = int((right["base"] & right["prior"] & ~right["no prior"]).nonzero()[0])
    words = world.MOTIONS[tests.motion[shown]].split(" while ")[0]
    draw.strip(FIGURES / "13.png", {
        f'"… {words} …"\nbase model': videos["base"][shown],
        "regularization\nclips": videos["prior"][shown], "none": videos["no prior"][shown]})
    return numbers


def stop_14():
    pipe, (_, video) = load(), one_clip()
    latents = pipe.encode(video)
    back = {}
    for steps in (20, 100):
        inverted = sampler.invert(pipe, latents, steps)
        back[steps] = sampler.sample(pipe, [""], inverted, [0], steps, 1.0)[0]
    draw.strip(FIGURES / "14.png", {"clip": video[0], "inverted": pipe.decode(inverted)[0],
                                    "and back,\n20 steps": back[20], "100 steps": back[100]})
    shares, jobs = (0.0, 0.25, 0.5, 0.75, 1.0), test_jobs(VMC)
    tuned = [(p, measure(draw_samples(jobs, VMC, noise_prior=p))) for p in shares]
    base = [(p, measure(draw_samples(jobs, VMC, scales=(0.0,), noise_prior=p))) for p in shares]
    draw.charts(FIGURES / "14.svg", *(
        dict(title=title, x="noise prior p", ylim=(-0.1, 1.05),
             lines={n: curve(rows, n) for n in ("agreement", "appearance", "leak")})
        for title, rows in (("after VMC", tuned), ("base model", base))))
    numbers = {f"psnr {steps}": psnr(video_back, video[0]) for steps, video_back in back.items()}
    for name, rows in (("tuned", tuned), ("base", base)):
        for p, m in rows:
            numbers |= {f"{name} {p:g}": m["agreement"], f"{name} leak {p:g}": 100 * m["leak"],
                        f"{name} appearance {p:g}": 100 * m["appearance"]}
    return numbers


@torch.no_grad()
def first_axis(video, t=550):
    """The first principal component over frames of DMT's features of a video (3, F, H, W) at t."""
    pipe = load()
    x0 = pipe.encode(video[None])
    noise = torch.randn(x0.shape, generator=sampler.generator(0))
    features = generate.frame_features(pipe, pipe.schedule.add_noise(x0, noise, t), t,
                                       pipe.encode_text([""]))[0][0]
    centered = features - features.mean(0)
    line = centered @ torch.linalg.svd(centered).Vh[0]
    return (line / line.std() * (1 if line[0] > 0 else -1)).tolist()  # the sign is arbitrary


def stop_15():
    tests, training, clip = scenes_and_clip()
    folder = OUT / "dmt"
    media.write_video(folder / "clip.mp4", clip, 8.0)
    (folder / "clip.txt").write_text(benchmark.describe(training, 0, MOTION, False) + "\n")
    jobs = test_jobs(VMC)[:4]
    if not (folder / "videos").is_dir():
        (folder / "prompts.txt").write_text("".join(f"{p}\n" for p, _ in jobs))
        generate.main(["--dmt", str(folder / "clip.mp4"), "--prompts", str(folder / "prompts.txt"),
                       "--out", str(folder / "videos")])
    files = sorted((folder / "videos").glob("*.mp4"))
    results = torch.stack([media.read_video(f, 16, (64, 64), 8.0) for f in files])
    lines = {"clip": first_axis(clip), "result 1": first_axis(results[0]),
             "base, same prompt": first_axis(draw_samples(jobs[:1])[0])}
    draw.strip(FIGURES / "15.png", {"clip": clip, "result 1": results[0], "result 2": results[1]})
    draw.charts(FIGURES / "15.svg", dict(
        title="first principal component of the features", x="frame",
        lines={name: (range(16), line) for name, line in lines.items()}))
    found = benchmark.score(results, VMC, tests[torch.arange(4)])
    base = benchmark.score(draw_samples(jobs), VMC, tests[torch.arange(4)])
    return {"agreement": sum(found["agreement"]) / 4, "base": sum(base["agreement"]) / 4,
            "appearance": 100 * sum(found["appearance"]) / 4}


def stop_16():
    tests, training, clip = scenes_and_clip()
    jobs = test_jobs(VMC)
    good = draw_samples(jobs, VMC, noise_prior=1.0, sampler="ddpm")[0]
    base = draw_samples(jobs)[0]
    videos = {"VMC": good, "base model": base,
              "VMC, one frame\nrepeated": good[:, :1].expand_as(good),
              "VMC, frames\nshuffled": good[:, torch.randperm(16, generator=sampler.generator(0))],
              "training clip": clip}
    draw.strip(FIGURES / "16.png", videos)
    scorer, rows = scores.tiny_clip(), []
    for name, video in videos.items():
        exact = benchmark.score(video[None], VMC, tests[:1])
        features = scorer.frame_features(video)
        alignment = scores.text_alignment(scorer, video, jobs[0][0])
        rows.append([name.replace("\n", " "), f"{alignment:.3f}",
                     f"{scores.temporal_consistency(features):.3f}", f"{exact['agreement'][0]:.2f}",
                     "yes" if exact["appearance"][0] else "no"])
    head = ["video", "CLIP text alignment", "temporal consistency", "agreement", "appearance right"]
    return {"table": markdown(head, rows)}


def stop_17():
    large = zeroscope()
    small, S, Z = load(), load().schedule, sampler.NoiseSchedule()
    million = lambda parameters: f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M"
    vmc = METHODS["vmc"].parts["motion"].layers
    trained = [million(lora.select(unet, vmc).values()) for unet in (small.unet, large)]
    rows = [["prediction", "v", "ε"], ["timesteps T", S.num_train_timesteps, Z.num_train_timesteps],
            ["ᾱ at T − 1", f"{S.alpha_bar[-1]:.4f}", f"{Z.alpha_bar[-1]:.4f}"],
            ["latents of a clip", "8 × 16 × 8 × 8", "4 × 24 × 40 × 72"],
            ["UNet parameters", million(small.unet.parameters()), million(large.parameters())],
            ["trained by VMC", *trained]]
    return {"table": markdown(["", "tiny", "ZeroScope"], rows)}


STOPS = {n: globals()[f"stop_{n}"] for n in range(18)}


# ------------------------------------------------------------------------------------------------
# The page


def body(name):
    """The source of a function or method "module.name" without its decorators and docstring."""
    module, *path = name.split(".")
    found = importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(found, "function", found))))
    tree = ast.parse(source).body[0]
    lines = source.splitlines()
    kept = lines[tree.lineno - 1 : tree.body[0].lineno - 1]
    first = tree.body[ast.get_docstring(tree) is not None]
    gap = tree.body[0].end_lineno if first is not tree.body[0] else tree.body[0].lineno - 1
    return "\n".join([*kept, *lines[gap : tree.end_lineno]]).rstrip()


def rebuild(text, numbers):
    """The page's text with current code, tables and numbers."""
    def number(match):
        stop, _, name = match[2].replace("\n", " ").partition(" ")
        digits = len(match[1].partition(".")[2])
        return f"{numbers[stop][name]:,.{digits}f}".replace("-", "−") + f"<!--{match[2]}-->"

    code = lambda m: f"{m[1]}\n```python\n{body(m[2])}\n```\n"
    table = lambda m: f"{m[1]}\n{numbers[m[2]]['table']}"
    text = re.sub(r"(<!-- code: (\S+) -->)\n```python\n.*?```\n", code, text, flags=re.S)
    text = re.sub(r"(<!-- table: (\d+) -->)\n(?:\|.*\n)*", table, text)
    return re.sub(r"([−-]?[\d,]*\.?\d+)<!--(\d+\s[^>]+)-->", number, text)


def made_with():
    """The base model and the settings that the numbers depend on."""
    methods = sorted({trial.method for trial in (VMC, MD, PATCHES, NEWMOVE)})
    return {"base": benchmark.base_model(), "settings": {m: train.TINY[m] for m in methods}}


def read_numbers():
    """{stop: numbers} of all stops made so far."""
    return read_json(NUMBERS) if NUMBERS.is_file() else {}


def main():
    """Run the stops that have no numbers yet, and rebuild the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stops", nargs="*", type=int, help="stops to run again (default: missing)")
    parser.add_argument("--page", action="store_true", help="rebuild the page alone")
    args = parser.parse_args()
    tune_malloc()
    numbers = read_numbers()
    if numbers.get("made with") != made_with():
        numbers = {}
    todo = [] if args.page else args.stops or [n for n in STOPS if str(n) not in numbers]
    for n in todo:
        print(f"stop {n}", flush=True)
        result = STOPS[n]()
        numbers = read_numbers() | {"made with": made_with(), str(n): result}
        write_json(NUMBERS, numbers)
    if not [n for n in STOPS if str(n) not in numbers]:
        write_text(PAGE, rebuild(PAGE.read_text(encoding="utf-8"), numbers))


if __name__ == "__main__":
    main()
