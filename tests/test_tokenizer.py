"""The tokenizer against `tokenizers` itself, and chat templates against transformers' rendering."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import lcore
from lcore.models import Decoder, ModelConfig, Tokenizer

TEXT = "def read(path):\n    return path.read_text()  # naïve — 東京 🙂\n"
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m.content | trim + ('!' if loop.index0 == ns.last else '') }}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0].content %}
    {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message.role == 'user' %}
[INST] {{ (system ~ '\\n\\n' if system is defined and loop.first else '') + message.content }} [/INST]
    {% else %}
{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{% if day is defined %}
{{ strftime_now('%Y') | length }} {{ dict(b='<é>', a=[1, none]) | tojson(indent=2) }}
{% endif %}
"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is in <doc>? "},
    {"role": "assistant", "content": "Words."},
    {"role": "user", "content": "Which?"},
]
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds <é>.", "parameters": {"a": [1, 2]}}}]


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE that puts a bos token before each text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 20], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def folder_with(backend, path, template=CHATML, **settings):
    """The folder that transformers writes for this tokenizer, and the tokenizer that wrote it."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    theirs.chat_template = template
    theirs.save_pretrained(path)
    return theirs


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def test_ids_and_text_equal_tokenizers(backend, tmp_path):
    folder_with(backend, tmp_path, **SPECIAL)
    ours = Tokenizer.from_folder(tmp_path)
    for text in (TEXT, "", " ", "<|im_start|>user\n", TEXT * 500):
        assert ours.encode(text) == backend.encode(text).ids
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == backend.encode(text, add_special_tokens=False).ids
        assert ours.decode(plain) == text
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text.replace("<|im_start|>", "")
    assert ours.vocab_size == backend.get_vocab_size()
    assert ours.special_tokens == SPECIAL
    assert ours.eos_token_ids == (1,)


def test_truncation_in_the_file_is_switched_off(backend, tmp_path):
    cut = tokenizers.Tokenizer.from_str(backend.to_str())
    cut.enable_truncation(5)
    cut.enable_padding(length=9)
    cut.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode(TEXT) == backend.encode(TEXT).ids
    assert ours.special_tokens == {}
    assert ours.eos_token_ids == ()


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize(
    "options",
    [{}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"day": True, "bos_token": "<other>"}],
    ids=["plain", "prompt", "tools", "variables"],
)
@pytest.mark.parametrize("first", [0, 1], ids=["system", "no-system"])
def test_chat_templates_equal_transformers(template, options, first, backend, tmp_path):
    theirs = folder_with(backend, tmp_path, template, **SPECIAL)
    ours = Tokenizer.from_folder(tmp_path)
    chat = [*CHAT[first:], {"role": "skip", "content": "x"}] if template is CHATML else CHAT[first:]
    want = theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.apply_chat_template(chat, **options) == want
    assert "Which?" in want


def test_where_templates_are_kept(backend, tmp_path):
    """In a file, in tokenizer_config.json, and several by name in either."""
    folder_with(backend, tmp_path, {"default": "D{{ messages[0].content }}", "tool_use": "T"}, **SPECIAL)
    ours = Tokenizer.from_folder(tmp_path)
    chat = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(chat) == "Dx"
    assert ours.apply_chat_template(chat, tools=TOOLS) == "T"
    assert ours.apply_chat_template(chat, chat_template="tool_use") == "T"
    assert ours.apply_chat_template(chat, chat_template="J{{ messages|length }}") == "J1"

    for path in tmp_path.rglob("*.jinja"):
        path.unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings | {"chat_template": "S{{ eos_token }}", "eos_token": {"content": "</s>"}}))
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(chat) == "S</s>"
    path.write_text(json.dumps(settings | {"chat_template": [{"name": "default", "template": "L"}]}))
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(chat) == "L"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="chat_template") as caught:
        Tokenizer.from_folder(tmp_path).apply_chat_template(chat)
    assert str(caught.value) == (
        "lcore.Tokenizer.apply_chat_template: chat_template must be given: the checkpoint has none, got None"
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LLAMA, "Roles must alternate user/assistant"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ namespace.__init__.__globals__ }}", "access to attribute '__init__' of 'function' object is unsafe."),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "name '_x' of a namespace is unsafe."),
        ("{{ namespace(_x=1) }}", "name '_x' of a namespace is unsafe."),
        ("{{ missing.field }}", "'missing' is undefined"),
    ],
)
def test_templates_that_stop(template, text, backend):
    ours = Tokenizer(backend, SPECIAL, template)
    with pytest.raises(ValueError, match="chat_template stopped") as caught:
        ours.apply_chat_template([{"role": "assistant", "content": "x"}])
    assert str(caught.value) == f"lcore.Tokenizer.apply_chat_template: chat_template stopped: {text}"


def test_only_plain_data_reaches_a_template(backend):
    ours = Tokenizer(backend, SPECIAL, "{{ messages[0].content }}")
    with pytest.raises(TypeError) as caught:
        ours.apply_chat_template([{"role": "user", "content": object()}])
    assert str(caught.value) == ("lcore.Tokenizer.apply_chat_template: messages must hold JSON values only, got object")
    with pytest.raises(NotImplementedError) as refused:
        ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True)
    assert str(refused.value) == (
        "lcore.Tokenizer.apply_chat_template: tokenize must be left out: the text is returned, got True"
    )
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize("template", [CHATML, {"default": LLAMA, "tool_use": CHATML}, None])
def test_saved_with_the_model(template, backend, tmp_path):
    config = ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1)
    Decoder(config, tokenizer=Tokenizer(backend, SPECIAL, template)).save(tmp_path / "m")
    ours = lcore.load_model(tmp_path / "m").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"] == backend.encode(TEXT).ids
    assert ours.chat_template == template == theirs.chat_template
    assert (ours.eos_token_ids, theirs.eos_token_id) == ((1,), 1)
    if template:
        assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)


def test_end_ids_join_those_of_the_model(backend, tmp_path):
    config = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, eos_token_ids=(3, 1)
    )
    Decoder(config, tokenizer=Tokenizer(backend, SPECIAL)).save(tmp_path / "m")
    assert lcore.load_model(tmp_path / "m").tokenizer.eos_token_ids == (3, 1)
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    assert lcore.load_model(tmp_path / "m").tokenizer is None
