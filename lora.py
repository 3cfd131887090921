"""What learns: sets of layers, and the learners that change them.

    python -c "import lora; print(*lora.LAYERS, sep='\\n')"

A set of layers is a pattern over parameter names. A `Part` of a method says which of them learn,
and how: in full, or by a LoRA (Hu et al. 2021), a pair of thin matrices beside each layer,
W·x + s·B·A·x; a `Word` is a part too. `learner` makes what learns from it; support/adapter_file.py
keeps in a file what it holds in the end.
"""
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import sampler
from support import fast, formats
from support.files import BadInput

# ------------------------------------------------------------------------------------------------
# Sets of layers

_LINEARS = r"attn{}\.to_(q|k|v|out\.0)"
_SPATIAL, _TEMPORAL = r".*\.attentions\.", r"(transformer_in|.*\.temp_attentions\..*)\."
_FF = r"ff\.net\.(0\.proj|2)"

# Sets of layers, as patterns that a parameter's whole name must match.
LAYERS = {
    # VMC App. D: q, k, v of the temporal attentions. Both of a transformer's are temporal; the
    # published code leaves transformer_in out.
    "temporal-attention-qkv": r".*temp_attentions\..*\.attn[12]\.to_[qkv]\.weight",
    # MotionDirector Sec. 3.2: self-attention and feed-forward, cross-attention never.
    "spatial-self-attention-ff": rf"{_SPATIAL}.*({_LINEARS.format(1)}|{_FF})\.weight",
    "temporal-attention-ff": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight",
    # Customize-A-Video: its text names q, k, v, its parameter counts need the output as well.
    "spatial-attention": rf"{_SPATIAL}.*{_LINEARS.format('[12]')}\.weight",
    "temporal-attention": rf"{_TEMPORAL}.*{_LINEARS.format('[12]')}\.weight",
    "cross-attention-kv": rf"{_SPATIAL}.*attn2\.to_[kv]\.weight",  # Custom Diffusion
    # Tune-A-Video: the spatial queries and the temporal attention.
    "tune-a-video": rf"{_SPATIAL}.*attn[12]\.to_q\.weight|{_TEMPORAL}.*attn[12]\..*",
    "temporal": r"transformer_in\..*|.*temp_(attentions|convs)\..*",
    "temporal-convs": r".*temp_convs\..*",
    "spatial": r"(?!transformer_in|.*temp_(attentions|convs)).*",
    # For LoRA alone, ours: the linears of the temporal blocks, and the convolutions.
    "temporal-linears-convs": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight"
                              r"|.*temp_convs\..*\.[23]\.weight",
    "all": r".*",
}
LAYERS |= {  # two of them together
    # NewMove Sec. 3.2: all of the temporal layers, and how the pictures read the text.
    "temporal-and-cross-kv": f"{LAYERS['temporal']}|{LAYERS['cross-attention-kv']}",
    # MotionDirector's baseline; and with its temporal convolutions.
    "coupled": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-attention-ff']}",
    "coupled-convs": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-linears-convs']}",
}


def select(unet, layers):
    """{name: parameter} of a named set of layers, or of a pattern. BadInput if none match."""
    pattern, sets = pattern_of(layers, unet), layer_sets(unet)
    chosen = {n: p for n, p in unet.named_parameters() if pattern.fullmatch(n)}
    if not chosen:
        raise BadInput(f"no layer is called {layers!r}; known sets: {', '.join(sets)}, "
                       "or a pattern over parameter names.")
    return chosen


def layer_sets(network=None):
    """The named layer sets of a network: LAYERS, unless it has its own."""
    return getattr(network, "layer_sets", LAYERS)


def pattern_of(layers, network=None):
    """The compiled pattern of a named set of layers, or of a pattern. Raises BadInput."""
    sets = layer_sets(network)
    return re.compile(sets[layers]) if layers in sets else read_pattern(layers)


class Tuned:
    """The names of all parameters that a method's parts learn in full, before there is a network to
    look at: `name in Tuned(parts)`. The others can be stored in bf16 as they are read."""

    def __init__(self, parts, network=None):
        self.parts, self.patterns = parts, []
        for part in parts.values():
            if isinstance(part, Part) and part.learns and not part.rank:
                self.patterns.append(pattern_of(part.layers, network))

    def __contains__(self, name):
        return any(pattern.fullmatch(name) for pattern in self.patterns)


def read_pattern(text):
    """A pattern that a person gave, compiled. Raises BadInput."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"{text[:60]!r} is no pattern ({error}).") from None


def sites(unet, layers):
    """{module name: linear layer or temporal convolution} with a weight in a set of layers."""
    found = {}
    for name in select(unet, layers):
        module = unet.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(module, (nn.Linear, fast.TimeConv)):
            found[name.removesuffix(".weight")] = module
    if not found:
        raise BadInput(f"layers={layers} has no linear layer or temporal convolution, so no LoRA "
                       "can stand beside it; choose other layers, or rank=0.")
    return found


def kinds_of_layer(parameters):
    """{kind of layer: (tensors, numbers)} of {name: parameter}; a kind: 'temp_attentions attn1'."""
    count = {}
    for name, p in parameters.items():
        owner = re.search(r"(transformer_in|temp_attentions|temp_convs|attentions|resnets"
                          r"|(?:temporal_)?transformer_blocks)", name)
        inner = re.search(r"\.(attn[12]|ff)\.", name)
        parts = [n for n in name.split(".")[:-2] if not n.isdigit()]  # where the names are others
        kind = " ".join(m.group(1) for m in (owner, inner) if m) or " ".join(parts) or "other"
        tensors, numbers = count.get(kind, (0, 0))
        count[kind] = tensors + 1, numbers + p.numel()
    return count


# ------------------------------------------------------------------------------------------------
# The parts of a method: what can learn, as settings. `learner(model, seed)` makes it.


@dataclass(frozen=True)
class Part:
    """Layers that learn, in full (rank 0) or by a LoRA beside them; or, with a file, layers of
    another program that act and do not learn."""

    layers: str  # one of LAYERS, a pattern, or none
    rank: int = 0
    scale: float = 1.0  # of the LoRA
    dropout: float = 0.0  # of the LoRA's output
    per_clip: bool = False  # a LoRA of its own for every clip
    file: str = ""
    lr: float = 1e-4
    weight_decay: float = 0.01
    rates: str = ""  # factors on the rate of some layers: pattern:factor,pattern:factor

    @property
    def learns(self):
        """Whether there is anything to learn."""
        return self.layers != "none" and not self.file

    def acts(self, field):
        """Whether a setting of this part does something."""
        if self.file or self.layers == "none":
            return field in ("layers", "file")
        return self.rank > 0 or field not in ("scale", "dropout", "per_clip")

    def learner(self, model, seed):
        """A Whole, a LoRA, a Borrowed, or None where no layer is chosen."""
        if self.file:
            return Borrowed(model, self.file)
        if self.layers == "none":
            return None
        if self.rank:
            return LoRA(model.unet, self.layers, self.rank, self.scale, self.dropout, seed)
        return Whole(model.unet, self.layers)


@dataclass(frozen=True)
class Word:
    """A word that stands in captions for what is learned; with `vectors`, its embedding learns."""

    text: str
    vectors: int = 0
    init: str = ""  # a known word to begin from
    lr: float = 1e-4
    weight_decay: float = 0.01
    rates: str = field(default="", repr=False)

    per_clip = False

    @property
    def learns(self):
        """Whether there is anything to learn."""
        return self.vectors > 0

    def acts(self, field):
        """Whether a setting of this part does something."""
        return self.vectors > 0 or field in ("text", "vectors")

    def learner(self, model, seed):
        """Words, or None where no vector learns."""
        return Words(model.text, self.text, self.vectors, self.init, seed) if self.vectors else None


# ------------------------------------------------------------------------------------------------
# Learners. Each has .parameters(), {name: what the optimiser gets}; .on: what is off does not act;
# .tensors(), {name in an adapter file: tensor}, which `apply_adapters` puts to work.


class Whole:
    """Layers tuned in full. They always act: there is nothing beside them."""

    def __init__(self, unet, layers):
        self.chosen, self.on = select(unet, layers), True

    def parameters(self):
        return self.chosen

    def tensors(self):
        return {f"unet.{name}": p for name, p in self.chosen.items()}


class LoRA:
    """y = W·x + s·B·A·x on every linear layer and temporal convolution of a set of layers.

    A (r, in) starts at N(0, 1/r²), B (out, r) at zero, so a fresh LoRA changes nothing; the rank r
    is cut to the layer's own width. Dropout is on the LoRA's output, as MotionDirector has it. It
    lives beside the UNet, whose modules and names stay as they are, and acts while `on`.
    """

    def __init__(self, unet, layers, rank, scale=1.0, dropout=0.0, seed=0):
        self.scale, self.dropout, self.on, self.pairs = scale, dropout, True, {}
        g = torch.Generator().manual_seed(seed)
        for site, layer in sites(unet, layers).items():
            wide, narrow, *kernel = layer.weight.shape
            r, device = min(rank, wide, narrow), layer.weight.device
            A = torch.empty(r, narrow, *kernel).normal_(0, 1 / r, generator=g)
            B = torch.zeros(wide, r, *[1] * len(kernel))
            self.pairs[site] = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
            layer.register_forward_hook(self._beside(*self.pairs[site]))

    def _beside(self, A, B):
        def add(layer, inputs, out):
            if not self.on:
                return out
            if A.dim() == 2:
                low = F.linear(F.linear(inputs[0], A), B)
            else:  # a TimeConv: down along time, up pointwise
                low = F.conv2d(inputs[0], A.squeeze(-1), padding=(1, 0))
                low = F.conv2d(low, B.squeeze(-1))
            return out.add(fast.dropout(low, self.dropout, layer.training), alpha=self.scale)

        return add

    def parameters(self):
        """{name: parameter}, in the names of peft: <module>.lora_A.weight and .lora_B.weight."""
        named = {}
        for site, (A, B) in self.pairs.items():
            named |= {f"{site}.lora_A.weight": A, f"{site}.lora_B.weight": B}
        return named

    def tensors(self):
        """The scale goes into B, so that every program that reads peft's names changes the same."""
        return formats.to_peft({site: (A, B * self.scale) for site, (A, B) in self.pairs.items()})


class Words:
    """A learned word's vectors, in the text encoder. They act where a caption has the word."""

    def __init__(self, text, word, vectors, init, seed):
        if not word.strip():
            raise BadInput("a word that learns needs a text: word.text=sks.")
        table, ids = text.token_table, text.words_to_ids(word)
        # A word that is a single token begins as what it is; a made-up one as `init` or a thing,
        # with a little noise that tells its vectors apart.
        init_ids = text.words_to_ids(init.strip() or "thing")
        known = ids if len(ids) == 1 and not init else init_ids[:1]
        start = table[known].detach().float().expand(vectors, -1)
        noise = sampler.noise_like_shape(start.shape, [seed])[0].to(start) * table.std() * 0.1
        self.word, self.on = word, True
        self.vectors = nn.Parameter(start + noise * (vectors > 1))
        text.learned[word] = self.vectors

    def parameters(self):
        return {f"word.{self.word}": self.vectors}

    def tensors(self):
        return self.parameters()


class Borrowed:
    """An appearance that was not learned here: a LoRA file, or the weights of an image UNet, which
    take the place of the model's own while on."""

    def __init__(self, model, path):
        from support import adapter_file  # here, since it knows the learners

        adapter = adapter_file.read_adapter(path, model, whole=True)
        if adapter.words:
            raise BadInput(f"{path} holds words ({', '.join(adapter.words)}), which no caption "
                           "here has; learn the absorber here, or give a LoRA.")
        self.own, self._on = dict(model.unet.named_parameters()), False
        self.swapped = {n: t.float() for n, t in adapter.tensors.items()}
        for site, (A, B) in adapter.pairs.items():
            name = f"{site}.weight"
            W = self.swapped.get(name, self.own[name].data.float())
            self.swapped[name] = W + product(A, B, W)

    @property
    def on(self):
        return self._on

    @on.setter
    def on(self, on):
        if on != self._on:
            for name, tensor in self.swapped.items():
                p = self.own[name]
                p.data, self.swapped[name] = tensor.to(p), p.data
        self._on = on

    def parameters(self):
        return {}

    def tensors(self):
        return {}


# What a run does with its learners


def make_learners(parts, model, clips, seed):
    """{part: its learners}, one each, or one a clip; parts that have nothing to learn are left out.
    """
    learners = {}
    for number, (name, part) in enumerate(parts.items()):
        several = []
        for i in range(clips if part.per_clip else 1):
            several.append(part.learner(model, seed * 100 + number + 1000 * i))
        if several[0] is not None:
            learners[name] = several
    return learners


def named(learners):
    """{unique name: parameter} of all learners, in a fixed order. Layers that two parts tune in
    full are one and the same parameter."""
    out = {}
    for part, several in learners.items():
        for i, one in enumerate(several):
            prefix = "" if isinstance(one, (Whole, Words)) else f"{part}.{i}."
            out |= {prefix + n: p for n, p in one.parameters().items()}
    return out


def make_optimizer(parts, learners):
    """AdamW with each part's own rate and decay, and with `rates` those of some of its layers."""
    seen, rows = set(), {}
    for name, several in learners.items():
        part = parts[name]
        rates = read_rates(part.rates)
        used = set()
        for one in several:
            for parameter, p in one.parameters().items():
                factor = 1.0
                for pattern, value in rates.items():
                    if re.search(pattern, parameter):
                        used.add(pattern)
                        factor = value
                if id(p) not in seen:
                    seen.add(id(p))
                    rows.setdefault((part.lr * factor, part.weight_decay), []).append(p)
        if unused := set(rates) - used:
            raise BadInput(f"{name}.rates: no layer that learns has {', '.join(unused)} in its "
                           "name.")
    if not rows:
        raise BadInput("nothing learns with these settings; choose layers, or vectors of a word.")
    groups = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in rows.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def read_rates(text):
    """{pattern: factor} of "attn1:2,attn2:0.5"."""
    rates = {}
    for item in filter(None, text.split(",")):
        pattern, _, factor = item.rpartition(":")
        try:
            rates[read_pattern(pattern).pattern] = float(factor)
        except ValueError:
            raise BadInput(f"rates: {item[:60]!r}; wanted pattern:factor,pattern:factor.") from None
    return rates


def switch(learners, learn=(), act=(), clip=0):
    """Let the parts in `learn` learn and act, those in `act` act, and all others rest; of several,
    the one of this clip. Returns the words of looks that act, which captions end with."""
    for several in learners.values():
        for one in several:
            one.on = False
            for p in one.parameters().values():
                p.requires_grad_(False)
    words = []
    for name in (*act, *learn):
        several = learners.get(name, ())
        for one in several[clip : clip + 1] if len(several) > 1 else several:
            one.on = True
            for p in one.parameters().values():
                p.requires_grad_(name in learn)
            if isinstance(one, Words) and name.startswith("look"):
                words.append(one.word)
    return words


def product(A, B, W):
    """B·A in the shape of W, also of convolutions."""
    return (B.flatten(1).float() @ A.flatten(1).float()).view(W.shape).to(W)


# {kind: apply(model, tensors, scale)} of learners of your own: their tensors are named "kind.…" in
# an adapter's file, and come to `apply` without that, when it is put to work.
KINDS = {}
