"""
Text from a trained model, drawn token by token: with the tokenizer of its corpus for a run of train.py, else with
GPT-2's.

    python sample.py --out_dir=out/demo_baseline                                 # from the run's last checkpoint
    python sample.py --out_dir=out/demo_baseline --start="def " --num_samples=3 --temperature=0.5
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt --max_new_tokens=100
    python sample.py --help                                                      # the knobs
"""

import os
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model import GPT
from support.configurator import check, configure
from support.corpus import get_tokenizer, load_meta
from support.files import load_torch, reading
from support.processes import autocast, check_device
from support.run_folder import WEIGHTS


@dataclass
class Knobs:
    init_from: str = "resume"  # ckpt.pt in out_dir; or 'gpt2' (-medium, -large, -xl), a transformers folder, a .pt
    out_dir: str = "out"
    start: str = "\n"  # the text to go on from; FILE:prompt.txt reads it from a file; '': the beginning of a document
    num_samples: int = 10
    max_new_tokens: int = 500  # in each sample
    temperature: float = 0.8  # below 1: likelier tokens; 0: always the likeliest
    top_k: int = 200  # draw from the k likeliest tokens
    seed: int = 1337
    device: str = ""  # '': the GPU if there is one, else 'cpu'
    dtype: str = "float32"  # or 'bfloat16', by autocast
    compile: bool = False

    def __post_init__(self):
        for key, low in dict(num_samples=1, max_new_tokens=1, top_k=1, temperature=0, seed=0).items():
            value = getattr(self, key)
            check(low <= value < 2**63, f"--{key}={value}: must be at least {low} and below 2**63")
        check(self.dtype in ("float32", "bfloat16"), f"--dtype={self.dtype}: expected float32 or bfloat16")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(knobs):
    """The model of init_from on its device, in eval mode, and the tokenizer of its corpus."""
    path = os.path.join(knobs.out_dir, "ckpt.pt") if knobs.init_from == "resume" else knobs.init_from
    name = "gpt2"
    if path.endswith(".pt"):
        mend = "--out_dir takes the folder of a run of train.py, --init_from a ckpt.pt"
        checkpoint = load_torch(path, WEIGHTS, mend)
        model = GPT.from_checkpoint(checkpoint, path)
        run = checkpoint.get("knobs")  # nanoGPT's have none
        if "tokenizer" in checkpoint:
            name = checkpoint["tokenizer"]
        elif run:  # those of earlier code do not name it
            name = load_meta(os.path.join(run["data_dir"], run["dataset"]))["tokenizer"]
    else:
        model = GPT.from_pretrained(path)
    tokenizer = get_tokenizer(name)
    size = model.config.vocab_size
    what = f"its vocabulary of {size} is not that of the tokenizer '{name}', {tokenizer.n_vocab}"
    check(size >= tokenizer.n_vocab, f"{path}: {what}; give a model with GPT-2's tokens or train.py's bytes")
    model.to(knobs.device).eval()
    if knobs.compile:
        model.compile(dynamic=True)
    return model, tokenizer


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature, top_k, vocab_size):
    """
    The token ids idx, (B, T), followed by max_new_tokens drawn ones, each from the top_k likeliest after the last
    block_size tokens; at temperature 0 the likeliest. Ids from vocab_size on are padding of the embedding.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1, :vocab_size]  # (B, V)
        likeliest, ids = logits.float().topk(min(top_k, vocab_size) if temperature else 1)
        probabilities = F.softmax(likeliest / (temperature or 1), dim=-1)
        idx = torch.cat((idx, ids.gather(1, torch.multinomial(probabilities, 1))), dim=1)
    return idx


def main():
    knobs = configure(Knobs, sys.argv[1:])
    start = knobs.start
    if start.startswith("FILE:"):
        path = start.removeprefix("FILE:")
        with reading(path, "give another --start"), open(path, encoding="utf-8") as file:
            start = file.read()
    check_device(knobs.device)
    model, tokenizer = load(knobs)
    ids = tokenizer.encode(start, allowed_special={"<|endoftext|>"}) or [tokenizer.eot_token]
    idx = torch.tensor([ids], device=knobs.device)
    torch.manual_seed(knobs.seed)
    with autocast(knobs):
        for _ in range(knobs.num_samples):
            drawn = generate(model, idx, knobs.max_new_tokens, knobs.temperature, knobs.top_k, tokenizer.n_vocab)
            print(tokenizer.decode(drawn[0].tolist()))
            print("---------------")


if __name__ == "__main__":
    main()
