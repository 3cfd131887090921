"""Prompts: from flags and files, and what of them, and of clips, the tiny model knows nothing of.

Axes: F frames, H W picture.
"""
import re

from support.files import BadInput, say


def read_prompts(prompt, path, style):
    """The prompt, or the lines of a text file, each with the style behind it; [] for neither.
    Raises BadInput for a file that gives none."""
    if path is None:
        lines = [prompt] if prompt else []
    else:
        lines = read_lines(path)
    return [f"{line} {style or ''}".strip() for line in lines]


def read_lines(path):
    """The lines of a text file that are not empty, of which it has some. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist, or is no file; give a text file with one prompt a "
                       "line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save it as that.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{path} holds no prompts; write one a line.")
    return lines


def strange_words(text, taught=""):
    """The words of a text that the tiny model met neither in its world's captions nor in the text
    `taught`, and those that it knows; both sorted."""
    from tiny import world  # needed here alone

    parts = [*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, *world.BASE, *world.SPEEDS,
             *world.UNNAMED_WORDS, world.caption("orange", background="grey"),
             world.caption()]
    known = _words(" ".join(parts))
    return sorted(_words(text) - known - _words(taught)), sorted(known)


def explain_strange_words(text, taught=""):
    """Say in one line which words of a text the tiny model cannot read, where there are any."""
    strange, known = strange_words(text, taught)
    if strange:
        say(f"note: the tiny model has never met {', '.join(strange)}; it knows {', '.join(known)}"
            " and what it was taught with an adapter")


def explain_training(run):
    """Say, a line each, what of a run's captions, preview prompt and clips the tiny model knows
    nothing of."""
    words = " ".join(part.text for part in run.recipe.parts.values() if hasattr(part, "text"))
    captions = " ".join(clip.prompt for clip in (*run.clips, *run.images))
    strange, _ = strange_words(captions, words)
    if strange:
        say(f"note: the tiny model has never met {', '.join(strange)} of the captions; such a word "
            "may be learned from the clip, if it names the motion")
    explain_strange_words(run.flags.preview_prompt, f"{captions} {words}")
    for clip in run.clips:
        apart = clip.video.amax(0) - clip.video.amin(0)  # (F, H, W): red, green and blue of 2
        if (apart < 0.2).float().mean() > 0.99:
            say(f"warning: {clip.path} has no colour, and motions of grey things come over "
                "about half as well to the tiny model; a coloured one is better")


def _words(text):
    return set(re.findall(r"[^\W_]+", text.lower()))
