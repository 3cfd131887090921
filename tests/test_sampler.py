"""sampler.py against diffusers step by step, and against values worked by hand."""
import math

import pytest
import torch
from conftest import TINY, relative

import sampler
from sampler import Schedule
from support.files import BadInput

diffusers = pytest.importorskip("diffusers")

ZEROSCOPE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "steps_offset": 1, "timestep_spacing": "leading"}
SHAPE = (2, 3, 4, 5, 6)


def wobble(x, t):
    """A stand-in for the network: smooth, and different at every timestep."""
    return torch.sin(3 * x + t / 100) * 0.9 + 0.1 * x


def pair(theirs_class, prediction, spacing="leading", **more):
    """Our schedule on diffusers' own table, cast to fp64, and diffusers' scheduler."""
    config = ZEROSCOPE | {"prediction_type": prediction, "timestep_spacing": spacing}
    theirs = theirs_class(**config, **more)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return Schedule(**config, alpha_bar=theirs.alphas_cumprod.clone()), theirs


def walk(theirs, x, n, step=None):
    """diffusers' sampler with wobble, all latents; step(model output, t, x) -> x."""
    theirs.set_timesteps(n)
    for t in theirs.timesteps:
        out = wobble(x, t.item())
        x = step(out, t, x) if step else theirs.step(out, t, x).prev_sample
        yield t.item(), x


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).double()


def record(run):
    """(timesteps, latents before each step) of one of our samplers."""
    seen = []

    def predict(x, t):
        seen.append((t, x.clone()))
        return wobble(x, t)

    end = run(predict)
    return [t for t, _ in seen], [x for _, x in seen[1:]] + [end]


def same_walk(ours, theirs):
    times, latents = ours
    assert times == [t for t, _ in theirs]
    for mine, (_, other) in zip(latents, theirs):
        assert relative(mine, other) <= 1e-10


PREDICTIONS = ("epsilon", "v_prediction")


def test_table_equals_diffusers():
    theirs = diffusers.DDIMScheduler(**ZEROSCOPE)
    assert relative(Schedule(**ZEROSCOPE).alpha_bar, theirs.alphas_cumprod.double()) < 1e-5


def test_zeroscope_timesteps():
    assert Schedule().timesteps(50) == list(range(981, 0, -20))
    assert Schedule().timesteps(75)[0] == 963


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_equals_diffusers(prediction, spacing):
    ours, theirs = pair(diffusers.DDIMScheduler, prediction, spacing,
                        clip_sample=False, set_alpha_to_one=False)
    got = record(lambda predict: sampler.ddim(ours, predict, start(), 50))
    same_walk(got, list(walk(theirs, start(), 50)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise_equals_diffusers(prediction):
    ours, theirs = pair(diffusers.DDIMScheduler, prediction,
                        clip_sample=False, set_alpha_to_one=False)
    generators = sampler.step_generators([3, 8])
    step = lambda out, t, x: theirs.step(
        out, t, x, eta=0.7,
        variance_noise=sampler.noise_like_shape(SHAPE[1:], generators).double()).prev_sample
    got = record(lambda predict: sampler.ddim(ours, predict, start(), 50, eta=0.7, seeds=[3, 8]))
    same_walk(got, list(walk(theirs, start(), 50, step)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_equals_diffusers(prediction, monkeypatch):
    ours, theirs = pair(diffusers.DDPMScheduler, prediction, clip_sample=False)
    theirs.one = theirs.one.double()
    generators = sampler.step_generators([3, 8])
    # The last step has no noise in the paper; diffusers draws some of variance 1e-20.
    draws = iter([1.0] * 49 + [0.0])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *a, **k: next(draws) * sampler.noise_like_shape(SHAPE[1:], generators).double())
    got = record(lambda predict: sampler.ddpm(ours, predict, start(), 50, seeds=[3, 8]))
    same_walk(got, list(walk(theirs, start(), 50)))


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_equals_diffusers(prediction, spacing, monkeypatch):
    class InDouble:
        """torch, for a module that casts to fp32 in the middle of a step."""

        float32 = torch.float64
        __getattr__ = lambda self, name: getattr(torch, name)

    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", InDouble())
    ours, theirs = pair(diffusers.DPMSolverMultistepScheduler, prediction, spacing)
    theirs.set_timesteps(50)
    levels = ours.alpha_bar[theirs.timesteps]
    sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1).double()])

    def step(out, t, x):
        theirs.sigmas = sigmas  # its own are rounded to fp32
        return theirs.step(out, t, x).prev_sample

    got = record(lambda predict: sampler.dpm_solver(ours, predict, start(), 50))
    same_walk(got, list(walk(theirs, start(), 50, step)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_equals_diffusers(prediction):
    ours, theirs = pair(diffusers.DDIMInverseScheduler, prediction,
                        clip_sample=False, set_alpha_to_one=False)
    theirs.initial_alpha_cumprod = theirs.alphas_cumprod[0]
    got = record(lambda predict: sampler.ddim_inversion(ours, predict, start(), 50))
    assert got[0] == list(range(1, 1000, 20))
    same_walk(got, list(walk(theirs, start(), 50)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_forward_process_equals_diffusers(prediction):
    ours, theirs = pair(diffusers.DDIMScheduler, prediction)
    x0, noise, t = start(), torch.randn(SHAPE).double(), torch.tensor([7, 901])
    x = ours.add_noise(x0, noise, t)
    assert relative(x, theirs.add_noise(x0, noise, t)) <= 1e-12
    want = noise if prediction == "epsilon" else theirs.get_velocity(x0, noise, t)
    assert relative(ours.target(x0, noise, t), want) <= 1e-12


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_undoes_the_forward_process(prediction):
    S = Schedule(prediction_type=prediction)
    x0, noise, t = start(), torch.randn(SHAPE).double(), torch.tensor([7, 901])
    x = S.add_noise(x0, noise, t)
    back, eps = S.split(S.target(x0, noise, t), x, S.at(t, x))
    assert relative(back, x0) <= 1e-9 and relative(eps, noise) <= 1e-9


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_then_sampling_returns_exactly(prediction):
    """Where the predicted noise does not depend on x, the two retrace each other's steps."""
    S, fixed = Schedule(prediction_type=prediction), torch.randn(SHAPE).double()

    def predict(x, t, level):
        if prediction == "epsilon":
            return fixed
        a = level(t)  # the v whose ε̂ is `fixed` at that x
        return (fixed - (1 - a) ** 0.5 * x) / a**0.5

    n = 50
    up = lambda t: S.before(t - S.num_train_timesteps // n)
    noise = sampler.ddim_inversion(S, lambda x, t: predict(x, t, up), start(), n)
    down = lambda t: S.alpha_bar[t].item()
    again = sampler.ddim(S, lambda x, t: predict(x, t, down), noise, n)
    assert relative(again, start()) <= 1e-10
    assert relative(noise, start()) > 0.5


def a_clip():
    from tiny import world

    scenes = world.sample_scenes(1, torch.Generator().manual_seed(0), ("moving left",))
    return world.render(scenes)


def test_inversion_then_sampling_on_the_tiny_model(tiny):
    """Without guidance the tiny model's reconstruction of a clip stays near it."""
    latents = tiny.encode(a_clip())
    noise = sampler.invert(tiny, latents, 50)
    back = sampler.sample(tiny, [""], noise, [0], 50, guidance=1.0)
    psnr = 10 * math.log10(4 / (tiny.decode(latents) - back).square().mean().item())
    print(f"inversion and back on the tiny model: {psnr:.1f} dB")
    assert psnr > 20


def test_from_an_inverted_start_only_ddpm_tells_seeds_apart(tiny):
    """VMC's pipeline samples by DDPM: one start, and another video a seed."""
    noise = sampler.invert(tiny, tiny.encode(a_clip()), 7).expand(2, -1, -1, -1, -1)
    for method, apart in (("ddim", False), ("dpm", False), ("ddpm", True)):
        first, second = sampler.sample(tiny, ["", ""], noise, [1, 2], 7, 1.0, method)
        assert (relative(first, second) > 0.01) == apart, method


def test_sampling_tells_of_its_steps_and_shows_a_bar_where_asked(tiny, bars, capsys):
    x, seen = torch.randn(1, 8, 4, 8, 8), []
    sampler.sample(tiny, ["a red ball"], x, [0], 3, on_step=lambda t, x0: seen.append(t))
    assert seen == tiny.schedule.timesteps(3) and not bars
    sampler.sample(tiny, ["a red ball"], x, [0], 3, progress="making a ball")
    assert bars == {"making a ball": 3} and not capsys.readouterr().err  # it was quick


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_whole_number_for_t_is_the_same_as_a_tensor(prediction):
    S, x0, noise = Schedule(prediction_type=prediction), start().float(), torch.randn(SHAPE)
    many, x = torch.tensor([901, 901]), S.add_noise(x0, noise, 901)
    assert isinstance(S.at(901, x0), float) and torch.equal(S.add_noise(x0, noise, many), x)
    assert torch.equal(S.target(x0, noise, 901), S.target(x0, noise, many))
    for one, other in zip(S.split(noise, x, S.at(901, x)), S.split(noise, x, S.at(many, x))):
        assert torch.equal(one, other)


def test_guidance_is_the_papers_and_one_batch():
    calls = []

    def unet(x, t, text):
        calls.append((len(x), len(text)))
        x = x.repeat(len(text) // len(x), 1, 1, 1, 1)  # as the UNet does
        return x * text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)

    x, text, empty = start(), torch.full((2, 3, 4), 2.0).double(), torch.ones(2, 3, 4).double()
    got = sampler.guide(unet, text, empty, 5.0)(x, 0)
    assert torch.allclose(got, x + 5 * (2 * x - x)) and calls == [(2, 4)]


def test_a_samples_noise_does_not_depend_on_its_batch():
    whole = sampler.noise_like_shape((4, 3), [7, 8, 9, 10])
    assert torch.equal(whole[2:3], sampler.noise_like_shape((4, 3), [9]))
    assert not torch.equal(whole[0], whole[1])


def test_coarse_timesteps_have_the_papers_density():
    """α = 0.5: relative density 0.5 at t = 0 and 1.5 at 999, mean 600.9, P(t ≥ 500) 0.659."""
    w = sampler.timestep_weights(1000, 0.5)
    t = torch.arange(1000).double()
    assert w.sum().item() == pytest.approx(1)
    assert 1000 * w[0].item() == pytest.approx(0.5, abs=1e-3)
    assert 1000 * w[999].item() == pytest.approx(1.5, abs=1e-3)
    assert (w * t).sum().item() == pytest.approx(600.9, abs=0.3)
    assert w[500:].sum().item() == pytest.approx(0.659, abs=1e-3)
    drawn = sampler.draw_timesteps(w, 200_000, torch.Generator().manual_seed(0)).double()
    assert drawn.mean().item() == pytest.approx(600.9, abs=2.5)
    drawn = sampler.draw_timesteps(sampler.timestep_weights(1000, 0), 200_000,
                                   torch.Generator().manual_seed(0)).double()
    assert drawn.mean().item() == pytest.approx(499.5, abs=2.5)


def test_the_noise_of_the_steps_is_not_the_starts():
    start = sampler.noise_like_shape((4, 3), [5])
    step = sampler.noise_like_shape((4, 3), sampler.step_generators([5]))
    assert not torch.equal(start, step) and not torch.equal(
        sampler.noise_like_shape((4, 3), [5 + 2**32]), start)


def test_blend_keeps_the_variance():
    a, b = torch.randn(100_000), torch.randn(100_000)
    assert sampler.blend_noise(a, b, 0.3).std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(sampler.blend_noise(a, b, 1.0), a)


@pytest.mark.parametrize("steps", (0, 1000, -3))
def test_steps_that_the_schedule_has_not_are_refused(steps, capsys):
    with pytest.raises(BadInput, match=f"--steps {steps}"):
        sampler.check_steps(Schedule(), steps)
    sampler.check_steps(Schedule(), 50)
    assert capsys.readouterr().err == ""
    sampler.check_steps(Schedule(), 600)  # 600 steps, one timestep apart
    assert "not in pure noise" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"prediction_type": "sample"},
                                    {"clip_sample": True}, {"timestep_spacing": "odd"}])
def test_an_unknown_schedule_is_refused(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        Schedule(**change)


def test_what_a_file_lacks_is_as_diffusers_has_it(tmp_path):
    """And not as ZeroScope has it; there a missing clip_sample means clipping, which we lack."""
    path, theirs = tmp_path / "scheduler_config.json", diffusers.DDIMScheduler(clip_sample=False)
    path.write_text('{"clip_sample": false}')
    S = Schedule.read(path)
    assert relative(S.alpha_bar, theirs.alphas_cumprod.double()) < 1e-5
    assert S.before(-1) == theirs.final_alpha_cumprod == 1 and S.steps_offset == 0
    path.write_text("{}")
    with pytest.raises(BadInput, match="clip_sample is True"):
        Schedule.read(path)


def test_the_tiny_models_schedule_is_read():
    S = Schedule.read(TINY / "scheduler" / "scheduler_config.json")
    assert S.prediction_type == "v_prediction" and S.num_train_timesteps == 700
    # Cut from the linear schedule of 1000, whose first 700 levels it keeps.
    whole = Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert torch.allclose(S.alpha_bar, whole.alpha_bar[:700], rtol=1e-3)


def test_samples_that_are_no_numbers_are_refused():
    class Model:
        schedule, device = Schedule(), "cpu"
        read = staticmethod(lambda prompts: torch.zeros(len(prompts), 1, 1))
        predict = staticmethod(lambda x, t, text: x.new_full((len(text), *x.shape[1:]), math.nan))

    with pytest.raises(BadInput, match="guidance 3 gave NaN"):
        sampler.sample(Model(), ["a"], torch.zeros(1, 1, 1, 2, 2), [0], 2, 3.0)
