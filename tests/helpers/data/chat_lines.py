"""What a chat line teaches, and a tokenizer with another chat template."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ring.data.text.chat import render_samples
from megatron_ring.data.text.messages import read_conversation
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer


def learned(tokenizer: Tokenizer, fields: dict) -> list[str]:
    """What each sample of a line teaches."""
    samples = render_samples(tokenizer, read_conversation(fields, "a.jsonl:1"))
    return [tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own]) for ids, mask in samples]


def as_text(tokenizer: Tokenizer, messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
    """The template's text of a whole conversation."""
    return tokenizer.render(messages, [(len(messages), add_generation_prompt)])[0]


def with_template(folder: Path, tmp_path: Path, template: str, **files: dict) -> HuggingFaceTokenizer:
    copy = Path(shutil.copytree(folder, tmp_path / "hf"))
    (copy / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (copy / f"{name}.json").write_text(json.dumps(content))
    return HuggingFaceTokenizer(copy)
