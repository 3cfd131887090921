"""sampler.py compared with diffusers step by step, and with values worked by hand."""
import json
import math

import pytest
import torch
from conftest import TINY, relative

import sampler
from sampler import NoiseSchedule
from support.files import BadInput
from tiny import world

ZEROSCOPE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "steps_offset": 1, "timestep_spacing": "leading"}
SHAPE = (2, 3, 4, 5, 6)
SPACINGS = "leading", "trailing", "linspace"

both_predictions = pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))


def wobble(x, t):
    """Stands in for the network: smooth, and different at every timestep."""
    return torch.sin(3 * x + t / 100) * 0.9 + 0.1 * x


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).double()


# ------------------------------------------------------------------------------------------------
# Step by step as diffusers


def schedules(theirs_class, prediction, spacing="leading", **more):
    """Our schedule on diffusers' own table, cast to fp64, and diffusers' scheduler."""
    config = ZEROSCOPE | {"prediction_type": prediction, "timestep_spacing": spacing}
    theirs = theirs_class(**config, **more)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return NoiseSchedule(**config, alpha_bar=theirs.alphas_cumprod.clone()), theirs


def walk(theirs, n, step=None):
    """[(timestep, latents after it)] of diffusers' sampler. step(model output, t, x) -> x."""
    x, rows = start(), []
    theirs.set_timesteps(n)
    for t in theirs.timesteps:
        out = wobble(x, t.item())
        x = step(out, t, x) if step else theirs.step(out, t, x).prev_sample
        rows.append((t.item(), x))
    return rows


def assert_same_walk(run, theirs):
    """run(predict), one of our samplers, takes the timesteps and latents of `theirs`."""
    seen = []

    def predict(x, t):
        seen.append((t, x.clone()))
        return wobble(x, t)

    end = run(predict)
    assert [t for t, _ in seen] == [t for t, _ in theirs]
    latents = [x for _, x in seen[1:]] + [end]
    for mine, (_, other) in zip(latents, theirs):
        assert relative(mine, other) <= 1e-10


@pytest.mark.parametrize("spacing", SPACINGS)
@both_predictions
def test_ddim_equals_diffusers(prediction, spacing, diffusers):
    ours, theirs = schedules(diffusers.DDIMScheduler, prediction, spacing,
                             clip_sample=False, set_alpha_to_one=False)
    assert_same_walk(lambda predict: sampler.ddim(ours, predict, start(), 50), walk(theirs, 50))


@both_predictions
def test_ddim_with_eta_equals_diffusers(prediction, diffusers):
    ours, theirs = schedules(diffusers.DDIMScheduler, prediction,
                             clip_sample=False, set_alpha_to_one=False)
    generators = sampler.step_generators([3, 8])

    def step(out, t, x):
        noise = sampler.seeded_randn(SHAPE[1:], generators).double()
        return theirs.step(out, t, x, eta=0.7, variance_noise=noise).prev_sample

    assert_same_walk(
        lambda predict: sampler.ddim(ours, predict, start(), 50, eta=0.7, seeds=[3, 8]),
        walk(theirs, 50, step))


@both_predictions
def test_ddpm_equals_diffusers(prediction, diffusers, monkeypatch):
    ours, theirs = schedules(diffusers.DDPMScheduler, prediction, clip_sample=False)
    theirs.one = theirs.one.double()
    generators = sampler.step_generators([3, 8])
    # The last step has no noise in the paper. diffusers adds noise of variance 1e-20.
    scales = iter([1.0] * 49 + [0.0])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *a, **k: next(scales) * sampler.seeded_randn(SHAPE[1:], generators).double())
    assert_same_walk(lambda predict: sampler.ddpm(ours, predict, start(), 50, seeds=[3, 8]),
                     walk(theirs, 50))


@pytest.mark.parametrize("spacing", SPACINGS)
@both_predictions
def test_dpm_solver_equals_diffusers(prediction, spacing, diffusers, monkeypatch):
    class InDouble:
        """torch for a module that casts to fp32 in the middle of a step."""

        float32 = torch.float64
        __getattr__ = lambda self, name: getattr(torch, name)

    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", InDouble())
    ours, theirs = schedules(diffusers.DPMSolverMultistepScheduler, prediction, spacing)
    theirs.set_timesteps(50)
    levels = ours.alpha_bar[theirs.timesteps]
    sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1).double()])

    def step(out, t, x):
        theirs.sigmas = sigmas  # diffusers rounds them to fp32
        return theirs.step(out, t, x).prev_sample

    assert_same_walk(lambda predict: sampler.dpm_solver(ours, predict, start(), 50),
                     walk(theirs, 50, step))


@both_predictions
def test_inversion_equals_diffusers(prediction, diffusers):
    ours, theirs = schedules(diffusers.DDIMInverseScheduler, prediction,
                             clip_sample=False, set_alpha_to_one=False)
    theirs.initial_alpha_cumprod = theirs.alphas_cumprod[0]
    rows = walk(theirs, 50)
    assert [t for t, _ in rows] == list(range(1, 1000, 20))
    assert_same_walk(lambda predict: sampler.ddim_inversion(ours, predict, start(), 50), rows)


@both_predictions
def test_the_forward_process_equals_diffusers(prediction, diffusers):
    ours, theirs = schedules(diffusers.DDIMScheduler, prediction)
    x0, noise, t = start(), torch.randn(SHAPE).double(), torch.tensor([7, 901])
    assert relative(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t)) <= 1e-12
    want = noise if prediction == "epsilon" else theirs.get_velocity(x0, noise, t)
    assert relative(ours.target(x0, noise, t), want) <= 1e-12


# ------------------------------------------------------------------------------------------------
# Scheduler files

# ZeroScope 576w's file states no timestep_spacing; XL's states leading.
FILES = {"576w": {k: v for k, v in ZEROSCOPE.items() if k != "timestep_spacing"}, "XL": ZEROSCOPE,
         **{spacing: ZEROSCOPE | {"timestep_spacing": spacing} for spacing in SPACINGS}}


def write_config(path, **values):
    path.write_text(json.dumps({"clip_sample": False, "set_alpha_to_one": False} | values))
    return path


@pytest.mark.parametrize("name", FILES)
def test_timesteps_of_a_scheduler_file_equal_diffusers(name, diffusers, tmp_path):
    """DPM-Solver has another default spacing than DDIM. diffusers' from_config replaces a setting
    that the file does not state by the default of the new scheduler."""
    S = NoiseSchedule.read(write_config(tmp_path / "scheduler_config.json", **FILES[name]))
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    ddim = diffusers.DDIMScheduler.from_config(config | FILES[name])
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)
    for steps in (50, 48, 30, 7):
        ddim.set_timesteps(steps), dpm.set_timesteps(steps)
        assert S.timesteps(steps) == ddim.timesteps.tolist()
        assert sampler.dpm_timesteps(S, steps) == dpm.timesteps.tolist()


def test_missing_settings_have_diffusers_defaults(diffusers, tmp_path):
    """They are not ZeroScope's. A missing clip_sample means clipping, which is refused."""
    path, theirs = tmp_path / "scheduler_config.json", diffusers.DDIMScheduler(clip_sample=False)
    path.write_text('{"clip_sample": false}')
    S = NoiseSchedule.read(path)
    assert relative(S.alpha_bar, theirs.alphas_cumprod.double()) < 1e-5
    assert S.alpha_bar_prev(-1) == theirs.final_alpha_cumprod == 1 and S.steps_offset == 0
    path.write_text("{}")
    with pytest.raises(BadInput, match="clip_sample is True"):
        NoiseSchedule.read(path)


def test_zeroscopes_table_equals_diffusers(diffusers):
    theirs = diffusers.DDIMScheduler(**ZEROSCOPE).alphas_cumprod.double()
    assert relative(NoiseSchedule(**ZEROSCOPE).alpha_bar, theirs) < 1e-5


def test_the_tiny_models_schedule():
    S = NoiseSchedule.read(TINY / "scheduler" / "scheduler_config.json")
    assert S.prediction_type == "v_prediction" and S.num_train_timesteps == 700
    # The first 700 levels of the linear schedule of 1000.
    linear = NoiseSchedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert torch.allclose(S.alpha_bar, linear.alpha_bar[:700], rtol=1e-3)


@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"prediction_type": "sample"},
                                    {"clip_sample": True}, {"timestep_spacing": "odd"}])
def test_an_unknown_schedule_is_refused(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        NoiseSchedule(**change)


@pytest.mark.parametrize("steps", (0, 1000, -3))
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(BadInput, match=f"--steps {steps}"):
        sampler.check_steps(NoiseSchedule(), steps)
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        sampler.dpm_timesteps(NoiseSchedule(), steps)


def test_steps_that_start_far_from_pure_noise_are_warned_about(capsys):
    sampler.check_steps(NoiseSchedule(), 50)
    assert capsys.readouterr().err == ""
    sampler.check_steps(NoiseSchedule(), 600)  # timesteps are one apart
    assert "starts at t = 600" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The schedule, inversion, guidance and randomness


@both_predictions
def test_an_integer_timestep_equals_a_tensor_of_it(prediction):
    S, x0, noise = NoiseSchedule(prediction_type=prediction), start().float(), torch.randn(SHAPE)
    many, x = torch.tensor([901, 901]), S.add_noise(x0, noise, 901)
    assert isinstance(S.alpha_bar_at(901, x0), float)
    assert torch.equal(S.add_noise(x0, noise, many), x)
    assert torch.equal(S.target(x0, noise, 901), S.target(x0, noise, many))
    split = lambda t: S.to_x0_eps(noise, x, S.alpha_bar_at(t, x))
    assert all(torch.equal(a, b) for a, b in zip(split(901), split(many)))


@both_predictions
def test_sampling_returns_exactly_from_an_inversion(prediction):
    """The predicted noise does not depend on x here, so both take the same steps."""
    S, fixed, n = NoiseSchedule(prediction_type=prediction), torch.randn(SHAPE).double(), 50

    def network(level):
        def predict(x, t):
            a = level(t)  # below: the v whose ε̂ is `fixed`
            return fixed if prediction == "epsilon" else (fixed - (1 - a) ** 0.5 * x) / a**0.5

        return predict

    up = network(lambda t: S.alpha_bar_prev(t - S.num_train_timesteps // n))
    down = network(lambda t: S.alpha_bar[t].item())
    noise = sampler.ddim_inversion(S, up, start(), n)
    assert relative(sampler.ddim(S, down, noise, n), start()) <= 1e-10
    assert relative(noise, start()) > 0.5


@pytest.fixture(scope="module")
def latents(tiny):
    """The clean latents of a clip."""
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(0), ("moving left",))
    return tiny.encode(world.render(scenes))


def test_the_tiny_model_reconstructs_a_clip_from_its_inversion(tiny, latents):
    """Without guidance."""
    noise = sampler.invert(tiny, latents[:, :, :8], 35)
    back = sampler.sample(tiny, [""], noise, [0], 35, guidance=1.0)
    psnr = 10 * math.log10(4 / (tiny.decode(latents[:, :, :8]) - back).square().mean().item())
    print(f"inversion and back on the tiny model: {psnr:.1f} dB")
    assert psnr > 20


def test_from_an_inverted_start_seeds_differ_by_ddpm_alone(tiny, latents):
    noise = sampler.invert(tiny, latents[:, :, :4], 7).expand(2, -1, -1, -1, -1)
    for method, differ in (("ddim", False), ("dpm", False), ("ddpm", True)):
        first, second = sampler.sample(tiny, ["", ""], noise, [1, 2], 7, 1.0, method)
        assert (relative(first, second) > 0.01) == differ, method


def test_sampling_reports_its_steps_and_shows_a_bar_on_request(tiny, bars, capsys):
    x, seen = torch.randn(1, 8, 4, 8, 8), []
    sampler.sample(tiny, ["a red ball"], x, [0], 3, on_step=lambda t, x0: seen.append(t))
    assert seen == tiny.schedule.timesteps(3) and not bars
    sampler.sample(tiny, ["a red ball"], x, [0], 3, progress="a ball")
    assert bars == {"a ball": 3} and not capsys.readouterr().err  # too quick to appear


@pytest.mark.parametrize("network,vae,message", [
    (math.nan, 1, "guidance 3 gave NaN"), (0, math.nan, "the VAE gave NaN")])
def test_nan_in_a_sample_or_a_video_is_refused(network, vae, message):
    class Network:
        schedule, device = NoiseSchedule(), "cpu"
        encode_text = staticmethod(lambda prompts: torch.zeros(len(prompts), 1, 1))
        predict = staticmethod(lambda x, t, text: x.new_full((len(text), *x.shape[1:]), network))
        decode = staticmethod(lambda latents: latents * vae)

    with pytest.raises(BadInput, match=message):
        sampler.sample(Network(), ["a"], torch.zeros(1, 1, 1, 2, 2), [0], 2, 3.0)


def test_guidance_is_the_papers_formula_in_one_batch():
    calls = []

    def unet(x, t, text):
        calls.append((len(x), len(text)))
        x = x.repeat(len(text) // len(x), 1, 1, 1, 1)  # as the UNet does
        return x * text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)

    x, text, empty = start(), torch.full((2, 3, 4), 2.0).double(), torch.ones(2, 3, 4).double()
    got = sampler.classifier_free_guidance(unet, text, empty, 5.0)(x, 0)
    assert torch.allclose(got, x + 5 * (2 * x - x)) and calls == [(2, 4)]


def test_noise_depends_on_its_own_seed_alone():
    """The same in any batch. The noise of a sampler's steps differs from the starting noise."""
    batch = sampler.seeded_randn((4, 3), [7, 8, 9, 10])
    assert torch.equal(batch[2:3], sampler.seeded_randn((4, 3), [9]))
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(batch[:1], sampler.seeded_randn((4, 3), sampler.step_generators([7])))
    assert not torch.equal(batch[:1], sampler.seeded_randn((4, 3), [7 + 2**32]))
    with pytest.raises(ValueError, match="one seed per sample"):
        sampler.ddpm(NoiseSchedule(), wobble, start(), 5)


def test_timesteps_have_newmoves_density():
    """α = 0.5: relative density 0.5 at t = 0 and 1.5 at 999, mean 600.9, P(t ≥ 500) 0.659."""
    w, t = sampler.timestep_weights(1000, 0.5), torch.arange(1000).double()
    assert w.sum().item() == pytest.approx(1)
    assert 1000 * w[0].item() == pytest.approx(0.5, abs=1e-3)
    assert 1000 * w[999].item() == pytest.approx(1.5, abs=1e-3)
    assert (w * t).sum().item() == pytest.approx(600.9, abs=0.3)
    assert w[500:].sum().item() == pytest.approx(0.659, abs=1e-3)
    for alpha, mean in ((0.5, 600.9), (0, 499.5)):
        g, w = torch.Generator().manual_seed(0), sampler.timestep_weights(1000, alpha)
        drawn = torch.multinomial(w, 200_000, True, generator=g).double()
        assert drawn.mean().item() == pytest.approx(mean, abs=2.5)


def test_blended_noise_keeps_the_variance():
    a, b = torch.randn(100_000), torch.randn(100_000)
    assert sampler.blend_noise(a, b, 0.3).std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(sampler.blend_noise(a, b, 1.0), a)
