"""``python -m lora_cli`` is the ``lora`` command."""

from lora_cli.cli import main

main()
