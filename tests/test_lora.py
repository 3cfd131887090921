"""lora.py: sets of layers and their counts, LoRA, merging, and files of this and other programs."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, relative
from safetensors.torch import load_file, save_file
from test_model import FULL_UNET

import lora
import model
from model import BadInput

REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture(scope="session")
def full():
    """ZeroScope's UNet, by names and shapes alone."""
    with torch.device("meta"):
        return model.UNet(model.UNetConfig(**FULL_UNET))


@pytest.fixture
def unet():
    return model.load_unet(TINY)


def count(parameters):
    return sum(p.numel() for p in parameters.values())


def parts_of(unet):
    """What apply_adapters needs of a model."""
    return SimpleNamespace(unet=unet, text=SimpleNamespace(learned={}))


# ------------------------------------------------------------------------------------------------
# What the papers count


@pytest.mark.parametrize("layers,rank,numbers", [
    ("spatial-self-attention-ff", 32, 8_785_920),  # MotionDirector's spatial path
    ("spatial-self-attention-ff", 1, 274_560),
    ("temporal-attention-ff", 32, 12_472_320),  # and its temporal one
    ("temporal-attention-ff", 2, 779_520),
    ("temporal-attention-ff", 4, 1_559_040),
    ("spatial-attention", 1, 207_488),  # Customize-A-Video's S-LoRA
    ("temporal-attention", 4, 831_488),  # and its T-LoRA
    ("coupled", 32, 8_785_920 + 12_472_320),
])
def test_loras_have_the_papers_parameters(full, layers, rank, numbers):
    assert count(lora.LoRA(full, layers, rank).parameters()) == numbers


@pytest.mark.parametrize("layers,tensors,numbers", [
    ("temporal-attention-qkv", 96, 74_342_400),
    ("temporal-and-cross-kv", 826, 570_882_176),  # NewMove
    ("cross-attention-kv", 32, 25_559_040),
    ("temporal", 794, 545_323_136),
    ("spatial", 686, 865_910_724),  # all that Stable Diffusion 2.x has too
    ("all", 1480, 1_411_233_860),
])
def test_sets_of_layers_have_the_papers_parameters(full, layers, tensors, numbers):
    chosen = lora.select(full, layers)
    assert (len(chosen), count(chosen)) == (tensors, numbers)


def test_sites_are_the_layers_of_motiondirectors_files_in_their_order(full):
    order = json.loads((REFERENCE / "motiondirector_order.json").read_text())
    for kind, layers in (("spatial", "spatial-self-attention-ff"),
                         ("temporal", "temporal-attention-ff")):
        mine = sorted(lora.sites(full, layers), key=lambda n: n.startswith("mid_block"))
        assert mine == [name for name, _ in order[kind]]


def test_temporal_linears_and_convolutions_are_all_of_them(full):
    """All that a LoRA can stand beside, but the linear layers around the attention blocks."""
    kinds = (torch.nn.Linear, model.TimeConv)
    want = {n for n, m in full.named_modules() if isinstance(m, kinds) and "proj_" not in n
            and ("temp_" in n or n.startswith("transformer_in"))}
    assert set(lora.sites(full, "temporal-linears-convs")) == want
    assert len([n for n in want if "temp_convs" in n]) == 88


# ------------------------------------------------------------------------------------------------
# LoRA


def forward(unet):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 4, 8, 8, generator=g), torch.randn(1, 77, 64, generator=g)
    with torch.no_grad():
        return unet(x, 300, text)


def filled(unet, layers, rank=4, **more):
    """A LoRA that does something."""
    one = lora.LoRA(unet, layers, rank, **more)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    return one


@pytest.mark.parametrize("layers", ("coupled", "temporal-linears-convs", "all"))
def test_a_fresh_lora_changes_nothing_and_a_merged_one_equals_it(unet, layers, tmp_path):
    """Merged into the weights, on a fresh copy: the same within 1e-5, convolutions included."""
    plain = forward(unet)
    one = lora.LoRA(unet, layers, 4, scale=0.7)
    assert torch.equal(forward(unet), plain)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    beside = forward(unet)
    assert relative(beside, plain) > 0.01
    one.on = False
    assert torch.equal(forward(unet), plain)
    lora.save_adapter(tmp_path / "a.safetensors", loras=[one], base=lora.fingerprint(unet))
    merged = model.load_unet(TINY)
    lora.apply_adapters(parts_of(merged), [lora.read_adapter(tmp_path / "a.safetensors")])
    assert relative(forward(merged), beside) < 1e-5


def test_lora_by_hand():
    """y = W·x + s·B·A·x with W = 0, x = (1, 2), A = (3, 4), B = (5, 6), s = 2: A·x = 11."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    layer[0].weight.data.zero_()
    A, B = lora.LoRA(layer, "all", 1, scale=2.0).pairs["0"]
    A.data, B.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    assert layer[0](torch.tensor([[1.0, 2.0]])).tolist() == [[110.0, 132.0]]


def test_the_start_is_as_published(unet):
    """A of rank r starts at N(0, 1/r²); the rank is cut to the layer's width; a seed repeats."""
    one = lora.LoRA(unet, "spatial-self-attention-ff", 32, seed=1)
    A = torch.cat([A.flatten() for A, _ in one.pairs.values()])
    assert abs(A.std().item() * 32 - 1) < 0.02 and abs(A.mean().item()) < 1e-3
    two = lora.LoRA(unet, "spatial-self-attention-ff", 32, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.pairs.values(), two.pairs.values()))
    wide = lora.LoRA(unet, "cross-attention-kv", 1000)
    assert {A.shape[0] for A, _ in wide.pairs.values()} == {64}


def test_frozen_weights_are_halved_and_norms_stay_whole():
    """All but norms, the last layer and what learns are stored as autocast would cast them."""
    unet = model.load(TINY).unet
    text = torch.randn(1, 5, 64)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return unet(torch.ones(1, 8, 3, 8, 8), 500, text)

    before, norms = run(), (torch.nn.GroupNorm, torch.nn.LayerNorm)
    keep = set(lora.select(unet, "temporal-attention"))
    lora.halve(unet, keep)
    whole = {n for n, p in unet.named_parameters() if p.dtype == torch.float32}
    wanted = {f"{n}.{kind}" for n, m in unet.named_modules() if isinstance(m, norms)
              for kind in ("weight", "bias")} | {"conv_out.weight", "conv_out.bias"} | keep
    assert whole == wanted
    assert relative(run(), before) < 2e-2


def test_dropout_is_on_the_output_and_only_in_training(unet):
    one = filled(unet, "temporal-attention", dropout=0.5)
    assert torch.equal(forward(unet.eval()), forward(unet))
    layer = unet.get_submodule(next(iter(one.pairs)))
    layer.train()
    torch.manual_seed(0)
    x = torch.randn(50, layer.in_features)
    with torch.no_grad():
        with_lora = layer(x)
        one.on = False
        added = with_lora - layer(x)
    zeros = (added == 0).float().mean().item()
    assert 0.4 < zeros < 0.6


# ------------------------------------------------------------------------------------------------
# Adapters: strength, several, words


def test_strength_zero_is_the_base_to_the_bit_and_one_is_exact(unet, tmp_path):
    chosen = lora.select(unet, "temporal-attention-qkv")
    base = {n: p.detach().clone() for n, p in chosen.items()}
    tuned = {n: p * 1.5 for n, p in base.items()}
    lora.save_adapter(tmp_path / "a.safetensors", tuned, base=lora.fingerprint(unet))
    adapter = lora.read_adapter(tmp_path / "a.safetensors")
    for scale, factor in ((0.0, 1.0), (1.0, 1.5), (0.5, 1.25)):
        fresh = model.load_unet(TINY)
        lora.apply_adapters(parts_of(fresh), [adapter], [scale])
        own = dict(fresh.named_parameters())
        for n, p in base.items():
            assert torch.allclose(own[n], p * factor, rtol=1e-6, atol=0)
            assert scale == 0.5 or torch.equal(own[n], p if scale == 0 else tuned[n])


def test_several_adapters_add_up_whatever_their_order(unet, tmp_path):
    """Two whole-tensor adapters and a LoRA on the same weights: W + ½ΔW₁ + ΔW₂ + ΔW₃."""
    name = next(iter(lora.select(unet, "temporal-attention-qkv")))
    W, base = dict(unet.named_parameters())[name].detach().clone(), lora.fingerprint(unet)
    lora.save_adapter(tmp_path / "1.safetensors", {name: W + 1}, base=base)
    lora.save_adapter(tmp_path / "2.safetensors", {name: W + 4}, base=base)
    site = name.removesuffix(".weight")
    A, B = torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2)
    save_file(lora.to_peft({site: (A, B)}), tmp_path / "3.safetensors")
    files = [(lora.read_adapter(tmp_path / f"{i}.safetensors", unet), s)
             for i, s in ((1, 0.5), (2, 1.0), (3, 1.0))]
    for order in (files, files[::-1]):
        fresh = model.load_unet(TINY)
        lora.apply_adapters(parts_of(fresh), [f for f, _ in order], [s for _, s in order])
        got = dict(fresh.named_parameters())[name]
        assert torch.allclose(got, W + 0.5 + 4 + B @ A, atol=1e-5)


def test_learned_words_travel_in_the_adapter(unet, tmp_path):
    text = model.load_text(TINY)
    vectors = torch.randn(2, 64)
    lora.save_adapter(tmp_path / "w.safetensors", words={"V*": vectors},
                      base=lora.fingerprint(unet))
    plain = text(["a red V* star", "a red star"])
    adapter = lora.read_adapter(tmp_path / "w.safetensors")
    lora.apply_adapters(SimpleNamespace(unet=unet, text=text), [adapter])
    learned = text(["a red V* star", "a red star"])
    assert not torch.equal(learned[0], plain[0]) and torch.equal(learned[1], plain[1])
    ids = model.tokenize(["a V* star"], learned={"V*": [49408, 49409]})[0, :6].tolist()
    assert ids[2:4] == [49408, 49409] and ids[0] == model.START


def test_a_words_vectors_stand_where_it_stands():
    """Learned vectors that equal a known word's make a prompt that reads like that word."""
    text = model.load_text(TINY)
    star = model.words_to_ids("star")
    text.learned["<x>"] = text.tower.token_embedding.weight[star].detach()
    one, two = text(["a red <x> moving"]), text(["a red star moving"])
    assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------
# Other programs' formats, at ZeroScope's names and shapes, merged weights worked out by hand

SITE = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"  # 320 × 320
DEEP = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 1280 × 1024


def pair(site, full, rank=2):
    g = torch.Generator().manual_seed(len(site))
    wide, narrow = full.get_submodule(site).weight.shape
    return torch.randn(rank, narrow, generator=g), torch.randn(wide, rank, generator=g)


def merged(adapter, site):
    A, B = adapter.pairs[site]
    return B @ A


def written(fmt, full):
    """A file of the format, and how much B·A it adds at SITE and DEEP."""
    pairs = {site: pair(site, full) for site in (SITE, DEEP)}
    if fmt == "peft":
        return {f"unet.{s}.lora_{ab}.weight": t
                for s, p in pairs.items() for ab, t in zip("AB", p)}, 1
    if fmt == "peft, named":
        return {f"unet.{s}.lora_{ab}.default.weight": t
                for s, p in pairs.items() for ab, t in zip("AB", p)}, 1
    if fmt == "stable_lora":
        return {f"{s}.lora_{ab}": t for s, p in pairs.items() for ab, t in zip("AB", p)}, 1
    state = {}
    for site, (A, B) in pairs.items():
        stem = "lora_unet_" + site.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B,
                  f"{stem}.alpha": torch.tensor(8.0)}
    state["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 4)
    return state, 4  # alpha / rank


@pytest.mark.parametrize("fmt", ("peft", "peft, named", "stable_lora", "kohya"))
def test_foreign_loras_merge_as_worked_by_hand(fmt, full, tmp_path, capsys):
    state, scale = written(fmt, full)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "a.safetensors")
    adapter = lora.read_adapter(tmp_path / "a.safetensors", full)
    lora.check_fit(full, adapter)
    assert set(adapter.pairs) == {SITE, DEEP} and not adapter.tensors
    for site in (SITE, DEEP):
        A, B = pair(site, full)
        # One entry of the product, by hand: the sum over the rank.
        by_hand = scale * sum(B[3, r] * A[r, 5] for r in range(2))
        assert merged(adapter, site)[3, 5].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert ("skipping 1 tensors of a text encoder" in capsys.readouterr().err) == (fmt == "kohya")


@pytest.mark.parametrize("kind,clips", [("temporal", 1), ("spatial", 1), ("spatial", 3)])
def test_motiondirectors_lists_without_names(kind, clips, full, tmp_path):
    """Each tensor is filled with its own number, so the layer and the clip can be told."""
    order = json.loads((REFERENCE / "motiondirector_order.json").read_text())[kind]
    tensors = []
    for _, (wide, narrow) in order:
        for _ in range(clips):
            number = len(tensors) // 2
            tensors += [torch.nn.Parameter(torch.full((wide, 1), float(number))),
                        torch.nn.Parameter(torch.ones(1, narrow))]
    torch.save(tensors, tmp_path / "9_unet.pt")
    for clip in range(clips):
        name = "9_unet.pt" + (f"#{clip}" if clip else "")
        adapter = lora.read_adapter(tmp_path / name, full)
        lora.check_fit(full, adapter)
        for k in (0, 7, len(order) - 1):
            assert merged(adapter, order[k][0])[0, 0].item() == k * clips + clip
    with pytest.raises(BadInput, match="no clip|does not fit"):
        lora.read_adapter(tmp_path / f"9_unet.pt#{clips}", full)


def test_ours_is_read_back_and_is_peft(unet, tmp_path):
    one = filled(unet, "temporal-attention-ff", scale=0.5)
    lora.save_adapter(tmp_path / "a.safetensors", loras=[one], base=lora.fingerprint(unet),
                      method="lora", rank=4)
    state = load_file(tmp_path / "a.safetensors")
    assert all(n.startswith("unet.") and n.endswith((".lora_A.weight", ".lora_B.weight"))
               for n in state)
    adapter = lora.read_adapter(tmp_path / "a.safetensors")
    assert adapter.meta["rank"] == "4"
    for site, (A, B) in one.pairs.items():
        assert torch.equal(adapter.pairs[site][0], A)
        assert torch.equal(adapter.pairs[site][1], 0.5 * B)


@pytest.mark.parametrize("state,says", [
    ({"x.lora_A": torch.ones(1, 2), "y": torch.ones(1)}, "half of a pair"),
    ({"unet.conv_in.weight": torch.ones(3)}, "does not fit"),
    ({f"{SITE}.lora_A": torch.ones(2, 7), f"{SITE}.lora_B": torch.ones(320, 2)}, "does not fit"),
    ({"unet.nowhere.lora_A.weight": torch.ones(1, 2), "unet.nowhere.lora_B.weight":
      torch.ones(2, 1)}, "does not fit"),
    ({"lora_unet_input_blocks_1.lora_down.weight": torch.ones(1, 2)}, "no such layer"),
    ({"lora_te_x.lora_down.weight": torch.ones(1, 2)}, "not an adapter"),
])
def test_files_that_do_not_fit_are_refused(state, says, full, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=says):
        lora.check_fit(full, lora.read_adapter(tmp_path / "a.safetensors", full))
