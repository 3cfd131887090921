"""model.py compared with diffusers and transformers: names, shapes and numbers."""
import copy
import json
import math
import os
import shutil
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from conftest import FULL_TEXT, FULL_UNET, NARROW_UNET, ROOT, TINY, relative
from safetensors.torch import load_file, save_file

import model
from support import fast, hub, tokenizer
from support.files import BadInput, read_tensors
from tiny.train import text_to_hub


def shapes(module):
    return {n: list(t.shape) for n, t in module.state_dict().items()}


def listed(name):
    return json.loads((ROOT / "tests" / "reference" / f"{name}_keys.json").read_text())


def unhide(module):
    """Give zero-initialized layers and new norms random weights, since they would hide bugs."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        if p.dim() == 1:
            p.data += 0.1 * noise
        elif p.abs().sum() == 0:
            p.data += noise / p[0].numel() ** 0.5
    return module.eval()


# ------------------------------------------------------------------------------------------------
# Names and shapes at full size


def test_the_full_size_unet_has_the_released_names_and_shapes(full):
    assert shapes(full) == listed("unet") and len(listed("unet")) == 1480
    assert sum(p.numel() for p in full.parameters()) == 1_411_233_860


def test_the_full_size_vae_has_the_released_names_and_shapes():
    with torch.device("meta"):
        vae = model.VAE(model.VAEConfig([128, 256, 512, 512]))
    assert shapes(vae) == listed("vae") and len(listed("vae")) == 248


def test_the_full_size_text_encoder_maps_to_the_released_names_and_shapes():
    with torch.device("meta"):
        text = model.TextEncoder(model.TextConfig(**FULL_TEXT))
    renamed = text_to_hub(text.tower.state_dict())
    got = {n: list(t.shape) for n, t in renamed.items()}
    want = listed("text")
    assert len(want) == 373
    want.pop("text_model.embeddings.position_ids")  # a constant, dropped when reading
    assert got == want
    back = {n: list(t.shape) for n, t in hub.text_from_hub(renamed).items()}
    assert back == shapes(text.tower)


# ------------------------------------------------------------------------------------------------
# Numbers, in fp64 and narrow


@pytest.fixture(scope="module")
def ours():
    """A narrow UNet in fp64."""
    torch.manual_seed(0)
    return unhide(model.UNet(model.UNetConfig(**NARROW_UNET)).double())


@pytest.fixture(scope="module")
def theirs(ours, diffusers):
    """diffusers' UNet with the same weights."""
    theirs = diffusers.UNet3DConditionModel(**NARROW_UNET).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def test_two_texts_per_clip_equal_two_calls(ours):
    """Guidance batches all first texts, then all second ones."""
    x = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    t, text = torch.tensor([981, 3]), torch.randn(4, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        both = ours(x, t, text)
        apart = torch.cat([ours(x, t, text[:2]), ours(x, t, text[2:])])
    assert both.shape == (4, 4, 3, 8, 8) and relative(both, apart) <= 1e-12


@pytest.mark.parametrize("frames,h,w", [(3, 12, 18), (5, 9, 16)])
def test_the_unet_equals_diffusers(ours, theirs, frames, h, w):
    x = torch.randn(2, 4, frames, h, w, dtype=torch.float64)
    t, text = torch.tensor([981, 3]), torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x, t, text), theirs(x, t, text).sample) <= 1e-10


def test_the_unets_gradients_equal_diffusers(ours, theirs):
    """Training on a CPU uses plain attention."""
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    name = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    grads = [torch.autograd.grad(out.square().sum(), net.get_parameter(name))[0]
             for net, out in ((ours, ours(x, 500, text)), (theirs, theirs(x, 500, text).sample))]
    assert relative(*grads) <= 1e-10


def test_gradient_checkpointing_changes_no_gradient(ours):
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    grads = []
    for ours.checkpointing in (False, True):
        out = ours(x, 500, text).square().sum()
        grads.append(torch.autograd.grad(out, ours.get_parameter("conv_in.weight"))[0])
    ours.checkpointing = False
    assert relative(*grads) <= 1e-12


def test_activations_stay_channels_last(ours):
    """Otherwise the kernels would reorder every activation."""
    wrong, last = [], torch.channels_last

    def check(name, out):
        out = out[0] if isinstance(out, tuple) else out  # a block returns its skips too
        if out.dim() == 4 and not out.is_contiguous(memory_format=last):
            wrong.append(name)

    hooks = [m.register_forward_hook(lambda m, inputs, out, n=n: check(n, out))
             for n, m in ours.named_modules()]
    for B in (1, 2):
        ours(torch.randn(B, 4, 3, 8, 8).double(), 500, torch.randn(2, 5, 24).double())
    for hook in hooks:
        hook.remove()
    assert len(hooks) > 100 and [n for n in wrong if not n.startswith("time_emb")] == []


def test_with_temporal_layers_bypassed_frames_are_independent(ours):
    """The UNet is then an image model, which no temporal weight changes."""
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    broken = model.UNet(ours.config).double().eval()
    broken.load_state_dict(ours.state_dict())
    for name, p in broken.named_parameters():
        if "temp_" in name or "transformer_in" in name:
            p.data.fill_(float("nan"))
    with torch.no_grad():
        images = ours(x, 10, text, temporal=False)
        assert torch.equal(broken(x, 10, text, temporal=False), images)
        alone = ours(x[:, :, [1]], 10, text, temporal=False)
        assert relative(images[:, :, [1]], alone) <= 1e-12
        assert relative(images, ours(x, 10, text)) > 1e-3


def test_the_tiny_unet_opens_in_diffusers(tiny, diffusers):
    theirs = diffusers.UNet3DConditionModel.from_pretrained(TINY / "unet").double().eval()
    ours = copy.deepcopy(tiny.unet).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 16, 8, 8, generator=g).double()
    text = torch.randn(1, 77, 64, generator=g).double()
    with torch.no_grad():
        assert relative(ours(x, 500, text), theirs(x, 500, text).sample) <= 1e-10


def test_the_vae_equals_diffusers(diffusers):
    torch.manual_seed(0)
    widths = [16, 32, 32]
    theirs = unhide(diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3).double())
    ours = model.VAE(model.VAEConfig(widths, norm_num_groups=8)).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, z = torch.randn(2, 3, 32, 40).double(), torch.randn(2, 4, 7, 9).double()
    with torch.no_grad():
        mean, std = ours.encode(x)
        want = theirs.encode(x).latent_dist
        assert relative(mean, want.mean) <= 1e-10 and relative(std, want.std) <= 1e-10
        assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-10


def test_the_text_encoder_equals_transformers(transformers, tmp_path):
    torch.manual_seed(0)
    config = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "hidden_act": "gelu", "vocab_size": 49408,
              "max_position_embeddings": 77}
    theirs = unhide(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).double())
    state = {n if n.startswith("text_model.") else "text_model." + n: t.contiguous()
             for n, t in theirs.state_dict().items()}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    ours = model.load_text(tmp_path, dtype=torch.float64)
    prompts = ["a bird is flying", "a much longer prompt, with commas, about two sharks! moving"]
    with torch.no_grad():
        want = theirs(tokenizer.tokenize(prompts)).last_hidden_state
        assert ours(prompts).shape == (2, 77, 48)
        assert relative(ours(prompts), want) <= 1e-10


# ------------------------------------------------------------------------------------------------
# Folders


def copy_tiny(folder):
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        shutil.copytree(TINY / part, folder / part)
    return folder


def test_bin_files_and_old_vae_names_load_the_same_weights(tmp_path, tiny):
    folder = copy_tiny(tmp_path / "old")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        path = folder / part / f"{stem}.safetensors"
        state = load_file(path)
        path.unlink()
        if part == "vae":
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                             ("proj_attn", "to_out.0")):
                state = {n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t
                         for n, t in state.items()}
            assert any("proj_attn" in n for n in state)
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(state, folder / part / name)
    again = model.load(folder)
    for part in ("unet", "vae", "text_encoder"):
        want = getattr(tiny, part).state_dict()
        assert all(torch.equal(t, want[n]) for n, t in getattr(again, part).state_dict().items())


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_code_in_a_weights_file_is_refused_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy_tiny(tmp_path / "w")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match="diffusion_pytorch_model.bin"):
        model.load(folder)
    assert not (tmp_path / "ran").exists()


BROKEN_BYTES = {"truncated": lambda raw: raw[:-1000], "trailing": lambda raw: raw + b"more",
                "huge header": lambda raw: (2**62).to_bytes(8, "little") + raw[8:]}
BROKEN_STATES = {  # {kind: (message, changed tensors)}
    "missing": ("missing", lambda name, t: {}),
    "extra": ("extra.weight is .*, expected none",
              lambda name, t: {name: t, "extra.weight": t.clone()}),
    "shape": (r"\(.*\), .*\(.*\)", lambda name, t: {name: t[:1].clone()}),
    "nan": ("NaN", lambda name, t: {name: t.where(torch.arange(len(t)) > 0, math.nan)}),
}


@pytest.mark.parametrize("kind", (*BROKEN_BYTES, *BROKEN_STATES, "gone"))
def test_damaged_weights_are_refused_in_one_line(kind, tmp_path):
    path = copy_tiny(tmp_path / "w") / "unet" / "diffusion_pytorch_model.safetensors"
    message, change = BROKEN_STATES.get(kind, ("cannot be|has no weights", None))
    if kind in BROKEN_BYTES:
        path.write_bytes(BROKEN_BYTES[kind](path.read_bytes()))
    elif change:
        state = load_file(path)
        save_file(state | change("conv_in.bias", state.pop("conv_in.bias")), path)
    else:
        path.unlink()
    with pytest.raises(BadInput, match=message) as error:
        model.load(tmp_path / "w")
    assert "unet" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part,change,message", [
    ("unet", {"_class_name": "UNet2DConditionModel"}, "_class_name"),
    ("unet", {"act_fn": "gelu"}, "act_fn"),
    ("unet", {"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
    ("unet", {"num_attention_heads": 8}, "num_attention_heads"),
    ("unet", {"norm_num_groups": None}, "norm_num_groups"),
    ("unet", {"sample_size": [8, 12]}, "sample_size"),
    ("unet", {"block_out_channels": [64, 1e9]}, "block_out_channels"),
    ("unet", {"block_out_channels": [64, 100]}, "does not match its config.json"),
    ("unet", {"down_block_types": ["DownBlock3D"] * 2}, "does not match its config.json"),
    ("unet", {"layers_per_block": True}, "layers_per_block"),
    ("unet", {"norm_eps": float("nan")}, "norm_eps"),
    ("vae", {"shift_factor": 0.1}, "shift_factor"),
    ("vae", {"scaling_factor": float("nan")}, "scaling_factor"),
    ("vae", {"layers_per_block": 3}, "does not match its config.json"),
    ("text_encoder", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("text_encoder", {"num_attention_heads": 5}, "divisible"),
    ("scheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ("scheduler", {"thresholding": True}, "thresholding"),
    ("scheduler", {"steps_offset": "x"}, "steps_offset"),
    ("scheduler", {"clip_sample": None}, "clip_sample"),
])
def test_a_configuration_of_another_architecture_is_refused(part, change, message, tmp_path):
    shutil.copytree(TINY / part, tmp_path / part)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    values = json.loads((TINY / part / name).read_text()) | change
    (tmp_path / part / name).write_text(json.dumps(values))
    load = {"unet": model.load_unet, "vae": model.load_vae, "text_encoder": model.load_text,
            "scheduler": model.load_schedule}[part]
    with pytest.raises(BadInput, match=message) as error:
        load(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors",
                                  "diffusion_pytorch_model.non_ema.bin",
                                  "diffusion_pytorch_model.bf16.safetensors"])
def test_the_hubs_variants_load_after_the_plain_file(name, tmp_path):
    folder = copy_tiny(tmp_path / "w") / "vae"
    plain = folder / "diffusion_pytorch_model.safetensors"
    state = {n: t.bfloat16() if "bf16" in name else t for n, t in load_file(plain).items()}
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    assert hub.find_weights(folder) == [plain]
    plain.unlink()
    assert hub.find_weights(folder) == [folder / name]
    read = model.load_vae(tmp_path / "w").state_dict()
    assert all(torch.equal(read[n], t.float()) for n, t in state.items())


def test_shards_load_together(tmp_path):
    folder = copy_tiny(tmp_path / "w") / "vae"
    path = folder / "diffusion_pytorch_model.safetensors"
    state, shards = load_file(path), ({}, {})
    path.unlink()
    for i, name in enumerate(state):
        shards[i % 2][name] = state[name]
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-0000{i + 1}-of-00002.safetensors")
    read = model.load_vae(tmp_path / "w").state_dict()
    assert all(torch.equal(read[n], t) for n, t in state.items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="missing"):
        model.load_vae(tmp_path / "w")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda: torch.eye(3).to_sparse(), lambda: torch.zeros(3, device="meta"),
    lambda: torch.zeros(3).cfloat(), lambda: torch.zeros(3).bool(),
    lambda: torch.zeros(3, dtype=torch.int32), lambda: torch.zeros(1).expand(10**6, 10**6),
    lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), lambda: 3,
], ids=["sparse", "meta", "complex", "bool", "int", "expanded", "quantized", "no tensor"])
def test_tensors_without_plain_numbers_are_refused(make, tmp_path):
    torch.save({"conv.weight": make()}, tmp_path / "x.bin")
    with pytest.raises(BadInput, match="x.bin") as error:
        read_tensors(tmp_path / "x.bin")
    assert "\n" not in str(error.value)


def test_position_ids_may_be_integers(tmp_path):
    state = {"text.position_ids": torch.arange(77), "a": torch.zeros(2).half()}
    torch.save(state, tmp_path / "x.bin")
    assert read_tensors(tmp_path / "x.bin")["a"].shape == (2,)


def test_bf16_stores_frozen_weights_alone(tiny):
    """They take half the memory. The prediction changes by the rounding of the weights."""
    kept = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    halved = model.load(precision="bf16", keep=[kept])
    kinds = {n: p.dtype for n, p in halved.unet.named_parameters()}
    assert kinds[kept] == kinds["conv_out.weight"] == torch.float32
    assert kinds["conv_in.weight"] == torch.bfloat16 and math.isclose(
        sum(p.nbytes for p in halved.unet.parameters())
        / sum(p.nbytes for p in tiny.unet.parameters()), 0.5, abs_tol=0.02)
    x, text = torch.randn(1, 8, 4, 8, 8), tiny.encode_text(["a red ball is moving left"])
    with torch.no_grad():
        got, want = halved.predict(x, 300, text), tiny.predict(x, 300, text)
    assert got.dtype == torch.float32 and relative(got, want) < 0.05
    later = model.load(precision="bf16")
    later.store_frozen([kept])
    again = later.unet.state_dict()
    assert all(torch.equal(t, again[n]) and t.stride() == again[n].stride()
               for n, t in halved.unet.state_dict().items())


def test_a_posterior_sample_depends_on_its_own_generator(tiny):
    video = torch.rand(2, 3, 4, 64, 64) * 2 - 1
    seeds = lambda *all: [torch.Generator().manual_seed(s) for s in all]
    mean, drawn = tiny.encode(video), tiny.encode(video, seeds(1, 2))
    assert mean.shape == (2, 8, 4, 8, 8) and 0 < relative(drawn, mean) < 0.5
    assert torch.equal(tiny.encode(video[1:], seeds(2)), drawn[1:])
    assert tiny.decode(mean).shape == video.shape


@pytest.mark.slow
def test_the_full_size_unet_equals_diffusers(diffusers):
    """In fp32, at full depth and width."""
    torch.manual_seed(0)
    theirs = unhide(diffusers.UNet3DConditionModel(**FULL_UNET))
    with torch.device("meta"):
        ours = model.UNet(model.UNetConfig(**FULL_UNET)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x, text = torch.randn(2, 4, 4, 8, 12), torch.randn(2, 77, 1024)
    t = torch.tensor([901, 41])
    with torch.no_grad():
        error = relative(ours(x, t, text), theirs(x, t, text).sample)
    print(f"full size, fp32: relative L2 {error:.2e}")
    assert error <= 4e-6


# ------------------------------------------------------------------------------------------------
# The fast functions equal torch's own


def plain(monkeypatch):
    """Replace all fast functions of the UNet by torch's own."""
    monkeypatch.setattr(fast, "sequential", lambda layers, x: reduce(lambda x, f: f(x), layers, x))
    monkeypatch.setattr(fast, "geglu", lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]))
    monkeypatch.setattr(fast, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    conv3d = lambda m, x: F.conv3d(x[..., None], m.weight, m.bias, padding=(1, 0, 0))[..., 0]
    monkeypatch.setattr(fast.TemporalConv1d, "forward", conv3d)
    monkeypatch.setattr(fast.Dropout, "forward", torch.nn.Dropout.forward)


@pytest.mark.parametrize("dtype,within", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("large", [0, 2**40])
def test_the_unet_equals_plain_torch(dtype, within, large, monkeypatch):
    """Outputs and gradients, where all tensors count as large and where none does. In fp32, fused
    attention alone rounds by 1.3e-6."""
    torch.manual_seed(0)
    unet = unhide(model.UNet(model.UNetConfig(**NARROW_UNET)).to(dtype))
    x, text = torch.randn(2, 4, 3, 8, 8).to(dtype), torch.randn(2, 7, 24).to(dtype)
    results = []
    monkeypatch.setattr(fast, "LARGE", large)
    for undo in (lambda m: None, plain):
        undo(monkeypatch)
        out = unet(x, 500, text)
        grads = torch.autograd.grad(out.square().sum(), list(unet.parameters()))
        results.append((out, torch.cat([g.flatten() for g in grads])))
    assert all(relative(a, b) <= within for a, b in zip(*results))


def test_recomputed_activations_change_no_gradient_and_are_not_kept(ours, monkeypatch):
    """All tensors count as large, then none. Dropout is on."""
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    weights, grads, kept = {p.data_ptr() for p in ours.parameters()}, [], []

    def pack(t):
        seen.setdefault(t.data_ptr(), t.nbytes if t.data_ptr() not in weights else 0)
        return t

    ours.train()
    for large in (2**40, 0):
        monkeypatch.setattr(fast, "LARGE", large)
        torch.manual_seed(0)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ours(x, 500, text).square().sum()
        kept.append(sum(seen.values()))
        grads.append(torch.autograd.grad(out, list(ours.parameters())))
    ours.eval()
    assert all(relative(a, b) <= 1e-12 for a, b in zip(*grads))
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.parametrize("large", [0, 2**40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_dropout_has_the_rate_scale_and_gradient_of_dropout(layout, large, monkeypatch):
    monkeypatch.setattr(fast, "LARGE", large)
    x = torch.rand(2, 31, 40, 53).add(0.1).to(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    y = fast.dropout(x, 0.2, True)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=5e-3)  # 3σ: 0.0033
    for axis in range(4):  # no stripes along any axis
        share = kept.float().mean([a for a in range(4) if a != axis])
        assert (share - 0.8).abs().max() < 0.05
    torch.testing.assert_close(y[kept], x[kept] / 0.8)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.8)
    assert not torch.equal(kept, fast.dropout(x, 0.2, True) != 0)
    assert fast.dropout(x, 0.2, False) is x and fast.dropout(x, 0.0, True) is x


@pytest.mark.parametrize("tokens", [16, 77, 1100])  # fp32 softmax, bf16 softmax, fused
def test_the_three_kernels_of_attention_agree(tokens):
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16() for n in (20, tokens, tokens))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours = fast.scaled_dot_product_attention
    torch.testing.assert_close(ours(q, k, v).double(), exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ours(q.double(), k.double(), v.double()), exact, atol=1e-12, rtol=0)


def test_fused_attention_stays_within_cudas_grid(monkeypatch):
    """It is split, here into parts of two rows. The meta device stands in for a GPU."""
    seen, q = [], torch.randn(5, 3, 4, 8)
    want = F.scaled_dot_product_attention(q, q, q)
    monkeypatch.setattr(fast, "MAX_GRID", 6)
    monkeypatch.setattr(fast.F, "scaled_dot_product_attention",
                        lambda q, k, v: seen.append(len(q)) or fast._plain_attention(q, k, v))
    assert fast.scaled_dot_product_attention(*[q.to("meta")] * 3).shape == q.shape
    assert seen == [2, 2, 1]
    torch.testing.assert_close(fast._batched_attention(q, q, q, 2), want)


def test_attention_maps_are_the_weights_of_attention(ours):
    """From a forward hook's inputs, in self-attention and in cross-attention."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, inputs, out: seen.append((m, inputs, out)))
             for n, m in ours.named_modules() if "0.attentions.0" in n and n.endswith(("1", "2"))
             and isinstance(m, model.Attention)]
    with torch.no_grad():
        ours(torch.randn(1, 4, 3, 8, 8).double(), 500, torch.randn(1, 5, 24).double())
        for m, inputs, out in seen:
            maps = m.maps(*inputs)
            value = m.split(m.to_v(inputs[-1]))
            again = m.to_out[0]((maps @ value).transpose(1, 2).flatten(2))
            assert relative(again, out) <= 1e-12 and maps.shape[1] == m.heads
    for hook in hooks:
        hook.remove()
    assert {m.maps(*inputs).shape[-1] for m, inputs, _ in seen} >= {5, 64}
