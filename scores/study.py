"""What people choose: a page of blind pairs, and the counting of what its visitors saved.

    python eval.py out/a out/b --user-study              # study.html, and study-key.json
    python eval.py --votes votes*.json --key out/a/study-key.json
"""
import math
import random
from itertools import combinations
from pathlib import Path

from scores.page import embed, write_page
from support.files import BadInput, read_json, say, write_json

RATES = range(1, 6)
STUDY = "save the votes again from the study's page"


def study(out, runs, ratings, question):
    """Write study.html: every two runs' videos of one prompt and seed. Which is which stands in
    study-key.json alone; the page shuffles pairs and sides for each visitor. Raises BadInput, above
    all where what two trainings brought would not be compared."""
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
        trained = [run.training.get("folder", run.path) for run in (a, b)]
        if len(pairs) == before and trained[0] != trained[1] and (a.training or b.training):
            names = " and ".join(Path(folder).name for folder in trained)
            raise BadInput(f"--user-study: {names} have no prompt and seed in common to be "
                           "compared by; give --prompts FILE, from which train.py's folders are "
                           "all sampled.")
    if not pairs:
        raise BadInput("--user-study needs two runs with videos of the same prompts and seeds.")
    clips = [r for run in runs for r in run.references if r.shown]
    reference = embed(clips[0].video, clips[0].fps) if clips else None
    write_page(out / "study.html", "study.html", {
        "pairs": pairs, "ratings": ratings, "question": question, "reference": reference})
    write_json(out / "study-key.json", key)
    print(f"written: {out / 'study-key.json'}")


# ------------------------------------------------------------------------------------------------
# Counting


def count_votes(paths, key=None):
    """Print the preference shares of every two runs with a p-value (NewMove), and mean ratings
    (VMC, Customize-A-Video), over all votes.json given. Raises BadInput."""
    key = key or paths[0].parent / "study-key.json"
    for path in (*paths, key):
        if not path.is_file():
            raise BadInput(f"{path} does not exist, or is no file; give the votes.json that the "
                           "study's page saved, and --key the study-key.json that was written with "
                           "the page.")
    names, sessions = read_key(key), set()
    choices, ratings = {}, {}
    for path in paths:
        session, votes = read_votes(path, names)
        if session and session in sessions:
            say(f"{path} is the same visit as another file, and not counted twice")
            continue
        sessions.add(session)
        for vote in votes:
            chosen, other = names[vote["chosen"]], names[vote["other"]]
            choices.setdefault(tuple(sorted((chosen, other))), []).append(chosen)
            for side, rates in (vote.get("ratings") or {}).items():
                for kind, value in rates.items():
                    ratings.setdefault((names[side], kind), []).append(value)
    if not choices:
        raise BadInput(f"no votes in {', '.join(map(str, paths))}; {STUDY}.")
    for (a, b), votes in choices.items():
        wins, n = votes.count(a), len(votes)
        print(f"{a} {100 * wins / n:.1f} %, {b} {100 - 100 * wins / n:.1f} % of {n} votes, "
              f"p = {binomial_p(wins, n):.3g}")
    for (run, kind), values in sorted(ratings.items()):
        print(f"{run}: {kind} {sum(values) / len(values):.2f} of 5 ({len(values)} ratings)")


def read_key(path):
    """{a video's number: its run}. Raises BadInput."""
    names = read_json(path)
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise BadInput(f"{path} is no study's key; give the study-key.json that was written with "
                       "the page.")
    return names


def read_votes(path, names):
    """The visit's number and the votes of a file, all of which may be counted. Raises BadInput."""
    file = read_json(path)
    votes, session = file.get("votes"), file.get("session")
    if not isinstance(votes, list) or not isinstance(session, (str, type(None))):
        raise BadInput(f"{path} holds no list of votes; {STUDY}.")
    for number, vote in enumerate(votes, 1):
        if reason := unfit(vote, names):
            raise BadInput(f"{path}: vote {number}: {reason}; {STUDY}.")
    return session, votes


def unfit(vote, names):
    """Why a vote cannot be counted; None where it can."""
    if not isinstance(vote, dict):
        return f"{str(vote)[:40]!r} is none"
    sides = vote.get("chosen"), vote.get("other")
    for side in sides:
        if not isinstance(side, str) or side not in names:
            return f"{str(side)[:40]!r} is not in the study's key; --key names another"
    if names[sides[0]] == names[sides[1]]:
        return f"both sides are {names[sides[0]]}'s"
    ratings = vote.get("ratings") or {}
    if not isinstance(ratings, dict):
        return f"ratings are {str(ratings)[:40]!r}, wanted a side's"
    for side, rates in ratings.items():
        if side not in sides or not isinstance(rates, dict):
            return f"a rating of {side[:40]!r}, which is not shown, or without numbers"
        for kind, value in rates.items():
            if type(value) is not int or value not in RATES:
                return f"{kind[:40]} is rated {str(value)[:40]}, wanted 1 to 5"
    return None


def binomial_p(wins, n):
    """Two-sided exact binomial test against a fair coin: the probability of a count at least as far
    from n/2 as `wins`."""
    far = abs(wins - n / 2)
    return min(1.0, sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= far) / 2**n)
