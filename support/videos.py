"""Videos of a model, a batch at a time, and how an adapter's method samples.

    jobs = [("a red star", seed) for seed in range(4)]
    for (prompt, seed), video in make_videos(model, jobs, starts((8, 16, 8, 8)), batch=4): …

Axes: B videos at a time, C channels, F frames, h w latent, H W picture.
"""
from tqdm import tqdm

import sampler
from support.files import BadInput


def make_videos(model, jobs, start_of, *, steps=50, guidance=9.0, method="ddim", negative="",
                batch=1, progress="sampling"):
    """Yields (job, video (3, F, H, W) in [-1, 1] on the CPU) of every job, in order.

    model: with its adapters in it. jobs: (prompt, seed) each; under torchrun, one process's own.
    start_of(seeds): the latents (B, C, F, h, w) that these videos start from; `starts` makes one.
    progress: the name of a bar over all jobs, which appears after two seconds; None for no bar.
    Raises BadInput, as sampler.sample does.
    """
    with tqdm(total=len(jobs) * steps, desc=progress, delay=2, disable=progress is None) as bar:
        for i in range(0, len(jobs), batch):
            part = jobs[i : i + batch]
            prompts, seeds = [job[0] for job in part], [job[1] for job in part]
            on_step = lambda t, x, made=len(part): bar.update(made)
            videos = sampler.sample(model, prompts, start_of(seeds), seeds, steps, guidance, method,
                                    negative, on_step=on_step)
            yield from zip(part, videos)


def starts(shape, inverted=None, noise_prior=1.0):
    """A start_of for make_videos: each seed's noise (C, F, h, w); or √p·inverted + √(1−p)·noise
    with an inverted clip (1, C, F, h, w) and p = noise_prior."""

    def start_of(seeds):
        noise = sampler.noise_like_shape(shape, seeds)
        if inverted is None:
            return noise
        return sampler.blend_noise(inverted, noise.to(inverted), noise_prior)

    return start_of


# What an adapter's file may say of sampling: {name: (kind, least, most, default)}, or the known
# words with the default first.
STORY = {"sampler": tuple(sampler.SAMPLERS), "sampling_steps": (int, 1, 10**5, 50),
         "inversion_steps": (int, 0, 10**5, 0), "noise_prior": (float, 0, 1, 0.0),
         "inverts": ("tuned", "base"), "guidance": (float, 0, 1000, 9.0),
         "fps": (float, 0.01, 1000, 8.0), "step": (int, 0, 10**9, 0)}


def read_story(adapter):
    """{name: value} of what an adapter's file says of sampling, with defaults for what it leaves
    out. inversion_steps are those of sampling where it says 0. Raises BadInput for what is not of
    the kind or range that STORY names."""
    story = {}
    for name, wanted in STORY.items():
        number = callable(wanted[0])
        text, value = adapter.meta.get(name), wanted[-1] if number else wanted[0]
        if text is not None:
            try:
                value = wanted[0](text) if number else text
                fits = wanted[1] <= value <= wanted[2] if number else value in wanted
            except ValueError:
                fits = False
            if not fits:
                says = f"{wanted[1]:g} to {wanted[2]:g}" if number else " or ".join(wanted)
                raise BadInput(f"{adapter.path} says {name} = {text[:40]!r}, wanted {says}; train "
                               "it again.")
        story[name] = value
    story["inversion_steps"] = story["inversion_steps"] or story["sampling_steps"]
    return story
