"""Chat templates of reasoning models, cut down to their shape."""

# An assistant's message with its reasoning as the templates of Qwen3, of DeepSeek R1 (whose prompt opens the block),
# and of gpt-oss write it, in short.
_TURNS = "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
_END = "{% else %}{{ '\n' + m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
QWEN = (
    _TURNS
    + "{{ '\n<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' + m['content'] }}"
    + _END
    + "{{ '<|start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    + "{% endif %}"
)
OPENED = (
    _TURNS
    + "{{ '\n' + m['content'].split('</think>')[-1] }}"
    + _END
    + "{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
CHANNELS = (
    _TURNS
    + "{% if m['thinking'] %}{{ '<|channel|>analysis<|message|>' + m['thinking'] + '<|close|><|start|>assistant' }}"
    + "{% endif %}{{ '<|channel|>final<|message|>' + m['content'] }}"
    + _END
    + "{{ '<|start|>assistant' }}{% endif %}"
)
