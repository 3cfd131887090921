"""Prior clips: what a model shall not forget. They are always a folder of clips with captions;
those that are made are written to one first, out/…/prior/, where they can be looked at and a
resumed run finds them."""
import json

import torch
from tqdm import tqdm

import data
import sampler
from support import machine, media, runs
from support.files import BadInput, say


def load(run):
    """The prior clips of a run, as its flags and recipe say; [] for none."""
    flags, recipe = run.flags, run.recipe
    if flags.prior in (None, "none"):
        return []
    if flags.prior == "folder":  # none was named
        say(f"warning: no prior clips: {recipe.name} forgets more without; give --prior FOLDER, "
            "best of real clips of similar scenes, or --prior generated")
        return []
    folder = flags.prior
    if flags.prior in ("world", "generated"):
        folder = flags.out / "prior"
        if run.process == 0:
            flags.out.mkdir(parents=True, exist_ok=True)
            with machine.lock(flags.out / "lock"):
                make(run, folder)
        machine.agreed(None)  # the other processes wait for the first
    return data.load_prior(folder, flags.frames, flags.size, flags.fps)


def make(run, folder):
    """Write the clips, unless a run with the same settings has, or the one that is resumed."""
    flags, recipe, whole = run.flags, run.recipe, folder / "whole.json"
    story = json.dumps({
        "prior": flags.prior, "clips": recipe.prior_clips, "prompt": recipe.prior_prompt,
        "base": run.fingerprint, "clip": runs.identity(run), "seed": flags.seed,
        "frames": flags.frames, "size": flags.size, "fps": flags.fps,
        "steps": flags.preview_steps, "guidance": recipe.guidance})
    if whole.is_file() and (flags.resume or whole.read_text(errors="replace") == story):
        return
    runs.remove_listed(flags.out, lambda name: name.startswith("prior/"))
    makers = {"world": of_the_world, "generated": by_the_base}
    for number, (video, caption) in enumerate(makers[flags.prior](run)):
        path = folder / f"{number:03d}.mp4"
        media.write_video(runs.note(flags.out, path), video, flags.fps)
        runs.note(flags.out, path.with_suffix(".txt")).write_text(caption + "\n")
    runs.note(flags.out, whole).write_text(story)


def of_the_world(run):
    """Clips (3, F, H, W) of the tiny world's own motions, with captions."""
    from tiny import world  # only where it is asked for

    if run.flags.size != (world.SIZE, world.SIZE):
        raise BadInput(f"--prior world is of {world.SIZE}x{world.SIZE} pixels; leave --size out.")
    g = sampler.generator(run.flags.seed, 1, 1)
    scenes = world.sample_scenes(run.recipe.prior_clips, g)
    # As the clip's caption speaks, so do theirs: or what tells the two apart were its length.
    said = run.clips[0].prompt
    colour = any(word in said.split() for word in world.COLOURS)
    ground = " background" in said
    for i, video in enumerate(world.render(scenes, run.flags.frames)):
        name = lambda table, field, i=i: list(table)[getattr(scenes, field)[i]]
        yield video, world.caption(
            name(world.COLOURS, "colour") if colour else None, name(world.SHAPES, "shape"),
            name(world.MOTIONS, "motion"), name(world.SPEEDS, "speed"),
            name(world.BACKGROUNDS, "background") if ground else None)


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
