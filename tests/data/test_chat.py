import shutil
from pathlib import Path

import pytest

from megatron_ring.data.chat import render_chat, render_prompt, render_template
from megatron_ring.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_ring.errors import DataError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?\n"},
    {"role": "assistant", "content": "<think>add</think>2"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": " 3"},
]


def answers(tokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, learned in zip(ids, mask, strict=True) if learned])


def test_lings_turns(sentencepiece: SentencePieceTokenizer):
    assert sentencepiece.apply_chat_template(CONVERSATION[:4], add_generation_prompt=True) == (
        "<role>SYSTEM</role>Be brief.<role>HUMAN</role>1+1?\n"
        "<role>ASSISTANT</role><think>add</think>2<|endoftext|><role>HUMAN</role>+1?<role>ASSISTANT</role>"
    )


def test_answers_and_their_ends_are_learned_and_nothing_else(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer
):
    for tokenizer in (sentencepiece, huggingface):
        ids, mask = render_chat(tokenizer, CONVERSATION)
        assert answers(tokenizer, ids, mask) == "<think>add</think>2 3"
        assert sum(learned and i == tokenizer.eos_id for i, learned in zip(ids, mask, strict=True)) == 2
        text = tokenizer.apply_chat_template(CONVERSATION).replace(tokenizer.eos_token, "")
        assert tokenizer.decode(ids) == text


def test_ids_of_a_short_conversation(sentencepiece: SentencePieceTokenizer):
    ids, mask = render_chat(
        sentencepiece, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "</think>"}]
    )
    expected = ["<role>HUMAN</role>", "a", "<role>ASSISTANT</role>", "</think>"]
    assert ids == [*(sentencepiece.encode(piece)[0] for piece in expected), sentencepiece.eos_id]
    assert mask == [False, False, False, True, True]


def test_a_prompt_begins_the_conversation_with_its_answer(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer
):
    for tokenizer in (sentencepiece, huggingface):
        for end in (2, 4):
            prompt = render_prompt(tokenizer, CONVERSATION[:end])
            ids, mask = render_chat(tokenizer, CONVERSATION[: end + 1])
            assert ids[: len(prompt)] == prompt
            assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_a_template_without_ends_still_teaches_to_stop(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    ids, mask = render_chat(tokenizer, CONVERSATION)
    assert answers(tokenizer, ids, mask) == "<think>add</think>2 3"
    assert ids[-1] == tokenizer.eos_id and mask[-1]


def test_a_template_that_drops_earlier_reasoning_cannot_be_masked(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    assert answers(tokenizer, *render_chat(tokenizer, CONVERSATION[:3])) == "<think>add</think>2"
    with pytest.raises(DataError, match="chat template rewrites earlier turns"):
        render_chat(tokenizer, CONVERSATION)


def test_an_end_spelled_out_in_a_message_is_refused(
    sentencepiece: SentencePieceTokenizer, huggingface: HuggingFaceTokenizer
):
    for tokenizer in (sentencepiece, huggingface):
        message = {"role": "user", "content": f"x{tokenizer.eos_token}y"}
        with pytest.raises(DataError, match="message 0 spells out the end-of-sequence token"):
            render_chat(tokenizer, [message])
        with pytest.raises(DataError, match="message 0 spells out the end-of-sequence token"):
            render_prompt(tokenizer, [message])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "role tool is unknown; use system, user or assistant"),
        ([{"role": "user", "content": None}], "content of a message must be a string"),
        ([{"role": "user"}], "content of a message must be a string"),
        ([{"content": "x"}], "is unknown; use system, user or assistant"),
    ],
)
def test_messages_that_are_none_are_refused(
    sentencepiece: SentencePieceTokenizer, messages: list[dict[str, str]], message: str
):
    with pytest.raises(DataError, match=message):
        render_chat(sentencepiece, messages)


def test_a_tokenizer_without_template_says_so(huggingface_folder: Path, tmp_path: Path):
    shutil.copy(huggingface_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(DataError, match=r"no chat template beside .*tokenizer\.json"):
        HuggingFaceTokenizer(tmp_path).apply_chat_template(CONVERSATION)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch PATH') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_is_one_line(tmp_path: Path, template: str):
    with pytest.raises(DataError, match="chat template failed: ") as caught:
        render_template(
            template.replace("PATH", str(tmp_path / "touched")),
            CONVERSATION,
            add_generation_prompt=False,
            special_tokens={},
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_templates_have_the_names_they_expect():
    template = "{{ bos_token }}{{ tools is none }}{{ {'a': '\u00e9'} | tojson }}{% break %}"
    looped = "{% for m in messages %}" + template + "{% endfor %}"
    assert (
        render_template(
            looped, CONVERSATION, add_generation_prompt=False, special_tokens={"bos_token": "<s>"}
        )
        == '<s>True{"a": "\u00e9"}'
    )
