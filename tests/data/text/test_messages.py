"""Which keys of a chat line are read, and which are refused by name."""

import json

import pytest

from megatron_ring.config.rl import RolloutConfig
from megatron_ring.data.conversations import load_conversations, read_line
from megatron_ring.data.corpus.documents import Record
from megatron_ring.data.json_text import parse_json
from megatron_ring.data.prompts.stream import open_prompts
from megatron_ring.data.text.chat import render_prompt, render_samples
from megatron_ring.data.text.messages import parse_template_kwargs, read_conversation
from megatron_ring.data.text.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_ring.errors import DataError
from tests.helpers.data.chat_lines import learned, with_template

THINKS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content.strip() }}){% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% if m.role == 'assistant' %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def line(*answers: dict, **fields) -> dict:
    messages = [
        m for answer in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant", **answer})
    ]
    return {"messages": messages, **fields}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_stands_before_it(sentencepiece, huggingface_folder, tmp_path, key):
    fields = line({"content": "4", key: "two and two"})
    assert learned(sentencepiece, fields) == ["<think>two and two</think>4"]
    template = with_template(huggingface_folder, tmp_path, THINKS)
    assert learned(template, fields) == ["(two and two)4"], "where the template does it itself"
    parts = [{"type": "thinking", "thinking": "two and two"}, {"type": "text", "text": "4"}]
    assert learned(sentencepiece, line({"content": parts})) == ["<think>two and two</think>4"]


def test_what_a_template_would_drop_in_silence_is_refused(huggingface_folder, tmp_path):
    drops = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    tokenizer = with_template(
        huggingface_folder, tmp_path, drops + "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match="chat template drops the reasoning of message 1"):
        learned(tokenizer, line({"content": "<think>r</think>4"}))


@pytest.mark.parametrize("key", ["weight", "loss", "train", "trainable", "loss_mask"])
def test_an_answer_of_weight_0_is_context(sentencepiece, key):
    fields = line({"content": "a", key: 0}, {"content": "b", key: 1}, {"content": "c", key: False})
    ((ids, mask),) = render_samples(sentencepiece, read_conversation(fields, "a.jsonl:1"))
    assert learned(sentencepiece, fields) == ["b"]
    plain, _ = render_samples(
        sentencepiece, read_conversation(line(*map(dict, ({"content": c} for c in "abc"))), "")
    )[0]
    assert ids == plain and sum(mask) == 2, "b and its end"


def test_texts_in_parts_are_joined(sentencepiece):
    parts = [{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}]
    assert learned(sentencepiece, line({"content": parts})) == ["abc"]


def test_empty_values_and_notes_say_nothing(sentencepiece):
    message = {
        "content": "4",
        "tool_calls": None,
        "name": "",
        "refusal": None,
        "id": "m-1",
        "reasoning": "",
        "audio": {},
    }
    assert learned(sentencepiece, line(message, tools=[], id=7, source="web", license="mit")) == ["4"]


def test_a_system_beside_the_messages_is_the_first_of_them(sentencepiece):
    ids = render_prompt(
        sentencepiece,
        read_conversation({"system": "Be brief.", "messages": [{"role": "user", "content": "q"}]}, ""),
    )
    assert sentencepiece.decode(ids).startswith("<role>SYSTEM</role>Be brief.<role>HUMAN</role>q")


CALL = {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (line({"content": "", **CALL}), "message 1: tool_calls is not read by this chat template"),
        (line({"content": "4"}, tools=[{"type": "function"}]), "tools are not read by this chat template"),
        (line({"content": "4"}, tools='{"a": 1}'), "tools must be a list of objects"),
        (line({"content": "4", "name": "bob"}), "message 1: name is not read by this chat template"),
        (line({"content": "4", "refusal": "no"}), "message 1: refusal is not read"),
        (line({"content": "4", "weight": 0.5}), "message 1: weight=0.5 must be 0 or 1"),
        (line({"content": "4", "train": "no"}), 'message 1: train="no" must be 0 or 1'),
        (line({"content": "4", "weight": 1, "loss": False}), "message 1 has weight and loss, which differ"),
        (line({"content": "4", "reasoning": "a", "thinking": "b"}), "message 1 has reasoning and thinking, which differ"),
        (line({"content": "<think>a</think>4", "reasoning": "b"}), "message 1 has its reasoning twice"),
        (line({"content": "4", "reasoning": [1]}), r"message 1: reasoning=\[1\] must be text"),
        (line({"content": [{"type": "image_url", "image_url": "x"}]}), "a part of the content is of type image_url"),
        (line({"content": None}), "message 1 must have a role and a content, both text"),
        (line({"content": 4}), "message 1 must have a role and a content, both text"),
        (line({"content": "4"}, weight=0), "weight=0 is not read; write it into the answer's message"),
        (line({"content": "4"}, label=False), "label=false is not read; drop it"),
        (line({"content": "4"}, enable_thinking=False), "write it under chat_template_kwargs"),
        (line({"content": "4"}, chat_template_kwargs={"enable_thinking": False}), "does not read enable_thinking"),
        (line({"content": "4"}, chat_template_kwargs=[1]), "chat_template_kwargs=.* must be a JSON object"),
        (line({"content": "4"}, chat_template_kwargs={"messages": []}), "must not set messages"),
        (line({"content": "4"}, images=["a.png"]), "images=.*; only text can be learned"),
        ({"messages": [{"role": "user", "content": "q", "reasoning": "r"}]}, "reasoning belongs to an answer"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "only answers carry loss"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role tool is unknown; use system, user or assistant"),
        ({"messages": [{"from": "human", "value": "q"}]}, "message 0 must have a role and a content"),
    ],
)  # fmt: skip
def test_a_key_that_nobody_reads_is_refused_by_name(sentencepiece, fields, said):
    with pytest.raises(DataError, match=said) as caught:
        learned(sentencepiece, json.loads(json.dumps(fields)))
    assert "\n" not in str(caught.value)


def test_what_the_template_reads_is_handed_to_it(huggingface_folder, tmp_path):
    tokenizer = with_template(huggingface_folder, tmp_path, "{{ tools | tojson if tools }}" + THINKS)
    fields = line({"content": None, **CALL}, tools=json.dumps([{"type": "function"}]))
    assert learned(tokenizer, fields) == [json.dumps(CALL["tool_calls"])]
    ids = render_prompt(tokenizer, read_conversation(fields, ""))
    assert tokenizer.decode(ids).startswith('[{"type": "function"}]')


def test_a_conversation_with_tools_is_read_as_it_is_written(huggingface_folder, tmp_path):
    """OpenAI's form: the result names its call again, which templates such as Qwen3's and Ring 2.0's leave out."""
    template = "{{ tools | tojson if tools }}" + THINKS
    tokenizer = with_template(huggingface_folder, tmp_path, template)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {}}}
    messages = [
        {"role": "user", "content": "1+1?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2<|im_end|>", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "2", "tool_calls": []},
    ]
    assert learned(tokenizer, {"messages": messages, "tools": [{"type": "function"}]}) == [
        json.dumps([call]) + "2"
    ]
    with pytest.raises(DataError, match="message 0: tool_call_id is not read"):
        learned(tokenizer, {"messages": [{"role": "user", "content": "q", "tool_call_id": "c1"}]})


def test_thinking_is_switched_for_problems_too(huggingface_folder, tmp_path):
    switch = "{% if add_generation_prompt %}[assistant]{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + switch
    with_template(huggingface_folder, tmp_path, template)
    line_of = {"prompt": "q", "domain": "math", "answer": "1"}
    rows = [line_of, line_of | {"chat_template_kwargs": {"enable_thinking": True}}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(
        "huggingface", tmp_path / "hf", chat_template_kwargs={"enable_thinking": False}
    )
    prompts = open_prompts([str(tmp_path / "p.jsonl")], tokenizer, RolloutConfig(), seed=1).next(2)
    assert {tokenizer.decode(p.tokens) for p in prompts} == {
        "[user]q[assistant]",
        "[user]q[assistant]<think></think>",
    }


def test_thinking_is_switched_by_setting_and_by_line(huggingface_folder, tmp_path):
    """Qwen3's switch: off, the prompt ends with an empty thought."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and '<think>' not in m.content %}"
        "<think></think>{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    with_template(huggingface_folder, tmp_path, template)
    path = tmp_path / "a.jsonl"
    on, off = (
        {"chat_template_kwargs": '{"enable_thinking": true}'},
        {"chat_template_kwargs": {"enable_thinking": False}},
    )
    path.write_text("".join(json.dumps(line({"content": "4"}, **names)) + "\n" for names in ({}, on, off)))

    def lessons(**names) -> list[int]:
        found = load_conversations(
            [path],
            tokenizer_type="huggingface",
            tokenizer_model=str(tmp_path / "hf"),
            longest=99,
            chat_template_kwargs=names,
        )
        return [int(found.learned[a:b].sum()) for a, b in zip(found.starts, found.starts[1:], strict=False)]

    thought = len(HuggingFaceTokenizer(tmp_path / "hf").encode("<think></think>"))
    assert lessons() == [2 + thought, 2 + thought, 2]
    assert lessons(enable_thinking=False) == [2, 2 + thought, 2]
    with pytest.raises(DataError, match="does not read thinking_mode; drop it"):
        load_tokenizer("huggingface", tmp_path / "hf", chat_template_kwargs={"thinking_mode": "on"})
    with pytest.raises(DataError, match="chat_template_kwargs"):
        parse_template_kwargs("{")


def test_an_answer_ends_with_the_stop_token_of_its_template(huggingface_folder, tmp_path):
    """As Phi-3.5 and Llama 3, whose turns end with another token than the tokenizer's end of sequence."""
    folder = huggingface_folder
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = with_template(folder, tmp_path, template, generation_config={"eos_token_id": [402, 400]})
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (402, (402, 400))
    ((ids, mask),) = render_samples(
        tokenizer,
        read_conversation(
            line(
                {"content": "4"},
            ),
            "",
        ),
    )
    assert [i for i, own in zip(ids, mask, strict=True) if own] == [*tokenizer.encode("4"), 400]
    assert tokenizer.decode([*tokenizer.encode("4"), 400, 402]) == "4", (
        "a stop token is no part of the answer"
    )
    more = load_tokenizer("huggingface", tmp_path / "hf", stop_token_ids=[401, 17])
    assert more.stop_ids == (402, 400, 401, 17)
    assert more.decode([401]) == "" and more.decode([17]) != "", (
        "an ordinary token that ends an answer belongs to it"
    )
    with pytest.raises(DataError, match=r"stop_token_ids=9999 must be below the tokenizer's"):
        load_tokenizer("huggingface", tmp_path / "hf", stop_token_ids=[9999])
    (tmp_path / "hf" / "config.json").write_text('{"eos_token_id": 7777}')
    with pytest.raises(DataError, match=r"config.json: eos_token_id=7777 is not a token of the tokenizer"):
        HuggingFaceTokenizer(tmp_path / "hf")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "[" * 70 + "]" * 70])
def test_nested_json_is_one_line(text: str):
    with pytest.raises(
        DataError, match=r"a.jsonl:3 is nested too deeply, more than 64 deep|a.jsonl:3 is not JSON"
    ):
        parse_json(text, "a.jsonl:3")
    assert parse_json("[" * 60 + "]" * 60, "a.jsonl:3")


@pytest.mark.parametrize(
    "line",
    [
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages": []}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(line):
    record = Record(raw=line, origin="a.jsonl:1", is_json=True, is_named=True)
    with pytest.raises(
        DataError, match=r"a.jsonl:1 is not JSON \(the key '(content|messages)' is there twice\)"
    ):
        read_line(record)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"messages": []}]', "a.jsonl:1 is a JSON list, not an object; write one conversation per line"),
        (
            '{"conversations": [{"from": "human", "value": "q"}]}',
            "(ShareGPT) each from as role (human is user",
        ),
        ('{"instruction": "q", "output": "a"}', "per line (found keys: instruction, output)"),
    ],
)
def test_another_form_of_conversations_is_named(text: str, said: str):
    with pytest.raises(DataError) as caught:
        read_line(Record(raw=text.encode(), origin="a.jsonl:1", is_json=True, is_named=True))
    assert said in str(caught.value) and "\n" not in str(caught.value)
