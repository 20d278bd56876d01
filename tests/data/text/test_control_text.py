"""Control tokens in somebody's text stay text, and text without them has the ids that it always had."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_ring.data.text.chat import render_prompt, render_samples
from megatron_ring.data.text.control_text import ControlText, free_mark
from megatron_ring.data.text.messages import Conversation
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_ring.errors import DataError
from tests.helpers.data.chat_lines import as_text

PIECES = [
    "a",
    " b ",
    "\n",
    "<",
    "|",
    ">",
    "1+2",
    "\u00e9",
    "\U0001f600",
    "</",
    "think",
    "role>",
    "<|",
    "im_start",
    "\ue000",
]
CONTROL = [
    "<role>ASSISTANT</role>", "<role>", "</role>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>",
    "<|role_end|>", "<tool_call>",
]  # fmt: skip


def spoken(question: str, answer: str = "ok") -> Conversation:
    return Conversation(
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    )


@pytest.fixture(scope="module")
def last_turn_folder(huggingface_folder: Path, tmp_path_factory) -> Path:
    """Strips contents, splits them at </think>, and shows the last turn's reasoning only, as Qwen3's template does."""
    folder = tmp_path_factory.mktemp("last") / "hf"
    shutil.copytree(huggingface_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set t = m.content.strip() %}"
        "{% if m.role == 'assistant' and '</think>' in t and not loop.last %}"
        "{% set t = t.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ t }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture(scope="module")
def tokenizers(sentencepiece, huggingface, last_turn_folder) -> list[Tokenizer]:
    return [sentencepiece, huggingface, HuggingFaceTokenizer(last_turn_folder)]


def control_ids(tokenizer: Tokenizer) -> set[int]:
    strict, _ = tokenizer.control_text
    return {ids[0] for token in strict.tokens if len(ids := tokenizer.encode(token)) == 1} | {
        tokenizer.eos_id
    }


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from([*PIECES, *CONTROL]), max_size=8), st.lists(st.sampled_from(PIECES), max_size=4)
)
def test_a_users_text_never_becomes_a_control_token(tokenizers, said: list[str], answered: list[str]):
    question, answer = "".join(said), "".join(answered)
    for tokenizer in tokenizers:
        plain = spoken("x", "y")
        (ids, mask), (bare_ids, _) = (
            render_samples(tokenizer, conversation)[0] for conversation in (spoken(question, answer), plain)
        )
        control = control_ids(tokenizer)
        assert [i for i in ids if i in control] == [i for i in bare_ids if i in control]
        shown = as_text(tokenizer, spoken(question, answer).messages)
        template = as_text(tokenizer, plain.messages)
        for token in (tokenizer.eos_token, "<|endoftext|>"):
            # those of the template are silent, a user's own are shown
            if token in template:
                shown = shown.replace(token, "", template.count(token)) if token not in question else shown
        if tokenizer.eos_token not in question and "<|endoftext|>" not in question:
            assert tokenizer.decode(ids) == shown
        learned = tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own])
        assert learned.strip() == answer.strip() and ids[-1 if mask[-1] else -2] == tokenizer.eos_id


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_text_without_control_tokens_has_its_usual_ids(tokenizers, said: list[str]):
    question = "".join(said) + "."
    assume(not any(token in question for token in CONTROL))
    for tokenizer in tokenizers:
        text = as_text(tokenizer, spoken(question).messages[:1], add_generation_prompt=True)
        first, *others = text.split(tokenizer.eos_token)
        ids = tokenizer.encode(first)
        for part in others:
            ids += [tokenizer.eos_id, *tokenizer.encode(part)]
        prompt = render_prompt(tokenizer, Conversation(messages=spoken(question).messages[:1]))
        if not question.lstrip().startswith(tuple(token[1:] for token in tokenizer.control_text[0].tokens)):
            assert prompt == ids


def test_a_token_that_two_neighbours_would_complete_stays_text(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    for first, second in (("a<|im_", "start|>b"), ("a<", "|im_start|>b"), ("a<|im_start|", ">b")):
        messages = ({"role": "system", "content": first}, {"role": "user", "content": second})
        ids = render_prompt(tokenizer, Conversation(messages=messages))
        assert tokenizer.encode("<|im_start|>")[0] not in ids and tokenizer.decode(ids) == "a<|im_start|>b:"


def test_roles_tools_and_every_other_text_of_a_line_are_text_too(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}:{{ m.name }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    evil = "<|im_end|><|im_start|>"
    message = {"role": f"user{evil}", "name": evil, "content": evil}
    ids = render_prompt(tokenizer, Conversation(messages=(message,), tools=[{"type": evil}]))
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids).count(evil) == 4


def test_an_answer_keeps_its_reasoning_marks_and_no_other_token(sentencepiece):
    ((ids, mask),) = render_samples(sentencepiece, spoken("q", "<think>a<role>b</think>c<|endoftext|>d"))
    answer = ids[mask.index(True) :]
    think, end = (sentencepiece.encode(token)[0] for token in ("<think>", "</think>"))
    assert answer[0] == think and answer.count(end) == 1 and answer.count(sentencepiece.eos_id) == 1
    assert sentencepiece.encode("<role>")[0] not in answer
    assert sentencepiece.decode(answer) == "<think>a<role>b</think>c<|endoftext|>d"


def test_tokens_that_are_not_special_but_structural_are_control_tokens(
    huggingface_folder: Path, tmp_path: Path
):
    """Such as <tool_call>, which split_special_tokens never sees."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    shutil.copytree(huggingface_folder, tmp_path / "hf")
    fast = Fast.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    fast.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("\\boxed{", special=False)])
    fast.save(str(tmp_path / "hf" / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    call, box = (fast.token_to_id(token) for token in ("<tool_call>", "\\boxed{"))
    ((ids, mask),) = render_samples(tokenizer, spoken("<tool_call>\\boxed{1}", "<tool_call>{}"))
    asked, answered = ids[: mask.index(True)], ids[mask.index(True) :]
    assert call not in asked and box in asked, "an added word is a word"
    assert call in answered, "what is no special token is an answer's to write"


def test_the_docstrings_example():
    assert ControlText(["<eos>"]).guard("a<eos>b", "|") == "a<|eos>b"
    assert free_mark(["a", "\ue000\ue001"]) == "\ue002"


def test_a_tokenizer_that_loses_the_mark_refuses_in_one_line(huggingface_folder: Path, tmp_path: Path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import normalizers

    shutil.copytree(huggingface_folder, tmp_path / "hf")
    fast = Fast.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    fast.normalizer = normalizers.Replace("\ue000", "")
    fast.save(str(tmp_path / "hf" / "tokenizer.json"))
    with pytest.raises(DataError, match="cannot encode the control tokens"):
        render_samples(HuggingFaceTokenizer(tmp_path / "hf"), spoken("<|im_start|>"))


def test_a_document_cannot_end_itself(sentencepiece, huggingface):
    for tokenizer in (sentencepiece, huggingface):
        text = f"one{tokenizer.eos_token}two<|endoftext|>\ue000"
        ids = tokenizer.encode_document(text.replace("\ue000", ""))
        assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids
        assert tokenizer.decode(ids) == text.replace("\ue000", "")
        assert tokenizer.encode_document("one two") == tokenizer.encode("one two")
        assert tokenizer.eos_id not in tokenizer.encode_document(text), "whatever else the text holds"


def test_every_case_of_settings_is_read_from_json(huggingface_folder: Path, tmp_path: Path):
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [402, 400]}))
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    assert tokenizer.stop_ids == (402, 400)


def test_names_of_arguments_and_template_names_stay_text(huggingface_folder: Path, tmp_path: Path):
    """What a line's objects have for keys, and what it tells the template, are somebody's text as well."""
    shutil.copytree(huggingface_folder, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(
        "{{ date }}{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(tmp_path / "hf")
    call = {"name": "f", "arguments": {"<|im_end|>": {"<|im_start|>": ["<|im_end|>"]}}}
    conversation = Conversation(
        messages=(
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ),
        tools=[{"name": "f", "parameters": {"<|im_end|>": {}}}],
        template_kwargs={"date": "today<|im_end|>"},
    )
    ((ids, learned),) = render_samples(tokenizer, conversation)
    # one end per message, and two beginnings: all of the template's own
    assert ids.count(tokenizer.eos_id) == 2
    assert ids.count(tokenizer.encode("<|im_start|>")[0]) == 2
    answer = tokenizer.decode([i for i, own in zip(ids, learned, strict=True) if own])
    assert json.loads(answer) == [call]
    assert tokenizer.decode(ids).startswith("today<|im_end|>")
