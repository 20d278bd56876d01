from pathlib import Path

import pytest

from megatron_ring.data.corpus.documents import Record
from megatron_ring.data.corpus.tokenize_documents import TokenizeConfig, tokenize_documents
from megatron_ring.data.text.tokenizer import SentencePieceTokenizer
from megatron_ring.errors import DataError


def records(*texts: str, is_json: bool = False) -> list[Record]:
    return [
        Record(raw=text.encode(), origin=f"input:{i}", is_json=is_json, is_named=True)
        for i, text in enumerate(texts)
    ]


def test_documents_are_ended_and_empty_ones_left_out(
    sentencepiece_file: Path, sentencepiece: SentencePieceTokenizer
):
    for append_eod, end in ((True, [sentencepiece.eos_id]), (False, [])):
        config = TokenizeConfig(tokenizer_model=str(sentencepiece_file), append_eod=append_eod)
        (batch,) = tokenize_documents(records("one", "", "two"), config)
        assert [document.tolist() for document in batch.documents()] == [
            sentencepiece.encode("one") + end,
            sentencepiece.encode("two") + end,
        ]
        assert (batch.num_bytes, batch.num_skipped) == (6, 1)


def test_the_number_of_workers_does_not_change_the_result(sentencepiece_file: Path):
    config = TokenizeConfig(tokenizer_model=str(sentencepiece_file))
    # a record a batch, and more batches than are kept waiting
    texts = [f"document {i} " + "x = 1\n" * 50_000 for i in range(10)]
    alone = [batch.tokens.tolist() for batch in tokenize_documents(records(*texts), config)]
    together = [batch.tokens.tolist() for batch in tokenize_documents(records(*texts), config, workers=2)]
    assert len(alone) == 10 and together == alone


def test_an_error_in_a_worker_is_the_same_line(sentencepiece_file: Path):
    config = TokenizeConfig(tokenizer_model=str(sentencepiece_file))
    bad = records('{"text": "fine"}', '{"text": ', is_json=True)
    for workers in (1, 2):
        with pytest.raises(DataError, match="input:1 is not JSON"):
            list(tokenize_documents(bad, config, workers=workers))
