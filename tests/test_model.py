"""model.py against diffusers and transformers: the same names, shapes and numbers."""
import copy
import json
import math
import shutil
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, relative
from safetensors.torch import load_file, save_file

import model
from support import fast, hub, tokenizer
from support.files import BadInput, read_tensors

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
    renamed = hub.text_to_hub(text.tower.state_dict())
    got = {n: list(t.shape) for n, t in renamed.items()}
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


def test_channels_stay_last(unets):
    """Or the kernels reorder every activation."""
    ours, _ = unets
    wrong = []
    last = torch.channels_last

    def look(name, out):
        outputs = out if isinstance(out, tuple) else (out,)  # a block's, with its skips
        if any(o.dim() == 4 and not o.is_contiguous(memory_format=last) for o in outputs[:1]):
            wrong.append(name)

    hooks = [m.register_forward_hook(lambda m, inputs, out, n=n: look(n, out))
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


def test_the_tiny_unet_is_diffusers_own_graph(tiny):
    """The folder opens in other programs, with equal outputs."""
    theirs = diffusers.UNet3DConditionModel.from_pretrained(TINY / "unet").double().eval()
    ours = copy.deepcopy(tiny.unet).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 16, 8, 8, generator=g).double()
    text = torch.randn(1, 77, 64, generator=g).double()
    with torch.no_grad():
        assert relative(ours(x, 500, text), theirs(x, 500, text).sample) <= 1e-10


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
    assert tokenizer.tokenize([prompt])[0].tolist() == want


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
        want = theirs(tokenizer.tokenize(prompts)).last_hidden_state
        assert ours(prompts).shape == (2, 77, 48)
        assert relative(ours(prompts), want) <= 1e-10


def test_text_names_go_there_and_back():
    with torch.device("meta"):
        tower = model.TextEncoder(model.TextConfig(**FULL_TEXT)).tower.state_dict()
    back = {n: tuple(t.shape) for n, t in hub.text_from_hub(hub.text_to_hub(tower)).items()}
    assert back == {n: tuple(t.shape) for n, t in tower.items()}


# ------------------------------------------------------------------------------------------------
# Folders


def copy_tiny(folder):
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        shutil.copytree(TINY / part, folder / part)
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
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path):
    folder = copy_tiny(tmp_path / "w")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    evil = {"conv_in.weight": Evil(tmp_path / "ran")}
    torch.save(evil, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match="diffusion_pytorch_model.bin"):
        model.load(folder)
    assert not (tmp_path / "ran").exists()


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
    with pytest.raises(BadInput, match=says) as error:
        model.load(folder)
    assert "unet" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part,change,says", [
    ("unet", {"_class_name": "UNet2DConditionModel"}, "_class_name"),
    ("unet", {"down_block_types": ["CrossAttnDownBlock3D", "DownBlockMotion"]}, "DownBlockMotion"),
    ("unet", {"act_fn": "gelu"}, "act_fn"),
    ("unet", {"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
    ("unet", {"num_attention_heads": 8}, "num_attention_heads"),
    ("unet", {"norm_num_groups": None}, "norm_num_groups"),
    ("unet", {"sample_size": [8, 12]}, "sample_size"),
    ("unet", {"block_out_channels": [64, 1e9]}, "block_out_channels"),
    ("unet", {"block_out_channels": [64, 100]}, "multiple of"),
    ("unet", {"layers_per_block": True}, "layers_per_block"),
    ("unet", {"norm_eps": float("nan")}, "norm_eps"),
    ("vae", {"shift_factor": 0.1}, "shift_factor"),
    ("vae", {"scaling_factor": float("nan")}, "scaling_factor"),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "AttnDownEncoderBlock2D"),
    ("text_encoder", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("text_encoder", {"num_attention_heads": 5}, "multiple of"),
    ("scheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ("scheduler", {"thresholding": True}, "thresholding"),
    ("scheduler", {"steps_offset": "x"}, "steps_offset"),
    ("scheduler", {"clip_sample": None}, "clip_sample"),
])
def test_a_configuration_that_means_another_model_is_refused_by_name(part, change, says, tmp_path):
    (tmp_path / part).mkdir()
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    values = json.loads((TINY / part / name).read_text()) | change
    (tmp_path / part / name).write_text(json.dumps(values))
    load = {"unet": model.load_unet, "vae": model.load_vae, "text_encoder": model.load_text,
            "scheduler": model.load_schedule}[part]
    with pytest.raises(BadInput, match=says) as error:
        load(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [[8, 8], None, 8])
def test_a_sample_size_may_be_written_in_three_ways(size):
    config = model.UNetConfig(**NARROW_UNET | {"sample_size": size})
    assert config.sample_size == (32 if size is None else 8)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors",
                                  "diffusion_pytorch_model.non_ema.bin",
                                  "diffusion_pytorch_model.bf16.safetensors"])
def test_variants_load_and_the_plain_file_comes_first(name, tmp_path):
    folder = copy_tiny(tmp_path / "w") / "vae"
    plain = folder / "diffusion_pytorch_model.safetensors"
    state = {n: t.bfloat16() if "bf16" in name else t for n, t in load_file(plain).items()}
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    assert hub.find_weights(folder) == plain
    plain.unlink()
    assert hub.find_weights(folder) == folder / name
    read = model.load_vae(tmp_path / "w").state_dict()
    assert all(torch.equal(read[n], t.float()) for n, t in state.items())


def test_shards_load_as_one(tmp_path):
    folder = copy_tiny(tmp_path / "w") / "vae"
    whole = folder / "diffusion_pytorch_model.safetensors"
    state, names = load_file(whole), {}
    whole.unlink()
    for i, name in enumerate(state):
        names[name] = f"shard-{i % 2}.safetensors"
    for shard in set(names.values()):
        save_file({n: t for n, t in state.items() if names[n] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    read = model.load_vae(tmp_path / "w").state_dict()
    assert all(torch.equal(read[n], t) for n, t in state.items())
    index.write_text(json.dumps({"weight_map": names | {"a": "../../secret.safetensors"}}))
    with pytest.raises(BadInput, match="not a file beside it"):
        model.load_vae(tmp_path / "w")


@pytest.mark.parametrize("tensor,says", [
    (torch.eye(3).to_sparse(), "sparse"), (torch.zeros(3, device="meta"), "meta"),
    (torch.zeros(3).cfloat(), "complex64"), (torch.zeros(3).bool(), "bool"),
    (torch.zeros(3, dtype=torch.int32), "int32"), (torch.zeros(1).expand(10**6, 10**6), "claims"),
], ids=["sparse", "meta", "complex", "bool", "int", "huge"])
def test_tensors_that_are_no_plain_numbers_are_refused(tensor, says, tmp_path):
    torch.save({"conv.weight": tensor}, tmp_path / "x.bin")
    with pytest.raises(BadInput, match=says) as error:
        read_tensors(tmp_path / "x.bin")
    assert "x.bin" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)},
               tmp_path / "x.bin")
    with pytest.raises(BadInput, match="plain numbers"):
        read_tensors(tmp_path / "x.bin")


def test_names_that_are_no_text_and_files_that_swell_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({1: torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="does not map names to tensors"):
        read_tensors(path)
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as tight, zipfile.ZipFile(
            tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as loose:
        for entry in tight.namelist():
            loose.writestr(entry, tight.read(entry))
    with pytest.raises(BadInput, match="claims"):
        read_tensors(tmp_path / "y.bin")
    torch.save({"text.position_ids": torch.arange(77), "a": torch.zeros(2).half()}, path)
    assert read_tensors(path)["a"].shape == (2,)


def test_bf16_stores_what_is_frozen_and_nothing_else(tiny):
    """Half the memory; the prediction changes by the rounding of the weights alone."""
    kept = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight"
    halved = model.load(precision="bf16", keep=[kept])
    kinds = {n: p.dtype for n, p in halved.unet.named_parameters()}
    assert kinds[kept] == kinds["conv_out.weight"] == torch.float32
    assert kinds["conv_in.weight"] == torch.bfloat16 and math.isclose(
        sum(p.nbytes for p in halved.unet.parameters())
        / sum(p.nbytes for p in tiny.unet.parameters()), 0.5, abs_tol=0.02)
    x, text = torch.randn(1, 8, 4, 8, 8), tiny.read(["a red ball is moving left"])
    with torch.no_grad():
        got, want = halved.predict(x, 300, text), tiny.predict(x, 300, text)
    assert got.dtype == torch.float32 and relative(got, want) < 0.05
    later = model.load(precision="bf16")
    later.store_frozen([kept])
    again = later.unet.state_dict()
    assert all(torch.equal(t, again[n]) and t.stride() == again[n].stride()
               for n, t in halved.unet.state_dict().items())


def test_a_sample_of_the_posterior_is_its_own_generators(tiny):
    video = torch.rand(2, 3, 4, 64, 64) * 2 - 1
    seeds = lambda *all: [torch.Generator().manual_seed(s) for s in all]
    mean, drawn = tiny.encode(video), tiny.encode(video, seeds(1, 2))
    assert mean.shape == (2, 8, 4, 8, 8) and 0 < relative(drawn, mean) < 0.5
    assert torch.equal(tiny.encode(video[1:], seeds(2)), drawn[1:])
    assert tiny.decode(mean).shape == video.shape


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
    assert {ours: hub.pth_name(ours) for ours in listed} == {k: v[0] for k, v in listed.items()}


def test_an_original_pth_loads_as_the_same_unet(tmp_path):
    """Written under ModelScope's names, with its convolutions of width 1, and read back."""
    unet = model.UNet(model.UNetConfig(**NARROW_UNET))
    state = {}
    for name, tensor in unet.state_dict().items():
        wide = name.endswith(("proj_in.weight", "proj_out.weight"))
        state[hub.pth_name(name)] = tensor[..., None] if wide else tensor
    (tmp_path / "unet").mkdir()
    torch.save({"state_dict": state}, tmp_path / "unet" / "text2video.pth")
    (tmp_path / "unet" / "config.json").write_text(json.dumps(NARROW_UNET))
    read = model.load_unet(tmp_path).state_dict()
    assert all(torch.equal(read[n], t) for n, t in unet.state_dict().items())


# ------------------------------------------------------------------------------------------------
# Tricks of speed give what torch's own functions give


def plain(monkeypatch):
    """The UNet in plain torch, every trick undone."""
    monkeypatch.setattr(fast, "sequential", lambda layers, x: fast._in_turn(x, *layers))
    monkeypatch.setattr(fast, "geglu", lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]))
    monkeypatch.setattr(fast, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    conv3d = lambda m, x: F.conv3d(x[..., None], m.weight, m.bias, padding=(1, 0, 0))[..., 0]
    monkeypatch.setattr(fast.TimeConv, "forward", conv3d)
    monkeypatch.setattr(fast.Dropout, "forward", torch.nn.Dropout.forward)


@pytest.mark.parametrize("dtype,within", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("large", [0, 2**40])
def test_the_unet_is_the_same_in_plain_torch(dtype, within, large, monkeypatch):
    """Output and gradients, with every tensor counted as large and with none. Fused attention alone
    differs from the plain one by 1.3e-6 in fp32, which is rounding: in fp64 nothing is left."""
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
def test_dropout_has_the_rate_the_scale_and_the_gradient_of_dropout(layout, large, monkeypatch):
    monkeypatch.setattr(fast, "LARGE", large)
    x = torch.rand(2, 31, 40, 53).add(0.1).to(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    y = fast.dropout(x, 0.2, True)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=5e-3)  # 3σ: 0.0033
    for axis in range(4):  # no stripes: every row of every axis loses its share
        share = kept.float().mean([a for a in range(4) if a != axis])
        assert (share - 0.8).abs().max() < 0.05
    torch.testing.assert_close(y[kept], x[kept] / 0.8)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.8)
    assert not torch.equal(kept, fast.dropout(x, 0.2, True) != 0)
    assert fast.dropout(x, 0.2, False) is x and fast.dropout(x, 0.0, True) is x


@pytest.mark.parametrize("tokens", [16, 77, 1100])  # fp32 softmax, bf16 softmax, fused
def test_attention_takes_three_roads_to_one_result(tokens):
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16() for n in (20, tokens, tokens))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours = fast.scaled_dot_product_attention
    torch.testing.assert_close(ours(q, k, v).double(), exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ours(q.double(), k.double(), v.double()), exact, atol=1e-12, rtol=0)


def test_fused_attention_keeps_within_the_grid_of_cuda(monkeypatch):
    """Its parts, here of two rows, are the whole. `meta` stands for a device that is no CPU."""
    seen, q = [], torch.randn(5, 3, 4, 8)
    whole = F.scaled_dot_product_attention(q, q, q)
    monkeypatch.setattr(fast, "MOST_BLOCKS", 6)
    monkeypatch.setattr(fast.F, "scaled_dot_product_attention",
                        lambda q, k, v: seen.append(len(q)) or fast._plain_attention(q, k, v))
    assert fast.scaled_dot_product_attention(*[q.to("meta")] * 3).shape == q.shape
    assert seen == [2, 2, 1]
    torch.testing.assert_close(fast._in_parts(q, q, q, 2), whole)


def test_attention_maps_are_what_attention_weighs_with(unets):
    """Of a forward hook's inputs, in self-attention and with text."""
    ours, _ = unets
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
