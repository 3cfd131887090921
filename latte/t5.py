"""The encoder of T5 v1.1 (Raffel et al. 2020), with the names of the released files.

Axes: B prompts, N tokens, D width.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from latte.tokenizer import Tokenizer
from support import hub
from support.files import BadInput, number, one_of, read_fields, read_json, read_tensors, reading

LENGTH, PAD, END = 120, 0, 1  # tokens per prompt, with the end token and padding


@dataclass
class T5Config:
    """text_encoder/config.json."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = number(1, 10**6, 32128)
    relative_attention_num_buckets: int = number(4, 1024, 32)
    relative_attention_max_distance: int = number(2, 10**4, 128)
    layer_norm_epsilon: float = number(0, 1, 1e-6)
    feed_forward_proj: str = one_of("gated-gelu")


class Block(nn.Module):
    """Self-attention, then a feed-forward network with a gated GELU; no linear layer has a bias."""

    def __init__(self, c, first):
        super().__init__()
        self.heads, inner = c.num_heads, c.num_heads * c.d_kv
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        norm = lambda: nn.RMSNorm(c.d_model, c.layer_norm_epsilon)
        attend = {name: linear(c.d_model, inner) for name in "qkv"}
        attend["o"] = linear(inner, c.d_model)
        if first:  # its table is the attention bias of all blocks
            table = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)
            attend["relative_attention_bias"] = table
        feed = {name: linear(c.d_model, c.d_ff) for name in ("wi_0", "wi_1")}
        feed["wo"] = linear(c.d_ff, c.d_model)
        self.layer = nn.ModuleList([
            nn.ModuleDict({"SelfAttention": nn.ModuleDict(attend), "layer_norm": norm()}),
            nn.ModuleDict({"DenseReluDense": nn.ModuleDict(feed), "layer_norm": norm()})])

    def forward(self, x, bias):
        """x (B, N, D), bias (B, heads, N, N). The scores are not divided by √d."""
        attend, y = self.layer[0]["SelfAttention"], self.layer[0]["layer_norm"](x)
        q, k, v = (attend[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        x = x + attend["o"](y.transpose(1, 2).flatten(2))
        feed, y = self.layer[1]["DenseReluDense"], self.layer[1]["layer_norm"](x)
        return x + feed["wo"](F.gelu(feed["wi_0"](y), approximate="tanh") * feed["wi_1"](y))


class T5(nn.Module):
    """Token embeddings (B, N, D) and a mask (B, N) of the tokens to attend to -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = nn.ModuleDict({
            "block": nn.ModuleList(Block(c, i == 0) for i in range(c.num_layers)),
            "final_layer_norm": nn.RMSNorm(c.d_model, c.layer_norm_epsilon)})

    def forward(self, x, mask):
        table = self.encoder["block"][0].layer[0]["SelfAttention"]["relative_attention_bias"]
        bias = table(distance_buckets(x.shape[1], self.config).to(x.device)).permute(2, 0, 1)
        bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)


def distance_buckets(N, config):
    """(N, N) buckets of the distances key − query: near distances have one each, far ones share
    buckets of logarithmic width."""
    half = config.relative_attention_num_buckets // 2
    near = half // 2
    distance = torch.arange(N)[None] - torch.arange(N)[:, None]
    size, most = distance.abs(), config.relative_attention_max_distance
    ratio = torch.log(size.clamp(min=1) / near) / math.log(most / near)
    far = (near + (ratio * (half - near)).long()).clamp(max=half - 1)
    return torch.where(size < near, size, far) + half * (distance > 0)


class PromptEncoder:
    """Prompts -> states (B, 120, D + 1), whose last channel is 1 for tokens and 0 for padding.
    T5 is in memory only while prompts are encoded, or words have learned vectors."""

    def __init__(self, folder, dtype):
        path = folder / "text_encoder" / "config.json"
        with reading(path, "take the file from the folder of the weights"):
            self.config = read_fields(T5Config, read_json(path), path)
        self.words_to_ids = Tokenizer(folder / "tokenizer" / "spiece.model")
        self.folder, self.dtype, self.device = path.parent, dtype, "cpu"
        self.config.hidden_size = self.config.d_model
        self.t5, self.learned = None, {}  # word -> vectors (n, D)

    def to(self, device):
        self.device, self.t5 = device, None

    @property
    def token_table(self):
        """The embeddings of all tokens (V, D) in T5, which is read unless it is in memory. Its
        files are converted one by one: all together have 19 GB in fp32."""
        if self.t5 is None:
            state = {}
            for path in hub.find_weights(self.folder):
                state |= {name: t.to(self.dtype) for name, t in read_tensors(path).items()}
            state.pop("encoder.embed_tokens.weight", None)  # a copy of `shared`
            with torch.device("meta"):
                self.t5 = T5(self.config)
            hub.load_strictly(self.t5, state, self.folder)
            self.t5.requires_grad_(False).to(self.device)
        return self.t5.shared.weight

    def __call__(self, prompts):
        table, new_ids = self.token_table, {}
        for word, vectors in self.learned.items():  # their ids follow the table's
            new_ids[word] = list(range(len(table), len(table) + len(vectors)))
            table = torch.cat([table, vectors.to(table)])
        rows = []
        for prompt in prompts:  # lowercased, as in the published pipeline
            row = [*self.words_to_ids(prompt.lower().strip(), new_ids), END]
            if len(row) > LENGTH:
                raise BadInput(f"prompt {prompt[:40]!r}… has {len(row)} tokens, expected at most "
                               f"{LENGTH}; shorten it.")
            rows.append(row + [PAD] * (LENGTH - len(row)))
        ids = torch.tensor(rows, device=table.device)
        states = self.t5(table[ids], ids != PAD)
        return torch.cat([states, (ids != PAD)[..., None].to(states)], dim=-1)
