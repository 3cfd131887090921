"""Sampling from a training run for eval.py: the base model and each adapter in the run's folder.

Axes: C channels, F frames, h w latent.
"""
import itertools
from dataclasses import asdict, replace

import data
import lora  # noqa: F401  (registers loaders of new kinds of trainables)
import model
import sampler
from support import adapters, machine, media
from support.files import BadInput, read_meta, slug, write_json

NOISE, START = "base, noise", "base, start"
BASES = {
    NOISE: "the base model from noise, i.e. the effect of the prompt alone",
    START: "the base model from the method's starting latents, i.e. the effect of the inverted "
           "clip without training"}


def sample_folder(path, training, out, args):
    """{name: folder of videos}, sampled into `out`: the base model from noise and from the method's
    starting latents, the final adapter, and the adapters of earlier steps. path, training: the
    run's folder and its TrainingInfo. Raises BadInput."""
    result = path / f"{training.method}.safetensors"
    if not result.is_file():
        raise BadInput(f"{path} has no {result.name}: the run has not saved yet, or was trained on "
                       "images alone; give a folder that generate.py wrote.")
    meta = read_meta(result)
    s = sampler.read_sampling(result, meta)
    # {name: (adapter, scale, Sampling, step)}. Curves over steps begin, at step 0, from the latents
    # that the later steps begin from.
    plan = {NOISE: (result, 0.0, replace(s, noise_prior=0.0), None if s.noise_prior else 0)}
    if s.noise_prior:
        plan[START] = result, 0.0, s, 0
    plan[path.name] = result, 1.0, s, int(meta["step"])
    for earlier in sorted(path.glob(f"steps/*/{result.name}")):
        step = int(earlier.parent.name)
        plan[f"step {step}"] = earlier, 1.0, s, step
    prompts = data.read_prompts(args.prompts) if args.prompts else [training.preview_prompt]
    prompts = dict.fromkeys(map(data.check_prompt, prompts))  # each once
    jobs = list(itertools.product(prompts, range(args.videos_per_prompt)))
    folders = {}
    for name, settings in plan.items():
        folders[name] = out / ("result" if name == path.name else slug(name))
        sample_adapter(folders[name], *settings, jobs, training, args)
    return folders


def sample_adapter(folder, path, scale, s, step, jobs, training, args):
    """Sample all jobs, (prompt, seed), into a folder, with the adapter at `path`, which was trained
    for `step` steps, and Sampling s. Raises BadInput."""
    pipe = model.load(training.weights, args.device, machine.default_precision(args.device))
    adapter = adapters.read_adapter(path, pipe)
    if s.noise_prior and adapter.latents is None:
        raise BadInput(f"{path} has no clip, but its sampling starts from one; train again.")
    latents = None if adapter.latents is None else adapter.latents[None].float()
    frames = training.frames if latents is None else latents.shape[2]
    H, W = (side // pipe.vae.config.factor for side in training.size)
    shape = pipe.unet.config.in_channels, frames, H, W
    sampled = sampler.sample_videos(pipe, [adapter], [scale], jobs, s, shape, latents,
                                    progress=f"sampling {folder.name}")
    videos = []
    for i, ((prompt, seed), video) in enumerate(sampled):
        videos.append([f"{i:03d}-{slug(prompt)}-seed{seed}.mp4", prompt, seed])
        media.write_video(folder / videos[-1][0], video, training.fps)
    write_json(folder / "settings.json", asdict(s) | {
        "adapter": [str(path)], "scale": [scale], "weights": training.weights, "fps": training.fps,
        "frames": frames, "steps_trained": step, "videos": videos})
