"""Prior clips: what a model shall not forget. They are always a folder of clips with captions;
those that are made are written to out/…/prior/ first, each as its number and the seed have it, so
that a resumed run finds them, or makes what is missing."""
import torch

import data
import sampler
from support import machine, media
from support.files import BadInput, publish, say


def load(run):
    """The prior clips of a run, as its flags and recipe say; [] for none."""
    flags, made = run.flags, {"world": of_the_world, "generated": by_the_base}
    if flags.prior in (None, "none"):
        return []
    if flags.prior == "folder":  # none was named
        say(f"warning: no prior clips: {run.recipe.name} forgets more without; give --prior FOLDER,"
            " best of real clips of similar scenes, or --prior generated")
        return []
    folder = flags.out / "prior" if flags.prior in made else flags.prior
    if flags.prior in made and not run.process:
        for number in range(run.recipe.prior_clips):
            path = folder / f"{number:03d}.mp4"
            if not path.exists():  # it is written last, and whole
                video, caption = made[flags.prior](run, number)
                with publish(path.with_suffix(".txt")) as part:
                    part.write_text(caption + "\n")
                media.write_video(path, video, flags.fps)
    machine.agreed(None)  # the other processes wait for the first
    return data.load_prior(folder, flags.frames, flags.size, flags.fps)


def of_the_world(run, number):
    """A clip (3, F, H, W) of the tiny world's own motions, and its caption."""
    from tiny import world  # only where it is asked for

    if run.flags.size != (world.SIZE, world.SIZE):
        raise BadInput(f"--prior world is of {world.SIZE}x{world.SIZE} pixels; leave --size out.")
    g = sampler.generator(run.flags.seed, 1, 1)
    scene = world.sample_scenes(run.recipe.prior_clips, g)[torch.tensor([number])]
    # As the clip's caption speaks, so does this: or what tells the two apart were its length.
    said = run.clips[0].prompt
    name = lambda table, field: list(table)[getattr(scene, field)[0]]
    return world.render(scene, run.flags.frames)[0], world.caption(
        name(world.COLORS, "color") if any(w in said.split() for w in world.COLORS) else None,
        name(world.SHAPES, "shape"), name(world.MOTIONS, "motion"), name(world.SPEEDS, "speed"),
        name(world.BACKGROUNDS, "background") if " background" in said else None)


@torch.no_grad()
def by_the_base(run, number):
    """A clip of the caption without its word, sampled from the untrained model (DreamBooth)."""
    flags, recipe, model = run.flags, run.recipe, run.model
    word = recipe.parts["word"].text if "word" in recipe.parts else ""
    caption = " ".join(w for w in run.clips[0].prompt.split() if w != word)
    prompt = data.check_prompt(recipe.prior_prompt or caption or "a video")
    factor, channels = model.vae.config.factor, model.unet.config.in_channels
    shape = (channels, run.clips[0].video.shape[1], *(side // factor for side in flags.size))
    source = sampler.generator(flags.seed, number, 4)  # no start that --seed could name
    start = sampler.noise_like_shape(shape, [source]).to(flags.device)
    return sampler.sample(model, [prompt], start, [number], flags.preview_steps, recipe.guidance,
                          progress=f"prior clip {number}")[0], prompt
