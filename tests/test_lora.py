"""lora.py and support/adapters.py: layer sets and their counts, LoRA, adapter files, merging."""
import json
import re
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, TINY, flags_of, prepare_run, relative, run_training
from safetensors.torch import load_file, save_file

import generate
import lora
import model
import train
from support import adapters, export, fast, runs, tokenizer
from support.files import BadInput


@pytest.fixture
def pipe():
    """The tiny model, for a test that changes it."""
    return model.load(TINY)


# ------------------------------------------------------------------------------------------------
# The papers' counts


@pytest.mark.parametrize("layers,rank,tensors,numbers", [
    ("spatial-self-attention-ff", 32, 192, 8_785_920),  # MotionDirector's spatial path
    ("temporal-attention-ff", 32, 340, 12_472_320),  # MotionDirector's temporal path
    ("spatial-attention", 1, 256, 207_488),  # Customize-A-Video's S-LoRA
    ("temporal-attention", 4, 272, 831_488),  # Customize-A-Video's T-LoRA
    ("coupled", 32, 532, 8_785_920 + 12_472_320),
    ("temporal-attention-qkv", 0, 96, 74_342_400),
    ("temporal-and-cross-kv", 0, 826, 570_882_176),  # NewMove
    ("cross-attention-kv", 0, 32, 25_559_040),
    ("temporal", 0, 794, 545_323_136),
    ("spatial", 0, 686, 865_910_724),  # all layers of Stable Diffusion 2.x
    ("all", 0, 1480, 1_411_233_860),
])
def test_layer_sets_have_the_papers_parameter_counts(full, layers, rank, tensors, numbers):
    chosen = lora.LoRA(full, layers, rank).parameters() if rank else lora.select(full, layers)
    assert (len(chosen), sum(p.numel() for p in chosen.values())) == (tensors, numbers)
    assert tuple(map(sum, zip(*runs.layer_types(chosen).values()))) == (tensors, numbers)


def test_lora_targets_have_the_order_of_motiondirectors_files(full):
    order = json.loads((ROOT / "tests" / "reference" / "motiondirector_order.json").read_text())
    for kind, layers in (("spatial", "spatial-self-attention-ff"),
                         ("temporal", "temporal-attention-ff")):
        mine = sorted(lora.lora_targets(full, layers), key=lambda n: n.startswith("mid_block"))
        assert mine == [name for name, _ in order[kind]]


def test_temporal_linears_convs_has_all_except_the_projections(full):
    kinds = (torch.nn.Linear, fast.TemporalConv1d)
    want = {n for n, m in full.named_modules() if isinstance(m, kinds) and "proj_" not in n
            and ("temp_" in n or n.startswith("transformer_in"))}
    assert set(lora.lora_targets(full, "temporal-linears-convs")) == want
    assert len([n for n in want if "temp_convs" in n]) == 88


# ------------------------------------------------------------------------------------------------
# LoRA


def forward(unet):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 4, 8, 8, generator=g), torch.randn(1, 77, 64, generator=g)
    with torch.no_grad():
        return unet(x, 300, text)


def save(path, *trainables, base, **meta):
    """Write an adapter and read it back."""
    adapters.save_adapter(path, trainables, base=adapters.fingerprint(base), **meta)
    return adapters.read_adapter(path, base)


def merged(adapter, scale=1.0):
    """A new tiny model with an adapter merged into it."""
    pipe = model.load(TINY)
    adapters.apply_adapters(pipe, [adapter], [scale])
    return pipe.unet


class Fixed(lora.Trained):
    """A trainable with given tensors, in the names of an adapter."""

    def __init__(self, **tensors):
        self.fixed = tensors

    def tensors(self):
        return self.fixed


@pytest.mark.parametrize("layers", ("coupled", "temporal-linears-convs", "all"))
def test_a_merged_lora_equals_the_hooks_of_training(pipe, layers, tmp_path):
    """A new LoRA changes nothing. Merged into a fresh model, a trained one is equal within 1e-5,
    convolutions included. The file has peft's names, with the scale in B."""
    plain = forward(pipe.unet)
    one = lora.LoRA(pipe.unet, layers, 4, scale=0.7)
    assert torch.equal(forward(pipe.unet), plain)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    hooked = forward(pipe.unet)
    assert relative(hooked, plain) > 0.01
    one.active = False
    assert torch.equal(forward(pipe.unet), plain)
    adapter = save(tmp_path / "a.safetensors", one, base=pipe, rank=4)
    assert adapter.meta["rank"] == "4"
    for name, (A, B) in one.pairs.items():
        assert torch.equal(adapter.pairs[name][0], A)
        assert torch.equal(adapter.pairs[name][1], 0.7 * B)
    assert all(n.startswith("unet.") and n.endswith((".lora_A.weight", ".lora_B.weight"))
               for n in load_file(tmp_path / "a.safetensors"))
    assert torch.equal(forward(merged(adapter, 0.0)), plain)
    assert relative(forward(merged(adapter)), hooked) < 1e-5


def test_lora_by_hand():
    """y = W·x + s·B·A·x with W = 0, x = (1, 2), A = (3, 4), B = (5, 6), s = 2: A·x = 11."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    layer[0].weight.data.zero_()
    A, B = lora.LoRA(layer, "all", 1, scale=2.0).pairs["0"]
    A.data, B.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    assert layer[0](torch.tensor([[1.0, 2.0]])).tolist() == [[110.0, 132.0]]


def test_lora_is_initialized_as_published(pipe):
    """A of rank r from N(0, 1/r²), equal for equal seeds. The rank is at most the width."""
    one, two = (lora.LoRA(pipe.unet, "spatial-self-attention-ff", 32, seed=1) for _ in range(2))
    A = torch.cat([A.flatten() for A, _ in one.pairs.values()])
    assert abs(A.std().item() * 32 - 1) < 0.02 and abs(A.mean().item()) < 1e-3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.pairs.values(), two.pairs.values()))
    wide = lora.LoRA(pipe.unet, "cross-attention-kv", 1000)
    assert {A.shape[0] for A, _ in wide.pairs.values()} == {64}


def test_lora_dropout_applies_to_the_output_in_training_alone(pipe):
    one = lora.LoRA(pipe.unet, "temporal-attention", 4, dropout=0.5)
    for _, B in one.pairs.values():
        B.data.normal_(0, 0.1)
    assert torch.equal(forward(pipe.unet.eval()), forward(pipe.unet))
    layer = pipe.unet.get_submodule(next(iter(one.pairs))).train()
    torch.manual_seed(0)
    x = torch.randn(50, layer.in_features)
    with torch.no_grad():
        with_lora = layer(x)
        one.active = False
        added = with_lora - layer(x)
    assert 0.4 < (added == 0).float().mean().item() < 0.6


# ------------------------------------------------------------------------------------------------
# Adapters: scales, several at once, tokens


def test_scale_zero_is_the_base_and_scale_one_is_exact(pipe, tmp_path):
    trainable = lora.FullFinetune(pipe.unet, "temporal-attention-qkv")
    plain, base = forward(pipe.unet), {n: p.clone() for n, p in trainable.chosen.items()}
    fresh = save(tmp_path / "fresh.safetensors", trainable, base=pipe)
    for p in trainable.chosen.values():
        p.data = p.data * 1.5
    tuned, adapter = forward(pipe.unet), save(tmp_path / "a.safetensors", trainable, base=pipe)
    for one, scale, want in ((fresh, 1.0, plain), (adapter, 0.0, plain), (adapter, 1.0, tuned)):
        assert torch.equal(forward(merged(one, scale)), want)
    other = model.load(TINY)
    (path, layers, change), = adapters.apply_adapters(other, [adapter], [0.5])
    own = dict(other.unet.named_parameters())
    assert all(torch.allclose(own[n], p * 1.25, rtol=1e-6, atol=0) for n, p in base.items())
    assert (path.name, layers) == ("a.safetensors", len(base)) and change == pytest.approx(0.25)


def test_several_adapters_add_up_in_any_order(pipe, tmp_path):
    """Two fully fine-tuned ones and a LoRA on the same weights: W + ½ΔW₁ + ΔW₂ + ΔW₃."""
    name = next(iter(lora.select(pipe.unet, "temporal-attention-qkv")))
    layer, W = name.removesuffix(".weight"), pipe.unet.get_parameter(name).detach().clone()
    A, B = torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2)
    pair = {f"unet.{layer}.lora_A.weight": A, f"unet.{layer}.lora_B.weight": B}
    states = [{f"unet.{name}": W + 1}, {f"unet.{name}": W + 4}, pair]
    files = [save(tmp_path / f"{i}.safetensors", Fixed(**state), base=pipe)
             for i, state in enumerate(states)]
    for step in (1, -1):
        other = model.load(TINY)
        adapters.apply_adapters(other, files[::step], [0.5, 1.0, 1.0][::step])
        got = other.unet.get_parameter(name)
        assert torch.allclose(got, W + 0.5 + 4 + B @ A, atol=1e-5)


def test_learned_tokens_are_in_the_adapter_and_apply_where_a_prompt_has_them(pipe, tmp_path,
                                                                             capsys):
    table = pipe.text_encoder.tower.token_embedding.weight
    star = table[tokenizer.words_to_ids("star")].detach()
    state = {"word.V*": torch.randn(2, 64), "word.<x>": star}
    adapter = save(tmp_path / "w.safetensors", Fixed(**state), base=pipe)
    prompts = ["a red V* star", "a red star", "a red <x>"]
    plain = pipe.encode_text(prompts)
    adapters.apply_adapters(pipe, [adapter], [0.0])
    assert torch.equal(pipe.encode_text(prompts), plain)
    adapters.apply_adapters(pipe, [adapter])
    learned = pipe.encode_text(prompts)
    assert not torch.equal(learned[0], plain[0]) and torch.equal(learned[1], plain[1])
    assert torch.equal(learned[2], learned[1])  # <x> has the vector of "star"
    ids = tokenizer.tokenize(["a V* star"], learned={"V*": [49408, 49409]})[0, :6].tolist()
    assert ids[2:4] == [49408, 49409] and ids[0] == tokenizer.START
    for save_merged in (export.save_hub, export.save_pth):  # neither layout can hold them
        save_merged(pipe, tmp_path / save_merged.__name__, TINY)
        assert "does not hold the learned tokens <x>, V*" in capsys.readouterr().err
    with pytest.raises(BadInput, match="two adapters hold the token"):
        adapters.apply_adapters(model.load(TINY), [adapter, adapter])


# ------------------------------------------------------------------------------------------------
# A new kind of trainable, and parts that one file cannot hold


class Bias(lora.Trained):
    """A number that is added to the UNet's output."""

    def __init__(self, pipe, value=0.0):
        self.number = torch.nn.Parameter(torch.tensor([value]))
        pipe.unet.register_forward_hook(lambda unet, inputs, out: out + self.active * self.number)

    def parameters(self):
        return {"number": self.number}

    def tensors(self):
        return {"bias.number": self.number}


@dataclass(frozen=True)
class BiasPart(lora.Trainable):
    def build(self, pipe, seed, clip):
        return Bias(pipe)


@pytest.fixture
def with_parts(monkeypatch):
    """Replace vmc by a method with the plain loss and the given parts."""
    def replace(**parts):
        own, plain = train.METHODS["vmc"].own, train.METHODS["coupled"].function
        keywords, shape = {"loss": "mse"}, (16, 64, 64)
        recipe = train.Recipe("vmc", "a test", plain, own, parts, keywords, shape, 8.0)
        monkeypatch.setitem(train.METHODS, "vmc", recipe)
        monkeypatch.setitem(train.TINY, "vmc", "")

    return replace


def test_a_new_kind_of_trainable_is_saved_loaded_scaled_and_resumed(hop, tmp_path, with_parts,
                                                                    monkeypatch, tiny):
    with_parts(motion=BiasPart("all", lr=0.01))
    loader = lambda pipe, tensors, scale: Bias(pipe, scale * tensors["number"].item())
    monkeypatch.setitem(adapters.ADAPTER_LOADERS, "bias", loader)
    run_training("vmc", hop, tmp_path / "three", "--steps", 3)
    run_training("vmc", hop, tmp_path / "two", "--steps", 2)
    run_training("vmc", hop, tmp_path / "two", "--steps", 3, "--resume")
    files = [tmp_path / name / "vmc.safetensors" for name in ("three", "two")]
    first, second = (adapters.read_adapter(path, tiny) for path in files)
    number = first.more["bias"]["number"]
    assert torch.equal(number, second.more["bias"]["number"]) and number.item()
    plain = forward(tiny.unet)
    for scale in (0.0, 1.0, 2.0):
        torch.testing.assert_close(forward(merged(first, scale)), plain + scale * number)
    merge = ["--adapter", str(files[0]), "--save-merged", str(tmp_path / "merged")]
    with pytest.raises(BadInput, match="changes more than weights"):
        generate.main(merge)
    assert not (tmp_path / "merged").exists()
    monkeypatch.delitem(adapters.ADAPTER_LOADERS, "bias")
    with pytest.raises(BadInput, match="bias.number"):
        adapters.read_adapter(files[0], tiny)


QKV = lora.Trainable("temporal-attention-qkv", 2)


@pytest.mark.parametrize("parts,message", [
    ({"motion": BiasPart("all")}, "no loader for 'bias'"),
    ({"motion": QKV, "second": QKV}, "two parts train unet."),  # one of them would be lost
    ({"motion": lora.Trainable("temporal"), "second": QKV}, "one fully and one with a LoRA")])
def test_parts_that_no_adapter_can_hold_are_refused_when_the_run_starts(parts, message, hop,
                                                                        tmp_path, with_parts):
    with_parts(**parts)
    with pytest.raises(BadInput, match=message):
        run_training("vmc", hop, tmp_path / "out", "--steps", 1)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".jsonl", ".safetensors")]


# ------------------------------------------------------------------------------------------------
# Training from an adapter


def first_loss(run):
    """The loss of the first step."""
    return torch.stack(train.one_step(run, 0)[0])


def saved(run, path):
    """The motion adapter of a run, with random changes."""
    trainables = runs.adapter_groups(run.trainables)[""]
    for p in (p for one in trainables for p in one.parameters().values()):
        p.data.add_(0.01 * torch.randn_like(p))
    adapters.save_adapter(path, trainables, base=run.fingerprint)
    return path


@pytest.mark.parametrize("method,parts,settings", [
    ("vmc", ["motion"], []), ("textual-inversion", ["word"], []),
    ("custom-diffusion", ["motion", "word"], []),
    ("customize-a-video", ["motion"], ["appearance.layers=none", "motion.scale=0.5"]),
])
def test_training_starts_from_an_adapter(method, parts, settings, hop, tmp_path):
    """The first loss is the adapter's, and all trained tensors change."""
    run = prepare_run(method, hop, tmp_path, *settings)
    plain = first_loss(run)
    path = saved(run, tmp_path / "a.safetensors")
    settings += [f"{part}.load_from={path}" for part in parts]
    again = prepare_run(method, hop, tmp_path, *settings)
    assert torch.equal(first_loss(again), first_loss(run)) and first_loss(run) != plain
    run_training(method, hop, tmp_path / "out", "--steps", 1, *settings)
    before, after = load_file(path), load_file(tmp_path / "out" / f"{method}.safetensors")
    after.pop(adapters.CLIP)
    assert before.keys() == after.keys()
    assert all((before[n] != after[n]).any() and relative(after[n], before[n]) < 0.5
               for n in before if "lora_A" not in n)


@pytest.mark.parametrize("settings,message", [
    (["motion.rank=2"], r"lora_A.weight is missing in the file, \(.*\) here; give the layers"),
    (["motion.layers=temporal-attention-ff"], r"is missing in the file, \(.*\) here"),
    (["motion.load_from=LORA"], "LORA is not an adapter of train.py, so it cannot"),
    (["motion.load_from=NONE"], "NONE cannot be used"),
])
def test_an_adapter_of_other_layers_is_refused_at_the_start(settings, message, hop, tmp_path):
    path = saved(prepare_run("vmc", hop, tmp_path), tmp_path / "a.safetensors")
    save_file(load_file(path), tmp_path / "LORA.safetensors")
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("LORA", "NONE")}
    settings = [re.sub("LORA|NONE", lambda m: names[m[0]], text) for text in settings]
    with pytest.raises(BadInput, match=re.sub("LORA|NONE", r"\g<0>.safetensors", message)) as error:
        prepare_run("vmc", hop, tmp_path, f"motion.load_from={path}", *settings)
    assert "\n" not in str(error.value)


def test_a_token_in_the_file_must_be_loaded_too(hop, tmp_path):
    path = saved(prepare_run("custom-diffusion", hop, tmp_path), tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"word.sks is \(1, 64\) in the file, missing here"):
        prepare_run("custom-diffusion", hop, tmp_path, f"motion.load_from={path}")


class Doubled(Bias):
    def tensors(self):
        return {"bias.number": 2 * self.number}


@dataclass(frozen=True)
class DoubledPart(lora.Trainable):
    def build(self, pipe, seed, clip):
        return Doubled(pipe)


def test_a_kind_that_cannot_be_trained_further_is_refused_at_the_start(hop, tmp_path, with_parts,
                                                                       monkeypatch, tiny):
    monkeypatch.setitem(adapters.ADAPTER_LOADERS, "bias", None)
    path = tmp_path / "a.safetensors"
    adapters.save_adapter(path, [Fixed(**{"bias.number": torch.ones(1)})])
    with_parts(motion=BiasPart("all", load_from=str(path)))
    assert prepare_run("vmc", hop, tmp_path).trainables["motion"][0].number.item() == 1
    with_parts(motion=DoubledPart("all", load_from=str(path)))
    with pytest.raises(BadInput, match="Doubled has no load method for bias.number"):
        prepare_run("vmc", hop, tmp_path)


def test_one_motion_lora_per_clip_is_refused_when_the_run_starts(folder, tmp_path):
    with pytest.raises(BadInput, match="per_video=off"):
        run_training("motiondirector", folder / "videos", tmp_path / "out", "motion.per_video=on")
    argv = flags_of("motiondirector", folder / "videos", tmp_path / "new", "--steps", 1)
    train.main(argv)  # the appearance has one LoRA per clip, and one file each
    assert (tmp_path / "new" / "motiondirector-appearance-2.safetensors").is_file()


# ------------------------------------------------------------------------------------------------
# Precision


def test_full_precision_is_kept_for_full_fine_tuning_alone(full):
    """The layers of a LoRA, of load_from, and of no part may be stored in bf16."""
    names = [name for name, _ in full.named_parameters()]
    chosen = lambda *parts: {n for n in names if n in lora.FinetunedNames(dict(enumerate(parts)))}
    qkv = lora.Trainable("temporal-attention-qkv")
    assert chosen(qkv, lora.Trainable("spatial", 4)) == set(lora.select(full, qkv.layers))
    for part in (lora.Trainable("spatial", 4), lora.Trainable("none"),
                 lora.PlaceholderToken("sks", 4), lora.Trainable("none", load_from="a.pt")):
        assert not chosen(part)


@pytest.mark.parametrize("method", ("vmc", "newmove", "motiondirector"))
def test_in_bf16_trainable_parameters_stay_in_fp32(method, hop, tmp_path):
    run = prepare_run(method, hop, tmp_path, "--precision", "bf16")
    assert {p.dtype for p in run.trained.values()} == {torch.float32}
    frozen = [p for n, p in run.pipe.unet.named_parameters() if n not in run.trained]
    assert any(p.dtype == torch.bfloat16 for p in frozen)


# ------------------------------------------------------------------------------------------------
# Files that are no adapters or do not fit

LAYER = "mid_block.temp_attentions.0.transformer_blocks.0.attn1.to_q"  # 64 × 64 in the tiny model
CONV = "mid_block.temp_convs.0.conv1.2"


def pair(A, B, layer=LAYER):
    return {f"unet.{layer}.lora_A.weight": torch.ones(A),
            f"unet.{layer}.lora_B.weight": torch.ones(B)}


@pytest.mark.parametrize("state", [
    {}, {"x": torch.ones(1)}, {"unet.conv_in.weight": torch.ones(3)},
    {"unet.nowhere.weight": torch.ones(3)}, {f"unet.{LAYER}.lora_B.weight": torch.ones(64, 2)},
    pair((2, 7), (64, 2)), pair((2, 64), (64, 3)), pair((0, 64), (64, 0)), pair((64,), (64,)),
    pair((), ()), pair((1, 64, 3, 1, 1), (64, 1, 3, 1, 1), CONV), pair((2, 64), (64, 2), "nowhere"),
    {"word.V*": torch.ones(2, 32)}, {"word.V*": torch.ones(64)}, {"word.V*": torch.ones(0, 64)},
    {"word.": torch.ones(1, 64)}, {"word.V*": torch.full((1, 64), float("nan"))},
    {"word.V*": torch.ones(1, 64, dtype=torch.int64)},
    *({"word.V*": torch.ones(1, 64), adapters.CLIP: torch.ones(shape)}
      for shape in ((7, 4, 8, 8), (8, 4, 8), (1, 8, 4, 8, 8))),
], ids=lambda state: " ".join(f"{n[-13:]} {tuple(t.shape)}" for n, t in state.items()))
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(state, tiny, tmp_path):
    save_file(state, tmp_path / "a.safetensors", {"format": adapters.FORMAT})
    with pytest.raises(BadInput, match="a.safetensors") as error:
        adapters.read_adapter(tmp_path / "a.safetensors", tiny)
    assert "\n" not in str(error.value)
