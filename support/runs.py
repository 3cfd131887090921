"""The folder of a training run: settings, log, state, adapters, samples. Files appear complete or
not at all, and no result is ever deleted.

    out/<clip>-<method>/run.json            method, settings, flags
                        log.jsonl           one line per step; if a step is repeated, its last line
                                            counts
                        state.safetensors   trainable parameters and AdamW's state, for --resume
                        <method>.safetensors, samples/, steps/
"""
import hashlib
import json
import math
import os
import re
import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from support import adapters, files, media
from support.files import BadInput, log, print_line, read_json, reading, write_json
from support.recipe import write_value

# --- Settings -----------------------------------------------------------------------------------


def fixed_settings(run):
    """Everything that determines the numbers of a step. It must not change on --resume."""
    flags = run.flags
    values = {k: v for k, v in run.recipe.settings().items()
              if k not in ("steps", "appearance_stop")}
    if flags.prior == "generated":
        values["--preview-steps"] = flags.preview_steps
    values |= {"--method": run.recipe.name, "--seed": flags.seed, "--precision": flags.precision,
               "--prior": flags.prior, "--batch": run.batch, "base model": run.fingerprint,
               "clips": clips_digest((*run.clips, *run.images))[:12]}
    values |= {f"noise schedule: {k}": v for k, v in asdict(run.pipe.schedule).items()}
    return {k: write_value(v) for k, v in values.items()}


def clips_digest(clips):
    """A checksum of clips and captions."""
    total = hashlib.sha256()
    for clip in clips:
        total.update(clip.video.numpy().tobytes() + clip.prompt.encode())
    return total.hexdigest()


def check_settings(run):
    """Raises BadInput if a run is resumed with other settings than those in its run.json."""
    path, now = run.flags.out / "run.json", fixed_settings(run)
    if os.path.lexists(path):
        with reading(path, "start again in a new --out"):
            was = read_json(path)["fixed"]
            changed = [f"{k} was {str(was.get(k))[:60]}, is {str(now.get(k))[:60]}"
                       for k in was | now if was.get(k) != now.get(k)]
        if changed:
            raise BadInput(f"{run.flags.out} was started with other settings: "
                           f"{'; '.join(changed[:3])}. Give the same settings, or another --out.")


def write_settings(run):
    """Write run.json, which has everything needed to repeat the run."""
    # JSON cannot hold infinity as a number.
    settings = {k: "inf" if v == math.inf else v for k, v in run.recipe.settings().items()}
    write_json(run.flags.out / "run.json", {
        "method": run.recipe.name, "settings": settings, "flags": vars(run.flags),
        "clips": [c.path for c in run.clips], "fixed": fixed_settings(run)})


# --- State --------------------------------------------------------------------------------------


def save_state(path, step, run, optimizer):
    """Save the trainable parameters and AdamW's state, e.g. as "exp_avg:parameter"."""
    tensors = {}
    for name, p in run.trained.items():
        for kind, tensor in {"": p, **optimizer.state.get(p, {})}.items():
            tensors[f"{kind}:{name}"] = tensor
    files.save_tensors(path, tensors, {"step": str(step), "prior": clips_digest(run.prior),
                                       "scaler": json.dumps(run.scaler.state_dict())})


def load_state(path, run, optimizer):
    """Restore a state. Returns its step, or 0 if none was saved. Raises BadInput if the file is
    damaged or the regularization clips have changed."""
    if not os.path.lexists(path):
        return 0
    with reading(path, "start again in a new --out"):
        tensors, meta = load_file(path), files.read_meta(path)
        files.check_digest(path, tensors)
        step = int(meta["step"])
        if meta["prior"] != clips_digest(run.prior):
            raise BadInput(f"{path.parent}: the regularization clips (--prior) have changed; start "
                           "again in a new --out.")
        if step > run.recipe.steps:
            raise BadInput(f"{path.parent} is already at step {step}; give more --steps.")
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            p = run.trained[name]
            if not kind:
                p.data.copy_(tensor)
            else:  # moments take the memory layout of their parameter
                like = torch.empty_like(p if tensor.shape == p.shape else tensor, device=p.device)
                optimizer.state[p][kind] = like.copy_(tensor)
        run.scaler.load_state_dict(json.loads(meta["scaler"]))
    return step


# --- The folder ---------------------------------------------------------------------------------


class Folder:
    """The output folder of a run. Only rank 0 writes."""

    def __init__(self, run, optimizer):
        self.path, self.run, self.optimizer = run.flags.out, run, optimizer
        self.writes, self.adapters = run.rank == 0, []
        self.first = self.saved = load_state(self.path / "state.safetensors", run, optimizer)
        if self.writes:
            write_settings(run)

    def log(self, line):
        """Append one step's line to log.jsonl."""
        if self.writes:
            files.append_line(self.path / "log.jsonl", json.dumps(line))

    def kept(self):
        """A text: the state from which --resume would continue."""
        return (f"the state of step {self.saved} is saved" if self.saved else
                "no state has been saved yet")

    def save(self, step):
        """Save the adapters and the state for --resume."""
        if not self.writes:
            return
        for name, p in self.run.trained.items():
            if not torch.isfinite(p).all():
                raise BadInput(f"{name} is not finite at step {step}; {self.kept()}. Lower the "
                               "learning rate (motion.lr=…).")
        self.adapters = self.save_adapters(self.path, step)
        keep = self.run.flags.save_every
        if keep and step % keep == 0:
            self.save_adapters(self.path / "steps" / f"{step:06d}", step)
        save_state(self.path / "state.safetensors", step, self.run, self.optimizer)
        self.saved = step

    def save_adapters(self, folder, step):
        """Save <method>.safetensors, and the appearance parts, which sampling leaves out, as
        <method>-appearance.safetensors (-appearance-2 … for further clips)."""
        run, written = self.run, []
        for suffix, trainables in adapter_groups(run.trainables).items():
            meta = metadata(run) | {"step": step}
            if suffix:
                meta |= {"noise_prior": 0.0, "part": "appearance"}
            clip = run.clips[0].latents[0] if run.clips and not suffix else None
            written.append(folder / f"{run.recipe.name}{suffix}.safetensors")
            adapters.save_adapter(written[-1], trainables, clip, **meta)
        return written

    def preview(self, step, before, now):
        """samples/step-….mp4: the reference, the base model's sample and the current sample, side
        by side. Both samples start from the same latents."""
        reference = (self.run.clips or self.run.images)[0].video.expand_as(now)
        if self.writes:
            media.write_video(self.path / "samples" / f"step-{step:06d}.mp4",
                              torch.cat([reference, before, now], dim=3), self.run.flags.fps)

    def finish(self, step, signal):
        """Print the results and the next command."""
        if signal and step < self.run.recipe.steps:
            log(f"stopped and saved at step {step}; to continue, add --resume --out "
                f"{shlex.quote(str(self.path))} to the same command")
        elif self.writes:
            for path in self.adapters:
                print_line(f"adapter: {path}")
            flags = ["--adapter", self.adapters[0]]
            flags += ["--weights", self.run.flags.weights] if self.run.flags.weights else []
            print_line(f"next: python generate.py {shlex.join(map(str, flags))} --prompt \"…\"")


def adapter_groups(trainables):
    """{suffix of an adapter's file name: trainables}. Raises BadInput for trainables that one file
    cannot hold."""
    groups = {}
    for part, built in trainables.items():
        for i, one in enumerate(built):
            suffix = ""
            if part.startswith("appearance"):
                suffix = f"-appearance-{i + 1}" if i else "-appearance"
            if one.tensors():
                groups.setdefault(suffix, []).append(one)
    for built in groups.values():
        tensors = {}
        for name, tensor in (row for one in built for row in one.tensors().items()):
            if tensors.setdefault(name, tensor) is not tensor:  # fully fine-tuned layers are shared
                raise BadInput(f"two parts train {name}, but an adapter holds each tensor once; "
                               "choose other layers, or per_video=off.")
        for name in tensors:
            layer = name.removesuffix(".lora_A.weight")
            if layer != name and f"{layer}.weight" in tensors:
                raise BadInput(f"two parts train {layer}, one fully and one with a LoRA, but an "
                               "adapter holds one of them; choose other layers.")
        for kind in {name.partition(".")[0] for name in tensors} - {"unet", "word"}:
            if kind not in adapters.ADAPTER_LOADERS:
                raise BadInput(f"no loader for {kind!r} in adapters.ADAPTER_LOADERS, so the "
                               "adapter could not be used.")
    return dict(sorted(groups.items()))


def metadata(run):
    """The metadata of an adapter: its origin, and the sampling settings for generate.py."""
    recipe, flags = run.recipe, run.flags
    return {"method": recipe.name, "base": run.fingerprint,
            "base_name": (flags.weights or Path("tiny")).name, "seed": flags.seed,
            "prompt": (run.clips or run.images)[0].prompt, "fps": flags.fps,
            "sampler": recipe.sampler, "sampling_steps": recipe.sampling_steps,
            "inversion_steps": recipe.inversion_steps,
            "noise_prior": recipe.noise_prior if run.clips else 0.0,
            "inversion_model": recipe.inversion_model, "guidance": recipe.guidance}


# --- Output to the terminal and the log ---------------------------------------------------------


def step_record(step, losses, norm, seen, run, started):
    """The log line of a step. All values are copied to the CPU in one GPU synchronization."""
    values = [norm, *losses, *(v for row in seen for v in row.values() if torch.is_tensor(v))]
    values = iter(torch.stack([v.detach().float() for v in values]).tolist())
    norm, losses = next(values), [next(values) for _ in losses]
    seen = [{k: next(values) if torch.is_tensor(v) else v for k, v in row.items()} for row in seen]
    examples = len(range(run.rank, run.batch, run.world_size))
    return {"step": step, "loss": sum(losses) / examples, "grad": norm, "losses": losses,
            "seen": seen, "seconds": round(time.time() - started, 4)}


def report(run):
    """Print the data, the trainable parameters and the settings."""
    flags, recipe = run.flags, run.recipe
    for clip, source in zip(run.clips, run.sources):
        print_line(f"clip: {clip.path}, {clip.video.shape[1]} frames, {clip.prompt!r} "
                   f"(from {source})")
    for clip in run.images:
        print_line(f"image: {clip.path}, {clip.prompt!r}")
    if run.prior:
        print_line(f"prior: {len(run.prior)} clips ({flags.prior}), e.g. {run.prior[0].prompt!r}")
    count = lambda tensors: sum(p.numel() for p in tensors)
    print_line(f"trainable: {count(run.trained.values()):,} parameters in {len(run.trained)} "
               f"tensors (the UNet has {count(run.pipe.unet.parameters()):,})")
    for part, built in run.trainables.items():
        named = built[0].parameters()
        print_line(f"  {part}: {count(named.values()):,} in {len(named)}"
                   + (f", for each of {len(built)} clips" if len(built) > 1 else ""))
        for kind, (tensors, numbers) in layer_types(named).items():
            print_line(f"    {kind}: {numbers:,} in {tensors}")
    print_line(f"recipe: {recipe.source}")
    for line in flags.overrides:
        print_line(f"changed: {line}")
    settings = " ".join(f"{k}={write_value(v)}" for k, v in recipe.settings().items())
    height, width = flags.size
    print_line(f"settings: {settings}")
    print_line(f"on: {width}x{height}, up to {flags.frames} frames at "
               f"{flags.fps:g} fps, {flags.device}, {flags.precision}, seed {flags.seed}")


def layer_types(parameters):
    """{type of layer, e.g. "temp_attentions attn1": (tensors, parameters)} of {name: parameter}.
    """
    count = {}
    for name, p in parameters.items():
        block = re.search(r"(transformer_in|temp_attentions|temp_convs|attentions|resnets"
                          r"|(?:temporal_)?transformer_blocks)", name)
        layer = re.search(r"\.(attn[12]|ff)\.", name)
        parts = [n for n in name.split(".")[:-2] if not n.isdigit()]  # for other networks
        kind = " ".join(m.group(1) for m in (block, layer) if m) or " ".join(parts) or "other"
        tensors, numbers = count.get(kind, (0, 0))
        count[kind] = tensors + 1, numbers + p.numel()
    return count
