"""A run's folder: its log, its state, what it prints. Files are written whole or not at all, and
nothing is ever deleted.

    out/<clip>-<method>/run.json      the method, its settings, the flags
                        log.jsonl     a line a step; of a step that is told twice the last counts
                        state.safetensors, <method>.safetensors, samples/, steps/
"""
import hashlib
import json
import os
import shlex
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
from support import adapter_file, media
from support.files import BadInput, publish, reading, say, write_json
from support.recipe import write_value


# ------------------------------------------------------------------------------------------------
# The state


def decides(run):
    """Everything that a step's numbers depend on, and that must not change when a run goes on."""
    flags, digest = run.flags, hashlib.sha256()
    for clip in (*run.clips, *run.images, *run.prior):
        digest.update(clip.video.numpy().tobytes() + clip.prompt.encode())
    settings = {k: v for k, v in run.recipe.settings().items()
                if k not in ("steps", "appearance_stop")}
    return json.loads(json.dumps(settings | {
        "method": run.recipe.name, "seed": flags.seed, "precision": flags.precision,
        "batch": run.batch, "base model": run.fingerprint, "clips": digest.hexdigest()[:12]}))


def check_sum(tensors):
    """Tells that numbers have changed on the disk."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def save_state(path, step, run, optimizer):
    """What learns and AdamW's state of it, by "exp_avg:name" and so on, and where it stands."""
    tensors = {}
    for name, p in lora.named(run.learners).items():
        for kind, tensor in {"": p, **optimizer.state.get(p, {})}.items():
            tensors[f"{kind}:{name}"] = tensor.detach().cpu().contiguous()
    with publish(path) as part:
        save_file(tensors, part, {"step": str(step), "sum": check_sum(tensors),
                                  "decides": json.dumps(decides(run))})


def load_state(path, run, optimizer):
    """Put a state back; returns its step, 0 where none was saved yet. Raises BadInput when it is
    damaged, or was saved by a run with other settings."""
    if not os.path.lexists(path):
        return 0
    with reading(path, "begin again in a new --out"):
        tensors, trained = load_file(path), lora.named(run.learners)
        with safe_open(path, "pt") as file:
            about = file.metadata()
        step, was, now = int(about["step"]), json.loads(about["decides"]), decides(run)
        if about["sum"] != check_sum(tensors):
            raise BadInput(f"{path} is damaged; begin again in a new --out.")
    changed = [f"{k} was {str(was.get(k))[:60]}, is {str(now.get(k))[:60]}"
               for k in was | now if was.get(k) != now.get(k)]
    if changed:
        raise BadInput(f"{path.parent} was begun with other settings: {'; '.join(changed[:3])}. "
                       "Give the same ones, or another --out.")
    if step > run.recipe.steps:
        raise BadInput(f"{path.parent} is already at step {step}; give more --steps.")
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        p = trained[name]
        if not kind:
            p.data.copy_(tensor)
        else:  # moments lie as their parameter does
            like = torch.empty_like(p) if tensor.shape == p.shape else tensor.to(p.device)
            optimizer.state[p][kind] = like.copy_(tensor)
    return step


# ------------------------------------------------------------------------------------------------
# The folder


class Folder:
    """What a run writes in its folder; processes but torchrun's first write nothing."""

    def __init__(self, path, run, optimizer):
        self.path, self.run, self.optimizer = path, run, optimizer
        self.writes, self.saved, self.adapters = run.process == 0, None, []

    def begin(self):
        """The step to begin with, of the last saved state, if any; and run.json, from which the run
        can be repeated. Raises BadInput."""
        first = load_state(self.path / "state.safetensors", self.run, self.optimizer)
        if self.writes:
            write_json(self.path / "run.json", {
                "method": self.run.recipe.name, "settings": self.run.recipe.settings(),
                "flags": vars(self.run.flags), "clips": [c.path for c in self.run.clips]})
        self.saved = first or None
        return first

    def log(self, line):
        """One step's line. A line begins with its end, so that one that was cut spoils no other."""
        if self.writes:
            with (self.path / "log.jsonl").open("a") as file:
                file.write("\n" + json.dumps(line))

    def kept(self):
        """What there is to go on from, in words."""
        return "there is no saved state yet" if self.saved is None else (
            f"the state of step {self.saved} is kept")

    def save(self, step):
        """The adapters for use and the state for --resume, each there whole or not at all."""
        if not self.writes:
            return
        for name, p in lora.named(self.run.learners).items():
            if not torch.isfinite(p).all():
                raise BadInput(f"{name} is not finite at step {step}; {self.kept()}. Lower the "
                               "rate (motion.lr=…).")
        self.adapters = self.save_adapters(self.path, step)
        keep = self.run.flags.keep_every
        if keep and step % keep == 0:
            self.save_adapters(self.path / "steps" / f"{step:06d}", step)
        save_state(self.path / "state.safetensors", step, self.run, self.optimizer)
        self.saved = step

    def save_adapters(self, folder, step):
        """What was learned, in files for use: the motion in <method>.safetensors, and what is apart
        from it, an appearance, in <method>-look.safetensors (-look-2 … for more clips)."""
        run, groups = self.run, {"": []}
        for part, several in run.learners.items():
            for i, one in enumerate(several):
                suffix = "" if not part.startswith("look") else f"-look-{i + 1}" if i else "-look"
                groups.setdefault(suffix, []).append(one)
        written = []
        for suffix, learners in groups.items():
            if any(one.tensors() for one in learners):
                meta = metadata(run) | {"step": step} | ({"noise_prior": 0.0} if suffix else {})
                clip = run.clips[0].latents[0] if run.clips and not suffix else None
                written += adapter_file.save_adapter(
                    folder / f"{run.recipe.name}{suffix}.safetensors", learners, clip, **meta)[:1]
        return written

    def show(self, step, before, now):
        """samples/step-….mp4: the reference, the untrained model's sample and the present one's,
        both from the same start, side by side."""
        reference = (self.run.clips or self.run.images)[0].video.expand_as(now)
        if self.writes:
            media.write_video(self.path / "samples" / f"step-{step:06d}.mp4",
                              torch.cat([reference, before, now], dim=3), self.run.flags.fps)

    def tell(self, step, signal):
        """Say what there is now, and how to go on."""
        if signal and step < self.run.recipe.steps:
            say(f"stopped and saved at step {step}; add --resume --out {quoted(self.path)} to the "
                "same command to go on")
        elif self.writes:
            for path in self.adapters:
                print(f"adapter: {path}")
            weights, first = self.run.flags.weights, quoted(self.adapters[0])
            base = f" --weights {quoted(weights)}" if weights else ""
            print(f"next: python generate.py --adapter {first}{base} --prompt \"…\"")


def quoted(path):
    """A path as a shell reads it."""
    return shlex.quote(str(path))


def metadata(run):
    """What an adapter says of itself, for generate.py above all."""
    recipe, flags = run.recipe, run.flags
    return {"method": recipe.name, "base": run.fingerprint,
            "base_name": (flags.weights or Path("tiny")).name, "seed": flags.seed,
            "prompt": (run.clips or run.images)[0].prompt, "fps": flags.fps,
            "sampler": recipe.sampler, "sampling_steps": recipe.sampling_steps,
            "inversion_steps": recipe.inversion_steps,
            "noise_prior": recipe.noise_prior if run.clips else 0.0, "inverts": recipe.inverts,
            "guidance": recipe.guidance}


# ------------------------------------------------------------------------------------------------
# What a run prints


def log_line(step, losses, norm, seen, run, started):
    """A step's line of the log: one wait for the device, for all figures at once."""
    figures = [norm, *losses, *(v for row in seen for v in row.values() if torch.is_tensor(v))]
    values = iter(torch.stack([f.detach().float() for f in figures]).tolist())
    norm, losses = next(values), [next(values) for _ in losses]
    seen = [{k: next(values) if torch.is_tensor(v) else v for k, v in row.items()} for row in seen]
    mine = len(range(run.process, run.batch, run.processes))
    return {"step": step, "loss": sum(losses) / mine, "grad": norm, "losses": losses,
            "seen": seen, "seconds": round(time.time() - started, 4)}


def report(run):
    """Say what trains, from what, with which settings, and where they came from."""
    flags, recipe, trained = run.flags, run.recipe, lora.named(run.learners)
    for clip, source in zip(run.clips, run.sources):
        print(f"clip: {clip.path}, {clip.video.shape[1]} frames, {clip.prompt!r} (from {source})")
    for clip in run.images:
        print(f"picture: {clip.path}, {clip.prompt!r}")
    if run.prior:
        print(f"prior: {len(run.prior)} clips ({flags.prior}), such as {run.prior[0].prompt!r}")
    count = lambda tensors: sum(p.numel() for p in tensors)
    print(f"training: {count(trained.values()):,} parameters in {len(trained)} tensors (the network "
          f"has {count(run.model.unet.parameters()):,})")
    for part, several in run.learners.items():
        mine = several[0].parameters()
        print(f"  {part}: {count(mine.values()):,} in {len(mine)}"
              + (f", for each of {len(several)} clips" if len(several) > 1 else ""))
        for kind, (tensors, numbers) in lora.kinds_of_layer(mine).items():
            print(f"    {kind}: {numbers:,} in {tensors}")
    print(f"recipe: {recipe.source}", *(f"changed here: {line}" for line in flags.own_lines),
          "settings: " + " ".join(f"{k}={write_value(v)}" for k, v in recipe.settings().items()),
          sep="\n")
    height, width = flags.size
    print(f"on: {width}x{height}, up to {flags.frames} frames at {flags.fps:g} fps, "
          f"{flags.device}, {flags.precision}, seed {flags.seed}", flush=True)
