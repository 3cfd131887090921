"""Time and memory of this code against the diffusers UNet and the official training loops, and how
its own time grows with frames, ranks and processes.

    python benchmarks/bench.py --size tiny                     # CPU
    python benchmarks/bench.py --size middle                   # CPU, several minutes
    python benchmarks/bench.py --size full --device cuda       # 1.41 B parameters, random weights

Both sides have the same weights, inputs, dtype, threads and memory allocator, are checked to
compute the same numbers, and are then timed in turn, so that what disturbs one disturbs the other;
the ratio is of medians. The reference side does what the official loops do, operation by operation:
the diffusers UNet, its weights in fp32 under autocast (bf16, where they have fp16), text encoded at
every step (VMC: once), LoRA as wrapped linear layers, MotionDirector's two forward passes before
its two backward ones, NewMove's clip and prior clip as one batch. On both sides latents are cached,
clips are not augmented, and nothing is recomputed in the backward pass (the diffusers UNet cannot;
the official MotionDirector and NewMove do, to save memory). Prints a table; writes JSON to --out.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

try:  # needed to measure, and not for --help
    import diffusers
except ImportError:
    diffusers = None
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import TEXT, UNET, VAE, one_step  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import hub, machine, media  # noqa: E402
from support.files import publish, read_tensors  # noqa: E402

FOUR = UNET | {"attention_head_dim": 64, "layers_per_block": 2, "norm_num_groups": 32}
UNETS = {  # all read the tiny model's latents and text but the full one, which has its own
    "tiny": {"block_out_channels": [64, 128], "attention_head_dim": 16, "layers_per_block": 1,
             "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
             "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"], "norm_num_groups": 4,
             "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "sample_size": 8},
    "middle": FOUR | {"block_out_channels": [128, 256, 512, 512], "in_channels": 8,
                      "out_channels": 8, "cross_attention_dim": 64, "sample_size": 32},
    "full": FOUR | {"in_channels": 4, "out_channels": 4, "sample_size": 32},
}
# Clips of (width, height, frames), and videos to sample; the first of each is the table's.
SHAPES = {"tiny": [(64, 64, 16)], "middle": [(256, 256, 16)],
          "full": [(384, 384, 16), (256, 256, 16)]}
VIDEOS = {"tiny": (64, 64, 16), "middle": (256, 256, 16), "full": (576, 320, 24)}
# Settings by which every step is a whole one, of clips as they are.
OWN = {"vmc": (), "motiondirector": ("spatial=1",), "newmove": ("augment=none",)}
METHODS = tuple(OWN)


# ------------------------------------------------------------------------------------------------
# The two sides


def random_state(module):
    """Weights of a module on the meta device: norms near one, the rest small."""
    g, state = torch.Generator().manual_seed(0), {}
    for name, t in module.state_dict().items():
        fan = max(1, t[0].numel()) if t.dim() > 1 else 100
        x = torch.randn(t.shape, generator=g) * (0.5 / fan**0.5)
        state[name] = (x + 1 if "norm" in name and name.endswith("weight") else x).half()
    return state


def make_folder(size, folder):
    """A base model in the hub's layout: a UNet of this size; text and VAE the tiny ones or full."""
    with torch.device("meta"):
        parts = {"unet": (model.UNet(model.UNetConfig(**UNETS[size])), UNETS[size])}
        if size == "full":
            parts["vae"] = model.VAE(model.VAEConfig(**VAE)), VAE
            parts["text_encoder"] = model.TextEncoder(model.TextConfig(**TEXT)), TEXT
    for name in ("vae", "text_encoder"):
        (folder / name).symlink_to(model.TINY / name) if name not in parts else None
    if size == "full":
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading",
             "prediction_type": "epsilon", "steps_offset": 1}))
    else:
        (folder / "scheduler").symlink_to(model.TINY / "scheduler")
    for name, (module, config) in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        state = random_state(module)
        if name == "text_encoder":
            state = hub.text_to_hub({n.removeprefix("tower."): t for n, t in state.items()})
        save_file(state, folder / name / "diffusion_pytorch_model.safetensors")


def flags_of(folder, method, shape, args, *more):
    """train.py's flags, with a clip of noise."""
    width, height, frames = shape
    clip = args.scratch / "clips" / "0.mp4"
    if not clip.is_file():
        g = torch.Generator().manual_seed(0)
        media.write_video(clip, torch.rand(3, 32, 256, 256, generator=g) * 2 - 1, 8)
    flags = ["--method", method, "--video", clip, "--prompt", "a thing moving", "--weights", folder,
             "--size", f"{width}x{height}", "--frames", frames, "--fps", 8, "--out",
             args.scratch / "run", "--overwrite", "--preview-every", 0, "--checkpointing", "off",
             *OWN[method], *more]
    flags += ["--prior", clip.parent] if method == "newmove" else []
    return [str(f) for f in flags]


class Ours:
    """train.py's own run, step by step."""

    def __init__(self, folder, method, shape, args, *more):
        flags, recipe = train.parse(flags_of(folder, method, shape, args, "--device", args.device,
                                             *more))
        with contextlib.redirect_stdout(None):
            self.run = train.prepare(flags, recipe)
        self.trained = lora.named(self.run.learners)
        self.optimizer = lora.make_optimizer(recipe.parts, self.run.learners)
        self.number = 0

    def step(self):
        one_step(self.run, self.optimizer, self.number)
        self.number += 1


class WrappedLinear(nn.Module):
    """A LoRA as the official code has it: a module that holds the linear layer it replaces."""

    def __init__(self, linear, rank, dropout):
        super().__init__()
        rank = min(rank, linear.in_features, linear.out_features)
        self.linear = linear
        self.lora_down = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, linear.out_features, bias=False)
        self.dropout, self.scale = nn.Dropout(dropout), 1.0
        nn.init.normal_(self.lora_down.weight, std=1 / rank)
        nn.init.zeros_(self.lora_up.weight)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x) + self.dropout(self.lora_up(self.lora_down(x))) * self.scale


def official_bypass(unet):
    """At one frame the official UNet goes past its temporal layers; diffusers' does not."""
    for name, module in unet.named_modules():
        if name == "transformer_in" or name.split(".")[-2:-1] in (["temp_attentions"],
                                                                  ["temp_convs"]):
            whole, conv = module.forward, "temp_convs" in name

            def forward(x, *args, num_frames=1, whole=whole, conv=conv, **more):
                if num_frames == 1:
                    return x if conv else (x,)
                return whole(x, *args, num_frames=num_frames, **more)

            module.forward = forward


class Reference:
    """The official loops on the diffusers UNet."""

    def __init__(self, folder, method, ours, args):
        self.method, self.run, self.device = method, ours.run, args.device
        self.autocast = lambda: machine.autocast(args.device, ours.run.flags.precision)
        self.model = ours.run.model
        config = json.loads((folder / "unet" / "config.json").read_text())
        unet = diffusers.UNet3DConditionModel(**config)
        unet.load_state_dict(read_tensors(hub.find_weights(folder / "unet")))
        self.unet = unet.to(args.device).train()
        self.unet.requires_grad_(False)
        official_bypass(self.unet)
        self.spatial, self.temporal = [], []
        if method == "motiondirector":
            part = ours.run.recipe.parts["motion"]
            self.spatial, self.temporal = self.wrap("look", part), self.wrap("motion", part)
            self.groups = [[p for one in ones for p in (one.lora_down.weight, one.lora_up.weight)]
                           for ones in (self.spatial, self.temporal)]
            self.trained = [p for group in self.groups for p in group]
        else:
            chosen = lora.select(self.unet, ours.run.recipe.parts["motion"].layers)
            self.trained = list(chosen.values())
            self.groups = [self.trained]
        for p in self.trained:
            p.requires_grad_(True)
        rate = ours.run.recipe.parts["motion"]
        self.optimizers = [torch.optim.AdamW(g, lr=rate.lr, weight_decay=rate.weight_decay)
                           for g in self.groups]
        self.once = self.encode(ours.run.clips[0].prompt) if method == "vmc" else None

    def wrap(self, part, like):
        layers = self.run.recipe.parts[part].layers
        wrapped = []
        for name in list(lora.sites(self.model.unet, layers)):
            owner, _, last = name.rpartition(".")
            owner = self.unet.get_submodule(owner)
            one = WrappedLinear(getattr(owner, last), like.rank, like.dropout).to(self.device)
            setattr(owner, last, one)
            wrapped.append(one)
        return wrapped

    def encode(self, prompt):
        with torch.no_grad(), self.autocast():
            return self.model.text([prompt])

    def predict(self, x, t, text):
        return self.unet(x, t, encoder_hidden_states=text).sample

    def noised(self, clips):
        """Clips as one batch: noisy latents, target, timesteps, text encoded anew."""
        S, latents = self.model.schedule, torch.cat([c.latents for c in clips])
        noise = torch.randn_like(latents)
        t = torch.randint(S.num_train_timesteps, (len(clips),))
        x, goal = S.add_noise(latents, noise, t), S.target(latents, noise, t)
        text = [self.encode(c.prompt) for c in clips] if self.once is None else [self.once]
        return x, goal, t.to(self.device), torch.cat(text)

    def forward(self, x, t, text):
        with self.autocast():
            return self.predict(x, t, text).float()

    def step(self):
        """One step of the official loop of the method."""
        getattr(self, f"step_{self.method}")()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def step_vmc(self):
        x, goal, t, text = self.noised(self.run.clips)
        step = lambda v: (v[:, :, 1:] - v[:, :, :-1]).abs()
        out = self.forward(x, t, text)
        (1 - F.cosine_similarity(step(out), step(goal), dim=2)).mean().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)

    def step_newmove(self):
        x, goal, t, text = self.noised([self.run.clips[0], self.run.prior[0]])
        out = self.forward(x, t, text)
        (F.mse_loss(out[:1], goal[:1]) + 0.5 * F.mse_loss(out[1:], goal[1:])).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)

    def step_motiondirector(self):
        x, goal, t, text = self.noised(self.run.clips)
        i = int(torch.randint(x.shape[2], ()))
        for one in self.temporal:
            one.scale = 0.0
        frame = self.forward(x[:, :, i : i + 1], t, text)
        for one in self.temporal:
            one.scale = 1.0
        out = self.forward(x, t, text)
        debias = lambda v: 2**0.5 * v - v[:, :, i : i + 1]
        F.mse_loss(frame, goal[:, :, i : i + 1]).backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)
        (F.mse_loss(out, goal) + F.mse_loss(debias(out), debias(goal))).backward()
        for p in self.groups[0]:  # computed, and thrown away
            p.grad = None


# ------------------------------------------------------------------------------------------------
# Measuring


def sync(device):
    """Wait for what a GPU was given to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(sides, args, repeats):
    """{name: times in seconds} of functions run in turn, after one warm-up each."""
    times = {name: [] for name in sides}
    for i in range(repeats + args.warm):
        for name, f in sides.items():
            sync(args.device)
            started = time.perf_counter()
            f()
            sync(args.device)
            if i >= args.warm:
                times[name].append(time.perf_counter() - started)
    return times


def peak(f, device):
    """Bytes that f needs beyond what is there before: of the GPU, or of the process's memory (None
    where the system does not count it)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, so f must ask for it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):  # another system, or another C library
        return None
    before = process_memory("VmRSS")
    f()
    return process_memory("VmHWM") - before


def process_memory(what):
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{what}:")[1].split()[0])


def state_bytes(*modules, trained=(), optimizers=()):
    """What lies in memory between steps: weights, what learns beside them, optimisers' moments."""
    tensors = [p for m in modules for p in m.parameters()] + list(trained)
    tensors += [v for o in optimizers for s in o.state.values() for v in s.values()]
    return sum({id(t): t.nbytes for t in tensors if torch.is_tensor(t)}.values())


def flops(f):
    """Floating-point operations of f's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def matmul_peak(args):
    """FLOP/s of a large square product, in the precision that the networks run in."""
    n = 8192 if args.device.startswith("cuda") else 2048
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, dtype=dtype, device=args.device) for _ in range(2))
    times = interleaved({"matmul": lambda: a @ b}, args, 15)["matmul"]
    return 2 * n**3 / statistics.median(times)


def compare(case, sides, args, repeats, memory=None, count=None):
    """Time the sides in turn; one row of the table."""
    times = interleaved(sides, args, repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    row = {"case": case, "ratio": medians["diffusers"] / medians["ours"], "seconds": medians,
           "times": times, "flops": count, "memory": memory}
    if count:
        row["share of peak"] = count / medians["ours"] / args.peak
    args.rows.append(row)
    print(f"{case:44} {row['ratio']:5.2f}×   ours {medians['ours'] * 1e3:9.1f} ms   diffusers "
          f"{medians['diffusers'] * 1e3:9.1f} ms"
          + (f"   {100 * row['share of peak']:3.0f} % of peak" if count else "")
          + (f"   memory {memory['ours'] / memory['diffusers']:.2f}×"
             f" ({memory['ours'] / 2**20:.0f} of {memory['diffusers'] / 2**20:.0f} MiB)"
             if memory and None not in memory.values() else ""), flush=True)


def check_same(ours, theirs, x, t, text):
    """Both UNets on one input, in the precision that is measured, with the same LoRAs, which are
    not zero for it. Stops when they differ."""
    pairs = [pair for several in ours.run.learners.values() for one in several
             for pair in getattr(one, "pairs", {}).values()]
    for (A, B), wrapped in zip(pairs, (*theirs.spatial, *theirs.temporal)):
        with torch.no_grad():
            wrapped.lora_down.weight.copy_(A)
            wrapped.lora_up.weight.copy_(B.normal_(0, 0.01))
    with torch.no_grad(), theirs.autocast():
        a, b = ours.run.model.unet(x, t, text).float(), theirs.predict(x, t, text).float()
    off = ((a - b).norm() / b.norm()).item()
    if not off < (5e-2 if ours.run.flags.precision == "bf16" else 1e-4):
        sys.exit(f"error: the two sides differ by {off:.3f}, relative; nothing is measured.")
    return off


def bench_training(folder, size, args):
    """Each method's step, and its UNet's forward and forward-backward alone."""
    for shape in SHAPES[size]:
        for method in args.methods:
            bench_method(folder, method, shape, shape == SHAPES[size][0], args)


def bench_method(folder, method, shape, first, args):
    """The training step of one method on one shape; on the first also the UNet alone."""
    ours = Ours(folder, method, shape, args)
    theirs = Reference(folder, method, ours, args)
    clip, S = ours.run.clips[0], ours.run.model.schedule
    lora.switch(ours.run.learners, act=list(ours.run.learners))
    ours.run.model.unet.eval(), theirs.unet.eval()
    t, noise = torch.tensor([S.num_train_timesteps // 2]), torch.randn_like(clip.latents)
    with torch.no_grad():
        x, text = S.add_noise(clip.latents, noise, t), ours.run.model.text([clip.prompt])
    t = t.to(args.device)
    off = check_same(ours, theirs, x, t, text)
    print(f"{method}, {shape}: both sides agree to {off:.1e}")
    theirs.unet.train()
    ours.step()  # makes the optimiser's state
    theirs.step()
    whole, memory = ours.run.model, {"ours": peak(ours.step, args.device),
                                     "diffusers": peak(theirs.step, args.device)}
    if None not in memory.values():
        # Both hold the VAE and the text encoder, which the official codes but VMC's halve.
        halved = 1 if method == "vmc" else 0.5
        memory["ours"] += state_bytes(whole.unet, whole.vae, whole.text,
                                      trained=ours.trained.values(), optimizers=[ours.optimizer])
        memory["diffusers"] += state_bytes(theirs.unet, optimizers=theirs.optimizers) + round(
            halved * state_bytes(whole.vae, whole.text))
    label = f"{method}, {shape[0]}×{shape[1]}×{shape[2]}"
    compare(f"training step, {label}", {"ours": ours.step, "diffusers": theirs.step}, args,
            args.repeats, memory, flops(ours.step) if first else None)
    for what in (("forward",) if method == "vmc" else ()) + ("forward, backward",):
        if first:
            sides = unet_alone(ours, theirs, x, t, text, what)
            compare(f"UNet {what}, {label}", sides, args, args.repeats)


def unet_alone(ours, theirs, x, t, text, what):
    """Functions that run the two UNets alone, with the method's trainable set."""
    lora.switch(ours.run.learners, ["motion"], ["look"])

    def run(predict, trained):
        with torch.set_grad_enabled(what != "forward"), theirs.autocast():
            out = predict(x, t, text)
            if what != "forward":
                out.float().square().mean().backward()
        for p in trained:
            p.grad = None

    return {"ours": lambda: run(ours.run.model.unet, ours.trained.values()),
            "diffusers": lambda: run(theirs.predict, theirs.trained)}


def bench_sampling(folder, size, args):
    """Guided sampling to latents: ours, and the diffusers pipeline's loop on the same start."""
    width, height, frames = VIDEOS[size]
    whole = model.load(folder, args.device, args.precision, keep=())
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = diffusers.UNet3DConditionModel(**config)
    unet.load_state_dict(read_tensors(hub.find_weights(folder / "unet")))
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = diffusers.DDIMScheduler(**{k: v for k, v in settings.items() if k[0] != "_"})
    pipe = diffusers.TextToVideoSDPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet.to(args.device).eval(),
        scheduler=scheduler)
    if args.device.startswith("cuda"):
        unet.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    shape = (config["in_channels"], frames, height // 8, width // 8)
    start = sampler.noise_like_shape(shape, [0]).to(args.device)
    with torch.no_grad():
        text, empty = whole.text(["a thing moving"]), whole.text([""])

    @torch.no_grad()
    def ours():
        predict = sampler.guide(whole.predict, text, empty, 9.0)
        return sampler.ddim(whole.schedule, predict, start, args.sampling_steps)

    @torch.no_grad()
    def theirs():
        with machine.autocast(args.device, args.precision):
            return pipe(prompt_embeds=text, negative_prompt_embeds=empty, latents=start,
                        height=height, width=width, num_frames=frames, guidance_scale=9.0,
                        num_inference_steps=args.sampling_steps, output_type="latent").frames

    off = ((ours() - theirs()).norm() / ours().norm()).item()
    if not off < 0.1:  # guidance of 9 multiplies bf16's rounding
        sys.exit(f"error: the two sides' latents differ by {off:.3f}; nothing is measured.")
    print(f"sampling: both sides agree to {off:.1e}")
    compare(f"sampling, {width}×{height}×{frames}, {args.sampling_steps} steps, guided",
            {"ours": ours, "diffusers": theirs}, args, max(3, args.repeats // 2),
            count=flops(ours))


def bench_growth(folder, size, args):
    """How a step's time grows with frames and with rank: ours alone."""
    width, height, _ = SHAPES[size][-1]
    frames = {f"{n} frames": lambda n=n: Ours(folder, "vmc", (width, height, n), args)
              for n in (8, 16, 24, 32)}
    rank = lambda r: Ours(folder, "motiondirector", (width, height, 16), args,
                          f"motion.rank={r}", f"look.rank={r}")
    ranks = {f"rank {r}": partial(rank, r) for r in (4, 32, 128)}
    for group in (frames, ranks):
        made = {name: make() for name, make in group.items()}
        times = interleaved({k: o.step for k, o in made.items()}, args, args.repeats)
        medians = {k: statistics.median(t) for k, t in times.items()}
        first = next(iter(medians.values()))
        args.growth |= {k: m / first for k, m in medians.items()}
        print("step time: " + ", ".join(f"{k} {m / first:.2f}×" for k, m in medians.items()))
        del made
        gc.collect()


def bench_processes(folder, size, args):
    """train.py's step of two examples: in one process, and in two under torchrun, which share out
    the same cores or have a GPU each; in turn, twice. How long the two wait for each other between
    steps is not counted."""
    cuda, threads = args.device.startswith("cuda"), torch.get_num_threads()
    gc.collect(), torch.cuda.empty_cache()
    if torch.cuda.device_count() < 2 if cuda else threads < 2:
        print("processes: not measured; there is one GPU, or one core, alone")
        return
    launchers = {"one": (), "two": ("-m", "torch.distributed.run", "--standalone",
                                    "--nproc_per_node", "2")}
    for method in args.methods:
        more = ("--batch", 2, "--steps", args.repeats + args.warm)
        more += () if cuda else ("--device", "cpu")
        flags, times = flags_of(folder, method, SHAPES[size][-1], args, *more), {}
        for name, launcher in [*launchers.items()] * 2:
            each = {"OMP_NUM_THREADS": str(threads if name == "one" else threads // 2)}
            done = subprocess.run([sys.executable, *launcher, ROOT / "train.py", *flags],
                                  env=os.environ | each, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            lines = (args.scratch / "run" / "log.jsonl").read_text().splitlines()[args.warm:]
            times.setdefault(name, []).extend(json.loads(line)["seconds"] for line in lines)
        ratio = statistics.median(times["one"]) / statistics.median(times["two"])
        case = "step of two examples, {}, {}×{}×{}".format(method, *SHAPES[size][-1])
        args.rows.append({"case": f"{case}, two processes", "ratio": ratio, "times": times})
        print(f"{case}: two processes {ratio:.2f}× as fast as one")


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=tuple(UNETS), default="tiny", help="of the UNet (default: tiny)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="default: all three")
    parts = ("training", "sampling", "growth", "processes")
    add("--parts", nargs="+", default=parts, choices=parts, help="default: all")
    add("--repeats", type=int, default=9, help="timed runs of each side (default: 9)")
    add("--warm", type=int, default=2, help="untimed runs before (default: 2)")
    add("--sampling-steps", type=int, help="default: 3 on a CPU, 50 on a GPU")
    add("--out", type=Path, help="default: out/benchmarks/SIZE-DEVICE-PARTS.json")
    args = parser.parse_args()
    if diffusers is None:
        sys.exit("error: diffusers is missing; pip install -r requirements-test.txt")
    machine.keep_memory()
    args.precision = machine.default_precision(args.device)
    args.sampling_steps = args.sampling_steps or (50 if args.device.startswith("cuda") else 3)
    args.rows, args.growth = [], {}
    args.peak = matmul_peak(args)
    print(f"{args.size}, {args.device}, {args.precision}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, diffusers {diffusers.__version__}; matmul "
          f"{args.peak / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        args.scratch = Path(folder)
        weights = args.scratch / "weights"
        weights.mkdir()
        make_folder(args.size, weights)
        for part in args.parts:
            globals()[f"bench_{part}"](weights, args.size, args)
            write(args)  # what is measured is kept, whatever comes after


def write(args):
    """All that was measured so far, and on what."""
    here = {"device": args.device, "processor": platform.processor() or platform.machine(),
               "cores": os.cpu_count(), "torch": torch.__version__,
               "python": sys.version.split()[0], "diffusers": diffusers.__version__,
               "threads": torch.get_num_threads()}
    if args.device.startswith("cuda"):
        here["gpu"] = torch.cuda.get_device_name()
    name = "-".join([args.size, args.device.split(":")[0], *args.parts])
    out = args.out or Path("out/benchmarks") / f"{name}.json"
    with publish(out) as path:
        path.write_text(json.dumps(
            {"machine": here, "precision": args.precision, "matmul FLOP/s": args.peak,
             "rows": args.rows, "growth": args.growth}, indent=1))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
