"""What people choose: a page of blind pairs, and the counting of what its visitors saved.

    python eval.py out/a out/b --user-study              # study.html, and study-key.json
    python eval.py --votes votes*.json --key out/a/study-key.json
"""
import json
import math
import random
from itertools import combinations
from pathlib import Path

from scores.page import embed, fill
from support.files import BadInput, log, print_line, read_json, reading

RATES = range(1, 6)


def study(runs, ratings, question):
    """{file name: text} of study.html, with a pair of videos per two runs, prompt and seed, and of
    study-key.json, which alone holds the runs' names. The page shuffles pairs and sides for each
    visitor. Raises BadInput, e.g. where two trained models have no prompt in common."""
    chance, pairs, key = random.Random(), [], {}
    for a, b in combinations(runs, 2):
        other, before = {(s.prompt, s.seed): s for s in b.samples}, len(pairs)
        for one in a.samples:
            if (one.prompt, one.seed) not in other:
                continue
            sides = []
            for name, s in ((a.name, one), (b.name, other[one.prompt, one.seed])):
                sides.append({"id": f"{chance.getrandbits(48):x}", "video": embed(s.video, s.fps)})
                key[sides[-1]["id"]] = name
            sides.sort(key=lambda side: side["id"])
            pairs.append({"prompt": one.prompt, "sides": sides})
        trained = [run.trained.folder if run.trained else run.path for run in (a, b)]
        if len(pairs) == before and trained[0] != trained[1] and (a.trained or b.trained):
            names = " and ".join(Path(folder).name for folder in trained)
            raise BadInput(f"--user-study: {names} have no prompt and seed in common to be "
                           "compared by; give --prompts FILE, from which train.py's folders are "
                           "all sampled.")
    if not pairs:
        raise BadInput("--user-study needs two runs with videos of the same prompts and seeds.")
    clips = [r for run in runs for r in run.references]
    reference = embed(clips[0].video, clips[0].fps) if clips else None
    page = fill("study.html", {
        "pairs": pairs, "ratings": ratings, "question": question, "reference": reference})
    return {"study.html": page, "study-key.json": json.dumps(key, indent=1) + "\n"}


# ------------------------------------------------------------------------------------------------
# Counting


def count_votes(paths, key=None):
    """Print the preference shares of every two runs with a p-value (NewMove), and mean ratings
    (VMC, Customize-A-Video), over all votes.json given. Raises BadInput."""
    names = read_json(key or paths[0].parent / "study-key.json")
    choices, ratings, sessions = {}, {}, set()
    for path in paths:
        with reading(path, "save the votes again from the study's page, and give its --key"):
            file = read_json(path)
            if file.get("session") and file["session"] in sessions:
                log(f"{path} is the same visit as another file, and not counted twice")
                continue
            sessions.add(file.get("session"))
            for vote in file["votes"]:
                a, b = names[vote["chosen"]], names[vote["other"]]
                if a == b or not isinstance(a + b, str):
                    raise ValueError(f"both sides are {a}'s")
                choices.setdefault(tuple(sorted((a, b))), []).append(a)
                for side, rates in (vote.get("ratings") or {}).items():
                    for kind, value in rates.items():
                        ratings.setdefault((names[side], str(kind)), []).append(RATES.index(value))
    if not choices:
        raise BadInput(f"no votes in {', '.join(map(str, paths))}.")
    for (a, b), votes in choices.items():
        wins, n = votes.count(a), len(votes)
        print_line(f"{a} {100 * wins / n:.1f} %, {b} {100 - 100 * wins / n:.1f} % of {n} votes, "
              f"p = {binomial_p(wins, n):.3g}")
    for (run, kind), values in sorted(ratings.items()):
        print_line(f"{run}: {kind} {1 + sum(values) / len(values):.2f} of 5 ({len(values)} ratings)")


def binomial_p(wins, n):
    """Two-sided exact binomial test against a fair coin: the probability of a count at least as far
    from n/2 as `wins`."""
    far = abs(wins - n / 2)
    return min(1.0, sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= far) / 2**n)
