"""Tiny corpora and tokenizers, made by the real tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.writer import write_corpus
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_ring.data.text.tokenizer_training import train_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_tokenizer(builtin_documents(0.3), path, vocab_size=600)
    return path


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_file)


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in Qwen's manner."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(builtin_documents(0.1), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def huggingface(huggingface_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(huggingface_folder)


@pytest.fixture
def write_documents(tmp_path: Path) -> Callable[..., str]:
    """Write lists of token ids as an indexed dataset; its prefix comes back."""

    def write(documents: Sequence[Sequence[int]], name: str = "corpus", **manifest: object) -> str:
        prefix = str(tmp_path / name)
        with write_corpus(prefix, vocab_size=1000, manifest=dict(manifest)) as writer:
            for document in documents:
                writer.add(np.array(document))
        return prefix

    return write
