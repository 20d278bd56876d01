"""Foreign templates: the names they expect, what they may not do, and what they may not cost."""

import os
import resource
from pathlib import Path

import pytest

from megatron_ring.data.text.template_process import TemplateProcess
from megatron_ring.data.text.templates import ChatTemplate
from megatron_ring.errors import DataError

MESSAGES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def refusal(template: str) -> str:
    with pytest.raises(DataError, match="chat template failed: ") as caught:
        ChatTemplate(template, {}).render(MESSAGES, [(2, False)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    refusal(template.replace("PATH", str(tmp_path / "touched")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_a_template_that_fills_the_memory_is_one_line(template: str):
    line = refusal(template)
    assert "took more than 2 GiB of memory" in line or "more than 8,388,608" in line


@pytest.mark.parametrize(
    "template",
    [
        "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "[" * 100_000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_is_nested_without_end_is_one_line(template: str):
    assert "nested too deeply" in refusal(template)


def test_a_template_that_runs_for_ever_is_stopped_and_the_next_one_is_rendered():
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    process = TemplateProcess(cpu_seconds=0.2)
    with pytest.raises(DataError, match=r"chat template failed: ran for more than 0\.2 s"):
        process.render(endless, MESSAGES, [(2, False)], {})
    assert process.render("{{ messages|length }}", MESSAGES, [(1, False), (2, True)], {}) == ["1", "2"]
    process.close()


def test_templates_have_the_names_they_expect():
    template = "{{ bos_token }}{{ tools is none }}{{ {'a': '\u00e9'} | tojson }}{% break %}"
    looped = ChatTemplate(
        "{% for m in messages %}" + template + "{% generation %}{% endgeneration %}{% endfor %}",
        {"bos_token": "<s>"},
    )
    assert looped.render(MESSAGES, [(2, False)]) == ['<s>True{"a": "\u00e9"}']


def test_half_an_emoji_passes_through_the_process():
    text = "\ud83d \u2028 \x00"
    assert ChatTemplate("{{ messages[0].content }}", {}).render(
        [{"role": "user", "content": text}], [(1, True)]
    ) == [text]


@pytest.mark.parametrize(
    ("source", "key", "read"),
    [
        ("{{ message.reasoning_content }}", "reasoning_content", True),
        ("{{ m['tool_calls'] }}", "tool_calls", True),
        ("{% if 'tool_calls' in message %}{% endif %}", "tool_calls", True),
        ("{{ message.get('name') }}", "name", True),
        ("{{ tool.name }}{{ function['name'] }}{{ tool_call.name }}", "name", False),
        ("{{ message.content.split('x') }}", "split", False),
        ("{{ message.content }}", "reasoning_content", False),
    ],
)
def test_a_template_reads_what_it_asks_a_message_for(source: str, key: str, read: bool):
    assert ChatTemplate(source, {}).reads(key) is read


def test_a_name_that_the_template_does_not_read_is_refused():
    template = ChatTemplate("{{ messages|length if enable_thinking else 'off' }}", {})
    template.use({"enable_thinking": False})
    assert template.render(MESSAGES, [(2, True)]) == ["off"]
    assert template.render(MESSAGES, [(2, True)], names={"enable_thinking": True}) == ["2"]
    with pytest.raises(DataError, match="chat template does not read enable_thinkin; drop it"):
        template.use({"enable_thinkin": False})


def test_a_template_is_rendered_whatever_else_the_process_has_open():
    """select() knows no file number above 1023, and a trainer on many ranks has more sockets than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        template = ChatTemplate("{{ messages[0].content }}", {})
        assert template.render(MESSAGES, [(2, False)]) == ["1+1?"]
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("source", [" " * 2_000_000, "{{ 'a' * 9_000_000 }}"])
def test_a_template_or_text_without_measure_is_refused(source):
    """Reading two megabytes of it is quick, splitting what it makes into tokens is not."""
    with pytest.raises(DataError, match=r"more than [0-9,]+;"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "a"}], [(1, True)])
