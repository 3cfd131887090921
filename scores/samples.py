"""Sampling from a training run, for eval.py: the base model, and each adapter in the run's folder.

Axes: C channels, F frames, h w latent.
"""
from dataclasses import asdict, replace

import data
import lora  # noqa: F401  (registers loaders of new kinds of trainables)
import model
import sampler
from support import adapters, machine, media
from support.files import BadInput, read_meta, slug, write_json

NOISE, START = "base, noise", "base, start"
BASES = {
    NOISE: "the base model, sampled from noise: the contribution of the prompt alone",
    START: "the base model, sampled from the method's starting latents: the contribution of the "
           "inverted clip without training"}


def sample_folder(path, trained, place, args):
    """{name: folder of videos}, sampled into `place` with --prompts: the base model from noise and
    from the method's starting latents, the result, and each adapter kept during training. path,
    trained: the run's folder and its run.json. Raises BadInput."""
    result = path / f"{trained.method}.safetensors"
    if not result.is_file():
        raise BadInput(f"{path} holds no {result.name}: the run has not saved yet, or was trained on "
                       "images only; give a folder that generate.py wrote.")
    s = sampler.read_sampling(result, read_meta(result))
    plan = {NOISE: (result, 0.0, replace(s, noise_prior=0.0))}
    if s.noise_prior:
        plan[START] = result, 0.0, s
    plan[path.name] = result, 1.0, s
    for kept in sorted(path.glob(f"steps/*/{result.name}")):
        plan[f"step {int(kept.parent.name)}"] = kept, 1.0, s
    prompts = data.read_prompts(args.prompts) if args.prompts else [trained.preview_prompt]
    jobs = [(prompt, seed) for prompt in dict.fromkeys(prompts) for seed in range(args.seeds)]
    for prompt, _ in jobs:
        data.check_prompt(prompt)
    found = {}
    for name, row in plan.items():
        found[name] = place / ("result" if name == path.name else slug(name))
        make_samples(found[name], *row, name, jobs, trained, args)
    return found


def make_samples(folder, path, scale, s, name, jobs, trained, args):
    """Sample all jobs, (prompt, seed), with the adapter at `path` into a folder. Raises BadInput."""
    base = model.load(trained.weights, args.device, machine.default_precision(args.device))
    adapter = adapters.read_adapter(path, base)
    latents = None if adapter.latents is None else adapter.latents[None].float()
    frames = trained.frames if latents is None else latents.shape[2]
    H, W = (side // base.vae.config.factor for side in trained.size)
    shape = base.unet.config.in_channels, frames, H, W
    made = sampler.sample_videos(base, [adapter], [scale], jobs, s, shape, latents,
                        progress=f"sampling {name}")
    videos = []
    for i, ((prompt, seed), video) in enumerate(made):
        videos.append([f"{i:03d}-{slug(prompt)}-seed{seed}.mp4", prompt, seed])
        media.write_video(folder / videos[-1][0], video, trained.fps)
    write_json(folder / "settings.json", asdict(s) | {
        "adapter": [str(path)], "scale": [scale], "weights": trained.weights, "fps": trained.fps,
        "frames": frames, "steps_trained": int(adapter.meta["step"]) if scale else 0,
        "videos": videos})
