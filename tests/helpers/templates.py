"""Chat templates of reasoning models, reduced to their structure."""

# An assistant message with its reasoning, in the style of Qwen3, of DeepSeek R1 (where the prompt opens the block) and
# of gpt-oss.
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
