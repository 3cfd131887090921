"""latte/: parity with diffusers, transformers and tokenizers, and the methods on a small Latte."""
import copy
import json
import random
import re
import struct

import pytest
import torch
from conftest import ROOT, Optional, prepare_run, relative, run_training
from safetensors.torch import load_file
from torch.nn import functional as F

import generate
import lora
import model
import sampler
import train
from latte.t5 import T5, T5Config
from latte.tokenizer import Tokenizer
from latte.transformer import LAYERS, Latte, LatteConfig
from support.files import BadInput

diffusers, tokenizers, transformers = map(Optional, ("diffusers", "tokenizers", "transformers"))
FULL = dict(num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4,
            out_channels=8, caption_channels=4096, sample_size=64, patch_size=2)
SMALL = FULL | dict(num_layers=2, attention_head_dim=4, caption_channels=32, sample_size=8)
T5_FULL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
T5_SMALL = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=640)


def hub_latte(config, frames=4):
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return diffusers.LatteTransformer3DModel(
        **config, video_length=frames, norm_eps=1e-6, activation_fn="gelu-approximate",
        attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
        num_embeds_ada_norm=1000, cross_attention_dim=width)


def hub_t5(config):
    config = transformers.T5Config(**config, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return transformers.T5EncoderModel(config)


def state(hub):
    return {n: t for n, t in hub.state_dict().items() if "embed_tokens" not in n}  # T5 has two


@pytest.fixture(scope="session")
def hub_pipeline():
    """With random weights, the transformer's rounded to fp16, and a tokenizer of the README."""
    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.Unigram())
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.train_from_iterator((ROOT / "README.md").open(), tokenizers.trainers.UnigramTrainer(
        vocab_size=600, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"]))
    words = json.loads(words.to_str())["model"]["vocab"]
    words = [(piece, torch.tensor(score).item()) for piece, score in words]  # fp32, as in a file
    vae = diffusers.AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4,
                                  (32,) * 4)
    latte = hub_latte(SMALL)
    latte.load_state_dict({n: t.half() for n, t in latte.state_dict().items()})
    return diffusers.LattePipeline(
        transformers.T5Tokenizer(vocab=words, extra_ids=0), hub_t5(T5_SMALL), vae, latte,
        diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False))


@pytest.fixture(scope="session")
def weights(hub_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("Latte")
    copy.deepcopy(hub_pipeline.transformer).half().save_pretrained(folder / "transformer")
    hub_pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="40KB")
    hub_pipeline.vae.save_pretrained(folder / "vae")
    hub_pipeline.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "LattePipeline"}')
    data = b""
    for i, (text, score) in enumerate(hub_pipeline.tokenizer._vocab_scores):
        piece = bytes([10, len(text.encode())]) + text.encode()
        piece += b"\x15" + struct.pack("<f", score) if score else b""
        piece += b"\x18\x03" if i < 2 else b"\x18\x02" if i == 2 else b""
        data += bytes([10, len(piece)]) + piece
    (folder / "tokenizer").mkdir()  # after the pieces, another field
    (folder / "tokenizer" / "spiece.model").write_bytes(data + b"\x12\x05\x0a\x03abc")
    return folder


@pytest.mark.parametrize("change,shape", [
    ({}, (4, 8, 8)), ({"num_layers": 3, "num_attention_heads": 2}, (6, 12, 4)),
    ({"sample_size": 128, "out_channels": 4, "caption_channels": 48}, (1, 8, 16))])
def test_the_transformer_equals_diffusers(change, shape):
    """On clips whose prompts differ in length, with and without temporal blocks."""
    config = SMALL | change
    hub = hub_latte(config, shape[0]).double()
    own = Latte(LatteConfig(**config)).double()
    own.load_state_dict(state(hub))
    x, t = torch.randn(2, 4, *shape).double(), torch.tensor([7, 901])
    text, tokens = torch.randn(2, 9, config["caption_channels"]).double(), torch.tensor([5, 9])
    for temporal in (True, False):
        mask = torch.arange(9) < tokens[:, None]
        got = own(x, t, torch.cat([text, mask[..., None]], dim=-1), temporal)
        for i, n in enumerate(tokens):
            expected = hub(x[i:i + 1], t[i:i + 1], text[i:i + 1, :n], return_dict=False,
                           enable_temporal_attentions=temporal)[0][:, :4]
            assert relative(got[i:i + 1], expected) < 1e-10


@pytest.mark.parametrize("change", [
    {}, {"num_layers": 3, "d_kv": 16, "relative_attention_max_distance": 20},
    {"relative_attention_num_buckets": 8, "layer_norm_epsilon": 1e-3}])
def test_t5_equals_transformers(change, monkeypatch):
    """transformers rounds norms and softmax to fp32, which is turned off here."""
    norm = lambda own, x: F.rms_norm(x, x.shape[-1:], own.weight, own.variance_epsilon)
    monkeypatch.setattr("transformers.models.t5.modeling_t5.T5LayerNorm.forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    hub, own = hub_t5(T5_SMALL | change).double(), T5(T5Config(**T5_SMALL | change)).double()
    own.load_state_dict(state(hub))
    ids, mask = torch.randint(0, 640, (2, 60)), torch.arange(60) < torch.tensor([[60], [20]])
    expected = hub(ids, attention_mask=mask.long()).last_hidden_state
    assert relative(own(own.shared(ids), mask), expected) < 1e-10


def test_at_full_size_names_and_shapes_are_the_hubs_and_counts_the_readmes():
    with torch.device("meta"):
        latte = Latte(LatteConfig(**FULL))
        pairs = ((latte, hub_latte(FULL)), (T5(T5Config(**T5_FULL)), hub_t5(T5_FULL)))
    count = lambda parameters: f"{sum(p.numel() for p in parameters):,}"
    for (own, hub), number in zip(pairs, ("1,057,246,880", "4,762,310,656")):
        own.load_state_dict(state(hub), assign=True)  # refuses other names and shapes
        assert count(own.parameters()) == number
    rows = re.findall(r"^\| .* \| `([\w-]+)` \| .* \| (?:full|LoRA, rank (\d+)) \| ([\d,]+) \|$",
                      (ROOT / "latte" / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 10
    for layers, rank, number in rows:
        chosen = (lora.LoRA(latte, layers, int(rank)).parameters() if rank
                  else lora.select(latte, layers))
        assert count(chosen.values()) == number


def test_the_tokenizer_equals_tokenizers(hub_pipeline, weights):
    """With the rules of nmt_nfkc, on lines of this repository and random strings."""
    hub, own = hub_pipeline.tokenizer, Tokenizer(weights / "tokenizer" / "spiece.model")
    rules, draw = tokenizers.normalizers, random.Random(0)
    hub._tokenizer.normalizer = rules.Sequence([rules.Nmt(), rules.NFKC()])
    words = (ROOT / "README.md").read_text().split() + 20 * [
        *"naïve ﬁsh ｆｕｌｌ 日本 ½ — é e\u0301 🙂 ① № Å ﷺ 𝒳 ǆ".split(" "), *"\u00a0\u200b\t\a"]
    texts = (ROOT / "train.py").read_text().splitlines()
    texts += ["".join(draw.choice(words) + draw.choice(["", " ", "  "]) for _ in range(8))
              for _ in range(2000)]
    assert [t for t in texts if own(t) != hub(t, add_special_tokens=False).input_ids] == []


def test_the_pipeline_equals_diffusers(hub_pipeline, weights):
    """Text, its mask, guidance, DDIM, the ignored variance and the VAE."""
    start, prompt = sampler.seeded_randn((4, 4, 8, 8), [3]), "A dog doing the sks "
    expected = hub_pipeline(prompt, num_inference_steps=3, guidance_scale=7.5, latents=start,
                            video_length=4, height=64, width=64, output_type="pt").frames
    got = sampler.sample(model.load(weights), [prompt], start, [0], steps=3, guidance=7.5)
    assert relative(got.transpose(1, 2) / 2 + 0.5, expected) < 1e-5


def flags(weights, *more):
    return ("--weights", weights, "--size", "64x64", "--precision", "fp32", *more)


def sample(adapter, out, weights, *more):
    generate.main([str(a) for a in ("--adapter", adapter, "--prompt", "a dog doing the sks",
                                    "--steps", 2, "--out", out, *flags(weights, *more))])


@pytest.mark.parametrize("method,more,sets", [
    ("vmc", ("--precision", "bf16"), {"": "temporal-attention-qkv"}),
    ("motiondirector", ("spatial_prob=1", "--precision", "bf16"),
     {"": "temporal-attention-ff", "-appearance": "spatial-self-attention-ff"}),
    ("newmove", (), {"": "temporal-and-cross-kv"}),
    ("customize-a-video", ("absorber_steps=1",),
     {"": "temporal-attention", "-appearance": "spatial-attention"}),
    ("coupled", (), {"": "coupled"}), ("dreambooth", ("num_prior_clips=1",), {"": "spatial"}),
    ("custom-diffusion", (), {"": "cross-attention-kv"}), ("textual-inversion", (), {"": "word"}),
    ("tune-a-video", (), {"": "tune-a-video"})])
def test_every_method_trains_and_samples(method, more, sets, weights, hop, tmp_path, capsys):
    """Its adapters have tensors of its layer sets alone, and change the layers."""
    run_training(method, hop, tmp_path / "run", *flags(weights, "--steps", 2, *more))
    for suffix, layers in sets.items():
        path = tmp_path / "run" / f"{method}{suffix}.safetensors"
        names = [re.sub(r"\.lora_[AB]|^unet\.", "", name) for name, tensor
                 in load_file(path).items() if tensor.dtype == torch.float32]
        pattern = re.compile(LAYERS.get(layers, "word") + r"|word\.sks|clip_latents")
        assert names and all(map(pattern.fullmatch, names))
        sample(path, tmp_path / f"out{suffix}", weights)
        assert ("‖ΔW‖/‖W‖ = 0\n" in capsys.readouterr().out) == (layers == "word")


def test_gradient_checkpointing_gives_the_same_gradients(weights, hop, tmp_path):
    gradients, calls = [], []
    for on in ("off", "on"):
        run = prepare_run("newmove", hop, tmp_path / on, *flags(weights, "--checkpointing", on))
        block = run.pipe.unet.transformer_blocks[1]
        block.register_forward_pre_hook(lambda *_, on=on: calls.append(on))
        train.one_step(run, 0)
        gradients.append([p.grad for p in lora.named(run.trainables).values()])
    assert calls == ["off", "on", "on"] and all(
        torch.equal(a, b) and a.any() for a, b in zip(*gradients))


def test_a_resumed_run_is_the_same_run_and_its_merged_folder_opens(weights, hop, tmp_path):
    own = flags(weights, "motion.lr=1e-2", "--steps")
    run_training("newmove", hop, tmp_path / "whole", *own, 4)
    run_training("newmove", hop, tmp_path / "two", *own, 2)
    run_training("newmove", hop, tmp_path / "two", *own, 4, "--resume")
    adapter = tmp_path / "two" / "newmove.safetensors"
    sample(adapter, tmp_path / "out", weights, "--save-merged", tmp_path / "merged")
    hub = diffusers.LatteTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer")
    whole, two = load_file(tmp_path / "whole" / adapter.name), load_file(adapter)
    assert all(torch.equal(whole[name], two[name]) for name in two)
    merged = {f"unet.{name}": tensor for name, tensor in hub.state_dict().items()}
    assert all(torch.equal(merged[n], two[n].half().float()) for n in two if n in merged)
    assert model.load(tmp_path / "merged").encode_text(["a"]).shape == (1, 120, 33)


def test_without_temporal_blocks_frames_do_not_meet(weights):
    latte, x = model.load(weights), torch.randn(1, 4, 4, 8, 8)
    text, other = latte.encode_text(["a dog"]), x + torch.eye(4)[2].view(4, 1, 1)
    for temporal, expected in ((False, [True, True, False, True]), (True, [False] * 4)):
        a, b = latte.predict(x, 500, text, temporal), latte.predict(other, 500, text, temporal)
        assert (a == b).all(dim=(0, 1, 3, 4)).tolist() == expected


def test_t5_is_read_once_and_leaves_memory(weights, hop, tmp_path, monkeypatch):
    """Except while a word has learned vectors."""
    read, t5 = [], T5
    monkeypatch.setattr("latte.t5.T5", lambda config: read.append(config) or t5(config))
    run = prepare_run("vmc", hop, tmp_path / "a", *flags(weights))
    train.preview(run)
    train.one_step(run, 0)
    assert len(read) == 1 and run.pipe.text_encoder.t5 is None
    run = prepare_run("textual-inversion", hop, tmp_path / "b", *flags(weights))
    train.one_step(run, 0)
    assert run.pipe.text_encoder.t5 is not None and run.trainables["word"][0].vectors.grad.any()


def test_what_does_not_fit_is_refused(weights):
    latte, odd = model.load(weights), torch.randn(1, 4, 4, 9, 8)
    for message, action in (
            ("expected at most 120", lambda: latte.encode_text(["dog " * 120])),
            ("multiples of 16 pixels", lambda: latte.predict(odd, 5, latte.encode_text([""]))),
            ("give one of temporal-att", lambda: lora.select(latte.unet, "temporal-convs")),
            ("config.json cannot be used", lambda: Tokenizer(weights / "vae" / "config.json"))):
        with pytest.raises(BadInput, match=message):
            action()
