"""The noise schedule, the forward process, the samplers and DDIM inversion.

    python -c "import sampler; print(sampler.NoiseSchedule().timesteps(50))"

A sampler starts from noise and calls `predict(x, t)`, the network's raw prediction, at each
timestep. `NoiseSchedule.to_x0_eps` converts that prediction, ε or v, to clean latents and noise.
All samplers share the signature (schedule, predict, x, steps, seeds, on_step), plus options of
their own.

Symbols: ᾱ alpha_bar, the signal power at a timestep; x latents (B, C, F, h, w); t in 0..T-1.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from tqdm import tqdm

from support import adapters, files
from support.files import BadInput, log, number, one_of, print_line, read_fields, read_json, reading

# Defaults of diffusers' DDIMScheduler, for fields missing in a file.
DIFFUSERS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0,
             "set_alpha_to_one": True, "clip_sample": True}


@dataclass
class NoiseSchedule:
    """The noise schedule, by default ZeroScope's, with alpha_bar (T,) in fp64. Raises BadInput."""

    num_train_timesteps: int = number(2, 100_000, 1000)
    beta_start: float = number(1e-9, 0.999, 0.00085)
    beta_end: float = number(1e-9, 0.999, 0.012)
    beta_schedule: str = one_of("scaled_linear", "linear")
    prediction_type: str = one_of("epsilon", "v_prediction")
    timestep_spacing: str = one_of("leading", "trailing", "linspace")
    steps_offset: int = number(0, 1000, 1)
    set_alpha_to_one: bool = one_of(False, True)
    clip_sample: bool = one_of(False)
    thresholding: bool = one_of(False)
    trained_betas: list[float] | None = one_of(None)
    rescale_betas_zero_snr: bool = one_of(False)
    # If the file gives no spacing, DPM-Solver's default is another one.
    dpm_spacing: str = one_of("", "leading", "trailing", "linspace")
    alpha_bar: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path):
        """Read a scheduler_config.json. Raises BadInput."""
        values = read_json(path)
        spacing = values.get("timestep_spacing", "linspace")
        values = DIFFUSERS | values | {"dpm_spacing": spacing}
        values.pop("alpha_bar", None)
        return read_fields(cls, values, path)

    def __post_init__(self):
        if wrong := files.field_errors(NoiseSchedule, vars(self)):
            raise BadInput(f"scheduler: {'; '.join(wrong)}")
        self.dpm_spacing = self.dpm_spacing or self.timestep_spacing
        if self.alpha_bar is None:
            power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
            ends = self.beta_start**power, self.beta_end**power
            roots = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64)
            self.alpha_bar = torch.cumprod(1 - roots ** (1 / power), dim=0)

    def alpha_bar_at(self, t, like):
        """ᾱ_t: a number for an int t; for t (B,) an fp64 CPU tensor that broadcasts with `like`."""
        if isinstance(t, int):
            return self.alpha_bar[t].item()
        a = self.alpha_bar[torch.as_tensor(t, device="cpu").long()]
        return a.reshape(-1, *[1] * (like.dim() - 1))

    def alpha_bar_prev(self, t):
        """ᾱ at t, the timestep that a sampling step leads to, which may be negative."""
        if t >= 0:
            return self.alpha_bar[t].item()
        return 1.0 if self.set_alpha_to_one else self.alpha_bar[0].item()

    def add_noise(self, x0, noise, t):
        """The forward process x_t = √ᾱ·x0 + √(1−ᾱ)·ε (Ho et al. 2020, Eq. 4; VMC Eq. 1;
        MotionDirector Eq. 2); t: int or (B,)."""
        signal, sigma = sqrt_alphas(self.alpha_bar_at(t, x0), x0)
        return signal * x0 + sigma * noise

    def target(self, x0, noise, t):
        """The training target: ε, or v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022, App. D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = sqrt_alphas(self.alpha_bar_at(t, x0), x0)
        return signal * noise - sigma * x0

    def to_x0_eps(self, prediction, x, a):
        """(x̂0, ε̂) from the network's prediction at x with ᾱ = a, from `alpha_bar_at`. For ε, x̂0
        is Tweedie's formula (Ho et al. 2020, Eq. 15; Song et al. 2021, Eq. 9; VMC Eqs. 6, 12); for
        v, see Salimans & Ho 2022, App. D."""
        signal, sigma = sqrt_alphas(a, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / signal, prediction
        return signal * x - sigma * prediction, signal * prediction + sigma * x

    def timesteps(self, steps):
        """The descending timesteps of a sampler; leading: 981, 961, …, 1 for 50 steps. NumPy rounds
        as in diffusers. Raises ValueError unless 1 ≤ steps ≤ T."""
        T = self.num_train_timesteps
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps; choose 1 to {T}")
        if self.timestep_spacing == "leading":
            t = torch.arange(steps) * (T // steps) + self.steps_offset
            return t.flip(0).clamp(max=T - 1).tolist()
        if self.timestep_spacing == "trailing":
            return (np.arange(T, 0, -T / steps).round() - 1).astype(int).tolist()
        return np.linspace(0, T - 1, steps).round()[::-1].astype(int).tolist()


def sqrt_alphas(a, like):
    """√ᾱ and √(1−ᾱ): numbers for a number, else tensors with the dtype and device of `like`."""
    if isinstance(a, float):  # avoids a host-to-device sync
        return a**0.5, (1 - a) ** 0.5
    return a.sqrt().to(like), (1 - a).sqrt().to(like)


def check_steps(schedule, steps, name="--steps"):
    """Raises BadInput unless 1 ≤ steps < T. Warns if the first timestep is far from pure noise."""
    T = schedule.num_train_timesteps
    if not 1 <= steps < T:
        raise BadInput(f"{name} {steps}: expected 1 to {T - 1}.")
    if (first := schedule.timesteps(steps)[0]) < 0.9 * T:
        log(f"warning: {name} {steps} starts at t = {first} instead of pure noise, since timesteps "
            f"are {T // steps} apart; choose a divisor of {T}")


def check_return(schedule, method, steps):
    """Raises BadInput for a sampler that does not reconstruct an inverted clip."""
    if method == "dpm" and dpm_timesteps(schedule, steps) != schedule.timesteps(steps):
        raise BadInput("sampler dpm and the inversion have different timesteps, so the clip would "
                       "not be reconstructed; choose ddim, or a noise prior of 0.")


# --- Randomness and timestep distributions ------------------------------------------------------


def generator(*key):
    """A CPU generator for a key of ints ≥ 0. Distinct keys give independent streams."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def seeded_randn(shape, seeds):
    """Standard normal (len(seeds), *shape) in fp32 on the CPU. Row i depends on seeds[i] alone, so
    a sample does not depend on its batch. Seeds are ints or Generators."""
    rows = []
    for seed in seeds:
        g = seed if isinstance(seed, torch.Generator) else generator(seed)
        rows.append(torch.randn(shape, generator=g))
    return torch.stack(rows)


def timestep_weights(T, alpha=0.5):
    """Probabilities (T,) of the training timesteps, f(t) = (1 − α·cos(πt/T))/T (NewMove Sec. 3.2).
    They favor high noise, which determines the motion: by 3 to 1 for α = 0.5. α = 0 is uniform."""
    t = torch.arange(T, dtype=torch.float64)
    weights = 1 - alpha * torch.cos(torch.pi * t / T)
    return weights / weights.sum()


# --- Guidance and samplers ----------------------------------------------------------------------


def classifier_free_guidance(network, text, empty=None, scale=1.0):
    """predict(x, t) from network(x, t, text) with classifier-free guidance: u + g·(c − u) (Ho &
    Salimans 2022, Eq. 6), in one batch. text, empty: (B, N, D). With scale 1, or without `empty`,
    only the conditional half is computed."""
    if empty is None or scale == 1.0:
        return lambda x, t: network(x, t, text)
    both = torch.cat([empty, text])

    def predict(x, t):
        uncond, cond = network(x, t, both).chunk(2)
        return uncond + scale * (cond - uncond)

    return predict


def ddim(schedule, predict, x, steps, seeds=None, on_step=None, eta=0.0, skip=0, edit=None):
    """DDIM (Song et al. 2021, Eqs. 12, 16; VMC Eq. 5). eta > 0 adds noise from `seeds`, one per
    sample. The first `skip` steps are omitted, with x at the noise level of the next one.
    edit(x, t) may change the latents before a step."""
    S, generators = schedule, step_generators(seeds) if eta > 0 else None
    for t in S.timesteps(steps)[skip:]:
        x = edit(x, t) if edit else x
        a, b = S.alpha_bar[t].item(), S.alpha_bar_prev(t - S.num_train_timesteps // steps)
        x0, eps = S.to_x0_eps(predict(x, t), x, a)
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        x = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * seeded_randn(x.shape[1:], generators).to(x)
        if on_step:
            on_step(t, x0)
    return x


def ddpm(schedule, predict, x, steps, seeds=None, on_step=None):
    """Ancestral sampling (Ho et al. 2020, Eqs. 6, 7, 11; VMC Eq. 4), with the smaller of its two
    variances."""
    S, generators = schedule, step_generators(seeds)
    for t in S.timesteps(steps):
        a, s = S.alpha_bar[t].item(), t - S.num_train_timesteps // steps
        b = S.alpha_bar[s].item() if s >= 0 else 1.0
        alpha = a / b  # of this step
        x0, _ = S.to_x0_eps(predict(x, t), x, a)
        mean = (b**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - b) * x) / (1 - a)
        variance = (1 - b) / (1 - a) * (1 - alpha)
        x = mean + variance**0.5 * seeded_randn(x.shape[1:], generators).to(x)
        if on_step:
            on_step(t, x0)
    return x


def dpm_timesteps(schedule, steps):
    """The descending timesteps of DPM-Solver. 'leading' and 'linspace' divide into steps + 1
    intervals and drop the last. Raises ValueError unless 1 ≤ steps < T."""
    S, T = schedule, schedule.num_train_timesteps
    if not 1 <= steps < T:
        raise ValueError(f"{steps} sampling steps; choose 1 to {T - 1}")
    if S.dpm_spacing == "trailing":
        return (np.arange(T, 0, -T / steps).round() - 1).astype(int).tolist()
    if S.dpm_spacing == "linspace":
        t = np.linspace(0, T - 1, steps + 1).round().astype(int)
    else:
        t = np.arange(steps + 1) * (T // (steps + 1)) + S.steps_offset
    return t[:0:-1].tolist()


def dpm_solver(schedule, predict, x, steps, seeds=None, on_step=None):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2). The first and last step are first order."""
    S, old, h_old = schedule, None, None
    times = dpm_timesteps(S, steps)
    levels = [S.alpha_bar[t].item() for t in times] + [1.0]
    for i, t in enumerate(times):
        a, b = levels[i], levels[i + 1]
        x0, _ = S.to_x0_eps(predict(x, t), x, a)
        if i == steps - 1:  # λ is infinite at the end, where the first-order step returns x̂0
            x = x0
        else:
            log_snr = lambda level: 0.5 * math.log(level / (1 - level))
            h = log_snr(b) - log_snr(a)  # the step in λ = log(√ᾱ/√(1−ᾱ))
            D = x0 if old is None else x0 + 0.5 * (h / h_old) * (x0 - old)
            x = ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * math.expm1(-h) * D
            old, h_old = x0, h
        if on_step:
            on_step(t, x0)
    return x


def ddim_inversion(schedule, predict, x, steps, seeds=None, on_step=None):
    """Noise that `ddim` with the same number of steps maps back to x (Song et al. 2021, Eq. 13 and
    Sec. 4.3). Each step leads from t − T/steps up to t, with the prediction at t."""
    S = schedule
    for t in reversed(S.timesteps(steps)):
        a, b = S.alpha_bar_prev(t - S.num_train_timesteps // steps), S.alpha_bar[t].item()
        x0, eps = S.to_x0_eps(predict(x, t), x, a)
        x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        if on_step:
            on_step(t, x)
    return x


def blend_noise(inverted, noise, p):
    """√p·inverted + √(1−p)·noise: p = 1 is VMC's start, 0.5 that of MotionDirector's
    code for one clip, 0 pure noise."""
    return p**0.5 * inverted + (1 - p) ** 0.5 * noise


def step_generators(seeds):
    """One generator per sample, independent of the one for its starting noise."""
    if seeds is None:
        raise ValueError("this sampler adds noise at every step; give it one seed per sample")
    return [generator(seed, 1) for seed in seeds]


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm": dpm_solver}


# --- Sampling with a pipeline (model.Pipeline) --------------------------------------------------


@torch.no_grad()
def invert(pipe, latents, steps, prompt="", on_step=None, progress=None):
    """DDIM inversion of clean latents (B, C, F, h, w) (VMC Sec. 3.3), without guidance and, as in
    the published code, with an empty prompt."""
    text = pipe.encode_text([prompt]).expand(len(latents), -1, -1)
    predict = classifier_free_guidance(pipe.predict, text)
    with progress_bar(progress, steps, on_step) as step:
        return ddim_inversion(pipe.schedule, predict, latents.to(pipe.device), steps, on_step=step)


@torch.no_grad()
def sample(pipe, prompts, start, seeds, steps=50, guidance=9.0, method="ddim", negative="",
           on_step=None, progress=None, **options):
    """B prompts and starting latents (B, C, F, h, w) -> videos (B, 3, F, H, W) on the CPU.

    seeds: one per video, for noise added during sampling. options: those of one sampler. progress:
    the title of a progress bar. Raises BadInput for latents or videos with NaN.
    """
    text = pipe.encode_text(prompts)
    empty = pipe.encode_text([negative]).expand(len(prompts), -1, -1)
    predict = classifier_free_guidance(pipe.predict, text, empty, guidance)
    count = steps - options.get("skip", 0)
    with progress_bar(progress, count, on_step) as step:
        latents = SAMPLERS[method](pipe.schedule, predict, start.to(pipe.device), steps, seeds,
                                   step, **options)
    if not torch.isfinite(latents).all():
        raise BadInput(f"sampling with guidance {guidance:g} gave NaN; lower --guidance, or use "
                       "--precision fp32.")
    videos = pipe.decode(latents)
    if not torch.isfinite(videos).all():
        raise BadInput("the VAE gave NaN; give --weights with another vae/, or use "
                       "--precision fp32.")
    return videos


@contextmanager
def progress_bar(title, count, on_step=None):
    """on_step, wrapped to advance a progress bar of `count` steps if there is a title."""
    if title is None:
        yield on_step
        return
    with tqdm(total=count, desc=title, delay=2, leave=False) as bar:
        def step(t, x):
            bar.update()
            if on_step:
                on_step(t, x)

        yield step


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, stored in an adapter's metadata. See blend_noise for noise_prior."""

    sampler: str = one_of(*SAMPLERS)
    sampling_steps: int = number(1, 10**4, 50)
    guidance: float = number(0, 1000, 9.0)
    noise_prior: float = number(0, 1, 0.0)
    inversion_model: str = one_of("tuned", "base")
    inversion_steps: int = number(0, 10**4, 0)  # 0: as many as sampling steps
    fps: float = number(0.01, 1000, 8.0)


def read_sampling(path, meta):
    """The Sampling in an adapter's metadata. Raises BadInput."""
    with reading(path, "train it again"):
        values = {f.name: f.type(meta[f.name]) for f in fields(Sampling) if f.name in meta}
        return read_fields(Sampling, values, path)


@torch.no_grad()
def sample_videos(pipe, loaded, scales, jobs, s, shape, clip=None, negative="", batch=1,
                  progress="sampling"):
    """Merge adapters into a base model, invert the clip if needed, and sample. Yields (job, video
    (3, F, H, W) in [-1, 1] on the CPU) per job, a (prompt, seed), in order.

    loaded, scales: the adapters, each with its scale; s: a Sampling; shape: (C, F, h, w) of the
    latents; clip: clean latents (1, C, F, h, w), required where s.noise_prior > 0. Raises BadInput.
    """
    pipe.encode_text(["", negative, *[prompt for prompt, _ in jobs]])  # once, as in train.py
    steps = s.inversion_steps or s.sampling_steps
    invert_clip = lambda: invert(pipe, clip, steps, progress=progress and "inverting")
    inverted = invert_clip() if s.noise_prior and s.inversion_model == "base" else None
    for path, count, change in adapters.apply_adapters(pipe, loaded, scales):
        print_line(f"{path}: {count} layers changed, ‖ΔW‖/‖W‖ = {change:.3g}")
    pipe.store_frozen({name for adapter in loaded for name in adapter.tensors})
    if s.noise_prior and inverted is None:
        inverted = invert_clip()
    first_jobs = range(0, len(jobs), batch)
    with progress_bar(progress, len(first_jobs) * s.sampling_steps) as on_step:
        for i in first_jobs:
            prompts, seeds = zip(*jobs[i : i + batch])
            start = seeded_randn(shape, seeds)
            if inverted is not None:
                start = blend_noise(inverted, start.to(inverted), s.noise_prior)
            yield from zip(jobs[i : i + batch], sample(
                pipe, prompts, start, seeds, s.sampling_steps, s.guidance, s.sampler, negative,
                on_step))
