"""How much memory of a GPU the README's commands need, and where they wait for it, without one.

    python benchmarks/memory.py                # docs/speed.json, docs/speed.md; minutes on a CPU
    python benchmarks/memory.py --only vmc     # of that method anew

PyTorch's meta tensors, which have shapes and no numbers, stand for those on the card, so that the
commands' own code runs at full size (1.41 B parameters) on any machine. Emulated are the bytes of
all tensors that live at a time, CUDA's rules of autocast, its fused kernels, and each point where
the program would wait for the card. Not in the figures: the CUDA context (about 0.5 GB), the
working memory of kernels, and what the allocator loses in between.
"""
import argparse
import contextlib
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
)
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from tqdm import tqdm  # noqa: E402

import generate  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import train  # noqa: E402
from support import dmt, machine, media  # noqa: E402
from support.files import publish, say, write_json  # noqa: E402

# ZeroScope's own configuration.
UNET = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3}
VAE = {"block_out_channels": [128, 256, 512, 512]}
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
        "num_attention_heads": 16}


# ------------------------------------------------------------------------------------------------
# The card

# What autocast does on CUDA, of all that the networks call (aten/src/ATen/autocast_mode.h).
NARROW = {"linear", "conv2d", "conv3d", "matmul", "__matmul__", "bmm", "mm",
          "scaled_dot_product_attention"}
WIDE = {"group_norm", "layer_norm", "interpolate", "softmax", "exp", "pow", "__pow__", "norm",
        "mse_loss", "cosine_similarity", "cumsum", "sum", "prod"}


class Card(TorchDispatchMode):
    """With it, device "meta" is a card: `now` and `peak` are its bytes, `waits` the names of the
    operations that would wait for it."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.held, self.waits, self.rules = 0, 0, set(), [], Rules()

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        autocast = lambda kind, dtype=None, enabled=True: self.rules.autocast(enabled)
        for where, name, stand_in in (
                (torch, "autocast", autocast),
                (torch.autograd, "_engine_run_backward", self.rules.backward),
                (torch, "is_autocast_enabled", lambda kind=None: self.rules.on),
                (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                 lambda: ["meta", "cpu"])):
            self.patches.enter_context(mock.patch.object(where, name, stand_in))
        self.patches.enter_context(self.rules)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, f, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        waited, out = self.copy_between(f.overloadpacket.__name__, args, kwargs)
        if waited:
            self.waits.append(f.overloadpacket.__name__)
        out = f(*args, **kwargs) if out is None else out
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.is_meta:
                self.hold(x.untyped_storage())
        return out

    def copy_between(self, name, args, kwargs):
        """Whether an operation waits for the card, and what it gives if meta itself cannot."""
        if name == "_local_scalar_dense" and args[0].is_meta:
            return True, args[0].new_ones((), device="cpu").item()
        if name == "_to_copy" and (device := kwargs.get("device")) is not None:
            if args[0].is_meta and torch.device(device).type == "cpu":
                dtype = kwargs.get("dtype") or args[0].dtype
                return True, torch.ones(args[0].shape, dtype=dtype)
            there = torch.device(device).type == "meta" and not args[0].is_meta
            return there and not kwargs.get("non_blocking"), None  # that is from pinned memory
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            return True, args[0]
        return False, None

    def hold(self, storage):
        """Count a storage until the last of its tensors is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held.add(key)
            weakref.finalize(storage, self.free, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, key, size):
        self.held.discard(key)
        self.now -= size

    def highest(self, f, *args, **kwargs):
        """The peak in bytes while f(*args) runs."""
        gc.collect()
        self.peak = self.now
        f(*args, **kwargs)
        return self.peak


class Rules(TorchFunctionMode):
    """CUDA's autocast, and its fused kernels."""

    def __init__(self):
        super().__init__()
        self.on, self.copies = False, {}

    @contextlib.contextmanager
    def autocast(self, enabled=True):
        """torch.autocast("cuda", torch.bfloat16, enabled)."""
        before, self.on, self.copies = self.on, enabled, {} if not self.on else self.copies
        try:
            yield
        finally:
            self.on = before
            self.copies = self.copies if before else {}

    def __torch_function__(self, f, kinds, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(f, "__name__", "")
        if self.on and name in NARROW:
            args, kwargs = tree_map(self.narrow, (args, kwargs))
        if self.on and name in WIDE:
            args, kwargs = tree_map(self.wide, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return fused_attention(*args)
        if name == "dropout" and args[0].is_meta:
            return fused_dropout(*args, **kwargs)
        return f(*args, **kwargs)

    def backward(self, *args, engine=torch.autograd._engine_run_backward, **kwargs):
        """Layers are computed again in it, under autocast as they were."""
        with self, self.autocast():
            self.copies = None  # each layer's context ends with it
            return engine(*args, **kwargs)

    def narrow(self, x):
        if not torch.is_tensor(x) or x.dtype != torch.float32 or not x.is_meta:
            return x
        if self.copies is None or not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self.copies:  # of what learns, copies are kept until autocast ends
            self.copies[id(x)] = x.to(torch.bfloat16)
        return self.copies[id(x)]

    def wide(self, x):
        return x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x


def fused_attention(q, k, v):
    """Flash attention; in fp32, and for wide heads, the memory-efficient one."""
    if q.dtype == torch.float32 or q.shape[-1] > 256:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(q, k, v, None, q.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def fused_dropout(x, p=0.5, training=True, inplace=False):
    """It keeps one byte an element."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


# ------------------------------------------------------------------------------------------------
# The commands


def full_size(card, folder=None, device="meta", precision="bf16", keep=None):
    """model.load for ZeroScope's configuration, of weights without numbers."""
    with _disable_current_modes(), torch.device("meta"):  # or each weight's first values count
        whole = model.Model(model.UNet(model.UNetConfig(**UNET)), model.VAE(model.VAEConfig(**VAE)),
                            model.TextEncoder(model.TextConfig(**TEXT)), None, "meta", precision)
        for part in (whole.unet, whole.vae, whole.text):
            part.eval().requires_grad_(False)
        if keep is not None:
            whole.store_frozen(keep)
    whole.schedule = sampler.Schedule()
    for part in (whole.unet, whole.vae, whole.text):
        for tensor in (*part.parameters(), *part.buffers()):
            card.hold(tensor.untyped_storage())
    return whole


class NoFolder:
    """A run's folder that keeps nothing."""

    def bar(self, first):
        return tqdm(disable=True)

    def is_time_to_save(self, step):
        return False

    def save(self, step, optimizer):
        pass

    def log(self, line):
        self.line = line


def one_step(run, optimizer, number):
    """Step `number` of train.py's loop; returns the log's line."""
    folder = NoFolder()
    run.recipe = replace(run.recipe, own=run.recipe.own | {"steps": number + 1})
    train.train(run, folder, optimizer, number, None)
    return folder.line


def train_flags(method, shape, folder, *more):
    """train.py's flags, with a clip of noise for a shape (F, H, W)."""
    frames, height, width = shape
    clip = folder / "clips" / "0.mp4"
    if not clip.is_file():
        g = torch.Generator().manual_seed(0)
        media.write_video(clip, torch.rand(3, 64, 64, 64, generator=g) * 2 - 1, 24)
    flags = ["--method", method, "--video", clip, "--prompt", "a thing moving", "--weights",
             folder, "--device", "meta", "--precision", "bf16", "--size", f"{width}x{height}",
             "--frames", frames, "--fps", 24, "--preview-every", 0, "--out", folder / method, *more]
    flags += ["--prior", clip.parent] if method == "newmove" else []
    return [str(f) for f in flags]


def training(card, method, shape, folder, *more):
    """Peaks in bytes of a run's first steps, and of what comes before them; what lies on the card
    between steps; and the waits of the last step."""
    argv = train_flags(method, shape, folder, *more)
    flags, recipe = train.parse(argv)
    card.peak = card.now
    with mock.patch.object(model, "load", partial(full_size, card)):
        run = train.prepare(flags, recipe)
    before, optimizer = card.peak, lora.make_optimizer(recipe.parts, run.learners)
    one_step(run, optimizer, 0)  # makes the moments
    card.waits.clear()
    step = card.highest(one_step, run, optimizer, 1)
    learning = sum(p.nbytes for p in lora.named(run.learners).values())
    return {"before": before, "step": step, "between": card.now, "learning": learning,
            "clips": 2 if run.prior else 1, "waits": list(card.waits)}


def generating(card, folder, *flags):
    """The peak in bytes of generate.py with these flags."""
    base = ["--weights", folder, "--device", "meta", "--precision", "bf16", "--prompt", "a thing",
            "--steps", 2, "--out", folder / "made", "--overwrite"]
    with mock.patch.object(generate, "load", partial(full_size, card)), (
            mock.patch.object(dmt, "PULLS", 2)):
        return card.highest(generate.main, [str(f) for f in (*base, *flags)])


# ------------------------------------------------------------------------------------------------
# The table

GB = 1e9
CARDS = (12, 24)  # GiB
SPARE = 1.0  # GB of a card for the CUDA context, kernels' own memory and gaps
WIDE_SHAPE = (24, 320, 576)  # ZeroScope's own
CLIP = ["--size", "576x320", "--frames", 24]
# (method, its paper's figure in GB, settings that make every step a whole one)
TRAINED = (("vmc", 15, ()), ("motiondirector", 14, ("spatial=1",)), ("newmove", 21.3, ()),
           ("customize-a-video", None, ("first=0",)))


def measure_training(folder, only):
    """A row for each method, shape, and whether activations are computed again."""
    for method, published, settings in TRAINED:
        if only and method not in only:
            continue
        paper = train.METHODS[method].shape
        for shape in (paper, WIDE_SHAPE):
            for way in ("off", "on"):
                with Card() as card:
                    row = training(card, method, shape, folder, "--checkpointing", way, *settings)
                say(f"{method} {shape} {way}: {row['step'] / GB:.1f} GB, waits {row['waits']}")
                yield {"command": f"train.py --method {method}", "shape": shape,
                       "checkpointing": way, "published": published if shape == paper else None,
                       **row, "waits": len(row["waits"])}


def measure_generating(folder, only):
    """A row for each way of generate.py to make videos."""
    clip = folder / "clips" / "0.mp4"
    ways = {"": (), "--refine": ("--refine", folder, "--refine-size", "1024x576",
                                 "--refine-steps", 4),
            "--dmt": ("--fps", 24, "--dmt", clip, "--inversion-steps", 2)}
    for name, flags in ways.items():
        if only and (name or "generate") not in only:
            continue
        with Card() as card:
            peak = generating(card, folder, *CLIP, *flags)
        say(f"generate.py {name}: {peak / GB:.1f} GB")
        yield {"command": f"generate.py {name}".strip(), "shape": WIDE_SHAPE, "step": peak}


def choice(row, card):
    """Of a training command: "off" or "on", as `--checkpointing auto` settles it on a card of so
    many GiB; None for other commands."""
    if "checkpointing" not in row:
        return None
    frames, height, width = row["shape"]
    pixels = row["clips"] * frames * height * width // 64
    weights = row["between"] - 2 * row["learning"]  # there are no moments yet when it is settled
    free = card * 2**30 - SPARE * GB - weights
    return "on" if machine.step_memory(pixels, row["learning"]) > 0.9 * free else "off"


def peak_on(row, rows, card):
    """Bytes that a command takes on a card of so many GiB, as it settles things there."""
    way = choice(row, card)
    same = [r for r in rows if (r["command"], r["shape"]) == (row["command"], row["shape"])]
    chosen = [r for r in same if r.get("checkpointing") == way]
    return max(chosen[0]["step"], chosen[0].get("before", 0))


def fits(row, rows, card):
    """Whether a command has room on a card of so many GiB."""
    return peak_on(row, rows, card) + SPARE * GB <= card * 2**30


def render(results):
    """docs/speed.md's section on memory, out of docs/speed.json's."""
    rows, lines = results["rows"], [
        "## Memory of a GPU, emulated", "",
        f"Not measured on a GPU: emulated at full size by `{results['command']}` (commit "
        f"{results['commit']}, torch {results['torch']}), in bf16, in GB (10⁹ bytes), with all "
        f"weights, the VAE and the text encoder, and without the CUDA context: {SPARE:g} GB are "
        "kept free for that. The table says what a command takes with all activations kept, and "
        "with them computed again (`--checkpointing on`); `--checkpointing auto`, the default, "
        "chooses by the free memory of the card. *Published* is what the authors state, on their "
        "own base models and shapes (VMC's is 8 frames of 64×40 pixels).", "",
        "| command | frames × height × width | kept | computed again | "
        + " | ".join(f"{card} GiB card" for card in CARDS) + " | published |",
        "|---|---|---|---|" + "---|" * len(CARDS) + "---|"]
    done = set()
    for row in rows:
        key = row["command"], tuple(row["shape"])
        if key in done:
            continue
        done.add(key)
        pair = {r.get("checkpointing", "off"): r for r in rows
                if (r["command"], tuple(r["shape"])) == key}
        cells = [f"{pair[way]['step'] / GB:.1f}" if way in pair else "" for way in ("off", "on")]
        cells += [verdict(row, rows, card) for card in CARDS]
        published = f"{row['published']:g}" if row.get("published") else ""
        shape = "×".join(map(str, row["shape"]))
        lines.append(" | ".join([f"| `{row['command']}`", shape, *cells, f"{published} |"]))
    waits = max(r.get("waits", 0) for r in rows)
    times = "once" if waits == 1 else f"{waits} times"
    lines += ["", f"A training step waits for the card {times}, for the figures of its log.", ""]
    return "\n".join(lines)


def verdict(row, rows, card):
    """What happens on a card, in a word or two."""
    if not fits(row, rows, card):
        return "no"
    way = {"on": ", computed again", "off": ", kept", None: ""}[choice(row, card)]
    return f"{peak_on(row, rows, card) / GB:.1f}{way}"


def main():
    """Emulate, and write docs/speed.json and docs/speed.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", help="methods, generate, --refine or --dmt (default: all)")
    add("--out", type=Path, default=ROOT / "docs", help="folder of speed.json and speed.md")
    add("--render", action="store_true", help="write speed.md from the speed.json there is")
    args = parser.parse_args()
    path = args.out / "speed.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if not args.render:
        rows = results.get("memory", {}).get("rows", [])
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                                capture_output=True).stdout.strip()
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "clips").mkdir()
            train_flags("vmc", WIDE_SHAPE, folder)  # writes the clip
            new = measure_training(folder, args.only), measure_generating(folder, args.only)
            for row in itertools.chain(*new):
                row["shape"] = list(row["shape"])
                name = lambda r: (r["command"], r["shape"], r.get("checkpointing"))
                rows = [r for r in rows if name(r) != name(row)] + [row]
                results["memory"] = {"command": "python benchmarks/memory.py", "commit": commit,
                                     "torch": torch.__version__, "rows": rows}
                write_json(path, results)
    with publish(args.out / "speed.md") as part:
        part.write_text("# Speed and memory\n\n" + render(results["memory"]))
    print(args.out / "speed.md")


if __name__ == "__main__":
    main()
