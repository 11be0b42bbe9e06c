"""The Modelfile: parsed as Ollama does, its Go template run on conversations beside the model's own template."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cusprun.deploy.files import Files
from cusprun.deploy.ollama import KINDS, Turns, find_turns, read_sampling, write_modelfile
from cusprun.deploy.targets import Wish
from cusprun.deploy.targets.laptop import gather
from cusprun.exporters.gguf import export_gguf
from cusprun.runtimes import Message
from cusprun.runtimes.chat_template import DAY
from tests import pico
from tests.deploy.bundles_made import make_expert, write_files
from tests.exporters.models import make

RAISE = "{{ raise_exception('no') }}"
ALTERNATE = f"{{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}}{RAISE}{{% endif %}}"
# The templates of the models as they were published, without tools.
TEMPLATES = {
    "ChatML": (pico.CHAT_TEMPLATE, ""),
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "",
    ),
    "Llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
    ),
    "Llama 3.1": (  # and 3.2
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        "        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- else %}\n"
        "        {%- set date_string = \"26 Jul 2024\" %}\n    {%- endif %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \"\" %}\n{%- endif %}\n\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n\n'
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        "<|begin_of_text|>",
    ),
    "Llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}"
        "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>",
    ),
    "Mistral 0.1": (
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% else %}" + RAISE + "{% endif %}{% endfor %}",
        "<s>",
    ),
    "Mistral 0.3": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
        "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
        "{{- ' ' + message['content']|trim + eos_token}}{%- endif %}{%- endfor %}",
        "<s>",
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}" + RAISE + "{% endif %}{% for message in messages %}"
        + ALTERNATE + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<bos>",
    ),
    "Phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
        "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "",
    ),
    "Zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "",
    ),
}  # fmt: skip
EOS = "</s>"
TALK = [
    Message("user", "Wer zahlt die Miete?\nUnd wann?"), Message("assistant", "Der Mieter {{ pünktlich }}."),
    Message("user", 'a "quoted" <b> & `word`'), Message("assistant", "1"), Message("user", "2 \\n 3"),
]  # fmt: skip
SYSTEM = Message("system", "Be brief.\nAnd kind.")
TALKS = [TALK[:1], TALK[:3], TALK, [SYSTEM, *TALK[:1]], [SYSTEM, *TALK[:3]], [SYSTEM, *TALK]]


# Go's text/template, as much of it as is used -------------------------------------------------------------------------

TOKEN = re.compile(r"\{\{ (.*?) \}\}", re.S)


def run_go(template: str, messages: list[Message]) -> str:
    """What Go's text/template makes of ``template``. Fails on any construct that is not known to it."""
    parts = TOKEN.split(template)
    assert not re.search(r"\{\{|\}\}", "".join(parts[::2]))
    variables: dict[str, object] = {}
    said: list[str] = []

    def value(text: str) -> object:
        if text.startswith('"'):
            return text.strip('"')
        if re.fullmatch(r"\$\w+", text):
            return variables[text]
        if re.fullmatch(r"\$\w+\.(Role|Content)", text):
            name, field = text.split(".")
            message = variables[name]
            assert isinstance(message, Message)
            return message.role if field == "Role" else message.content
        if text in ("true", "false"):
            return text == "true"
        if found := re.fullmatch(r"eq (\S+) (\"\w+\")", text):
            return value(found[1]) == value(found[2])
        if found := re.fullmatch(r"and \(eq \$i 0\) \(ne (\S+) (\"\w+\")\)", text):
            return variables["$i"] == 0 and value(found[1]) != value(found[2])
        if found := re.fullmatch(r"and (\$\w+) \(eq \(len \(slice \$\.Messages \$i\)\) 1\)", text):
            return value(found[1]) and len(messages[int(str(variables["$i"])) :]) == 1
        raise AssertionError(f"not known: {text}")

    def end_of(at: int) -> tuple[int, list[int]]:
        """Where the block that begins behind ``at`` ends, and its branches."""
        depth, branches = 0, []
        for place in range(at, len(parts), 2):
            word = parts[place].split()[0]
            if depth == 0 and word in ("else", "end"):
                branches.append(place)
            if word in ("if", "range"):
                depth += 1
            elif word == "end":
                if depth == 0:
                    return place, branches
                depth -= 1
        raise AssertionError("a block without an end")

    def execute(at: int, stop: int) -> None:
        """Text at even places, actions at odd ones."""
        while at < stop:
            if at % 2 == 0:
                said.append(parts[at])
                at += 1
                continue
            action = parts[at]
            if found := re.fullmatch(r"range \$i, \$m := \.Messages", action):
                end, _ = end_of(at + 2)
                for number, message in enumerate(messages):
                    variables.update({"$i": number, "$m": message})
                    execute(at + 1, end)
                at = end + 1
            elif action.startswith("if "):
                end, branches = end_of(at + 2)
                for begin, finish in zip([at, *branches], branches, strict=False):
                    condition = parts[begin].removeprefix("else ").removeprefix("if ")
                    if condition == "else" or value(condition):
                        execute(begin + 1, finish)
                        break
                at = end + 1
            elif found := re.fullmatch(r"(\$\w+) :?= (.+)", action):
                variables[found[1]] = value(found[2])
                at += 1
            else:
                said.append(str(value(action)))
                at += 1

    execute(0, len(parts))
    return "".join(said)


# Ollama's Modelfile --------------------------------------------------------------------------------------------------

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
}
PARAMETERS = {"num_ctx": int, "temperature": float, "top_k": int, "top_p": float, "repeat_penalty": float, "stop": str}


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and values, by the rules of Ollama's parser.go. Fails where that would."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        line = re.compile(r"([A-Za-z]+)[ \t]+").match(text, at)
        if text[at] in "\n":
            at += 1
            continue
        assert line is not None, text[at : at + 40]
        command = line[1].lower()
        assert command in COMMANDS, command
        at = line.end()
        if command == "parameter":
            name = re.compile(r"([a-z_]+)[ \t]+").match(text, at)
            assert name is not None
            assert name[1] in PARAMETERS, name[1]
            command, at = name[1], name.end()
        if text.startswith('"""', at):
            end = text.index('"""', at + 3)
            value, at = text[at + 3 : end], end + 3
        else:
            end = text.index("\n", at)
            value, at = text[at:end].strip(), end
            if value.startswith('"'):
                assert re.fullmatch('".*"', value)
                value = value[1:-1]
        assert at == len(text) or text[at] == "\n"
        PARAMETERS.get(command, str)(value)
        found.append((command, value))
    assert [command for command, _ in found].count("from") == 1
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    pico.save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_models_own_does(tokenizer, name: str) -> None:  # type: ignore[no-untyped-def]
    template, bos = TEMPLATES[name]
    turns = find_turns(template, bos=bos, eos=EOS, adds_bos=bool(bos))
    assert turns is not None
    assert turns.kind == {"SmolLM2": "ChatML"}.get(name, name.partition(" 0")[0])
    modelfile = dict(parse_modelfile(write_modelfile("x.gguf", turns, context=512, sampling={})))
    tokenizer.bos_token, tokenizer.eos_token = bos or None, EOS
    compared = 0
    for talk in TALKS:
        conversation = [{"role": message.role, "content": message.content} for message in talk]
        try:
            wanted = tokenizer.apply_chat_template(
                conversation, chat_template=template, add_generation_prompt=True, tokenize=False, date_string=DAY
            )
        except Exception:  # a system's turn is refused by some
            assert talk[0] is SYSTEM
            assert name in ("Gemma", "Mistral 0.1")
            continue
        # Ollama puts the Modelfile's SYSTEM in front where a conversation has none, its tokenizer the bos token.
        if "system" in modelfile and talk[0] is not SYSTEM:
            talk = [Message("system", modelfile["system"]), *talk]
        assert run_go(modelfile["template"], talk) == wanted.removeprefix(bos)
        compared += 1
    assert compared >= 3
    if compared == 3:  # what such a model is given instead: the system's words with the first question
        assert SYSTEM.content + "\n\n" + TALK[0].content in run_go(modelfile["template"], [SYSTEM, *TALK])


@pytest.mark.parametrize("turns", KINDS, ids=lambda turns: turns.kind)
def test_every_kind_renders_as_its_go_template(turns: Turns) -> None:
    for talk in TALKS:
        assert run_go(turns.go_template(), talk) == turns.render(talk)


@pytest.mark.parametrize(
    "template",
    ["{% for message in messages %}### {{ message.role }}: {{ message.content }}\n{% endfor %}### assistant:",
     "{{ messages[0].content }}", RAISE, "{% bad %}",
     pico.CHAT_TEMPLATE.replace("{% endif %}", "<think>\n{% endif %}"),
     pico.CHAT_TEMPLATE.replace("+ message['content']", "+ message['content'] | upper")],
)  # fmt: skip
def test_templates_of_no_known_kind(template: str) -> None:
    assert find_turns(template, bos="", eos="", adds_bos=False) is None


def test_a_bos_token_that_the_runtime_does_not_add_has_no_kind() -> None:
    template, bos = TEMPLATES["Llama 3"]
    assert find_turns(template, bos=bos, eos=EOS, adds_bos=False) is None


def test_stop_words_and_parameters(tmp_path: Path) -> None:
    turns = find_turns(TEMPLATES["SmolLM2"][0], bos="", eos="", adds_bos=False)
    assert turns is not None
    assert read_sampling(tmp_path) == {"temperature": 0}
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}'
    )
    sampling = read_sampling(tmp_path)
    rows = parse_modelfile(
        write_modelfile("x.gguf", turns, context=2048, sampling=sampling, ends=["<|endoftext|>", '"'])
    )
    assert rows[0] == ("from", "./x.gguf")
    assert [value for command, value in rows if command == "stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert {command: value for command, value in rows[-5:]} == {
        "temperature": "0.6", "top_k": "20", "top_p": "0.95", "repeat_penalty": "1.1", "num_ctx": "2048"
    }  # fmt: skip
    assert dict(rows)["system"].startswith("You are a helpful AI assistant")
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert read_sampling(tmp_path) == {"temperature": 0}


def test_a_template_that_asks_for_the_date_is_told_one_and_the_receiver_knows(tmp_path: Path) -> None:
    model, gguf = tmp_path / "model", tmp_path / "pico.gguf"
    make(model)
    (model / "chat_template.jinja").write_text(TEMPLATES["Llama 3.1"][0].replace("{{- bos_token }}", ""))
    export_gguf(model, gguf, "q8_0")
    files = Files()
    notes = gather(replace(make_expert(tmp_path, gguf=gguf), model=model), files, Wish())
    shipped = write_files(files, tmp_path / "bundle")
    said = run_go(dict(parse_modelfile((shipped / "Modelfile").read_text()))["template"], TALK[:1])
    assert f"Today Date: {DAY}\n" in said
    assert f"the model is told that it is {DAY}" in notes.start
