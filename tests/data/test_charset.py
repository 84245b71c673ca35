"""The packaged tokenizer and model configuration, in the hub's formats."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rcpo.data
from rcpo.data.charset import CHARACTERS, SPECIAL_TOKENS, write_tokenizer

TINY = Path(rcpo.data.__file__).parents[1] / "assets" / "tiny"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)


def test_the_packaged_files_are_what_the_builder_writes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_ids_by_hand() -> None:
    # specials 0–3, newline 4, then ASCII from the space: id = code − 32 + 5
    assert TOKENIZER("1+2=")["input_ids"] == [1, ord("1") - 27, ord("+") - 27, ord("2") - 27, ord("=") - 27]
    assert TOKENIZER("é\n", add_special_tokens=False)["input_ids"] == [3, 4]
    special = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id)
    assert special == (0, 1, 2, 3)


@settings(deadline=None)
@given(text=st.text(alphabet=CHARACTERS, min_size=1))
def test_decoding_gives_the_exact_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_the_model_fits_the_tokenizer() -> None:
    config = AutoConfig.from_pretrained(TINY)
    assert config.vocab_size == len(TOKENIZER) == len(CHARACTERS) + len(SPECIAL_TOKENS)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    # embeddings and head 2·100·128; a layer: attention 4·128², mlp 3·128·352, norms 2·128; a last norm 128
    layer = 4 * 128**2 + 3 * 128 * 352 + 2 * 128
    assert AutoModelForCausalLM.from_config(config).num_parameters() == 2 * 100 * 128 + 3 * layer + 128
