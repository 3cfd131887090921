"""Recipes: each is a training method, i.e. a function with settings.

A recipe has three kinds of settings: training and sampling (steps, guidance, …), those of its parts
(motion.lr, appearance.rank, …) and the keywords of its function (loss, beta, …). The command line
takes them as name=value, and refuses those that are unknown or have no effect.
"""
import argparse
import difflib
import inspect
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from support.files import BadInput
from support.flags import Parser, choice, float_in, int_in

CHOICES = {}  # {setting: its possible values}, filled in by train.py

# {last part of a setting's name: (type, meaning)}. A method's docstring overrides the meaning.
KNOWN = {
    "steps": (int_in(1, 10**7), "training steps"),
    "max_grad_norm": (float_in(1e-12, math.inf), "gradient-norm threshold; inf disables clipping"),
    "noise_prior": (float_in(0, 1), "p in the starting latents √p·inverted + √(1−p)·noise"),
    "inversion_model": (choice("tuned", "base"), "model that inverts the clip: tuned or base"),
    "inversion_steps": (int_in(0, 10**4), "DDIM inversion steps; 0 for as many as sampling steps"),
    "sampler": (None, "sampler of previews and of generate.py"),
    "sampling_steps": (int_in(1, 10**4), "sampling steps"),
    "guidance": (float_in(0, 1000), "classifier-free guidance scale"),
    "unet_dropout": (None, "dropout of the temporal convolutions during training"),
    "prior": (None, "regularization clips, unless --prior gives a folder: generated (by the base "
              "model), world (from the tiny world), none, or folder (none, with a warning)"),
    "num_prior_clips": (int_in(1, 10**5), "number of regularization clips to make"),
    "class_prompt": (None, "caption of generated clips; empty for the training clip's caption "
                     "without its token"),
    "appearance_stop": (float_in(-1, 1), "stop when the CLIP score of a preview and "
                        "appearance_prompt falls to this value; 0 never stops; requires "
                        "--preview-prompt and, with real weights, clip and clip_weights"),
    "clip": (None, "open_clip model for appearance_stop; empty for the tiny CLIP"),
    "clip_weights": (None, "local weights file of the open_clip model"),
    "layers": (None, "trainable layers: a set of lora.LAYERS, a regular expression, or none"),
    "rank": (int_in(0, 10**5), "LoRA rank; 0 for full fine-tuning"),
    "scale": (float_in(0, 1000), "LoRA scale"),
    "dropout": (float_in(0, 0.99), "dropout of the LoRA output"),
    "per_video": (None, "one LoRA per clip"),
    "load_from": (None, "adapter to train further; a part with layers=none uses any LoRA or image "
                  "UNet, frozen"),
    "lr": (float_in(0, 1e6), "AdamW's learning rate"),
    "weight_decay": (float_in(0, 1e6), "AdamW's weight decay"),
    "lr_multipliers": (None, "learning-rate factors of layers: pattern:factor,pattern:factor"),
    "token": (None, "placeholder token in captions; empty for none"),
    "num_vectors": (int_in(0, 64), "number of trainable vectors of the token; 0 keeps it frozen"),
    "initializer_token": (None, "known word that initializes the vectors; empty for the token "
                          "itself, or 'thing' if the token is not one known word"),
    "alpha": (float_in(0, 1), ""), "spatial_prob": (float_in(0, 1), ""),
    "frame_stride": (int_in(1, 10**4), ""),
    "loss_space": (choice("output", "epsilon", "x0"), ""),
}
READERS = {bool: choice("on", "off"), float: float_in(-1e18)}  # for all other settings


@dataclass(frozen=True)
class Recipe:
    """A method: its function, the source of its numbers, training and sampling settings (`own`),
    parts, and the function's keywords. `shape` (frames, height, width) and `fps` apply to
    full-size base models. `clips`: the least and the largest number of training clips."""

    name: str
    source: str
    function: Any
    own: dict
    parts: dict
    keywords: dict
    shape: tuple = (16, 256, 256)
    fps: float = 8.0
    clips: tuple = (0, math.inf)

    def __getattr__(self, name):
        """recipe.steps etc.: a training or sampling setting. Raises AttributeError."""
        if name.startswith("__") or name not in self.own:
            raise AttributeError(f"the recipe has no setting {name!r}")
        return self.own[name]

    def settings(self, idle=False):
        """{name: value} of all settings; idle: include those without effect."""
        named = dict(self.own)
        for part, values in self.parts.items():
            named |= {f"{part}.{field}": value for field, value in asdict(values).items()
                      if idle or values.uses(field)}
        return named | self.keywords

    def parser(self, idle=False):
        """A parser of the settings. Its help text describes the method."""
        parser = Parser(prog=self.name, usage="name=value …", add_help=False,
                        description=f"{self.source}\n\n{inspect.getdoc(self.function)}")
        for name, value in self.settings(idle).items():
            kind, meaning = KNOWN.get(name.rpartition(".")[2], (None, ""))
            kind = choice(*CHOICES[name]) if name in CHOICES else kind
            line = re.search(rf"^ *{name}: (.*)$", self.function.__doc__, re.MULTILINE)
            kind = kind or READERS.get(type(value), type(value))
            parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS,
                                help=f"{line[1] if line else meaning} ({write_value(value)})")
        return parser

    def override(self, *lines):
        """The recipe with changes, e.g. "steps=300 motion.lr=1e-3". Later ones win."""
        return self.changed(" ".join(lines).split())[0]

    def apply_user(self, *settings):
        """The recipe with the user's changes, one "name=value" each. Later ones win. Exits with an
        error for unknown names and wrong values; raises BadInput for settings without effect."""
        recipe, given = self.changed(settings)
        if idle := given.keys() - recipe.settings().keys():
            raise BadInput(f"{idle.pop()} has no effect: its part has no LoRA, or is frozen.")
        return recipe

    def changed(self, settings):
        """The recipe with the changed settings, and {name: value} of the changes."""
        given = vars(self.parser(idle=True).parse_args([f"--{item}" for item in settings]))
        recipe = self
        for name, value in given.items():
            value = value == "on" if value in ("on", "off") else value
            part, _, field = name.rpartition(".")
            if part:
                new = {part: replace(recipe.parts[part], **{field: value})}
                recipe = replace(recipe, parts=recipe.parts | new)
            else:
                where = "keywords" if name in self.keywords else "own"
                recipe = replace(recipe, **{where: getattr(recipe, where) | {name: value}})
        return recipe, given

    def is_trainable(self, *parts):
        """True if a part is trainable whose name begins with one of `parts`; "appearance" includes
        appearance_word."""
        return any(part.trainable for name, part in self.parts.items() if name.startswith(parts))


def write_value(value):
    """A setting's value as text, in the notation of the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


RENAMED = {  # old names of settings
    "clip_grad": "max_grad_norm", "inverts": "inversion_model", "network_dropout": "unet_dropout",
    "prior_clips": "num_prior_clips", "prior_prompt": "class_prompt",
    "prior_weight": "prior_loss_weight", "look_prompt": "appearance_prompt",
    "spatial": "spatial_prob", "stride": "frame_stride", "align": "loss_space",
    "first": "subject_start (newmove) or absorber_steps (customize-a-video)",
    "file": "load_from", "rates": "lr_multipliers", "per_clip": "per_video", "text": "token",
    "vectors": "num_vectors", "init": "initializer_token", "look": "appearance",
    "look_word": "appearance_word"}


def split_settings(argv, parser):
    """Command-line arguments as (flags, settings). A setting is name=value with a name that some
    method has, unless it is the first value of a flag, or a file. Raises BadInput for a name with a
    dot that no method has."""
    names = {name for recipe in METHODS.values() for name in recipe.settings(idle=True)}
    takes_value = {flag for flag, action in parser._option_string_actions.items()
                   if action.nargs in (None, "+")}
    flags, settings = [], []
    for before, text in zip(["", *argv], argv):
        name, equals, _ = text.partition("=")
        new = ".".join(RENAMED.get(part, part) for part in name.split("."))
        if not equals or before in takes_value or os.path.exists(text):
            flags.append(text)
        elif name in names:
            settings.append(text)
        elif new != name:
            raise BadInput(f"{name}: this setting was renamed to {new}.")
        elif re.fullmatch(r"[a-z_]\w*\.[\w.]+", name) and " " not in text:
            near = difflib.get_close_matches(name, names, 1)
            raise BadInput(f"{text[:60]!r}: no method has the setting {name}"
                           + (f"; did you mean {near[0]}?" if near else "."))
        else:
            flags.append(text)
    return flags, settings


METHODS = {}
REQUIRED = inspect.Parameter.empty  # the value of a setting or keyword without default
DEFAULT = Recipe("", "", None, {
    "steps": REQUIRED, "max_grad_norm": 1.0, "noise_prior": 0.0, "inversion_model": "tuned",
    "inversion_steps": 0, "sampler": "ddim", "sampling_steps": 50, "guidance": 9.0}, {}, {})


def method(source, like=None, **changes):
    """A decorator that registers a function as a method. `like` names the method whose settings and
    parts it has, except for `changes`; None removes one. Values with a `build` method
    (lora.Trainable, lora.PlaceholderToken, or your own) are trainable parts. Those with a name that
    begins with appearance are saved in a file of their own and left out of previews."""
    base = METHODS[like] if like else DEFAULT
    fields = {name: changes.pop(name, getattr(base, name)) for name in ("shape", "fps", "clips")}
    values = base.own | base.parts | changes
    parts = {name: value for name, value in values.items() if hasattr(value, "build")}
    own = {name: value for name, value in values.items() if name not in parts and value is not None}

    def add(function):
        name, doc = function.__name__.replace("_", "-"), function.__doc__
        if not doc:
            raise TypeError(f"method {name}: expected a docstring that describes it")
        given = list(inspect.signature(function).parameters.items())[1:]
        keywords = {name: parameter.default for name, parameter in given}
        for setting, value in (own | keywords).items():
            if value is REQUIRED or not (setting in KNOWN or f"    {setting}: " in doc):
                raise TypeError(f"{name}: setting {setting!r} has no default or no description")
        if name in METHODS:
            raise TypeError(f"two methods are named {name}")
        METHODS[name] = Recipe(name, source, function, own, parts, keywords, **fields)
        return function

    return add
