"""From a folder to a model: dropout off, attention as asked for, padding without a new token, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rcpo.config.schema import ModelConfig, RunConfig
from rcpo.engine.load import read_model
from rcpo.errors import ConfigError
from rcpo.models.hub import ModelSource
from rcpo.models.loading import load_config, load_model, load_tokenizer
from rcpo.system import distributed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(tiny_llama(tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_a_model_in_training_mode_equals_itself(folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", attention_dropout=0.5)  # a number that Llama's attention keeps
    modules = tmp_path / "modules"  # modules of GPT-2
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    ).save_pretrained(modules)
    for name in (folder, modules):
        model = load_model(name, ModelConfig()).train()
        assert torch.equal(logits(model), logits(model))


def test_the_dropout_of_a_model_s_text_part_is_off_too(tmp_path: Path) -> None:
    """Gemma 3's settings hold those of its text model, whose attention keeps a copy of the rate."""
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(text_config={**sizes, "attention_dropout": 0.5}, vision_config=vision)
    config.save_pretrained(tmp_path)
    model = load_model(tmp_path, ModelConfig(), init="random").train()
    kept = {part.attention_dropout for part in model.modules() if hasattr(part, "attention_dropout")}
    assert kept == {0.0}
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(folder: Path, name: str) -> None:
    config = ModelConfig(attention=name)
    assert load_config(folder, config)._attn_implementation == name
    assert load_model(folder, config).config._attn_implementation == name
    assert load_model(folder, config, init="random").config._attn_implementation == name


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_dtype_is_that_of_training(folder: Path, name: str, dtype: torch.dtype) -> None:
    model = load_model(folder, ModelConfig(), name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_fresh_weights_come_from_the_seed(folder: Path) -> None:
    config = ModelConfig()
    first = load_model(folder, config, init="random", seed=3)
    torch.rand(7)
    assert torch.equal(logits(load_model(folder, config, init="random", seed=3)), logits(first))
    assert not torch.equal(logits(load_model(folder, config, init="random", seed=4)), logits(first))
    assert not torch.equal(logits(load_model(folder, config)), logits(first))


def test_a_missing_padding_token_adds_no_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    before = AutoTokenizer.from_pretrained(folder)
    assert before.pad_token_id is None
    tokenizer = load_tokenizer(folder, ModelConfig())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == before.eos_token_id
    assert tokenizer.get_vocab() == before.get_vocab()


def test_pickled_weights_are_read_where_they_are_allowed(folder: Path) -> None:
    expected = logits(load_model(folder, ModelConfig()))
    torch.save(load_model(folder, ModelConfig()).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.allow_pickle=true"):
        load_model(folder, ModelConfig())
    allowed = ModelConfig(allow_pickle=True)
    assert torch.equal(logits(load_model(folder, allowed)), expected)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_repository_s_own_code_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_model(folder, ModelConfig()))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(folder / "config.json", model_type="own", auto_map=classes)
    (folder / "own.py").write_text(CODE)
    with pytest.raises(ConfigError, match=r"if you trust it: model\.trust_remote_code=true"):
        load_model(folder, ModelConfig())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusting = ModelConfig(trust_remote_code=True)
    model = load_model(folder, trusting)
    assert type(model).__name__ == "OwnForCausalLM" and torch.equal(logits(model), expected)


Weights = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("tied", "alter", "settings", "said"),
    [
        (False, lambda w: {f"_orig_mod.{name}": v for name, v in w.items()}, {}, r"begin with '_orig_mod\.'"),
        (True, lambda w: {f"module.{name}": v for name, v in w.items()}, {}, r"begin with 'module\.'"),
        (False, lambda w: lacking(w, ".layers.1."), {}, r"needs model\.layers\.1.* \(9 such weights\)"),
        (False, lambda w: lacking(w, "lm_head"), {}, r"needs lm_head\.weight, which is not there"),
        (True, lambda w: w, {"tie_word_embeddings": False}, r"needs lm_head\.weight"),
        (True, lambda w: lacking(w, "embed_tokens"), {}, r"needs lm_head\.weight"),
        (False, lambda w: w, {"num_hidden_layers": 1}, r"layers\.1.* has no place in LlamaForCausalLM"),
        (False, lambda w: w | {"score.weight": torch.ones(1, 32)}, {}, r"score\.weight has no place"),
        (False, lambda w: w, {"vocab_size": 104}, r"has the shape \[100, 32\] where .* has \[104, 32\]"),
        (
            False,
            lambda w: w,
            {"architectures": None, "model_type": "qwen3"},
            r"Qwen3ForCausalLM needs .*k_norm",
        ),
        (False, lambda w: w, {"architectures": None, "model_type": "gpt_neox"}, r"GPTNeoXForCausalLM needs"),
    ],
)
@pytest.mark.parametrize("stage", [0, 3])
def test_other_weights_than_the_model_s_are_refused(
    tmp_path: Path,
    tied: bool,
    alter: Callable[[Weights], Weights],
    settings: dict[str, object],
    said: str,
    stage: int,
) -> None:
    distributed.initialize()
    folder = Path(tiny_llama(tmp_path / "model", tied=tied))
    save_file(alter(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", **settings)
    config = RunConfig()
    config.engine.stage = stage
    with pytest.raises(ConfigError, match=said) as refused:
        read_model(ModelSource(folder), config)
    assert "\n" not in str(refused.value)


def lacking(weights: Weights, part: str) -> Weights:
    return {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_only_look_different_are_read(tmp_path: Path, tied: bool) -> None:
    folder = Path(tiny_llama(tmp_path / "model", tied=tied))
    expected, whole = logits(load_model(folder, ModelConfig())), load_file(folder / "model.safetensors")
    for alter in (
        lambda w: {
            name.removeprefix("model."): value for name, value in w.items()
        },  # saved from the backbone
        lambda w: (
            w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),  # a buffer of old versions
        lambda w: w | {"lm_head.weight": w.get("lm_head.weight", w["model.embed_tokens.weight"]).clone()},
    ):
        save_file(alter(whole), folder / "model.safetensors", {"format": "pt"})
        assert torch.equal(logits(load_model(folder, ModelConfig())), expected)


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says_of_ties(tmp_path: Path) -> None:
    folder = Path(tiny_llama(tmp_path / "model"))
    expected = logits(load_model(folder, ModelConfig()))
    change(folder / "config.json", tie_word_embeddings=True)
    assert torch.equal(logits(load_model(folder, ModelConfig())), expected)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2}  # fmt: skip
    reward = LlamaForSequenceClassification(
        LlamaConfig.from_pretrained(tiny_llama(tmp_path / "base"), num_labels=1)
    )
    for name, model in (("reward", reward), ("bart", BartForConditionalGeneration(BartConfig(**sizes)))):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=r"are not those that config\.json"):
            load_model(tmp_path / name, ModelConfig())


DROPPING = """
import torch
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens = torch.nn.Sequential(self.model.embed_tokens, torch.nn.Dropout(0.5))
        self.post_init()

    def get_input_embeddings(self):
        found = self.model.embed_tokens
        return found[0] if isinstance(found, torch.nn.Sequential) else found
"""


def test_dropout_that_no_configuration_names_is_off_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    (folder / "own.py").write_text(DROPPING)
    whole = load_file(folder / "model.safetensors")
    renamed = {name.replace("embed_tokens.weight", "embed_tokens.0.weight"): v for name, v in whole.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(folder, ModelConfig(trust_remote_code=True)).train()
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.0]
    assert torch.equal(logits(model), logits(model))


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    change(folder / "config.json", model_type="nobody_knows")
    with pytest.raises(ConfigError, match=r"the model in .* cannot be read"):
        load_config(folder, ModelConfig())
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(folder, ModelConfig())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{}", "tokenizer in .* cannot be read: KeyError: 'added_tokens'"),
        ("tokenizer_config.json", "[]", "tokenizer in .* cannot be read: AttributeError: "),
        (
            "config.json",
            {"hidden_size": "x"},
            "model in .* cannot be read: Validation error for field 'hidden_size'",
        ),
        ("config.json", {"num_attention_heads": 0}, "model in .* cannot be read: ZeroDivisionError"),
    ],
)
def test_damaged_settings_are_refused_whatever_the_libraries_raise(
    folder: Path, name: str, content: str | dict[str, object], reason: str
) -> None:
    if isinstance(content, dict):
        change(folder / name, **content)
    else:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=reason) as refused:
        load_config(folder, ModelConfig())
        load_tokenizer(folder, ModelConfig())
    assert "\n" not in str(refused.value)
