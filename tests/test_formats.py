"""LoRAs of other programs, against the merged weights of diffusers and peft, or the
formula; refused files; and exported files, read by other programs."""
import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import NARROW_UNET, ROOT, Optional, relative
from safetensors import safe_open
from safetensors.torch import load_file

import model
from support import export, formats, hub
from support.files import BadInput

diffusers, peft = Optional("diffusers"), Optional("peft")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
Q, K, OUT, FF = (BLOCK + n for n in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.2"))
CONV, TIME = "down_blocks.1.resnets.0.conv1", "up_blocks.1.temp_convs.0.conv2.3"
ALL = [Q, K, OUT, FF, CONV, TIME, "mid_block.temp_attentions.0.proj_in"]


def their_unet():
    """The reference: diffusers' UNet, with the LoRA loading that its pipelines have."""
    bases = diffusers.UNet3DConditionModel, diffusers.loaders.PeftAdapterMixin
    return type("Theirs", bases, {})(**NARROW_UNET)


def noise(*shape, seed=0, size=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * size


def pair(W, rank, seed=0):
    wide, narrow, *kernel = W.shape
    return noise(rank, narrow, *kernel, seed=seed), noise(wide, rank, *[1] * len(kernel), seed=seed)


@pytest.fixture(scope="module")
def base():
    """One set of weights for all, without zeros."""
    torch.manual_seed(0)
    return {n: t + noise(*t.shape, size=0.1) for n, t in their_unet().state_dict().items()}


@pytest.fixture
def theirs(base):
    unet = their_unet().eval()
    unet.load_state_dict(base)
    return unet


@pytest.fixture(scope="module")
def unet(base):
    ours = model.UNet(model.UNetConfig(**NARROW_UNET)).eval().requires_grad_(False)
    ours.load_state_dict(base)
    return ours


def merged(base, tensors, pairs):
    """The weights merged with an adapter."""
    state = base | tensors
    for layer, (A, B) in pairs.items():
        W = base[f"{layer}.weight"]
        assert A.shape[1:] == W.shape[1:] and B.dim() == W.dim() and len(B) == len(W)
        state[f"{layer}.weight"] = W + (B.flatten(1) @ A.flatten(1)).view(W.shape)
    return state


def assert_equal(got, expected, base):
    """Equal weights, to 1e-6, and equal changes, to 1e-5. At least one weight changed."""
    changed = [n for n in base if not torch.equal(expected[n], base[n])]
    assert changed and [n for n in base if not torch.equal(got[n], base[n])] == changed
    assert max(relative(got[n], expected[n]) for n in changed) <= 1e-6
    assert max(relative(got[n] - base[n], expected[n] - base[n]) for n in changed) <= 1e-5


# ------------------------------------------------------------------------------------------------
# Files of diffusers and peft, against their own merged weights


SETTINGS = {
    "alpha": {}, "rslora": {"use_rslora": True},
    "rank_pattern": {"lora_alpha": 3, "rank_pattern": {"to_k": 2, "ff.net.2": 6}},
    "alpha_pattern": {"alpha_pattern": {f"^{Q}": 1, "attn2.to_k": 16}},
    "biases, whole layers": {"bias": "lora_only", "modules_to_save": ["conv_out"]},
}


def config(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL} | settings)


def train_all(unet):
    """Change all trainable parameters."""
    for i, p in enumerate(unet.parameters()):
        if p.requires_grad:
            p.data = p.data * 0.9 + noise(*p.shape, seed=i)


def fused(unet):
    """The merged weights, by diffusers and peft."""
    unet.fuse_lora()
    state = {n.replace(".base_layer", ""): t for n, t in unet.state_dict().items()}
    state |= {n.replace(".modules_to_save.default", ""): t for n, t in state.items()}
    return state


@pytest.mark.parametrize("kind", SETTINGS)
def test_files_of_diffusers(kind, theirs, unet, base, tmp_path):
    """By save_lora_adapter, without "unet.", and as a pipeline saves it, with it."""
    theirs.add_adapter(config(**SETTINGS[kind]))
    train_all(theirs)
    theirs.save_lora_adapter(tmp_path)
    path, expected = tmp_path / "pytorch_lora_weights.safetensors", fused(theirs)
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["lora_adapter_metadata"])
    for prefix in ("", "unet."):
        meta = {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in values.items()})}
        state = {prefix + n: t for n, t in load_file(path).items()}
        assert_equal(merged(base, *formats.read_foreign(state, meta, unet, path)), expected, base)


@pytest.mark.parametrize("kind", SETTINGS)
def test_files_of_peft(kind, theirs, unet, base, tmp_path):
    """Its settings are in adapter_config.json, next to the file."""
    wrapped = peft.get_peft_model(theirs, config(**SETTINGS[kind]))
    train_all(theirs)
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    got = merged(base, *formats.read_foreign(load_file(path), {}, unet, path))
    assert_equal(got, wrapped.merge_and_unload().state_dict(), base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match="adapter_config.json"):
        formats.read_foreign(load_file(path), {}, unet, path)


def renamed(*changes):
    """A function that replaces parts of names."""
    def rename(state):
        names = {n: n for n in state}
        for old, new in changes:
            names = {n: re.sub(old, new, now) for n, now in names.items()}
        return {names[n]: t for n, t in state.items()}

    return rename


COMFY = ("^unet", "diffusion_model")
OTHER = {  # other notations of peft's names, each with alpha = r
    "adapter's name": renamed((r"weight$", "my-own.weight")),
    "lora.down": diffusers.utils.convert_state_dict_to_diffusers,
    "to_q_lora.down": renamed((r"\.lora_A", "_lora.down"), (r"\.lora_B", "_lora.up"),
                              (r"to_out\.0", "to_out"), (r"\.to_", ".processor.to_")),
    "kohya": diffusers.utils.convert_state_dict_to_kohya,
    "ComfyUI": renamed(COMFY),
    "ComfyUI, kohya's ends": renamed(COMFY, ("lora_A", "lora_down"), ("lora_B", "lora_up")),
    "ComfyUI, ModelScope's names": lambda state: {
        "diffusion_model." + hub.pth_name(n.removeprefix("unet.")): t for n, t in state.items()},
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_notations_of_the_same_names(kind, theirs, unet, base):
    theirs.add_adapter(config(lora_alpha=4, target_modules=ALL[:3] if "to_q" in kind else ALL))
    train_all(theirs)
    state = {f"unet.{n}": t for n, t in peft.get_peft_model_state_dict(theirs).items()}
    got = formats.read_foreign(OTHER[kind](state), {}, unet, "x")
    assert_equal(merged(base, *got), fused(theirs), base)


@pytest.mark.parametrize("kind", ("peft", "kohya"))
def test_alphas_in_tensors(kind, theirs, unet, base):
    """Each layer has its own alpha. diffusers reads peft's names with the same alphas."""
    state = formats.to_peft({n: pair(base[f"{n}.weight"], 4, i) for i, n in enumerate(ALL)})
    alphas = {f"unet.{layer}.alpha": i + 1.0 for i, layer in enumerate(ALL)}
    theirs.load_lora_adapter(dict(state), network_alphas=alphas, prefix="unet")
    if kind == "kohya":
        state = diffusers.utils.convert_state_dict_to_kohya(state)
        alphas = {re.sub(r"\.(?!alpha)", "_", f"lora_{n}"): a for n, a in alphas.items()}
    state |= {n: torch.tensor(a) for n, a in alphas.items()}
    assert_equal(merged(base, *formats.read_foreign(state, {}, unet, "x")), fused(theirs), base)


# ------------------------------------------------------------------------------------------------
# Against the formula, for programs that are not installed


def kohya(layer, **parts):
    return {f"lora_unet_{layer.replace('.', '_')}.{n}": t for n, t in parts.items()}


@pytest.mark.parametrize("names", ("hub's", "web UI's"))
def test_stable_lora(names, unet, base):
    """Its own formula, with r = 2. A bias in the file replaces the layer's."""
    state, expected = {f"{OUT}.bias": noise(32)}, base | {f"{OUT}.bias": noise(32)}
    for name in (f"{layer}.weight" for layer in ALL):
        wide, narrow, *kernel = base[name].shape
        k = kernel[0] if kernel else 1
        A, B = noise(2 * k, narrow * k), noise(wide * k, 2 * k)
        change = B @ A
        if len(kernel) == 3:
            change = change.view(wide, narrow, k, k, 1).mean(dim=-2, keepdim=True)
        expected[name] = base[name] + change.view(base[name].shape)
        if names == "web UI's":
            A, B = (t.unsqueeze(-1) if "proj_in" in name else t for t in (A, B))
            name = hub.pth_name(name)
        state |= {name.replace("weight", "lora_A"): A, name.replace("weight", "lora_B"): B}
    assert_equal(merged(base, *formats.read_foreign(state, {}, unet, "x")), expected, base)


@pytest.mark.parametrize("kind,clips", [("temporal", 1), ("spatial", 1), ("spatial", 3)])
def test_lists_of_motiondirector_without_names(kind, clips, full, capsys):
    """At full size. Each tensor holds its own number, which identifies layer and clip."""
    order = json.loads((ROOT / "tests/reference/motiondirector_order.json").read_text())[kind]
    tensors = []
    for wide, narrow in [shape for _, shape in order for _ in range(clips)]:
        tensors += [torch.full((wide, 1), float(len(tensors) // 2)), torch.ones(1, narrow)]
    for clip in range(clips):
        none, pairs = formats.read_foreign(tensors, {}, full, "9_unet.pt", clip)
        assert not none and set(pairs) == {name for name, _ in order}
        for k, (name, _) in enumerate(order):
            assert (pairs[name][1] @ pairs[name][0])[0, 0] == k * clips + clip
    assert ("clip 2 of 3" in capsys.readouterr().err) == (clips == 3)
    for wrong, clip in ((tensors, clips), (tensors[:-2], 0), (tensors[::-1], 0), ([], 0)):
        with pytest.raises(BadInput, match="no clip|do not match MotionDirector"):
            formats.read_foreign(wrong, {}, full, "9_unet.pt", clip)


# ------------------------------------------------------------------------------------------------
# Refused files


A, B = noise(2, 32), noise(32, 2)
DOWN, UP = {f"{Q}.lora_A.weight": A}, {f"{Q}.lora_B.weight": B}


def with_part(role, tensor):
    return DOWN | UP | {f"{Q}.{role}": tensor}


def settings(**values):
    return {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2} | values)}


def with_kohya(**parts):
    return kohya(Q, **{"lora_down.weight": A, "lora_up.weight": B} | parts)


@pytest.mark.parametrize("message,state,meta", [
    ("expected A and B", DOWN, {}), ("expected A and B", UP, {}),
    (r"found \['A', 'alpha'\]", kohya(Q, **{"lora_down.weight": A, "alpha": A}), {}),
    ("1 of its 3 tensors match no layer, e.g. .*lora_C", with_part("lora_C.weight", A), {}),
    ("duplicate tensor", DOWN | UP | kohya(Q, **{"lora_down.weight": A}), {}),
    ("match no layer", kohya("input_blocks.1", **{"lora_down.weight": A}), {}),
    ("duplicate tensor", with_part("lora_A.two.weight", A), {}),
    ("both full weights and a LoRA for", with_part("weight", noise(32, 32)), {}),
    (r"alpha is \(2,\)", with_part("alpha", torch.ones(2)), {}),
    ("scale of .* is", with_part("alpha", torch.tensor(0)), {}),
    (r"scale of .* is \[4.5, 1", with_part("alpha", torch.tensor(9)), settings()),
    ("match no layer", with_part("lora_B.bias", noise(32)), {}),
    (r"is \(32, 3\)", DOWN | {f"{Q}.lora_B.weight": noise(32, 3)}, {}),
    (r"is \(2, 31\)", UP | {f"{Q}.lora_A.weight": noise(2, 31)}, {}),
    ("rank 1 or more", UP | {f"{Q}.lora_A.weight": A[:0]}, {}),
    ("settings are r=3.*expected r=2", DOWN | UP, settings(r=3)),
    ("settings are r='2'", DOWN | UP, settings(r="2")),
    ("cannot be used", DOWN | UP, settings(rank_pattern={"(": 2})),
    ("TimeoutError", DOWN | UP, settings(rank_pattern={r"(.|\w)+(?<!.)k": 2})),
    ("cannot be used", DOWN | UP, settings(use_rslora="no")),
    ("use_dora", DOWN | UP, settings(use_dora=True)),
    ("match no layer", with_part("lora_magnitude_vector", noise(32)), settings()),
    ("not supported: init_lora_weights", DOWN | UP, settings(init_lora_weights="pissa")),
    ("use_qalora", DOWN | UP, settings(peft_type="LOHA", use_qalora=True)),
    ("JSONDecodeError", DOWN | UP, {"lora_adapter_metadata": "{"}),
    ("match no layer", with_kohya(**{"lora_mid.weight": A}), {}),
    ("match no layer", with_kohya(dora_scale=A), {}), ("match no layer", kohya(Q, hada_w1_a=A), {}),
    ("match no layer", kohya(Q, lokr_w1=A), {}), ("match no layer", kohya(Q, diff=A), {}),
    ("metadata has an alpha, but", with_kohya(), {"ss_network_alpha": "1"}),
    (r"conv_in.bias is \(3,\)", {"conv_in.bias": noise(3)}, {}),
    ("no tensor for the UNet", {"lora_te_x.lora_down.weight": A}, {}),
])
def test_unknown_tensors_and_settings_are_refused_in_one_line(message, state, meta, unet):
    with pytest.raises(BadInput, match=message) as error:
        formats.read_foreign(state, meta, unet, "some.safetensors")
    assert re.fullmatch("some.safetensors cannot be used [^\n]+; [^\n]+[.]", str(error.value))


@pytest.mark.parametrize("kept", (r".*", r"(?!.*temp_|transformer_in).*"))
def test_whole_unets_are_adapters_only_on_request(kept, unet, base, capsys):
    """All weights of a video or image UNet are refused; a part of them is an adapter."""
    state = {f"unet.{n}": t for n, t in base.items() if re.fullmatch(kept, n)}
    with pytest.raises(BadInput, match="is not an adapter"):
        formats.read_foreign(state, {}, unet, "x")
    tensors, pairs = formats.read_foreign(state, {}, unet, "x", full_weights=True)
    assert {f"unet.{n}" for n in tensors} == set(state) and not pairs
    state.pop("unet.conv_in.weight")
    some = state | {"text_encoder.x.lora_A.weight": A}
    assert len(formats.read_foreign(some, {}, unet, "x")[0]) == len(state)
    assert "skipping 1 text encoder tensors" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Exported files


def test_our_adapters_load_in_peft(theirs, unet, base):
    pairs = {layer: pair(base[f"{layer}.weight"], 3) for layer in ALL}
    theirs.load_lora_adapter(formats.to_peft(pairs), prefix="unet")
    ours = copy.deepcopy(unet)
    ours.load_state_dict(merged(base, {}, pairs))
    x, text = noise(1, 4, 3, 8, 8, size=1), noise(1, 5, 24, size=1)
    with torch.no_grad():
        out = ours(x, 300, text)
        assert relative(out, unet(x, 300, text)) > 1e-2
        assert relative(theirs(x, 300, text).sample, out) <= 4e-6


def test_a_saved_folder_loads_as_the_same_model(tmp_path):
    """In the hub's layout, with the base model's other parts. It is never overwritten."""
    tiny, new = model.load(), tmp_path / "new"
    export.save_hub(tiny, new, model.TINY)
    again = model.load(new)
    for part in ("vae", "text_encoder", "unet"):
        for name, tensor in getattr(again, part).state_dict().items():
            expected = getattr(tiny, part).state_dict()[name]
            assert torch.equal(tensor, expected.half().float() if part == "unet" else expected)
    with pytest.raises(BadInput, match="exists; give --save"):
        export.save_hub(tiny, new, model.TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("nested", (True, False))
def test_diffusers_loads_a_saved_folder_and_a_pth_is_read_back(nested, unet, base, tmp_path):
    """ModelScope has other names, and convolutions of width 1 for some linear layers."""
    (tmp_path / "base/unet").mkdir(parents=True)
    (tmp_path / "base/unet/config.json").write_text(json.dumps(NARROW_UNET))
    pipe, path = SimpleNamespace(unet=unet, text_encoder=None), tmp_path / "base/unet/unet.pth"
    export.save_hub(pipe, tmp_path / "new", tmp_path / "base")
    opened = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "new" / "unet").state_dict()
    export.save_pth(pipe, path)
    if nested:
        torch.save({"state_dict": torch.load(path)}, path)
    for state in (opened, model.load_unet(tmp_path / "base").state_dict()):
        assert set(state) == set(base)
        assert all(torch.equal(t.float(), base[n].half().float()) for n, t in state.items())


def test_a_pth_has_the_names_and_shapes_of_the_released_file(full):
    table = json.loads((ROOT / "tests/reference/unet_modelscope_pth_map.json").read_text())
    state = export.as_pth(full.state_dict(), full)
    names = {n: hub.pth_name(n) for n in full.state_dict()}
    assert len(table) == len(state) == 1480
    assert table == {n: [name, list(state[name].shape)] for n, name in names.items()}


def test_weights_too_large_for_fp16_are_refused(unet, tmp_path):
    loud = copy.deepcopy(unet)
    loud.conv_in.bias.data[0] = 1e6
    with pytest.raises(BadInput, match="conv_in.bias is too large for fp16"):
        export.save_pth(SimpleNamespace(unet=loud, text_encoder=None), tmp_path / "unet.pth")
    assert not list(tmp_path.iterdir())
