"""lora.py: sets of layers and their counts, LoRA, adapters and what they do to a model."""
import json
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, TINY, learn, prepared, relative
from safetensors.torch import load_file, save_file
from test_model import FULL_UNET

import lora
import model
import train
from support import adapter_file, fast, tokenizer
from support.files import BadInput


@pytest.fixture(scope="session")
def full():
    """ZeroScope's UNet, by names and shapes alone."""
    with torch.device("meta"):
        return model.UNet(model.UNetConfig(**FULL_UNET))


@pytest.fixture
def whole():
    """The tiny model, to be changed."""
    return model.load(TINY)


@pytest.fixture
def unet(whole):
    return whole.unet


def count(parameters):
    return len(parameters), sum(p.numel() for p in parameters.values())


# ------------------------------------------------------------------------------------------------
# What the papers count


@pytest.mark.parametrize("layers,rank,numbers", [
    ("spatial-self-attention-ff", 32, 8_785_920),  # MotionDirector's spatial path
    ("temporal-attention-ff", 32, 12_472_320),  # and its temporal one
    ("spatial-attention", 1, 207_488),  # Customize-A-Video's S-LoRA
    ("temporal-attention", 4, 831_488),  # and its T-LoRA
    ("coupled", 32, 8_785_920 + 12_472_320),
])
def test_loras_have_the_papers_parameters(full, layers, rank, numbers):
    assert count(lora.LoRA(full, layers, rank).parameters())[1] == numbers


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
    assert count(chosen) == (tensors, numbers)
    kinds = lora.kinds_of_layer(chosen).values()
    assert tuple(map(sum, zip(*kinds))) == (tensors, numbers)


def test_sites_are_the_layers_of_motiondirectors_files_in_their_order(full):
    order = json.loads((ROOT / "tests" / "reference" / "motiondirector_order.json").read_text())
    for kind, layers in (("spatial", "spatial-self-attention-ff"),
                         ("temporal", "temporal-attention-ff")):
        mine = sorted(lora.sites(full, layers), key=lambda n: n.startswith("mid_block"))
        assert mine == [name for name, _ in order[kind]]


def test_temporal_linears_and_convolutions_are_all_of_them(full):
    """All that a LoRA can stand beside, but the linear layers around the attention blocks."""
    kinds = (torch.nn.Linear, fast.TimeConv)
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


def save(path, *learners, base, **meta):
    """What learners hold, in a file, and read back."""
    adapter_file.save_adapter(path, learners, base=adapter_file.fingerprint(base.unet), **meta)
    return adapter_file.read_adapter(path)


class Held:
    """A learner that holds some tensors, in the names of an adapter."""

    def __init__(self, **tensors):
        self.held = tensors

    def tensors(self):
        return self.held


@pytest.mark.parametrize("layers", ("coupled", "temporal-linears-convs", "all"))
def test_a_fresh_lora_changes_nothing_and_a_merged_one_equals_it(whole, layers, tmp_path):
    """Merged into the weights, on a fresh copy: the same within 1e-5, convolutions included. In the
    file are peft's names, and the scale is in B."""
    plain, unet = forward(whole.unet), whole.unet
    one = lora.LoRA(unet, layers, 4, scale=0.7)
    assert torch.equal(forward(unet), plain)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    beside = forward(unet)
    assert relative(beside, plain) > 0.01
    one.on = False
    assert torch.equal(forward(unet), plain)
    adapter = save(tmp_path / "a.safetensors", one, base=whole, rank=4)
    assert adapter.meta["rank"] == "4"
    for site, (A, B) in one.pairs.items():
        assert torch.equal(adapter.pairs[site][0], A)
        assert torch.equal(adapter.pairs[site][1], 0.7 * B)
    assert all(n.startswith("unet.") and n.endswith((".lora_A.weight", ".lora_B.weight"))
               for n in load_file(tmp_path / "a.safetensors"))
    for scale in (0.0, 1.0):
        merged = model.load(TINY)
        adapter_file.apply_adapters(merged, [adapter], [scale])
        if scale:
            assert relative(forward(merged.unet), beside) < 1e-5
        else:
            assert torch.equal(forward(merged.unet), plain)


def test_lora_by_hand():
    """y = W·x + s·B·A·x with W = 0, x = (1, 2), A = (3, 4), B = (5, 6), s = 2: A·x = 11."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    layer[0].weight.data.zero_()
    A, B = lora.LoRA(layer, "all", 1, scale=2.0).pairs["0"]
    A.data, B.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    assert layer[0](torch.tensor([[1.0, 2.0]])).tolist() == [[110.0, 132.0]]


def test_the_start_is_as_published(unet):
    """A of rank r starts at N(0, 1/r²); the rank is cut to the layer's width; a seed repeats."""
    one, two = (lora.LoRA(unet, "spatial-self-attention-ff", 32, seed=1) for _ in range(2))
    A = torch.cat([A.flatten() for A, _ in one.pairs.values()])
    assert abs(A.std().item() * 32 - 1) < 0.02 and abs(A.mean().item()) < 1e-3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.pairs.values(), two.pairs.values()))
    wide = lora.LoRA(unet, "cross-attention-kv", 1000)
    assert {A.shape[0] for A, _ in wide.pairs.values()} == {64}


def test_dropout_is_on_the_output_and_only_in_training(unet):
    one = lora.LoRA(unet, "temporal-attention", 4, dropout=0.5)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    assert torch.equal(forward(unet.eval()), forward(unet))
    layer = unet.get_submodule(next(iter(one.pairs))).train()
    torch.manual_seed(0)
    x = torch.randn(50, layer.in_features)
    with torch.no_grad():
        with_lora = layer(x)
        one.on = False
        added = with_lora - layer(x)
    assert 0.4 < (added == 0).float().mean().item() < 0.6


# ------------------------------------------------------------------------------------------------
# Adapters: strength, several, words, learners of a new kind


def test_strength_zero_is_the_base_to_the_bit_and_one_is_exact(whole, tmp_path):
    """A fresh adapter changes nothing, a tuned one loads as it was in memory."""
    learner = lora.Whole(whole.unet, "temporal-attention-qkv")
    plain, base = forward(whole.unet), {n: p.clone() for n, p in learner.chosen.items()}
    fresh = save(tmp_path / "fresh.safetensors", learner, base=whole)
    for p in learner.chosen.values():
        p.data = p.data * 1.5
    tuned, adapter = forward(whole.unet), save(tmp_path / "a.safetensors", learner, base=whole)
    for one, scale, want in ((fresh, 1.0, plain), (adapter, 0.0, plain), (adapter, 1.0, tuned)):
        other = model.load(TINY)
        adapter_file.apply_adapters(other, [one], [scale])
        assert torch.equal(forward(other.unet), want)
    other = model.load(TINY)
    (path, layers, change), = adapter_file.apply_adapters(other, [adapter], [0.5])
    own = dict(other.unet.named_parameters())
    assert all(torch.allclose(own[n], p * 1.25, rtol=1e-6, atol=0) for n, p in base.items())
    assert (path.name, layers) == ("a.safetensors", len(base)) and change == pytest.approx(0.25)


def test_several_adapters_add_up_whatever_their_order(whole, tmp_path):
    """Two whole-tensor adapters and a LoRA on the same weights: W + ½ΔW₁ + ΔW₂ + ΔW₃."""
    name = next(iter(lora.select(whole.unet, "temporal-attention-qkv")))
    site, W = name.removesuffix(".weight"), whole.unet.get_parameter(name).detach().clone()
    A, B = torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2)
    pair = {f"unet.{site}.lora_A.weight": A, f"unet.{site}.lora_B.weight": B}
    held = [{f"unet.{name}": W + 1}, {f"unet.{name}": W + 4}, pair]
    files = [save(tmp_path / f"{i}.safetensors", Held(**h), base=whole) for i, h in enumerate(held)]
    for step in (1, -1):
        other = model.load(TINY)
        adapter_file.apply_adapters(other, files[::step], [0.5, 1.0, 1.0][::step])
        got = other.unet.get_parameter(name)
        assert torch.allclose(got, W + 0.5 + 4 + B @ A, atol=1e-5)


def test_learned_words_travel_in_the_adapter_and_stand_where_they_stand(whole, tmp_path):
    star = whole.text.tower.token_embedding.weight[tokenizer.words_to_ids("star")].detach()
    held = {"word.V*": torch.randn(2, 64), "word.<x>": star}
    adapter = save(tmp_path / "w.safetensors", Held(**held), base=whole)
    prompts = ["a red V* star", "a red star", "a red <x>"]
    plain = whole.read(prompts)
    adapter_file.apply_adapters(whole, [adapter], [0.0])
    assert torch.equal(whole.read(prompts), plain)
    adapter_file.apply_adapters(whole, [adapter])
    learned = whole.read(prompts)
    assert not torch.equal(learned[0], plain[0]) and torch.equal(learned[1], plain[1])
    assert torch.equal(learned[2], learned[1])  # vectors that equal a known word's read as it
    ids = tokenizer.tokenize(["a V* star"], learned={"V*": [49408, 49409]})[0, :6].tolist()
    assert ids[2:4] == [49408, 49409] and ids[0] == tokenizer.START
    with pytest.raises(BadInput, match="two adapters bring the word"):
        adapter_file.apply_adapters(model.load(TINY), [adapter, adapter])


class Bias:
    """A learner of another kind: a number that is added to all that the UNet says."""

    def __init__(self, model, value=0.0):
        self.number, self.on = torch.nn.Parameter(torch.tensor([value])), True
        model.unet.register_forward_hook(lambda unet, inputs, out: out + self.on * self.number)

    def parameters(self):
        return {"number": self.number}

    def tensors(self):
        return {"bias.number": self.number}


@dataclass(frozen=True)
class BiasPart(lora.Part):
    def learner(self, model, seed):
        return Bias(model)


def test_a_learner_of_a_new_kind_is_saved_loaded_scaled_and_resumed(hop, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))
    monkeypatch.setitem(train.METHODS, "vmc", train.Recipe(
        "vmc", "a test", train.METHODS["coupled"].function, train.METHODS["vmc"].own,
        {"motion": BiasPart("all", lr=0.01)}, {"loss": "mse"}, (16, 64, 64), 8.0))
    monkeypatch.setitem(train.TINY, "vmc", "")
    monkeypatch.setitem(lora.KINDS, "bias",
                        lambda model, tensors, scale: Bias(model, scale * tensors["number"].item()))
    learn("vmc", hop, tmp_path / "three", "--steps", 3)
    learn("vmc", hop, tmp_path / "two", "--steps", 2)
    learn("vmc", hop, tmp_path / "two", "--steps", 3, "--resume")
    adapters = [adapter_file.read_adapter(tmp_path / n / "vmc.safetensors")
                for n in ("three", "two")]
    number, again = (adapter.more["bias"]["number"] for adapter in adapters)
    assert torch.equal(number, again) and number.item()
    plain = forward(model.load(TINY).unet)
    for scale in (0.0, 1.0, 2.0):
        other = model.load(TINY)
        adapter_file.apply_adapters(other, adapters[:1], [scale])
        torch.testing.assert_close(forward(other.unet), plain + scale * number)
    monkeypatch.delitem(lora.KINDS, "bias")
    with pytest.raises(BadInput, match="no learner known here"):
        adapter_file.read_adapter(tmp_path / "two" / "vmc.safetensors")


def test_only_what_learns_in_full_is_read_in_full(full):
    """A LoRA's layers, a file's and those of no part at all are read in bf16."""
    names = [name for name, _ in full.named_parameters()]
    qkv = set(lora.select(full, "temporal-attention-qkv"))
    chosen = lambda *parts: {n for n in names if n in lora.Tuned(dict(enumerate(parts)))}
    assert chosen(lora.Part("temporal-attention-qkv"), lora.Part("spatial", 4)) == qkv
    for part in (lora.Part("spatial", 4), lora.Part("none"), lora.Word("sks", 4),
                 lora.Part("spatial", file="a.safetensors")):
        assert not chosen(part)


@pytest.mark.parametrize("method", ("vmc", "newmove", "motiondirector"))
def test_in_bf16_what_learns_stays_whole_and_the_rest_is_stored_in_it(method, hop, tmp_path):
    run = prepared(method, hop, tmp_path, "--precision", "bf16")
    learned = lora.named(run.learners)
    assert {p.dtype for p in learned.values()} == {torch.float32}
    frozen = [p for n, p in run.model.unet.named_parameters() if n not in learned]
    assert any(p.dtype == torch.bfloat16 for p in frozen)


# ------------------------------------------------------------------------------------------------
# Files that are none, or do not fit

SITE = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q"  # 64 × 64 in the tiny model
CONV = "mid_block.temp_convs.0.conv1.2"


def two(A, B, site=SITE):
    return {f"unet.{site}.lora_A.weight": torch.ones(A), f"unet.{site}.lora_B.weight":
            torch.ones(B)}


@pytest.mark.parametrize("state,says", [
    ({"x": torch.ones(1)}, "no learner known here"),
    ({}, "holds nothing"),
    ({"unet.conv_in.weight": torch.ones(3)}, "does not fit"),
    ({"unet.nowhere.weight": torch.ones(3)}, "does not fit"),
    ({f"unet.{SITE}.lora_B.weight": torch.ones(64, 2)}, "half of a pair"),
    (two((2, 7), (64, 2)), "does not fit"), (two((2, 64), (64, 3)), "does not fit"),
    (two((0, 64), (64, 0)), "does not fit"), (two((64,), (64,)), "does not fit"),
    (two((), ()), "does not fit"), (two((2, 64, 1, 1), (64, 2, 1, 1)), "does not fit"),
    (two((1, 64, 3, 1, 1), (64, 1, 3, 1, 1), CONV), "does not fit"),
    (two((2, 64), (64, 2), "nowhere"), "does not fit"),
    ({"word.V*": torch.ones(2, 32)}, "does not fit"), ({"word.V*": torch.ones(64)}, "does not fit"),
    ({"word.V*": torch.ones(0, 64)}, "does not fit"),
    ({"word.": torch.ones(1, 64)}, "does not fit"),
    ({"word.V*": torch.full((1, 64), float("nan"))}, "holds NaN"),
    ({"word.V*": torch.ones(1, 64, dtype=torch.int64)}, "torch.int64"),
])
def test_adapters_that_do_not_fit_are_refused(state, says, tiny, tmp_path):
    save_file(state, tmp_path / "a.safetensors", {"format": adapter_file.FORMAT})
    with pytest.raises(BadInput, match=says):
        adapter_file.check_fit(tiny, adapter_file.read_adapter(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("latents", [(7, 4, 8, 8), (8, 4, 8), (1, 8, 4, 8, 8)])
def test_a_clip_of_other_channels_or_dimensions_is_refused(latents, tiny, tmp_path):
    adapter_file.save_adapter(tmp_path / "a.safetensors", [Held(**{"word.V*": torch.ones(1, 64)})],
                      torch.ones(latents))
    with pytest.raises(BadInput, match="the clip's latents"):
        adapter_file.check_fit(tiny, adapter_file.read_adapter(tmp_path / "a.safetensors"))


def test_what_is_of_another_base_or_no_adapter_is_refused(tiny, tmp_path):
    held = Held(**{"word.V*": torch.ones(1, 64)})
    adapter_file.save_adapter(tmp_path / "a.safetensors", [held], base="0" * 12, base_name="other")
    with pytest.raises(BadInput, match="was trained on other"):
        adapter_file.check_fit(tiny, adapter_file.read_adapter(tmp_path / "a.safetensors"))
    save_file(held.tensors(), tmp_path / "b.safetensors", {"format": "motion-adapter-1"})
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-50])
    save_file(held.tensors(), tmp_path / "d.safetensors")
    for name, says in (("b", "older format"), ("c", "cannot be read"), ("d", "not one of our own"),
                       ("e", "does not exist")):
        with pytest.raises(BadInput, match=says):
            adapter_file.read_adapter(tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInput, match="is a folder"):
        adapter_file.read_adapter(tmp_path)
