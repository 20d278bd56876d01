"""Lines of problems that say a thing twice: the same is read, two things are refused."""

import pytest

from megatron_ring.data.prompts.problem_lines import read_problem
from megatron_ring.errors import DataError


@pytest.mark.parametrize(
    "content", ["What is  2? ", "What is 2?\nBox it.", [{"type": "text", "text": "What is 2?"}]]
)
def test_a_prompt_that_stands_in_the_messages_asks_the_same(content: object):
    messages = [{"role": "user", "content": content}]
    line = {"prompt": "What is 2?", "messages": messages, "domain": "math", "answer": "2"}
    assert read_problem(line, "m.jsonl:1").reference == {"answer": "2"}
    with pytest.raises(DataError, match="ask different things"):
        read_problem({**line, "prompt": "What is 2?2"}, "m.jsonl:1")


@pytest.mark.parametrize("key", ["fn_name", "function"])
def test_a_function_of_two_names_is_refused(key: str):
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}
    line = {"prompt": "a?", "domain": "code", "tests": tests, key: "f"}
    assert read_problem(line, "m.jsonl:1").reference["function"] == "f"
    with pytest.raises(DataError, match="two names"):
        read_problem({**line, key: "g"}, "m.jsonl:1")
