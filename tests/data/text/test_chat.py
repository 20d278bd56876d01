import shutil
from pathlib import Path

import pytest

from megatron_ring.data.text import chat
from megatron_ring.data.text.chat import render_samples
from megatron_ring.data.text.messages import Conversation
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_ring.errors import DataError
from tests.helpers.data.chat_lines import as_text

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?\n"},
    {"role": "assistant", "content": "<think>add</think>2"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": " 3"},
]


def render_chat(tokenizer, messages) -> tuple[list[int], list[bool]]:
    """The one sample that these messages give."""
    (sample,) = render_samples(tokenizer, Conversation(messages=tuple(messages)))
    return sample


def render_prompt(tokenizer, messages) -> list[int]:
    return chat.render_prompt(tokenizer, Conversation(messages=tuple(messages)))


def answers(tokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, learned in zip(ids, mask, strict=True) if learned])


def test_lings_turns(sentencepiece: SentencePieceTokenizer):
    assert as_text(sentencepiece, CONVERSATION[:4], add_generation_prompt=True) == (
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
        text = as_text(tokenizer, CONVERSATION).replace(tokenizer.eos_token, "")
        assert tokenizer.decode(ids) == text


def test_a_template_that_ends_the_last_answer_only_gives_a_sample_per_answer(
    huggingface_folder: Path, tmp_path: Path
):
    """As OLMo 3's, whose end of sequence stands behind the last turn alone."""
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' and loop.last %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    samples = render_samples(tokenizer, Conversation(messages=tuple(CONVERSATION)))
    assert [answers(tokenizer, *sample) for sample in samples] == ["<think>add</think>2", " 3"]
    assert all(ids.count(tokenizer.eos_id) == 1 for ids, _ in samples)


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


def test_a_template_that_drops_earlier_reasoning_gives_a_sample_per_answer(
    huggingface_folder: Path, tmp_path: Path
):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    assert answers(tokenizer, *render_chat(tokenizer, CONVERSATION[:3])) == "<think>add</think>2"
    first, second = render_samples(tokenizer, Conversation(messages=tuple(CONVERSATION)))
    assert first == render_chat(tokenizer, CONVERSATION[:3])
    assert answers(tokenizer, *second) == " 3" and second[0][-1] == tokenizer.eos_id
    shown = "[system]Be brief.[user]1+1?\n[assistant]2[user]+1?[assistant] 3"
    assert tokenizer.decode(second[0]) == shown, "as the model will see it: earlier reasoning is gone"
    assert render_prompt(tokenizer, CONVERSATION[:4]) == second[0][: second[1].index(True)]
    weighted = Conversation(messages=tuple(CONVERSATION), unlearned=frozenset({2}))
    assert render_samples(tokenizer, weighted) == [second]


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
    with pytest.raises(DataError, match=r"no chat template in the folder of .*tokenizer\.json"):
        as_text(HuggingFaceTokenizer(tmp_path), CONVERSATION)


@pytest.mark.parametrize(
    ("template", "number"),
    [
        # Qwen3's passes over roles that it does not know
        (
            "{% for m in messages %}{% if m.role != 'developer' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
            0,
        ),
        # Llama 3.1's shows an answer's calls or its content
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}"
            "{{ m.content }}{% endif %}{% endfor %}",
            2,
        ),
        ("hello", 0),
    ],
)
def test_a_template_that_drops_a_message_is_refused(
    huggingface_folder: Path, tmp_path: Path, template: str, number: int
):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    ends = "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "hf" / "chat_template.jinja").write_text(template + ends)
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "f"}] if number == 2 else []},
    ]
    for render in (render_chat, render_prompt):
        with pytest.raises(DataError, match=rf"drops the content of message {number} \(role "):
            render(tokenizer, [{k: v for k, v in m.items() if v} for m in messages])


def test_a_template_may_write_a_content_in_its_own_way(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    ids, mask = render_chat(
        tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    )
    assert answers(tokenizer, ids, mask) == "YES"


@pytest.mark.timeout(60)
def test_an_answer_of_nothing_but_beginnings_of_thoughts_takes_no_time(sentencepiece: SentencePieceTokenizer):
    """What a model says that has come apart; looked for from each beginning anew, their end took hours."""
    answer = "<think>" * 200_000
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": answer})
    ((ids, mask),) = render_samples(sentencepiece, Conversation(messages=messages))
    assert sum(mask) == 200_001 and sentencepiece.decode(ids).endswith(answer)
