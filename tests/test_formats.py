"""support/formats.py: other programs' LoRAs against what diffusers and peft merge themselves, or
against the formula written out; what is refused; and what is written, opened elsewhere."""
import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, relative
from safetensors import safe_open
from safetensors.torch import load_file

import model
from support import formats, hub
from support.files import BadInput

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from diffusers.loaders import PeftAdapterMixin  # noqa: E402
from diffusers.utils import (  # noqa: E402
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)

NARROW = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [32, 64, 64],
    "cross_attention_dim": 24, "attention_head_dim": 8, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock3D"] * 2 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 2,
}
FULL = {
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "attention_head_dim": 64, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}
SPACE = "down_blocks.0.attentions.0.transformer_blocks.0."
Q, K, OUT, FF = (SPACE + n for n in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.2"))
CONV, TIME = "down_blocks.1.resnets.0.conv1", "up_blocks.1.temp_convs.0.conv2.3"
IN = "mid_block.temp_attentions.0.proj_in"


class Theirs(diffusers.UNet3DConditionModel, PeftAdapterMixin):
    """The reference: diffusers' UNet, with the LoRA loading that its pipelines have."""


def noise(*shape, seed=0, size=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * size


@pytest.fixture(scope="module")
def base():
    """One set of weights for all; no layer is silent."""
    torch.manual_seed(0)
    state = Theirs(**NARROW).state_dict()
    return {n: t + noise(*t.shape, size=0.1) for n, t in state.items()}


@pytest.fixture
def theirs(base):
    unet = Theirs(**NARROW).eval()
    unet.load_state_dict(base)
    return unet


@pytest.fixture(scope="module")
def unet(base):
    ours = model.UNet(model.UNetConfig(**NARROW)).eval().requires_grad_(False)
    ours.load_state_dict(base)
    return ours


def merged(base, tensors, pairs):
    """The weights as an adapter changes them."""
    state = base | tensors
    for layer, (A, B) in pairs.items():
        W = base[f"{layer}.weight"]
        assert A.shape[1:] == W.shape[1:] and B.dim() == W.dim() and len(B) == len(W)
        state[f"{layer}.weight"] = W + (B.flatten(1) @ A.flatten(1)).view(W.shape)
    return state


def assert_equal(got, want, base):
    """Every weight the same, to 1e-6, and its change to 1e-5; and something was changed."""
    changed = [n for n in base if not torch.equal(want[n], base[n])]
    assert changed and [n for n in base if not torch.equal(got[n], base[n])] == changed
    assert max(relative(got[n], want[n]) for n in changed) <= 1e-6
    assert max(relative(got[n] - base[n], want[n] - base[n]) for n in changed) <= 1e-5


# ------------------------------------------------------------------------------------------------
# What diffusers and peft write, against what they merge


ALL = [Q, K, OUT, FF, IN, CONV, TIME]
SETTINGS = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "rank_pattern": {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2, "ff.net.2": 6}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{Q}": 1, "attn2.to_k": 16}},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "lora_bias": {"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": [OUT, FF, CONV]},
    "bias": {"r": 4, "lora_alpha": 8, "bias": "lora_only"},
}


def randomised(unet):
    """Gives what a LoRA has learned some size."""
    for i, (name, p) in enumerate(unet.named_parameters()):
        if p.requires_grad:
            p.data = p.data * 0.9 + noise(*p.shape, seed=i)


def trained(unet, **settings):
    """diffusers' UNet with a LoRA that changes something."""
    unet.add_adapter(peft.LoraConfig(**{"target_modules": ALL} | settings))
    randomised(unet)
    return unet


def fused(unet):
    """The merged weights, by diffusers and peft."""
    unet.fuse_lora()
    named = {n.replace(".base_layer", ""): t for n, t in unet.state_dict().items()}
    return {n: t for n, t in named.items() if "lora_" not in n}


def read(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


@pytest.mark.parametrize("prefix", ("", "unet."))
@pytest.mark.parametrize("kind", SETTINGS)
def test_files_of_diffusers(kind, prefix, theirs, unet, base, tmp_path):
    """By save_lora_adapter (no "unet." anywhere), and as a pipeline saves it (everywhere)."""
    trained(theirs, **SETTINGS[kind]).save_lora_adapter(tmp_path)
    state, meta = read(tmp_path / "pytorch_lora_weights.safetensors")
    values = json.loads(meta["lora_adapter_metadata"])
    meta = {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in values.items()})}
    got = formats.read_foreign({prefix + n: t for n, t in state.items()}, meta, unet, "x")
    assert_equal(merged(base, *got), fused(theirs), base)


@pytest.mark.parametrize("kind", SETTINGS)
def test_files_of_pefts_save_pretrained(kind, theirs, unet, base, tmp_path):
    """Settings are in adapter_config.json beside the file."""
    whole = peft.get_peft_model(
        theirs, peft.LoraConfig(**{"target_modules": ALL} | SETTINGS[kind]))
    randomised(theirs)
    whole.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    got = formats.read_foreign(*read(path), unet, path)
    assert_equal(merged(base, *got), whole.merge_and_unload().state_dict(), base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match="adapter_config.json, which is not beside it"):
        formats.read_foreign(*read(path), unet, path)


def old_names(state):
    """Before peft: attn1.processor.to_q_lora.down.weight."""
    new = {}
    for name, tensor in state.items():
        for now, then in ((".lora_A", "_lora.down"), (".lora_B", "_lora.up"), (".to_out.0", ".to_out"),
                          (".to_", ".processor.to_")):
            name = name.replace(now, then)
        new[name] = tensor
    return new


OTHER = {  # how diffusers, or a helper of its, writes peft's names otherwise; each at alpha = r
    "adapter's name": lambda s: {n.replace(".weight", ".best.weight"): t for n, t in s.items()},
    "lora.down": convert_state_dict_to_diffusers,
    "to_q_lora.down": lambda s: old_names({n: t for n, t in s.items() if "attn" in n}),
    "kohya": lambda s: convert_state_dict_to_kohya(s),
    "comfy": lambda s: {n.replace("unet.", "diffusion_model."): t for n, t in s.items()},
    "comfy, kohya's ends": lambda s: {n.replace("unet.", "diffusion_model.").replace(
        "lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in s.items()},
    "comfy, ModelScope's names": lambda s: {"diffusion_model." + hub.pth_name(
        n.removeprefix("unet.")): t for n, t in s.items()},
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_names_of_the_same(kind, theirs, unet, base):
    targets = [n for n in ALL if "attn" in n] if kind == "to_q_lora.down" else ALL
    trained(theirs, r=4, lora_alpha=4, target_modules=targets)
    state = peft.get_peft_model_state_dict(theirs)
    state = OTHER[kind]({f"unet.{n}": t for n, t in state.items()})
    assert_equal(merged(base, *formats.read_foreign(state, {}, unet, "x")), fused(theirs), base)


@pytest.mark.parametrize("alphas", ("beside peft's names", "kohya"))
def test_alphas_in_tensors(alphas, theirs, unet, base):
    """Each layer has its own; diffusers reads peft's names with the same alphas."""
    state = {}
    for i, layer in enumerate(ALL):
        wide, narrow, *kernel = base[f"{layer}.weight"].shape
        state[f"unet.{layer}.lora_A.weight"] = noise(4, narrow, *kernel, seed=i)
        state[f"unet.{layer}.lora_B.weight"] = noise(wide, 4, *[1] * len(kernel), seed=i)
    numbers = {f"unet.{layer}.alpha": i + 1.0 for i, layer in enumerate(ALL)}
    theirs.load_lora_adapter(dict(state), network_alphas=numbers, prefix="unet")
    if alphas == "kohya":
        state = {f"lora_unet_{layer.replace('.', '_')}.lora_{end}.weight":
                 state[f"unet.{layer}.lora_{ab}.weight"]
                 for layer in ALL for ab, end in (("A", "down"), ("B", "up"))}
        numbers = {n.replace(".", "_").replace("unet", "lora_unet").replace("_alpha", ".alpha"): a
                   for n, a in numbers.items()}
    state |= {n: torch.tensor(a) for n, a in numbers.items()}
    assert_equal(merged(base, *formats.read_foreign(state, {}, unet, "x")), fused(theirs), base)


# ------------------------------------------------------------------------------------------------
# By the formula, where no reference is installed


def by_hand(kind, base):
    """A file of the kind, and the weights that it makes."""
    def W(layer):
        return base[f"{layer}.weight"]

    if kind == "LoCon, lora_mid":  # ΔW = alpha/r · up·mid·down
        stem = "lora_unet_" + CONV.replace(".", "_")
        up, mid, down = noise(64, 2, 1, 1), noise(2, 2, 3, 3), noise(2, 32, 1, 1)
        change = torch.einsum("on,nmhw,mi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
        return {f"{stem}.lora_up.weight": up, f"{stem}.lora_mid.weight": mid,
                f"{stem}.lora_down.weight": down, f"{stem}.alpha": torch.tensor(3)}, {
                    CONV: W(CONV) + 3 / 2 * change}
    if kind.startswith("dora_scale"):  # W' = m · (W + alpha/r·B·A) / its norm
        stem, over = "lora_unet_" + CONV.replace(".", "_"), (1, 2, 3) if "out" in kind else (0, 2, 3)
        A, B = noise(2, 32, 3, 3), noise(64, 2, 1, 1)
        new = W(CONV) + 4 / 2 * torch.einsum("or,rihw->oihw", B[..., 0, 0], A)
        norm = new.square().sum(over, keepdim=True).sqrt()
        m = noise(*norm.shape).abs()
        return {f"{stem}.lora_up.weight": B, f"{stem}.lora_down.weight": A, f"{stem}.dora_scale": m,
                f"{stem}.alpha": torch.tensor([4.0])}, {CONV: m * new / norm}
    # stable_lora: its layers' own lines, at r = 2, alpha = r
    state, new = {f"{OUT}.bias": noise(32)}, {}
    for layer in ALL:
        wide, narrow, *kernel = W(layer).shape
        k = kernel[0] if kernel else 1
        A, B = noise(2 * k, narrow * k), noise(wide * k, 2 * k)
        change = B @ A
        if len(kernel) == 3:
            change = change.view(wide, narrow, k, k, 1).mean(dim=-2, keepdim=True)
        new[layer] = W(layer) + change.view(W(layer).shape)
        if "web UI" in kind:
            A, B = (t.unsqueeze(-1) if "proj_in" in layer else t for t in (A, B))
            layer = hub.pth_name(f"{layer}.weight").removesuffix(".weight")
        state |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
    return state, new


@pytest.mark.parametrize("kind", ("LoCon, lora_mid", "dora_scale of outputs", "stable_lora",
                                  "dora_scale of inputs", "stable_lora of the web UI"))
def test_by_the_formula(kind, unet, base):
    state, new = by_hand(kind, base)
    want = base | {f"{layer}.weight": t for layer, t in new.items()}
    want |= {n: t for n, t in state.items() if n.endswith(".bias")}
    assert_equal(merged(base, *formats.read_foreign(state, {}, unet, "x")), want, base)


@pytest.mark.parametrize("kind,clips", [("temporal", 1), ("spatial", 1), ("spatial", 3)])
def test_motiondirectors_lists_without_names(kind, clips, capsys):
    """At full size. Each tensor is filled with its own number, so layer and clip can be told."""
    with torch.device("meta"):
        full = model.UNet(model.UNetConfig(**NARROW | FULL))
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
    for wrong, clip in ((tensors, clips), (tensors[:-2], 0), (tensors[::-1], 0)):
        with pytest.raises(BadInput, match="no clip|not MotionDirector's"):
            formats.read_foreign(wrong, {}, full, "9_unet.pt", clip)


# ------------------------------------------------------------------------------------------------
# What is refused


A, B = noise(2, 32), noise(32, 2)
PAIR = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
KOHYA = "lora_unet_" + Q.replace(".", "_")


def settings(**values):
    return {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2} | values)}


@pytest.mark.parametrize("state,meta,says", [
    ({f"unet.{Q}.lora_A.weight": A}, {}, "half of a pair"),
    ({f"unet.{Q}.lora_B.weight": B}, {}, "half of a pair"),
    ({f"{Q}.lora_A": A, f"{Q}.alpha": torch.ones(1)}, {}, "half of a pair: .* A, alpha alone"),
    (PAIR | {"unet.odd": A}, {}, "1 of its 3 tensors have no place"),
    (PAIR | {f"unet.{Q}.lora_C.weight": A}, {}, "first unet.*lora_C"),
    (PAIR | {f"lora_unet_{Q}.lora_down.weight": A}, {}, "3 of its 3 tensors"),
    (PAIR | {f"unet.{Q}.lora_A.two.weight": A}, {}, "two tensors for one place"),
    (PAIR | {f"unet.{Q}.weight": noise(32, 32)}, {}, "both the whole"),
    (PAIR | {f"unet.{Q}.alpha": torch.ones(2)}, {}, "alpha as \\(2,\\), wanted \\(\\)"),
    (PAIR | {f"unet.{Q}.alpha": torch.tensor(0.0)}, {}, "alpha 0"),
    (PAIR | {f"unet.{Q}.alpha": torch.tensor(9.0)}, settings(), "scale of 4.5"),
    (PAIR | {f"unet.{Q}.lora_B.bias": noise(32)}, {}, "has a LoRA bias"),
    (PAIR | {f"unet.{Q}.lora_B.weight": noise(32, 3)}, {}, "wanted \\(32, 2\\)"),
    (PAIR | {f"unet.{Q}.lora_A.weight": noise(2, 31)}, {}, "wanted \\(2, 32\\)"),
    (PAIR | {f"unet.{Q}.lora_A.weight": A * float("nan")}, {}, "NaN"),
    (PAIR | {f"unet.{Q}.lora_A.weight": A[:0]}, {}, "rank 0"),
    (PAIR, settings(r=3), "rank 3, and its A has 2"),
    (PAIR, settings(r="2"), "no number above 0"),
    (PAIR, settings(rank_pattern={"(": 2}), "no number above 0"),
    (PAIR, settings(use_dora=True), "says use_dora=True, and 0 of 1"),
    (PAIR, settings(lora_bias=True), "says lora_bias=True"),
    (PAIR, settings(init_lora_weights="pissa"), "init_lora_weights=pissa"),
    (PAIR, settings(peft_type="LOHA", use_qalora=True), "use_qalora, peft_type=LOHA"),
    (PAIR, {"lora_adapter_metadata": "{"}, "says nothing about the UNet"),
    ({f"{KOHYA}.hada_w1_a": A}, {}, "hada_w1_a, of a kind of LyCORIS"),
    ({f"{KOHYA}.lokr_w1": A}, {}, "lokr_w1, of a kind"),
    ({f"{KOHYA}.diff": A}, {}, "diff, of a kind"),
    ({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}, {"ss_network_alpha": "1"},
     "none for down_blocks"),
    ({"lora_unet_input_blocks_1.lora_down.weight": A}, {}, "read as kohya or LoCon, and 1 of its 1 tensors"),
    ({"unet.conv_in.weight": noise(3)}, {}, "has unet.conv_in.weight as \\(3,\\)"),
    ({"lora_te_x.lora_down.weight": A}, {}, "no tensor for the UNet"),
    ({}, {}, "no tensor for the UNet"),
])
def test_what_is_not_understood_is_refused_in_one_line(state, meta, says, unet):
    with pytest.raises(BadInput, match=says) as error:
        formats.read_foreign(state, meta, unet, "some.safetensors")
    text = str(error.value)
    assert text.startswith("some.safetensors ") and ";" in text and "\n" not in text


@pytest.mark.parametrize("kept", (r".*", r"(?!.*temp_|transformer_in).*"))
def test_whole_unets_are_no_adapters_unless_asked_for(kept, unet, base, capsys):
    """Neither a video UNet nor an image UNet; some of their tensors are."""
    state = {f"unet.{n}": t for n, t in base.items() if re.fullmatch(kept, n)}
    with pytest.raises(BadInput, match="--weights its folder, or use it as an absorber"):
        formats.read_foreign(state, {}, unet, "x")
    tensors, pairs = formats.read_foreign(state, {}, unet, "x", whole=True)
    assert {f"unet.{n}" for n in tensors} == set(state) and not pairs
    state.pop("unet.conv_in.weight")
    state["text_encoder.x.lora_A.weight"] = A
    assert len(formats.read_foreign(state, {}, unet, "x")[0]) == len(state) - 1
    assert "skipping 1 tensors of a text encoder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Out


def picture(unet):
    x, text = noise(1, 4, 3, 8, 8, size=1), noise(1, 5, 24, size=1)
    with torch.no_grad():
        out = unet(x, 300, text)
    return out if isinstance(out, torch.Tensor) else out.sample


def test_ours_load_in_peft_as_they_are(theirs, unet, base):
    pairs = {}
    for layer in (Q, K, OUT, FF, TIME):
        wide, narrow, *kernel = base[f"{layer}.weight"].shape
        pairs[layer] = noise(3, narrow, *kernel), noise(wide, 3, *[1] * len(kernel))
    state = formats.to_peft(pairs)
    assert all(torch.equal(x, y) for layer, pair in formats.read_foreign(
        state, {}, unet, "x")[1].items() for x, y in zip(pair, pairs[layer]))
    theirs.load_lora_adapter(state, prefix="unet")
    ours = copy.deepcopy(unet)
    ours.load_state_dict(merged(base, {}, pairs))
    assert relative(picture(ours), picture(unet)) > 1e-2
    assert relative(picture(theirs), picture(ours)) <= 4e-6


def test_a_saved_folder_is_the_model_again(tiny, tmp_path):
    """In the hub's layout, with the base's other parts; and it is never written over."""
    formats.save_hub(tiny, tmp_path / "new", model.TINY)
    again, halved = model.load(tmp_path / "new"), tiny.unet.state_dict()
    for part in ("vae", "text"):
        want = getattr(tiny, part).state_dict()
        assert all(torch.equal(t, want[n]) for n, t in getattr(again, part).state_dict().items())
    assert all(torch.equal(t, halved[n].half().float()) for n, t in again.unet.state_dict().items())
    with pytest.raises(BadInput, match="there already"):
        formats.save_hub(tiny, tmp_path / "new", model.TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]


def test_a_saved_folder_opens_in_diffusers_and_a_pth_in_modelscopes_names(unet, base, tmp_path):
    (tmp_path / "base" / "unet").mkdir(parents=True)
    Theirs(**NARROW).save_config(tmp_path / "base" / "unet")
    formats.save_hub(SimpleNamespace(unet=unet, text=None), tmp_path / "new", tmp_path / "base")
    opened = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "new" / "unet").state_dict()
    formats.save_pth(unet, tmp_path / "unet.pth")
    back = hub.unet_from_pth(torch.load(tmp_path / "unet.pth", weights_only=True), unet)
    for state in (opened, back):
        assert set(state) == set(base)
        assert all(torch.equal(t.float(), base[n].half().float()) for n, t in state.items())


def test_a_pth_has_the_names_and_shapes_of_the_released_one(tmp_path):
    with torch.device("meta"):
        full = model.UNet(model.UNetConfig(**NARROW | FULL))
    table = json.loads((ROOT / "tests/reference/unet_modelscope_pth_map.json").read_text())
    state = formats.as_pth(full.state_dict(), full)
    assert {n: list(t.shape) for n, t in state.items()} == dict(map(tuple, table.values()))


def test_what_fp16_cannot_hold_is_not_saved(unet, tmp_path):
    loud = copy.deepcopy(unet)
    loud.conv_in.bias.data[0] = 1e6
    with pytest.raises(BadInput, match="conv_in.bias is too large for fp16"):
        formats.save_pth(loud, tmp_path / "unet.pth")
    assert not list(tmp_path.iterdir())
