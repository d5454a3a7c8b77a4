"""Other people's chat templates: how content is passed, what is refused, where labels stand; ids are transformers' own."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import PIL.Image
import pytest

from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.preparing.chat import Chat
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Image, Prepared, Sample, Turn
from teacher_cache.sources.usable_samples import decode_image
from tests.teacher_cache.preparing.tokenizers_by_hand import llama_like, qwen_like

PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def each(body: str, messages: str = "messages", prompt: str = PROMPT) -> str:
    """A template in the demo's marks; body: what it writes of message ``m``."""
    return f"{{% for m in {messages} %}}<|{{{{ m['role'] }}}}|>{body}<|end|>{{% endfor %}}{prompt}"


def parts(text: str = "p['text']", image: str = "<image>\\n") -> str:
    return (
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '" + image + "' }}"
        "{% elif p['type'] == 'text' %}{{ " + text + " }}{% endif %}{% endfor %}"
    )


STRING = "{{ m['content'] + '' }}"
BOTH = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts() + "{% endif %}"
RAISES = "{{ raise_exception('No user query found in messages.') }}"
TALK = (("user", "Look: <image>\nRed?"), ("assistant", "Red?"), ("user", "Red?"), ("assistant", " Yes, red. "))
SYSTEM = (("system", "Be brief."), ("user", "What?\n<image>"), ("assistant", "Green."))
TEXT = (("user", "Say it"), ("assistant", "It."))


def with_template(loaded: tuple[Any, Any], template: str, version: int = 2) -> Preparer:
    processor, config = loaded
    processor = copy.copy(processor)
    processor.chat_template = template
    return Preparer(processor, config, version=version)


def png(size: tuple[int, int] = (96, 96)) -> Image:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, "red").save(buffer, "png")
    return Image("a.png", buffer.getvalue())


def sample(turns: Any) -> Sample:
    images = sum(text.count("<image>") for _, text in turns)
    return Sample("sft", 0, "", "here", tuple(Turn(*turn) for turn in turns), (png(),) * images)


def said(preparer: Preparer, made: Prepared) -> list[str]:
    """The labels of every answer."""
    text = made.text
    spans = [text.ids[text.response & (text.turn == turn)] for turn in text.turn[text.response].unique()]
    return [preparer.tokenizer.decode(ids.tolist()) for ids in spans]


@pytest.mark.parametrize(
    ("template", "style", "talk"),
    [
        (each(BOTH), "parts", ["Red?<|end|>", " Yes, red. <|end|>"]),
        (each(parts("p['text'] | trim")), "parts", ["Red?<|end|>", "Yes, red.<|end|>"]),
        (each(STRING), "strings", ["Red?<|end|>", " Yes, red. <|end|>"]),
        (each("{{ m['content'] | trim }}"), "strings", ["Red?<|end|>", "Yes, red.<|end|>"]),
        (each("{{ m['content'][0]['text'] }}{{ m['content'] }}"), "strings", ["Red?<|end|>", " Yes, red. <|end|>"]),
        (
            each("{% if m['content'] is string %}{{ m['content'] }}{% endif %}"),
            "strings",
            ["Red?<|end|>", " Yes, red. <|end|>"],
        ),
        (each("{{ m.content.split('</i>')[-1].lstrip('\\n') }}"), "strings", ["Red?<|end|>", " Yes, red. <|end|>"]),
        (
            each("{% if m['role'] == 'user' %}" + parts() + "{% else %}" + STRING + "{% endif %}"),
            "parts of users alone",
            ["Red?<|end|>", " Yes, red. <|end|>"],
        ),
        (
            each(
                "{% if m['content'] is string %}{{ m['content'] }}"
                "{% elif m['content'] | selectattr('type', 'equalto', 'image') | list | length == 0 %}"
                + RAISES
                + "{% else %}"
                + parts()
                + "{% endif %}"
            ),
            "parts beside images alone",
            ["Red?<|end|>", " Yes, red. <|end|>"],
        ),
    ],
)
def test_content_is_passed_as_the_template_wants_it(
    teacher_parts: Any, template: str, style: str, talk: list[str]
) -> None:
    preparer = with_template(teacher_parts, template)
    preparer.check_template("chat")
    preparer.check_images("sft", "chat")
    assert preparer.chat._style[0] == style
    made = preparer.prepare(sample(TALK))
    assert said(preparer, made) == talk
    assert len(made.layout) == 1
    whole = preparer.tokenizer.decode(made.text.ids.tolist())
    assert "[" not in whole and "type" not in whole and whole.count("Red?") == 3
    assert said(preparer, preparer.prepare(sample(TEXT))) == ["It.<|end|>"]
    assert said(preparer, preparer.prepare(sample(SYSTEM))) == ["Green.<|end|>"]
    prompt, _ = preparer.chat.prompt(sample(TALK).turns[:-1])
    assert prompt.endswith("<|assistant|>") and prompt.count("Red?") == 3


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m['role'] }%}", "chat template cannot be used .*unexpected '}'"),
        ("{{ raise_exception('Not for you') }}", "Not for you"),
        ("{{ messages[9].role.x }}", "template refuses it"),
        ("{% for m in messages %}{{ m.role + 1 }}{% endfor %}", "template refuses it: can only concatenate"),
        (each("{{ m['content'] | tojson }}"), "writes content as a Python or JSON list"),
        (each(parts("p['text'] | upper")), "0 times"),
        (each(parts("p['text'] | lower")), "other texts than it is given|0 times"),
        (each(BOTH + BOTH), "2 times"),
        (each(BOTH, "messages[-1:]"), "turn 0 .user. 0 times"),
        (each(BOTH, "messages[::-1]"), "before that of an earlier turn"),
        (
            each(BOTH, prompt=PROMPT.replace("<|assistant|>", "<|assistant|><think>")),
            "generation prompt is not a prefix",
        ),
        (each("{% if m['role'] == 'user' and not loop.last %}(said){% endif %}" + BOTH), "rewrites earlier turns"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_writes_no_exchange_rightly_is_one_line(teacher_parts: Any, template: str, why: str) -> None:
    preparer = with_template((copy.deepcopy(teacher_parts[0]), teacher_parts[1]), template)
    preparer.tokenizer.chat_template = None
    with pytest.raises(CompatibilityError, match=why) as caught:
        preparer.check_template("chat")
    assert "\n" not in str(caught.value) and "template" in str(caught.value)


def test_a_template_without_images_serves_rows_without_images(teacher_parts: Any) -> None:
    texts = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    preparer = with_template(teacher_parts, each(texts))
    preparer.check_template("chat")
    assert said(preparer, preparer.prepare(sample(TEXT))) == ["It.<|end|>"]
    with pytest.raises(SkipSample, match=r"template_refused.*writes 0 times <image> for 1 images"):
        preparer.prepare(sample(TALK))
    with pytest.raises(CompatibilityError, match=r'part sft: template "chat": .*writes no row with an image .*"v1"'):
        preparer.check_images("sft", "chat")


def test_a_processor_that_takes_no_image_of_a_part_is_one_line(teacher_parts: Any) -> None:
    preparer = with_template(teacher_parts, each(BOTH))
    preparer.image_token_id = preparer.tokenizer.convert_tokens_to_ids("<pad>")
    with pytest.raises(CompatibilityError, match=r"part sft: .*no <pad> .* not this model's processor"):
        preparer.check_images("sft", "chat")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + each(BOTH),
            "No system role",
        ),
        (each(BOTH, "messages if m['role'] != 'system'"), r"turn 0 \(system\) 0 times"),
    ],
)
def test_a_refused_system_turn_is_a_skipped_row(teacher_parts: Any, template: str, why: str) -> None:
    preparer = with_template(teacher_parts, template)
    preparer.check_template("chat")
    for ask in (preparer.prepare, lambda row: preparer.chat.prompt(row.turns[:-1])):
        with pytest.raises(SkipSample, match=rf"template_refused.*{why}"):
            ask(sample(SYSTEM))
    assert said(preparer, preparer.prepare(sample(TALK))) == ["Red?<|end|>", " Yes, red. <|end|>"]


def test_a_template_that_wants_a_system_turn_serves_rows_that_have_one(teacher_parts: Any) -> None:
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system turn') }}{% endif %}"
    preparer = with_template(teacher_parts, wants + each(BOTH))
    preparer.check_template("chat")
    preparer.check_images("sft", "chat")
    assert said(preparer, preparer.prepare(sample(SYSTEM))) == ["Green.<|end|>"]
    with pytest.raises(SkipSample, match=r"template_refused.*No system turn"):
        preparer.prepare(sample(TALK))


def test_what_was_learned_of_a_template_travels_to_other_processes(teacher_parts: Any) -> None:
    chat, turns = with_template(teacher_parts, each(BOTH, "messages if m['role'] != 'system'")).chat, sample(TEXT).turns
    with pytest.raises(SkipSample):
        chat.render(sample(SYSTEM).turns)
    assert pickle.loads(pickle.dumps(chat)).render(turns) == chat.render(turns)


def test_a_system_turn_is_never_written_alone(teacher_parts: Any) -> None:
    wants = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}" + RAISES + "{% endif %}"
    preparer, plain = with_template(teacher_parts, wants + each(BOTH)), with_template(teacher_parts, each(BOTH))
    for turns in (SYSTEM, (SYSTEM[0], *TALK), (SYSTEM[0], ("user", "<image>"), ("assistant", "x"))):
        made, same = preparer.prepare(sample(turns)), plain.prepare(sample(turns))
        assert made.input_ids.tolist() == same.input_ids.tolist()
        assert made.text.turn.tolist() == same.text.turn.tolist() and made.text.role.tolist() == same.text.role.tolist()
        system = made.text.ids[made.text.role == 0].tolist()
        assert preparer.tokenizer.decode(system) == "<|system|>Be brief.<|end|>"


def test_a_system_turn_that_stands_in_the_users_is_told_from_it(teacher_parts: Any) -> None:
    """As Gemma's and Llama 2's."""
    template = (
        "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for m in rest %}<|{{ m['role'] }}|>"
        "{% if loop.first and rest | length < messages | length %}[{{ messages[0]['content'][0]['text'] }}]\n\n{% endif %}"
        + parts()
        + "<|end|>{% endfor %}"
        + PROMPT
    )
    preparer = with_template(teacher_parts, template)
    made = preparer.prepare(sample((SYSTEM[0], ("user", "What?"), SYSTEM[2])))
    assert said(preparer, made) == ["Green.<|end|>"]
    system, user = (preparer.tokenizer.decode(made.text.ids[made.text.role == role].tolist()) for role in (0, 1))
    assert (system, user) == ("<|user|>[Be brief.]\n\n", "What?<|end|>")


@pytest.mark.parametrize(
    "extra", ["{% if m['role'] == 'assistant' and not loop.last %}(earlier){% endif %}", "{{ loop.revindex }}: "]
)
def test_rewritten_earlier_turns_are_skipped_or_refused(teacher_parts: Any, extra: str) -> None:
    preparer = with_template(teacher_parts, each(extra + BOTH))
    with pytest.raises(SkipSample, match=r"template_refused.*rewrites earlier turns: turn 1"):
        preparer.prepare(sample(TALK))


def test_an_end_that_the_last_answer_alone_has_is_refused(teacher_parts: Any) -> None:
    template = each(BOTH).replace(
        "<|end|>{% endfor %}", "{% if loop.last or m['role'] != 'assistant' %}<|end|>{% endif %}{% endfor %}"
    )
    preparer = with_template(teacher_parts, template)
    assert said(preparer, preparer.prepare(sample(TEXT))) == ["It.<|end|>"]
    with pytest.raises(SkipSample, match=r"rewrites earlier turns"):
        preparer.prepare(sample(TALK))


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set cut = m.content.split('</think>') %}"
    "{% set thought = cut[0].split('<think>')[-1] if cut | length > 1 else '' %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ cut[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)


@pytest.mark.parametrize(("opened", "first"), [("", "<think>\n"), ("<think>\n", "")])
def test_thoughts_belong_to_the_last_answer(opened: str, first: str) -> None:
    """As templates of "thinking" models: the last answer begins with its thoughts, earlier ones are written without."""
    tokenizer = qwen_like()
    tokenizer.chat_template = THINKS.replace("OPEN", opened.replace("\n", "{{ '\\n' }}"))
    chat = Chat(tokenizer)
    chat.check()

    def labels(*turns: tuple[str, str]) -> list[str]:
        made = chat.render([Turn(*turn) for turn in turns])
        theirs = tokenizer.apply_chat_template(chat.messages([Turn(*turn) for turn in turns]), tokenize=False)
        assert made.text == theirs
        return [made.text[a:b] for a, b in made.answers]

    talk = (("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
    assert labels(*talk) == ["one<|im_end|>", f"{first}\n</think>\n\ntwo<|im_end|>"]
    thought = ("assistant", "<think>\nhm\n</think>\n\ntwo")
    assert labels(*talk[:3], thought) == ["one<|im_end|>", f"{first}hm\n</think>\n\ntwo<|im_end|>"]
    assert labels(talk[0], thought) == [f"{first}hm\n</think>\n\ntwo<|im_end|>"]
    with pytest.raises(SkipSample, match=r"template_refused"):
        labels(talk[0], thought, *talk[2:])


ENDLESS = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    + parts("p['text'] + ' '")
    + "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FIRST = "{{ bos_token }}" + ENDLESS
ROWS = (TEXT, TALK, SYSTEM, (("user", "  one\n"), ("assistant", "two  "), ("user", "three")))


def around(loaded: tuple[Any, Any], tokenizer: Any, template: str, on_processor: bool) -> Preparer:
    """The tiny teacher's processor around a tokenizer, whose template is the processor's or its own."""
    from transformers import LlavaProcessor

    processor, config = loaded
    tokenizer.chat_template = template
    made = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="full",
        chat_template=template if on_processor else None,
    )
    config = copy.deepcopy(config)
    config.image_token_id = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", "<image>"))
    return Preparer(made, config)


def transformers_own(preparer: Preparer, row: Sample, prompt: bool = False) -> list[int]:
    """Token ids of the row (or of the question before its last answer) by ``apply_chat_template(tokenize=True)``."""
    turns = row.turns[:-1] if prompt else row.turns
    messages, how = (
        preparer.chat.messages(turns),
        {"tokenize": True, "add_generation_prompt": prompt, "return_dict": True},
    )
    pictures = [decode_image(one, 10**6) for one in row.images]
    if preparer.chat.owner is preparer.tokenizer:
        return list(preparer.tokenizer.apply_chat_template(messages, **how)["input_ids"])
    extra = {"processor_kwargs": {"images": pictures}} if pictures else {}
    return list(preparer.processor.apply_chat_template(messages, **how, **extra)["input_ids"][0])


@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
@pytest.mark.parametrize(
    "template", [ENDLESS, FIRST, FIRST.replace(parts("p['text'] + ' '"), STRING)], ids=["without", "first", "strings"]
)
@pytest.mark.parametrize("on_processor", [True, False])
def test_ids_are_transformers_own(teacher_parts: Any, tokenizer: Any, template: str, on_processor: bool) -> None:
    if "bos_token" in template and tokenizer is qwen_like:
        template = template.replace("{{ bos_token }}", "")
    preparer = around(teacher_parts, tokenizer(), template, on_processor)
    for turns in ROWS:
        row = sample(turns)
        if row.images and not on_processor:
            continue  # a tokenizer knows no images
        made = preparer.prepare(row)
        assert made.input_ids.tolist() == transformers_own(preparer, row)
        if turns[-1][0] == "assistant" and not row.images:
            text, begins = preparer.chat.prompt(row.turns[:-1])
            asked = preparer.tokenizer(text, add_special_tokens=begins)["input_ids"]
            assert asked == transformers_own(preparer, row, prompt=True)
    if tokenizer is llama_like:
        first = preparer.prepare(sample(TEXT)).input_ids[0] == preparer.tokenizer.bos_token_id
        assert first == (on_processor or "bos_token" in template)


def test_version_1_adds_no_first_token(teacher_parts: Any) -> None:
    new = around(teacher_parts, llama_like(), ENDLESS, True)
    old = Preparer(new.processor, new.config, version=1)
    for turns in (TEXT, TALK):
        ours, theirs = new.prepare(sample(turns)), old.prepare(sample(turns))
        assert ours.input_ids.tolist() == [new.tokenizer.bos_token_id, *theirs.input_ids.tolist()]
        assert ours.labels.tolist() == theirs.labels.tolist()
