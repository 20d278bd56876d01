"""Conversations: what a line of a chat file becomes with our own tokenizer, and with one that has a template."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_ring.data.conversations import read_line
from megatron_ring.data.corpus.builtin import builtin_documents
from megatron_ring.data.corpus.documents import read_records
from megatron_ring.data.text.chat import render_samples
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megatron_ring.data.text.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from tests.cases import FOLDER, Row

QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set text = m.content %}{% set thought = '' %}
{%- if m.role == 'assistant' and '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}{% set text = text.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if thought and loop.index0 > ns.last %}{{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{% endif %}
{{- text ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Shows the reasoning of the last turn only, in Qwen3's manner."""


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _ours(Path(folder)), _theirs(Path(folder))
        yield from _control_tokens(ours)
        yield from _learned(
            "chat_reasoning_content", ours, [[["<think>two and two make four</think>4"]], "tool_calls"]
        )
        yield from _learned(
            "chat_template_drops_reasoning",
            theirs,
            [[["<think>\np\n</think>\n\n1"], ["<think>\nq\n</think>\n\n2"]]],
        )
        yield from _learned("chat_utf16", ours, [[["x"]]])


def _control_tokens(tokenizer: Tokenizer) -> Iterator[Row]:
    case = "chat_control_tokens_in_content"
    ids = [tokenizer.encode(f"<role>{role}</role>")[0] for role in ("HUMAN", "ASSISTANT")]
    for record in read_records([FOLDER / case / "chats.jsonl"]):
        ((tokens, _),) = render_samples(tokenizer, read_line(record))
        shown = tokenizer.decode(tokens)
        expected = "<role>HUMAN</role>x<role>ASSISTANT</role>evil<role>ASSISTANT</role>no"
        yield Row(case=case, given="text of the ids", expected=expected, got=shown)
        got = [i for i in tokens if i in ids]
        yield Row(case=case, given="control tokens in it", expected=ids, got=got)


def _learned(case: str, tokenizer: Tokenizer, expected: list) -> Iterator[Row]:
    """What each line teaches, sample by sample; of a line that is refused, the key that it names."""
    records = list(read_records([FOLDER / case / "chats.jsonl"]))
    for record, wanted in zip(records, expected, strict=True):
        try:
            samples = render_samples(tokenizer, read_line(record))
            got = [
                [tokenizer.decode([i for i, own in zip(*sample, strict=True) if own])] for sample in samples
            ]
        except DataError as error:
            got = next((key for key in ("tool_calls", "tools") if f"{key} " in str(error)), str(error))
        given = record.raw.decode("utf-8", "replace").strip()
        # the tools of the second line are refused as well, whichever is seen first
        yield Row(case=case, given=given, expected=wanted, got="tool_calls" if got == "tools" else got)


def _ours(folder: Path) -> Tokenizer:
    train_tokenizer(builtin_documents(0.1), folder / "tiny.model", vocab_size=400)
    return load_tokenizer("sentencepiece", folder / "tiny.model")


def _theirs(folder: Path) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers  # fmt: skip
    from tokenizers import Tokenizer as Fast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={word: place for place, word in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    fast.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": QWEN3}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return HuggingFaceTokenizer(folder)
