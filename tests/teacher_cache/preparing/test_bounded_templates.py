"""Chat templates within bounds: honest ones write the same, hostile ones end soon, small and with a reason."""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from teacher_cache.preparing import bounded_templates
from teacher_cache.preparing.bounded_templates import BoundedEnvironment, bounded, counting

TALK = [
    {"role": "system", "content": "Be brief & <b>."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is\n3 < 4?"}]},
    {"role": "assistant", "content": "A fact: 你好.\n\nYes."},
    {"role": "user", "content": "Is it?"},
]
HONEST = {
    "parts": """{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['content'] is string %}
{{- message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "counters": """{%- set ns = namespace(images=0, last=none) %}{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set rest = messages[1:] %}{%- else %}{%- set system = '' %}
{%- set rest = messages %}{%- endif %}{{- bos_token ~ '[' ~ system ~ ']' }}{%- for m in rest %}
{%- if loop.first %}{{ '1st ' }}{% endif %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('turns must alternate') }}{%- endif %}{%- if m.content is not string %}{%- for c in m.content %}
{%- if c.type == 'image' or 'image_url' in c %}{%- set ns.images = ns.images + 1 %}{{ 'Picture ' ~ ns.images ~ ': ' }}
{%- else %}{{ c.text | trim }}{%- endif %}{%- endfor %}{%- else %}{{ m.content.strip().split('</think>')[-1].lstrip('\\n') }}
{%- endif %}{{- '\\n' * 2 }}{%- endfor %}""",
    "tools": """{%- macro write(m, wide=false) -%}{{ m.role | upper }}: {% if m.content is string %}{{ m.content | replace('\\n', ' ') }}
{%- else %}{{ m.content | map(attribute='type') | join(', ') }}{% endif %}{% if wide %}!{% endif %}{%- endmacro -%}
{%- for m in messages if m.role != 'system' -%}{{ write(m, loop.last) }}
{% endfor %}{{ messages | tojson(indent=2) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- '%s of %d' % ('one', messages | length) }}{{ '{:>4}|{}'.format('ab', 3) }}{{ 'x'.ljust(4) }}{{ [1, 2, 3] | sum }}
{%- generation %}{{ messages[-1].content }}{% endgeneration %}{% set block %}a{{ 1 + 1 }}{% endset %}{{ block }}
{%- for k, v in messages[0].items() %}{{ k ~ '=' ~ v | string | indent(2) }}{% endfor %}{{ range(3) | list }}{{ none }}
{%- with a = 'b' %}{{ a }}{% endwith %}{{ messages[9] | default('none') }}{{ 2 ** 10 * 3 }}{% set x = [1] + [2] %}{{ x }}
{%- filter upper %}loud{% endfilter %}{% macro outer() %}({{ caller() }}){% endmacro %}{% call outer() %}c{% endcall %}{{ dict(a=1).a }}""",
}


def plain(template: str, **given: Any) -> str:
    """As transformers renders it without us."""
    before = chat_template_utils.ImmutableSandboxedEnvironment
    chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment  # type: ignore[attr-defined]
    try:
        return chat_template_utils._cached_compile_jinja_template(template).render(**given)
    finally:
        chat_template_utils.ImmutableSandboxedEnvironment = before  # type: ignore[attr-defined]


def render(template: str, messages: Any = TALK, **given: Any) -> str:
    with bounded():
        return render_jinja_template([messages], chat_template=template, bos_token="<s>", **given)[0][0]


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("prompt", [False, True])
def test_honest_templates_write_the_same(name: str, prompt: bool) -> None:
    whole = {"messages": TALK, "bos_token": "<s>", "add_generation_prompt": prompt}
    wanted = plain(HONEST[name], **whole)
    assert wanted and render(HONEST[name], add_generation_prompt=prompt) == wanted


LIST = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
HOSTILE = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
    "silent loops": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "a range": "{{ range(10**12) | list }}",
    "letters": "{{ 'a' * 10**10 }}",
    "letters turned round": "{{ 10**10 * 'a' }}",
    "letters without a power": "{{ 'a' * 10000000000 }}",
    "letters in a condition": "{% if 'a' * 10**10 %}{% endif %}",
    "a list": "{% set x = [0] * 10**9 %}",
    "a tuple": "{% set x = (0, 1) * 10**9 %}",
    "a power": "{{ 10 ** 100000000 }}{{ 10 ** 100 ** 100 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": LIST + "{% set n.x = n.x + n.x %}{% endfor %}",
    "nested lists": LIST + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested dicts": LIST + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "nested by map": LIST + "{% set n.x = ['', ''] | map('default', n.x, true) | list %}{% endfor %}{{ n.x }}",
    "namespaces in lists": "{% set n = namespace(x=1) %}{% set l = [n, n] %}{% set n.x = l %}{{ l }}",
    "in a block": "{% set x %}{% for i in range(100000) %}{{ messages[0].content * 1000 }}{% endfor %}{% endset %}",
    "blocks of blocks": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set b %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = b %}{% endfor %}",
    "a macro that calls itself": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('aaaa') }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a caller": "{% macro f(x) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f(1) %}" * 30
    + "x"
    + "{% endcall %}" * 30,
    "recursive loops": "{% for a in [messages] recursive %}{{ loop([a]) }}{{ loop([a]) }}{% endfor %}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "rjust": "{{ 'x'.rjust(1000000000) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\\t' * 3000).expandtabs(1000000) }}",
    "the filter center": "{{ 'x' | center(1000000000) }}",
    "indent": "{{ ('a\\n' * 1000) | indent(1000000) }}",
    "indent by a text": "{{ ('a\\n' * 100000) | indent('x' * 100000) }}",
    "indent by name": "{{ 'a\\nb' | indent(width=1000000000) }}",
    "join": "{{ range(100000) | join('x' * 100000) }}",
    "join as a method": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "join of what is made": "{{ range(100000) | map('string') | map('replace', '1', 'x' * 100000) | join }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace of nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "the filter replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "a format's width": "{{ '%1000000000d' % 1 }}",
    "a format's star": "{{ '%*d' % (1000000000, 1) }}",
    "a format's precision": "{{ '%.1000000000f' % 1.0 }}",
    "the filter format": "{{ '%1000000000s' | format('x') }}",
    "str.format": "{{ '{:1000000000}'.format('x') }}",
    "str.format of a width": "{{ '{:{}}'.format('x', 1000000000) }}",
    "str.format of a key": "{{ '{a:>1000000000}'.format(a='x') }}",
    "many fields": "{{ ('{0}' * 10000).format('x' * 100000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000) }}",
    "tojson": "{{ [[1]] * 1000 | tojson(indent=1000000) }}{{ ([[1]] * 1000) | tojson(indent=1000000) }}",
    "lipsum": "{{ lipsum(100000000) }}",
    "strftime": "{{ strftime_now('%A' * 10000000) }}",
    "quotes of quotes": "{% set n = namespace(x='\"') %}{% for i in range(60) %}{% set n.x = n.x | tojson %}{% endfor %}",
    "one long expression": "{% set a = 'x' * 3000000 %}{{ " + "a ~ " * 3000 + "a }}",
    "one long sum": "{% set a = 'x' * 3000000 %}{% set b = " + "a + " * 200 + "a %}",
    "comparisons": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
    "{% endfor %}{{ n.x == n.y }}",
    "stripping": "{{ ('a' * 3000000).strip('b' * 3000000 ~ 'a') }}",
    "the filter trim": "{{ ('a' * 3000000) | trim('b' * 3000000 ~ 'a') }}",
    "a long number": "{{ ('f' * 3000000) | int(base=16) // 3 }}",
    "addresses": "{{ ('http://' * 400000) | urlize }}",
    "markup": "{{ ('<' * 3000000) | striptags }}",
    "lazy chains": "{{ ('a' * 3000000)" + " | map('upper') | map('lower')" * 60 + " | list | length }}",
    "generation": "{% for i in range(100000) %}{% generation %}{{ messages[1] | string * 1000 }}{% endgeneration %}{% endfor %}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "length": "a" * (2 << 20),
    "a width behind a key": "{{ '%(a)999999999d' % {'a': 1} }}",
    "many widths": "{{ ('%99999d' * 10000) % ((1,) * 10000) }}",
    "many widths of str.format": "{{ ('{0:99999}' * 10000).format(1) }}",
    "a tuple of texts": "{% set a = 'x' * 3900000 %}{% if (" + "a ~ '0'," * 300 + ") %}{% endif %}",
    "arguments": "{% set a = 'x' * 3900000 %}{{ dict(" + ",".join(f"k{i}=a ~ '0'" for i in range(200)) + ") }}",
    "parts in a list": "{% set a = 'x' * 3900000 %}{% set b = [" + "a[1:]," * 300 + "] %}",
    "parts of a list": "{% set a = [1] * 400000 %}{% set b = [" + "a[1:]," * 300 + "] %}",
    "sums of lists": "{{ ([['a'] * 100] * 3000) | sum(start=[]) | length }}",
    "groups": "{{ (messages * 9999) | groupby('x', default='y' * 100000) | string | length }}",
    "attributes": "{{ messages * 999 | sort(attribute='role,' * 9999) }}{{ (messages * 999) | sort(attribute='role,' * 9999) }}",
    "indent of tojson": "{{ ([[[[1]]]] * 1000) | tojson(indent='x' * 100000) | length }}",
    "separators": "{{ ([1] * 100000) | tojson(separators=('x' * 100000, 'y')) | length }}",
    "an encoding": "{{ ('é' * 300000).encode('idna') }}",
    "written in pieces": "{% set a = 'ß' * 3900000 %}" + "{{ a | upper }}" * 60,
    "filters of filters": "{% for i in range(100000) %}{{ messages | tojson | length }}{% endfor %}" * 9,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(name: str) -> None:
    with bounded():  # what importing costs is none of theirs
        render_jinja_template([TALK], chat_template="{{ 1 }}")
    largest, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        render(HOSTILE[name])
        said = ""
    except Exception as error:  # pytest would print the whole template
        said = f"{type(error).__name__}: {error}"
    assert said and "MemoryError" not in said
    assert time.thread_time() - started < 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest) * 1024 < 400e6


BIG = "{% set a = 'a' * 3900000 %}{% set b = 'a' * 2000000 ~ 'b' %}{% set l = [1] * 400000 %}"
SLOW = {
    "in a loop": BIG + "{% for i in range(99999) %}{% if b in a %}{% endif %}{% endfor %}",
    "in few turns": BIG + "{% for i in 'xy' %}" * 16 + "{% if b in a %}{% endif %}" + "{% endfor %}" * 16,
    "in a straight line": BIG + "{{ b in a }}" * 9999,
    "in a macro": BIG + "{% macro f(n) %}{{ b in a }}{{ f(n) }}{% endmacro %}" + "{% if f(1) %}{% endif %}" * 999,
    "equal": BIG + "{% set c = 'a' * 3900000 %}" + "{{ a == c }}" * 9999,
    "parts": BIG + "{% for i in range(99999) %}{% if l[1:] == 1 %}{% endif %}{% endfor %}",
    "find": BIG + "{% for i in range(99999) %}{% set x = a.find('b') %}{% endfor %}",
    "find backwards": BIG + "{{ a.rfind('b' ~ 'a' * 99999) }}",
    "isalpha": BIG + "{% for i in range(99999) %}{% if a.isalpha() %}{% endif %}{% endfor %}",
    "a test": BIG + "{{ a is lower }}" * 9999,
    "sort": "{% for i in range(1000) %}{% set x = range(99999) | list | sort(reverse=true) %}{% endfor %}",
    "max": BIG + "{{ a[:99999] | max }}" * 999,
    "float": BIG + "{{ a | float }}" * 9999,
    "the item before": "{% for c in 'x' * 999999 %}{{ loop.previtem is defined }}{% if loop.changed(c) %}{% endif %}{% endfor %}",
    "a recursive loop": BIG
    + "{% for i in [1] recursive %}{% if b in a %}{% endif %}{{ loop(range(999)) if loop.depth < 9 }}{% endfor %}",
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_templates_are_seen_wherever_their_time_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "SECONDS", 0.1)
    with bounded():
        render_jinja_template([TALK], chat_template="{{ 1 }}")
    chat_template_utils._compile_jinja_template(SLOW[name])
    started = time.thread_time()
    with pytest.raises(bounded_templates.TooMuch):
        render(SLOW[name])
    assert time.thread_time() - started < 1.5


def test_outside_of_the_bounds_nothing_is_counted() -> None:
    bounded_templates.install()
    long = "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ 'a' * 5000000 }}"
    assert len(render_jinja_template([TALK], chat_template=long)[0][0]) == 5_000_000


def test_each_thread_counts_its_own_rows() -> None:
    template = "{% for i in range(90000) %}{% endfor %}x"
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.extend(render(template) for _ in range(4))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert said == ["x"] * 16


def test_an_unknown_way_to_render_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_cache.errors import CompatibilityError

    bounded_templates.install.cache_clear()
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", lambda source: None)
    with pytest.raises(CompatibilityError, match="cannot be bounded"):
        render("{{ 1 }}")
    monkeypatch.undo()
    bounded_templates.install.cache_clear()
    bounded_templates.install()
    assert isinstance(chat_template_utils._compile_jinja_template("x").environment, BoundedEnvironment)
