import json
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.text.templates import CHAT_SYMBOLS
from megatron_ring.data.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError

SPACE_SYMBOL = "\u2581"


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE_SYMBOL)))
def test_sentencepiece_returns_every_text_as_it_was(sentencepiece: SentencePieceTokenizer, text: str):
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    assert all(0 <= i < sentencepiece.vocab_size for i in ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="a<|im_start|>b")
def test_huggingface_returns_every_text_as_it_was(huggingface: HuggingFaceTokenizer, text: str):
    # a spelt end or padding is a token without text
    assume("<|endoftext|>" not in text and "<|im_end|>" not in text)
    assert huggingface.decode(huggingface.encode(text)) == text


def test_real_text_is_compressed_and_returned(sentencepiece: SentencePieceTokenizer):
    for text in builtin_documents(0.1):
        ids = sentencepiece.encode(text)
        assert sentencepiece.decode(ids) == text
        assert len(ids) < len(text) / 1.2


def test_ends_and_padding_have_no_text(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer
):
    for tokenizer in (sentencepiece, huggingface):
        ids = [*tokenizer.encode("<think>a"), tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size + 5]
        assert tokenizer.decode(ids) == "<think>a"


def test_unpaired_surrogates_become_question_marks(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer
):
    for tokenizer in (sentencepiece, huggingface):
        assert tokenizer.decode(tokenizer.encode("a\ud83d!")) == "a?!"


def test_chat_symbols_are_single_tokens_and_digits_stand_alone(sentencepiece: SentencePieceTokenizer):
    for symbol in CHAT_SYMBOLS:
        assert len(sentencepiece.encode(symbol)) == 1
    assert len(sentencepiece.encode("1234")) == 4
    # the end of a document is not to be had by writing it
    assert sentencepiece.eos_id not in sentencepiece.encode(f"x{sentencepiece.eos_token}y")


def test_special_ids(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer, huggingface_folder: Path
):
    assert (sentencepiece.vocab_size, sentencepiece.eos_id, sentencepiece.pad_id) == (600, 1, 1)
    assert (sentencepiece.bos_id, sentencepiece.eos_token) == (None, "<|endoftext|>")
    added = {
        token["content"]: token["id"]
        for token in json.loads((huggingface_folder / "tokenizer.json").read_text())["added_tokens"]
    }
    assert huggingface.eos_id == added["<|im_end|>"] and huggingface.pad_id == added["<|endoftext|>"]
    assert huggingface.vocab_size == max(added.values()) + 1 and huggingface.bos_id is None
    assert huggingface.encode("<|im_start|>") == [added["<|im_start|>"]]


def test_folder_and_file_are_the_same_huggingface_tokenizer(
    huggingface: HuggingFaceTokenizer, huggingface_folder: Path
):
    by_file = load_tokenizer("huggingface", huggingface_folder / "tokenizer.json")
    assert by_file.fingerprint == huggingface.fingerprint
    assert by_file.encode("def f(x):") == huggingface.encode("def f(x):")


def test_truncation_stored_in_the_file_does_not_cut_documents(huggingface_folder: Path, tmp_path: Path):
    from tokenizers import Tokenizer as FastTokenizer

    shutil.copytree(huggingface_folder, tmp_path / "hf")
    fast = FastTokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "hf" / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    text = "a longer text than three tokens, and nothing behind it"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad_id not in tokenizer.encode("a")


def test_a_tokenizer_larger_than_the_model_is_refused(sentencepiece_file: Path):
    with pytest.raises(
        DataError,
        match=r"tiny\.model has 600 tokens, more than the model's vocab_size=599; set vocab_size=600",
    ):
        load_tokenizer("sentencepiece", sentencepiece_file, vocab_size=599)
    fitting: Tokenizer = load_tokenizer("sentencepiece", sentencepiece_file, vocab_size=600)
    assert fitting.vocab_size == 600


def test_missing_tokenizers_are_named(tmp_path: Path, sentencepiece_file: Path):
    with pytest.raises(DataError, match="tokenizer_model is not set; name a file, or make one"):
        load_tokenizer("sentencepiece", None)
    with pytest.raises(DataError, match=r"nowhere does not exist; name a sentencepiece \.model file"):
        load_tokenizer("sentencepiece", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is a folder; name the sentencepiece \.model file in it"):
        load_tokenizer("sentencepiece", tmp_path)
    with pytest.raises(DataError, match=r"contains no tokenizer\.json"):
        load_tokenizer("huggingface", tmp_path)
    with pytest.raises(DataError, match="tokenizer_type=wordpiece is unknown; use"):
        load_tokenizer("wordpiece", sentencepiece_file)  # type: ignore[arg-type]


def test_a_sentencepiece_file_cut_short_is_refused(sentencepiece_file: Path, tmp_path: Path):
    content = sentencepiece_file.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.model").write_bytes(content[:size])
        with pytest.raises(DataError, match="is not a sentencepiece model, or is damaged"):
            load_tokenizer("sentencepiece", tmp_path / "cut.model")


def test_each_kind_refuses_the_other_with_the_remedy(sentencepiece_file: Path, huggingface_folder: Path):
    with pytest.raises(DataError, match=r"set tokenizer_type=sentencepiece for a \.model file"):
        load_tokenizer("huggingface", sentencepiece_file)
    with pytest.raises(DataError, match=r"set tokenizer_type=huggingface for a tokenizer\.json"):
        load_tokenizer("sentencepiece", huggingface_folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "no eos_token is named in the folder of"),
        ("{", r"tokenizer_config\.json is not JSON"),
        ("[]", "is a JSON list, not an object"),
        ('{"eos_token": "<nope>"}', r"eos_token '<nope>' is not in .*tokenizer\.json"),
    ],
)
def test_bad_settings_beside_a_tokenizer_json_are_named(
    huggingface_folder: Path, tmp_path: Path, settings: str | None, message: str
):
    shutil.copy(huggingface_folder / "tokenizer.json", tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(DataError, match=message):
        load_tokenizer("huggingface", tmp_path)


def test_further_symbols_are_single_tokens(tmp_path: Path):
    path = tmp_path / "boxed.model"
    train_tokenizer(
        builtin_documents(0.1), path, vocab_size=420, symbols=["\\boxed{", "<think>", "two words:"]
    )
    tokenizer = SentencePieceTokenizer(path)
    text = r"<think>1+2=3</think>\boxed{3}"
    ids = tokenizer.encode(text)
    assert len(ids) == 10 and tokenizer.decode(ids) == text
    with pytest.raises(DataError, match="vocab_size=266 must exceed the 266 reserved tokens"):
        train_tokenizer(["text"], path, vocab_size=266, symbols=["\\boxed{"])


def test_training_is_deterministic_and_digits_can_stay_together(tmp_path: Path):
    documents = [f"in {year} there were a number of things" for year in range(1900, 2000)]
    for name, split in [("a", True), ("b", True), ("c", False)]:
        train_tokenizer(documents, tmp_path / f"{name}.model", vocab_size=300, split_digits=split)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    whole = load_tokenizer("sentencepiece", tmp_path / "c.model")
    apart = load_tokenizer("sentencepiece", tmp_path / "a.model")
    assert len(whole.encode("1923")) < 4 == len(apart.encode("1923"))


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (["hello"], 2048, r"vocab_size=2048 is more than the text supports; set at most \d+, or add text"),
        (["".join(map(chr, range(0x4E00, 0x5600)))] * 3, 300, "has no room for the text's characters"),
        (["hello"], 100, "vocab_size=100 must exceed the 265 reserved tokens; try 2048"),
        ([], 300, "contains no text to train a tokenizer on"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_explained(
    tmp_path: Path, documents: list[str], vocab_size: int, message: str
):
    with pytest.raises(DataError, match=message):
        train_tokenizer(documents, tmp_path / "t.model", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []
