"""Run in an environment with transformers: random models of its own classes, and what those classes compute.

``transformers_worker.py make FOLDER CONFIG-JSON``   a random model, saved as the class saves it
``transformers_worker.py run FOLDER TOKENS-JSON OUT`` log p of every token, and the gradients of their mean, in fp32
"""

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def make(folder: str, config: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    said = json.loads(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # no tensor all ones or zeros, as norms and routers begin
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def run(folder: str, tokens: str, out: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens_T = torch.tensor(json.loads(tokens))
    logp_TV = model(tokens_T[None]).logits[0].log_softmax(-1)
    logp_TV[:-1].gather(1, tokens_T[1:, None]).mean().neg().backward()
    found = {"log_p": logp_TV.detach().contiguous()}
    for name, parameter in model.named_parameters():
        found |= {f"gradient.{n}": g.contiguous() for n, g in apart(name, parameter.grad)}
    save_file(found, out)


def apart(name: str, gradient):
    """A gradient under the names of the model's files, where experts lie one by one."""
    if name.endswith("experts.gate_up_proj"):
        for e, of_one in enumerate(gradient):
            for part, rows in zip(("gate", "up"), of_one.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{e}.{part}_proj.weight"), rows
    elif name.endswith("experts.down_proj"):
        for e, of_one in enumerate(gradient):
            yield name.replace("down_proj", f"{e}.down_proj.weight"), of_one
    else:
        yield name, gradient


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](*sys.argv[2:])
