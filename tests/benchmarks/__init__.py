"""Speed and memory, measured and never asserted: ``make bench``."""
