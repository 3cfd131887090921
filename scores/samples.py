"""Samples to score of a folder that train.py wrote: of the untrained model, and of every adapter in
it.

Axes: C channels, F frames, h w latent.
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import data
import model
from support import adapter_file, machine, media, videos
from support.files import BadInput, read_json, read_tensors, slug, write_json

NOISE, START = "base, noise", "base, start"
BASES = {
    NOISE: "the untrained model, from noise: what the words alone bring",
    START: "the untrained model, from where the method starts sampling, its inverted clip: what "
           "that start brings of the motion before anything is learned"}


def sample_folder(path, trained, place, args):
    """{name: folder of videos}, made under `place` where they are not there yet, of --prompts: of
    the untrained model, from noise and from the method's own start; of the result; and of every
    kept step. path, trained: train.py's folder and its run.json. Raises BadInput."""
    result = path / f"{trained.method}.safetensors"
    if not result.is_file():
        raise BadInput(f"{path} holds no {result.name}: it has not been saved yet, or pictures "
                       "alone were learned from; give a folder of generate.py's.")
    s = videos.read_sampling(result, adapter_file.read_meta(result))
    plan = {NOISE: (result, 0.0, replace(s, noise_prior=0.0))}
    if s.noise_prior:
        plan[START] = result, 0.0, s
    plan[path.name] = result, 1.0, s
    for kept in sorted(path.glob(f"steps/*/{result.name}")):
        plan[f"step {int(kept.parent.name)}"] = kept, 1.0, s
    lines = args.prompts.read_text().split("\n") if args.prompts else []
    prompts = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    prompts = prompts or [trained.preview_prompt]
    found = {}
    for name, row in plan.items():
        found[name] = place / ("result" if name == path.name else slug(name))
        make_samples(found[name], *row, name, prompts, trained, args)
    return found


def make_samples(folder, path, scale, s, name, prompts, trained, args):
    """Sample into a folder, unless it holds these very samples, of which the settings are written
    last. Raises BadInput."""
    jobs = [(data.check_prompt(p), seed) for p in prompts for seed in range(args.seeds)]
    names = [f"{i:03d}-{slug(job[0])}-seed{job[1]}.mp4" for i, job in enumerate(jobs)]
    meta, clip = adapter_file.read_meta(path), adapter_file.clip_file(path)
    latents = read_tensors(clip)["latents"][None].float() if clip.is_file() else None
    frames = trained.frames if latents is None else latents.shape[2]
    settings = asdict(s) | {
        "adapter": [str(path)], "scale": [scale], "weights": trained.weights, "fps": trained.fps,
        "init": "inverted" if s.noise_prior else "noise", "frames": frames,
        "steps_trained": int(meta["step"]) if scale else 0, "written": path.stat().st_mtime_ns,
        "videos": [[file, *job] for file, job in zip(names, jobs)]}
    done = folder / "settings.json"
    if done.is_file() and read_json(done) == json.loads(json.dumps(settings)):
        return
    done.unlink(missing_ok=True)
    base = model.load(trained.weights, args.device, machine.default_precision(args.device))
    H, W = (side // base.vae.config.factor for side in trained.size)
    adapter = adapter_file.read_adapter(path, base)
    made = videos.make(base, [adapter], [scale], jobs, s, (base.unet.config.in_channels, frames, H,
                       W), latents, progress=f"sampling {name}")
    for file, (_, video) in zip(names, made):
        media.write_video(folder / file, video, trained.fps)
    write_json(done, settings)
