"""A run's folder: what it may write and delete, its log, its state, and what it prints.

    out/<clip>-<method>/run.json      the method, its settings, the flags
                        files.txt     every file that the run wrote: all that it may ever delete
                        log.jsonl, state.pt, <method>.safetensors, samples/, steps/
"""
import hashlib
import json
import re
import time
import zipfile
from pathlib import Path

import torch

import data
import lora
from support import machine
from support.files import (
    PART,
    BadInput,
    check_folder_out,
    publish,
    room_for,
    say,
    write_json,
)
from support.recipe import write_value

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)?=")  # how name=value begins
BIG = 2**30  # bytes of state, from where it is saved ten times less often


# ------------------------------------------------------------------------------------------------
# The folder


def check_out(flags):
    """Settle the folder before anything is loaded: a run in it is never replaced unasked, and what
    is not ours is never touched. Raises BadInput."""
    out = flags.out
    check_folder_out(out)
    if flags.resume:
        if not (out / "state.pt").is_file():
            raise BadInput(f"{out / 'state.pt'} does not exist, so there is nothing to resume; "
                           "leave --resume out.")
        return
    number = 1
    while not flags.overwrite and (flags.out / "run.json").is_file():
        number += 1
        flags.out = out.with_name(f"{out.name}-{number}")
    if flags.out != out:
        say(f"{out} holds a run already, so this one goes to {flags.out}; --resume goes on with "
            "the one there, --overwrite replaces it")
    others = [p.name for p in flags.out.iterdir()] if flags.out.is_dir() else []
    if others and not (flags.out / "run.json").is_file() and set(others) - {"lock", "files.txt", "prior"}:
        raise BadInput(f"--out {flags.out} holds other files ({', '.join(sorted(others)[:3])}); "
                       "give a new or empty folder.")


class Folder:
    """The run's folder, locked while it is open. Processes but torchrun's first write nothing."""

    def __init__(self, flags, run):
        self.flags, self.run, self.path = flags, run, flags.out
        self.writes, self.step, self.paths = run.process == 0, None, []
        self.started = None

    def __enter__(self):
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = machine.lock(self.path / "lock")
            for left in self.path.rglob(PART + "*"):  # of a run that was killed while it wrote
                left.unlink()
        self.identity = identity(self.run)
        return self

    def __exit__(self, *_):
        if self.writes:
            self.lock.close()

    def own(self, path):
        """Note in files.txt that a file is the run's, before it is written."""
        listed, name = self.path / "files.txt", path.relative_to(self.path).as_posix()
        if name not in (listed.read_text().splitlines() if listed.is_file() else []):
            with listed.open("a") as file:
                file.write(name + "\n")
        return path

    def begin(self):
        """Forget an earlier run in the folder, of which only what it wrote is deleted."""
        if not self.writes:
            return 0
        listed = self.path / "files.txt"
        for name in listed.read_text().splitlines() if listed.is_file() else []:
            path = (self.path / name).resolve()
            if path.is_relative_to(self.path.resolve()) and path.name != "files.txt":
                if not name.startswith("prior/"):
                    path.unlink(missing_ok=True)
        self.write_settings()
        self.own(self.path / "log.jsonl").write_text("")
        return 0

    def write_settings(self):
        """run.json: all that is needed to repeat the run."""
        write_json(self.own(self.path / "run.json"), {
            "method": self.run.recipe.name, "settings": self.run.recipe.settings(),
            "flags": plain(self.flags), "clips": [str(c.path) for c in self.run.clips]})

    # -- the log

    def log(self, line):
        """One step's line in log.jsonl."""
        if self.writes:
            with (self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def stop_at(self, line):
        """Stops the program at a NaN, before it reaches the weights."""
        where = "; ".join(f"timestep {s['t']}, clip {s['clip']}" for s in line["seen"])
        kept = "there is no saved state yet" if self.step is None else (
            f"the state of step {self.step} is kept")
        raise BadInput(f"loss {line['loss']}, gradient {line['grad']} at step {line['step']}, "
                       f"{where}; {kept}. Lower the rate (motion.lr=…), or give --precision fp32.")

    # -- saving

    def is_time_to_save(self, step):
        """Every hundredth step; where the state is large, every thousandth."""
        size = 3 * sum(p.nbytes for p in lora.named(self.run.learners).values())
        every = 1000 if size > BIG else 100
        keep = self.flags.keep_every
        return step > 0 and step != self.step and (step % every == 0 or keep and step % keep == 0)

    def save(self, step, optimizer):
        """The adapters for use and the state for --resume. Either is there whole or not at all."""
        if not self.writes:
            return
        if not (self.path / "run.json").is_file():
            raise BadInput(f"{self.path} was deleted or moved while running; nothing was saved.")
        trained = lora.named(self.run.learners)
        for name, p in trained.items():
            if not torch.isfinite(p).all():
                raise BadInput(f"{name} is not finite at step {step}; the last saved state is "
                               "kept. Lower the rate (motion.lr=…).")
        self.paths = self.save_adapters(self.path, step)
        keep = self.flags.keep_every
        if keep and step % keep == 0:
            self.save_adapters(self.path / "steps" / f"{step:06d}", step)
        path = self.own(self.path / "state.pt")
        room_for(path, 3 * sum(p.nbytes for p in trained.values()))
        with publish(path) as part:
            torch.save({"step": step, "identity": self.identity, "flags": plain(self.flags),
                        "settings": self.run.recipe.settings(),
                        "trained": {n: p.detach().cpu() for n, p in trained.items()},
                        "optimizer": optimizer.state_dict()}, part)
        self.step = step

    def save_adapters(self, folder, step):
        """What was learned, in files for use: the motion in <method>.safetensors, and what is apart
        from it, an appearance, in <method>-look.safetensors (-look-2 … for more clips)."""
        run = self.run
        groups = {"": ([], run.clips[0].latents[0] if run.clips else None)}
        for part, several in run.learners.items():
            for i, one in enumerate(several):
                suffix = "" if not part.startswith("look") else f"-look-{i + 1}" if i else "-look"
                groups.setdefault(suffix, ([], None))[0].append(one)
        written = []
        for suffix, (learners, latents) in groups.items():
            path = folder / f"{run.recipe.name}{suffix}.safetensors"
            if any(one.tensors() for one in learners):
                meta = metadata(run) | {"step": step}
                if suffix:  # a look has no motion, and so no start
                    meta |= {"noise_prior": 0.0}
                for file in (path, lora.clip_file(path)):
                    self.own(file)
                written.append(lora.save_adapter(path, learners, latents, **meta)[0])
        return written

    def resume(self, optimizer):
        """Put the last saved state back and return its step. BadInput when anything has changed."""
        state = read_state(self.path / "state.pt")
        before = state["flags"] | state["settings"] | state["identity"]
        now = plain(self.flags) | self.run.recipe.settings() | self.identity
        free = {"steps", "resume", "preview_every", "preview_steps", "preview_prompt", "device",
                "out", "checkpointing", "keep_every", "overwrite", "help", "own_lines"}
        changed = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items()
                   if k not in free and before.get(k) != v]
        if changed:
            raise BadInput(f"{self.path} was begun with other settings: {'; '.join(changed[:3])}. "
                           "Give the same ones, or another --out.")
        if state["step"] >= self.run.recipe.steps:
            raise BadInput(f"{self.path} is already at step {state['step']}; give more --steps.")
        put_back(self.path / "state.pt", state, lora.named(self.run.learners), optimizer)
        self.step = state["step"]
        if self.writes:
            self.cut_log(state["step"])
            self.write_settings()
        return state["step"]

    def cut_log(self, step):
        """Drop the lines that the resumed run will write again; the last may be cut short."""
        path = self.path / "log.jsonl"
        try:
            lines = path.read_text().splitlines()[:step] if path.is_file() else []
        except UnicodeDecodeError:
            raise BadInput(f"{path} is not text; delete it to go on without it.") from None
        if len(lines) < step:
            say(f"warning: {path} holds {len(lines)} of {step} steps; its curve has a gap")
        with publish(self.own(path)) as part:
            part.write_text("".join(line + "\n" for line in lines))

    # -- looking

    def show(self, step, before, now):
        """samples/step-….mp4: the reference, the untrained model's sample and the present one's,
        both from the same start, side by side."""
        run = self.run
        reference = (run.clips or run.images)[0].video.expand_as(now)
        row = torch.cat([reference, before, now], dim=3)  # (3, F, H, 3·W)
        if self.writes:
            path = self.path / "samples" / f"step-{step:06d}.mp4"
            data.write_video(self.own(path), row, self.flags.fps)

    def looks_gone(self, step, video):
        """Whether a sample's appearance score has fallen to appearance_stop (NewMove's supplement,
        Sec. 4): from there on, what is learned is the clip itself."""
        own = self.run.recipe.own
        if not own.get("appearance_stop") or not step:
            return False
        from scores.clip import load_clip, text_alignment

        clip = load_clip(own["clip"] or None, own["clip_weights"] or None, self.flags.device)
        look = own["look_prompt"] or self.run.clips[0].prompt
        score = text_alignment(clip, video, look)
        say(f"step {step}: appearance score {score:.3f}")
        return machine.agreed(score <= own["appearance_stop"])

    def close(self, step, signal):
        """Say what there is now, and how to go on."""
        if signal:
            say(f"stopped and saved at step {step}; add --resume to the same command to go on")
        elif self.writes:
            for path in self.paths:
                print(f"adapter: {path}")
            if self.flags.preview_every:
                print(f"samples: {self.path / 'samples'} (the clip | before training | now)")
            base = f" --weights {self.flags.weights}" if self.flags.weights else ""
            print(f"next: python generate.py --adapter {self.paths[0]}{base} --prompt \"…\"")


def metadata(run):
    """What an adapter says of itself, for generate.py above all."""
    recipe, flags = run.recipe, run.flags
    return {"method": recipe.name, "base": lora.fingerprint(run.model.unet),
            "base_name": (flags.weights or Path("tiny")).name, "seed": flags.seed,
            "prompt": (run.clips or run.images)[0].prompt, "fps": flags.fps,
            "sampler": recipe.sampler, "sampling_steps": recipe.sampling_steps,
            "inversion_steps": recipe.inversion_steps,
            "noise_prior": recipe.noise_prior if run.clips else 0.0, "inverts": recipe.inverts,
            "guidance": recipe.guidance}


def plain(flags):
    """The flags as JSON holds them."""
    return json.loads(json.dumps(vars(flags), default=str))


def identity(run):
    """What must not change under a resumed run's feet: base model, clips and captions."""
    digest = hashlib.sha256()
    for clip in (*run.clips, *run.images, *run.prior):
        digest.update(clip.video.numpy().tobytes() + clip.prompt.encode())
    return {"base model": lora.fingerprint(run.model.unet), "clip": digest.hexdigest()[:12]}


# ------------------------------------------------------------------------------------------------
# The state


def read_state(path):
    """What state.pt holds, whole and of the kinds that `save` wrote. Raises BadInput."""
    wanted = {"step": int, "identity": dict, "flags": dict, "settings": dict, "trained": dict,
              "optimizer": dict}
    try:
        broken = zipfile.ZipFile(path).testzip()  # checks every part's sum
        state = torch.load(path, map_location="cpu", weights_only=True)
        if broken or not all(type(state[k]) is kind for k, kind in wanted.items()):
            raise ValueError(broken)
    except Exception as error:  # zip and pickle raise whatever a damaged file leads them to
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); leave --resume out to "
                       "begin again.") from None
    return state


def put_back(path, state, trained, optimizer):
    """Parameters and the optimiser's moments, after a look at every shape and number: a fused AdamW
    would write past the end of a moment that is too small. Raises BadInput."""
    wrong = [n for n in trained if n not in state["trained"]]
    wrong += [n for n in state["trained"] if n not in trained]
    tensors = [(n, t, trained[n]) for n, t in state["trained"].items() if n in trained]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        groups, moments = state["optimizer"]["param_groups"], state["optimizer"]["state"]
        mine = optimizer.state_dict()["param_groups"]
        if [(g["params"], g["lr"], g["weight_decay"]) for g in groups] != [
                (g["params"], g["lr"], g["weight_decay"]) for g in mine]:
            wrong.append("the optimiser's groups")
        for number, values in moments.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors.append((f"{kind} {number}", values[kind], parameters[number]))
            tensors.append((f"step {number}", values["step"], torch.zeros(())))
    except (KeyError, TypeError, IndexError, AttributeError):
        wrong.append("the optimiser's state")
    for name, tensor, p in tensors:
        if not torch.is_tensor(tensor) or tensor.shape != p.shape or (
                tensor.dtype != torch.float32 or not torch.isfinite(tensor).all()):
            wrong.append(name)
    if wrong:
        raise BadInput(f"{path} does not fit this run: {', '.join(wrong[:3])}; leave --resume out "
                       "to begin again.")
    for name, tensor in state["trained"].items():
        trained[name].data.copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])


# ------------------------------------------------------------------------------------------------
# What a run prints


def log_line(step, losses, norm, seen, run, started):
    """A step's line of the log: one wait for the device, for all figures at once."""
    figures = [norm, *losses]
    for row in seen:
        figures += [v for v in row.values() if torch.is_tensor(v)]
    values = iter(torch.stack([f.detach().float() for f in figures]).tolist())
    norm, losses = next(values), [next(values) for _ in losses]
    seen = [{k: next(values) if torch.is_tensor(v) else v for k, v in row.items()} for row in seen]
    mine = len(range(run.process, run.batch, run.processes))
    return {"step": step, "loss": sum(losses) / mine, "grad": norm, "losses": losses,
            "seen": seen, "seconds": round(time.time() - started, 4)}


def report(run):
    """Say what trains, from what, with which settings, and where they came from."""
    if run.process:
        return
    flags, recipe = run.flags, run.recipe
    for clip, source in zip(run.clips, run.sources):
        print(f"clip: {clip.path}, {clip.video.shape[1]} frames, {clip.prompt!r} (from {source})")
    for clip in run.images:
        print(f"picture: {clip.path}, {clip.prompt!r}")
    if run.prior:
        print(f"prior: {len(run.prior)} clips ({flags.prior}), such as {run.prior[0].prompt!r}")
    trained = lora.named(run.learners)
    whole = sum(p.numel() for p in run.model.unet.parameters())
    count = sum(p.numel() for p in trained.values())
    print(f"training: {count:,} parameters in {len(trained)} tensors (the UNet has {whole:,})")
    for part, several in run.learners.items():
        mine = several[0].parameters()
        print(f"  {part}: {sum(p.numel() for p in mine.values()):,} in {len(mine)}"
              + (f", for each of {len(several)} clips" if len(several) > 1 else ""))
        for kind, (tensors, numbers) in lora.kinds_of_layer(mine).items():
            print(f"    {kind}: {numbers:,} in {tensors}")
    print(f"recipe: {recipe.source}")
    for line in flags.own_lines:
        print(f"  changed here: {line}")
    print("settings:", " ".join(f"{k}={write_value(v)}" for k, v in recipe.settings().items()))
    height, width = flags.size
    print(f"on: {width}x{height}, up to {flags.frames} frames at {flags.fps:g} fps, "
          f"{flags.device}, {flags.precision}, seed {flags.seed}"
          + (", activations computed again" if run.model.unet.checkpointing else ""), flush=True)
