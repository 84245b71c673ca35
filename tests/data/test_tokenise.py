"""Text to tokens with three kinds of tokenizers: characters, byte-level BPE, SentencePiece-like BPE."""

from pathlib import Path

import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rcpo.data
from rcpo.data.limits import Limits
from rcpo.data.records import Example, TextPair
from rcpo.data.report import Tally
from rcpo.data.tokenise import PairTokeniser
from rcpo.errors import ConfigError

CORPUS = ["Human: what is the sum?\n\nAssistant: the sum is 46", "hello   world, it is what it is"] * 20
CHARACTERS = AutoTokenizer.from_pretrained(Path(rcpo.data.__file__).parents[1] / "assets" / "tiny")


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-NeoX-like: no BOS, merges across words' leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama-2-like: a BOS, a space put before every text, bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = byte_level()
PIECES = sentencepiece_like()


def encode(
    tokenizer: PreTrainedTokenizerFast,
    *pairs: TextPair,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: str = "keep_end",
    tally: Tally | None = None,
) -> list[Example]:
    tokeniser = PairTokeniser(tokenizer, Limits(max_length, max_prompt_length, truncation))
    own = tally or Tally()
    examples = list(tokeniser.encode(pairs, own))
    assert tally is not None or not own.bad
    return examples


def test_characters_by_hand() -> None:
    [example] = encode(CHARACTERS, TextPair("n", "1+1=", "2", " 3"))
    one, plus, equals, two, space, three = (ord(character) - 27 for character in "1+=2 3")
    assert example == Example("n", [1, one, plus, one, equals], [two, 2], [space, three, 2])


def test_a_bos_only_where_the_tokenizer_has_one() -> None:
    [bytes_example] = encode(BYTES, TextPair("n", "what", "is", "it"))
    assert bytes_example.prompt == BYTES("what", add_special_tokens=False)["input_ids"]
    [pieces_example] = encode(PIECES, TextPair("n", "what", "is", "it"))
    assert pieces_example.prompt == PIECES("what")["input_ids"]
    assert pieces_example.prompt.count(1) == 1


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos"), [(CHARACTERS, "<bos>", "<eos>"), (PIECES, "<s>", "</s>")]
)
def test_special_tokens_in_the_text_are_not_doubled(
    tokenizer: PreTrainedTokenizerFast, bos: str, eos: str
) -> None:
    [written] = encode(tokenizer, TextPair("n", f"{bos}1+1=", f"2{eos}", f"3{eos}"))
    assert written.prompt.count(tokenizer.bos_token_id) == 1
    assert written.chosen.count(tokenizer.eos_token_id) == 1
    assert written.chosen[-1] == tokenizer.eos_token_id


def test_the_border_never_merges() -> None:
    together = BYTES("it is", add_special_tokens=False)["input_ids"]
    [example] = encode(BYTES, TextPair("n", "it i", "s", "t"))
    assert example.prompt + example.chosen[:-1] != together  # "is" is one token of the corpus
    assert BYTES.decode(example.prompt + example.chosen[:-1]) == "it is"


def test_no_space_is_put_before_a_response() -> None:
    [example] = encode(PIECES, TextPair("n", "what i", "s", "\n\n t"))
    assert PIECES.decode(example.prompt[1:] + example.chosen[:-1]) == "what is"
    assert PIECES.decode(example.prompt[1:] + example.rejected[:-1]) == "what i\n\n t"


plain = st.text(min_size=1, max_size=40).filter(lambda text: "<" not in text and "▁" not in text)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
@settings(deadline=None, max_examples=60)
@given(prompt=plain, chosen=plain, rejected=plain)
@example_of(prompt=" a", chosen=" b", rejected="\nb")
@example_of(prompt="a\n", chosen="\n\nb", rejected="0.0")
def test_any_text_comes_back(
    tokenizer: PreTrainedTokenizerFast, prompt: str, chosen: str, rejected: str
) -> None:
    [example] = encode(tokenizer, TextPair("n", prompt, chosen, rejected + "x" * (chosen == rejected)))
    opening = 0 if tokenizer.bos_token_id is None else 1
    if tokenizer is PIECES:  # such tokenizers take a text's first space for the one they put there themselves
        prompt = prompt.removeprefix(" ")
    assert example.chosen[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt[opening:] + example.chosen[:-1]) == prompt + chosen
    assert tokenizer.decode(example.prompt[opening:]) == prompt


def test_limits_by_hand() -> None:
    tally = Tally()
    [example] = encode(
        CHARACTERS,
        TextPair("n", "12+34=", "46", "the sum is"),
        max_length=7,
        max_prompt_length=4,
        tally=tally,
    )
    three, four, equals = (ord(character) - 27 for character in "34=")
    assert example.prompt == [1, three, four, equals]  # the BOS stays, then the end of the prompt
    assert example.chosen == [four, ord("6") - 27, 2]  # just fits, with its end
    assert example.rejected == [ord(character) - 27 for character in "the"]  # cut: no end-of-sequence token
    assert tally.counts == {"truncated_prompts": 1, "truncated_responses": 1, "tokens_cut": 11}


ascii_text = st.text(alphabet="abc 123", min_size=1, max_size=12)


@settings(deadline=None)
@given(
    texts=st.tuples(ascii_text, ascii_text, ascii_text),
    max_length=st.integers(1, 20) | st.none(),
    max_prompt_length=st.integers(2, 10) | st.none(),
)
def test_any_limits_are_kept(
    texts: tuple[str, str, str], max_length: int | None, max_prompt_length: int | None
) -> None:
    tally = Tally()
    examples = encode(
        CHARACTERS,
        TextPair("n", *texts),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        tally=tally,
    )
    assert len(examples) + len(tally.bad) == 1
    for example in examples:
        assert len(example.prompt) == min(len(texts[0]) + 1, max_prompt_length or 99)
        for text, ids in zip(texts[1:], (example.chosen, example.rejected), strict=True):
            assert 1 <= len(ids) == min(len(text) + 1, (max_length or 99) - len(example.prompt))


@pytest.mark.parametrize(
    ("pair", "max_length", "reason"),
    [
        (TextPair("f:7", "12+34=", "46", "47"), 7, "prompt leaves no room"),
        (TextPair("f:7", "12+34=", "46", "47"), 8, "the same tokens"),
        (TextPair("f:7", "12+34=", "é", "è"), None, "the same tokens"),
    ],
)
def test_pairs_that_teach_nothing_are_left_out(pair: TextPair, max_length: int, reason: str) -> None:
    tally = Tally()
    assert encode(CHARACTERS, pair, max_length=max_length, tally=tally) == []
    [(place, why)] = tally.bad
    assert place == "f:7" and reason in why


def test_a_response_without_a_token_is_left_out() -> None:
    tally = Tally()
    assert encode(BYTES, TextPair("n", "p", "", "b"), TextPair("m", "p", "a", ""), tally=tally) == []
    assert tally.bad == [("n", "response without a token"), ("m", "response without a token")]


def test_text_without_a_prompt_is_opened_by_a_bos_or_an_end() -> None:
    [bytes_example] = encode(BYTES, TextPair("n", "", "what", None))
    assert bytes_example.prompt == [BYTES.eos_token_id] and bytes_example.rejected == []
    [pieces_example] = encode(PIECES, TextPair("n", "", "what", None))
    assert pieces_example.prompt == [PIECES.bos_token_id]


def test_a_tokenizer_or_limit_that_cannot_work_is_refused() -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match="end-of-sequence"):
        PairTokeniser(endless)
    with pytest.raises(ConfigError, match="max_prompt_length=1"):
        PairTokeniser(CHARACTERS, Limits(max_prompt_length=1))


def test_many_pairs_keep_their_order() -> None:
    pairs = [TextPair(str(n), f"{n}", "a", "b") for n in range(2500)]
    examples = encode(CHARACTERS, *pairs)
    assert [example.id for example in examples] == [pair.id for pair in pairs]
    assert CHARACTERS.decode(examples[1234].prompt[1:]) == "1234"


def test_calls_of_the_tokenizer_itself_change_nothing() -> None:
    """The Rust tokenizer is shared with transformers, whose calls may pad and cut."""
    tokenizer = byte_level()
    tokeniser = PairTokeniser(tokenizer)
    described, ids = tokeniser.description(), tokeniser.ids(["what is it", "the sum"])
    tokenizer(["a", "what is the sum"], padding=True, truncation=True, max_length=2)
    assert tokeniser.ids(["what is it", "the sum"]) == ids and tokeniser.description() == described
    padded = tokenizer(["a", "what is the sum"], padding=True)["input_ids"]
    assert len(padded[0]) == len(padded[1]) > len(tokeniser.ids(["a"])[0])
