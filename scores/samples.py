"""Samples to score of a folder that train.py wrote: of the untrained model, and of every adapter in
it.

Axes: C channels, F frames, h w latent.
"""
import json
from pathlib import Path

import torch

import data
import model
import sampler
from support import adapter_file, machine, media, sets
from support.files import BadInput, check_weights, read_json, slug, write_json
from support.prompts import explain_strange_words, read_lines
from support.videos import make_videos, read_story, starts

NOISE, START = "base, noise", "base, start"
BASES = {
    NOISE: "the untrained model, from noise: what the words alone bring",
    START: "the untrained model, from where the method starts sampling, its inverted clip: what "
           "that start brings of the motion before anything is learned"}


def sample_folder(path, trained, place, args):
    """{name: folder of videos}, made under `place` where they are not there yet, of --prompts: of
    the untrained model, from noise and from the method's own start; of the result; and of every
    kept step. path, trained: train.py's folder and its run.json. Raises BadInput."""
    result = path / f"{trained['method']}.safetensors"
    if not result.is_file():
        raise BadInput(f"{path} holds no {result.name}: it has not been saved yet, or pictures "
                       "alone were learned from; give a folder of generate.py's.")
    if not trained["flags"].get("weights"):
        adapter = adapter_file.read_adapter(result)
        taught = [adapter.meta.get("prompt", ""), *adapter.words]
        explain_strange_words(" ".join(read_prompts(args)), " ".join(taught))
    found = {}
    for name, settings in plan_samples(path, trained, result, args).items():
        found[name] = place / ("result" if name == path.name else slug(name))
        if not machine.agreed(is_made(found[name], settings)):
            make_samples(found[name], settings, name, args)
    return found


def plan_samples(path, trained, result, args):
    """{name: settings, as generate.py writes them} of all that is sampled for a folder."""
    plan = {NOISE: sampling(trained, result, args, scale=0.0, init="noise")}
    tuned = sampling(trained, result, args)
    if tuned["init"] == "inverted":
        plan[NOISE]["steps_trained"] = None  # step 0 of the curves starts as the others do
        plan[START] = tuned | {"scale": [0.0], "steps_trained": 0}
    plan[path.name] = tuned
    for kept in sorted(path.glob(f"steps/*/{result.name}")):
        if kept.parent.name.isdigit():
            plan[f"step {int(kept.parent.name)}"] = sampling(trained, kept, args)
    return plan


def sampling(trained, path, args, scale=1.0, init=None):
    """All that the samples of an adapter depend on."""
    adapter, flags = adapter_file.read_adapter(path), trained["flags"]
    story = read_story(adapter)
    init = init or ("inverted" if story["noise_prior"] else "noise")
    if init == "inverted" and adapter.latents is None:
        raise BadInput(f"{path} starts samples from its clip, and "
                       f"{adapter_file.clip_file(path)} is missing; put it back, or train again.")
    prompts, videos = read_prompts(args) or [flags["preview_prompt"]], []
    for number, prompt in enumerate(prompts):
        for seed in range(args.seeds):
            videos.append([sets.video_name(number, prompt, seed), prompt, seed])
    written = path.stat()
    return story | {
        "adapter": [str(path)], "scale": [scale], "init": init, "weights": flags.get("weights"),
        "frames": flags["frames"] if adapter.latents is None else adapter.latents.shape[1],
        "size": flags["size"], "fps": flags["fps"], "videos": videos,
        "steps_trained": story["step"] if scale else 0,
        "written": [written.st_size, written.st_mtime_ns]}


def read_prompts(args):
    """The lines of --prompts, checked, each once; [] without. Raises BadInput."""
    if not args.prompts:
        return []
    return [data.check_prompt(line) for line in dict.fromkeys(read_lines(args.prompts))]


def is_made(folder, settings):
    """Whether a folder holds these very samples, all of them: its settings are written last."""
    try:
        return read_json(folder / "settings.json") == json.loads(json.dumps(settings))
    except BadInput:
        return False


@torch.no_grad()
def make_samples(folder, s, name, args):
    """Sample into a folder, each process its share, as the settings s say. Raises BadInput."""
    process, processes = machine.place(args.device)
    if process == 0:
        (folder / "settings.json").unlink(missing_ok=True)
    check_weights(s["weights"])
    base = model.load(s["weights"], args.device, machine.default_precision(args.device))
    adapter = adapter_file.read_adapter(Path(s["adapter"][0]), base.unet)
    inverts = s["inverts"] if s["init"] == "inverted" else None
    if inverts:
        sampler.check_return(base.schedule, s["sampler"], s["sampling_steps"])
    invert = lambda: sampler.invert(base, adapter.latents[None].float(), s["inversion_steps"],
                                    progress=f"inverting for {name}")
    inverted = invert() if inverts == "base" else None  # before the motion is in the weights
    adapter_file.apply_adapters(base, [adapter], s["scale"])
    base.store_frozen(set(adapter.tensors))
    inverted = invert() if inverts == "tuned" else inverted
    factor, (H, W) = base.vae.config.factor, s["size"]
    shape = base.unet.config.in_channels, s["frames"], H // factor, W // factor
    files = {(prompt, seed): file for file, prompt, seed in s["videos"]}
    made = make_videos(
        base, list(files)[process::processes], starts(shape, inverted, s["noise_prior"]),
        steps=s["sampling_steps"], guidance=s["guidance"], method=s["sampler"],
        progress=f"sampling {name}")
    for job, video in made:
        media.write_video(folder / files[job], video, s["fps"])
    machine.gather({})  # until all processes are done
    if process == 0:
        write_json(folder / "settings.json", s)
    machine.agreed(None)
