"""Prior clips: what a model shall not forget. They are always a folder of clips with captions;
those that are made are written to one first, out/…/prior/, where they can be looked at and a
resumed run finds them."""
import torch
from tqdm import tqdm

import data
import sampler
from support import machine
from support.files import BadInput, say


def load(run):
    """The prior clips of a run, as its flags and recipe say; [] for none."""
    flags, recipe = run.flags, run.recipe
    if flags.prior in (None, "none"):
        return []
    if flags.prior == "folder":
        say(f"warning: no prior clips: {recipe.name} forgets more without; give --prior "
                 "FOLDER, or --prior generated")
        return []
    folder = flags.prior
    if flags.prior in ("world", "generated"):
        folder = flags.out / "prior"
        if run.process == 0 and not (folder / "whole").is_file():
            makers = {"world": of_the_world, "generated": by_the_base}
            for number, (video, caption) in enumerate(makers[flags.prior](run)):
                path = folder / f"{number:03d}.mp4"
                data.write_video(path, video, flags.fps)
                path.with_suffix(".txt").write_text(caption + "\n")
            (folder / "whole").write_text("every clip is there\n")
        machine.agreed(None)  # the other processes wait for the first
    return data.load_prior(folder, flags.frames, flags.size, flags.fps)


def of_the_world(run):
    """Clips (3, F, H, W) of the tiny world's own motions, with captions."""
    from tiny import world  # only where it is asked for

    if run.flags.size != (world.SIZE, world.SIZE):
        raise BadInput(f"--prior world is of {world.SIZE}x{world.SIZE} pixels; leave --size out.")
    g = sampler.generator(run.flags.seed, 1, 1)
    scenes = world.sample_scenes(run.recipe.prior_clips, g)
    yield from zip(world.render(scenes, run.flags.frames), world.captions(scenes))


@torch.no_grad()
def by_the_base(run):
    """Clips of the caption without its word, sampled from the untrained model (DreamBooth)."""
    flags, recipe, model = run.flags, run.recipe, run.model
    word = recipe.parts["word"].text if "word" in recipe.parts else ""
    caption = " ".join(w for w in run.clips[0].prompt.split() if w != word)
    prompt = data.check_prompt(recipe.prior_prompt or caption or "a video")
    factor, channels = model.vae.config.factor, model.unet.config.in_channels
    shape = (channels, run.clips[0].video.shape[1], flags.size[0] // factor,
             flags.size[1] // factor)
    for number in tqdm(range(recipe.prior_clips), desc="prior clips"):
        source = sampler.generator(flags.seed, number, 4)  # no start that --seed could name
        start = sampler.noise_like_shape(shape, [source]).to(flags.device)
        yield sampler.sample(model, [prompt], start, [number], flags.preview_steps,
                             recipe.guidance)[0], prompt
