"""Short chat templates with the behaviour of well-known models, and a tokenizer.

Written for these tests; the models' own templates are read from TRL if it is installed.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = re.compile(
    r"<[|｜][^<>|｜{}'\"]+[|｜]>|<(?:start|end)_of_\w+>|<\|?turn\|?>|\[gMASK\]|<sop>|\[/?INST\]"
)

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
FOOT = "<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

CHATML = HEAD + "{{ m.content }}" + FOOT + PROMPT
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML
)
TRIMS = HEAD + "{{ m.content | trim }}" + FOOT + PROMPT
# Qwen3's: earlier turns lose their reasoning, the last one has a block of it, empty or not.
STRIPS_THINKING = (
    HEAD + "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts[1:] }}\n"
    "</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    + FOOT
    + PROMPT
)
# DeepSeek-R1's: the generation prompt begins the reasoning, and answers lose theirs.
BEGINS_THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Nemotron's: the generation prompt begins the reasoning differently from an answer without reasoning.
EMPTY_THINKING = (
    HEAD + "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content }}" + FOOT + PROMPT.replace("assistant\n", "assistant\n<think>\n")
)
# gpt-oss's: the current date, and the last answer ends with another token.
DATED = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Phi-3's: EOS after the whole chat.
ENDS_ONCE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# SmolLM3's: earlier turns lose their reasoning; generation markers.
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{{ '' if add_generation_prompt else '<|done|>' }}" + PROMPT
)
# Llama 2's and Mistral's: the system prompt goes into the next message of the user.
INST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Gemma's: no system prompt, and the assistant has another name.
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
# GLM-4's: an answer ends where the next message begins.
NO_END = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Multimodal models': contents are lists of blocks.
BLOCKS = (
    HEAD + "{% for b in m.content %}{{ b.text if b.type == 'text' }}{% endfor %}" + FOOT + PROMPT
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}" + HEAD + "{{ m.content }}{% for c in m.tool_calls %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}" + FOOT + PROMPT
)
# Gemma 4's: messages of the assistant in a row are one turn.
MERGES = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.previtem.role != 'assistant' %}"
    "<|{{ m.role }}|>{% endif %}{{ m.content }}"
    "{% if m.role != 'assistant' or loop.last or loop.nextitem.role != 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNTS = "{{ messages|length }}" + CHATML


def byte_tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    """One token per byte and per special token of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    special = set(SPECIAL.findall(str(template))) | {"<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.add_tokens(["<think>", "</think>"])
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
