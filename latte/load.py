"""Loading a Latte folder in the hub's layout. model.load comes here for a LattePipeline."""
import torch

import lora
import model
from latte.t5 import PromptEncoder
from latte.transformer import Latte, LatteConfig


class LattePipeline(model.Model):
    """model.Model with a Latte as its network and a T5 as its text encoder."""

    def read(self, prompts):
        """As model.Model.read; T5 is loaded at most once for all prompts."""
        states = super().read(prompts)
        if not self.text.learned:
            self.text.t5 = None
        return states


def load(folder, device="cpu", precision="fp32", keep=None):
    """All parts of a folder, as model.load. T5 is read with the first prompt. Raises BadInput."""
    network = model._load(Latte, LatteConfig, folder / "transformer", "cpu", torch.float32,
                          lambda state, network: state)
    text = PromptEncoder(folder, torch.bfloat16 if precision == "bf16" else torch.float32)
    pipeline = LattePipeline(network, model.load_vae(folder), text, model.load_schedule(folder),
                             precision=precision)
    if keep is not None:  # a lora.Tuned, for the layer sets of the UNet, or ()
        pipeline.store_frozen(lora.Tuned(keep.parts, network) if keep else keep)
    return pipeline.to(device)
