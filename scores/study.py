"""User study: a page of blind video pairs, and the count of its votes.

    python eval.py out/a out/b --user-study              # study.html and study-key.json
    python eval.py --votes votes*.json --key out/evaluation/study-key.json
"""
import json
import math
import random
from itertools import combinations
from pathlib import Path

from scores.page import embed, fill
from support.files import BadInput, log, print_line, read_json, reading

RATINGS = range(1, 6)


def build_study(runs, ratings, question):
    """{file name: text} of study.html and study-key.json. The page compares every two runs on their
    common prompts and seeds, and shuffles pairs and sides for each visitor. Only the key has the
    names of the runs. Raises BadInput, e.g. if two trained models have no prompt in common."""
    rng, pairs, key = random.Random(), [], {}
    for a, b in combinations(runs, 2):
        of_b = {(s.prompt, s.seed): s for s in b.samples}
        common = [(s, of_b[s.prompt, s.seed]) for s in a.samples if (s.prompt, s.seed) in of_b]
        one, two = (Path(run.training.folder) if run.training else run.path for run in (a, b))
        if not common and one != two and (a.training or b.training):
            raise BadInput(f"--user-study: {one.name} and {two.name} have no prompt and seed in "
                           "common; give --prompts FILE, with prompts for all of train.py's "
                           "folders.")
        for samples in common:
            sides = []
            for run, s in zip((a, b), samples):
                sides.append({"id": f"{rng.getrandbits(48):x}", "video": embed(s.video, s.fps)})
                key[sides[-1]["id"]] = run.name
            sides.sort(key=lambda side: side["id"])
            pairs.append({"prompt": samples[0].prompt, "sides": sides})
    if not pairs:
        raise BadInput("--user-study: expected two runs with videos of the same prompts and seeds.")
    references = [r for run in runs for r in run.references]
    reference = embed(references[0].video, references[0].fps) if references else None
    page = fill("study.html", {
        "pairs": pairs, "ratings": ratings, "question": question, "reference": reference})
    return {"study.html": page, "study-key.json": json.dumps(key, indent=1) + "\n"}


def count_votes(paths, key=None):
    """Print the preference for each run of a pair with a p-value (NewMove), and the mean ratings
    (VMC, Customize-A-Video), over all votes files. Raises BadInput."""
    names = read_json(key or paths[0].parent / "study-key.json")
    choices, ratings, sessions = {}, {}, set()
    for path in paths:
        with reading(path, "save the votes again on the study's page, and give its --key"):
            saved = read_json(path)
            if saved.get("session") and saved["session"] in sessions:
                log(f"{path} skipped: another file has the same session")
                continue
            sessions.add(saved.get("session"))
            for vote in saved["votes"]:
                chosen, other = names[vote["chosen"]], names[vote["other"]]
                if chosen == other or not isinstance(chosen + other, str):
                    raise ValueError(f"both videos of a vote belong to {chosen}")
                choices.setdefault(tuple(sorted((chosen, other))), []).append(chosen)
                for side, values in (vote.get("ratings") or {}).items():
                    for kind, value in values.items():
                        if value not in RATINGS:
                            raise ValueError(f"a rating is {value!r}, expected 1 to 5")
                        ratings.setdefault((names[side], str(kind)), []).append(value)
    if not choices:
        raise BadInput(f"{', '.join(map(str, paths))}: no votes found; save them on the study's "
                       "page after the last pair.")
    for (a, b), votes in choices.items():
        wins, n = votes.count(a), len(votes)
        print_line(f"{a} {100 * wins / n:.1f} %, {b} {100 - 100 * wins / n:.1f} % of {n} votes, "
                   f"p = {binomial_p(wins, n):.3g}")
    for (run, kind), values in sorted(ratings.items()):
        mean = sum(values) / len(values)
        print_line(f"{run}: {kind} {mean:.2f} of 5 ({len(values)} ratings)")


def binomial_p(wins, n):
    """The two-sided exact binomial test against a fair coin: the probability of a count at least as
    far from n/2 as `wins`."""
    fewer = min(wins, n - wins)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
