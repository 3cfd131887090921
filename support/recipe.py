"""The grammar of a recipe: a method as a function with settings, each of them `name=value`.

A recipe has three kinds of settings: its own numbers (steps, clip_grad, …), those of its parts
(motion.lr, look.rank, …) and the keywords of its function (loss, beta, …). What it lacks cannot be
named. Each has a default, whose kind a value must have, and a meaning.
"""
import difflib
import inspect
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from losses import LOSSES
from support.files import BadInput

# What settings mean, where the method's own docstring does not say it: by their last name.
MEANING = {
    "steps": "training steps",
    "clip_grad": "longest gradient, over all that learns; inf for any",
    "noise_prior": "p in the start √p·inverted + √(1−p)·noise of samples; 0 starts from noise",
    "inverts": "the model that inverts the clip: as it was tuned, or the base",
    "inversion_steps": "steps of the inversion; 0 for as many as of sampling",
    "sampler": "ddim, ddpm or dpm",
    "sampling_steps": "steps of a sample",
    "guidance": "classifier-free guidance of a sample",
    "network_dropout": "dropout of the temporal convolutions while training",
    "prior": "clips that keep the model from forgetting, unless --prior names a folder: generated "
             "by the base model, of the tiny world, or none; folder warns that none is named",
    "prior_clips": "how many of them are made",
    "prior_prompt": "the caption of generated ones; empty for the clip's without its word",
    "appearance_stop": "stop where the CLIP score of a preview and look_prompt falls to this, 0 "
                       "never; wants --preview-prompt, and with real weights clip, clip_weights",
    "clip": "the open_clip model of that score; empty for the tiny CLIP",
    "clip_weights": "its weights, a local file",
    "layers": "which layers learn: a set of lora.LAYERS, a pattern over names, or none",
    "rank": "of a LoRA beside them; 0 tunes them in full",
    "scale": "of the LoRA",
    "dropout": "of the LoRA's output",
    "per_clip": "a LoRA for every clip",
    "file": "a LoRA or image UNet of another program, which acts and does not learn",
    "lr": "AdamW's learning rate",
    "weight_decay": "AdamW's weight decay",
    "rates": "factors on the rate of some layers: pattern:factor,pattern:factor",
    "text": "the word that stands in captions for what is learned; empty for none",
    "vectors": "how many vectors of it learn; 0 leaves it as it is",
    "init": "a known word to begin from; empty for the word itself, or 'thing'",
}
# The least and the most that a number may be, by the last name of the setting.
RANGE = {
    "steps": (1, 10**7), "clip_grad": (1e-12, math.inf), "noise_prior": (0, 1),
    "inversion_steps": (0, 10**4), "sampling_steps": (1, 10**4), "guidance": (0, 1000),
    "prior_clips": (1, 10**5), "appearance_stop": (-1, 1), "rank": (0, 10**5), "scale": (0, 1000),
    "dropout": (0, 0.99), "lr": (0, 1e6), "weight_decay": (0, 1e6), "vectors": (0, 64),
    "alpha": (0, 1), "beta": (0, 1000), "stride": (1, 10**4), "spatial": (0, 1),
    "prior_weight": (0, 1000), "first": (0, 10**7),
}
CHOICES = {"inverts": ("tuned", "base"), "sampler": ("ddim", "ddpm", "dpm"),
           "align": ("output", "epsilon", "x0"),
           "augment": ("none", "augmented", "recoloured"), "loss": LOSSES}
# Settings that do something only where another is not 0.
NEEDS = {"clip": "appearance_stop", "clip_weights": "appearance_stop", "inverts": "noise_prior",
         "inversion_steps": "noise_prior", "look_prompt": "appearance_stop"}


@dataclass(frozen=True)
class Recipe:
    """A method: its function, the source of its numbers, its own settings, its parts, and the
    keywords of the function with their values. `shape` (frames, height, width) and `fps`
    are for a base model of full size: the paper's or its code's, or the docstring says whose."""

    name: str
    source: str
    function: Any
    own: dict
    parts: dict
    keywords: dict
    shape: tuple
    fps: float

    def __getattr__(self, name):
        """recipe.steps: one of its own settings; None for one that it lacks."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self.own.get(name)

    def settings(self):
        """{name: value} of everything that can be set."""
        named = dict(self.own)
        for part, values in self.parts.items():
            named |= {f"{part}.{field}": value for field, value in asdict(values).items()}
        return named | self.keywords

    def meaning(self, name):
        """What a setting means: the docstring's line "name: …", or MEANING."""
        line = re.search(rf"^ *{re.escape(name)}: (.*)$", self.function.__doc__, re.MULTILINE)
        return line[1] if line else MEANING.get(name.rpartition(".")[2], "see the docstring")

    def but(self, *lines):
        """The recipe with settings changed: texts such as "steps=300 motion.lr=1e-3"; later ones
        win. Raises BadInput for one that it lacks, or a value that it cannot have."""
        recipe = self
        for item in [item for line in lines for item in line.split()]:
            name, _, text = item.partition("=")
            recipe = recipe.set(name, text)
        return recipe

    def ask(self, settings):
        """The recipe with settings that a person gave, name=value each. Raises BadInput for one
        that would do nothing, too."""
        recipe, idle = self, {}
        for item in settings:
            name, _, text = item.partition("=")
            recipe = recipe.set(name, text)
        for name in recipe.settings():
            part, _, field = name.rpartition(".")
            idle[name] = recipe.parts[part].lacks(field) if part else None
            if NEEDS.get(name) in recipe.own and not recipe.own[NEEDS[name]]:
                idle[name] = f"{NEEDS[name]} is 0"
        recipe.refuse(idle, self)
        return recipe

    def refuse(self, idle, before):
        """Raises BadInput for a setting that {name: why} says would do nothing, if it is another
        than in the recipe before: what is given as it was, as run.json has it, does no harm."""
        now, then = self.settings(), before.settings()
        for name, why in idle.items():
            if why and now.get(name) != then.get(name):
                raise BadInput(f"{name} does nothing here: {why}.")

    def learns(self, *parts):
        """Whether there is anything to learn in the parts whose names begin so: look, look_word."""
        return any(part.learns for name, part in self.parts.items() if name.startswith(parts))

    def set(self, name, text):
        """The recipe with one setting changed, from its text."""
        known = self.settings()
        if name not in known:
            near = [other for other in known if other.endswith(f".{name}")] or (
                difflib.get_close_matches(name, known, 1))
            raise BadInput(f"{name}: {self.name} has no such setting; it has {', '.join(known)}."
                           + (f" Did you mean {' or '.join(near)}?" if near else ""))
        value = parse_value(name, text, known[name])
        part, _, field = name.rpartition(".")
        if part:
            changed = replace(self.parts[part], **{field: value})
            return replace(self, parts=self.parts | {part: changed})
        where = "keywords" if name in self.keywords else "own"
        return replace(self, **{where: getattr(self, where) | {name: value}})

    def help(self, changes=()):
        """The recipe as a page: what it is, its settings with defaults and meanings, and when they
        are others: pairs of a case and its settings."""
        rows = []
        for name, value in self.settings().items():
            rows.append(f"  {name + '=' + write_value(value):44} {self.meaning(name)}")
        return "\n".join([f"{self.name} ({self.source})", "", inspect.getdoc(self.function), "",
                          "settings, written name=value after the flags:", *rows,
                          "", *(f"{when}: {line}" for when, line in changes)]).rstrip()


def parse_value(name, text, default):
    """The value of a setting from its text, of its default's kind. Raises BadInput."""
    last, kind = name.rpartition(".")[2], type(default)
    try:
        if kind is bool:
            value = {"on": True, "off": False, "true": True, "false": False}[text.lower()]
        else:
            value = kind(text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "on or off"}[kind]
        raise BadInput(f"{name}={text}: wanted {wanted}.") from None
    if last in CHOICES and value not in CHOICES[last]:
        raise BadInput(f"{name}={text}: wanted {' or '.join(CHOICES[last])}.")
    low, high = RANGE.get(last, (-math.inf, math.inf))
    if kind in (int, float) and not low <= value <= high:
        raise BadInput(f"{name}={text}: wanted {low} to {high:g}.")
    return value


def write_value(value):
    """A value as parse_value reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


METHODS = {}


def method(source, *, shape=(16, 256, 256), fps=8.0, steps, clip_grad=1.0, noise_prior=0.0,
           inverts="tuned", inversion_steps=0, sampler="ddim", sampling_steps=50, guidance=9.0,
           **more):
    """Makes a function a method: what it is given here are its settings. Of `more`, what is a part
    (lora.Part, lora.Word, or a class of yours made from one) can learn."""
    own = {"steps": steps, "clip_grad": clip_grad, "noise_prior": noise_prior, "inverts": inverts,
           "inversion_steps": inversion_steps, "sampler": sampler,
           "sampling_steps": sampling_steps, "guidance": guidance}
    parts = {name: value for name, value in more.items() if hasattr(value, "learner")}
    own |= {name: value for name, value in more.items() if name not in parts}

    def add(function):
        keywords = {}
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
            keywords[name] = parameter.default
        name = function.__name__.replace("_", "-")
        METHODS[name] = Recipe(name, source, function, own, parts, keywords, shape, fps)
        return function

    return add
