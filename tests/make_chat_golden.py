"""Write tests/chat_golden: published chat templates, and what transformers renders with them.

Run by hand, in an environment with transformers (no torch), when a template or case is added:

    pip install transformers jinja2
    python tests/make_chat_golden.py

Each file holds the template with its source and special tokens, and cases: messages, variables of
the template where there are any, and the text up to the answer or the template's own refusal.
"""

import json
import pathlib
from typing import Any

import jinja2
import tokenizers
import transformers

GOLDEN = pathlib.Path(__file__).parent / "chat_golden"

# name: (where it is published, bos_token, eos_token, chat_template of its tokenizer_config.json)
TEMPLATES = {
    "llama_2": (
        "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf",
        "<s>",
        "</s>",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
        "}}{% endif %}{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] "
        "%}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' "
        "}}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
    ),
    "llama_3": (
        "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "tinyllama": (
        "https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "<s>",
        "</s>",
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
    ),
    # Not published: what the three above do not use of what transformers gives a template.
    "helpers": (
        "this script",
        "<s>",
        "</s>",
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {%- if message.role == 'stop' %}{% break %}{% endif %}\n"
        "    {%- if loop.first and tools is none %}{{ {'a': '<é>', 'b': [1, 2]} | tojson }}\n"
        "{{ {'b': {'c': true}} | tojson(indent=2) }}{%- endif %}\n"
        "    {% set role = message.role %}\n"
        "    {%- generation %}{% set role = 'inner' %}{{ message.content }}{% endgeneration %}\n"
        "    {{- '|' + role + (sep | default('')) }}\n{%- endfor %}\n"
        "  {% if add_generation_prompt %}\n{{ undefined_name }}answer:\n  {% endif %}\n",
    ),
}

USER = {"role": "user", "content": "  What is 2 + 2?\n"}
CONVERSATION = [
    {"role": "system", "content": "Be brief. \u00c9t\u00e9 \U0001f600"},
    USER,
    {"role": "assistant", "content": " Four. "},
    {"role": "user", "content": '<b>Why</b> & how "so"?'},
]
CASES: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": CONVERSATION},
    {"messages": CONVERSATION[1:]},
    {"messages": CONVERSATION[:3]},
    {"messages": [USER, USER]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [USER], "variables": {"sep": ";"}},
]


def render(tokenizer: Any, case: dict[str, Any]) -> dict[str, str]:
    """Return the text of a case, or what the template says against it."""
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tokenize=False,
            add_generation_prompt=True,
            **case.get("variables", {}),
        )
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    return {"text": text}


def write_golden(name: str) -> None:
    source, bos, eos, template = TEMPLATES[name]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({bos: 0, eos: 1}, unk_token=bos))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=bos, eos_token=eos, chat_template=template
    )
    golden = {
        "source": source,
        "transformers": transformers.__version__,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": template,
        "cases": [{**case, **render(tokenizer, case)} for case in CASES],
    }
    (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in TEMPLATES:
        write_golden(name)
