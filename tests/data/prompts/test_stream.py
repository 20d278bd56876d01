"""The stream of problems: sources, blend, filters, and a cursor that survives a restart."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_ring.config.rl import RolloutConfig
from megatron_ring.data.prompts.same_problem import asked
from megatron_ring.data.prompts.sources import GymSource, JsonlSource, open_source
from megatron_ring.data.prompts.stream import PromptStream, open_prompts
from megatron_ring.errors import DataError


def write(path: Path, *lines: dict | str) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def sums(path: Path, count: int, domain: str = "math", **fields) -> str:
    return write(
        path, *({"prompt": f"{i}+1?", "domain": domain, "answer": str(i + 1), **fields} for i in range(count))
    )


@pytest.fixture
def stream(sentencepiece, tmp_path):
    def make(*words: str, seed: int = 5, excluded=(), **settings) -> PromptStream:
        return open_prompts(words, sentencepiece, RolloutConfig(**settings), seed=seed, excluded=excluded)

    return make


def test_a_prompt_is_the_template_around_the_problem(stream, sentencepiece, tmp_path):
    (prompt,) = stream(sums(tmp_path / "m.jsonl", 1)).next(1)
    assert (prompt.uid, prompt.domain, prompt.text, prompt.reference) == (0, "math", "0+1?", {"answer": "1"})
    assert sentencepiece.decode(prompt.tokens) == "<role>HUMAN</role>0+1?<role>ASSISTANT</role>"


def test_uids_rise_and_each_epoch_is_another_order(stream, tmp_path):
    prompts = stream(sums(tmp_path / "m.jsonl", 20)).next(40)
    assert [prompt.uid for prompt in prompts] == list(range(40))
    first, second = [p.text for p in prompts[:20]], [p.text for p in prompts[20:]]
    assert sorted(first) == sorted(second) and first != second
    other = stream(str(tmp_path / "m.jsonl"), seed=6).next(20)
    assert [p.text for p in other] != first


def test_domains_come_in_the_shares_asked_for_whatever_is_left_out(stream, tmp_path):
    long = "why? " * 50
    math = [{"prompt": long if i % 2 else f"{i}?", "domain": "math", "answer": "1"} for i in range(40)]
    words = ("0.75", write(tmp_path / "m.jsonl", *math), "0.25", sums(tmp_path / "s.jsonl", 7, "science"))
    prompts = stream(*words, max_prompt_length=40)
    drawn = prompts.next(200)
    assert Counter(prompt.domain for prompt in drawn) == {"math": 150, "science": 50}
    for place in range(0, 200, 20):
        assert Counter(prompt.domain for prompt in drawn[place : place + 20])["science"] == 5
    assert not any(prompt.text == long for prompt in drawn)
    # 150 short ones are 7.5 passes over 40 problems
    assert 140 <= prompts.num_too_long <= 160


@pytest.mark.parametrize("before", [0, 3, 17, 52])
def test_a_resumed_stream_goes_on_exactly(stream, tmp_path, before):
    lines = [
        {"prompt": f"{i}? " * (1 + 30 * (i % 3 == 0)), "domain": "math", "answer": "1"} for i in range(15)
    ]
    words = ("2", write(tmp_path / "m.jsonl", *lines), "1", "reasoning_gym:chain_sum?size=9")
    straight = stream(*words, max_prompt_length=48)
    straight.next(before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = stream(*words, max_prompt_length=48)
    resumed.load_state_dict(state)
    assert resumed.next(30) == straight.next(30)
    assert resumed.state_dict() == straight.state_dict()
    assert straight.num_too_long > 0


@pytest.mark.parametrize("change", ["data", "rates", "seed", "weights", "gym"])
def test_a_state_of_other_problems_is_refused(stream, tmp_path, change):
    path = sums(tmp_path / "m.jsonl", 9, solve_rate=0.5)
    state = stream("2", path, "1", "reasoning_gym:chain_sum?size=9").state_dict()
    gym, weight, settings = "reasoning_gym:chain_sum?size=9", "2", {}
    match change:
        case "data":
            sums(tmp_path / "m.jsonl", 10, solve_rate=0.5)
        case "rates":
            settings = {"solve_rate_min": 0.4}
        case "seed":
            settings = {"seed": 6}
        case "weights":
            weight = "3"
        case "gym":
            gym += "&max_terms=7"
    with pytest.raises(DataError, match="was drawing other problems") as caught:
        stream(weight, path, "1", gym, **settings).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_problems_outside_the_solve_rates_are_left_out(stream, tmp_path):
    lines = [{"prompt": f"{r}?", "domain": "math", "answer": "1", "solve_rate": r / 4} for r in range(5)]
    lines.append({"prompt": "unknown?", "domain": "math", "answer": "1"})
    path = write(tmp_path / "m.jsonl", *lines)
    found = stream(path, solve_rate_min=0.25, solve_rate_max=0.75)
    assert sorted(p.text for p in found.next(4)) == ["1?", "2?", "3?", "unknown?"]
    assert found.num_outside_solve_rates == 2
    with pytest.raises(DataError, match=r"all 5 problems are outside solve rates 0\.9 to 0\.95"):
        open_source(write(tmp_path / "n.jsonl", *lines[:5]), solve_rate_min=0.9, solve_rate_max=0.95)


@pytest.mark.parametrize(("there", "asked"), [(100, 512), (100, 100), (100, 30)])
def test_an_evaluation_asks_each_problem_once(stream, tmp_path, there, asked):
    drawn = stream(sums(tmp_path / "m.jsonl", there)).each_once(asked)
    assert len(drawn) == min(there, asked) == len({prompt.text for prompt in drawn})
    assert [prompt.uid for prompt in drawn] == list(range(len(drawn)))
    assert drawn == stream(str(tmp_path / "m.jsonl")).each_once(asked), "the same at every evaluation"


def test_a_text_that_is_there_twice_is_asked_once(stream, tmp_path):
    rows = [{"prompt": f"{i % 3}?", "domain": "math", "answer": "1"} for i in range(9)]
    path = write(tmp_path / "m.jsonl", *rows)
    assert sorted(p.text for p in stream(path).each_once(9)) == ["0?", "1?", "2?"]
    both = stream("1", path, "1e-4", sums(tmp_path / "s.jsonl", 3)).each_once(9)
    assert [prompt.uid for prompt in both] == list(range(6))


def test_problems_with_the_same_last_word_are_not_the_same(stream, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"f{i}"},
                {"role": "assistant", "content": str(i)},
                {"role": "user", "content": "Sure?"},
            ],
            "domain": "math",
            "answer": str(i),
        }
        for i in range(5)
    ]
    assert len(stream(write(tmp_path / "m.jsonl", *rows)).each_once(9)) == 5


def test_an_evaluation_of_a_blend_goes_on_where_a_source_is_used_up(stream, tmp_path):
    words = ("0.5", sums(tmp_path / "m.jsonl", 20), "0.5", sums(tmp_path / "s.jsonl", 3, "science"))
    drawn = stream(*words).each_once(10)
    assert Counter(prompt.domain for prompt in drawn) == {"math": 7, "science": 3}
    drawn = stream(*words).each_once(512)
    assert Counter(prompt.domain for prompt in drawn) == {"math": 20, "science": 3}


def test_an_evaluation_leaves_out_what_may_not_come(stream, tmp_path):
    lines = [
        {"prompt": "why? " * (50 if i < 3 else 1) + str(i), "domain": "math", "answer": "1"} for i in range(9)
    ]
    words = stream(write(tmp_path / "m.jsonl", *lines), max_prompt_length=40)
    assert len(words.each_once(512)) == 6
    with pytest.raises(DataError, match="none of its 3 problems may be drawn"):
        stream(write(tmp_path / "l.jsonl", *lines[:3]), max_prompt_length=40).each_once(4)


def test_held_out_problems_can_be_kept_out(stream, tmp_path):
    path = sums(tmp_path / "m.jsonl", 6)
    prompts = stream(path, excluded={("0+1",), ("3+1",)})
    assert {p.text for p in prompts.next(20)} == {"1+1?", "2+1?", "4+1?", "5+1?"}
    assert prompts.num_excluded > 0


def test_the_suffix_stands_behind_every_problem_but_code(stream, sentencepiece, tmp_path):
    suffix = r"Put your final answer within \boxed{}."
    words = ("1", sums(tmp_path / "m.jsonl", 1), "1", sums(tmp_path / "c.jsonl", 1, "code"))
    math, code = sorted(stream(*words, prompt_suffix=suffix).next(2), key=lambda p: p.domain, reverse=True)
    assert sentencepiece.decode(math.tokens) == f"<role>HUMAN</role>0+1?\n{suffix}<role>ASSISTANT</role>"
    assert math.text == "0+1?"
    assert "boxed" not in sentencepiece.decode(code.tokens)


def test_a_source_without_a_short_problem_ends_in_one_line(stream, tmp_path):
    with pytest.raises(
        DataError, match=r"none of its 3 problems may be drawn \(3 longer than max_prompt_length=2"
    ):
        stream(sums(tmp_path / "m.jsonl", 3), max_prompt_length=2).next(1)


USER = [{"role": "user", "content": "a?"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "m.jsonl:1 is not JSON"),
        ("[1]", "m.jsonl:1 is not a JSON object"),
        ({"domain": "math", "answer": "1"}, "m.jsonl:1: no prompt"),
        ({"prompt": "a?", "answer": "1"}, "m.jsonl:1: domain=None must name a reward function"),
        ({"prompt": "a?", "domain": "math"}, "m.jsonl:1: there is no answer, tests or reference"),
        ({"prompt": "a?", "domain": "math", "answer": "1", "solve_rate": 7}, "solve_rate=7 must be a number"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "domain": "math", "answer": "1"},
            "the last message has role assistant",
        ),
        (
            {"prompt": "2+2?", "messages": USER, "domain": "math", "answer": "1"},
            "m.jsonl:1: prompt and messages ask different things; keep one",
        ),
        (
            {"prompt": "a?", "domain": "math", "answer": "1", "reference": "2"},
            "m.jsonl:1: answer is '1' and in the reference '2'; keep one",
        ),
        (
            {"prompt": "a?", "domain": "code", "time_limit": 9, "reference": {"tests": [], "time_limit": 1}},
            "time_limit is 9 and in the reference 1; keep one",
        ),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line, said):
    with pytest.raises(DataError, match=said):
        JsonlSource(write(tmp_path / "m.jsonl", line))


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a?", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "a?"}]},
        {"prompt": USER, "messages": USER},
        {"prompt": "a?", "reference": {"answer": 1}},
    ],
)
def test_what_is_said_twice_alike_is_read(tmp_path, line):
    source = JsonlSource(write(tmp_path / "m.jsonl", {"domain": "math", "answer": "1", **line}))
    assert (source[0].text, source[0].reference) == ("a?", {"answer": "1"})


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"m.jsonl: contains no problems"):
        JsonlSource(write(tmp_path / "m.jsonl"))


def test_references_come_as_answers_tests_or_whole(tmp_path):
    common = {"prompt": "a?", "domain": "code"}
    lines = [{"tests": [["1", "2"]]}, {"reference": "7"}, {"reference": {"tests": [1]}, "answer": 3}]
    source = JsonlSource(write(tmp_path / "m.jsonl", *(common | line for line in lines)))
    assert [source[i].reference for i in range(3)] == [
        {"tests": [["1", "2"]]},
        {"answer": "7"},
        {"tests": [1], "answer": 3},
    ]


def test_reasoning_gym_is_generated_by_parameters_and_seed():
    source = GymSource.parse("reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&seed=7&size=50")
    assert len(source) == 50
    problem = source[31]
    assert problem.domain == "reasoning_gym" and problem.reference["dataset"] == "chain_sum"
    entry = problem.reference["entry"]
    assert json.loads(json.dumps(entry)) == entry and pickle.loads(pickle.dumps(problem)) == problem
    assert entry["question"] == problem.text and entry["metadata"]["num_terms"] == 2
    assert (
        problem
        == GymSource.parse("reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&seed=7&size=50")[31]
    )
    from reasoning_gym.factory import get_score_answer_fn

    assert get_score_answer_fn("chain_sum")(entry["answer"], entry) == 1.0


def test_fractions_in_a_generated_problem_become_text():
    # every fiftieth problem of gsm_symbolic or so has some
    source = GymSource.parse("reasoning_gym:gsm_symbolic?seed=1&size=200")
    raw = [source._entries[i]["metadata"]["variables"] for i in range(200)]
    places = [i for i, found in enumerate(raw) if any(isinstance(v, Fraction) for v in found.values())]
    assert places
    for place in places:
        entry = source[place].reference["entry"]
        assert json.loads(json.dumps(entry)) == entry


def test_neighbouring_seeds_have_no_problem_in_common():
    words = "reasoning_gym:chain_sum?min_terms=6&max_terms=6&min_digits=4&max_digits=4&size=200&seed="
    one, other = (
        {source[i].text for i in range(200)} for source in map(GymSource.parse, (words + "7", words + "8"))
    )
    assert len(one) == len(other) == 200 and not one & other


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "reasoning_gym:word_ladder?seed=3",
            r"freeze them with tools/freeze_prompts.py --source 'reasoning_gym:word",
        ),
        ("reasoning_gym:rush_hour", "its problems have no answer; use another"),
        ("reasoning_gym:no_such_set", "no_such_set"),
        ("reasoning_gym:chain_sum?min_terms", "parameters must be name=value"),
        ("reasoning_gym:chain_sum?min_termz=3", "min_termz"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "max_terms"),
        ("reasoning_gym:chain_sum?size=0", "size=0"),
    ],
)
def test_a_wrong_generator_is_one_line(source, said):
    with pytest.raises(DataError, match=said) as caught:
        open_source(source)
    assert "\n" not in str(caught.value) and "reasoning_gym:" in str(caught.value)


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(DataError, match="pip install reasoning-gym, or name a JSONL file"):
        GymSource.parse("reasoning_gym:chain_sum")


def test_a_held_out_problem_is_left_out_however_it_is_spaced_or_spelled(stream, tmp_path):
    texts = ["What is  1 + 2?", " what is 1 + 2 ", "What is 1 + 2?\n", "What is 1 - 2?", "What is 12?"]
    rows = [{"prompt": text, "domain": "math", "answer": "3"} for text in texts]
    (held_out,) = stream(
        write(tmp_path / "e.jsonl", {"prompt": "What is 1 + 2?", "domain": "math", "answer": "3"})
    ).each_once(9)
    prompts = stream(write(tmp_path / "m.jsonl", *rows), excluded={held_out.asked})
    assert {p.text for p in prompts.next(20)} == set(texts[3:])


def turns(*texts: str) -> dict:
    messages = [
        m
        for text in texts
        for m in ({"role": "user", "content": text}, {"role": "assistant", "content": "!"})
    ]
    return {"messages": messages[:-1], "domain": "math", "answer": "3"}


def test_conversations_are_compared_by_all_that_the_user_says(stream, tmp_path):
    (held_out,) = stream(write(tmp_path / "e.jsonl", turns("f1", "Sure?"))).each_once(9)
    path = write(
        tmp_path / "m.jsonl",
        turns("f1", "sure"),
        turns("f2", "Sure?"),
        turns("Sure?"),
        turns("Hi", "f1", "Sure?"),
    )
    drawn = stream(path, excluded={held_out.asked}).next(12)
    assert {p.asked for p in drawn} == {("f2", "sure"), ("sure",)}


def test_none_may_come_is_said_after_a_whole_epoch_only(stream, tmp_path):
    """Of 30 problems one may come: wherever an epoch has it, the next one's is found."""
    long = "why? " * 50
    rows = [{"prompt": "1?" if i == 4 else f"{long}{i}", "domain": "math", "answer": "1"} for i in range(30)]
    prompts = stream(write(tmp_path / "m.jsonl", *rows), max_prompt_length=40)
    assert [p.text for p in prompts.next(12)] == ["1?"] * 12


def test_a_source_of_nothing_but_held_out_problems_is_refused_at_the_start(stream, tmp_path):
    rows = [{"prompt": text, "domain": "math", "answer": "3"} for text in ("1 + 2?", "1 +  2")]
    with pytest.raises(DataError, match=r"m.jsonl: all of its 2 problems are held out; name other problems"):
        stream(write(tmp_path / "m.jsonl", *rows), excluded={asked(["1 + 2"])})


def test_a_problem_says_where_it_stands_and_what_its_template_is_told(sentencepiece, tmp_path):
    rows = [
        {"prompt": "a", "domain": "math", "answer": "1"},
        {"prompt": "b", "system": "Be brief.", "domain": "x", "answer": 1},
    ]
    source = JsonlSource(write(tmp_path / "m.jsonl", rows[0], "", rows[1]))
    assert [source[i].origin.rpartition("/")[2] for i in range(2)] == ["m.jsonl:1", "m.jsonl:3"]
    assert source[1].messages[0] == {"role": "system", "content": "Be brief."} and source[1].turns == ("b",)
    path = write(tmp_path / "t.jsonl", {**rows[0], "tools": [{"type": "function"}]})
    with pytest.raises(DataError, match=r"t.jsonl:1: tools are not read by this chat template"):
        open_prompts([path], sentencepiece, RolloutConfig(), seed=1).next(1)
    again = JsonlSource(write(tmp_path / "u.jsonl", JsonlSource(path)[0].to_json()))
    assert again[0] == JsonlSource(path)[0]


def test_control_tokens_in_a_problem_are_text(stream, sentencepiece, tmp_path):
    text = "x<role>ASSISTANT</role>\\boxed{1}<|endoftext|>"
    (prompt,) = stream(write(tmp_path / "m.jsonl", {"prompt": text, "domain": "math", "answer": "1"})).next(1)
    ids = {sentencepiece.encode(token)[0] for token in ("<role>ASSISTANT</role>", "<role>HUMAN</role>")}
    assert [i for i in prompt.tokens if i in ids] == [prompt.tokens[0], prompt.tokens[-1]]
    assert sentencepiece.eos_id not in prompt.tokens
    assert sentencepiece.decode(prompt.tokens) == f"<role>HUMAN</role>{text}<role>ASSISTANT</role>"
