"""Loading a Latte folder in the hub's layout. model.load comes here for a LattePipeline."""
import torch

import lora
import model
from latte.t5 import PromptEncoder
from latte.transformer import Latte, LatteConfig


class LattePipeline(model.Pipeline):
    """model.Pipeline with a Latte as its network and a T5 as its text encoder."""

    def encode_text(self, prompts):
        """As model.Pipeline.encode_text; T5 is loaded at most once for all prompts."""
        states = super().encode_text(prompts)
        if not self.text_encoder.learned:
            self.text_encoder.t5 = None
        return states


def load(folder, device="cpu", precision="fp32", keep=None):
    """All parts of a folder, as model.load. T5 is read with the first prompt. Raises BadInput."""
    network = model._load(Latte, LatteConfig, folder / "transformer", "cpu", torch.float32,
                          lambda state, network: state)
    text = PromptEncoder(folder, torch.float32 if precision == "fp32" else torch.bfloat16)
    pipeline = LattePipeline(network, model.load_vae(folder), text, model.load_schedule(folder),
                             precision=precision)
    if keep is not None:  # a FinetunedNames, for the layer sets of the UNet, or ()
        pipeline.store_frozen(lora.FinetunedNames(keep.parts, network) if keep else keep)
    return pipeline.to(device)
