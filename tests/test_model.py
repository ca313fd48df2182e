"""GPT-2 against transformers' GPT-2."""

import json
import os
import subprocess
import sys

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


def edit(folder, **settings):
    """Change the settings of a folder's configuration."""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump(config | settings, file)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("model_type", "llama"),
        ("architectures", ["GPT2ForSequenceClassification"]),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_inner", 100),
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModelForCausalLM": "mine.Model"}),
    ],
)
def test_a_setting_that_changes_what_is_computed_is_refused_by_name(gpt2_folder, setting, value):
    _, folder = gpt2_folder
    edit(folder, **{setting: value})
    with pytest.raises(SystemExit) as error:
        GPT.from_pretrained(folder)
    assert f"--init_from={folder}: its configuration has {setting} = {value}, this GPT-2 has" in str(error.value)


@pytest.mark.parametrize(
    "setting, value",
    [("activation_function", "gelu_pytorch_tanh"), ("n_inner", 192), ("reorder_and_upcast_attn", True)],
)
def test_a_setting_that_changes_nothing_is_accepted(gpt2_folder, setting, value):
    theirs, folder = gpt2_folder
    edit(folder, **{setting: value})
    transformers = pytest.importorskip("transformers")
    again = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    idx = torch.randint(97, (2, 32))
    with torch.no_grad():
        logits, _ = GPT.from_pretrained(folder).eval()(idx)
        torch.testing.assert_close(logits, again(idx).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-5, rtol=0)


def test_a_llama_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="its configuration has model_type = llama, this GPT-2 has gpt2"):
        GPT.from_pretrained(str(tmp_path))


def test_a_model_without_its_head_is_refused_with_the_command_that_gives_it_one(gpt2_folder, tmp_path):
    theirs, folder = gpt2_folder
    theirs.transformer.save_pretrained(folder)
    with pytest.raises(SystemExit, match="a GPT2Model, without its head; python -c .*, then --init_from=new") as error:
        GPT.from_pretrained(folder)
    subprocess.run([sys.executable, "-c", str(error.value).split('"')[1]], check=True, cwd=tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path / "new")).eval(), torch.randint(97, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def test_weights_that_are_missing_unknown_or_of_another_shape_are_named(gpt2_folder):
    _, folder = gpt2_folder
    safetensors = pytest.importorskip("safetensors.torch")
    path = f"{folder}/model.safetensors"
    whole = safetensors.load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    damaged = {
        "missing": {key: value for key, value in whole.items() if key != name},
        "unknown": whole | {"transformer.h.1.crossattention.c_attn.weight": torch.zeros(3)},
        "shape": whole | {name: torch.zeros(48, 100)},
    }
    for how, weights in damaged.items():
        safetensors.save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(SystemExit, match="--init_from=") as error:
            GPT.from_pretrained(folder)
        assert how == "shape" or "h.1." in str(error.value)
        assert "\n" not in str(error.value)
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(3) for name in ("bias", "masked_bias")}
    safetensors.save_file(whole | masks, path, metadata={"format": "pt"})
    assert torch.equal(GPT.from_pretrained(folder).lm_head.weight, whole["transformer.wte.weight"])
    head = torch.zeros_like(whole["transformer.wte.weight"])
    safetensors.save_file(whole | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lm_head.weight"):
        GPT.from_pretrained(folder)


def test_an_adapter_and_a_damaged_folder_are_refused_in_one_line(gpt2_folder):
    _, folder = gpt2_folder
    with open(f"{folder}/adapter_config.json", "w", encoding="utf-8") as file:
        file.write("{}")
    with pytest.raises(SystemExit, match="has an adapter, adapter_config.json"):
        GPT.from_pretrained(folder)
    os.remove(f"{folder}/adapter_config.json")
    os.truncate(f"{folder}/model.safetensors", 100)
    with pytest.raises(SystemExit, match="transformers could not load it") as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_an_untied_head_is_refused():
    config = dict(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=4)
    weights = GPT(GPTConfig(**config)).state_dict()
    checkpoint = dict(model=weights | {"lm_head.weight": torch.zeros(11, 4)}, model_args=config)
    with pytest.raises(SystemExit, match="x.pt: its head, lm_head.weight, is not its token embedding"):
        GPT.from_checkpoint(checkpoint, "x.pt")
    checkpoint["model"] = {key: value for key, value in weights.items() if "ln_2" not in key}
    with pytest.raises(SystemExit, match="x.pt: weights are missing, unknown or of another shape: .*ln_2"):
        GPT.from_checkpoint(checkpoint, "x.pt")


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
