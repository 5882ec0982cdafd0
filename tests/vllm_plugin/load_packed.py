"""What transformers and compressed-tensors make of packed experts; run by an environment that has both.

python load_packed.py CHECKPOINT OUTPUT.safetensors
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    # Some versions unpack at the first call.
    model(torch.tensor([[3, 4]]))
    save_file({name: p.detach() for name, p in model.named_parameters() if ".experts." in name}, sys.argv[2])
