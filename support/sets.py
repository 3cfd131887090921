"""A set of videos on disk: settings.json, the videos that it lists, sheet.png. A set is never
replaced unasked, and nothing is deleted that no set lists.
"""
import itertools
from pathlib import Path

from support.files import BadInput, check_folder_out, read_json, say, slug, write_json


def video_name(number, prompt, seed):
    """A video's name in its folder; number: of its prompt."""
    return f"{number:03d}-{slug(prompt)}-seed{seed}.mp4"


def find_folder(out, overwrite=False):
    """Where a set may be written: --out, or out-2, out-3, … where sets are. Raises BadInput where
    --out holds anything else."""
    check_folder_out(out)
    out = out if out.name else out.resolve()
    for number in itertools.count(1):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        names = [path.name for path in inside if not path.name.startswith(".")]
        if not names or overwrite and "settings.json" in names:
            return folder
        if number == 1 and "settings.json" not in names:
            raise BadInput(f"--out {out} holds something else than a set of videos, such as "
                           f"{names[0]}; give another folder.")


def begin(out, overwrite, settings):
    """Take such a folder and write the settings, with the list `videos`, into it; returns it."""
    while True:
        folder = find_folder(out, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            remove(folder)
        try:
            (folder / "settings.json").touch(exist_ok=False)
        except FileExistsError:  # another command was quicker
            continue
        write_json(folder / "settings.json", settings)
        if folder != out:
            say(f"{out} holds a set already, so this one goes to {folder}; --overwrite replaces it")
        return folder


def check(folder):
    """Raises BadInput where a set was deleted or moved while it was made."""
    if not (folder / "settings.json").is_file():
        raise BadInput(f"{folder} was deleted or moved while its videos were made; run it again.")


def remove(folder):
    """Remove the videos that the folder's settings.json lists, its sheet, and at last itself."""
    settings = folder / "settings.json"
    if not settings.is_file():
        return
    listed = read_json(settings).get("videos")
    for row in listed if isinstance(listed, list) else []:
        name = str(row[0]) if isinstance(row, list) and row else ""
        if Path(name).name == name and name.endswith(".mp4"):
            (folder / name).unlink(missing_ok=True)
    (folder / "sheet.png").unlink(missing_ok=True)
    settings.unlink()
