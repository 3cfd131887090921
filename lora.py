"""Trainable parameters: layer sets, LoRA, full fine-tuning, learned tokens.

    python -c "import lora; print(*lora.LAYERS, sep='\\n')"

A layer set is a pattern over parameter names. A method's `Trainable` specifies which layers are
trained and how: fully, or with a LoRA (Hu et al. 2021), W·x + s·B·A·x with low-rank A and B. A
`PlaceholderToken` is trained in the text encoder. Their `build` makes the object that holds the
parameters; support/adapters.py saves it.
"""
import re
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import sampler
from support import adapters, fast, formats
from support.files import BadInput
from support.flags import float_in

# --- Layer sets ---------------------------------------------------------------------------------

_LINEARS = r"attn{}\.to_(q|k|v|out\.0)"
_SPATIAL, _TEMPORAL = r".*\.attentions\.", r"(transformer_in|.*\.temp_attentions\..*)\."
_FF = r"ff\.net\.(0\.proj|2)"

# {name: pattern}; a parameter belongs to a set if its full name matches.
LAYERS = {
    # VMC App. D: q, k, v of both attentions over time, without transformer_in as in its code.
    "temporal-attention-qkv": r".*temp_attentions\..*\.attn[12]\.to_[qkv]\.weight",
    # MotionDirector Sec. 3.2.
    "spatial-self-attention-ff": rf"{_SPATIAL}.*({_LINEARS.format(1)}|{_FF})\.weight",
    "temporal-attention-ff": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight",
    # Customize-A-Video, with the output projection, which its parameter counts include.
    "spatial-attention": rf"{_SPATIAL}.*{_LINEARS.format('[12]')}\.weight",
    "temporal-attention": rf"{_TEMPORAL}.*{_LINEARS.format('[12]')}\.weight",
    "cross-attention-kv": rf"{_SPATIAL}.*attn2\.to_[kv]\.weight",  # Custom Diffusion
    # Tune-A-Video Sec. 4.2.
    "tune-a-video": rf"{_SPATIAL}.*attn[12]\.to_q\.weight|{_TEMPORAL}.*attn[12]\..*",
    "temporal": r"transformer_in\..*|.*temp_(attentions|convs)\..*",
    "temporal-convs": r".*temp_convs\..*",
    "spatial": r"(?!transformer_in|.*temp_(attentions|convs)).*",
    # Chosen here, for LoRA.
    "temporal-linears-convs": rf"{_TEMPORAL}.*({_LINEARS.format('[12]')}|{_FF})\.weight"
                              r"|.*temp_convs\..*\.[23]\.weight",
    "all": r".*",
}
LAYERS |= {  # unions of two sets
    # NewMove Sec. 3.2.
    "temporal-and-cross-kv": f"{LAYERS['temporal']}|{LAYERS['cross-attention-kv']}",
    # MotionDirector's baseline, without and with temporal convolutions.
    "coupled": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-attention-ff']}",
    "coupled-convs": f"{LAYERS['spatial-self-attention-ff']}|{LAYERS['temporal-linears-convs']}",
}


def select(unet, layers):
    """{name: parameter} of a layer set or a pattern. Raises BadInput if none matches."""
    pattern, sets = pattern_of(layers, unet), layer_sets(unet)
    chosen = {n: p for n, p in unet.named_parameters() if pattern.fullmatch(n)}
    if not chosen:
        raise BadInput(f"layers={layers!r} matches no parameter; give one of {', '.join(sets)}, "
                       "or a pattern over parameter names.")
    return chosen


def layer_sets(network=None):
    """The layer sets of a network: LAYERS, unless it has its own."""
    return getattr(network, "layer_sets", LAYERS)


def pattern_of(layers, network=None):
    """The compiled pattern of a layer set, or a user's pattern. Raises BadInput."""
    sets = layer_sets(network)
    return re.compile(sets[layers]) if layers in sets else read_pattern(layers)


def read_pattern(text):
    """A user's pattern, compiled. Raises BadInput."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"{text[:60]!r} is not a regular expression ({error}).") from None


class FinetunedNames:
    """The names of all fully fine-tuned parameters, known before the network is loaded: `name in
    FinetunedNames(parts)`. All other parameters may be stored in bf16."""

    def __init__(self, parts, network=None):
        self.parts, self.patterns = parts, []
        for part in parts.values():
            if isinstance(part, Trainable) and part.trainable and not part.rank:
                self.patterns.append(pattern_of(part.layers, network))

    def __contains__(self, name):
        return any(pattern.fullmatch(name) for pattern in self.patterns)


def lora_targets(unet, layers):
    """{module name: module} of the linear layers and temporal convolutions in a layer set."""
    found = {}
    for name in select(unet, layers):
        module = unet.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(module, (nn.Linear, fast.TemporalConv1d)):
            found[name.removesuffix(".weight")] = module
    if not found:
        raise BadInput(f"layers={layers} has no linear layer or temporal convolution for a LoRA; "
                       "choose other layers, or rank=0.")
    return found


# --- The parts of a method, as settings. Their `build` makes the object to train ----------------


@dataclass(frozen=True)
class Trainable:
    """Layers trained fully (rank 0) or with a LoRA. With layers=none, frozen weights or nothing."""

    layers: str  # a key of LAYERS, a pattern, or none
    rank: int = 0
    scale: float = 1.0  # LoRA scale
    dropout: float = 0.0  # of the LoRA output
    per_video: bool = False  # one LoRA per clip
    load_from: str = ""  # adapter to train further; with layers=none, a file to use frozen
    lr: float = 1e-4
    weight_decay: float = 0.01
    lr_multipliers: str = ""  # for some layers: pattern:factor,pattern:factor

    @property
    def trainable(self):
        """True if it has trainable parameters."""
        return self.layers != "none"

    def uses(self, field):
        """True if a setting has an effect."""
        if self.layers == "none":
            return field in ("layers", "load_from")
        return self.rank > 0 or field not in ("scale", "dropout", "per_video")

    def build(self, pipe, seed, clip):
        """A FullFinetune, a LoRA, ExternalWeights, or None."""
        if self.layers == "none":
            return ExternalWeights(pipe, self.load_from) if self.load_from else None
        if self.rank:
            return LoRA(pipe.unet, self.layers, self.rank, self.scale, self.dropout, seed)
        return FullFinetune(pipe.unet, self.layers)


@dataclass(frozen=True)
class PlaceholderToken:
    """A token in captions that stands for the motion, the subject or the appearance. With
    num_vectors > 0, its embedding is trained (Textual Inversion)."""

    token: str
    num_vectors: int = 0
    initializer_token: str = ""  # a word in the vocabulary
    load_from: str = ""  # adapter to train further
    lr: float = 1e-4
    weight_decay: float = 0.01
    lr_multipliers: str = field(default="", repr=False)

    per_video = False

    @property
    def trainable(self):
        """True if it has trainable parameters."""
        return self.num_vectors > 0

    def uses(self, field):
        """True if a setting has an effect."""
        return self.num_vectors > 0 or field in ("token", "num_vectors")

    def build(self, pipe, seed, clip):
        """A TokenEmbedding, or None without vectors."""
        if not self.num_vectors:
            return None
        return TokenEmbedding(pipe.text_encoder, self.token, self.num_vectors,
                              self.initializer_token, seed)


# --- Objects with trainable parameters ----------------------------------------------------------


class Trained:
    """The base class. `active` enables and disables it; its names are part of adapter files."""

    active = True

    def parameters(self):
        """{name: parameter} for the optimizer."""
        return {}

    def tensors(self):
        """{name in an adapter file: tensor}."""
        return self.parameters()

    def load(self, saved):
        """Set the parameters to the tensors of an adapter file. Raises BadInput."""
        for name, p in self.tensors().items():
            if not isinstance(p, nn.Parameter):
                raise BadInput(f"{type(self).__name__} has no load method for {name}, so it cannot "
                               "be trained further; drop load_from.")
            p.data.copy_(saved[name])


class FullFinetune(Trained):
    """Fully fine-tuned layers. They are always active."""

    def __init__(self, unet, layers):
        self.chosen = select(unet, layers)

    def parameters(self):
        return self.chosen

    def tensors(self):
        return {f"unet.{name}": p for name, p in self.chosen.items()}


class LoRA(Trained):
    """y = W·x + s·B·A·x on every linear layer and temporal convolution of a layer set (Hu et al.
    2021, Eq. 3; MotionDirector Eq. 3; Customize-A-Video Eq. 2).

    A (r, in) is initialized from N(0, 1/r²) and B (out, r) with zeros, so a new LoRA changes
    nothing. The rank is at most the layer's width. Dropout applies to the LoRA output, as in
    MotionDirector's code. Forward hooks add that output, so the UNet's modules and parameter names
    do not change. For sampling, adapters.apply_adapters merges the LoRA into W.
    """

    def __init__(self, unet, layers, rank, scale=1.0, dropout=0.0, seed=0):
        self.scale, self.dropout, self.pairs = scale, dropout, {}
        g = torch.Generator().manual_seed(seed)
        for name, layer in lora_targets(unet, layers).items():
            c_out, c_in, *kernel = layer.weight.shape
            r, device = min(rank, c_out, c_in), layer.weight.device
            A = torch.empty(r, c_in, *kernel).normal_(0, 1 / r, generator=g)
            B = torch.zeros(c_out, r, *[1] * len(kernel))
            self.pairs[name] = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
            layer.register_forward_hook(partial(self.hook, *self.pairs[name]))

    def hook(self, A, B, layer, inputs, out):
        """The forward hook of one layer."""
        if not self.active:
            return out
        if A.dim() == 2:
            low = F.linear(F.linear(inputs[0], A), B)
        else:  # a temporal convolution: A is 3 frames wide, B pointwise
            low = F.conv2d(F.conv2d(inputs[0], A.squeeze(-1), padding=(1, 0)), B.squeeze(-1))
        return out.add(fast.dropout(low, self.dropout, layer.training), alpha=self.scale)

    def parameters(self):
        """{name: parameter} with peft's names: <module>.lora_A.weight and .lora_B.weight."""
        found = {}
        for name, (A, B) in self.pairs.items():
            found |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        return found

    def tensors(self):
        """With the scale multiplied into B, so peft-compatible loaders apply the same update."""
        return formats.to_peft({name: (A, B * self.scale) for name, (A, B) in self.pairs.items()})

    def load(self, saved):
        if not self.scale:
            raise BadInput("scale=0: a LoRA of this scale cannot be trained further; raise it.")
        for name, p in formats.to_peft(self.pairs).items():
            p.data.copy_(saved[name] / (self.scale if name.endswith("lora_B.weight") else 1))


class TokenEmbedding(Trained):
    """Trainable vectors of a token in the text encoder, used wherever a caption has the token."""

    def __init__(self, text_encoder, token, count, initializer, seed):
        if not token.strip():
            raise BadInput("a trainable token must not be empty: word.token=sks.")
        table, ids = text_encoder.token_table, text_encoder.words_to_ids(token)
        # A word of the vocabulary starts from its own vector, any other from the initializer or
        # "thing". Noise makes several vectors differ.
        if len(ids) > 1 or initializer:
            ids = text_encoder.words_to_ids(initializer.strip() or "thing")[:1]
        start = table[ids].detach().float().expand(count, -1)
        noise = sampler.seeded_randn(start.shape, [seed])[0].to(start) * table.std() * 0.1
        self.token, self.vectors = token, nn.Parameter(start + noise * (count > 1))
        text_encoder.learned[token] = self.vectors

    def parameters(self):
        return {f"word.{self.token}": self.vectors}


class ExternalWeights(Trained):
    """Frozen weights of another program, a LoRA or an image UNet. While active, they replace the
    model's weights."""

    def __init__(self, pipe, path):
        adapter = adapters.read_adapter(path, pipe, whole=True)
        if adapter.words:
            raise BadInput(f"{path} holds learned tokens ({', '.join(adapter.words)}), which no "
                           "caption contains; train the absorber here, or give a LoRA.")
        self.named, self.swapped_in = dict(pipe.unet.named_parameters()), False
        self.other = {n: t.float() for n, t in adapter.tensors.items()}
        for layer, (A, B) in adapter.pairs.items():
            name = f"{layer}.weight"
            W = self.other.get(name, self.named[name].data.float())
            self.other[name] = W + adapters.lora_delta(A, B, W)

    @property
    def active(self):
        return self.swapped_in

    @active.setter
    def active(self, active):
        if active != self.swapped_in:
            for name, tensor in self.other.items():
                p = self.named[name]
                p.data, self.other[name] = tensor.to(p), p.data
        self.swapped_in = active


def build_trainables(parts, pipe, clips, seed):
    """{part: [one trainable, or one per clip]}, without parts that have no weights. Parts with the
    same load_from are loaded together. Raises BadInput."""
    trainables = {}
    for number, (name, part) in enumerate(parts.items()):
        built = []
        for i, clip in enumerate(clips if part.per_video else clips[:1]):
            built.append(part.build(pipe, seed * 100 + number + 1000 * i, clip))
        if built[0] is not None:
            trainables[name] = built
    files = {}
    for name, built in trainables.items():
        if parts[name].load_from and parts[name].trainable:
            files.setdefault(parts[name].load_from, []).extend(built)
    for path, built in files.items():
        adapters.load_trainables(path, built, pipe)
    return trainables


def named(trainables):
    """{unique name: parameter} over all trainables, in a fixed order. A parameter fine-tuned by two
    parts appears once."""
    out = {}
    for part, built in trainables.items():
        for i, one in enumerate(built):
            shared = isinstance(one, (FullFinetune, TokenEmbedding))
            prefix = "" if shared else f"{part}.{i}."
            out |= {prefix + n: p for n, p in one.parameters().items()}
    return out


def set_trainable(trainables, train=(), frozen=(), clip=0):
    """Train the parts in `train`, keep those in `frozen` active but fixed, disable the rest. If
    each clip has its own trainable, this selects one by index. Returns the active tokens of
    appearance parts, for the end of captions."""
    for built in trainables.values():
        for one in built:
            one.active = False
            for p in one.parameters().values():
                p.requires_grad_(False)
    tokens = []
    for name in (*frozen, *train):
        built = trainables.get(name, ())
        for one in built[clip : clip + 1] if len(built) > 1 else built:
            one.active = True
            for p in one.parameters().values():
                p.requires_grad_(name in train)
            if isinstance(one, TokenEmbedding) and name.startswith("appearance"):
                tokens.append(one.token)
    return tokens


# --- The optimizer ------------------------------------------------------------------------------


def build_optimizer(parts, trainables):
    """AdamW with one parameter group per learning rate and weight decay."""
    groups, seen = {}, set()
    for name, built in trainables.items():
        part, used = parts[name], set()
        multipliers = read_multipliers(part.lr_multipliers)
        for parameter, p in (row for one in built for row in one.parameters().items()):
            factor = 1.0
            for pattern, value in multipliers.items():
                if re.search(pattern, parameter):
                    used.add(pattern)
                    factor = value
            if id(p) not in seen:
                seen.add(id(p))
                groups.setdefault((part.lr * factor, part.weight_decay), []).append(p)
        if unused := set(multipliers) - used:
            raise BadInput(f"{name}.lr_multipliers: no trainable layer matches "
                           f"{', '.join(unused)}.")
    if not groups:
        raise BadInput("no trainable parameters with these settings; choose layers, or num_vectors "
                       "of a token.")
    rows = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    return torch.optim.AdamW(rows, betas=(0.9, 0.999), eps=1e-8, fused=True)


def read_multipliers(text):
    """{pattern: factor} from "attn1:2,attn2:0.5"."""
    multipliers = {}
    for item in filter(None, text.split(",")):
        pattern, _, factor = item.rpartition(":")
        try:
            multipliers[read_pattern(pattern).pattern] = float_in(0, 1e6)(factor)
        except ValueError:
            raise BadInput(f"lr_multipliers: {item[:60]!r}; expected pattern:factor,pattern:factor."
                           ) from None
    return multipliers
