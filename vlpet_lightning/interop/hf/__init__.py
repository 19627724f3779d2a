"""Hugging Face peft: its methods as units, and our LoRA in its format."""
