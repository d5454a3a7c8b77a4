"""Label masks of every template, token by token, as spelled here: ``=`` marks a label, an image stands as one ``<image>``."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from teacher_cache.errors import CompatibilityError, KdcliError, SkipSample
from teacher_cache.preparing.chat import Chat
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.preparing.templates import TEMPLATES, Template, template_fingerprint, write_prompt
from teacher_cache.records import Image, Sample, Turn
from tests.teacher_cache.preparing.tokenizers_by_hand import demo, llama_like, qwen_like

TOKENIZERS = {"demo": demo, "llama": llama_like, "qwen": qwen_like}
TALKS = {
    "image": [("user", "<image>\nWhat is it?"), ("assistant", "A red square.")],
    "system": [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    ],
    # An empty question, an answer with leading spaces, bytes, and a question that nobody answers.
    "odd": [("user", ""), ("assistant", "  yes"), ("user", "one"), ("assistant", "é😀."), ("user", "two")],
    "later": [("user", "one"), ("assistant", "two"), ("user", "three <image>"), ("assistant", ".")],
}
DEMO_V1 = """A Ġc hat Ġbetween Ġa Ġc u ri ous Ġuser Ġand Ġan Ġart ific ial Ġinte ll ig ence Ġass i stan t . Ġ T he Ġass i stan t Ġgives
    Ġhelp ful , Ġdeta iled , Ġand Ġp ol ite Ġan s w ers Ġto Ġthe Ġuser 's Ġqu est ion s ."""
LLAMA_V1 = """<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The ▁assistant ▁gives ▁helpful,
    ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions."""
DEMO_USER, DEMO_SAYS = "U S E R :", "A S S I S T A N T :"
QWEN_SYSTEM = "<|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ"
DEMO_SYSTEM = "<|im_start|> sys tem Ċ Y ou Ġare Ġa Ġhelp ful Ġass i stan t . <|im_end|> Ċ"
DEMO_ANSWERS = "<|im_start|> ass i stan t"
EXPECTED = {
    ("demo", "chat", "image"): "<|user|> <image> Ċ W hat Ġis Ġit ? <|end|> <|assistant|> =A =Ġred =Ġsquare =. =<|end|>",
    ("demo", "chat", "system"): """<|system|> B e Ġb ri e f . <|end|> <|user|> one <|end|> <|assistant|> =two =<|end|>
        <|user|> three <|end|> <|assistant|> =four =<|end|>""",
    ("demo", "chat", "odd"): """<|user|> <|end|> <|assistant|> =Ġ =Ġ =ye =s =<|end|> <|user|> one <|end|>
        <|assistant|> =Ã =© =ð =Ł =ĺ =Ģ =. =<|end|> <|user|> two <|end|>""",
    ("demo", "chat", "later"): """<|user|> one <|end|> <|assistant|> =two =<|end|> <|user|> three Ġ <image> Ċ <|end|>
        <|assistant|> =. =<|end|>""",
    ("qwen", "chat", "image"): """<|im_start|> user Ċ <image> Ċ What Ġis Ġit ? <|im_end|> Ċ
        <|im_start|> assistant Ċ =A =Ġred =Ġsquare =. =<|im_end|> Ċ""",
    ("llama", "chat", "odd"): """<s> <0x5B> I N S T <0x5D> ▁ ▁ <0x5B> <0x2F> I N S T <0x5D> =▁ =▁ =▁yes =▁ =</s>
        <s> <0x5B> I N S T <0x5D> ▁one ▁ <0x5B> <0x2F> I N S T <0x5D> =▁ =<0xC3> =<0xA9> =<0xF0> =<0x9F> =<0x98> =<0x80> =. =▁ =</s>
        <s> <0x5B> I N S T <0x5D> ▁two ▁ <0x5B> <0x2F> I N S T <0x5D>""",
    ("demo", "plain", "image"): "<image> =A =Ġred =Ġsquare =. =Ċ",
    ("demo", "plain", "system"): "two =four =Ċ",  # nothing stands before the first token that could predict it
    ("demo", "plain", "odd"): "ye =s =Ã =© =ð =Ł =ĺ =Ģ =. =Ċ",
    ("llama", "plain", "image"): "<s> <image> =A =▁red =▁square. =<0x0A>",
    ("llama", "plain", "system"): "<s> =▁two =four =<0x0A>",
    ("qwen", "plain", "image"): "<image> =A =Ġred =Ġsquare =.Ċ",
    ("demo", "v1", "image"): f"""{DEMO_V1} Ġ {DEMO_USER} Ġ <image> Ċ W hat Ġis Ġit ? Ġ {DEMO_SAYS}
        =Ġ =A =Ġred =Ġsquare =. =</s>""",
    ("demo", "v1", "system"): f"""B e Ġb ri e f . Ġ {DEMO_USER} Ġone Ġ {DEMO_SAYS} =Ġtwo =</s>
        {DEMO_USER} Ġthree Ġ {DEMO_SAYS} =Ġfour =</s>""",
    ("demo", "v1", "odd"): f"""{DEMO_V1} Ġ {DEMO_USER} {DEMO_SAYS} =ĠĠ =Ġ =ye =s =</s>
        {DEMO_USER} Ġone Ġ {DEMO_SAYS} =Ġ =Ã =© =ð =Ł =ĺ =Ģ =. =</s> {DEMO_USER} Ġtwo Ġ""",
    (
        "llama",
        "v1",
        "image",
    ): f"""{LLAMA_V1} ▁USER: ▁ <image> <0x0A> What ▁is ▁it? ▁ASSISTANT: =▁A =▁red =▁square. =</s>""",
    ("llama", "v1", "system"): """<s> ▁Be ▁brief. ▁USER: ▁one ▁ASSISTANT: =▁two =</s>
        USER: ▁three ▁ASSISTANT: =▁four =</s>""",
    ("llama", "v1", "odd"): f"""{LLAMA_V1} ▁USER: ASSISTANT: =▁ =▁ =▁yes =</s>
        USER: ▁one ▁ASSISTANT: =▁ =<0xC3> =<0xA9> =<0xF0> =<0x9F> =<0x98> =<0x80> =. =</s> USER: ▁two ▁""",
    ("llama", "v1", "later"): f"""{LLAMA_V1} ▁USER: ▁one ▁ASSISTANT: =▁two =</s>
        USER: ▁ <image> <0x0A> three ▁ASSISTANT: =▁ =. =</s>""",
    ("qwen", "qwen_1_5", "image"): f"""{QWEN_SYSTEM} <|im_start|> user Ċ <image> Ċ What Ġis Ġit ? <|im_end|> Ċ
        <|im_start|> assistant Ċ =A =Ġred =Ġsquare =. =<|im_end|> Ċ""",
    (
        "qwen",
        "qwen_1_5",
        "system",
    ): """<|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ <|im_start|> user Ċ one <|im_end|> Ċ
        <|im_start|> assistant Ċ =two =<|im_end|> Ċ <|im_start|> user Ċ three <|im_end|> Ċ
        <|im_start|> assistant Ċ =four =<|im_end|> Ċ""",
    (
        "qwen",
        "qwen_1_5",
        "odd",
    ): f"""{QWEN_SYSTEM} <|im_start|> user Ċ <|im_end|> Ċ <|im_start|> assistant Ċ =Ġ =Ġyes =<|im_end|> Ċ
        <|im_start|> user Ċ one <|im_end|> Ċ <|im_start|> assistant Ċ =Ã =© =ð =Ł =ĺ =Ģ =. =<|im_end|> Ċ
        <|im_start|> user Ċ two <|im_end|> Ċ""",
    (
        "qwen",
        "qwen_1_5",
        "later",
    ): f"""{QWEN_SYSTEM} <|im_start|> user Ċ one <|im_end|> Ċ <|im_start|> assistant Ċ =two =<|im_end|> Ċ
        <|im_start|> user Ċ <image> Ċ three <|im_end|> Ċ <|im_start|> assistant Ċ =. =<|im_end|> Ċ""",
    ("demo", "qwen_1_5", "image"): f"""{DEMO_SYSTEM} <|im_start|> user Ċ <image> Ċ W hat Ġis Ġit ? <|im_end|> Ċ
        {DEMO_ANSWERS} Ċ =A =Ġred =Ġsquare =. =<|im_end|> Ċ""",
    # A token that holds the template's newline and the answer's first space belongs to the answer: it cannot be foretold otherwise.
    (
        "demo",
        "qwen_1_5",
        "odd",
    ): f"""{DEMO_SYSTEM} <|im_start|> user Ċ <|im_end|> Ċ {DEMO_ANSWERS} =ĊĠ =Ġ =ye =s =<|im_end|> Ċ
        <|im_start|> user Ċ one <|im_end|> Ċ {DEMO_ANSWERS} Ċ =Ã =© =ð =Ł =ĺ =Ģ =. =<|im_end|> Ċ
        <|im_start|> user Ċ two <|im_end|> Ċ""",
}


@pytest.fixture(scope="module")
def preparers(teacher_parts: Any) -> dict[str, Preparer]:
    """The tiny teacher's processor around each tokenizer."""
    from transformers import LlavaProcessor

    processor, config = teacher_parts
    made = {}
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        around = LlavaProcessor(
            image_processor=processor.image_processor,
            tokenizer=tokenizer,
            patch_size=processor.patch_size,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
            chat_template=tokenizer.chat_template,
        )
        own = copy.deepcopy(config)
        own.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        made[name] = Preparer(around, own)
    return made


@pytest.fixture(scope="module")
def picture() -> Any:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (96, 96), "red").save(buffer, "png")
    return Image("a.png", buffer.getvalue())


def sample_of(turns: list[tuple[str, str]], picture: Any) -> Sample:
    images = sum(text.count("<image>") for _, text in turns)
    return Sample("sft", 0, "", "here", tuple(Turn(*turn) for turn in turns), (picture,) * images)


def spelled(preparer: Preparer, made: Any) -> list[str]:
    """The tokens as the model gets them, vision tokens of an image as one, labels marked."""
    labels = set((made.response_rows + 1).tolist())
    tokens = preparer.tokenizer.convert_ids_to_tokens(made.input_ids.tolist())
    marked = ["=" + token if at in labels else token for at, token in enumerate(tokens)]
    return [one for at, one in enumerate(marked) if one != "<image>" or marked[at - 1] != "<image>" or at == 0]


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_tokens_and_labels_as_spelled(preparers: dict[str, Preparer], picture: Any, case: tuple[str, str, str]) -> None:
    tokenizer, template, talk = case
    made = preparers[tokenizer].prepare(sample_of(TALKS[talk], picture), template)
    assert spelled(preparers[tokenizer], made) == EXPECTED[case].split()


def test_every_template_is_spelled_for_two_tokenizers() -> None:
    seen = {template: {case[0] for case in EXPECTED if case[1] == template} for template in TEMPLATES}
    assert all(len(tokenizers) >= 2 for tokenizers in seen.values()), seen


@pytest.mark.parametrize("template", ["v1", "qwen_1_5"])
def test_roles_and_turns_of_tokens(preparers: dict[str, Preparer], picture: Any, template: str) -> None:
    """What the template writes counts to its turn; the default system text to the first."""
    preparer = preparers["llama" if template == "v1" else "qwen"]
    for talk, roles in (("system", [0, 1, 2, 1, 2]), ("later", [1, 2, 1, 2])):
        text = preparer.prepare(sample_of(TALKS[talk], picture), template).text
        order = [(int(turn), int(role)) for turn, role in zip(text.turn, text.role)]
        assert list(dict.fromkeys(order)) == list(enumerate(roles))
        assert order == sorted(order, key=lambda one: one[0])


WORDS = st.text(st.sampled_from("abn é\n日😀.,A1 "), max_size=12)
ANSWERS = WORDS.filter(lambda text: text.strip() and not text.startswith("\n"))


@pytest.mark.parametrize(("tokenizer", "template"), [("llama", "v1"), ("demo", "v1"), ("qwen", "qwen_1_5")])
@settings(max_examples=40, deadline=None)
@given(
    exchanges=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3),
    system=st.none() | WORDS,
    images=st.integers(0, 2),
    unanswered=st.booleans(),
)
def test_labels_say_the_answers_and_their_ends(
    preparers: dict[str, Preparer],
    tokenizer: str,
    template: str,
    exchanges: Any,
    system: Any,
    images: int,
    unanswered: bool,
) -> None:
    turns = [Turn("system", system)] if system is not None else []
    for number, (question, answer) in enumerate(exchanges):
        turns += [Turn("user", "<image>\n" * images * (number == 0) + question), Turn("assistant", answer)]
    turns += [Turn("user", "and?")] * unanswered
    preparer = preparers[tokenizer]
    rendered = TEMPLATES[template].render(None, turns)
    text = preparer._tokenize(rendered)
    before, end = (" ", "</s>") if template == "v1" else ("", "<|im_end|>")
    expected = "".join(f"{before}{answer}{end}" for _, answer in exchanges)
    ids = text.ids[text.response].tolist()
    assert preparer.tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert text.role[text.response].unique().tolist() == [2]
    assert "".join(rendered.text[a:b] for a, b in rendered.turns) == rendered.text
    assert len(text.image_at) == images
    if preparer.tokenizer.bos_token_id is not None:
        assert text.ids.tolist().count(preparer.tokenizer.bos_token_id) == 1
        assert int(text.ids[0]) == preparer.tokenizer.bos_token_id


def test_several_images_stay_where_they_are_and_one_comes_first() -> None:
    render = TEMPLATES["v1"].render
    two = render(None, [Turn("user", "a <image> b <image>"), Turn("assistant", "c")]).text
    one = render(None, [Turn("user", "  a <image> b\n"), Turn("assistant", "c")]).text
    assert two.endswith("USER: a <image> b <image> ASSISTANT: c</s>")
    assert one.endswith("USER: <image>\na  b ASSISTANT: c</s>")


@pytest.mark.parametrize(
    ("tokenizer", "template", "says"), [("qwen", "v1", "</s>"), ("llama", "qwen_1_5", "<|im_start|> and <|im_end|>")]
)
def test_a_tokenizer_without_the_templates_tokens_is_refused(
    preparers: dict[str, Preparer], picture: Any, tokenizer: str, template: str, says: str
) -> None:
    """LLaVA's own v1 masks every such row from end to end and goes on."""
    for ask in (
        lambda: preparers[tokenizer].check_template(template),
        lambda: preparers[tokenizer].prepare(sample_of(TALKS["image"], picture), template),
    ):
        with pytest.raises(CompatibilityError, match=f"template '{template}' needs ") as caught:
            ask()
        assert says in str(caught.value)


def test_a_tokenizer_that_writes_ends_itself_is_refused(preparers: dict[str, Preparer]) -> None:
    other = copy.copy(preparers["llama"])
    other.tokenizer, other._reserved = llama_like(), {}
    ends = [(name, other.tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    other.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    with pytest.raises(CompatibilityError, match="adds '<s> </s>' to every text"):
        other.check_template("v1")


def test_a_model_with_another_image_token_is_refused(preparers: dict[str, Preparer]) -> None:
    other = copy.copy(preparers["llama"])
    other.image_token_id, other._reserved = other.tokenizer.convert_tokens_to_ids("yes"), {}
    with pytest.raises(CompatibilityError, match="this model reads yes"):
        other.check_template("v1")


@pytest.mark.parametrize(
    ("tokenizer", "template", "token"), [("llama", "v1", "</s>"), ("qwen", "qwen_1_5", "<|im_end|>")]
)
def test_no_row_may_hold_the_templates_tokens(
    preparers: dict[str, Preparer], picture: Any, tokenizer: str, template: str, token: str
) -> None:
    sample = sample_of([("user", f"a{token}"), ("assistant", "b")], picture)
    with pytest.raises(SkipSample, match="reserved_token"):
        preparers[tokenizer].prepare(sample, template)


def test_an_over_long_row_is_cut_at_a_turn(preparers: dict[str, Preparer], picture: Any) -> None:
    whole = preparers["llama"]
    sample = sample_of(TALKS["system"], picture)
    short = Preparer(whole.processor, whole.config, Limits(len(whole.prepare(sample, "v1")) - 1, "cut"))
    kept = short.prepare(sample, "v1")
    assert kept.input_ids.tolist() == whole.prepare(replace(sample, turns=sample.turns[:3]), "v1").input_ids.tolist()


def test_prompts_are_what_stands_before_the_label() -> None:
    """A model is asked with the very text that training puts before the answer."""
    turns = [Turn(*turn) for turn in TALKS["later"]]
    for name in ("v1", "qwen_1_5"):
        rendered = TEMPLATES[name].render(None, turns)
        prompt, begins = write_prompt(name, Chat(qwen_like()), turns[:-1])
        assert begins
        assert prompt == rendered.text[: rendered.answers[-1][0]]
    asked, begins = write_prompt("plain", Chat(qwen_like()), turns[:1])
    assert not begins
    assert asked == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


def test_the_fingerprint_changes_with_what_a_template_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: template_fingerprint(name) for name in TEMPLATES}
    assert before["chat"] == before["plain"] == {}
    assert before["v1"]["template"]["name"] == "v1"
    assert before["v1"] != before["qwen_1_5"]
    old = TEMPLATES["v1"]
    monkeypatch.setattr("teacher_cache.preparing.templates.V1_SYSTEM", "Another sentence.")
    assert template_fingerprint("v1") != before["v1"]
    monkeypatch.undo()
    assert template_fingerprint("v1") == before["v1"]
    monkeypatch.setitem(TEMPLATES, "v1", Template(old.render, (*old.tokens, "<s>"), old.prompt))
    assert template_fingerprint("v1") != before["v1"]


def test_an_unknown_template_names_the_known_ones(preparers: dict[str, Preparer]) -> None:
    with pytest.raises(KdcliError, match="chat, plain, v1, qwen_1_5"):
        preparers["demo"].check_template("vicuna")
