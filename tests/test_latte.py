"""latte/: parity with diffusers, transformers and tokenizers, and the methods on a small Latte."""
import copy
import json
import random
import re
import struct

import diffusers
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, learn, prepared, relative
from safetensors.torch import load_file

import generate
import lora
import model
import sampler
import train
from latte.t5 import T5, PromptEncoder, T5Config
from latte.tokenizer import Tokenizer
from latte.transformer import LAYERS, Latte, LatteConfig
from support.files import BadInput

FULL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
        "out_channels": 8, "caption_channels": 4096, "sample_size": 64, "patch_size": 2,
        "norm_eps": 1e-6, "activation_fn": "gelu-approximate"}
HUB_ONLY = {"attention_bias": True, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False}
SMALL = FULL | {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12,
                "caption_channels": 32, "sample_size": 8}
T5_FULL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "vocab_size": 640}


def hub_latte(config, frames=4):
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return diffusers.LatteTransformer3DModel(
        **config, **HUB_ONLY, cross_attention_dim=width, video_length=frames).eval()


def hub_t5(config):
    return transformers.T5EncoderModel(transformers.T5Config(
        **config, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()


def load_state(module, hub):
    state = dict(hub.state_dict())
    state.pop("encoder.embed_tokens.weight", None)
    module.load_state_dict(state, strict=True)
    return module.to(next(hub.parameters()).dtype)


# ------------------------------------------------------------------------------------------------
# A small folder, with random weights in fp16 and a tokenizer trained on the README


@pytest.fixture(scope="session")
def vocabulary():
    """[(piece, score)] as T5 has them: padding, end, unknown, then the pieces."""
    own = tokenizers.Tokenizer(tokenizers.models.Unigram())
    own.normalizer = tokenizers.normalizers.NFKC()
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=600, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"])
    own.train_from_iterator((ROOT / "README.md").read_text().splitlines(), trainer)
    return [tuple(row) for row in json.loads(own.to_str())["model"]["vocab"]]


@pytest.fixture(scope="session")
def spiece(vocabulary, tmp_path_factory):
    """The vocabulary as a SentencePiece file, with some of its other fields at the end."""
    data = b""
    for i, (text, score) in enumerate(vocabulary):
        text = text.encode()
        piece = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        piece += {0: b"\x18\x03", 1: b"\x18\x03", 2: b"\x18\x02"}.get(i, b"")
        data += b"\n" + bytes([len(piece)]) + piece
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(data + b"\x12\x05\x0a\x03abc")
    return path


def hub_tokenizer(vocabulary):
    exact = [(text, struct.unpack("<f", struct.pack("<f", score))[0]) for text, score in vocabulary]
    return transformers.T5Tokenizer(vocab=exact, extra_ids=0)


@pytest.fixture(scope="session")
def hub_pipeline(vocabulary):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    latte = hub_latte(SMALL)
    for part in (vae, latte):  # numbers that fp16 holds
        part.load_state_dict({n: t.half().float() for n, t in part.state_dict().items()})
    return diffusers.LattePipeline(hub_tokenizer(vocabulary), hub_t5(T5_SMALL), vae, latte, scheduler)


@pytest.fixture(scope="session")
def folder_latte(hub_pipeline, spiece, tmp_path_factory):
    folder = tmp_path_factory.mktemp("Latte")
    copy.deepcopy(hub_pipeline.transformer).half().save_pretrained(folder / "transformer")
    hub_pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="40KB")
    hub_pipeline.vae.save_pretrained(folder / "vae")
    hub_pipeline.scheduler.save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    (folder / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    return folder


@pytest.fixture
def latte(folder_latte):
    return model.load(folder_latte)


# ------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("change,shape", [
    ({}, (4, 8, 8)), ({"num_layers": 3, "num_attention_heads": 2, "sample_size": 8}, (6, 12, 4)),
    ({"sample_size": 128, "out_channels": 4, "caption_channels": 48}, (1, 8, 16))])
def test_the_transformer_equals_diffusers(change, shape):
    """On clips whose prompts differ in length, with and without temporal blocks."""
    torch.manual_seed(1)
    config = SMALL | change
    hub = hub_latte(config, shape[0]).double()
    own = load_state(Latte(LatteConfig(**config)), hub)
    x, t = torch.randn(2, 4, *shape).double(), torch.tensor([7, 901])
    text = torch.randn(2, 9, config["caption_channels"]).double()
    mask = (torch.arange(9) < torch.tensor([[5], [9]])).double()
    for temporal in (True, False):
        got = own(x, t, torch.cat([text, mask[..., None]], dim=-1), temporal)
        for i, length in enumerate((5, 9)):
            want = hub(x[i:i + 1], t[i:i + 1], text[i:i + 1, :length], return_dict=False,
                       enable_temporal_attentions=temporal)[0][:, :4]
            assert relative(got[i:i + 1], want) < 1e-10


@pytest.mark.parametrize("change", [
    {}, {"num_layers": 3, "d_kv": 16, "relative_attention_max_distance": 20},
    {"relative_attention_num_buckets": 8, "layer_norm_epsilon": 1e-3}])
def test_t5_equals_transformers(change, monkeypatch):
    """transformers rounds norms and softmax to fp32; without that both agree in fp64."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norm = lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    monkeypatch.setattr(T5LayerNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    torch.manual_seed(2)
    hub = hub_t5(T5_SMALL | change).double()
    own = load_state(T5(T5Config(**T5_SMALL | change)), hub)
    ids, mask = torch.randint(0, 640, (2, 60)), torch.ones(2, 60, dtype=torch.bool)
    mask[1, 20:] = False
    want = hub(ids, attention_mask=mask.long()).last_hidden_state
    assert relative(own(own.shared(ids), mask), want) < 1e-10


def test_full_size_names_and_shapes_are_the_hubs():
    with torch.device("meta"):
        pairs = [(Latte(LatteConfig(**FULL)), hub_latte(FULL)),
                 (T5(T5Config(**T5_FULL)), hub_t5(T5_FULL | {"vocab_size": 32128}))]
    for own, hub in pairs:
        shapes = {n: t.shape for n, t in hub.state_dict().items() if "embed_tokens" not in n}
        assert {n: t.shape for n, t in own.state_dict().items()} == shapes
    total = [sum(p.numel() for p in own.parameters()) for own, _ in pairs]
    assert total == [1_057_246_880, 4_762_310_656]


PIECES = ["a dog's ball", "naïve", "ﬁsh", "ｆｕｌｌ", "日本", "½", "—", "\u00a0", "\u200b", "\t", "é",
          "e\u0301", "🙂", "①", "...", "10%", "№", "Å", "\u2028", "\x07", "ﷺ", "𝒳", "ǆ", "sks"]


def test_the_tokenizer_equals_tokenizers(spiece, vocabulary):
    """NFKC and the space rules of nmt_nfkc, on lines of this repository and random strings."""
    hub, own = hub_tokenizer(vocabulary), Tokenizer(spiece)
    rules = tokenizers.normalizers
    hub._tokenizer.normalizer = rules.Sequence([rules.Nmt(), rules.NFKC()])
    draw = random.Random(0)
    words = (ROOT / "README.md").read_text().split() + PIECES * 20
    texts = (ROOT / "train.py").read_text().splitlines()
    texts += ["".join(draw.choice(words) + draw.choice(["", " ", "  "]) for _ in range(8))
              for _ in range(2000)]
    differ = [t for t in texts if own(t) != hub(t, add_special_tokens=False).input_ids]
    assert not differ, differ[:3]


def test_the_pipeline_equals_diffusers(hub_pipeline, latte, capsys):
    """Text, its mask, guidance, DDIM, the ignored variance and the VAE."""
    start, prompt = torch.randn(1, 4, 4, 8, 8, generator=sampler.generator(3)), "A dog doing the sks "
    want = hub_pipeline(prompt, num_inference_steps=3, guidance_scale=7.5, latents=start,
                        video_length=4, height=64, width=64, output_type="pt").frames
    got = sampler.sample(latte, [prompt], start, [0], steps=3, guidance=7.5)
    assert relative(got.transpose(1, 2) / 2 + 0.5, want) < 1e-5
