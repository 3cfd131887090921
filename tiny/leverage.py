"""How much hold a set of layers has on motion: the loss at high noise while one clip is learned.

    python tiny/leverage.py                           # four clips, three sets of layers
    python tiny/leverage.py --weights DIR --novel 8   # of another model, eight random ones beside

What moves where is decided at high noise. So a set of layers that is to learn a motion must be able
to lower the loss there on a clip of it, and that is seen in seconds, before any sampling. Each step
draws its timestep and noise afresh; printed is the loss before and after on 64 draws that are never
learned from: of the clip itself, and of four things of other looks that move likewise, since a
motion that is learned must carry over to them.

Axes: B clips, C channels, F frames, h w latent.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import model  # noqa: E402
from lora import Part  # noqa: E402
from support.machine import keep_memory  # noqa: E402
from tiny import world  # noqa: E402

SETS = {
    "q k v": Part("temporal-attention-qkv"),
    "attention and feed-forward, LoRA": Part("temporal-attention-ff", rank=32),
    "all temporal": Part("temporal"),
}
FREE = torch.tensor(world.UNNAMED)
LOW = 0.75  # timesteps lie in the highest quarter of the schedule


def encode(parts, scenes, briefly=False):
    """Latents (B, C, F, h, w) of scenes, and the states (B, N, D) of captions that say 'moving';
    briefly, as one describes a clip to learn from: the shape alone."""
    captions = [f"a {world.SHAPES[i]} moving" for i in scenes.shape]
    captions = captions if briefly else world.captions(scenes.but(motion=FREE.expand(len(scenes))))
    with torch.no_grad():
        return parts.vae.encode_video(world.render(scenes)), parts.text(captions)


def loss_at(parts, latents, text, seed):
    """Mean squared error of one draw of timestep and noise for each of B clips."""
    g, T = torch.Generator().manual_seed(seed), parts.schedule.num_train_timesteps
    t = torch.randint(int(LOW * T), T, (len(latents),), generator=g)
    noise = torch.randn(latents.shape, generator=g)
    x, goal = parts.schedule.add_noise(latents, noise, t), parts.schedule.target(latents, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        out = parts.unet(x, t, text)
    return ((out.float() - goal) ** 2).mean()


@torch.no_grad()
def held_out(parts, *encoded):
    """The loss on 64 draws that no step of learning sees."""
    latents, text = (part.repeat(16 // len(part), *[1] * (part.dim() - 1)) for part in encoded)
    return sum(loss_at(parts, latents, text, 10**6 + i).item() for i in range(4)) / 4


def measure(weights, scenes, part, rate, steps):
    """Held-out losses (2, 2) of the first of five scenes, before and after learning its clip, and
    of the other four."""
    torch.manual_seed(0)
    parts = model.load(weights)
    clip = encode(parts, scenes[torch.arange(1)], briefly=True)
    others = encode(parts, scenes[torch.arange(1, 5)])
    losses = lambda: [held_out(parts, *clip), held_out(parts, *others)]
    before = losses()
    parameters = list(part.learner(parts, seed=0).parameters().values())
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    for step in range(steps):
        loss_at(parts, *clip, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor([before, losses()]).T


def five(motion, seed):
    """Five scenes of a motion, at one place and of one size; the first's look is none of the
    others'."""
    g = torch.Generator().manual_seed(seed)
    scenes = world.scenes_of(motion, 40, g)
    looks = torch.stack([scenes.colour, scenes.shape, scenes.background], 1)
    other = (looks != looks[:1]).all(1).nonzero()[:4, 0]
    scenes = scenes[torch.cat([torch.zeros(1, dtype=torch.long), other])]
    return scenes.but(**{n: getattr(scenes, n)[:1].expand(5) for n in ("x", "y", "reach")})


def main():
    """A row for each set of layers and rate: loss before and after, mean over the clips."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    weights = Path(__file__).parent / "weights"
    add("--weights", type=Path, default=weights, help="the model (default: tiny/weights)")
    add("--motions", nargs="*", default=["hopping", "moving along a square"], choices=world.NOVEL,
        metavar="MOTION", help="named novel motions (default: hopping and the square)")
    add("--novel", type=int, default=2, help="random novel motions (default: 2)")
    add("--sets", nargs="*", default=list(SETS), choices=SETS, help="default: all three")
    add("--rates", nargs="*", type=float, default=[1e-3], help="learning rates (default: 1e-3)")
    add("--steps", type=int, default=300, help="steps a clip (default: 300)")
    args = parser.parse_args()
    keep_memory()
    motions = [*args.motions, *(f"novel:{i}" for i in range(args.novel))]
    for chosen in args.sets:
        for rate in args.rates:
            rows = torch.stack([
                measure(args.weights, five(name, i), SETS[chosen], rate, args.steps)
                for i, name in enumerate(motions)])  # (motions, clip and others, before and after)
            for what, row in zip(("the clip", "other looks"), rows.mean(0).tolist()):
                print(f"{chosen}, {rate:.0e}: {what} {row[0]:.4f} → {row[1]:.4f} "
                      f"({row[1] / row[0] - 1:+.0%})", flush=True)


if __name__ == "__main__":
    main()
