"""Fine-tune language models with low-rank adapters from one YAML recipe."""

__version__ = "0.1.0"
