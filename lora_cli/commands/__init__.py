"""One verb a file. A command takes plain arguments, knows nothing of flags, and prints nothing."""
