"""model.py against diffusers and transformers: the same names, shapes and numbers."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, relative
from safetensors.torch import load_file, save_file

import model

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

HEAD = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
FULL_UNET = HEAD | {
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "attention_head_dim": 64,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}
NARROW_UNET = HEAD | {
    "block_out_channels": [32, 64, 64], "cross_attention_dim": 24, "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock3D"] * 2 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 2,
}
FULL_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16}


def shapes(module):
    return {n: list(t.shape) for n, t in module.state_dict().items()}


def listed(name):
    return json.loads((ROOT / "tests" / "reference" / f"{name}_keys.json").read_text())


def unhide(module):
    """Zero-initialised layers and fresh norms hide bugs: give every one of them a say, the layers
    as loud a one as their neighbours'."""
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


def test_full_size_unet_has_the_released_names_and_shapes():
    with torch.device("meta"):
        unet = model.UNet(model.UNetConfig(**FULL_UNET))
    assert shapes(unet) == listed("unet") and len(listed("unet")) == 1480
    assert sum(p.numel() for p in unet.parameters()) == 1_411_233_860


def test_full_size_vae_has_the_released_names_and_shapes():
    with torch.device("meta"):
        vae = model.VAE(model.VAEConfig([128, 256, 512, 512]))
    assert shapes(vae) == listed("vae") and len(listed("vae")) == 248


def test_full_size_text_encoder_maps_to_the_released_names_and_shapes():
    with torch.device("meta"):
        text = model.TextEncoder(model.TextConfig(**FULL_TEXT))
    hub = model.text_to_hub(text.tower.state_dict())
    got = {n: list(t.shape) for n, t in hub.items()}
    want = listed("text")
    assert len(want) == 373
    want.pop("text_model.embeddings.position_ids")  # a constant, which we drop when reading
    assert got == want


# ------------------------------------------------------------------------------------------------
# Numbers, in fp64 and narrow


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    theirs = unhide(diffusers.UNet3DConditionModel(**NARROW_UNET).double())
    ours = model.UNet(model.UNetConfig(**NARROW_UNET)).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_two_texts_a_clip_are_two_clips(unets):
    """What guidance asks for in one batch: all first texts, then all second ones."""
    ours, _ = unets
    x = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    t, text = torch.tensor([981, 3]), torch.randn(4, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        both = ours(x, t, text)
        apart = torch.cat([ours(x, t, text[:2]), ours(x, t, text[2:])])
    assert both.shape == (4, 4, 3, 8, 8) and relative(both, apart) <= 1e-12


@pytest.mark.parametrize("frames,h,w", [(3, 12, 18), (5, 9, 16)])
def test_unet_equals_diffusers(unets, frames, h, w):
    ours, theirs = unets
    x = torch.randn(2, 4, frames, h, w, dtype=torch.float64)
    t, text = torch.tensor([981, 3]), torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours(x, t, text), theirs(x, t, text).sample) <= 1e-10


def test_unet_gradients_equal_diffusers(unets):
    """The plain attention that training takes on a CPU, and its gradient, are the same too."""
    ours, theirs = unets
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    name = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    grads = [torch.autograd.grad(out.square().sum(), net.get_parameter(name))[0]
             for net, out in ((ours, ours(x, 500, text)), (theirs, theirs(x, 500, text).sample))]
    assert relative(*grads) <= 1e-10


def test_checkpointing_changes_no_gradient(unets):
    ours, _ = unets
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    grads = []
    for ours.checkpointing in (False, True):
        out = ours(x, 500, text).square().sum()
        grads.append(torch.autograd.grad(out, ours.get_parameter("conv_in.weight"))[0])
    ours.checkpointing = False
    assert relative(*grads) <= 1e-12


def test_what_is_computed_again_changes_no_gradient_and_is_not_kept(unets, monkeypatch):
    """With every tensor counted as large, against none, with dropout on."""
    ours, _ = unets
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    weights, grads, kept = {p.data_ptr() for p in ours.parameters()}, [], []

    def pack(t):
        seen.setdefault(t.data_ptr(), t.nbytes if t.data_ptr() not in weights else 0)
        return t

    ours.train()
    for large in (2**40, 0):
        monkeypatch.setattr(model, "LARGE", large)
        torch.manual_seed(0)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ours(x, 500, text).square().sum()
        kept.append(sum(seen.values()))
        grads.append(torch.autograd.grad(out, list(ours.parameters())))
    ours.eval()
    assert all(relative(a, b) <= 1e-12 for a, b in zip(*grads))
    assert kept[1] < 0.75 * kept[0]


def test_channels_stay_last(unets):
    """Or the kernels reorder every activation."""
    ours, _ = unets
    wrong = []
    last = torch.channels_last
    hooks = [m.register_forward_hook(lambda m, inputs, out, n=n: wrong.append(n) if out.dim() == 4
             and not out.is_contiguous(memory_format=last) else None)
             for n, m in ours.named_modules()]
    for B in (1, 2):
        ours(torch.randn(B, 4, 3, 8, 8).double(), 500, torch.randn(2, 5, 24).double())
    for hook in hooks:
        hook.remove()
    assert len(hooks) > 100 and [n for n in wrong if not n.startswith("time_emb")] == []


def test_without_temporal_layers_frames_do_not_meet(unets):
    """As an image model the UNet ignores every temporal weight, and each frame stands alone."""
    ours, _ = unets
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    broken = model.UNet(ours.config).double().eval()
    broken.load_state_dict(ours.state_dict())
    for name, p in broken.named_parameters():
        if "temp_" in name or "transformer_in" in name:
            p.data.fill_(float("nan"))
    with torch.no_grad():
        whole = ours(x, 10, text, temporal=False)
        assert torch.equal(broken(x, 10, text, temporal=False), whole)
        alone = ours(x[:, :, [1]], 10, text, temporal=False)
        assert relative(whole[:, :, [1]], alone) <= 1e-12
        assert relative(whole, ours(x, 10, text)) > 1e-3


def test_the_frame_embedding_is_off_and_starts_silent(unets):
    """No released model has one. Where it is on, it says nothing until trained, and never to the
    image model."""
    ours, _ = unets
    assert not hasattr(ours, "frame_embedding")
    told = model.UNet(model.UNetConfig(**NARROW_UNET, frame_embedding=True)).double().eval()
    told.load_state_dict(ours.state_dict(), strict=False)
    x, text = torch.randn(1, 4, 3, 8, 8).double(), torch.randn(1, 5, 24).double()
    with torch.no_grad():
        assert torch.equal(told(x, 10, text), ours(x, 10, text))
        told.frame_embedding.linear_2.weight.normal_()
        assert relative(told(x, 10, text), ours(x, 10, text)) > 1e-3
        assert torch.equal(told(x, 10, text, temporal=False), ours(x, 10, text, temporal=False))


def test_vae_equals_diffusers():
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


def hub_tokenizer(folder):
    """The hub's CLIP tokenizer, made from the vocabulary that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer

    ours = SimpleTokenizer()
    names = {token.replace("<start_of_text>", "<|startoftext|>")
             .replace("<end_of_text>", "<|endoftext|>"): i for token, i in ours.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(ours.bpe_ranks.items(), key=lambda m: m[1])]
    (folder / "vocab.json").write_text(json.dumps(names))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!")


@pytest.mark.parametrize("prompt", [
    "a person is riding a bicycle", "", "Two SHARKS, swimming in the sea.",
    "wow! it's a 4K video!!", "a person doing the sks dance", "naïve café 鯊魚", "word " * 100,
])
def test_tokens_equal_the_hubs(prompt, tmp_path):
    theirs = hub_tokenizer(tmp_path)
    want = theirs(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    assert model.tokenize([prompt])[0].tolist() == want


def test_text_encoder_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "hidden_act": "gelu", "vocab_size": 49408,
              "max_position_embeddings": 77}
    theirs = unhide(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).double())
    hub = {n if n.startswith("text_model.") else "text_model." + n: t.contiguous()
           for n, t in theirs.state_dict().items()}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hub, folder / "model.safetensors")
    ours = model.load_text(tmp_path, dtype=torch.float64)
    prompts = ["a bird is flying", "a much longer prompt, with commas, about two sharks! moving"]
    with torch.no_grad():
        want = theirs(model.tokenize(prompts)).last_hidden_state
        assert ours(prompts).shape == (2, 77, 48)
        assert relative(ours(prompts), want) <= 1e-10


def test_text_names_go_there_and_back():
    with torch.device("meta"):
        tower = model.TextEncoder(model.TextConfig(**FULL_TEXT)).tower.state_dict()
    back = {n: tuple(t.shape) for n, t in model.text_from_hub(model.text_to_hub(tower)).items()}
    assert back == {n: tuple(t.shape) for n, t in tower.items()}


# ------------------------------------------------------------------------------------------------
# Folders


def copy_tiny(folder):
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (folder / part).mkdir(parents=True)
        for file in (TINY / part).iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes())
    return folder


def test_bin_and_old_vae_names_load_the_same(tmp_path, tiny):
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
    for part in ("unet", "vae", "text"):
        want = getattr(tiny, part).state_dict()
        assert all(torch.equal(t, want[n]) for n, t in getattr(again, part).state_dict().items())


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/evil-ran",)


def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path):
    from pathlib import Path

    folder = copy_tiny(tmp_path / "w")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    Path("/tmp/evil-ran").unlink(missing_ok=True)
    with pytest.raises(model.BadInput, match="diffusion_pytorch_model.bin"):
        model.load(folder)
    assert not Path("/tmp/evil-ran").exists()


def damage(kind, path):
    state = load_file(path)
    first = next(iter(state))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "trailing":
        path.write_bytes(path.read_bytes() + b"more")
    elif kind == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    elif kind == "missing":
        del state[first]
    elif kind == "extra":
        state["extra.weight"] = torch.zeros(1)
    elif kind == "shape":
        state[first] = state[first][:1].clone()
    elif kind == "nan":
        state[first].view(-1)[0] = float("nan")
    if kind in ("missing", "extra", "shape", "nan"):
        save_file(state, path)


@pytest.mark.parametrize("kind,says", [
    ("truncated", "cannot be read"), ("trailing", "cannot be read"),
    ("huge header", "cannot be read"), ("missing", "missing"),
    ("extra", "extra.weight unexpected"), ("shape", "wanted"),
    ("nan", "NaN"), ("gone", "has no weights"),
])
def test_damaged_weights_are_named_in_one_line(kind, says, tmp_path):
    folder = copy_tiny(tmp_path / "w")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.unlink() if kind == "gone" else damage(kind, path)
    with pytest.raises(model.BadInput, match=says) as error:
        model.load(folder)
    assert "unet" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_full_size_unet_equals_diffusers():
    """Once, in fp32, at full depth and width: every bug listed in the tolerance table shows."""
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
# ModelScope's original format


def test_pth_names_are_modelscopes():
    listed = json.loads((ROOT / "tests/reference/unet_modelscope_pth_map.json").read_text())
    assert len(listed) == 1480
    assert {ours: model.pth_name(ours) for ours in listed} == {k: v[0] for k, v in listed.items()}


def test_an_original_pth_loads_as_the_same_unet(tmp_path):
    """Written under ModelScope's names, with its convolutions of width 1, and read back."""
    unet = model.UNet(model.UNetConfig(**NARROW_UNET))
    state = {}
    for name, tensor in unet.state_dict().items():
        wide = name.endswith(("proj_in.weight", "proj_out.weight"))
        state[model.pth_name(name)] = tensor[..., None] if wide else tensor
    (tmp_path / "unet").mkdir()
    torch.save({"state_dict": state}, tmp_path / "unet" / "text2video.pth")
    (tmp_path / "unet" / "config.json").write_text(json.dumps(NARROW_UNET))
    read = model.load_unet(tmp_path).state_dict()
    assert all(torch.equal(read[n], t) for n, t in unet.state_dict().items())


@pytest.mark.parametrize("large", [0, 2**40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_has_the_rate_the_scale_and_the_gradient_of_dropout(layout, large, monkeypatch):
    monkeypatch.setattr(model, "LARGE", large)
    x = torch.rand(2, 31, 40, 53).add(0.1).to(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    y = model.dropout(x, 0.2, True)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=5e-3)  # 3σ: 0.0033
    for axis in range(4):  # no stripes: every row of every axis loses its share
        share = kept.float().mean([a for a in range(4) if a != axis])
        assert (share - 0.8).abs().max() < 0.05
    torch.testing.assert_close(y[kept], x[kept] / 0.8)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.8)
    assert not torch.equal(kept, model.dropout(x, 0.2, True) != 0)
    assert model.dropout(x, 0.2, False) is x and model.dropout(x, 0.0, True) is x


@pytest.mark.parametrize("tokens", [16, 77, 1100])  # fp32 softmax, bf16 softmax, fused
def test_attention_takes_three_roads_to_one_result(tokens):
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16() for n in (20, tokens, tokens))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(model.attend(q, k, v).double(), exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        model.attend(q.double(), k.double(), v.double()), exact, atol=1e-12, rtol=0)
