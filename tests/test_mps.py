"""Training and sampling under the limits of Apple's MPS, emulated on the CPU.

The emulated device "mac" stores its numbers in CPU tensors. An operation fails if it
- makes a float64 or complex128 tensor on the device,
- mixes tensors of the device and the CPU, except scalars,
- draws random numbers on the device: gradient checkpointing does not restore MPS's random state,
- copies to the device without waiting: MPS reads the source later, when it may be freed.
Not emulated: missing and wrong kernels, autocast, memory, rounding, speed.
"""
import multiprocessing
import sys

import pytest
import torch
from conftest import flags_of
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import generate
import sampler
import train
from latte.transformer import Latte, LatteConfig
from support import machine

aten = torch.ops.aten


class MacTensor(torch.Tensor):
    """A tensor on "mac". `value` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, value):
        if value.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{value.dtype} on the device")
        new = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, device="mac:0")
        new.value = value
        return new

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    data = property(torch.Tensor.detach, lambda self, other: setattr(self, "value", other.value))

    def tolist(self):
        return self.value.tolist()

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)


class Mac(TorchDispatchMode):
    """While active, "mac" is a device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    """Run an operation on the CPU tensors, under the limits of the module's docstring."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    inside = [t for t in tensors if isinstance(t, MacTensor)]
    copies = op in (aten.copy_.default, aten._to_copy.default, aten.index.Tensor)
    if inside and not copies and any(t.dim() for t in tensors if not isinstance(t, MacTensor)):
        raise RuntimeError(f"{op}: tensors of the device and the CPU")
    if op is aten._fused_sdp_choice.default and inside:
        return 0  # attention as two matrix products
    made_here = isinstance(args[0], MacTensor) if op is aten.copy_.default else bool(inside)
    if kwargs.get("device") is not None:
        made_here = kwargs["device"].type == "mac"
        kwargs = kwargs | {"device": torch.device("cpu")}
    if made_here and torch.Tag.nondeterministic_seeded in op.tags:
        raise RuntimeError(f"{op}: random numbers on the device")
    if made_here and len(inside) < len(tensors) and kwargs.get("non_blocking"):
        raise RuntimeError(f"{op}: a copy that does not wait")
    out = op(*tree_map_only(MacTensor, lambda t: t.value, args),
             **tree_map_only(MacTensor, lambda t: t.value, kwargs))
    if not made_here:
        return out
    out = tree_map_only(torch.Tensor, MacTensor, out)
    return return_and_correct_aliasing(op, args, kwargs, out)


def on_mac(stderr, action, *inputs):
    """Run action(*inputs) in a new process where "mac" is a device. Fails with its messages."""
    process = FORK.Process(target=start, args=(stderr, action, *inputs))
    process.start()
    process.join()
    assert process.exitcode == 0, stderr.read_text()


def start(stderr, action, *inputs):
    sys.stderr = stderr.open("w", buffering=1)
    _setup_privateuseone_for_python_backend("mac")
    torch.mac.get_amp_supported_dtype = list
    with Mac():
        action(*inputs)


# The autograd engine of a process knows the devices of its first backward pass. The server that
# forks the processes has had none.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])


def wrong(kind):
    x = torch.ones(3)
    on_device = x.to("mac")
    if kind == "wait":
        x.to("mac", non_blocking=True)
    elif kind == "random":
        torch.rand(3, device="mac")
    else:
        on_device.double() if kind == "float64" else on_device + x


@pytest.mark.parametrize("message", ["float64", "and the CPU", "random", "wait"])
def test_the_emulated_device_has_the_limits(message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        on_mac(tmp_path / "stderr", wrong, message)


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_a_step(method, hop, tmp_path):
    more = "--steps", 1, "--device", "mac", "--precision", "fp32", "--checkpointing", "on"
    on_mac(tmp_path / "stderr", train.main, flags_of(method, hop, tmp_path / "run", *more))


@pytest.mark.parametrize("flags", [["--sampler", name] for name in sampler.SAMPLERS] + [["--dmt"]])
def test_every_sampler_samples(flags, hop, tmp_path):
    flags = [*flags, *([str(hop)] if flags == ["--dmt"] else ["--init-video", str(hop)])]
    flags += ["--prompt", "a red star", "--steps", "2", "--frames", "4", "--device", "mac",
              "--precision", "fp32", "--out", str(tmp_path / "out")]
    on_mac(tmp_path / "stderr", generate.main, flags)


def predict():
    net = Latte(LatteConfig(num_layers=1, caption_channels=8, attention_head_dim=4)).to("mac")
    text = torch.cat([torch.randn(1, 5, 8), torch.ones(1, 5, 1)], -1)
    x, t, text = (v.to("mac") for v in (torch.randn(1, 4, 2, 8, 8), torch.tensor(5), text))
    net(x, t, text).mean().backward()


def test_latte_predicts(tmp_path):
    on_mac(tmp_path / "stderr", predict)


def test_a_mac_uses_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    assert machine.find_device() == "mps"
    assert machine.default_precision("mps") == "fp32"
