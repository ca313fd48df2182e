"""GPT-2 against transformers' GPT-2."""

import pytest
import torch

from model import GPT, GPTConfig


@pytest.fixture
def gpt2_folder(tmp_path):
    """A GPT-2 of transformers with random weights, biases included, saved in a local folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=96, eos_token_id=96)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(tmp_path / "gpt2")
    return model, str(tmp_path / "gpt2")


def test_logits_and_loss_equal_those_of_transformers(gpt2_folder):
    theirs, folder = gpt2_folder
    ours = GPT.from_pretrained(folder).eval()
    idx = torch.randint(97, (3, 33))
    with torch.no_grad():
        logits, none = ours(idx[:, :-1])
        expected = theirs(idx[:, :-1]).logits
        loss = ours(idx[:, :-1], idx[:, 1:])[1]
    assert none is None and logits.shape == (3, 32, 97)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    oracle = torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx[:, 1:].flatten())
    torch.testing.assert_close(loss, oracle, atol=1e-5, rtol=0)


def test_shorter_windows_for_a_pretrained_model(gpt2_folder):
    theirs, folder = gpt2_folder
    ours = GPT.from_pretrained(folder).eval()
    ours.crop_block_size(8)
    idx = torch.randint(97, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="block_size = 8"):
        ours(torch.zeros(1, 9, dtype=torch.long))


def test_pretrained_weights_that_are_not_there(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match="--init_from="):
        GPT.from_pretrained(str(tmp_path / "nothing"))


def test_parameter_names_are_those_of_nanogpt():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4, bias=True))
    layer = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    layer += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"]
    layer += ["mlp.c_proj.bias"]
    names = ["transformer.wte.weight", "transformer.wpe.weight"] + [f"transformer.h.0.{name}" for name in layer]
    assert list(model.state_dict()) == names + ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    bare = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4, bias=False))
    assert not [name for name in bare.state_dict() if name.endswith("bias")]


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=8, n_head=2, n_embd=64))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.1)


def test_only_matrices_decay():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95))
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0.0 and all(p.dim() == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
