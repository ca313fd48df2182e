"""
GPT-2, in nanoGPT's shape and with its parameter names, so that checkpoints of either load in the other.

The one addition is `alpha`, zeros of shape (B, K) that ride along to every layer with weights. The forward pass never
uses their values; their gradient is the dot product of every sample's gradient with each of the K directions that the
layers hold (data_value.py).
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from data_value import Embedding, LayerNorm, Linear, LossHead
from support.configurator import UserError, check
from support.files import is_hub_id

# The settings of transformers' configuration that change what its GPT-2 computes, and what this file computes. (Not
# here: reorder_and_upcast_attn, which has another rounding, and the shape and dropout, which GPTConfig has.)
HUGGING_FACE = dict(
    model_type=("gpt2",),
    architectures=(["GPT2LMHeadModel"],),
    activation_function=("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    layer_norm_epsilon=(1e-5,),
    tie_word_embeddings=(True,),
    scale_attn_weights=(True,),
    scale_attn_by_inverse_layer_idx=(False,),
    add_cross_attention=(False,),
    quantization_config=(),
    auto_map=(),  # code of its own
)
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older code, beside the weights


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, alpha=None):
        B, T, C = x.size()
        parts = self.c_attn(x, alpha).split(C, dim=2)  # and then (B, n_head, T, C / n_head)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y, alpha))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # what GPT-2 was trained with; nanoGPT's is the exact one
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, alpha=None):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x, alpha)), alpha))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, alpha=None):
        x = x + self.attn(self.ln_1(x, alpha), alpha)
        x = x + self.mlp(self.ln_2(x, alpha), alpha)
        return x


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, for efficiency
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in the linears and the layer norms, as in GPT-2


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=Embedding(config.vocab_size, config.n_embd),
                wpe=Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = LossHead(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two residual additions a layer: keep the sum's variance (GPT-2, 2.3)
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, alpha=None):
        """
        idx, targets: (B, T) int64 token ids, T <= block_size; alpha: (B, K) zeros that require a gradient, or None.
        Returns (logits (B, T, vocab_size), None) without targets, and (None, loss), the mean token loss in nats, with
        them: the logits of a whole batch are then never in memory (data_value.LossHead).
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size = {self.config.block_size}")
        pos = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx, alpha) + self.transformer.wpe(pos, alpha))
        for block in self.transformer.h:
            x = block(x, alpha)
        x = self.transformer.ln_f(x, alpha)
        if targets is None:
            return self.lm_head(x), None
        return None, self.lm_head(x, targets, alpha)

    @classmethod
    def from_checkpoint(cls, checkpoint, path, dropout=0.0):
        """The GPT of a ckpt.pt, nanoGPT's or ours, as a dict. Raises UserError, naming `path`, for another model."""
        try:
            config = GPTConfig(**checkpoint["model_args"] | {"dropout": dropout})
        except TypeError as error:
            raise UserError(f"{path}: a model with other settings than nanoGPT's ({error}); give another") from error
        model = cls(config)
        model.load_weights(checkpoint["model"], path)
        return model

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """
        GPT-2 with the weights of `name`: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', another of the hub, or a local
        folder in transformers' format. Raises UserError where transformers is not installed, the weights cannot be had,
        or the model is not GPT-2 as this file computes it.
        """
        flag = f"--init_from={name}"
        what = f"{flag}: no such folder; give a folder, a ckpt.pt or a model of the hub"
        check(os.path.isdir(name) or is_hub_id(name), what)
        try:
            from huggingface_hub import logging
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError(f"{flag} needs transformers: pip install transformers") from None
        logging.set_verbosity_error()  # not a word of its retries
        try:
            found, _ = GPT2Config.get_config_dict(name)
            load = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained('{name}').save_pretrained('new')"
            headless = f'{flag}: a GPT2Model, without its head; python -c "{load}", then --init_from=new'
            check(found.get("architectures") != ["GPT2Model"], headless)
            allowed = HUGGING_FACE | dict(n_inner=(4 * found.get("n_embd", found.get("hidden_size", 768)),))
            for key, values in allowed.items():
                value, ours = found.get(key), " or ".join(map(str, values)) or "none"
                same = value is None or value in values
                check(same, f"{flag}: its configuration has {key} = {value}, this GPT-2 has {ours}; give another model")
            adapter = os.path.exists(os.path.join(name, "adapter_config.json"))
            check(not adapter, f"{flag}: has an adapter, adapter_config.json; merge it into the weights first")
            source, loaded = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        except Exception as error:  # damaged files raise all kinds
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{flag}: transformers could not load it ({what:.200})") from error
        wrong = [key for why in ("missing", "unexpected") for key in loaded[f"{why}_keys"] if not key.endswith(MASKS)]
        # transformers makes up what is missing
        check(not wrong, f"{flag}: weights are missing or unknown: {', '.join(sorted(wrong)):.200}")
        c = source.config
        shape = dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head)
        model = cls(GPTConfig(**shape, n_embd=c.n_embd, dropout=dropout, bias=True))
        # transformers keeps GPT-2's Conv1D layout, (in, out), for these four
        transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        weights = source.state_dict().items()
        model.load_weights({key: t.t() if key.endswith(transposed) else t for key, t in weights}, flag)
        return model

    def load_weights(self, weights, source):
        """Load nanoGPT's {name: tensor}. Raises UserError, naming `source`, where they are not those of a GPT-2."""
        # nanoGPT's torch.compile leaves a prefix in its checkpoints
        weights = {key.removeprefix("_orig_mod."): t for key, t in weights.items() if not key.endswith(MASKS)}
        ours = self.state_dict()
        wrong = sorted(ours.keys() ^ weights.keys())
        wrong = wrong or [key for key in ours if ours[key].shape != weights[key].shape]
        check(not wrong, f"{source}: weights are missing, unknown or of another shape: {', '.join(wrong):.200}")
        tied = torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
        check(tied, f"{source}: its head, lm_head.weight, is not its token embedding, as GPT-2's is")
        self.load_state_dict(weights)

    def crop_block_size(self, block_size):
        """Keep the first `block_size` positions, to train a pretrained model on shorter windows."""
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())

    def configure_optimizers(self, name, weight_decay, learning_rate, betas):
        """
        'adamw' or 'sgd' (without momentum), fused; matrices and embeddings decay, biases and layer norms do not.
        """
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        if name == "sgd":
            return torch.optim.SGD(groups, lr=learning_rate, fused=True)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
