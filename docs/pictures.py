"""Make the README's pictures with the commands that it shows.

    python docs/pictures.py            # assets/result.gif, assets/methods.png, assets/base.png

Every method learns the bundled clip and is asked for the prompts of assets/prompts.txt; what is
made is kept under out/pictures and used again. The pictures show all that was made, first try each.
"""
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import train  # noqa: E402, F401  (fills METHODS)
from support import media  # noqa: E402
from support.files import publish, read_json  # noqa: E402
from support.recipe import METHODS  # noqa: E402

OUT = ROOT / "out" / "pictures"
CLIP = ROOT / "assets" / "eight.mp4"
PROMPTS = ROOT / "assets" / "prompts.txt"
BASE_PROMPTS = (  # of kinds of motion that the base knows, the last without a name
    "a red star moving left on a grey background",
    "a blue ring moving right on a green checkered background",
    "a yellow cross moving up on a purple wavy background",
    "a white circle moving down on a blue striped background",
    "an orange square growing on a brown dotted background",
    "a cyan triangle shrinking on a grey background",
    "a pink star spinning on a blue striped background",
    "a green circle moving in a circle on a purple wavy background",
    "a red cross swinging from side to side on a brown dotted background",
    "a yellow ring bobbing up and down on a grey background",
    "a blue square standing still while the camera pans on a brown dotted background",
    "a white star moving about on a green checkered background",
)


def run(*command):
    """One of the repository's commands."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def videos_of(folder):
    """[(prompt, video (3, F, H, W))] of a folder of generate.py's."""
    found = []
    for file, prompt, _ in read_json(folder / "settings.json")["videos"]:
        found.append((prompt, media.read_video(folder / file, 16, (64, 64), 8, learn=False)))
    return found


def make(method):
    """What a method makes of the prompts, after the bundled clip."""
    made = OUT / method / "videos"
    if not (made / "sheet.png").is_file():
        words = METHODS[method].parts.get("word")
        caption, prompts = CLIP.with_suffix(".txt").read_text(), PROMPTS.read_text()
        if METHODS[method].prior:  # captions of prior clips tell looks (docs/claims.md, 8 and 9)
            caption = "a pink circle moving in a figure eight on a purple wavy background"
        if words:  # what is learned is a word
            caption, prompts = (text.replace("moving in a figure eight", f"doing the {words.text}")
                                for text in (caption, prompts))
        run("train.py", "--method", method, "--video", CLIP, "--prompt", caption,
            "--out", OUT / method / "run", "--preview-every", 0, "--overwrite")
        listed = OUT / method / "prompts.txt"
        listed.write_text(prompts)
        run("generate.py", "--adapter", OUT / method / "run" / f"{method}.safetensors",
            "--prompts", listed, "--out", made, "--overwrite")
    return videos_of(made)


def label(texts, height, width, size=13):
    """A white strip with lines of text, (height, width, 3)."""
    strip = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(strip)
    top = (height - len(texts) * (size + 4)) // 2
    for i, text in enumerate(texts):
        draw.text((8, top + i * (size + 4)), text, fill="black", font=font)
    return np.asarray(strip)


def row(text, videos, frames):
    """A labelled row: some frames of each video, side by side."""
    cells = []
    for video in videos:
        cells += [*media.to_pixels(media.every_nth(video, frames))]
        cells.append(np.full((64, 6, 3), 255, "uint8"))
    return np.concatenate([label(text, 66, 170), np.pad(
        np.concatenate(cells, 1), ((1, 1), (0, 0), (0, 0)), constant_values=255)], 1)


def save(path, rows):
    """Rows of pictures as one PNG."""
    with publish(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part, optimize=True)
    print(path)


def moving(path, clip, videos, scale=2):
    """The clip, and apart from it the videos, side by side as a GIF."""
    gap = np.full((16, 64, 8, 3), 255, "uint8")
    parts = [media.to_pixels(clip), gap]
    for video in videos:
        parts += [gap[:, :, :4], media.to_pixels(video)]
    pixels = np.concatenate(parts, 2).repeat(scale, 1).repeat(scale, 2)
    with publish(path) as part:
        imageio.imwrite(part, pixels, duration=125, loop=0)
    print(path)


def main():
    """All pictures."""
    clip = media.read_video(CLIP, 16, (64, 64), 8)
    rows = [row(["the clip"], [clip], 16)]
    wide = None
    for method in METHODS:
        made = make(method)
        if method == "vmc":
            moving(ROOT / "assets" / "result.gif", clip, [video for _, video in made])
        rows.append(row([method], [video for _, video in made], 4))
        wide = rows[-1].shape[1]
    rows[0] = np.pad(rows[0], ((0, 0), (0, max(0, wide - rows[0].shape[1])), (0, 0)),
                     constant_values=255)[:, :wide]
    save(ROOT / "assets" / "methods.png", rows)
    listed = OUT / "base-prompts.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(BASE_PROMPTS) + "\n")
    if not (OUT / "base" / "sheet.png").is_file():
        run("generate.py", "--prompts", listed, "--out", OUT / "base", "--overwrite")
    rows = []
    for prompt, video in videos_of(OUT / "base"):
        thing, _, ground = prompt.partition(" on a ")
        rows.append(row([*wrap(thing), f"on {ground.removesuffix(' background')}"], [video], 8))
    save(ROOT / "assets" / "base.png", rows)


def wrap(text, most=24):
    """A text in lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    main()
