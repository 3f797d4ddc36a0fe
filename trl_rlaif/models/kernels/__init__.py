"""The same numbers from less work: LoRA layers, attention, precision and output heads, for every trainer."""
