"""The command line: flags, and how a script ends."""
