"""How samples are made: what a method says of it, which its adapters' files keep, and the making.

    for (prompt, seed), video in make(model, adapters, [1.0], [("a red star", 0)], Sampling(), shape):

Axes: B videos at a time, C channels, F frames, h w latent, H W picture.
"""
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

import sampler
from support import adapter_file
from support.files import number, one_of, read_fields, reading


@dataclass(frozen=True)
class Sampling:
    """A start √p·inverted + √(1−p)·noise, p the noise_prior, and a walk from there."""

    sampler: str = one_of(*sampler.SAMPLERS)
    sampling_steps: int = number(1, 10**4, 50)
    guidance: float = number(0, 1000, 9.0)
    noise_prior: float = number(0, 1, 0.0)
    inverts: str = one_of("tuned", "base")  # the model that inverts the clip
    inversion_steps: int = number(0, 10**4, 0)  # 0: as many as of sampling
    fps: float = number(0.01, 1000, 8.0)


def read_sampling(path, meta):
    """What an adapter's metadata says of sampling. Raises BadInput."""
    with reading(path, "train it again"):
        said = {f.name: f.type(meta[f.name]) for f in fields(Sampling) if f.name in meta}
        return read_fields(Sampling, said, path)


@torch.no_grad()
def make(model, adapters, scales, jobs, s, shape, clip=None, negative="", batch=1,
         progress="sampling"):
    """Yields (job, video (3, F, H, W) in [-1, 1] on the CPU) of every job, (prompt, seed), in order.

    model: the base, into which the adapters are merged here, once the clip is inverted where s has
    the base do that. shape (C, F, h, w) of the latents; clip: clean ones (1, C, F, h, w), if s
    starts from a clip. Raises BadInput.
    """
    model.read(["", negative, *[prompt for prompt, _ in jobs]])  # once, as in train.py
    invert = lambda: sampler.invert(model, clip, s.inversion_steps or s.sampling_steps,
                                    progress=progress and "inverting")
    inverted = invert() if s.noise_prior and s.inverts == "base" else None
    for path, count, change in adapter_file.apply_adapters(model, adapters, scales):
        print(f"{path}: {count} layers change by ‖ΔW‖/‖W‖ = {change:.3g}")
    model.store_frozen({name for adapter in adapters for name in adapter.tensors})
    inverted = invert() if s.noise_prior and inverted is None else inverted
    total = len(jobs) * s.sampling_steps
    with tqdm(total=total, desc=progress, delay=2, disable=progress is None) as bar:
        for i in range(0, len(jobs), batch):
            prompts, seeds = zip(*jobs[i : i + batch])
            start = sampler.noise_like_shape(shape, seeds)
            if inverted is not None:
                start = sampler.blend_noise(inverted, start.to(inverted), s.noise_prior)
            on_step = lambda t, x, made=len(seeds): bar.update(made)
            yield from zip(jobs[i : i + batch], sampler.sample(
                model, prompts, start, seeds, s.sampling_steps, s.guidance, s.sampler, negative,
                on_step=on_step))
