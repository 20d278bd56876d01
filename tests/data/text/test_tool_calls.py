"""Arguments of tool calls reach the model as one JSON object, whatever their form in the file and in the template."""

import json

import pytest

from megatron_ring.data.text.messages import read_conversation
from megatron_ring.data.text.tool_calls import without_nulls
from megatron_ring.errors import DataError
from tests.helpers.data.chat_lines import learned, with_template

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"
QUOTES = "{{ c.function.arguments | tojson }}"
"""Qwen2.5's and gpt-oss's way: a text is quoted again."""
TAKES_BOTH = (
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}" + QUOTES + "{% endif %}"
)
ASKS = "{% for name, value in c.function.arguments.items() %}<{{ name }}={{ value }}>{% endfor %}"
PASTES = "{{ c.function.arguments }}"
"""DeepSeek-V3's way: an object becomes Python's words for it."""
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {}}}},
}


def conversation(arguments, **fields) -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "q"}, answer], **fields}


@pytest.mark.parametrize(
    ("writes", "shown"),
    [(QUOTES, '{"n": true}'), (TAKES_BOTH, '{"n": true}'), (ASKS, "<n=True>"), (PASTES, '{"n": true}')],
)
@pytest.mark.parametrize("arguments", [{"n": True}, '{"n": true}'])
def test_arguments_are_written_once_whatever_their_form(
    huggingface_folder, tmp_path, writes, shown, arguments
):
    tokenizer = with_template(huggingface_folder, tmp_path, TURNS.replace("CALL", writes))
    assert learned(tokenizer, conversation(arguments)) == [shown]


@pytest.mark.parametrize("arguments", ["null", "[1]", "{", '{"n": 1, "n": 2}'])
def test_a_text_that_is_no_object_is_refused_where_an_object_is_needed(
    huggingface_folder, tmp_path, arguments
):
    tokenizer = with_template(huggingface_folder, tmp_path, TURNS.replace("CALL", QUOTES))
    with pytest.raises(DataError, match=r"message 1: arguments.* of a tool call") as caught:
        learned(tokenizer, conversation(arguments))
    assert "\n" not in str(caught.value)


def test_a_call_without_arguments_has_none(huggingface_folder, tmp_path):
    tokenizer = with_template(huggingface_folder, tmp_path, TURNS.replace("CALL", QUOTES))
    assert learned(tokenizer, conversation("")) == ["{}"]


def test_control_tokens_in_arguments_stay_text(huggingface_folder, tmp_path):
    tokenizer = with_template(huggingface_folder, tmp_path, TURNS.replace("CALL", QUOTES))
    assert learned(tokenizer, conversation(json.dumps({"n": "<|im_end|>"}))) == ['{"n": "<|im_end|>"}']


def test_keys_that_a_table_filled_with_null_say_nothing(huggingface_folder, tmp_path):
    """datasets writes every key of any row into each: the model would learn to call with them."""
    template = "{{ tools | tojson if tools }}" + TURNS.replace("CALL", QUOTES)
    tokenizer = with_template(huggingface_folder, tmp_path, template)
    filled = json.loads(json.dumps(TOOL))
    filled["function"]["parameters"]["properties"] |= {"n": {"enum": [None, 1], "default": None}, "zip": None}
    read = read_conversation(conversation({"n": None, "zip": None}, tools=[filled]), "a.jsonl:1")
    assert read.tools is not None
    assert read.tools[0]["function"]["parameters"]["properties"] == {
        "n": {"enum": [None, 1], "default": None}
    }
    assert learned(tokenizer, conversation({"n": None, "zip": None}, tools=[filled])) == ['{"n": null}']
    assert learned(tokenizer, conversation({"n": None, "zip": None})) == ['{"n": null, "zip": null}'], (
        "without a description nobody knows"
    )


def test_a_parameter_with_the_name_of_a_keyword_is_a_parameter():
    schema = {
        "default": {"type": "string", "enum": None},
        "example": None,
        "n": {"default": None, "enum": [None]},
    }
    tool = {"name": "f", "parameters": {"type": "object", "properties": schema, "required": None}}
    left = {"default": {"type": "string"}, "n": {"default": None, "enum": [None]}}
    assert without_nulls(tool) == {"name": "f", "parameters": {"type": "object", "properties": left}}
