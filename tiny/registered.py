"""The papers' claims as measurements on the tiny world, written down before the first result.

    python tiny/claims.py --register      # the page that says what is compared

`tiny/claims.py` trains, reads and judges; what it does is all here. An arm is a set of trials, one
a motion and seed of training; a measurement is the difference between two arms that differ in one
thing, sampled alike; a claim is one or more of them. What is compared is not changed after a
result, but for a mistake, at 19; wording, sources and limits are where they were wrong or short,
and FINDINGS says what a second look found, and what was corrected.
"""
from dataclasses import dataclass, replace

from tiny import lab
from tiny.lab import Cell, Trial

MOTIONS = lab.MOTIONS[:8]
NAMED, RANDOM = MOTIONS[:4], MOTIONS[4:]
POSTURES = tuple(f"posture:{i}" for i in range(8))
SEEDS = (0, 1)
RATES_FROM = ("novel:100", "novel:101")  # on which tiny/rates.py chose rates, once
MARGIN = 0.05  # of "no worse than", for shares and correlations
LEVEL = 0.9  # of the base's looks: where methods are compared at an equal appearance score

# ------------------------------------------------------------------------------------------------
# The arms: each is trained on every motion with both seeds

STEPS, KEEP = 200, 50  # of all that learns from ten clips; adapters are kept every KEEP of them
LONG = (f"steps={STEPS}",)
PRIOR = (*LONG, "prior_clips=16")
NEWMOVE = dict(method="newmove", clips=10)
ABSORBED = dict(method="customize-a-video", settings=("steps=300", "first=100"), keep=50)
SPATIAL_QKV = r"motion.layers=.*\.attentions\..*attn[12]\.to_[qkv]\.weight"


def newmove(*settings, **more):
    """NewMove with something changed."""
    return NEWMOVE | {"settings": PRIOR + settings} | more


def absorbed(*settings, **more):
    """Customize-A-Video with something changed."""
    return ABSORBED | {"settings": ABSORBED["settings"] + settings} | more


ARMS = {
    "base": dict(method="base"),
    "newmove": newmove(keep=KEEP),
    "newmove, no temporal layers": newmove("motion.layers=cross-attention-kv"),
    "newmove, temporal layers alone": newmove("motion.layers=temporal"),
    "newmove, all layers": newmove("motion.layers=all"),
    "newmove, word learns": newmove("word.vectors=1"),
    "newmove, α 0": newmove("alpha=0"),
    "newmove, α 1": newmove("alpha=1"),
    "newmove, other prior": newmove(prior="resting"),
    "newmove, generated prior": newmove(prior="generated"),
    "newmove, no prior": newmove(prior="none"),
    "newmove, LoRA": newmove("motion.rank=32", "motion.lr=3e-3"),
    "newmove, one clip": newmove(clips=1),
    "dreambooth": dict(method="dreambooth", clips=10, settings=PRIOR, keep=KEEP),
    "tune-a-video": dict(method="tune-a-video", clips=10, settings=LONG, keep=KEEP),
    "custom-diffusion": dict(method="custom-diffusion", clips=10, settings=PRIOR, keep=KEEP),
    "textual-inversion": dict(method="textual-inversion", clips=10, settings=LONG,
                              keep=KEEP),
    "motiondirector": dict(method="motiondirector", clips=10, settings=LONG, keep=KEEP),
    "motiondirector, β 0": dict(method="motiondirector", clips=10,
                                settings=(*LONG, "beta=0")),
    "motiondirector, β 2": dict(method="motiondirector", clips=10,
                                settings=(*LONG, "beta=2")),
    "coupled": dict(method="coupled", clips=10, settings=LONG),
    "motiondirector, one clip": dict(method="motiondirector"),
    "vmc": dict(method="vmc"),
    "vmc, spatial q k v": dict(method="vmc", settings=(SPATIAL_QKV,)),
    "vmc, l2": dict(method="vmc", settings=("loss=residual-l2",)),
    "vmc, weighted l2": dict(method="vmc",
                             settings=("loss=residual-l2-weighted", "align=epsilon")),
    "vmc, faithful captions": dict(method="vmc", looks=True),
    "vmc, backward": dict(method="vmc", backward=True),
    "customize-a-video": absorbed(),
    "customize-a-video, no absorber": absorbed("look.layers=none"),
    "customize-a-video, word absorber": absorbed("look.layers=none", "look_word.vectors=4"),
    "customize-a-video, both absorbers": absorbed("look_word.vectors=4"),
    "customize-a-video, borrowed absorber": absorbed(),  # of "motiondirector, one clip"; trials_of
    "posture, patches": absorbed(keep=0),
    "posture, whole frames": absorbed(keep=0, patch=(1.0, 1.0)),
}
TABLE_3 = ("textual-inversion", "custom-diffusion", "dreambooth", "tune-a-video", "motiondirector")
CURVES = ("newmove", *TABLE_3)  # arms with kept steps, for an equal appearance score
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
ALPHAS = {0: "newmove, α 0", 0.5: "newmove", 1: "newmove, α 1"}
TEN = (*CURVES, "coupled")  # the methods as they are, in the chart of motion against appearance
ONE = ("newmove, one clip", "motiondirector, one clip", "vmc", "customize-a-video")
METHODS = TEN + ONE


def trials_of(arm):
    """{(motion, seed): trial} of an arm."""
    motions = POSTURES if arm.startswith("posture") else MOTIONS
    trials = {}
    for motion in motions:
        for seed in SEEDS:
            trial = Trial(motion=motion, seed=seed, **ARMS[arm])
            if arm.endswith("borrowed absorber"):
                look = Trial("motiondirector", motion, seed)
                trial = replace(trial, borrows=look)
            trials[motion, seed] = trial
    return trials


def look_of_next(trial, clips=1):
    """The look of the next motion's clip, or of a picture of it."""
    other = MOTIONS[(MOTIONS.index(trial.motion) + 1) % len(MOTIONS)]
    return Trial("motiondirector", other, trial.seed, clips)


JOINS = {  # what may join a trial: a function of it, to the fields of its cell
    "look of another clip": lambda t: {"look": look_of_next(t)},
    "look of another clip, off": lambda t: {"look": look_of_next(t), "strength": 0.0},
    "look of a picture": lambda t: {"look": look_of_next(t, 0)},
    "look of a picture, off": lambda t: {"look": look_of_next(t, 0), "strength": 0.0},
    "a camera that pans": lambda t: {"motion": Trial(
        "customize-a-video", "standing still while the camera pans", t.seed, words="moving",
        settings=ABSORBED["settings"])},
}

# ------------------------------------------------------------------------------------------------
# A measurement


@dataclass(frozen=True)
class Side:
    """An arm as it is sampled; `joins` names what acts beside it; at `equal` the kept step is used
    at which the arm's looks are nearest to LEVEL of the base's."""

    arm: str
    cell: Cell = Cell()
    joins: str = ""
    equal: bool = False

    def cell_for(self, trial):
        """The cell of one trial."""
        return replace(self.cell, **JOINS[self.joins](trial)) if self.joins else self.cell

    def __str__(self):
        c, how = self.cell, [self.arm]
        how += ["untuned"] * (not c.tuned) + ["its own start"] * (c.start == "own")
        how += [f"step {c.step}"] * (c.step > 0) + [f"scale {c.scale:g}"] * (c.scale != 1)
        how += ["open prompts"] * c.open + [self.joins] * bool(self.joins)
        return " · ".join(how + ["equal looks"] * self.equal)


@dataclass(frozen=True)
class Measure:
    """The paper's side: the mean of more − less of a figure is above `above`. A side that is None
    counts 0. `listed` names a function of LISTS in place of the two. `why` says why the sides
    differ in more than one setting, where they do."""

    figure: str
    more: Side = None
    less: Side = None
    above: float = 0.0
    listed: str = ""
    motions: tuple = ()  # only these
    why: str = ""

    def __str__(self):
        if self.listed:
            return f"{self.listed} > {self.above:g}"
        if self.more is None:
            return f"{self.figure}: [{self.less}] < {-self.above:g}"
        sides = " − ".join(f"[{side}]" if side else "0" for side in (self.more, self.less))
        return f"{self.figure}: {sides.removesuffix(' − 0')} > {self.above:g}"


@dataclass(frozen=True)
class Claim:
    """A claim, where it is from, the paper's figures, how it is measured here, and what of it this
    world cannot test."""

    text: str
    source: str
    figures: str
    measures: tuple
    limits: str = ""


def better(figure, more, less, above=0.0, **how):
    """more − less > above; sides may be given as the names of arms, sampled alike."""
    cell = how.pop("cell", Cell())
    sides = [Side(s, cell) if isinstance(s, str) else s for s in (more, less)]
    return Measure(figure, *sides, above=above, **how)


def not_worse(figure, one, other, **how):
    """one − other > −MARGIN."""
    return better(figure, one, other, -MARGIN, **how)


OWN, OPEN = Cell(start="own"), Cell(open=True)
UNTUNED = Cell(tuned=False, start="own")
INVERTED = ("tune-a-video", "vmc", "motiondirector, one clip")  # arms whose own start is no noise
NM, CAV, MD1 = "newmove", "customize-a-video", "motiondirector, one clip"
PHI = ("latents: log of (distance of one motion in two looks / distance of two motions in one "
       "look), before φ less after")
HALF = ("steps until half of the gain in agreement: the four bendier motions less the four "
        "smoother, in order, where both gain 0.2")
LATE = "the absorber's hundred steps aside, both motions learn for 200"


def own(arm, **how):
    """An arm from its method's own start."""
    return Side(arm, OWN if arm in INVERTED else Cell(), **how)


def table_3(figure, above, equal):
    """NewMove against each of its five rivals, from each method's own start."""
    why = "Tune-A-Video starts from the inverted clip"
    return tuple(Measure(figure, own(NM, equal=equal), own(arm, equal=equal), above,
                         why=why if arm in INVERTED else "") for arm in TABLE_3)


def absorbers(figure, cell):
    """Each absorber against none."""
    none = Side(f"{CAV}, no absorber", replace(cell, step=200))
    arms = (CAV, f"{CAV}, word absorber", f"{CAV}, both absorbers")
    return tuple(Measure(figure, Side(arm, cell), none, why=LATE) for arm in arms)


CLAIMS = {
    1: Claim("The temporal layers are needed: spatial ones alone are not enough",
             "NewMove, Table 2", "accuracy 70.6 with, 22.7 without", (
                 better("agreement", NM, f"{NM}, no temporal layers"),)),
    2: Claim("Keys and values of the cross-attention raise accuracy over temporal layers alone",
             "NewMove, Table 2", "70.6 with, 62.3 without", (
                 better("agreement", NM, f"{NM}, temporal layers alone"),)),
    3: Claim("Tuning all spatial layers too raises copying", "NewMove, Table 2",
             "copying 17.0 all, 8.7 K, V", (better("copy", f"{NM}, all layers", NM),)),
    4: Claim("Training the word's vector raises accuracy and copying", "NewMove, Table 2",
             "accuracy 75.5 against 70.6, copying 22.7 against 8.7", (
                 better("agreement", f"{NM}, word learns", NM),
                 better("copy", f"{NM}, word learns", NM))),
    5: Claim("Coarse-noise timesteps raise accuracy and lower copying; more α, more of it",
             "NewMove, Table 2", "accuracy 70.6 (α 0.5) against 66.9 (uniform), copying 8.7 "
             "against 15.4", (
                 better("agreement", NM, f"{NM}, α 0"), better("copy", f"{NM}, α 0", NM),
                 better("agreement", f"{NM}, α 1", NM), better("copy", NM, f"{NM}, α 1")),
             "The paper has uniform timesteps and one α; that α = 1 is more of the same is ours."),
    6: Claim("Prior clips: similar above other above generated above none, in accuracy; copying "
             "is less with generated ones, and least with none", "NewMove, Table 2",
             "accuracy 70.6, 66.7, 48.3, 43.9; copying 8.7, 10.9, 3.7, 1.2", (
                 better("agreement", NM, f"{NM}, other prior"),
                 better("agreement", f"{NM}, other prior", f"{NM}, generated prior"),
                 better("agreement", f"{NM}, generated prior", f"{NM}, no prior"),
                 better("copy", f"{NM}, other prior", f"{NM}, generated prior"),
                 better("copy", f"{NM}, generated prior", f"{NM}, no prior")),
             "Similar clips are of the world's motions with names, other ones of things that stay "
             "in place; the paper's are of one gesture data set and of the web."),
    7: Claim("Full tuning beats LoRA", "NewMove, Table 2", "accuracy 70.6 full, 10.6 LoRA", (
        better("agreement", NM, f"{NM}, LoRA", why="a LoRA has the rate of LoRAs"),)),
    8: Claim("NewMove is above Textual Inversion, Custom Diffusion, DreamBooth, Tune-A-Video and "
             "MotionDirector in accuracy", "NewMove, Table 3",
             "70.6 against 0.3, 10.5, 28.4, 18.9, 24.7", (
                 *table_3("agreement", 0.0, False), *table_3("agreement", 0.0, True)),
             "Trained for equally many steps; and at an equal appearance score, as its early "
             "stopping has it. All five have other steps of their own; trained longer, "
             "MotionDirector does as well in the paper (Sec. 4.2). Tune-A-Video's own base is an "
             "image model, whose attention over frames begins from nothing; here it tunes a base "
             "of videos, an easier start."),
    9: Claim("Its text alignment is not paid for its accuracy", "NewMove, Table 3",
             ".2818 against .2733, .2788, .2796, .2818, .2786",
             table_3("all three", -MARGIN, False),
             "CLIP's score is replaced by the looks read off the videos. No sentence of the paper "
             "says “no worse”: it stops all at equal looks, and its table has the whole caption's "
             "score; after equally many steps is ours."),
    10: Claim("Accuracy and copying rise, and appearance falls, with steps",
              "NewMove, supplement 4", "a figure", (
                  better("agreement", NM, Side(NM, Cell(step=KEEP))),
                  better("copy", NM, Side(NM, Cell(step=KEEP))),
                  better("all three", Side(NM, Cell(step=KEEP)), NM))),
    11: Claim("One clip is enough to generalise to other looks", "NewMove, supplement 3",
              "a figure", (
                  better("agreement", f"{NM}, one clip", "base"),
                  better("all three", f"{NM}, one clip", None, 0.5)),
              "“Generalises” is read as: above the base, and most videos look as asked."),
    12: Claim("The base model does not make the motion when it is named",
              "NewMove, supplement 6", "0 % recognised", (
                  better("recognised", None, "base", -0.1, motions=NAMED),),
              "True by construction: the base was trained on no such motion, nor read its name."),
    13: Claim("Coupled tuning loses appearance diversity, the dual path keeps it",
              "MotionDirector, Table 1", "28.94 (dual), 28.40 (base), 25.52 (coupled)", (
                  better("all three", "motiondirector", "coupled"),
                  better("all three", "base", "coupled"),
                  not_worse("all three", "motiondirector", "base"))),
    14: Claim("The appearance-debiased loss improves the learned motion (β 0, 1, 2)",
              "MotionDirector, Table 1, Fig. 4",
              "motion preferred to the base's by 76 % with it, 58 % without", (
                  better("agreement", "motiondirector", "motiondirector, β 0"),
                  better("agreement", "motiondirector, β 2", "motiondirector, β 0")),
              "The paper has β = 1 and no such loss; β = 2 is ours."),
    15: Claim("Motion strength follows the LoRA's scale; too large breaks the picture",
              "MotionDirector, Sec. 3.4", "–", (
                  better("agreement", MD1, Side(MD1, Cell(scale=0.25))),
                  better("steady", MD1, Side(MD1, Cell(scale=4.0))))),
    16: Claim("The look of one clip mixes with the motion of another; a picture can be animated",
              "MotionDirector, Fig. 2", "pictures", tuple(
                  measure for kind in ("another clip", "a picture") for measure in (
                      better("agreement", Side(MD1, joins=f"look of {kind}"), "base",
                             why="the base has no LoRA at all, and its prompts tell looks"),
                      better("all three", Side(MD1, joins=f"look of {kind}"),
                             Side(MD1, joins=f"look of {kind}, off"))))),
    17: Claim("After φ, distances between latents follow motion more and looks less",
              "MotionDirector, Fig. 5", "a figure", (Measure("", listed=PHI),),
              "On clean latents, the figure's last panel; its other panels are of the denoising."),
    18: Claim("q, k, v of temporal attention suffice; smoother than tuning self- and "
              "cross-attention", "VMC, Sec. 4.3", "pictures", (
                  better("agreement", Side("vmc", OWN), Side("vmc", UNTUNED)),
                  better("jitter", "vmc, spatial q k v", "vmc", cell=OWN)),
              "Smoothness is that of the thing's path; one that hardly moves is smooth too."),
    19: Claim("The cosine is at least as good as l2, plain or weighted",
             "VMC, Sec. 3.1 and 4.3",
              "pictures", (not_worse("agreement", "vmc", "vmc, l2", cell=OWN),
                           not_worse("agreement", "vmc", "vmc, weighted l2", cell=OWN,
                                     why="Eq. 16 is of ε, the model says v")),
              "All losses at one rate, chosen for the cosine. The paper has it marginally better "
              "than the plain one; no worse is what is asked here."),
    20: Claim("The inverted start alone does not transfer the motion to other looks",
              "VMC, Fig. 9", "pictures", (
                  better("agreement", Side("vmc", OWN), Side("vmc", UNTUNED)),
                  better("agreement", None, Side("vmc", UNTUNED), -0.3)),
              "“Does not transfer” is read as an agreement below 0.3."),
    21: Claim("Appearance-invariant captions lower the leak of the background", "VMC, Fig. 4",
              "pictures", (better("leak", "vmc, faithful captions", "vmc", cell=OWN),)),
    22: Claim("A motion backward can be learned", "VMC, Sec. 4.4", "pictures", (
        better("agreement", Side("vmc, backward", OWN), Side("vmc, backward", UNTUNED)),
        better("backward", Side("vmc, backward", OWN), None)),
        "Backward is rarer than forward in real videos; in this world it is not."),
    23: Claim("Absorbers raise text alignment and diversity",
              "Customize-A-Video, supplement, Table 1", "text 31.69 (none), 31.91 (LoRA), 32.63 "
              "(word), 32.19 (both); diversity .613, .618, .621, .631", (
                  *absorbers("all three", Cell()), *absorbers("diversity", OPEN)),
              "LPIPS between samples of one prompt says little where a prompt names every look; "
              "diversity is that of colour and background where the prompt names neither."),
    24: Claim("Patches keep the motion where posture and motion go together",
              "Customize-A-Video, A.2", "pictures", (
                  better("posture", "posture, patches", "posture, whole frames"),
                  not_worse("agreement", "posture, patches", "posture, whole frames")),
              "A posture is how flat a thing is, which belongs to where it is on its path."),
    25: Claim("An absorber trained elsewhere can serve", "Customize-A-Video, A.1", "pictures",
              tuple(not_worse(figure, Side(f"{CAV}, borrowed absorber", Cell(step=200)), CAV,
                              why=LATE) for figure in ("all three", "agreement")),
              "There are no third-party models of this world: MotionDirector's look of the same "
              "clip serves."),
    26: Claim("Simple motions converge in fewer steps", "Customize-A-Video, supplement, Fig. 4",
              "pictures", (
        Measure("", listed=HALF),)),
    27: Claim("Several customized motions can act together", "Customize-A-Video, applications",
              "pictures", (
                  better("agreement", Side(CAV, joins="a camera that pans"), "base",
                         why="the base has no LoRA at all"),
                  better("pan", Side(CAV, joins="a camera that pans"), CAV)),
              "A thing's motion and the camera's; two things, each with its own, are not tested, "
              "since the base draws one."),
}
FINDINGS = {  # {number: what a second look found}; written after the results
    "1, 17": "Worded anew after their results, nearer to the papers: they were “… spatial ones "
             "alone learn no motion” and “φ brings latents of one motion together and takes those "
             "of one look apart”.",
    "1 to 7": "The paper stops all models at one appearance score; here all learn for 200 steps, "
              "and looks are not equal: right in 79 % of videos with NewMove as it is, 84 without "
              "K and V, 80 with other prior clips, 72 with none, 70 with generated ones and by "
              "LoRA, 42 with all layers. What prior clips do shows in looks here, where the paper, "
              "which holds those, sees it in accuracy.",
    "3 to 6, 10": "Copy is mostly looks that break. Ten clips have most looks of this world among "
                  "them: a wrong colour, shape or background, whatever made it wrong, is one of "
                  "theirs in 76, 83 or 82 % of cases, and over runs from ten clips copy goes with "
                  "looks that are wrong (correlation 0.88). So claim 3 agreeing says that tuning "
                  "all layers breaks looks; whether they come from the clips it hardly tells.",
    5: "What the paper itself compares, α = 0.5 with uniform timesteps, agrees in both figures; "
       "α = 1, which is ours, makes it too close to call.",
    8: "Equal looks are not quite equal: NewMove's are right in 79 % at its last step, and those "
       "of all but Tune-A-Video never fall as low within 200 steps, where the paper would train "
       "on. DreamBooth is put back to step 50, where looks are right in 93 % and hardly anything "
       "moves, though it has 95 % at step 200. That favours NewMove; but it is above those four "
       "at 200 steps too. Captions decide more. With seed 0 NewMove has 0.83, looks 84 %, from "
       "captions that tell looks, as its prior clips' do, and 0.48, 80 %, from short ones beside "
       "those clips; MotionDirector has 0.48 and 0.44, 97 % with both. So at full captions "
       "NewMove stays above it, by 0.35, and at short ones hardly, by 0.04.",
    9: "Looks alone are compared. The paper's text alignment is of the full caption, motion "
       "included; here Textual Inversion, which moves nothing, keeps 92 % and NewMove has 79. They "
       "are not the price of its motion: after 50 of 200 steps they are right in 75 %, with an "
       "agreement of 0.20. Of the five only Tune-A-Video learns as much, and its looks are right "
       "in 74 %. Changed one at a time with seed 0, where NewMove has 84 % and 0.83: without "
       "augmented clips 89 % (difference 0.05 [-0.08, 0.17]) and 0.93 (0.10 [0.06, 0.15]), so that "
       "augmenting costs motion here and perhaps looks; at a rate of 3e-4 83 % and 0.54.",
    "8, 13, 14": "MotionDirector and the coupled LoRA have 200 of their 500 steps here.",
    14: "From ten clips in 200 steps: agreement 0.46 with β = 0, 0.37 with β = 1, 0.28 with β = 2, "
        "looks 97, 95 and 95 %. Over motions the first difference is too close to call; β = 2, "
        "which is ours, is not. Few motions are learned whole by then, so pace may be part of it: "
        "more weight on φ's part leaves less for the rest. With seed 0, from one clip in the "
        "recipe's 150 steps, where most are learned, β = 1 and 0 come to the same, 0.78 and 0.74 "
        "(difference 0.04 [-0.05, 0.18], looks 88 and 83 %), and β = 2 stays behind β = 1 by 0.17 "
        "[0.09, 0.25], looks 94 %. From ten clips in the recipe's own 500 steps, tried on the "
        "figure eight, novel:1 and zigzagging, it is 0.97, 0.93, 0.18 with β = 1 and 0.97, 0.99, "
        "0.26 with β = 0: the eight, 0.45 against 0.92 at 200 steps, has caught up. So β = 1 seems "
        "to learn later and come to the same; it is not seen to help, and β = 2 harms.",
    16: "With the look of another clip all three looks are right in 17 % of videos, in nine of the "
        "sixteen runs in none, and in 1 % with that look off. With the look of a picture they are "
        "in none of 128: its caption tells its looks, which the base draws without learning "
        "anything. With a caption that names the thing alone, seed 0, they are in 17 % (colour 33, "
        "background 88 %), and agreement falls from 0.57 to 0.34.",
    17: "In proportion alone: between clips of one motion in two looks the distance grows from 45 "
        "to 56, between those of two motions in one look from 41 to 67. Divided by √3, which φ "
        "makes of independent frames, both are shorter.",
    18: "The measurement seems to blame. Spatial q, k, v move less than half as well from the same "
        "start (agreement 0.35, VMC 0.79; looks 56 % and 84 %), and what hardly moves is smooth: "
        "jitter is 4.5 pixels, VMC's 6.9, that of the clips themselves 5.4. In the five runs of "
        "sixteen where they do move things (agreement above 0.5) it is 4.3, and VMC's 3.6. Over "
        "motions it is too close to call. The other half of the claim agrees.",
    19: "Corrected after its first result: Eq. 16's weight, which is of ε, stood before the "
        "residuals of v, 1/ᾱ too much, and so measured the weighted l2 had 0.72 with seed 0 "
        "(difference 0.06 [-0.01, 0.14]). Of ε it has 0.82 there, as the plain l2.",
    20: "That start is sampled by DDPM, as VMC's code does, which draws new noise in every step "
        "and forgets most of the clip: 0.18. By DDIM, tried on the same eight motions, it moves "
        "the base by 0.34 [0.18, 0.50], looks 77 %, and by 0.75 at most (novel:2): so the second "
        "measurement would have been too close to call. Tuned, VMC has 0.79 (DDPM).",
    21: "Nothing can be told: one video of 128 leaks with VMC and none with faithful captions, "
        "since every prompt names another background. The paper's figure shows reconstructions.",
    "23 to 25": "The absorber reads the whole caption here, motion included, since the recipe has "
                "no look_prompt by default; the paper's reads the part on looks (supplement, "
                "B.2).",
    26: "Two of eight pairs are left out, with novel:2, which gains less than 0.2. The others' "
        "differences are 0, 0, 0, 0, 50 and 50 steps, and steps are kept every 50.",
}


ABOUT = f"""Written by `python tiny/claims.py` from `tiny/registered.py`, where all that is compared
was written down before the first result. Each measurement is a mean difference over
{len(MOTIONS) * len(SEEDS)} pairs of training runs, or as many as it says ({len(NAMED)} motions with
names and {len(RANDOM)} random ones, none of which the base ever saw, × {len(SEEDS)} seeds of
training × {lab.PROMPTS} prompts), with a 95 % interval by bootstrap over pairs, since the videos of
one run are not independent. A positive difference speaks for the paper; *agrees* wants the whole
interval of every measurement above its margin, *disagrees* that of any below it; *so far* that half
of the runs are measured, or more, but not yet all. Both runs of a motion have its clips and
prompts, and often come out alike: *over motions* stands where an interval over the {len(MOTIONS)}
motions, each the mean of its runs, says something else. Nothing corrects for the number of claims.
The tiny model is hundreds of times smaller than the papers', and says v, so that losses compare v
where the papers' compare ε: a disagreement may be the world's, the base's or ours as well as the
paper's."""


def preamble():
    """What all measurements share, for the page."""
    return f"""## What is compared, and what decides

Registered before the first result. Motions: {", ".join(MOTIONS)}; for posture
{POSTURES[0]} to {POSTURES[-1]}, in which what a thing does belongs to where it is. Videos are
sampled in {lab.STEPS} steps at guidance {lab.GUIDANCE:g}, from noise unless a side says “its own
start”, with the same noise on both sides; prompts differ from the clip in colour, shape and
background. Captions of clips name the thing's shape and the motion, or the word for it; of methods
with prior clips, whose captions tell looks, the looks too, as do those of pictures and of “faithful
captions”. So in 8 and 9 NewMove, as DreamBooth and Custom Diffusion, learns from fuller captions
than Textual Inversion, Tune-A-Video and MotionDirector. Ten clips have ten looks and a caption
each, where the papers have one caption for all. But for that, sides differ in one setting, or it is
said why in more. “No worse than” has a margin of
{MARGIN:g}, written “> {-MARGIN:g}”. “Equal looks”: of each method the kept step (every {KEEP} of
{STEPS}) at which the mean share of videos that look as asked is nearest to {LEVEL:g} of the
base's, as NewMove stops all methods at one appearance score. Rates of VMC, MotionDirector,
Customize-A-Video and NewMove were chosen once by `tiny/rates.py`, on {" and ".join(RATES_FROM)},
which are not measured here, and of the base model 3,600 steps younger (docs/rates.json; of two that
came out alike the recipe's, from earlier trials, stayed); the baselines have their kin's, or what
earlier trials left. They stand at the end of this page."""
