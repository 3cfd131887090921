"""The papers' claims as comparisons on the tiny world, pre-registered.

An arm is a set of trials, one per motion and training seed. A comparison is the difference between
two arms that differ in one setting and are sampled in the same way. A claim is one or more
comparisons. `tiny/claims.py` runs and evaluates them. The comparisons were fixed before the first
result; only the mistake in claim 19 was corrected since. Texts were corrected where they
misrepresented a paper. docs/claims.md describes the limits of each test.
"""
from dataclasses import dataclass, replace

from tiny import benchmark
from tiny.benchmark import Cell, Trial

MOTIONS = benchmark.MOTIONS[:8]
NAMED, RANDOM = MOTIONS[:4], MOTIONS[4:]
POSTURES = tuple(f"posture:{i}" for i in range(8))
SEEDS = (0, 1)
MARGIN = 0.05  # of "no worse than", for shares and correlations
LEVEL = 0.9  # share of the base's appearance score at which methods are compared
STEPS, SAVE_EVERY = 200, 50  # of every arm with ten clips

# --- The arms: each is trained on every motion with both seeds ----------------------------------

NM, CAV, MD = "newmove", "customize-a-video", "motiondirector"
MD1 = "motiondirector, one clip"
LONG = (f"steps={STEPS}",)
PRIOR = (*LONG, "num_prior_clips=16")
ABSORBED = ("steps=300", "absorber_steps=100")
TOKEN = "appearance_word.num_vectors=4"
SPATIAL_QKV = r"motion.layers=.*\.attentions\..*attn[12]\.to_[qkv]\.weight"


def arm(method, *settings, clips=10, **more):
    """The fields of an arm's trials."""
    return dict(method=method, clips=clips, settings=settings, **more)


ARMS = {
    "base": arm("base", clips=1),
    NM: arm(NM, *PRIOR, save_every=SAVE_EVERY),
    f"{NM}, no temporal layers": arm(NM, *PRIOR, "motion.layers=cross-attention-kv"),
    f"{NM}, temporal layers alone": arm(NM, *PRIOR, "motion.layers=temporal"),
    f"{NM}, all layers": arm(NM, *PRIOR, "motion.layers=all"),
    f"{NM}, trained token": arm(NM, *PRIOR, "word.num_vectors=1"),
    f"{NM}, α 0": arm(NM, *PRIOR, "alpha=0"),
    f"{NM}, α 1": arm(NM, *PRIOR, "alpha=1"),
    f"{NM}, other prior": arm(NM, *PRIOR, prior="in place"),
    f"{NM}, generated prior": arm(NM, *PRIOR, prior="generated"),
    f"{NM}, no prior": arm(NM, *PRIOR, prior="none"),
    f"{NM}, LoRA": arm(NM, *PRIOR, "motion.rank=32", "motion.lr=3e-3"),
    f"{NM}, one clip": arm(NM, *PRIOR, clips=1),
    "dreambooth": arm("dreambooth", *PRIOR, save_every=SAVE_EVERY),
    "tune-a-video": arm("tune-a-video", *LONG, save_every=SAVE_EVERY),
    "custom-diffusion": arm("custom-diffusion", *PRIOR, save_every=SAVE_EVERY),
    "textual-inversion": arm("textual-inversion", *LONG, save_every=SAVE_EVERY),
    MD: arm(MD, *LONG, save_every=SAVE_EVERY),
    f"{MD}, β 0": arm(MD, *LONG, "beta=0"),
    f"{MD}, β 2": arm(MD, *LONG, "beta=2"),
    "coupled": arm("coupled", *LONG),
    MD1: arm(MD, clips=1),
    "vmc": arm("vmc", clips=1),
    "vmc, spatial q k v": arm("vmc", SPATIAL_QKV, clips=1),
    "vmc, l2": arm("vmc", "loss=residual-l2", clips=1),
    "vmc, weighted l2": arm("vmc", "loss=residual-l2-weighted", "loss_space=epsilon", clips=1),
    "vmc, full captions": arm("vmc", clips=1, full_captions=True),
    "vmc, backward": arm("vmc", clips=1, backward=True),
    CAV: arm(CAV, *ABSORBED, clips=1, save_every=50),
    f"{CAV}, no absorber": arm(CAV, *ABSORBED, "appearance.layers=none", clips=1, save_every=50),
    f"{CAV}, token absorber": arm(CAV, *ABSORBED, "appearance.layers=none", TOKEN, clips=1,
                                  save_every=50),
    f"{CAV}, both absorbers": arm(CAV, *ABSORBED, TOKEN, clips=1, save_every=50),
    f"{CAV}, external absorber": arm(CAV, *ABSORBED, clips=1, save_every=50),  # see trials_of
    "posture, patches": arm(CAV, *ABSORBED, clips=1),
    "posture, whole frames": arm(CAV, *ABSORBED, clips=1, patch=(1.0, 1.0)),
}
TABLE_3 = ("textual-inversion", "custom-diffusion", "dreambooth", "tune-a-video", MD)
TEN = (NM, *TABLE_3, "coupled")  # the methods with their own settings, from ten clips
ONE = (f"{NM}, one clip", MD1, "vmc", CAV)  # and from one
INVERTED = ("tune-a-video", "vmc", MD1)  # arms whose own start is an inverted clip


def trials_of(name):
    """{(motion, seed): trial} of an arm."""
    trials = {}
    for motion in POSTURES if name.startswith("posture") else MOTIONS:
        for seed in SEEDS:
            trial = Trial(motion=motion, seed=seed, **ARMS[name])
            if name.endswith("external absorber"):
                trial = replace(trial, absorber=Trial(MD, motion, seed))
            trials[motion, seed] = trial
    return trials


def next_appearance(trial, clips=1):
    """The trial of the next motion, whose appearance LoRA is added; clips=0: from an image."""
    other = MOTIONS[(MOTIONS.index(trial.motion) + 1) % len(MOTIONS)]
    return Trial(MD, other, trial.seed, clips)


def pan_of(trial):
    """The trial of a camera pan."""
    return Trial(CAV, "standing still while the camera pans", trial.seed, motion_words="moving",
                 settings=ABSORBED)


ADDITIONS = {  # what is added to a trial: a function from the trial to fields of its cell
    "appearance of another clip": lambda t: {"appearance": next_appearance(t)},
    "appearance of another clip, off": lambda t: {"appearance": next_appearance(t),
                                                  "strength": 0.0},
    "appearance of an image": lambda t: {"appearance": next_appearance(t, 0)},
    "appearance of an image, off": lambda t: {"appearance": next_appearance(t, 0),
                                              "strength": 0.0},
    "a camera pan": lambda t: {"motion": pan_of(t)},
}

# --- Comparisons --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """An arm and the way to sample it. `plus` is a key of ADDITIONS. With `equal`, the kept step is
    used whose appearance score is nearest to LEVEL of the base's."""

    arm: str
    cell: Cell = Cell()
    plus: str = ""
    equal: bool = False

    def cell_for(self, trial):
        """The cell of one trial."""
        return replace(self.cell, **ADDITIONS[self.plus](trial)) if self.plus else self.cell

    def __str__(self):
        c, text = self.cell, [self.arm]
        text += ["untuned"] * (not c.tuned) + ["own start"] * (c.start == "own")
        text += [f"step {c.step}"] * (c.step > 0) + [f"scale {c.scale:g}"] * (c.scale != 1)
        text += ["open prompts"] * c.open_prompts + [self.plus] * bool(self.plus)
        return " · ".join(text + ["equal appearance"] * self.equal)


@dataclass(frozen=True)
class Comparison:
    """The paper predicts that the mean of more − less of a metric is above `above`. A side that is
    None counts 0. `special` names a function of claims.SPECIAL that replaces the two sides. `why`
    gives the reason if the sides differ in more than one setting."""

    metric: str
    more: Side = None
    less: Side = None
    above: float = 0.0
    special: str = ""
    motions: tuple = ()  # only these
    why: str = ""

    def __str__(self):
        if self.special:
            return f"{self.special} > {self.above:g}"
        if self.more is None:
            return f"{self.metric}: [{self.less}] < {-self.above:g}"
        sides = " − ".join(f"[{side}]" if side else "0" for side in (self.more, self.less))
        return f"{self.metric}: {sides.removesuffix(' − 0')} > {self.above:g}"


@dataclass(frozen=True)
class Claim:
    """A claim, its source, the paper's numbers, and the comparisons."""

    text: str
    source: str
    numbers: str
    comparisons: tuple


def better(metric, more, less, above=0.0, cell=None, **fields):
    """more − less > above. A side can be the name of an arm, sampled from noise or by `cell`."""
    sides = [Side(s, cell or Cell()) if isinstance(s, str) else s for s in (more, less)]
    return Comparison(metric, *sides, above=above, **fields)


def not_worse(metric, one, other, **fields):
    """one − other > −MARGIN."""
    return better(metric, one, other, -MARGIN, **fields)


OWN, OPEN = Cell(start="own"), Cell(open_prompts=True)
UNTUNED = Cell(tuned=False, start="own")
PHI = ("latents: log of (distance of one motion with two appearances / distance of two motions "
       "with one appearance), before φ minus after")
HALF = ("steps until half of the gain in agreement: the four curvier motions minus the four "
        "smoother ones, pair by pair, where both gain 0.2")
LATE = "the motion is trained for 200 steps on both sides, without the absorber's 100"
NO_LORA = "the base has no LoRA"


def own(name, **fields):
    """An arm from its method's own start."""
    return Side(name, OWN if name in INVERTED else Cell(), **fields)


def table_3(metric, above, equal):
    """NewMove against each of its five baselines, each from its own start."""
    why = "Tune-A-Video starts from the inverted clip"
    return tuple(Comparison(metric, own(NM, equal=equal), own(name, equal=equal), above,
                            why=why if name in INVERTED else "") for name in TABLE_3)


def absorbers(metric, cell):
    """Each absorber against none."""
    none = Side(f"{CAV}, no absorber", replace(cell, step=200))
    arms = (CAV, f"{CAV}, token absorber", f"{CAV}, both absorbers")
    return tuple(Comparison(metric, Side(name, cell), none, why=LATE) for name in arms)


def mixing(kind):
    """The appearance of another clip or image, added to a motion."""
    mixed, off = (Side(MD1, plus=f"appearance of {kind}{end}") for end in ("", ", off"))
    why = f"{NO_LORA}, and its prompts name the appearance"
    return better("agreement", mixed, "base", why=why), better("appearance", mixed, off)


# --- The claims ---------------------------------------------------------------------------------

CLAIMS = {
    1: Claim("The temporal layers are required: spatial layers alone are not enough",
             "NewMove, Table 2", "accuracy 70.6 with, 22.7 without",
             (better("agreement", NM, f"{NM}, no temporal layers"),)),
    2: Claim("Keys and values of the cross-attention raise accuracy over temporal layers alone",
             "NewMove, Table 2", "accuracy 70.6 with, 62.3 without",
             (better("agreement", NM, f"{NM}, temporal layers alone"),)),
    3: Claim("Tuning all spatial layers too raises copying",
             "NewMove, Table 2", "copying 17.0 all, 8.7 K and V",
             (better("copy", f"{NM}, all layers", NM),)),
    4: Claim("Training the token's embedding raises accuracy and copying",
             "NewMove, Table 2", "accuracy 75.5 against 70.6, copying 22.7 against 8.7",
             (better("agreement", f"{NM}, trained token", NM),
              better("copy", f"{NM}, trained token", NM))),
    5: Claim("Coarse-noise timesteps raise accuracy and lower copying; a larger α does so more",
             "NewMove, Table 2",
             "accuracy 70.6 (α 0.5) against 66.9 (uniform), copying 8.7 against 15.4",
             (better("agreement", NM, f"{NM}, α 0"), better("copy", f"{NM}, α 0", NM),
              better("agreement", f"{NM}, α 1", NM), better("copy", NM, f"{NM}, α 1"))),
    6: Claim("Accuracy falls from similar to other to generated to no prior clips; copying is "
             "lower with generated ones, and lowest with none",
             "NewMove, Table 2", "accuracy 70.6, 66.7, 48.3, 43.9; copying 8.7, 10.9, 3.7, 1.2",
             (better("agreement", NM, f"{NM}, other prior"),
              better("agreement", f"{NM}, other prior", f"{NM}, generated prior"),
              better("agreement", f"{NM}, generated prior", f"{NM}, no prior"),
              better("copy", f"{NM}, other prior", f"{NM}, generated prior"),
              better("copy", f"{NM}, generated prior", f"{NM}, no prior"))),
    7: Claim("Full fine-tuning is better than LoRA",
             "NewMove, Table 2", "accuracy 70.6 full, 10.6 LoRA",
             (better("agreement", NM, f"{NM}, LoRA", why="the LoRA has a LoRA's learning rate"),)),
    8: Claim("NewMove is above Textual Inversion, Custom Diffusion, DreamBooth, Tune-A-Video and "
             "MotionDirector in accuracy",
             "NewMove, Table 3", "accuracy 70.6 against 0.3, 10.5, 28.4, 18.9, 24.7",
             (*table_3("agreement", 0.0, False), *table_3("agreement", 0.0, True))),
    9: Claim("NewMove's accuracy does not cost text alignment",
             "NewMove, Table 3", ".2818 against .2733, .2788, .2796, .2818, .2786",
             table_3("appearance", -MARGIN, False)),
    10: Claim("Accuracy and copying rise, and appearance falls, with the number of steps",
              "NewMove, supplement 4", "a plot",
              (better("agreement", NM, Side(NM, Cell(step=SAVE_EVERY))),
               better("copy", NM, Side(NM, Cell(step=SAVE_EVERY))),
               better("appearance", Side(NM, Cell(step=SAVE_EVERY)), NM))),
    11: Claim("One clip is enough to generalize to another appearance",
              "NewMove, supplement 3", "images",
              (better("agreement", f"{NM}, one clip", "base"),
               better("appearance", f"{NM}, one clip", None, 0.5))),
    12: Claim("The base model does not make the motion from its name",
              "NewMove, supplement 6", "0 % recognized",
              (better("recognized", None, "base", -0.1, motions=NAMED),)),
    13: Claim("Coupled tuning loses appearance diversity; the dual path keeps it",
              "MotionDirector, Table 1", "28.94 (dual), 28.40 (base), 25.52 (coupled)",
              (better("appearance", MD, "coupled"), better("appearance", "base", "coupled"),
               not_worse("appearance", MD, "base"))),
    14: Claim("The appearance-debiased loss improves the motion (β 0, 1, 2)",
              "MotionDirector, Table 1, Fig. 4",
              "motion preferred to the base's by 76 % with it, 58 % without",
              (better("agreement", MD, f"{MD}, β 0"),
               better("agreement", f"{MD}, β 2", f"{MD}, β 0"))),
    15: Claim("The LoRA scale controls the strength of the motion; too large a scale breaks the "
              "image",
              "MotionDirector, Sec. 3.4", "no figures",
              (better("agreement", MD1, Side(MD1, Cell(scale=0.25))),
               better("appearance_stability", MD1, Side(MD1, Cell(scale=4.0))))),
    16: Claim("The appearance of one clip mixes with the motion of another; an image can be "
              "animated",
              "MotionDirector, Fig. 2", "images", (*mixing("another clip"), *mixing("an image"))),
    17: Claim("After φ, distances between latents depend more on motion and less on appearance",
              "MotionDirector, Fig. 5", "a plot", (Comparison("", special=PHI),)),
    18: Claim("q, k, v of the temporal attention suffice, and give smoother motion than tuning "
              "self- and cross-attention",
              "VMC, Sec. 4.3", "images",
              (better("agreement", Side("vmc", OWN), Side("vmc", UNTUNED)),
               better("jitter", "vmc, spatial q k v", "vmc", cell=OWN))),
    19: Claim("The cosine is at least as good as l2, plain or weighted",
              "VMC, Sec. 3.1 and 4.3", "images",
              (not_worse("agreement", "vmc", "vmc, l2", cell=OWN),
               not_worse("agreement", "vmc", "vmc, weighted l2", cell=OWN,
                         why="Eq. 16 weights ε, the model predicts v"))),
    20: Claim("The inverted start alone does not transfer the motion to another appearance",
              "VMC, Fig. 9", "images",
              (better("agreement", Side("vmc", OWN), Side("vmc", UNTUNED)),
               better("agreement", None, Side("vmc", UNTUNED), -0.3))),
    21: Claim("Appearance-invariant captions reduce the leak of the background",
              "VMC, Fig. 4", "images",
              (better("leak", "vmc, full captions", "vmc", cell=OWN),)),
    22: Claim("A reversed motion can be trained",
              "VMC, Sec. 4.4", "images",
              (better("agreement", Side("vmc, backward", OWN), Side("vmc, backward", UNTUNED)),
               better("backward", Side("vmc, backward", OWN), None))),
    23: Claim("Absorbers raise text alignment and diversity",
              "Customize-A-Video, supplement, Table 1", "text 31.69 (none), 31.91 (LoRA), 32.63 "
              "(token), 32.19 (both); diversity .613, .618, .621, .631",
              (*absorbers("appearance", Cell()), *absorbers("diversity", OPEN))),
    24: Claim("Patches preserve the motion if posture and motion are coupled",
              "Customize-A-Video, A.2", "images",
              (better("posture", "posture, patches", "posture, whole frames"),
               not_worse("agreement", "posture, patches", "posture, whole frames"))),
    25: Claim("An absorber trained elsewhere works",
              "Customize-A-Video, A.1", "images",
              tuple(not_worse(metric, Side(f"{CAV}, external absorber", Cell(step=200)), CAV,
                              why=LATE) for metric in ("appearance", "agreement"))),
    26: Claim("Simple motions converge in fewer steps",
              "Customize-A-Video, supplement, Fig. 4", "images", (Comparison("", special=HALF),)),
    27: Claim("Several customized motions can be combined",
              "Customize-A-Video, applications", "images",
              (better("agreement", Side(CAV, plus="a camera pan"), "base", why=NO_LORA),
               better("pan", Side(CAV, plus="a camera pan"), CAV))),
}
