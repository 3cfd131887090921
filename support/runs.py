"""A run's folder: what it may write and delete, its log, its state, and what it prints.

    out/<clip>-<method>/run.json      the method, its settings, the flags
                        files.txt     every file that the run wrote: all that it may ever delete
                        log.jsonl, state.pt, <method>.safetensors, samples/, steps/
"""
import hashlib
import itertools
import json
import os
import re
import shlex
import time
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from support import adapter_file, machine, media, prompts
from support.files import (
    PART,
    BadInput,
    check_folder_out,
    finite,
    publish,
    room_for,
    say,
    write_json,
)
from support.recipe import write_value

SETTING = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")  # how name=value begins
BIG = 2**30  # bytes of state, from where it is saved ten times less often


# ------------------------------------------------------------------------------------------------
# The folder


def check_out(flags):
    """Settle the folder before anything is loaded: a run in it is never replaced unasked, and what
    is not ours is never touched; `flags.numbered` then says whether it is another than was asked
    for. Raises BadInput."""
    check_folder_out(flags.out)
    flags.numbered = False
    out = flags.out if flags.out.name not in ("", "..") else flags.out.resolve()
    if flags.resume:
        return check_resume(flags)
    for number in itertools.count(1):
        flags.out = out if number == 1 else out.with_name(f"{out.name}-{number}")
        if flags.out.exists() and not flags.out.is_dir():
            continue
        inside = visible(flags.out)
        strange = sorted(inside - {"lock"})
        ours = listed(flags.out) is not None
        if not strange or ours and (flags.overwrite or "run.json" not in inside):
            break
        if number == 1 and not ours:
            raise BadInput(f"--out {out} holds other files ({', '.join(strange[:3])}); give a new "
                           "or empty folder.")
    flags.numbered = number > 1
    if flags.numbered:
        say(f"{out} holds a run already, so this one goes to {flags.out}; --resume goes on with "
            "the one there, --overwrite replaces it")


def check_resume(flags):
    """Whether there is a state to go on from; what was stopped before its first save begins again.
    Raises BadInput."""
    state, known = flags.out / "state.pt", listed(flags.out)
    if state.is_file():
        return
    if known is None and visible(flags.out) == {"lock"}:
        known = []  # it was killed before it wrote anything
    if known is None or state.name in known:
        raise BadInput(f"{state} does not exist, so there is nothing to resume; leave --resume "
                       "out.")
    say(f"{flags.out} was stopped before its first save, so it begins again")
    flags.resume, flags.overwrite = False, True


def visible(out):
    """The names in a folder that do not begin with a dot; none where it does not exist."""
    return {p.name for p in out.iterdir() if p.name[0] != "."} if out.is_dir() else set()


LIST, HEAD = "files.txt", "# what this run wrote, and all that --overwrite may delete"


def listed(out):
    """The names that a run of ours has noted in a folder's list; None where there is none."""
    path = out / LIST
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is no file, so none knows what is the run's; give another --out.")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[1:] if lines[:1] == [HEAD] else None


def note(out, path):
    """Note in the folder's list that a file is the run's, before it is written; returns it."""
    known, name = listed(out), path.relative_to(out).as_posix()
    if known is None or name not in known:
        with (out / LIST).open("a") as file:
            file.write((f"{HEAD}\n" if known is None else "") + f"{name}\n")
    return path


def remove_listed(out, chosen):
    """Delete the files that the run's list has and `chosen` wants, none of them outside the folder,
    and take them off the list."""
    known = listed(out) or []
    gone = [name for name in known if chosen(name) and name not in (LIST, "lock")]
    for name in gone:
        path = out / name
        if path.is_file() and path.resolve().is_relative_to(out.resolve()):
            path.unlink()
    with publish(out / LIST) as part:
        part.write_text("\n".join([HEAD, *(name for name in known if name not in gone)]) + "\n")


class Folder:
    """The run's folder, locked while it is open. Processes but torchrun's first write nothing."""

    def __init__(self, flags, run):
        self.flags, self.run, self.path = flags, run, flags.out
        self.writes, self.step, self.paths, self.steps = run.process == 0, None, [], None

    def __enter__(self):
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = machine.lock(self.path / "lock")
            for left in self.path.rglob(PART + "*"):  # of a run that was killed while it wrote
                if left.is_file():
                    left.unlink()
        self.identity = identity(self.run)
        return self

    def __exit__(self, *_):
        if self.steps:
            self.steps.close()  # so that what is said next has a line of its own
        if self.writes:
            self.lock.close()

    def own(self, path):
        """Note that a file is the run's, before it is written. Raises BadInput where the folder is
        no longer the one that was opened."""
        try:
            same = os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.path / "lock"))
        except OSError:
            same = False
        if not same:
            raise BadInput(f"{self.path} was deleted, moved or replaced while running; nothing "
                           "more was saved there.")
        return note(self.path, path)

    def begin(self):
        """Forget an earlier run in the folder, of which only what it wrote is deleted."""
        if self.writes:
            room_for(self.path / "state.pt", self.size())
            remove_listed(self.path, lambda name: not name.startswith("prior/"))
            (self.path / "state.pt").unlink(missing_ok=True)
            self.write_settings()
            self.own(self.path / "log.jsonl").write_text("")
        return 0

    def size(self):
        """Bytes of a state: what learns, and its two moments."""
        return 3 * sum(p.nbytes for p in lora.named(self.run.learners).values())

    def write_settings(self):
        """run.json: all that is needed to repeat the run."""
        write_json(self.own(self.path / "run.json"), {
            "method": self.run.recipe.name, "settings": self.run.recipe.settings(),
            "flags": plain(self.flags), "clips": [str(c.path) for c in self.run.clips]})

    # -- the log

    def log(self, line):
        """One step's line in log.jsonl."""
        if self.writes:
            with self.own(self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(finite(line)) + "\n")

    def bar(self, first):
        """The steps as a bar, closed with the folder."""
        recipe = self.run.recipe
        self.steps = tqdm(initial=first, total=recipe.steps, desc=recipe.name,
                          disable=not self.writes)
        return self.steps

    def stop_at(self, line):
        """Stops the program at a NaN, before it reaches the weights."""
        where = "; ".join(f"timestep {s['t']}, clip {s['clip']}" for s in line["seen"])
        raise BadInput(f"loss {line['loss']}, gradient {line['grad']} at step {line['step']}, "
                       f"{where}; {self.kept()}. Lower the rate (motion.lr=…), or give "
                       "--precision fp32.")

    def kept(self):
        """What there is to go on from, in words."""
        return "there is no saved state yet" if self.step is None else (
            f"the state of step {self.step} is kept")

    # -- saving

    def is_time_to_save(self, step):
        """Every hundredth step, where the state is large every thousandth; and by --keep-every."""
        every = 1000 if self.size() > BIG else 100
        keep = self.flags.keep_every
        return step > 0 and step != self.step and (step % every == 0 or keep and step % keep == 0)

    def save(self, step, optimizer):
        """The adapters for use and the state for --resume. Either is there whole or not at all."""
        if not self.writes:
            return
        trained = lora.named(self.run.learners)
        for name, p in trained.items():
            if not torch.isfinite(p).all():
                raise BadInput(f"{name} is not finite at step {step}; {self.kept()}. Lower the "
                               "rate (motion.lr=…).")
        self.paths = self.save_adapters(self.path, step)
        keep = self.flags.keep_every
        if keep and step % keep == 0:
            self.save_adapters(self.path / "steps" / f"{step:06d}", step)
        path = self.path / "state.pt"
        room_for(path, self.size())
        moments = moments_of(optimizer, trained)
        with publish(path) as part:
            torch.save({"step": step, "identity": self.identity, "flags": plain(self.flags),
                        "settings": self.run.recipe.settings(),
                        "trained": {n: p.detach().cpu() for n, p in trained.items()},
                        "moments": moments, "learned": len(moments)}, part)
        self.own(path)  # only now: where the list lacks it, no state was ever whole
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
                self.own(path)
                if latents is not None:
                    self.own(adapter_file.clip_file(path))
                written.append(adapter_file.save_adapter(path, learners, latents, **meta)[0])
        return written

    def resume(self, optimizer):
        """Put the last saved state back and return its step. BadInput when anything has changed."""
        state = read_state(self.path / "state.pt")
        kinds = {"flags": plain(self.flags), "settings": self.run.recipe.settings(),
                 "identity": self.identity}
        free = {"steps", "resume", "preview_every", "preview_steps", "preview_prompt", "device",
                "out", "checkpointing", "keep_every", "overwrite", "help", "own_lines", "batch",
                "numbered", "appearance_stop"}
        changed = [f"{k} was {str(state[kind].get(k))[:60]}, is {str(v)[:60]}"
                   for kind, now in kinds.items() for k, v in now.items()
                   if k not in free and repr(state[kind].get(k)) != repr(v)]
        if changed:
            raise BadInput(f"{self.path} was begun with other settings: {'; '.join(changed[:3])}. "
                           "Give the same ones, or another --out.")
        if state["step"] > self.run.recipe.steps:
            raise BadInput(f"{self.path} is already at step {state['step']}; give more --steps.")
        put_back(self.path / "state.pt", state, lora.named(self.run.learners), optimizer)
        self.step = state["step"]
        if self.writes:
            self.cut_log(state["step"])
            self.write_settings()
        return state["step"]

    def cut_log(self, step):
        """Drop the lines that the resumed run will write again; the last may be cut short."""
        path, kept = self.path / "log.jsonl", {}
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            try:
                number = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if type(number) is int and 0 <= number < step:
                kept[number] = line
        if len(kept) < step:
            say(f"warning: {path} holds {len(kept)} of {step} steps; its curve has a gap")
        with publish(self.own(path)) as part:
            part.write_text("".join(kept[number] + "\n" for number in sorted(kept)))

    # -- looking

    def show(self, step, before, now):
        """samples/step-….mp4: the reference, the untrained model's sample and the present one's,
        both from the same start, side by side."""
        run = self.run
        reference = (run.clips or run.images)[0].video.expand_as(now)
        row = torch.cat([reference, before, now], dim=3)  # (3, F, H, 3·W)
        if self.writes:
            path = self.path / "samples" / f"step-{step:06d}.mp4"
            media.write_video(self.own(path), row, self.flags.fps)

    def looks_gone(self, step, video):
        """Whether the appearance score of a preview, whose looks are not the clip's, has fallen to
        appearance_stop (NewMove's supplement, Sec. 4): from there on, what is learned is the clip
        itself. The paper's score is the mean of 300 videos."""
        own, clip = self.run.recipe.own, self.run.scorer
        if not clip or not step:
            return False
        from scores.clip import text_alignment

        score = text_alignment(clip, video, own["look_prompt"] or self.flags.preview_prompt)
        say(f"step {step}: appearance score {score:.3f}")
        return machine.agreed(score <= own["appearance_stop"])

    def close(self, step, signal):
        """Say what there is now, and how to go on."""
        if self.steps:
            self.steps.close()  # so that this has a line of its own
        if signal and step < self.run.recipe.steps:
            where = f" --out {quoted(self.path)}" if self.flags.numbered else ""
            say(f"stopped and saved at step {step}; add --resume{where} to the same command to go "
                "on")
            return
        if signal:
            say(f"stopped at step {step}, the last: all is done and saved")
        if self.writes:
            for path in self.paths:
                print(f"adapter: {path}")
            if self.flags.preview_every:
                print(f"samples: {self.path / 'samples'} (the clip | before training | now)")
            base = f" --weights {quoted(self.flags.weights)}" if self.flags.weights else ""
            print(f"next: python generate.py --adapter {quoted(self.paths[0])}{base} --prompt "
                  "\"…\"")


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


def plain(flags):
    """The flags as JSON holds them."""
    return json.loads(json.dumps(vars(flags), default=str))


def identity(run):
    """What must not change under a resumed run's feet: base model, clips, captions, batch."""
    digest = hashlib.sha256()
    for clip in (*run.clips, *run.images, *run.prior):
        digest.update(clip.video.numpy().tobytes() + clip.prompt.encode())
    return {"base model": run.fingerprint, "clip": digest.hexdigest()[:12],
            "examples a step": run.batch}


# ------------------------------------------------------------------------------------------------
# The state


FORM = {"step": int, "identity": dict, "flags": dict, "settings": dict, "trained": dict,
        "moments": dict, "learned": int}  # of a state


def moments_of(optimizer, trained):
    """{name: AdamW's state} of the parameters that have learned so far."""
    moments = {}
    for name, p in trained.items():
        if own := optimizer.state.get(p):
            moments[name] = {kind: tensor.detach().cpu() for kind, tensor in own.items()}
    return moments


def read_state(path):
    """What state.pt holds, whole and of the kinds that `save` wrote. Raises BadInput."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
            broken = claimed > path.stat().st_size or archive.testzip()  # every part's sum
        state = None if broken else torch.load(path, map_location="cpu", weights_only=True)
        if not all(type(state[k]) is kind for k, kind in FORM.items()) or state["step"] < 0:
            raise ValueError("other contents")
    except Exception as error:  # zip and pickle raise whatever a damaged file leads them to
        raise BadInput(f"{path} cannot be read ({type(error).__name__}); leave --resume out to "
                       "begin again.") from None
    return state


def fits(tensor, like):
    """Whether a tensor of a file is plain, finite, and shaped as another: a fused AdamW would write
    past the end of a moment that is too small, or that is one number expanded."""
    return (torch.is_tensor(tensor) and tensor.layout == torch.strided
            and tensor.dtype == torch.float32 and tensor.shape == like.shape
            and tensor.device.type == "cpu" and tensor.nbytes <= tensor.untyped_storage().nbytes()
            and bool(torch.isfinite(tensor).all()))


def put_back(path, state, trained, optimizer):
    """Parameters and the optimiser's moments, after a look at every shape and number. Raises
    BadInput."""
    moments, one = state["moments"], torch.zeros(())
    wrong = [str(n) for n in state["trained"].keys() | moments.keys() if n not in trained]
    if len(moments) != state["learned"]:
        wrong.append(f"{len(moments)} of {state['learned']} moments")
    for name, p in trained.items():
        own = moments[name] if isinstance(moments.get(name), dict) else {}
        found = [(state["trained"].get(name), p)]
        if name in moments:
            found += [(own.get("exp_avg"), p), (own.get("exp_avg_sq"), p), (own.get("step"), one)]
        if not all(fits(tensor, like) for tensor, like in found) or own and (
                own["exp_avg_sq"].min() < 0 or not 0 < own["step"] <= state["step"]):
            wrong.append(name)
    if wrong:
        raise BadInput(f"{path} does not fit this run: {', '.join(wrong[:3])}; leave --resume out "
                       "to begin again.")
    for name, p in trained.items():
        p.data.copy_(state["trained"][name])
        if name in moments:
            own = moments[name]
            optimizer.state[p] = {"step": own["step"].to(p.device),
                                  "exp_avg": torch.empty_like(p).copy_(own["exp_avg"]),
                                  "exp_avg_sq": torch.empty_like(p).copy_(own["exp_avg_sq"])}


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
    print(f"training: {count:,} parameters in {len(trained)} tensors (the network has {whole:,})")
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
    if not flags.weights:
        prompts.explain_training(run)
